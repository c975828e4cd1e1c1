"""``hybridkex receive``: files and folders from ``hybridkex send``."""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from hybridkex.cli.arguments import Action, Command, argument, nested, option
from hybridkex.cli.choices import TRANSFER_PROTOCOL
from hybridkex.cli.logs import log_level
from hybridkex.cli.options import ChannelOptions, port_file
from hybridkex.cli.send import DEFAULT_PORT
from hybridkex.cli.values import folder_path


@dataclass(frozen=True, kw_only=True)
class ReceiveOptions:
    folder: Path = argument(
        "the folder to store files in; created if missing", type=folder_path, metavar="DIR"
    )
    port: int = option(
        "the TCP port; 0 picks a free one (default: %(default)s)",
        metavar="PORT",
        default=DEFAULT_PORT,
    )
    port_file: Path | None = port_file()
    overwrite: bool = option("replace existing files")
    anyone: bool = option("accept files from unauthenticated senders")
    once: bool = option("exit after one sender has finished")
    max_connections: int = option(
        "maximum number of simultaneous senders; others are told to try again later (default: "
        "%(default)s)",
        default=64,
    )
    log_level: str = log_level("warning")
    channel: ChannelOptions = nested()


COMMAND: Final = Command(
    "Receive files and folders from 'hybridkex send'. A file appears under its name only when "
    "it is complete, verified by SHA-256 and on disk. Nothing is written outside the folder. "
    "Nothing is overwritten without --overwrite.",
    examples=[
        "receive incoming --ca ca.pem --cert cert.pem --key key.pem",
        "receive incoming --once --port 0 --port-file port --pin HEX --key key.pem",
    ],
    status="0 after --once or SIGTERM, 130 after SIGINT, 1 after an error",
    notes="See docs/file-transfer.md.",
    action=Action("receive", ReceiveOptions),
    preset={"alpn": [TRANSFER_PROTOCOL]},
)
