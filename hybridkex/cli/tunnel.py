"""``hybridkex tunnel``: connections of other programs through secure channels.

``docs/tunnel.md`` shows the configuration file and the whole way.
"""

import argparse
import signal
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import trio

from hybridkex.apps.tunnel import TunnelConfig, TunnelMetrics, TunnelServer
from hybridkex.apps.tunnel.config import Channel, check_together
from hybridkex.cli.logs import add_log_options, set_up_logging
from hybridkex.cli.manual import describe
from hybridkex.cli.option_tables import OptionTable, read_options
from hybridkex.cli.options import add_channel_options, client_config, server_config
from hybridkex.cli.port_file import write_port
from hybridkex.cli.running import first_of, run_trio
from hybridkex.cli.systemd import notify, notify_reloading
from hybridkex.cli.tcp import NO_TCP, cannot_listen
from hybridkex.errors import ConfigError, HybridkexError
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
    several.add_argument("file", type=Path, metavar="FILE", help="a TOML file, see docs/tunnel.md")
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
    parser.add_argument("--port-file", metavar="FILE", help="write the port here once it is open")
    add_channel_options(parser)


def _add_listen_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--local",
        required=True,
        metavar="ADDRESS",
        help="where secure channels come in: HOST:PORT or unix:/path",
    )
    parser.add_argument(
        "--target",
        required=True,
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
        metavar="ADDRESS",
        help="where the program connects to: HOST:PORT or unix:/path",
    )
    parser.add_argument(
        "--remote",
        required=True,
        metavar="ADDRESS",
        help="the other end of the tunnel: HOST:PORT or unix:/path",
    )
    parser.add_argument(
        "--server-name", metavar="NAME", help="the name in its certificate, if it is not HOST"
    )
    _add_common_options(parser)


# -- settings


@dataclass(frozen=True, kw_only=True)
class _Settings:
    """All that a file says, or a command line."""

    tunnels: tuple[TunnelConfig, ...]
    port_files: tuple[str | None, ...]
    metrics: TcpAddress | None
    process: argparse.Namespace

    def __post_init__(self) -> None:
        check_together(self.tunnels)
        if self.process.grace < 0:
            raise ConfigError("grace is not negative")


MakeTunnel = Callable[[argparse.Namespace], TunnelConfig]


def _listen_tunnel(args: argparse.Namespace) -> TunnelConfig:
    wanted = args.require_client_cert or bool(args.allow)
    if wanted and not (args.ca or args.pin or args.known_peers or args.insecure):
        raise ConfigError("whoever asks for clients' certificates needs ca, pin or known-peers")
    channel = partial(server_config, args, require_client_certificate=wanted)
    return _tunnel(args, args.target, channel, allowed=frozenset(args.allow))


def _connect_tunnel(args: argparse.Namespace) -> TunnelConfig:
    channel = partial(client_config, args)
    return _tunnel(args, args.remote, channel, server_name=args.server_name)


def _tunnel(args: argparse.Namespace, forward: str, channel: Channel, **more: Any) -> TunnelConfig:
    try:
        mode = int(args.socket_mode, 8)
    except ValueError:
        raise ConfigError("socket-mode is three octal digits") from None
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
        **more,
    )


def _metrics_address(process: argparse.Namespace) -> TcpAddress | None:
    return parse_tcp_address(process.metrics) if process.metrics is not None else None


def _one(make: MakeTunnel, args: argparse.Namespace) -> _Settings:
    return _Settings(
        tunnels=(make(args),),
        port_files=(args.port_file,),
        metrics=_metrics_address(args),
        process=args,
    )


def _several(args: argparse.Namespace) -> _Settings:
    path: Path = args.file
    try:
        return _from_tables(read_toml(path), path.absolute().parent)
    except ConfigError as error:
        text = str(error)
        raise ConfigError(text if str(path) in text else f"{path}: {text}") from None


