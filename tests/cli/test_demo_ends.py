"""``demo`` and ``rndl`` leave no process and no private key, whatever ends them, and whenever."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from forked import Forkserver, Running
from waiting import until

MOMENTS = random.Random(38)
LATEST = 2.0
"""Seconds: by then all processes of both commands run, and neither command is near its end."""


def processes_of(folder: Path) -> list[str]:
    """Command lines of all processes that have this folder in their environment."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if os.fsencode(folder) in (entry / "environ").read_bytes():
                found.append((entry / "cmdline").read_text().replace("\0", " "))
        except OSError:
            continue
    return found


LAUNCH = """
import os, signal, sys
ignored = sys.argv[1].split()
for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN if str(int(number)) in ignored else signal.SIG_DFL)
os.execv(sys.executable, [sys.executable, "-m", "hybridkex", *sys.argv[2:]])
"""
"""Starts the command with these signals ignored and no others, whatever pytest ignores."""


@pytest.mark.slow
@pytest.mark.parametrize("command", ["demo", "rndl"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_command_in_the_background_can_be_ended(
    tmp_path: Path, command: str, number: signal.Signals
) -> None:
    """``nohup hybridkex demo &`` in a script: SIGINT, SIGQUIT and SIGHUP are ignored, until the
    command itself takes care of SIGINT."""
    ignored = " ".join(str(int(one)) for one in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP))
    folder = temporary(tmp_path)
    with (tmp_path / "said").open("wb") as said:
        process = subprocess.Popen(
            [sys.executable, "-c", LAUNCH, ignored, *words_of(command)],
            cwd=tmp_path,
            env={**os.environ, "TMPDIR": str(folder)},
            stdout=subprocess.DEVNULL,
            stderr=said,
        )
    ends(process, folder, [signal.SIGHUP, number])
    assert "Traceback" not in (tmp_path / "said").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "signals"),
    [
        ("demo", [signal.SIGTERM]),
        ("demo", [signal.SIGHUP]),
        ("demo", [signal.SIGQUIT]),
        ("demo", [signal.SIGKILL]),
        ("demo", [signal.SIGTERM, signal.SIGTERM, signal.SIGKILL]),
        ("demo", [signal.SIGINT]),
        ("rndl", [signal.SIGINT, signal.SIGINT]),
        ("rndl", [signal.SIGTERM]),
        ("rndl", [signal.SIGHUP, signal.SIGTERM]),
        ("rndl", [signal.SIGQUIT]),
        ("rndl", [signal.SIGKILL]),
    ],
)
def test_nothing_is_left(
    hybridkex: Forkserver, tmp_path: Path, command: str, signals: list[signal.Signals]
) -> None:
    folder = temporary(tmp_path)
    environment = {"TMPDIR": str(folder)}
    process = hybridkex.start(*words_of(command), folder=tmp_path, environment=environment)
    ends(process, folder, signals)
    assert b"Traceback" not in process.told()


def temporary(tmp_path: Path) -> Path:
    """Where the command has its folder; and a file for it to send."""
    (tmp_path / "text").write_text("hello")
    folder = tmp_path / "temporary"
    folder.mkdir()
    return folder


def words_of(command: str) -> list[str]:
    return [command, *(["text"] if command == "demo" else [])]


def ends(
    process: "subprocess.Popen[bytes] | Running", folder: Path, signals: list[signal.Signals]
) -> None:
    until(lambda: any(folder.iterdir()) or process.poll() is not None)
    time.sleep(MOMENTS.uniform(0, LATEST))
    for number in signals:
        process.send_signal(number)
        time.sleep(0.02)
    assert process.wait(30) != 0
    until(lambda: not any(folder.iterdir()))
    until(lambda: not processes_of(folder))
