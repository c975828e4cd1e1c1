"""The command; see :mod:`interop.kme`."""

import argparse
import sys
from pathlib import Path

from hybridkex.machine import leaves
from interop.kme.history import Verdict, check, from_json
from interop.kme.run import FAULTS, NotRecovered, run


def main() -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m interop.kme",
        description="Run two sites of KMEs under faults, and check what their SAEs saw.",
    )
    parser.add_argument("--store", choices=FAULTS, default="postgresql", help="(postgresql)")
    parser.add_argument("--seed", type=int, default=1, help="chooses the faults (1)")
    parser.add_argument("--seconds", type=float, default=60.0, help="of faults (60)")
    parser.add_argument("--processes", type=int, default=2, help="of each site (2)")
    parser.add_argument("--pairs", type=int, default=3, help="of SAEs in each direction (3)")
    parser.add_argument("--lasts", type=float, default=5.0, help="longest time of a fault (5)")
    parser.add_argument("--history", type=Path, help="write the calls to this file")
    parser.add_argument("--check", type=Path, help="only check the history of this file")
    options = parser.parse_args()
    if options.check is not None:
        return tell(check(map(from_json, options.check.read_text().splitlines())))
    try:
        return tell(
            run(
                options.store,
                seed=options.seed,
                seconds=options.seconds,
                processes=options.processes,
                pairs=options.pairs,
                lasts=options.lasts,
                history=options.history,
                tell=lambda fault: print(fault, flush=True),
            )
        )
    except* NotRecovered as group:
        print(f"BROKEN: {next(leaves(group))}")
    return 1


def tell(verdict: Verdict) -> int:
    """Print a verdict; returns the exit status."""
    print(
        f"{verdict.calls} calls: {verdict.drawn} keys drawn, {verdict.collected} collected, "
        f"{verdict.lost} lost to their slave ({verdict.lost_share:.2%}), {verdict.open} open; "
        f"{verdict.unanswered} draws without an answer"
    )
    for violation in verdict.violations:
        print(f"VIOLATION: {violation}")
    return 1 if verdict.violations else 0


if __name__ == "__main__":
    sys.exit(main())
