"""A temporary folder for private keys and the processes that use it; both end with the command.

A command that is killed cannot clean up after itself. So a small process, the guard, holds the
other end of a pipe: when the command ends, by whatever signal, the pipe closes, and the guard kills
the processes that the command has started (a token in their environment, read from /proc,
identifies them) and removes the folder.
"""

import contextlib
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from hybridkex.errors import ConfigError, LocalStateError
from hybridkex.machine import refusal, write_error

_ROOM: Final = 1 << 20
"""Bytes: a folder with less is full, since the failed writer has removed its own."""
_OTHER_PLACE: Final = "choose another place for temporary files with TMPDIR=FOLDER"
_TOKEN: Final = "HYBRIDKEX_GUARD"

_GUARD: Final = r"""
import os, shutil, signal, sys, time
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
    signal.signal(number, signal.SIG_IGN)
token, folder = sys.argv[1].encode(), sys.argv[2]
sys.stdout.write("ready\n")
sys.stdout.flush()
os.dup2(os.open(os.devnull, os.O_RDWR), 1)
sys.stdin.read()
def end_processes():
    found = False
    for name in os.listdir("/proc") if os.path.isdir("/proc/self") else ():
        if not name.isdigit() or int(name) == os.getpid():
            continue
        try:
            with open(f"/proc/{name}/environ", "rb") as file:
                if token not in file.read():
                    continue
            os.kill(int(name), signal.SIGKILL)
            found = True
        except OSError:
            pass
    return found
for _ in range(100):
    found = end_processes()
    if folder:
        shutil.rmtree(folder, ignore_errors=True)
    if not found and not (folder and os.path.exists(folder)):
        break
    time.sleep(0.05)
"""


@contextlib.contextmanager
def guarded_processes(folder: Path | None = None) -> Iterator[None]:
    """End the processes that are started in this context, and remove the folder, when this process
    ends."""
    token = secrets.token_hex(16)
    before = {name: os.environ.get(name) for name in (_TOKEN, "TMPDIR")}
    command = [sys.executable, "-I", "-S", "-c", _GUARD, token, str(folder or "")]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        cwd="/",
    ) as guard:
        assert guard.stdin is not None
        assert guard.stdout is not None
        guard.stdout.readline()  # from now on signals do not end it
        os.environ[_TOKEN] = token
        if folder is not None:
            os.environ["TMPDIR"] = str(folder)  # the processes' own temporary files end with it
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)
            guard.stdin.close()


@contextlib.contextmanager
def explained(folder: Path, elsewhere: str) -> Iterator[None]:
    """Report that a folder cannot be written to, if work in it fails for that reason.

    What fails is a program, a database, a connection, each with its own words for it; so the folder
    is tried once more.

    Args:
        folder: what is written to.
        elsewhere: how to name another one.

    Raises:
        LocalStateError: instead of the error, if there is no room in the folder.
    """
    try:
        yield
    except Exception:
        check_room(folder, elsewhere)
        raise


def check_room(folder: Path, elsewhere: str) -> None:
    """Raise ``LocalStateError`` where a folder has no room; ``elsewhere`` names another one."""
    if not folder.is_dir():
        raise LocalStateError(
            f"another program removed the folder {folder} while it was in use; run the command "
            f"again, or {elsewhere}"
        ) from None
    try:
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            left = _ROOM
            while left:
                left -= file.write(bytes(left))
    except OSError as error:
        raise LocalStateError(str(write_error(folder, error, elsewhere=elsewhere))) from None


@contextlib.contextmanager
def guarded_folder(prefix: str) -> Iterator[Path]:
    """A folder that only we can read; it and the processes started in the context end with us.

    Nothing is left of either, however this process ends.
    """
    try:
        folder = Path(tempfile.mkdtemp(prefix=prefix))
    except OSError as error:
        raise ConfigError(
            f"there is no temporary folder that can be written to: {refusal(error)}; {_OTHER_PLACE}"
        ) from None
    try:
        with guarded_processes(folder), explained(folder, _OTHER_PLACE):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
