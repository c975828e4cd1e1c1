"""``hybridkex tunnel``: connections of other programs through secure channels.

``docs/tunnel.md`` shows the configuration file and the whole way.
"""

import argparse
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, Final

import trio

from hybridkex.apps.tunnel import TunnelConfig, TunnelMetrics, TunnelService, TunnelSettings
from hybridkex.apps.tunnel.config import ConfigFactory
from hybridkex.cli.logs import add_log_options, set_up_logging
from hybridkex.cli.manual import describe
from hybridkex.cli.option_tables import OptionTable, read_options
from hybridkex.cli.options import add_channel_options, client_config, server_config
from hybridkex.cli.running import run_trio
from hybridkex.cli.tcp import NO_TCP, cannot_listen
from hybridkex.cli.values import address, file_path
from hybridkex.errors import ConfigError
from hybridkex.files import read_toml
from hybridkex.kme.metrics import metrics_page
from hybridkex.net.address import TcpAddress, parse_address, parse_tcp_address
from hybridkex.net.http import Request, Response, http_supervisor
from hybridkex.text import get_logger

__all__ = ["configure", "run"]

LOG: Final = get_logger("hybridkex.tunnel")


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the sub-commands."""
    describe(
        parser,
        "Carry TCP connections and Unix sockets of other programs through secure channels, so that "
        "they gain hybrid keys without a change. One end runs 'tunnel connect' beside the client "
        "program, the other 'tunnel listen' beside the server program.",
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
        help="accept secure channels and carry them to a program",
    )
    describe(
        listen,
        "Accept secure channels and carry each to a program's own socket.",
        examples=[
            "tunnel listen --local 0.0.0.0:6432 --target 127.0.0.1:5432 \\\n"
            "      --cert cert.pem --key key.pem --ca ca.pem --require-client-cert",
            "tunnel listen --local [::]:6379 --target unix:/run/db.sock --cert c.pem --key k.pem",
        ],
        status="0 after SIGTERM or SIGINT, 1 when it cannot start",
    )
    _add_listen_options(listen)
    _add_process_options(listen)
    listen.set_defaults(load=partial(_one, _listen_tunnel))

    connect = commands.add_parser(
        "connect",
        help="accept a program's connections and carry them through secure channels",
    )
    describe(
        connect,
        "Accept a program's connections and carry each through a secure channel.",
        examples=[
            "tunnel connect --local 127.0.0.1:5432 --remote db.example.org:6432 \\\n"
            "      --ca ca.pem --cert cert.pem --key key.pem",
        ],
        status="0 after SIGTERM or SIGINT, 1 when it cannot start",
    )
    _add_connect_options(connect)
    _add_process_options(connect)
    connect.set_defaults(load=partial(_one, _connect_tunnel))

    several = commands.add_parser(
        "run",
        help="run the tunnels of a configuration file",
    )
    describe(
        several,
        "Run the tunnels of a configuration file. SIGHUP reads it again: what is the same goes on, "
        "and a file that cannot be used changes nothing.",
        examples=["tunnel run tunnels.toml", "tunnel run tunnels.toml --check"],
        status="0 after SIGTERM or SIGINT (with --check: the file can be used), 1 otherwise",
        notes="For systemd there is a unit in examples/tunnel. See docs/tunnel.md.",
    )
    several.add_argument(
        "file", type=file_path, metavar="FILE", help="a TOML file, see docs/tunnel.md"
    )
    several.add_argument("--check", action="store_true", help="say whether it can be used, and end")
    several.set_defaults(load=_several)


def _add_process_options(parser: argparse.ArgumentParser) -> None:
    """What a file has once, above its tunnels."""
    parser.add_argument("--metrics", metavar="HOST:PORT", help="Prometheus metrics, plain HTTP")
    parser.add_argument(
        "--grace",
        type=float,
        default=30.0,
        metavar="SECONDS",
        help="that connections may go on after SIGTERM (default: %(default)g)",
    )
    add_log_options(parser)


def _add_common_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--name", help="in logs and metrics (default: where it listens)")
    parser.add_argument(
        "--max-connections",
        metavar="N",
        type=int,
        default=256,
        help="more are refused (default: %(default)s)",
    )
    for name, seconds, text in (
        ("handshake-timeout", 10.0, "for a handshake"),
        ("connect-timeout", 10.0, "for a connection to where it goes"),
        ("idle-timeout", None, "without a byte after which a connection is cut"),
    ):
        parser.add_argument(
            f"--{name}",
            type=float,
            default=seconds,
            metavar="SECONDS",
            help=f"{text} (default: {seconds or 'none'})",
        )
    parser.add_argument(
        "--socket-mode",
        metavar="OCTAL",
        default="600",
        help="permissions of a Unix socket that it listens on (default: %(default)s)",
    )
    parser.add_argument(
        "--port-file", type=file_path, metavar="FILE", help="write the port here once it is open"
    )
    add_channel_options(parser)


def _add_listen_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--local",
        required=True,
        type=address,
        metavar="ADDRESS",
        help="where secure channels come in: HOST:PORT or unix:/path",
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


def _add_connect_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--local",
        required=True,
        type=address,
        metavar="ADDRESS",
        help="where the program connects to: HOST:PORT or unix:/path",
    )
    parser.add_argument(
        "--remote",
        required=True,
        type=address,
        metavar="ADDRESS",
        help="the other end of the tunnel: HOST:PORT or unix:/path",
    )
    parser.add_argument(
        "--server-name", metavar="NAME", help="the name in its certificate, if it is not HOST"
    )
    _add_common_options(parser)


# -- settings


MakeTunnel = Callable[[argparse.Namespace], TunnelConfig]


def _listen_tunnel(args: argparse.Namespace) -> TunnelConfig:
    wanted = args.require_client_cert or bool(args.allow)
    if wanted and not (args.ca or args.pin or args.known_peers or args.insecure):
        raise ConfigError(
            "to ask clients for certificates, name whom to trust with ca, pin or known_peers"
        )
    channel = partial(server_config, args, require_client_certificate=wanted)
    return _tunnel(args, args.target, channel, allowed=frozenset(args.allow))


def _connect_tunnel(args: argparse.Namespace) -> TunnelConfig:
    channel = partial(client_config, args)
    return _tunnel(args, args.remote, channel, server_name=args.server_name)


def _tunnel(
    args: argparse.Namespace, forward: str, channel: ConfigFactory, **more: Any
) -> TunnelConfig:
    try:
        mode = int(args.socket_mode, 8)
    except ValueError:
        raise ConfigError("socket_mode is three octal digits") from None
    return TunnelConfig(
        name=args.name or args.local,
        local=parse_address(args.local),
        forward=parse_address(forward),
        channel=channel,
        bind=args.bind,
        max_connections=args.max_connections,
        handshake_timeout=args.handshake_timeout,
        connect_timeout=args.connect_timeout,
        idle_timeout=args.idle_timeout,
        socket_mode=mode,
        json=args.json,
        port_file=args.port_file,
        **more,
    )


def _settings(process: argparse.Namespace, tunnels: Iterable[TunnelConfig]) -> TunnelSettings:
    metrics = process.metrics
    return TunnelSettings(
        tunnels=tuple(tunnels),
        metrics=parse_tcp_address(metrics) if metrics is not None else None,
        grace=process.grace,
        log_level=process.log_level,
    )


def _one(make: MakeTunnel, args: argparse.Namespace) -> TunnelSettings:
    return _settings(args, [make(args)])


def _several(args: argparse.Namespace) -> TunnelSettings:
    path: Path = args.file
    try:
        return _from_tables(read_toml(path), path.absolute().parent)
    except ConfigError as error:
        text = str(error)
        raise ConfigError(text if str(path) in text else f"{path}: {text}") from None


def _from_tables(tables: dict[str, Any], base: Path) -> TunnelSettings:
    found: list[TunnelConfig] = []
    for kind, add_options, make in (
        ("listen", _add_listen_options, _listen_tunnel),
        ("connect", _add_connect_options, _connect_tunnel),
    ):
        items = tables.pop(kind, [])
        if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
            raise ConfigError(f"tunnels stand under [[{kind}]]")
        for index, item in enumerate(items, 1):
            where = f"[[{kind}]] {item.get('name', index)}"
            options = OptionTable(prog=where, allow_abbrev=False)
            add_options(options)
            try:
                found.append(make(read_options(item, options, base)))
            except ConfigError as error:
                raise ConfigError(f"{where}: {error}") from None
    options = OptionTable(prog="the file", allow_abbrev=False)
    _add_process_options(options)
    return _settings(read_options(tables, options, base), found)


# -- running


def run(args: argparse.Namespace) -> int:
    """Run until SIGTERM or SIGINT."""
    load: Callable[[], TunnelSettings] = partial(args.load, args)
    settings = load()
    if getattr(args, "check", False):
        run_trio(partial(_check, settings))
        print(f"{args.file}: {len(settings.tunnels)} tunnels")
        return 0
    set_up_logging(settings.log_level)
    run_trio(partial(_serve, load, settings))
    return 0


async def _check(settings: TunnelSettings) -> None:
    for tunnel in settings.tunnels:
        async with tunnel.opened():
            pass


async def _serve(load: Callable[[], TunnelSettings], settings: TunnelSettings) -> None:
    metrics = TunnelMetrics()
    async with trio.open_nursery() as nursery:
        if settings.metrics is not None:
            await nursery.start(_serve_metrics, metrics, settings.metrics)
        await TunnelService(load, settings, metrics).run()
        nursery.cancel_scope.cancel()


async def _serve_metrics(
    metrics: TunnelMetrics, address: TcpAddress, *, task_status: trio.TaskStatus[None]
) -> None:
    async def page(request: Request) -> Response:
        return metrics_page(metrics.registry, request)

    try:
        listeners = await trio.open_tcp_listeners(address.port, host=address.host)
    except NO_TCP as error:
        raise cannot_listen(address, error) from None
    port = listeners[0].socket.getsockname()[1]
    LOG.info("metrics on http://%s/metrics", TcpAddress(address.host, port))
    task_status.started()
    await http_supervisor(page, "metrics", LOG).serve(listeners)
