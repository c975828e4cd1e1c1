"""A log, a key log or standard error that cannot be written ends nothing."""

import contextlib
import fcntl
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest
from forked import Forkserver
from waiting import until


@contextlib.contextmanager
def no_reader() -> Iterator[IO[bytes]]:
    """A pipe whose reader has gone."""
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as pipe:
        yield pipe


@contextlib.contextmanager
def full() -> Iterator[IO[bytes]]:
    """A file on a file system without room."""
    with Path("/dev/full").open("wb") as file:
        yield file


@pytest.mark.parametrize("broken", [no_reader, full], ids=["EPIPE", "ENOSPC"])
@pytest.mark.parametrize("level", ["warning", "debug"])
def test_standard_error(
    hybridkex: Forkserver,
    tmp_path: Path,
    keys: Path,
    broken: type[contextlib.AbstractContextManager[IO[bytes]]],
    level: str,
) -> None:
    """Clients that fail their handshake and clients that do not, again and again."""
    port_file = tmp_path / "port"
    with broken() as stderr:
        server = hybridkex.start(
            *("listen", "0", "--echo", "--port-file", port_file, "--log-level", level),
            *("--cert", keys / "cert.pem", "--key", keys / "key.pem", "--keylog", "/dev/full"),
            stderr=stderr,
            to_the_end=True,
        )
        until(lambda: port_file.exists() and port_file.read_text())
        port = port_file.read_text().strip()
        connect = ("connect", "localhost", port)
        for _ in range(2):
            bad = hybridkex.run(*connect)
            assert bad.returncode == 1
            done = hybridkex.run(*connect, "--ca", keys / "ca.pem", data=b"x")
            assert (done.returncode, done.stdout) == (0, b"x"), done.stderr
            assert server.poll() is None
        server.kill()


@pytest.mark.parametrize("broken", [no_reader, full], ids=["EPIPE", "ENOSPC"])
def test_the_status_is_that_of_the_work(
    hybridkex: Forkserver,
    tmp_path: Path,
    keys: Path,
    broken: type[contextlib.AbstractContextManager[IO[bytes]]],
) -> None:
    words = ("--cert", keys / "cert.pem", "--key", keys / "key.pem", "--echo")
    with hybridkex.listening(tmp_path, *words) as (port, _), broken() as stderr:
        connect = ("connect", "localhost", port)
        done = hybridkex.run(
            *connect, "--ca", keys / "ca.pem", data=b"x", stderr=stderr, to_the_end=True
        )
        assert (done.returncode, done.stdout) == (0, b"x")
        assert hybridkex.run(*connect, stderr=stderr, to_the_end=True).returncode == 1


def test_a_reader_that_has_stopped(hybridkex: Forkserver, tmp_path: Path, keys: Path) -> None:
    """Of standard error and of the key log: everybody is served, what is lost is counted, and
    when they are read again the messages go on."""
    port_file, key_log = tmp_path / "port", tmp_path / "keylog"
    os.mkfifo(key_log)
    pipe = os.open(key_log, os.O_RDONLY | os.O_NONBLOCK)
    reading, writing = os.pipe()
    for end in (writing, pipe):
        fcntl.fcntl(end, fcntl.F_SETPIPE_SZ, 8192)
    with os.fdopen(writing, "wb") as stderr:
        server = hybridkex.start(
            *("listen", "0", "--echo", "--port-file", port_file, "--keylog", key_log),
            *("--cert", keys / "cert.pem", "--key", keys / "key.pem"),
            stderr=stderr,
            constants={"hybridkex.cli.standard_streams.PATIENCE": 0.2},
            to_the_end=True,
        )
    until(lambda: port_file.exists() and port_file.read_text())
    connect = ("connect", "localhost", port_file.read_text().strip(), "--ca", keys / "ca.pem")
    try:
        for _ in range(30):
            done = hybridkex.run(*connect, data=b"x")
            assert (done.returncode, done.stdout) == (0, b"x"), done.stderr
        os.read(reading, 1 << 16)
        assert hybridkex.run(*connect, data=b"x").returncode == 0
        said = os.read(reading, 1 << 16).decode()
        assert re.match(r"\nhybridkex: [\d,]+ bytes of messages were lost here: nothing", said)
        assert "keys from:" in said
        assert server.poll() is None
    finally:
        server.kill()
        os.close(reading)
        os.close(pipe)


def test_a_key_log_that_nobody_reads(hybridkex: Forkserver, tmp_path: Path) -> None:
    """A pipe without a reader: one line at once, where it would wait for one to come."""
    os.mkfifo(tmp_path / "keylog")
    done = hybridkex.run("connect", "localhost", "1", "--keylog", tmp_path / "keylog")
    assert done.returncode == 1
    assert b"no program reads from it: start its reader first" in done.stderr


@pytest.mark.parametrize("descriptors", range(4, 9))
def test_no_descriptor_is_left(descriptors: int, tmp_path: Path) -> None:
    """The error of a command needs none itself; ``-S``, since Python's own start needs some."""
    done = subprocess.run(
        [
            *("sh", "-c", f'ulimit -n {descriptors}; exec "$@" 3>&-', "sh"),
            *(sys.executable, "-S", "-m", "hybridkex", "connect", "localhost", "1", "--insecure"),
        ],
        capture_output=True,
        timeout=60,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    said = done.stderr.decode()
    assert done.returncode == 1
    assert "Traceback" not in said
    assert "open files" in said or "cannot connect" in said


def test_a_closed_standard_error_is_no_other_file(tmp_path: Path, keys: Path) -> None:
    """With descriptor 2 closed, the next file that is opened must not get the messages."""
    script = tmp_path / "script"
    script.write_text('exec "$@" 2>&- </dev/null\n')
    key_log = tmp_path / "keylog"
    done = subprocess.run(
        [
            *("sh", script, sys.executable, "-m", "hybridkex", "connect", "localhost", "1"),
            *("--keylog", key_log, "--ca", keys / "ca.pem"),
        ],
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert done.stdout == b""
    assert key_log.read_bytes() == b""
