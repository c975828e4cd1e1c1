"""``hybridkex qkd record`` and ``distil``: detections in files."""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from hybridkex.cli.arguments import Action, Command, Exclusive, argument, option
from hybridkex.cli.choices import BIT_CHECKS, DECOY_CHECKS
from hybridkex.cli.link_options import as_published, distance, finite_key, key_bits, leak, preset
from hybridkex.cli.values import folder_path

_WHERE: Final = Exclusive()


@dataclass(frozen=True, kw_only=True)
class RecordOptions:
    """``qkd record``."""

    preset: str = preset()
    distance: float = distance()
    detections: int = option("detections to simulate (default: %(default)s)", default=1_000_000)
    as_published: bool = as_published()
    seed: int | None = option("make the run repeatable")
    parquet: bool = option("write Parquet (needs pyarrow)")
    output: Path = option(
        "the folder for the files of Alice and Bob",
        *("-o", "--output"),
        type=folder_path,
        metavar="FOLDER",
    )


@dataclass(frozen=True, kw_only=True)
class DistilOptions:
    """``qkd distil``."""

    files: list[Path] = argument("detections of one party, or of both: .npz or .parquet")
    listen: str | None = option(
        "with one FILE: wait for the other end here", metavar="HOST:PORT", group=_WHERE
    )
    connect: str | None = option(
        "with one FILE: connect to the other end there", metavar="HOST:PORT", group=_WHERE
    )
    key: Path | None = option("our private key, PEM")
    peer: Path | None = option(
        "the other end's certificate, of which only the key counts, not the dates"
    )
    keys: Path | None = option("write the keys to FILE, one line each: ID and hex")
    key_bits: int = key_bits()
    decoy_check: str = option(
        "what to compare with the channel in the file (default: %(default)s)",
        choices=DECOY_CHECKS,
        default="shares",
    )
    bit_check: str = option(
        "whether bits of Alice's that do not look random are refused (default: %(default)s)",
        choices=BIT_CHECKS,
        default=BIT_CHECKS[0],
    )
    finite_key: str = finite_key()
    leak: str = leak()


def _action(options: type, function: str) -> Action:
    return Action("qkd_data", options, extra="link", function=function)


COMMANDS: Final = {
    "record": Command(
        "Simulate the light of a link and write what Alice and what Bob know of the detections, "
        "in the format that 'qkd distil' reads.",
        examples=["qkd record --detections 200000 -o data", "qkd distil data/*.npz"],
        notes="See docs/qkd-link.md for the format.",
        summary="simulate detections and write them to files",
        action=_action(RecordOptions, "record"),
    ),
    "distil": Command(
        "Make keys of measured detections: sifting, error correction, privacy amplification. With "
        "the files of both parties, both run here. With one file, this end runs Alice or Bob (the "
        "file says which) and reaches the other over TCP, authenticated by signatures. Keys of the "
        "same detections are made once: a file FILE.distilled marks them, with one FILE or --keys.",
        examples=[
            "qkd distil alice.npz bob.npz",
            "qkd distil alice.npz --listen 0.0.0.0:7000 --key a.key --peer b.pem",
            "qkd distil bob.npz --connect alice:7000 --key b.key --peer a.pem",
        ],
        status="0 if keys were made, 1 if not",
        notes="See docs/qkd-link.md for the file format.",
        summary="make keys of measured detections",
        action=_action(DistilOptions, "run_distil"),
    ),
}
