"""Compare hybridkex with its peers, each benchmark in one run: ``python -m benchmarks [NAME ...]``.

Without a name, all of them run but kme_load and many_files, which take ten minutes each. A peer
that is missing is named with how to get it, and its rows are left out. Processor times are those of
both ends. Figures are medians of rounds in which the tools take turns; ratios are taken within a
round.

``--docs`` writes the figures to docs/data/performance.json, and the tables and charts of
docs/performance.md from there.
"""

import argparse
import importlib
import json
import time
from collections.abc import Iterable
from pathlib import Path

from benchmarks import page
from benchmarks.results import Curve, Options

NAMES = {
    "handshake": "handshakes beside pyOpenSSL",
    "channel": "streams on trio, asyncio and uvloop beside their own TLS",
    "startup": "the start of commands",
    "files": "send and receive beside rsync and scp",
    "many_files": "send and receive with up to a million files",
    "tunnel": "the tunnel beside stunnel and HAProxy",
    "qkd_handshake": "handshakes with a QKD key",
    "kme": "keys from sources and KMEs, by stock",
    "kme_load": "KMEs under load, by store and processes",
    "fresh_keys": "key updates beside handshakes",
    "one_time_pad": "messages under a one-time pad",
    "providers": "ML-KEM of cryptography and of liboqs",
    "profiles": "where the processor time goes",
}
LONG = ("kme_load", "many_files")
"""Those that run only by name."""


def measure(name: str, options: Options) -> list[page.Result]:
    """Run one benchmark, and print its figures."""
    print(f"{name}: {NAMES[name]}", flush=True)
    began = time.monotonic()
    module = importlib.import_module(f"benchmarks.{name}")
    found: list[page.Result] = list(module.run(options))
    print(page.tables(found))
    for curve in found:
        if isinstance(curve, Curve):
            print(f"\n{curve.name} ({curve.unit})\n{page.curve_table(curve)}")
    print(f"({time.monotonic() - began:.0f} s)\n", flush=True)
    return found


def main(words: Iterable[str] | None = None) -> None:
    """Parse the options, and run."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="names:\n" + "\n".join(f"  {name:<14} {text}" for name, text in NAMES.items()),
    )
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"all but {' and '.join(LONG)} by default"
    )
    parser.add_argument("--rounds", type=int, default=7, help="3 at most where they take long")
    parser.add_argument("--quick", action="store_true", help="one round of little work, as a test")
    parser.add_argument(
        "--against", type=Path, metavar="DIR", help="a copy of the project (kme, tunnel)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to FILE")
    parser.add_argument("--docs", action="store_true", help="write the figures into docs/")
    args = parser.parse_args(None if words is None else list(words))
    for name in args.names:
        if name not in NAMES:
            parser.error(f"there is no benchmark {name}; choose from {', '.join(NAMES)}")
    options = Options(1 if args.quick else args.rounds, args.quick, args.against)
    found = {}
    for name in args.names or [name for name in NAMES if name not in LONG]:
        found[name] = measure(name, options)
        if args.docs:
            page.keep({name: found[name]})
    if args.json:
        args.json.write_text(json.dumps(page.as_json(found), indent=1) + "\n")


if __name__ == "__main__":
    main()
