"""``hybridkex receive``: files and folders from ``hybridkex send``."""

import argparse
from dataclasses import dataclass
from pathlib import Path

from hybridkex.cli.arguments import Action
from hybridkex.cli.choices import TRANSFER_PROTOCOL
from hybridkex.cli.help_text import describe
from hybridkex.cli.logs import add_log_options
from hybridkex.cli.options import ChannelOptions, add_channel_options
from hybridkex.cli.send import DEFAULT_PORT
from hybridkex.cli.values import file_path, folder_path, whole_number

__all__ = ["ReceiveOptions", "configure"]


@dataclass(frozen=True, kw_only=True)
class ReceiveOptions:
    """The options, parsed."""

    folder: Path
    port: int
    port_file: Path | None
    overwrite: bool
    anyone: bool
    once: bool
    max_connections: int
    log_level: str
    channel: ChannelOptions


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    describe(
        parser,
        "Receive files and folders from 'hybridkex send'. A file appears under its name only when "
        "it is complete, verified by SHA-256 and on disk. Nothing is written outside the folder. "
        "Nothing is overwritten without --overwrite.",
        examples=[
            "receive incoming --ca ca.pem --cert cert.pem --key key.pem",
            "receive incoming --once --port 0 --port-file port --pin HEX --key key.pem",
        ],
        status="0 after --once, SIGTERM or SIGINT, 1 after an error",
        notes="See docs/file-transfer.md.",
    )
    parser.add_argument(
        "folder",
        type=folder_path,
        metavar="DIR",
        help="the folder to store files in; created if missing",
    )
    parser.add_argument(
        "--port",
        metavar="PORT",
        type=whole_number,
        default=DEFAULT_PORT,
        help="the TCP port; 0 picks a free one (default: %(default)s)",
    )
    parser.add_argument(
        "--port-file",
        type=file_path,
        metavar="FILE",
        help="write the port number to FILE once it is open",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace existing files")
    parser.add_argument(
        "--anyone", action="store_true", help="accept files from unauthenticated senders"
    )
    parser.add_argument("--once", action="store_true", help="exit after one sender has finished")
    parser.add_argument(
        "--max-connections",
        metavar="N",
        type=whole_number,
        default=64,
        help="most senders at once; others are told to try again later (default: %(default)s)",
    )
    add_log_options(parser, default="warning")
    add_channel_options(parser, alpn=TRANSFER_PROTOCOL)
    parser.set_defaults(action=Action("receive", ReceiveOptions))
