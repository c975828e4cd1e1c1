"""``hybridkex qkd scan`` and ``plot``: what links give over their settings."""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from hybridkex.cli.arguments import Action, Command, Exclusive, option
from hybridkex.cli.choices import SCAN_SUFFIXES
from hybridkex.cli.values import kilometres

KINDS: Final = ("rate-vs-distance", "qber", "finite-key")

_WHERE: Final = Exclusive()
_WHAT: Final = Exclusive(required=True)


@dataclass(frozen=True, kw_only=True)
class ScanOptions:
    """``qkd scan``."""

    vary: list[str] = option(
        "a setting and its values, separated by commas, each a value or FIRST:LAST:STEP; may be "
        "repeated",
        metavar="NAME=VALUES",
    )
    blocks: int = option(
        "blocks to simulate at each point; 0 computes expected values (default: %(default)s)",
        default=0,
    )
    seed: int = option("seed of the simulation (default: %(default)s)", default=0)
    jobs: int = option(
        "number of processes, up to four for each core; 0 starts one for each core "
        "(default: %(default)s)",
        default=1,
        group=_WHERE,
    )
    dask: str | None = option("compute on this Dask cluster", metavar="ADDRESS", group=_WHERE)
    output: Path = option(
        f"the file to write or replace, which ends in {', '.join(SCAN_SUFFIXES)}",
        *("-o", "--output"),
    )


@dataclass(frozen=True, kw_only=True)
class PlotOptions:
    """``qkd plot``."""

    scan: Path | None = option("draw this file, which 'qkd scan' wrote", group=_WHAT)
    kind: str | None = option(
        f"draw a picture of the documentation: {', '.join(KINDS)}",
        choices=KINDS,
        metavar="NAME",
        group=_WHAT,
    )
    x: str | None = option(
        "with --scan: the horizontal axis (default: distance_km)", metavar="NAME"
    )
    y: str | None = option("with --scan: the vertical axis (default: rate)", metavar="NAME")
    by: list[str] = option(
        "with --scan: draw one curve for each value of NAME, beside the settings that vary; may "
        "be repeated",
        metavar="NAME",
    )
    preset: list[str] | None = option(
        "with --kind: a parameter set; may be repeated", metavar="NAME"
    )
    distance: float | None = option(
        "with --kind qber: the greatest distance (default: 200)", type=kilometres, metavar="KM"
    )
    block_bits: list[float] | None = option(
        "with --kind: a block size; may be repeated with finite-key", metavar="N"
    )
    output: Path = option(
        "the picture to write or replace; its suffix selects the format",
        *("-o", "--output"),
        metavar="FILE.png|.svg",
    )


COMMANDS: Final = {
    "scan": Command(
        "Compute what a link gives for every combination of some settings, and write one row for "
        "each. The numbers are the same for the same seed on one core, on many, and on a Dask "
        "cluster.",
        examples=[
            "qkd scan --vary distance_km=0:150:5 --vary preset=lim2014,bbm92 -o a.csv",
            "qkd scan --vary eve=none,pns --blocks 3 --jobs 0 -o b.parquet",
            "qkd scan --vary block_bits=1e5,1e6 --dask tcp://host:8786 -o c.json",
        ],
        notes="Settings: preset, distance_km, block_bits, eve, finite_key, leak, tuned, "
        "max_qber, tolerance, decoy_check, and every field of the channel, the source and the "
        "security. See docs/qkd-link.md.",
        summary="compute rates over a grid of settings",
        action=Action("qkd_scan", ScanOptions, extra="link", function="run_scan"),
    ),
    "plot": Command(
        "Draw a scan: one column over another, a curve for each combination of the other settings "
        "that vary. Or draw one of the pictures of the documentation.",
        examples=[
            "qkd plot --scan a.csv -o a.svg",
            "qkd plot --scan b.parquet --x block_bits --y bit_per_s -o b.png",
            "qkd plot --kind rate-vs-distance -o rate.svg",
        ],
        notes="See docs/qkd-link.md, which has the pictures.",
        summary="draw a picture (needs matplotlib)",
        action=Action("qkd_scan", PlotOptions, extra="link,plot", function="plot"),
    ),
}
