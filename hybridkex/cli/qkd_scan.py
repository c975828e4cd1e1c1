"""``hybridkex qkd scan`` and ``plot``: what links give over their settings."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from hybridkex.cli.arguments import Action
from hybridkex.cli.choices import SCAN_SUFFIXES
from hybridkex.cli.help_text import describe
from hybridkex.cli.values import file_path, number, whole_number

__all__ = ["PlotOptions", "ScanOptions", "configure"]


@dataclass(frozen=True, kw_only=True)
class ScanOptions:
    """``qkd scan``."""

    vary: list[str]
    blocks: int
    seed: int
    jobs: int
    dask: str | None
    output: Path


@dataclass(frozen=True, kw_only=True)
class PlotOptions:
    """``qkd plot``."""

    scan: Path | None
    kind: str | None
    x: str | None
    y: str | None
    by: list[str]
    preset: list[str] | None
    distance: float
    block_bits: list[float] | None
    output: Path


KINDS: Final = ("rate-vs-distance", "qber", "finite-key")


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
        help="a setting and its values, separated by commas or as FIRST:LAST:STEP; may be repeated",
    )
    command.add_argument(
        "--blocks",
        type=whole_number,
        default=0,
        metavar="N",
        help="blocks to simulate at each point; 0 computes expected values (default: %(default)s)",
    )
    command.add_argument(
        "--seed",
        type=whole_number,
        default=0,
        metavar="N",
        help="seed of the simulation (default: %(default)s)",
    )
    where = command.add_mutually_exclusive_group()
    where.add_argument(
        "--jobs",
        type=whole_number,
        default=1,
        metavar="N",
        help="number of processes; 0 starts one for each core (default: %(default)s)",
    )
    where.add_argument("--dask", metavar="ADDRESS", help="compute on this Dask cluster")
    command.add_argument(
        "-o",
        "--output",
        required=True,
        type=file_path,
        metavar="FILE",
        help="the file to write, which ends in " + ", ".join(SCAN_SUFFIXES),
    )
    command.set_defaults(action=Action("qkd_scan", ScanOptions, extra="link", function="run_scan"))

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
    what.add_argument(
        "--scan", type=file_path, metavar="FILE", help="draw this file, which 'qkd scan' wrote"
    )
    what.add_argument(
        "--kind",
        choices=KINDS,
        metavar="NAME",
        help=f"draw a picture of the documentation: {', '.join(KINDS)}",
    )
    plot.add_argument(
        "--x", metavar="NAME", help="with --scan: the horizontal axis (default: distance_km)"
    )
    plot.add_argument("--y", metavar="NAME", help="with --scan: the vertical axis (default: rate)")
    plot.add_argument(
        "--by",
        action="append",
        default=[],
        metavar="NAME",
        help="with --scan: draw one curve for each value of NAME; may be repeated",
    )
    plot.add_argument(
        "--preset",
        action="append",
        metavar="NAME",
        help="with --kind: a parameter set; may be repeated",
    )
    plot.add_argument(
        "--distance",
        type=number,
        default=200.0,
        metavar="KM",
        help="with --kind qber: the greatest distance (default: %(default)g)",
    )
    plot.add_argument(
        "--block-bits",
        action="append",
        type=number,
        metavar="N",
        help="with --kind: a block size; may be repeated",
    )
    plot.add_argument(
        "-o",
        "--output",
        required=True,
        type=file_path,
        metavar="FILE.png|.svg",
        help="the picture to write; its suffix selects the format",
    )
    plot.set_defaults(action=Action("qkd_scan", PlotOptions, extra="link,plot", function="plot"))
