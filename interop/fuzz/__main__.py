"""``python -m interop.fuzz TARGET [--seconds N] [--corpus DIR]``: fuzz one target.

Ends with status 0 when the time is up and nothing was found; an input that crashes is written to
the current directory, as libFuzzer does. Needs ``pip install atheris``.
"""

import argparse
import sys
from importlib import import_module
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m interop.fuzz")
    parser.add_argument("target", help='one of interop.fuzz.targets, or "everything"')
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--corpus", type=Path, help="where new inputs are kept")
    parser.add_argument("--memory", type=int, default=1024, help="megabytes, at most")
    everything = "interop.fuzz.targets"
    parser.add_argument(
        "--instrument", default=everything, help="the module whose imports' coverage is a guide"
    )
    args = parser.parse_args()
    try:
        import atheris  # noqa: PLC0415  # has no wheel for most Pythons
    except ModuleNotFoundError:
        parser.error("this needs atheris: pip install atheris")
    with atheris.instrument_imports(include=["hybridkex", "examples"]):
        import_module(args.instrument)
    from interop.fuzz import targets  # noqa: PLC0415  # not before what is instrumented
    from interop.fuzz.seeds import CORPUS  # noqa: PLC0415

    if args.target not in {*targets.TARGETS, "everything"}:
        parser.error(f"the targets are {', '.join(targets.TARGETS)} and everything")
    options = [sys.argv[0], f"-max_total_time={args.seconds}", f"-rss_limit_mb={args.memory}"]
    options += ["-timeout=10", "-max_len=20000", "-print_final_stats=1", "-verbosity=1"]
    target = targets.TARGETS.get(args.target, targets.everything)
    seeds = sorted((CORPUS / args.target).glob("*"))
    if seeds:  # read only
        options.append(f"-seed_inputs={','.join(map(str, seeds))}")
    if args.corpus is not None:
        args.corpus.mkdir(parents=True, exist_ok=True)
        options.append(str(args.corpus))
    atheris.Setup(options, target)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
