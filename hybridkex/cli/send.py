"""``hybridkex send``: files and folders to a ``hybridkex receive``."""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from hybridkex.cli.arguments import Action, Command, argument, nested, option
from hybridkex.cli.choices import TRANSFER_PROTOCOL
from hybridkex.cli.options import ChannelOptions

DEFAULT_PORT = 4434


@dataclass(frozen=True, kw_only=True)
class SendOptions:
    files: list[Path] = argument("a file or a folder")
    host: str = argument(
        f"the receiver (port {DEFAULT_PORT} if none is given)", metavar="HOST[:PORT]"
    )
    server_name: str | None = option(
        "the name in the receiver's certificate, if not HOST", metavar="NAME"
    )
    retries: int = option(
        "give up after this many consecutive connections without progress (default: 8)", default=8
    )
    patience: float = option(
        "how long the receiver may be alive without progress, plus 1 s for each 4 MB of the "
        "largest file under way (default: 600)",
        metavar="SECONDS",
        default=600.0,
    )
    checksum: bool = option(
        "compare the content of a file that the receiver has even if its size and date are those "
        "of the file to send; without it such a file counts as unchanged",
        default=False,
    )
    channel: ChannelOptions = nested()


COMMAND: Final = Command(
    "Send files and folders to 'hybridkex receive'. Files that the receiver already has are "
    "not sent again; an interrupted transfer resumes where it stopped.",
    examples=[
        "send report.pdf data/ backup.example.org --ca ca.pem --cert me.pem --key me.key",
        "send disk.img [2001:db8::1]:4434 --pin HEX --key me.pem",
    ],
    status="0 if the receiver has verified everything, 1 otherwise",
    notes="See docs/file-transfer.md.",
    action=Action("send", SendOptions),
    preset={"alpn": [TRANSFER_PROTOCOL]},
)
