"""Run BoGo against hybridkex: ``python -m interop.bogo RUNNER [PATTERN]``.

RUNNER is BoringSSL's test runner (``ssl/test/runner``), built with Go's ``go test -c``; it is not
part of this repository. The command prints the counts and every test that failed. ``--json`` writes
them to a file, ``--page`` writes the page in ``docs/``.
"""

import argparse
import json
import sys
from pathlib import Path

from interop.bogo.page import page
from interop.bogo.results import GROUPS, Outcome, run
from interop.page import put_into


def main() -> int:
    """Run the suite; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m interop.bogo", description=__doc__)
    parser.add_argument("runner", type=Path)
    parser.add_argument("pattern", nargs="?", default="")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the counts to this file")
    parser.add_argument("--page", type=Path, help="put the results into this page")
    parser.add_argument("--version", default="not stated", help="of the runner, for the page")
    options = parser.parse_args()
    results = run(options.runner, options.pattern, options.workers)
    counts = results.counts()
    width = max(map(len, GROUPS))
    for group, numbers in counts.items():
        print(f"{group:{width}}", "  ".join(f"{kind} {count}" for kind, count in numbers.items()))
    for name in results.of(Outcome.FAILED):
        print(f"FAILED {name}")
    for name in results.without_reason():
        print(f"NO REASON why {name} is not supported")
    if options.json is not None:
        options.json.write_text(json.dumps(results.as_json(), indent=1) + "\n")
    if options.page is not None:
        put_into(options.page, "bogo", page(results, options.version))
    return 1 if results.of(Outcome.FAILED) or results.without_reason() else 0


if __name__ == "__main__":
    sys.exit(main())
