"""``hybridkex demo``: two sites, a QKD link, a file transfer, and what Eve learns."""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from hybridkex.cli.arguments import Action, Command, argument, option
from hybridkex.cli.values import folder_path, kilometres


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    file: str | None = argument(
        "the file to send (default: the largest library that hybridkex uses)", metavar="FILE"
    )
    keep: Path | None = option(
        "keep Eve's recording in this folder, for Wireshark", type=folder_path, metavar="DIR"
    )
    distance: float = option(
        "length of the QKD link's fibre (default: %(default)g)",
        type=kilometres,
        metavar="KM",
        default=25.0,
    )


COMMAND: Final = Command(
    "Run two sites in one terminal: a simulated QKD link, a KME at each site, a handshake with "
    "X25519, ML-KEM and a QKD key, certificates on both sides, and a file transfer. Then search "
    "every record that Eve captured for the file's content, and report which secrets the keys are "
    "derived from. Everything runs on this machine and takes about half a minute.",
    examples=["demo", "demo holiday.jpg --distance 80", "demo --keep recording"],
    status="0 if the file arrived intact and nothing of it is in Eve's recording, 1 otherwise",
    action=Action("demo", DemoOptions, extra="kme,link"),
)
