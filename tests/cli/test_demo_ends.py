"""``demo`` and ``rndl`` leave no process and no private key, whatever ends them, and whenever."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from waiting import until

MOMENTS = random.Random(38)


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
    ends(tmp_path, command, [signal.SIGHUP, number], [signal.SIGINT, signal.SIGQUIT, signal.SIGHUP])


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
def test_nothing_is_left(tmp_path: Path, command: str, signals: list[signal.Signals]) -> None:
    ends(tmp_path, command, signals, [])


def ends(
    tmp_path: Path, command: str, signals: list[signal.Signals], ignored: list[signal.Signals]
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    (tmp_path / "text").write_text("hello")
    words = [command, *(["text"] if command == "demo" else [])]
    process = subprocess.Popen(
        [sys.executable, "-c", LAUNCH, " ".join(str(int(one)) for one in ignored), *words],
        cwd=tmp_path,
        env={**os.environ, "TMPDIR": str(temporary)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    assert process.stderr is not None
    until(lambda: any(temporary.iterdir()) or process.poll() is not None)
    time.sleep(MOMENTS.uniform(0, 4))
    for number in signals:
        process.send_signal(number)
        time.sleep(0.02)
    status = process.wait(30)
    said = process.stderr.read().decode()
    process.stderr.close()
    assert "Traceback" not in said, said
    assert status != 0
    until(lambda: not any(temporary.iterdir()))
    until(lambda: not processes_of(temporary))
