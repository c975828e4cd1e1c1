"""``hybridkex demo``: two sites, a QKD link, a file transfer, and what Eve learns."""

import argparse
from dataclasses import dataclass
from pathlib import Path

from hybridkex.cli.arguments import Action
from hybridkex.cli.help_text import describe
from hybridkex.cli.values import folder_path, number

__all__ = ["DemoOptions", "configure"]


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """The options, parsed."""

    file: str | None
    keep: Path | None
    distance: float


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    describe(
        parser,
        "Run two sites in one terminal: a simulated QKD link, a KME at each site, a handshake with "
        "X25519, ML-KEM and a QKD key, certificates on both sides, and a file transfer. Then "
        "search every record that Eve captured for the file's content, and report what the keys "
        "rest on. Everything runs on this machine and takes about half a minute.",
        examples=["demo", "demo holiday.jpg --distance 80", "demo --keep recording"],
        status="0 if the file arrived intact and nothing of it is in Eve's recording, 1 otherwise",
    )
    parser.add_argument(
        "file",
        nargs="?",
        metavar="FILE",
        help="the file to send (default: the largest library that hybridkex uses)",
    )
    parser.add_argument(
        "--keep",
        type=folder_path,
        metavar="DIR",
        help="keep Eve's recording in this folder, for Wireshark",
    )
    parser.add_argument(
        "--distance",
        type=number,
        default=25.0,
        metavar="KM",
        help="length of the QKD link's fibre (default: %(default)g)",
    )
    parser.set_defaults(action=Action("demo", DemoOptions, extra="kme,link"))
