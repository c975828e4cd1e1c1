"""The command; see :mod:`interop.shells`."""

import argparse
import logging
import sys
from collections import Counter

from interop.shells.programs import loops, program, verdict


def main() -> int:
    """Run programs; returns 1 where there is a difference without a reason."""
    parser = argparse.ArgumentParser(prog="python -m interop.shells")
    parser.add_argument("--seeds", type=int, default=1000, help="programs (1000)")
    parser.add_argument("--first", type=int, default=0, help="the seed of the first (0)")
    options = parser.parse_args()
    logging.disable()
    outcomes: Counter[str] = Counter()
    for seed in range(options.first, options.first + options.seeds):
        made = program(seed)
        for name, factory in loops().items():
            outcome = verdict(made, factory)
            if outcome.startswith("FAULT"):
                print(f"{name}: {made}\n{outcome}")
                outcome = "FAULT"
            outcomes[outcome or "the same"] += 1
    for outcome, count in outcomes.most_common():
        print(f"{count:7} {outcome}")
    return 1 if outcomes["FAULT"] else 0


if __name__ == "__main__":
    sys.exit(main())
