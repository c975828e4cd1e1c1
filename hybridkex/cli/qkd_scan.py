"""``hybridkex qkd scan`` and ``plot``: what links give over their settings."""

import argparse
import math
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.progress import Progress

from hybridkex.cli.manual import describe
from hybridkex.errors import ConfigError
from hybridkex.link.scan import SUFFIXES, grid, read_scan, scan, write_scan

__all__ = ["configure"]

KINDS: Final = ("rate-vs-distance", "qber", "finite-key")
CONNECT_SECONDS: Final = 10
MOST_VALUES: Final = 100_000


def configure(commands: Any) -> None:
    """Add the two commands."""
    command = commands.add_parser("scan", help="compute rates over a grid of settings")
    describe(
        command,
        "Compute what a link gives for every combination of some settings, and write one row for "
        "each. The numbers are the same for the same seed on one core, on many, and on a Dask "
        "cluster.",
        examples=[
            "qkd scan --vary distance_km=0:150:5 --vary preset=lim2014,bbm92 -o a.csv",
            "qkd scan --vary eve=none,pns --blocks 3 --jobs 0 -o b.parquet",
            "qkd scan --vary block_bits=1e5,1e6 --dask tcp://host:8786 -o c.json",
        ],
        notes="Settings: preset, distance_km, block_bits, eve, finite_key, leak, tuned, and every "
        "field of the channel, the source and the security. See docs/qkd-link.md.",
    )
    command.add_argument(
        "--vary",
        action="append",
        default=[],
        metavar="NAME=VALUES",
        help="values with commas, or FIRST:LAST:STEP; may be repeated",
    )
    command.add_argument(
        "--blocks",
        type=int,
        default=0,
        metavar="N",
        help="blocks to simulate at each point; 0: closed forms (default: %(default)s)",
    )
    command.add_argument("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
    where = command.add_mutually_exclusive_group()
    where.add_argument(
        "--jobs",
        type=int,
        default=1,
        metavar="N",
        help="processes, 0 for one on each core (default: %(default)s)",
    )
    where.add_argument("--dask", metavar="ADDRESS", help="compute on this Dask cluster")
    command.add_argument(
        "-o",
        "--output",
        required=True,
        type=Path,
        metavar="FILE",
        help="its name ends in " + ", ".join(SUFFIXES),
    )
    command.set_defaults(action=_scan)

    plot = commands.add_parser("plot", help="draw a picture (needs matplotlib)")
    describe(
        plot,
        "Draw a scan: one column over another, a curve for each value of a third. Or draw one of "
        "the pictures of the documentation.",
        examples=[
            "qkd plot --scan a.csv --by preset -o a.svg",
            "qkd plot --scan b.parquet --x block_bits --y bit_per_s -o b.png",
            "qkd plot --kind rate-vs-distance -o rate.svg",
        ],
        notes="See docs/qkd-link.md, which has the pictures.",
    )
    what = plot.add_mutually_exclusive_group(required=True)
    what.add_argument("--scan", type=Path, metavar="FILE", help="a file of 'qkd scan'")
    what.add_argument("--kind", choices=KINDS, help="a picture of the documentation")
    plot.add_argument("--x", default="distance_km", metavar="NAME", help="default: %(default)s")
    plot.add_argument("--y", default="rate", metavar="NAME", help="default: %(default)s")
    plot.add_argument(
        "--by", action="append", default=[], metavar="NAME", help="a curve for each of its values"
    )
    plot.add_argument(
        "--preset", action="append", metavar="NAME", help="of a --kind; may be repeated"
    )
    plot.add_argument(
        "--distance",
        type=float,
        default=200.0,
        metavar="KM",
        help="that --kind qber goes to (default: %(default)g)",
    )
    plot.add_argument("--block-bits", action="append", type=float, metavar="N", help="of a --kind")
    plot.add_argument(
        "-o",
        "--output",
        required=True,
        type=Path,
        metavar="FILE.png|.svg",
        help="where to; the name's end says the format",
    )
    plot.set_defaults(action=_plot)


def _value(text: str) -> Any:
    known = {"none": None, "true": True, "false": False}
    if text.lower() in known:
        return known[text.lower()]
    if "/" in text:  # several numbers in one value, such as intensities
        return [_value(part) for part in text.split("/")]
    try:
        number = float(text)
    except ValueError:
        return text
    return int(number) if number.is_integer() and math.isfinite(number) else number


def _values(text: str) -> tuple[str, list[Any]]:
    name, equal, given = text.partition("=")
    if not (name and equal and given):
        raise ConfigError(f"--vary {text}: write NAME=VALUES")
    parts = given.split(":")
    if len(parts) != 3:
        return name, [_value(one) for one in given.split(",")]
    try:
        first, last, step = map(float, parts)
    except ValueError:
        raise ConfigError(f"--vary {text}: write FIRST:LAST:STEP with numbers") from None
    if not (step > 0.0 and last >= first and (last - first) / step < MOST_VALUES):
        raise ConfigError(f"--vary {text}: FIRST:LAST:STEP goes upwards, in less than 1e5 steps")
    count = int((last - first) / step + 1e-9) + 1
    return name, [_value(repr(first + step * n)) for n in range(count)]


def _scan(args: argparse.Namespace) -> int:
    if args.output.suffix not in SUFFIXES:
        raise ConfigError(f"the output is a file that ends in {', '.join(SUFFIXES)}")
    if args.blocks < 0 or args.jobs < 0:
        raise ConfigError("--blocks and --jobs cannot be negative")
    points = grid(dict(map(_values, args.vary)))
    with _executor(args) as executor, _progress(len(points)) as progress:
        rows = scan(
            points, blocks=args.blocks, seed=args.seed, executor=executor, progress=progress
        )
    try:
        write_scan(args.output, rows)
    except OSError as error:
        raise ConfigError(f"cannot write {args.output}: {error.strerror}") from None
    print(f"{args.output}: {len(rows)} rows")
    return 0


@contextmanager
def _executor(args: argparse.Namespace) -> Iterator[Executor | None]:
    if args.dask is not None:
        with dask_executor(args.dask) as executor:
            yield executor
    elif args.jobs == 1:
        yield None
    else:
        count = args.jobs or os.cpu_count() or 1
        with ProcessPoolExecutor(count, mp_context=get_context("spawn")) as pool:
            yield pool


@contextmanager
def dask_executor(address: str) -> Iterator[Executor]:
    """An executor on a Dask cluster; what a worker that dies had in hand is done again."""
    try:
        from distributed import Client  # noqa: PLC0415  # an extra
    except ModuleNotFoundError:
        raise ConfigError("this needs Dask: pip install 'hybridkex[dask]'") from None
    try:
        client: Any = Client(address, timeout=CONNECT_SECONDS)  # type: ignore[no-untyped-call]
    except (OSError, ValueError, TimeoutError) as error:
        raise ConfigError(f"cannot reach the Dask cluster at {address}: {error}") from None
    with client:
        yield client.get_executor(retries=3)


@contextmanager
def _progress(total: int) -> Iterator[Callable[[int], None] | None]:
    if not sys.stderr.isatty():
        yield None
        return
    with Progress(console=Console(file=sys.stderr)) as bars:
        task = bars.add_task("points", total=total)
        yield lambda done: bars.update(task, completed=done)


def _plot(args: argparse.Namespace) -> int:
    if args.output.suffix not in (".png", ".svg"):
        raise ConfigError("the picture is a .png or an .svg")
    try:
        from hybridkex.link.plots import draw, plot_scan, save  # noqa: PLC0415  # an extra
    except ModuleNotFoundError as missing:
        if missing.name != "matplotlib":
            raise
        raise ConfigError("this needs matplotlib: pip install 'hybridkex[plot]'") from None
    if args.scan is not None:
        figure, _ = plot_scan(read_scan(args.scan), x=args.x, y=args.y, by=args.by)
    else:
        figure, _ = draw(
            args.kind,
            presets=args.preset,
            distance_km=args.distance,
            block_bits=args.block_bits,
        )
    try:
        save(figure, args.output)
    except OSError as error:
        raise ConfigError(f"cannot write {args.output}: {error.strerror}") from None
    print(args.output)
    return 0
