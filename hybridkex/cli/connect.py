"""``hybridkex connect``: a secure channel to a server, in the manner of ``s_client -quiet``."""

import argparse
from dataclasses import dataclass
from pathlib import Path

from hybridkex.cli.arguments import Action
from hybridkex.cli.help_text import describe
from hybridkex.cli.options import ChannelOptions, add_channel_options
from hybridkex.cli.values import file_path

__all__ = ["ConnectOptions", "configure"]


@dataclass(frozen=True, kw_only=True)
class ConnectOptions:
    """The options, parsed."""

    host: str
    port: int
    server_name: str | None
    resume: Path | None
    channel: ChannelOptions


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    describe(
        parser,
        "Open a TLS 1.3 channel to a server. Standard input goes to it, what it sends goes to "
        "standard output; the end of the input closes our direction, and the command ends when the "
        "server has closed its own.\n\nThe peer's certificate is checked against the system's "
        "authorities if nothing else is said. A peer without a post-quantum group is refused "
        "unless --groups names a classical one.",
        examples=[
            "connect localhost 4433 --ca keys/ca.pem --json < file",
            "connect example.org 443 --alpn http/1.1 --groups X25519MLKEM768,x25519",
            'connect localhost 4433 --psk "site-a:$(cat psk.hex)" --psk-import 00',
        ],
        status="0 after a clean close by the peer, 1 otherwise, with one line on standard error",
        notes="'hybridkex listen' is the other end; so is 'openssl s_server' (3.5 or newer, or an "
        "older one with --groups x25519).",
    )
    parser.add_argument("host", metavar="HOST", help="the server's name or IP address")
    parser.add_argument("port", metavar="PORT", type=int, help="the server's TCP port")
    parser.add_argument(
        "--server-name", metavar="NAME", help="the name in the certificate, if it is not HOST"
    )
    parser.add_argument(
        "--resume",
        type=file_path,
        metavar="FILE",
        help="keep session tickets in FILE and resume with them",
    )
    add_channel_options(parser)
    parser.set_defaults(action=Action("connect", ConnectOptions))
