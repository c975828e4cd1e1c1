"""``demo`` and ``rndl`` leave no process and no private key, whatever ends them, and whenever."""

import os
import random
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from forked import Forkserver
from waiting import until

MOMENTS = random.Random(38)
LATEST = 2.0
"""Seconds: by then all processes of both commands run, and neither command is near its end. More
moments are early, while the processes start."""


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


@pytest.mark.slow
@pytest.mark.parametrize("command", ["demo", "rndl"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_command_in_the_background_can_be_ended(
    hybridkex: Forkserver, tmp_path: Path, command: str, number: signal.Signals
) -> None:
    """``nohup hybridkex demo &`` in a script: SIGINT, SIGQUIT and SIGHUP are ignored, until the
    command itself takes care of SIGINT."""
    ignored = (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP)
    run_and_end(hybridkex, tmp_path, command, [signal.SIGHUP, number], ignored=ignored)


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
    run_and_end(hybridkex, tmp_path, command, signals)


def run_and_end(
    hybridkex: Forkserver,
    tmp_path: Path,
    command: str,
    signals: list[signal.Signals],
    *,
    ignored: Sequence[signal.Signals] = (),
) -> None:
    """Send the signals to a command some time after it has made its folder."""
    (tmp_path / "text").write_text("hello")
    folder = tmp_path / "temporary"
    folder.mkdir()
    process = hybridkex.start(
        *(command, *(["text"] if command == "demo" else [])),
        folder=tmp_path,
        environment={"TMPDIR": str(folder)},
        ignored=ignored,
    )
    until(lambda: any(folder.iterdir()) or process.poll() is not None)
    time.sleep(LATEST * MOMENTS.random() ** 2)
    for number in signals:
        process.send_signal(number)
        time.sleep(0.02)
    assert process.wait(30) != 0
    until(lambda: not any(folder.iterdir()))
    until(lambda: not processes_of(folder))
    assert b"Traceback" not in process.told()
