"""Empty files in one folder through ``send`` and ``receive``, up to a million: time and memory.

Both folders are on a file system in memory, so that the disk has no part in the time. Each number
of files has a receiver of its own.
"""

import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.files import ours
from benchmarks.processes import ENVIRONMENT, running
from benchmarks.results import OURS, Curve, Options, Row

__all__ = ["run"]

IN_MEMORY = Path("/dev/shm")
LOOK_EVERY = 0.05
NUMBERS = (10, 100, 1000, 10_000, 100_000, 1_000_000)
SENT = "sent"
AGAIN = "sent again, unchanged"


def memory(pid: int) -> float:
    """The most that a process has held so far, in MiB; 0 for one that has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0.0
    lines = (line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(next(lines, "VmHWM: 0 kB").split()[1]) / 1024


def measure(work: Path, number: int) -> dict[str, tuple[float, float, float]]:
    """Seconds, and MiB of the sender and of the receiver, for the first time and for the second."""
    source = work / "source"
    source.mkdir()
    for one in range(number):
        os.mknod(source / f"{one:07}")
    found = {}
    with ours(work) as tools:
        tool = tools[OURS]
        for name in (SENT, AGAIN):
            began, most = time.monotonic(), 0.0
            command = tool.command(source, tool.into)
            with (
                tempfile.TemporaryFile() as said,
                running(*command, env=ENVIRONMENT, stderr=said) as sender,
            ):
                while sender.poll() is None:
                    most = max(most, memory(sender.pid))
                    time.sleep(LOOK_EVERY)
                if sender.returncode:
                    said.seek(0)
                    raise RuntimeError(said.read()[-1000:].decode(errors="replace"))
            found[name] = time.monotonic() - began, most, memory(tool.server)
        arrived = sum(1 for _ in os.scandir(tool.into / source.name))
        if arrived != number:
            raise RuntimeError(f"{arrived} of {number} files have arrived")
    return found


def run(options: Options) -> Iterator[Row | Curve]:
    """Measure."""
    numbers = (10,) if options.quick else NUMBERS
    place = IN_MEMORY if IN_MEMORY.is_dir() else None
    found = {}
    for number in numbers:
        with tempfile.TemporaryDirectory(dir=place) as work:
            found[number] = measure(Path(work), number)
    figures = [
        ("time", "s", SENT, 0),
        ("memory of send at most", "MiB", SENT, 1),
        ("memory of receive at most", "MiB", SENT, 2),
        ("time, unchanged files", "s", AGAIN, 0),
        ("memory of send at most, unchanged files", "MiB", AGAIN, 1),
        ("memory of receive at most, then", "MiB", AGAIN, 2),
    ]
    for name, unit, when, which in figures:
        columns = {f"{number:,} files": [one[when][which]] for number, one in found.items()}
        yield Row(name, unit, columns, compared=False)
    for name, unit, lines in (
        ("Empty files", "s", {SENT: (SENT, 0), AGAIN: (AGAIN, 0)}),
        ("Memory for empty files", "MiB", {"send": (SENT, 1), "receive": (SENT, 2)}),
    ):
        curves = {
            line: {str(number): [one[when][which]] for number, one in found.items()}
            for line, (when, which) in lines.items()
        }
        yield Curve(name, "files", unit, curves)
