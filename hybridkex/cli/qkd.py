"""``hybridkex qkd``: run a simulated QKD link, distil measured detections, scan settings, plot.

``docs/qkd-link.md`` explains the numbers.
"""

from dataclasses import dataclass
from typing import Final

from hybridkex.cli import qkd_data, qkd_scan
from hybridkex.cli.arguments import Action, Command, Exclusive, option
from hybridkex.cli.choices import LINK_BOOTSTRAPS
from hybridkex.cli.link_options import as_published, distance, finite_key, key_bits, leak, preset

_WHERE: Final = Exclusive()


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """``qkd run``."""

    distance: float = distance(group=_WHERE)
    preset: str = preset()
    as_published: bool = as_published()
    blocks: int = option("number of blocks to make (default: %(default)s)", default=3)
    block_bits: int = option("sifted bits in each block (default: %(default)s)", default=1_000_000)
    key_bits: int = key_bits()
    eve: str | None = option(
        "an eavesdropper: intercept:SHARE or split:SHARE of the light, pns (photon-number "
        "splitting), mitm, tamper:BYTE, which flips a bit of what Alice receives, or none",
        metavar="WHAT",
    )
    bootstrap: str = option(
        "what authenticates the first block (default: %(default)s)",
        choices=LINK_BOOTSTRAPS,
        default="psk",
    )
    finite_key: str = finite_key()
    leak: str = leak()
    satellite: float | None = option(
        "simulate a satellite pass up to this elevation instead of a fibre",
        metavar="DEG",
        group=_WHERE,
    )
    real_time: bool = option("run at the speed of the laser's clock")
    seed: int | None = option("make the run repeatable; its keys are then predictable")
    json: bool = option("one JSON line for each block")


COMMAND: Final = Command(
    "A simulated QKD link: decoy-state BB84 or BBM92 with finite keys, error correction, "
    "privacy amplification and authentication, with an optional eavesdropper.",
    examples=[
        "qkd run --distance 50",
        "qkd distil alice.npz bob.npz",
        "qkd scan --vary distance_km=0:150:5 -o rates.csv",
        "qkd plot --scan rates.csv -o rates.svg",
    ],
    notes="See docs/qkd-link.md.",
    commands={
        "run": Command(
            "Run Alice and Bob over a simulated fibre. Each block reports what was detected, "
            "corrected, leaked and kept.",
            examples=[
                "qkd run --distance 80 --blocks 5",
                "qkd run --eve intercept:1.0",
                "qkd run --preset rusca2018 --json",
            ],
            status="0 if every block made keys, 1 if one was aborted or the link stopped",
            notes="See docs/qkd-link.md.",
            summary="make blocks of key over a simulated link",
            action=Action("qkd", RunOptions, extra="link"),
        ),
        **qkd_data.COMMANDS,
        **qkd_scan.COMMANDS,
    },
)