def _from_tables(tables: dict[str, Any], base: Path) -> _Settings:
    found: list[tuple[TunnelConfig, str | None]] = []
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
                one = read_options(item, options, base)
                found.append((make(one), one.port_file))
            except ConfigError as error:
                raise ConfigError(f"{where}: {error}") from None
    options = OptionTable(prog="the file", allow_abbrev=False)
    _add_process_options(options)
    process = read_options(tables, options, base)
    return _Settings(
        tunnels=tuple(tunnel for tunnel, _ in found),
        port_files=tuple(port_file for _, port_file in found),
        metrics=_metrics_address(process),
        process=process,
    )


# -- running


def run(args: argparse.Namespace) -> int:
    """Run until SIGTERM or SIGINT."""
    load: Callable[[], _Settings] = partial(args.load, args)
    settings = load()
    if getattr(args, "check", False):
        run_trio(partial(_check, settings))
        print(f"{args.file}: {len(settings.tunnels)} tunnels")
        return 0
    set_up_logging(settings.process)
    run_trio(_Process(load, settings).run)
    return 0


async def _check(settings: _Settings) -> None:
    for tunnel in settings.tunnels:
        async with tunnel.opened():
            pass


class _Process:
    """The tunnels, the metrics and the signals."""

    def __init__(self, load: Callable[[], _Settings], settings: _Settings) -> None:
        self._load = load
        self._settings = settings
        self._metrics = TunnelMetrics()
        self._server = TunnelServer(self._metrics)

    async def run(self) -> None:
        """Until a signal ends it."""
        signals = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)
        with trio.open_signal_receiver(*signals) as received:
            async with trio.open_nursery() as nursery:
                if self._settings.metrics is not None:
                    await nursery.start(self._serve_metrics, self._settings.metrics)
                await nursery.start(self._serve, nursery.cancel_scope)
                self._say_ready()
                nursery.start_soon(self._obey, received)

    async def _serve(self, scope: trio.CancelScope, *, task_status: trio.TaskStatus[None]) -> None:
        await self._server.run(self._settings.tunnels, task_status=task_status)
        scope.cancel()

    async def _obey(self, received: AsyncIterator[int]) -> None:
        ending = False
        async for number in received:
            if number != signal.SIGHUP:
                notify("STOPPING=1", "STATUS=no new connections")
                # Whoever asks twice is in a hurry.
                self._server.close(0.0 if ending else self._settings.process.grace)
                ending = True
            elif not ending:
                await self._reload()

    async def _reload(self) -> None:
        notify_reloading()
        try:
            settings = self._load()
            await self._server.apply(settings.tunnels)
        except Exception as error:
            reason = first_of(error)
            if not isinstance(reason, HybridkexError):
                raise
            LOG.error("not reloaded, the old configuration stays: %s", reason)  # noqa: TRY400
        else:
            if settings.metrics != self._settings.metrics:
                LOG.warning("metrics stay where they are until a restart")
            LOG.setLevel(settings.process.log_level.upper())
            self._settings = settings
            LOG.info("reloaded")
        self._say_ready()

    def _say_ready(self) -> None:
        for tunnel, port_file in zip(
            self._settings.tunnels, self._settings.port_files, strict=True
        ):
            (listener, *_) = self._server.listeners(tunnel.name)
            if isinstance(tunnel.local, TcpAddress):
                where = TcpAddress(tunnel.local.host, listener.socket.getsockname()[1])
                write_port(port_file, listener)
                LOG.info("%s: %s to %s", tunnel.name, where, tunnel.forward)
            else:
                LOG.info("%s: %s to %s", tunnel.name, tunnel.local, tunnel.forward)
        notify("READY=1", f"STATUS={len(self._settings.tunnels)} tunnels")

    async def _serve_metrics(
        self, address: TcpAddress, *, task_status: trio.TaskStatus[None]
    ) -> None:
        async def page(request: Request) -> Response:
            return metrics_page(self._metrics.registry, request)

        try:
            listeners = await trio.open_tcp_listeners(address.port, host=address.host)
        except NO_TCP as error:
            raise cannot_listen(address, error) from None
        port = listeners[0].socket.getsockname()[1]
        LOG.info("metrics on http://%s/metrics", TcpAddress(address.host, port))
        task_status.started()
        await http_supervisor(page, "metrics", LOG).serve(listeners)
