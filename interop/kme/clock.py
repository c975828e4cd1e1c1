"""Runs ``hybridkex`` with a clock that can be set: ``python -m interop.kme.clock FILE WORD...``.

``FILE`` has the seconds by which the process's clock is ahead; it is read ten times a second.
"""

import sys
import time
from pathlib import Path

from hybridkex.cli import main


def run() -> int:
    """Run the command; returns the exit status."""
    file = Path(sys.argv[1])
    real, monotonic = time.time, time.monotonic
    ahead, due = 0.0, 0.0

    def shown() -> float:
        nonlocal ahead, due
        if monotonic() > due:
            due = monotonic() + 0.1
            ahead = float(file.read_text())
        return real() + ahead

    time.time = shown
    return main(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(run())
