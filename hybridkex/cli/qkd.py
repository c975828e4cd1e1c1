"""``hybridkex qkd``: run a simulated QKD link, distil measured detections, scan settings, plot.

``docs/qkd-link.md`` explains the numbers.
"""

import argparse
from dataclasses import dataclass

from hybridkex.cli import qkd_data, qkd_scan
from hybridkex.cli.arguments import Action
from hybridkex.cli.choices import FINITE_KEY, LEAKS, LINK_BOOTSTRAPS, LINK_PRESETS
from hybridkex.cli.help_text import describe
from hybridkex.cli.values import number, whole_number

__all__ = ["RunOptions", "configure"]


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """``qkd run``."""

    distance: float
    preset: str
    as_published: bool
    blocks: int
    block_bits: int
    key_bits: int
    eve: str | None
    bootstrap: str
    finite_key: str
    leak: str
    satellite: float | None
    real_time: bool
    seed: int | None
    json: bool


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the sub-commands."""
    describe(
        parser,
        "A simulated QKD link: decoy-state BB84 or BBM92 with finite keys, error correction, "
        "privacy amplification and authentication, with an optional eavesdropper.",
        examples=[
            "qkd run --distance 50",
            "qkd distil alice.npz bob.npz",
            "qkd scan --vary distance_km=0:150:5 -o rates.csv",
            "qkd plot --scan rates.csv -o rates.svg",
        ],
        notes="See docs/qkd-link.md.",
    )
    commands = parser.add_subparsers(metavar="command", required=True)

    run_ = commands.add_parser(
        "run",
        help="make blocks of key over a simulated link",
    )
    describe(
        run_,
        "Run Alice and Bob over a simulated fibre. Each block reports what was detected, "
        "corrected, leaked and kept.",
        examples=[
            "qkd run --distance 80 --blocks 5",
            "qkd run --eve intercept:1.0",
            "qkd run --preset rusca2018 --json",
        ],
        status="0 if every block made keys, 1 if one was aborted or the link stopped",
        notes="See docs/qkd-link.md.",
    )
    run_.add_argument(
        "--distance",
        type=number,
        default=50.0,
        metavar="KM",
        help="length of the fibre (default: %(default)g)",
    )
    run_.add_argument(
        "--preset",
        metavar="NAME",
        default="lim2014",
        help=f"one of {', '.join(LINK_PRESETS)} (default: %(default)s)",
    )
    run_.add_argument(
        "--as-published",
        action="store_true",
        help="use the preset's own intensities, not the best ones for the distance",
    )
    run_.add_argument(
        "--blocks",
        type=whole_number,
        default=3,
        metavar="N",
        help="number of blocks to make (default: %(default)s)",
    )
    run_.add_argument(
        "--block-bits",
        type=whole_number,
        default=1_000_000,
        metavar="N",
        help="sifted bits in each block (default: %(default)s)",
    )
    run_.add_argument(
        "--key-bits",
        type=whole_number,
        default=256,
        metavar="N",
        help="bits in each key (default: %(default)s)",
    )
    run_.add_argument(
        "--eve",
        metavar="WHAT",
        help="an eavesdropper: intercept:SHARE or split:SHARE of the light, pns (photon-number "
        "splitting), mitm, or tamper:BYTE, which flips a bit of what Alice receives",
    )
    run_.add_argument(
        "--bootstrap",
        default="psk",
        choices=LINK_BOOTSTRAPS,
        help="what authenticates the first block (default: %(default)s)",
    )
    run_.add_argument(
        "--finite-key",
        default=FINITE_KEY[0],
        choices=FINITE_KEY,
        help="the finite-key bound to use (default: %(default)s)",
    )
    run_.add_argument(
        "--leak",
        default=LEAKS[0],
        choices=LEAKS,
        help="whose parities count as leaked (default: %(default)s)",
    )
    run_.add_argument(
        "--satellite",
        type=number,
        metavar="DEG",
        help="simulate a satellite pass up to this elevation instead of a fibre",
    )
    run_.add_argument(
        "--real-time", action="store_true", help="run at the speed of the laser's clock"
    )
    run_.add_argument(
        "--seed",
        type=whole_number,
        metavar="N",
        help="make the run repeatable; its keys are then predictable",
    )
    run_.add_argument("--json", action="store_true", help="one JSON line for each block")
    run_.set_defaults(action=Action("qkd", RunOptions, extra="link"))

    qkd_data.configure(commands)
    qkd_scan.configure(commands)
