"""The command; see :mod:`interop.faults`."""

import argparse
import sys

from interop.faults.injections import FAULTS
from interop.faults.run import run
from interop.faults.services import SERVICES
from interop.faults.world import Broken


def main() -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m interop.faults",
        description="Inject faults that a seed chooses into every long-running command.",
    )
    commands = {one.name: one for one in SERVICES}
    faults = {one.__name__: one for one in FAULTS}
    parser.add_argument(
        "--command", action="append", choices=commands, help="this one; may be repeated"
    )
    parser.add_argument("--fault", action="append", choices=faults, help="this one; likewise")
    parser.add_argument("--seed", type=int, default=1, help="(1)")
    parser.add_argument("--rounds", type=int, default=30, help="faults for each command (30)")
    parser.add_argument("--seconds", type=float, default=3.0, help="that a fault lasts (3)")
    options = parser.parse_args()
    failed = 0
    for name in options.command or commands:
        try:
            run(
                commands[name],
                [faults[one] for one in options.fault or faults],
                seed=options.seed,
                rounds=options.rounds,
                seconds=options.seconds,
            )
        except Broken as error:
            print(f"BROKEN: {error}", flush=True)
            failed += 1
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
