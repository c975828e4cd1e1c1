"""The command; see :mod:`interop.kme`."""

import argparse
import sys
import time
from pathlib import Path

from hybridkex.machine import leaves
from interop.kme.faults import OF_SITES
from interop.kme.figures import PAGE, note, write_page
from interop.kme.history import Verdict, check, from_json
from interop.kme.mutants import MUTANTS
from interop.kme.process import Manner
from interop.kme.run import NotRecovered, Plan, run


def main() -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m interop.kme",
        description="Run two sites of KMEs under faults, and check what their SAEs saw.",
    )
    parser.add_argument("--store", choices=OF_SITES, default="postgresql", help="(postgresql)")
    parser.add_argument("--seed", type=int, default=1, help="chooses the faults (1)")
    parser.add_argument("--seeds", type=int, default=1, help="runs, each with the next seed (1)")
    parser.add_argument("--seconds", type=float, default=60.0, help="of faults (60)")
    parser.add_argument("--each", type=int, help="faults of each kind at each site, instead")
    parser.add_argument("--kinds", nargs="+", default=(), help="of faults (all)")
    parser.add_argument("--at-once", type=float, default=1.0, help="faults on average (1)")
    parser.add_argument("--processes", type=int, default=2, help="of each site (2)")
    parser.add_argument("--pairs", type=int, default=3, help="of SAEs in each direction (3)")
    parser.add_argument("--lasts", type=float, default=5.0, help="longest time of a fault (5)")
    parser.add_argument("--quick", action="store_true", help="short time limits, short faults")
    parser.add_argument("--mutant", choices=MUTANTS, help="run a KME with a fault of its own")
    parser.add_argument("--history", type=Path, help="write the calls to this file")
    parser.add_argument("--keep", type=Path, help="leave the files of the sites in this new folder")
    parser.add_argument("--check", type=Path, help="only check the history of this file")
    parser.add_argument("--docs", action="store_true", help=f"add the figures to {PAGE.name}")
    options = parser.parse_args()
    if options.check is not None:
        return tell(check(map(from_json, options.check.read_text().splitlines())))
    status = 0
    for seed in range(options.seed, options.seed + options.seeds):
        plan = Plan(
            store=options.store,
            seed=seed,
            seconds=options.seconds,
            each=options.each,
            kinds=tuple(options.kinds),
            at_once=options.at_once,
            processes=options.processes,
            pairs=options.pairs,
            lasts=0.3 if options.quick else options.lasts,
            manner=Manner(quick=options.quick, mutant=options.mutant),
        )
        status |= show(plan, options.history, options.keep, docs=options.docs)
    return status


def show(plan: Plan, history: Path | None, keep: Path | None, *, docs: bool) -> int:
    """Make a run, and print what came of it; returns the exit status."""
    began = time.monotonic()
    try:
        outcome = run(plan, history, keep)
    except* NotRecovered as group:
        print(f"seed {plan.seed}: BROKEN: {next(leaves(group))}", flush=True)
        outcome = None
    if outcome is None:
        return 1
    seconds = time.monotonic() - began
    faults = ", ".join(f"{number} {kind}" for kind, number in sorted(outcome.faults.items()))
    print(f"seed {plan.seed}, {seconds:.0f} s: {faults}", flush=True)
    status = tell(outcome.verdict)
    print(f"{outcome.left} keys left the stocks", flush=True)
    if docs:
        note(plan, outcome, seconds)
        write_page()
    return status


def tell(verdict: Verdict) -> int:
    """Print a verdict; returns the exit status."""
    print(
        f"{verdict.calls} calls: {verdict.drawn} keys drawn, {verdict.collected} collected, "
        f"{verdict.lost} lost to their slave ({verdict.lost_share:.2%}), {verdict.open} open; "
        f"{verdict.unanswered} draws without an answer"
    )
    for violation in verdict.violations[:20]:
        print(f"VIOLATION: {violation}")
    if len(verdict.violations) > 20:
        print(f"and {len(verdict.violations) - 20} more violations")
    return 1 if verdict.violations else 0


if __name__ == "__main__":
    sys.exit(main())
