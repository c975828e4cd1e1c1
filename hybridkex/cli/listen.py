"""``hybridkex listen``: accept secure channels, in the manner of ``s_server``."""

import argparse
from dataclasses import dataclass
from pathlib import Path

from hybridkex.cli.arguments import Action
from hybridkex.cli.help_text import describe
from hybridkex.cli.logs import add_log_options
from hybridkex.cli.options import ChannelOptions, add_channel_options
from hybridkex.cli.values import file_path, whole_number

__all__ = ["ListenOptions", "configure"]


@dataclass(frozen=True, kw_only=True)
class ListenOptions:
    """The options, parsed."""

    port: int
    require_client_cert: bool
    echo: bool
    once: bool
    port_file: Path | None
    log_level: str
    channel: ChannelOptions


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    describe(
        parser,
        "Accept TLS 1.3 channels, one after the other. What a client sends is written to standard "
        "output; standard input is sent to the client. With --echo each client gets its own data "
        "back, and many are served at once.",
        examples=[
            "listen 4433 --cert keys/cert.pem --key keys/key.pem > received",
            "listen 4433 --cert cert.pem --key key.pem --ca clients.pem --require-client-cert",
            'listen 0 --echo --port-file port --psk "site-a:$(cat psk.hex)"',
        ],
        status="0 after a clean close (with --once: of the one connection), 1 otherwise",
        notes="A failed handshake ends the command only with --once.",
    )
    parser.add_argument(
        "port", metavar="PORT", type=whole_number, help="the TCP port; 0 picks a free one"
    )
    parser.add_argument(
        "--require-client-cert", action="store_true", help="refuse clients without a certificate"
    )
    parser.add_argument(
        "--echo", action="store_true", help="send each client's data back; serve many at once"
    )
    parser.add_argument("--once", action="store_true", help="end after the first connection")
    parser.add_argument(
        "--port-file",
        type=file_path,
        metavar="FILE",
        help="write the port number to FILE once it is open",
    )
    add_log_options(parser, default="warning")
    add_channel_options(parser)
    parser.set_defaults(action=Action("listen", ListenOptions))
