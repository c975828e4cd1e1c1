"""``hybridkex qkd record`` and ``distil``: detections in files."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybridkex.cli.arguments import Action
from hybridkex.cli.choices import DECOY_CHECKS, FINITE_KEY, LEAKS, LINK_PRESETS
from hybridkex.cli.help_text import describe
from hybridkex.cli.values import file_path, folder_path, number, whole_number

__all__ = ["DistilOptions", "RecordOptions", "configure"]


@dataclass(frozen=True, kw_only=True)
class RecordOptions:
    """``qkd record``."""

    preset: str
    distance: float
    detections: int
    as_published: bool
    seed: int | None
    parquet: bool
    output: Path


@dataclass(frozen=True, kw_only=True)
class DistilOptions:
    """``qkd distil``."""

    files: list[Path]
    listen: str | None
    connect: str | None
    key: Path | None
    peer: Path | None
    keys: Path | None
    key_bits: int
    decoy_check: str
    finite_key: str
    leak: str


def configure(commands: Any) -> None:
    """Add the two commands."""
    record = commands.add_parser("record", help="simulate detections and write them to files")
    describe(
        record,
        "Simulate the light of a link and write what Alice and what Bob know of the detections, "
        "in the format that 'qkd distil' reads.",
        examples=["qkd record --detections 200000 -o data", "qkd distil data/*.npz"],
        notes="See docs/qkd-link.md for the format.",
    )
    record.add_argument(
        "--preset",
        metavar="NAME",
        default="lim2014",
        help=f"one of {', '.join(LINK_PRESETS)} (default: %(default)s)",
    )
    record.add_argument(
        "--distance",
        type=number,
        default=50.0,
        metavar="KM",
        help="length of the fibre (default: %(default)g)",
    )
    record.add_argument(
        "--detections",
        type=whole_number,
        default=1_000_000,
        metavar="N",
        help="detections to simulate (default: %(default)s)",
    )
    record.add_argument(
        "--as-published",
        action="store_true",
        help="use the preset's own intensities, not the best ones for the distance",
    )
    record.add_argument("--seed", type=whole_number, metavar="N", help="make the run repeatable")
    record.add_argument("--parquet", action="store_true", help="write Parquet (needs pyarrow)")
    record.add_argument(
        "-o",
        "--output",
        required=True,
        type=folder_path,
        metavar="FOLDER",
        help="the folder for the files of Alice and Bob",
    )
    record.set_defaults(action=_action(RecordOptions, "record"))

    command = commands.add_parser("distil", help="make keys of measured detections")
    describe(
        command,
        "Make keys of measured detections: sifting, error correction, privacy amplification. With "
        "the files of both parties, both run here. With one file, this end runs Alice or Bob (the "
        "file says which) and reaches the other over TCP, authenticated by signatures.",
        examples=[
            "qkd distil alice.npz bob.npz",
            "qkd distil alice.npz --listen 0.0.0.0:7000 --key a.key --peer b.pem",
            "qkd distil bob.npz --connect alice:7000 --key b.key --peer a.pem",
        ],
        status="0 if keys were made, 1 if not",
        notes="See docs/qkd-link.md for the file format.",
    )
    command.add_argument(
        "files",
        nargs="+",
        type=file_path,
        metavar="FILE",
        help="detections of one party, or of both: .npz or .parquet",
    )
    where = command.add_mutually_exclusive_group()
    where.add_argument(
        "--listen", metavar="HOST:PORT", help="with one FILE: wait for the other end here"
    )
    where.add_argument(
        "--connect", metavar="HOST:PORT", help="with one FILE: connect to the other end there"
    )
    command.add_argument("--key", type=file_path, metavar="FILE", help="our private key, PEM")
    command.add_argument(
        "--peer", type=file_path, metavar="FILE", help="the other end's certificate"
    )
    command.add_argument(
        "--keys",
        type=file_path,
        metavar="FILE",
        help="write the keys to FILE, one line each: ID and hex",
    )
    command.add_argument(
        "--key-bits",
        type=whole_number,
        default=256,
        metavar="N",
        help="bits in each key (default: %(default)s)",
    )
    command.add_argument(
        "--decoy-check",
        choices=DECOY_CHECKS,
        default="shares",
        help="what to compare with the channel in the file (default: %(default)s)",
    )
    command.add_argument(
        "--finite-key",
        choices=FINITE_KEY,
        default=FINITE_KEY[0],
        help="the finite-key bound to use (default: %(default)s)",
    )
    command.add_argument(
        "--leak",
        choices=LEAKS,
        default=LEAKS[0],
        help="whose parities count as leaked (default: %(default)s)",
    )
    command.set_defaults(action=_action(DistilOptions, "run_distil"))


def _action(options: type, function: str) -> Action:
    return Action("qkd_data", options, extra="link", function=function)
