"""``hybridkex tunnel``: connections of other programs through secure channels.

``docs/tunnel.md`` describes the configuration file and each step.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

from hybridkex.cli.arguments import Action
from hybridkex.cli.help_text import describe
from hybridkex.cli.logs import add_log_options
from hybridkex.cli.options import ChannelOptions, add_channel_options
from hybridkex.cli.values import address, file_path, number, whole_number

__all__ = [
    "ConnectOptions",
    "FileOptions",
    "ListenOptions",
    "ProcessOptions",
    "TunnelOptions",
    "add_connect_options",
    "add_listen_options",
    "add_process_options",
    "configure",
]


@dataclass(frozen=True, kw_only=True)
class ProcessOptions:
    """Process-wide settings: in a file, once, above the tunnels."""

    metrics: str | None
    grace: float
    log_level: str


@dataclass(frozen=True, kw_only=True)
class TunnelOptions:
    """The options of both ends of a tunnel."""

    name: str | None
    local: str
    max_connections: int
    handshake_timeout: float
    connect_timeout: float
    idle_timeout: float | None
    socket_mode: str
    port_file: Path | None
    channel: ChannelOptions


@dataclass(frozen=True, kw_only=True)
class ListenOptions(TunnelOptions):
    """The end next to the server program."""

    target: str
    require_client_cert: bool
    allow: list[str]


@dataclass(frozen=True, kw_only=True)
class ConnectOptions(TunnelOptions):
    """The end next to the client program."""

    remote: str
    server_name: str | None


@dataclass(frozen=True, kw_only=True)
class OneListener:
    """``tunnel listen``."""

    tunnel: ListenOptions
    process: ProcessOptions


@dataclass(frozen=True, kw_only=True)
class OneConnector:
    """``tunnel connect``."""

    tunnel: ConnectOptions
    process: ProcessOptions


@dataclass(frozen=True, kw_only=True)
class FileOptions:
    """``tunnel run``."""

    file: Path
    check: bool


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the sub-commands."""
    describe(
        parser,
        "Forward TCP connections and Unix sockets of other programs through secure channels, which "
        "gives unmodified programs hybrid keys. One end runs 'tunnel connect' next to the client "
        "program, the other 'tunnel listen' next to the server program.",
        examples=[
            "tunnel listen --local 0.0.0.0:6432 --target 127.0.0.1:5432 --cert c.pem --key k.pem",
            "tunnel connect --local 127.0.0.1:5432 --remote db.example.org:6432 --ca ca.pem",
            "tunnel run tunnels.toml",
        ],
        notes="See docs/tunnel.md.",
    )
    commands = parser.add_subparsers(metavar="command", required=True)

    listen = commands.add_parser(
        "listen",
        help="accept secure channels and forward them to a program",
    )
    describe(
        listen,
        "Accept secure channels and forward each to the socket of a program.",
        examples=[
            "tunnel listen --local 0.0.0.0:6432 --target 127.0.0.1:5432 \\\n"
            "      --cert cert.pem --key key.pem --ca ca.pem --require-client-cert",
            "tunnel listen --local [::]:6379 --target unix:/run/db.sock --cert c.pem --key k.pem",
        ],
        status="0 after SIGTERM or SIGINT, 1 when it cannot start",
    )
    add_listen_options(listen)
    add_process_options(listen)
    listen.set_defaults(action=_action(OneListener, "listen"))

    connect = commands.add_parser(
        "connect",
        help="accept a program's connections and forward them through secure channels",
    )
    describe(
        connect,
        "Accept a program's connections and forward each through a secure channel.",
        examples=[
            "tunnel connect --local 127.0.0.1:5432 --remote db.example.org:6432 \\\n"
            "      --ca ca.pem --cert cert.pem --key key.pem",
        ],
        status="0 after SIGTERM or SIGINT, 1 when it cannot start",
    )
    add_connect_options(connect)
    add_process_options(connect)
    connect.set_defaults(action=_action(OneConnector, "connect"))

    run = commands.add_parser(
        "run",
        help="run the tunnels of a configuration file",
    )
    describe(
        run,
        "Run the tunnels of a configuration file. SIGHUP reloads it: unchanged tunnels continue, "
        "and an invalid file changes nothing.",
        examples=["tunnel run tunnels.toml", "tunnel run tunnels.toml --check"],
        status="0 after SIGTERM or SIGINT (with --check: the file is valid), 1 otherwise",
        notes="examples/tunnel has a systemd unit. See docs/tunnel.md.",
    )
    run.add_argument("file", type=file_path, metavar="FILE", help="a TOML file, see docs/tunnel.md")
    run.add_argument("--check", action="store_true", help="check the file and exit")
    run.set_defaults(action=_action(FileOptions, "run_file"))


def _action(options: type, function: str) -> Action:
    return Action("tunnel", options, extra="apps", function=function)


def add_process_options(parser: argparse.ArgumentParser) -> None:
    """Process-wide settings: in a file, once, above the tunnels."""
    parser.add_argument(
        "--metrics", metavar="HOST:PORT", help="serve Prometheus metrics here, over plain HTTP"
    )
    parser.add_argument(
        "--grace",
        type=number,
        default=30.0,
        metavar="SECONDS",
        help="time for open connections after SIGTERM (default: %(default)g)",
    )
    add_log_options(parser)


def _add_common_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--name", help="the tunnel's name in logs and metrics (default: its address)"
    )
    parser.add_argument(
        "--max-connections",
        metavar="N",
        type=whole_number,
        default=256,
        help="most connections at once (default: %(default)s)",
    )
    for name, seconds, text in (
        ("handshake-timeout", 10.0, "time for a handshake"),
        ("connect-timeout", 10.0, "time for the onward connection"),
        ("idle-timeout", None, "cut a connection after this time without data"),
    ):
        parser.add_argument(
            f"--{name}",
            type=number,
            default=seconds,
            metavar="SECONDS",
            help=f"{text} (default: {seconds or 'none'})",
        )
    parser.add_argument(
        "--socket-mode",
        metavar="OCTAL",
        default="600",
        help="permissions of the Unix socket it listens on (default: %(default)s)",
    )
    parser.add_argument(
        "--port-file",
        type=file_path,
        metavar="FILE",
        help="write the port number to FILE once it is open",
    )
    add_channel_options(parser)


def add_listen_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--local",
        required=True,
        type=address,
        metavar="ADDRESS",
        help="where to accept secure channels: HOST:PORT or unix:/path",
    )
    parser.add_argument(
        "--target",
        required=True,
        type=address,
        metavar="ADDRESS",
        help="where the program listens: HOST:PORT or unix:/path",
    )
    parser.add_argument(
        "--require-client-cert", action="store_true", help="refuse clients without a certificate"
    )
    parser.add_argument(
        "--allow",
        metavar="NAME",
        action="append",
        default=[],
        help="accept only clients with this name (DNS name, IP address or URI in the certificate's "
        "subjectAltName) or this key (sha256:PIN); may be repeated",
    )
    _add_common_options(parser)


def add_connect_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--local",
        required=True,
        type=address,
        metavar="ADDRESS",
        help="where to accept the program's connections: HOST:PORT or unix:/path",
    )
    parser.add_argument(
        "--remote",
        required=True,
        type=address,
        metavar="ADDRESS",
        help="the other end of the tunnel: HOST:PORT or unix:/path",
    )
    parser.add_argument(
        "--server-name", metavar="NAME", help="the name in its certificate, if not HOST"
    )
    _add_common_options(parser)
