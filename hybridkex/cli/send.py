"""``hybridkex send``: files and folders to a ``hybridkex receive``."""

import argparse
from dataclasses import dataclass
from pathlib import Path

from hybridkex.cli.arguments import Action
from hybridkex.cli.choices import TRANSFER_PROTOCOL
from hybridkex.cli.help_text import describe
from hybridkex.cli.options import ChannelOptions, add_channel_options
from hybridkex.cli.values import file_path, number, whole_number

__all__ = ["DEFAULT_PORT", "SendOptions", "configure"]


@dataclass(frozen=True, kw_only=True)
class SendOptions:
    """The options, parsed."""

    files: list[Path]
    host: str
    server_name: str | None
    retries: int
    patience: float
    channel: ChannelOptions


DEFAULT_PORT = 4434


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    describe(
        parser,
        "Send files and folders to 'hybridkex receive'. Files that the receiver already has are "
        "not sent again; an interrupted transfer resumes where it stopped.",
        examples=[
            "send report.pdf data/ backup.example.org --ca ca.pem --cert me.pem --key me.key",
            "send disk.img [2001:db8::1]:4434 --pin HEX --key me.pem",
        ],
        status="0 if the receiver has verified everything, 1 otherwise",
        notes="See docs/file-transfer.md.",
    )
    parser.add_argument(
        "files", metavar="FILE", nargs="+", type=file_path, help="a file or a folder"
    )
    parser.add_argument(
        "host", metavar="HOST[:PORT]", help=f"the receiver (port {DEFAULT_PORT} if none is given)"
    )
    parser.add_argument(
        "--server-name", metavar="NAME", help="the name in the receiver's certificate, if not HOST"
    )
    parser.add_argument(
        "--retries",
        metavar="N",
        type=whole_number,
        default=8,
        help="give up after this many connections in a row without progress (default: 8)",
    )
    parser.add_argument(
        "--patience",
        metavar="SECONDS",
        type=number,
        default=600.0,
        help="how long the receiver may be alive without progress, plus 1 s for each 4 MB of the "
        "largest file under way (default: 600)",
    )
    add_channel_options(parser, alpn=TRANSFER_PROTOCOL)
    parser.set_defaults(action=Action("send", SendOptions))
