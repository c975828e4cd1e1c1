"""``hybridkex tunnel``: connections of other programs through secure channels.

``docs/tunnel.md`` describes the configuration file and each step.
"""

import os
import sys
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

import trio
from prometheus_client import CollectorRegistry

import hybridkex
from hybridkex.apps.port_file import check_new_file
from hybridkex.apps.tunnel import (
    TunnelConfig,
    TunnelMetrics,
    TunnelServer,
    TunnelService,
    TunnelSettings,
    WorkerPool,
)
from hybridkex.apps.tunnel.config import ConfigFactory
from hybridkex.apps.tunnel.sockets import check_local
from hybridkex.cli.arguments import add_options, from_namespace
from hybridkex.cli.channel import client_config, server_config
from hybridkex.cli.logs import set_up_logging
from hybridkex.cli.option_tables import OptionTable, read_options
from hybridkex.cli.running import EndRequest, run_service, run_trio
from hybridkex.cli.tcp import opening
from hybridkex.cli.tunnel import (
    ConnectOptions,
    FileOptions,
    ListenOptions,
    OneConnector,
    OneListener,
    ProcessOptions,
    TunnelOptions,
)
from hybridkex.errors import ConfigError
from hybridkex.files import read_toml
from hybridkex.kme.metrics import metrics_page
from hybridkex.net.address import TcpAddress, parse_address, parse_tcp_address
from hybridkex.net.descriptors import raise_soft_limit
from hybridkex.net.http import Request, Response, http_supervisor
from hybridkex.net.listening import open_tcp_listeners
from hybridkex.qkd.sqlite_file import FileInUse
from hybridkex.text import get_logger

LOG: Final = get_logger("hybridkex.tunnel")


T = TypeVar("T")

# -- settings


def _listen_tunnel(options: ListenOptions) -> TunnelConfig:
    wanted = options.require_client_cert or bool(options.allow)
    if wanted and not options.channel.names_trust:
        raise ConfigError(
            "to request certificates from clients, configure the trusted authorities or keys: ca, "
            "pin or known_peers"
        )
    channel = partial(server_config, options.channel, require_client_certificate=wanted)
    return _tunnel(options, options.target, channel, allowed=frozenset(options.allow))


def _connect_tunnel(options: ConnectOptions) -> TunnelConfig:
    channel = partial(client_config, options.channel, watch=True)
    return _tunnel(options, options.remote, channel, server_name=options.server_name)


def _tunnel(
    options: TunnelOptions, forward: str, channel: ConfigFactory, **more: Any
) -> TunnelConfig:
    try:
        mode = int(options.socket_mode, 8)
    except ValueError:
        raise ConfigError("socket_mode must be three octal digits") from None
    return TunnelConfig(
        name=options.name or options.local,
        local=parse_address(options.local),
        forward=parse_address(forward),
        channel=channel,
        bind=options.channel.bind,
        max_connections=options.max_connections,
        handshake_timeout=options.handshake_timeout,
        connect_timeout=options.connect_timeout,
        idle_timeout=options.idle_timeout,
        socket_mode=mode,
        json=options.channel.json,
        port_file=options.port_file,
        sole=None if options.channel.qkd.key_pool is None else "its key pool",
        **more,
    )


def _settings(
    process: ProcessOptions,
    tunnels: Iterable[TunnelConfig],
    recipe: Callable[[], TunnelSettings],
) -> TunnelSettings:
    metrics = process.metrics
    return TunnelSettings(
        tunnels=tuple(tunnels),
        metrics=parse_tcp_address(metrics) if metrics is not None else None,
        grace=process.grace,
        log_level=process.log_level,
        workers=process.workers,
        recipe=recipe,
    )


def load_file(path: Path, *, check: bool = False) -> TunnelSettings:
    """The tunnels of a configuration file; with ``check`` to be opened, and not to run.

    Raises:
        ConfigError: it cannot be read or used; the message names the file.
    """
    try:
        return _from_tables(read_toml(path), path.absolute().parent, check=check)
    except ConfigError as error:
        text = str(error)
        raise ConfigError(text if str(path) in text else f"{path}: {text}") from None


def _from_tables(tables: dict[str, Any], base: Path, *, check: bool = False) -> TunnelSettings:
    recipe = partial(_from_tables, deepcopy(tables), base)
    found: list[TunnelConfig] = []
    for kind, options, make in _KINDS:
        items = tables.pop(kind, [])
        if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
            raise ConfigError(f"write each tunnel as a table [[{kind}]]")
        for index, item in enumerate(items, 1):
            where = f"[[{kind}]] {item.get('name', index)}"
            try:
                read: TunnelOptions = _read(options, item, where, base)
                found.append(make(_without_new_files(read) if check else read))
            except ConfigError as error:
                raise ConfigError(f"{where}: {error}") from None
    return _settings(_read(ProcessOptions, tables, "the file", base), found, recipe)


