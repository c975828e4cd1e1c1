"""``hybridkex tunnel``: connections of other programs through secure channels.

``docs/tunnel.md`` describes the configuration file and each step.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from hybridkex.cli.arguments import Action, Command, argument, nested, option
from hybridkex.cli.logs import log_level
from hybridkex.cli.options import ChannelOptions, port_file
from hybridkex.cli.values import address


def _address(text: str) -> Any:
    return option(f"{text}: HOST:PORT or unix:/path", type=address, metavar="ADDRESS")


@dataclass(frozen=True, kw_only=True)
class ProcessOptions:
    """Process-wide settings: in a file, once, above the tunnels."""

    metrics: str | None = option(
        "serve Prometheus metrics here, over plain HTTP", metavar="HOST:PORT"
    )
    grace: float = option(
        "time for open connections after SIGTERM (default: %(default)g)",
        metavar="SECONDS",
        default=30.0,
    )
    workers: int = option(
        "processes that carry the connections (default: %(default)s)", metavar="N", default=1
    )
    log_level: str = log_level()


@dataclass(frozen=True, kw_only=True)
class TunnelOptions:
    local: str
    name: str | None = option("the tunnel's name in logs and metrics (default: its address)")
    max_connections: int = option(
        "maximum number of simultaneous connections (default: %(default)s)", default=256
    )
    handshake_timeout: float = option(
        "time for a handshake (default: %(default)s)", metavar="SECONDS", default=10.0
    )
    connect_timeout: float = option(
        "time for the onward connection (default: %(default)s)", metavar="SECONDS", default=10.0
    )
    idle_timeout: float | None = option(
        "cut a connection after this time without data (default: none)", metavar="SECONDS"
    )
    socket_mode: str = option(
        "permissions of the Unix socket it listens on (default: %(default)s)",
        metavar="OCTAL",
        default="600",
    )
    port_file: Path | None = port_file()
    channel: ChannelOptions = nested()


@dataclass(frozen=True, kw_only=True)
class ListenOptions(TunnelOptions):
    """The end next to the server program."""

    local: str = _address("where to accept secure channels")
    target: str = _address("where the program listens")
    require_client_cert: bool = option("refuse clients without a certificate")
    allow: list[str] = option(
        "accept only clients with this name (DNS name, IP address or URI in the certificate's "
        "subjectAltName) or this key (sha256:PIN); may be repeated",
        metavar="NAME",
    )


@dataclass(frozen=True, kw_only=True)
class ConnectOptions(TunnelOptions):
    """The end next to the client program."""

    local: str = _address("where to accept the program's connections")
    remote: str = _address("the other end of the tunnel")
    server_name: str | None = option("the name in its certificate, if not HOST", metavar="NAME")


@dataclass(frozen=True, kw_only=True)
class OneListener:
    tunnel: ListenOptions = nested()
    process: ProcessOptions = nested()


@dataclass(frozen=True, kw_only=True)
class OneConnector:
    tunnel: ConnectOptions = nested()
    process: ProcessOptions = nested()


@dataclass(frozen=True, kw_only=True)
class FileOptions:
    file: Path = argument("a TOML file, see docs/tunnel.md")
    check: bool = option("check the file and exit")


def _action(options: type, function: str) -> Action:
    return Action("tunnel", options, extra="apps", function=function, reloads=True)


_COMMANDS: Final = {
    "listen": Command(
        "Accept secure channels and forward each to the socket of a program.",
        examples=[
            "tunnel listen --local 0.0.0.0:6432 --target 127.0.0.1:5432 \\\n"
            "      --cert cert.pem --key key.pem --ca ca.pem --require-client-cert",
            "tunnel listen --local [::]:6379 --target unix:/run/db.sock --cert c.pem --key k.pem",
        ],
        status="0 after SIGTERM or SIGINT, 1 when it cannot start",
        summary="accept secure channels and forward them to a program",
        action=_action(OneListener, "listen"),
    ),
    "connect": Command(
        "Accept a program's connections and forward each through a secure channel.",
        examples=[
            "tunnel connect --local 127.0.0.1:5432 --remote db.example.org:6432 \\\n"
            "      --ca ca.pem --cert cert.pem --key key.pem",
        ],
        status="0 after SIGTERM or SIGINT, 1 when it cannot start",
        summary="accept a program's connections and forward them through secure channels",
        action=_action(OneConnector, "connect"),
    ),
    "run": Command(
        "Run the tunnels of a configuration file. SIGHUP reloads it: unchanged tunnels continue, "
        "and an invalid file changes nothing.",
        examples=["tunnel run tunnels.toml", "tunnel run tunnels.toml --check"],
        status="0 after SIGTERM or SIGINT (with --check: the file is valid), 1 otherwise",
        notes="examples/tunnel has a systemd unit. See docs/tunnel.md.",
        summary="run the tunnels of a configuration file",
        action=_action(FileOptions, "run_file"),
    ),
}

COMMAND: Final = Command(
    "Forward TCP connections and Unix sockets of other programs through secure channels, which "
    "gives unmodified programs hybrid keys. One end runs 'tunnel connect' next to the client "
    "program, the other 'tunnel listen' next to the server program.",
    examples=[
        "tunnel listen --local 0.0.0.0:6432 --target 127.0.0.1:5432 --cert c.pem --key k.pem",
        "tunnel connect --local 127.0.0.1:5432 --remote db.example.org:6432 --ca ca.pem",
        "tunnel run tunnels.toml",
    ],
    notes="See docs/tunnel.md.",
    commands=_COMMANDS,
)
