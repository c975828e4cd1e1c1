"""hybridkex against its peers: ``python -m interop``.

Runs every case that a peer can do, with hybridkex as client and as server, over loopback, and ends
with a table. The exit code is 1 if a case failed.
"""

import argparse
import sys
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path

import trio

from interop.matrix import liboqs
from interop.matrix.cases import CASES
from interop.matrix.material import Materials
from interop.matrix.peer import Missing
from interop.matrix.peers import PEERS
from interop.matrix.report import as_json, as_markdown, dump
from interop.matrix.runner import Outcome, Result, cells, run_all
from interop.page import DOCS, put_into

_MARKS = {Outcome.PASSED: "ok", Outcome.FAILED: "FAILED", Outcome.MISSING: "peer missing"}


def main() -> int:
    """Run the selected cells; returns the exit code."""
    names = [peer.name for peer in PEERS]
    parser = argparse.ArgumentParser(
        prog="python -m interop",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--peer", action="append", choices=names, help="this one; repeatable")
    parser.add_argument("--case", default="", help="cases with this in their name or heading")
    parser.add_argument("--at-once", type=int, default=4, help="cases at the same time (4)")
    parser.add_argument("--verbose", action="store_true", help="a line for each cell")
    parser.add_argument(
        "--write", action="store_true", help="put the results into docs/interop.md and .json"
    )
    options = parser.parse_args()
    if options.write and (options.peer or options.case):
        parser.error("--write goes with all peers and cases")
    peers = [peer for peer in PEERS if not options.peer or peer.name in options.peer]
    wanted = options.case.lower()
    cases = [case for case in CASES if wanted in f"{case.area}: {case.name}".lower()]
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="interop-") as folder:
        run = partial(run_all, at_once=options.at_once)
        versions, results = trio.run(run, cells(peers, cases), Materials(Path(folder)))
    _print(versions, results, verbose=options.verbose)
    print(f"{time.monotonic() - started:.0f} seconds")
    if options.write:
        return _write(versions, results)
    return any(one.outcome is Outcome.FAILED for one in results)


def _print(versions: dict[str, str], results: list[Result], *, verbose: bool) -> None:
    for one in results:
        if one.outcome is Outcome.FAILED or verbose:
            mark = _MARKS.get(one.outcome, one.outcome.value)
            print(f"{mark}: {one.cell}" + (f" ({one.reason})" if one.reason else ""))
    for name in dict.fromkeys(one.cell.peer.name for one in results):
        mine = [one for one in results if one.cell.peer.name == name]
        counts = Counter(one.outcome for one in mine)
        if counts[Outcome.MISSING]:
            print(f"{name}: not there ({mine[0].reason})")
            continue
        numbers = ", ".join(f"{count} {outcome.value}" for outcome, count in counts.items())
        print(f"{name} ({versions[name]}): {numbers}")


def _write(versions: dict[str, str], results: list[Result]) -> int:
    bad = [one for one in results if one.outcome in (Outcome.FAILED, Outcome.MISSING)]
    if bad:
        print("not written: a case failed or a peer is missing")
        return 1
    try:
        kems = liboqs.try_all()
    except Missing as missing:
        print(f"not written: liboqs is not there ({missing})")
        return 1
    if not all(kems.agree.values()):
        print("not written: liboqs and hybridkex do not agree")
        return 1
    values = as_json(versions, results) | {"liboqs": kems.as_json()}
    dump(DOCS / "interop.json", values)
    page = as_markdown(versions, results) + "\n" + kems.as_markdown()
    put_into(DOCS / "interop.md", "matrix", page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