def _without_new_files(options: TunnelOptions) -> TunnelOptions:
    """Without a key log that would be created. Raises ``ConfigError`` if it could not be."""
    path = options.channel.keylog
    if path is None or os.path.lexists(path):
        return options
    check_new_file(path)
    return replace(options, channel=replace(options.channel, keylog=None))


_KINDS: Final[tuple[tuple[str, type, Callable[[Any], TunnelConfig]], ...]] = (
    ("listen", ListenOptions, _listen_tunnel),
    ("connect", ConnectOptions, _connect_tunnel),
)


def _read(options: type[T], table: dict[str, Any], where: str, base: Path) -> T:
    parser = OptionTable(prog=where, allow_abbrev=False)
    add_options(parser, options)
    return from_namespace(options, read_options(table, parser, base))


# -- running


def listen(options: OneListener) -> int:
    """Run one end until SIGTERM or SIGINT."""
    return _run(partial(_one_listener, options))


def _one_listener(options: OneListener) -> TunnelSettings:
    recipe = partial(_one_listener, options)
    return _settings(options.process, [_listen_tunnel(options.tunnel)], recipe)


def connect(options: OneConnector) -> int:
    return _run(partial(_one_connector, options))


def _one_connector(options: OneConnector) -> TunnelSettings:
    recipe = partial(_one_connector, options)
    return _settings(options.process, [_connect_tunnel(options.tunnel)], recipe)


def run_file(options: FileOptions) -> int:
    load = partial(load_file, options.file)
    if not options.check:
        return _run(load)
    settings = load_file(options.file, check=True)
    run_trio(partial(_check, settings))
    count = len(settings.tunnels)
    print(f"{options.file}: {count} tunnel{'s' if count > 1 else ''}")
    return 0


def _run(load: Callable[[], TunnelSettings]) -> int:
    settings = load()
    set_up_logging(settings.log_level)
    raise_soft_limit()
    run_service(partial(_serve, load, settings))
    return 0


async def _check(settings: TunnelSettings) -> None:
    for tunnel in settings.tunnels:
        with suppress(FileInUse):  # a key pool, of the tunnels that run now
            async with tunnel.opened():
                pass
    await check_local(settings)


async def _serve(
    load: Callable[[], TunnelSettings], settings: TunnelSettings, request: EndRequest
) -> None:
    server, metrics = _server(settings)
    async with trio.open_nursery() as nursery:
        if settings.metrics is not None:
            await nursery.start(_serve_metrics, metrics, settings.metrics)
        await TunnelService(load, settings, server, on_end=request.note).run()
        nursery.cancel_scope.cancel()


def _server(
    settings: TunnelSettings,
) -> tuple[TunnelServer | WorkerPool, Callable[[], Awaitable[CollectorRegistry]]]:
    """The object that runs the tunnels, and the function that returns its metrics."""
    if settings.workers > 1:
        pool = WorkerPool(_WORKER)
        return pool, pool.metrics
    metrics = TunnelMetrics()

    async def own() -> CollectorRegistry:
        return metrics.registry

    return TunnelServer(metrics), own


_WORKER: Final = (
    *(sys.executable, "-P", "-c"),
    # Signals are for the service, which tells its workers. SIGTTOU would stop one that writes to
    # the log on a terminal, where its group is in the background.
    "import signal, sys\n"
    "for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGTTOU):\n"
    "    signal.signal(number, signal.SIG_IGN)\n"
    # After all other folders, and never the current one, where another user may have put modules.
    f"sys.path.append({str(Path(hybridkex.__file__).parents[1])!r})\n"
    "from hybridkex.cli import run_program\n"
    "def work():\n"
    "    from hybridkex.cli.actions.tunnel_worker import main\n"
    "    return main()\n"
    "sys.exit(run_program(work))",
)
"""The command that starts a worker."""


async def _serve_metrics(
    metrics: Callable[[], Awaitable[CollectorRegistry]],
    address: TcpAddress,
    *,
    task_status: trio.TaskStatus[None],
) -> None:
    async def page(request: Request) -> Response:
        return metrics_page(await metrics(), request)

    with opening(address):
        listeners = await open_tcp_listeners(address.port, host=address.host)
    port = listeners[0].socket.getsockname()[1]
    LOG.info("metrics on http://%s/metrics", TcpAddress(address.host, port))
    task_status.started()
    await http_supervisor(page, "metrics", LOG).serve(listeners)
