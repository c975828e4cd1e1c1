"""Any number of tunnels in one process, and configuration changes while they run.

Three nested nurseries end from the inside out: accepting ends first, then the open connections,
then the key sources. A configuration in force is an :class:`_ActiveConfig`. A connection uses the
configuration that is in force when it is accepted, and holds it until its handshake is done: a new
configuration applies to new connections, and an old one stays open as long as its key source is
needed.
"""

import contextlib
import logging
import math
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Iterator
from dataclasses import InitVar, dataclass, field, replace
from functools import partial
from typing import Any, Final, TypeAlias

import trio

from hybridkex import ClientConfig, SecureStream, ServerConfig, Session
from hybridkex.apps.handshakes import handshake_failed
from hybridkex.apps.tcp import no_connection, reset, set_reset
from hybridkex.apps.tunnel.config import TunnelConfig, TunnelSettings, check_together
from hybridkex.apps.tunnel.forward import Activity, ConnectionCut, Leg, forward
from hybridkex.apps.tunnel.metrics import TunnelCounters, TunnelMetrics
from hybridkex.apps.tunnel.sockets import Listening, LostNames, connect, listen_for, write_ports
from hybridkex.errors import ConfigError, HybridkexError
from hybridkex.machine import is_scarce, refusal
from hybridkex.net.address import Address
from hybridkex.net.budget import Budget, Connection, TooManyConnections
from hybridkex.net.readiness import Readiness
from hybridkex.net.sockets import keep_alive
from hybridkex.net.supervisor import Supervisor
from hybridkex.text import get_logger, json_line

LOG: Final = get_logger("hybridkex.tunnel")

_CHECK_EVERY: Final = 1.0
"""Seconds between two checks of the names of Unix sockets."""

_Key: TypeAlias = tuple[Address, str]
"""The key of an endpoint, see :attr:`TunnelConfig.endpoint`."""


class _Rejected(HybridkexError):
    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


class _ActiveConfig:
    """A configuration in force: its files have been read, its key sources are open."""

    def __init__(self, config: TunnelConfig, channel: ClientConfig | ServerConfig) -> None:
        self.config = config
        self.channel = channel
        self.over = trio.Event()
        self._users = 0
        self._retired = False

    def retire(self) -> None:
        """Stop using it for new connections."""
        self._retired = True
        if not self._users:
            self.over.set()

    @contextlib.contextmanager
    def used(self) -> Iterator[None]:
        """Hold it during a handshake."""
        self._users += 1
        try:
            yield
        finally:
            self._users -= 1
            if self._retired and not self._users:
                self.over.set()


_Accepted: TypeAlias = "Callable[[_Endpoint, trio.SocketStream, Connection], Awaitable[None]]"


@dataclass(eq=False)
class _Endpoint:
    """A listening address and the configuration for its connections."""

    listening: Listening
    active: _ActiveConfig
    budget: Budget
    accepted: InitVar[_Accepted]
    supervisor: Supervisor[trio.SocketStream] = field(init=False)
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)

    def __post_init__(self, accepted: _Accepted) -> None:
        self.supervisor = Supervisor(
            partial(accepted, self),
            name=self.active.config.name,
            logger=LOG,
            # The stream's own time limit applies: it notifies the peer and follows the
            # configuration.
            handshake_seconds=math.inf,
        )

    async def aclose(self) -> None:
        """Close an endpoint that has not accepted a connection."""
        await self.supervisor.aclose()
        await self.listening.aclose()


class TunnelServer:
    """Runs tunnels until closed.

    Args:
        metrics: the metrics to update.
        listening: opens the listening sockets of a tunnel, or returns existing ones.
        go: no connection is accepted before this event; ``None`` to accept at once.
    """

    def __init__(
        self,
        metrics: TunnelMetrics,
        listening: Callable[[TunnelConfig], Awaitable[Listening]] = listen_for,
        go: trio.Event | None = None,
    ) -> None:
        self._metrics = metrics
        self._go = go
        self._listening = listening
        self._endpoints: dict[_Key, _Endpoint] = {}
        self._open: Counter[str] = Counter()
        self._changing = trio.Lock()
        """Held while listening sockets are opened and closed."""
        self._closing = trio.Event()
        self.closed = trio.Event()
        """Set when no more connections are accepted."""
        self._grace = 0.0
        self._readiness: Readiness
        self._background: trio.Nursery
        self._connections: trio.Nursery
        self._accepting: trio.Nursery

    async def run(
        self,
        tunnels: Collection[TunnelConfig],
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Serve until :meth:`close`; reports as started once all tunnels listen.

        Raises:
            ConfigError: the configuration cannot be used.
        """
        try:
            self._readiness = Readiness()
        except OSError as error:
            raise ConfigError(f"cannot watch connections: {error.strerror}") from error
        async with (
            trio.open_nursery() as self._background,
            self._readiness.running(),
            trio.open_nursery() as self._connections,
        ):
            try:
                async with trio.open_nursery() as self._accepting:
                    await self.apply(tunnels)
                    names = await self._accepting.start(self._keep_names)
                    task_status.started()
                    await self._closing.wait()
                    names.cancel()
                    self._accepting.cancel_scope.deadline = trio.current_time() + self._grace
                    for endpoint in self._endpoints.values():
                        endpoint.supervisor.stop_accepting()
                    self.closed.set()
                if self._connections.child_tasks and self._grace < math.inf:
                    LOG.info(
                        "%d open connections have %g s to finish",
                        len(self._connections.child_tasks),
                        self._grace,
                    )
                self._connections.cancel_scope.deadline = trio.current_time() + self._grace
            finally:  # cancelled, too, when a second call of close() ends the connections at once
                for endpoint in self._endpoints.values():
                    endpoint.active.retire()

    async def serve(
        self,
        settings: TunnelSettings,
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Like :meth:`run`, for a service."""
        await self.run(settings.tunnels, task_status=task_status)

    async def apply_settings(self, settings: TunnelSettings) -> None:
        """Like :meth:`apply`, for a service."""
        await self.apply(settings.tunnels)

    def close(self, grace: float) -> None:
        """Begin an orderly shutdown: no new connections, and ``grace`` seconds for open ones.
        Another call can shorten this."""
        self._grace = grace
        if self._closing.is_set():
            deadline = trio.current_time() + grace
            self._connections.cancel_scope.deadline = deadline
            self._accepting.cancel_scope.deadline = deadline
        self._closing.set()

    def where(self, name: str) -> Address:
        """The address of a tunnel, with its actual port."""
        return next(
            endpoint.listening.bound
            for endpoint in self._endpoints.values()
            if endpoint.active.config.name == name
        )

    async def apply(self, tunnels: Collection[TunnelConfig]) -> None:
        """Apply a new configuration, completely or not at all.

        Open connections continue unchanged. A listening socket that is in both configurations stays
        open, so that no connection is refused in between; a Unix socket whose name was removed is
        opened again.

        Raises:
            ConfigError: the new configuration cannot be used; nothing has changed.
        """
        check_together(tunnels)
        async with self._changing:
            await self._apply(tunnels)

    async def _apply(self, tunnels: Collection[TunnelConfig]) -> None:
        # Everything that can fail or block comes first, and is undone if the rest fails.
        async with contextlib.AsyncExitStack() as undo:
            fresh: dict[_Key, _ActiveConfig] = {}
            for config in tunnels:
                active = await self._background.start(self._hold, config)
                undo.callback(active.retire)
                fresh[config.endpoint] = active
            opened: dict[_Key, _Endpoint] = {}
            for key, active in fresh.items():
                config, endpoint = active.config, self._endpoints.get(key)
                if endpoint is not None and endpoint.listening.reachable:
                    before = endpoint.listening.set_mode(config.socket_mode)
                    if before is not None:
                        undo.callback(_try, endpoint.listening.set_mode, before)
                    continue
                budget = Budget(config.max_connections, descriptors=2, even_shares=True)
                opened[key] = await self._open_endpoint(active, budget)
                undo.push_async_callback(_shielded, opened[key].aclose)
            write_ports(
                (active.config, (opened.get(key) or self._endpoints[key]).listening)
                for key, active in fresh.items()
            )
            undo.pop_all()
        # Nothing below can fail.
        for key in [key for key in self._endpoints if key not in fresh or key in opened]:
            gone = self._endpoints.pop(key)
            gone.scope.cancel()
            gone.active.retire()
        for key, endpoint in self._endpoints.items():
            endpoint.active.retire()
            endpoint.active = fresh[key]
            endpoint.budget.total = endpoint.active.config.max_connections
        for key, endpoint in opened.items():
            self._endpoints[key] = endpoint
            self._accepting.start_soon(self._accept, endpoint)

    async def _keep_names(self, *, task_status: trio.TaskStatus[trio.CancelScope]) -> None:
        """Listen again whenever the name of a Unix socket is removed or replaced."""
        lost = LostNames()
        with trio.CancelScope() as scope:
            task_status.started(scope)
            while True:
                await trio.sleep(_CHECK_EVERY)
                async with self._changing:
                    for key, endpoint in list(self._endpoints.items()):
                        if endpoint.listening.reachable:
                            lost.found(endpoint.active.config)
                        else:
                            await self._listen_again(key, endpoint, lost)

    async def _listen_again(self, key: _Key, endpoint: _Endpoint, lost: LostNames) -> None:
        try:
            again = await self._open_endpoint(endpoint.active, endpoint.budget)
        except HybridkexError as error:
            lost.failed(endpoint.active.config, error)
            return
        lost.opened(endpoint.active.config)
        self._endpoints[key] = again
        endpoint.scope.cancel()
        self._accepting.start_soon(self._accept, again)

    async def _open_endpoint(self, active: _ActiveConfig, budget: Budget) -> _Endpoint:
        """Listen at the address of a configuration, with everything needed to accept connections.

        Raises:
            ConfigError: that cannot be done.
        """
        config = active.config
        listening = await self._listening(config)
        try:
            return _Endpoint(listening, active, budget, self._accepted)
        except OSError as error:
            await _shielded(listening.aclose)
            raise ConfigError(
                f"{config.name}: cannot accept connections at {config.local}: {error.strerror}"
            ) from error

    async def _hold(
        self, config: TunnelConfig, *, task_status: trio.TaskStatus[_ActiveConfig]
    ) -> None:
        started = False
        try:
            async with config.opened() as channel:
                if isinstance(channel, ServerConfig) and not (
                    channel.require_client_certificate or channel.has_psk
                ):
                    LOG.info("%s: clients are not authenticated", config.name)
                # Exported at zero, so that Prometheus can compute a rate from the first increase.
                counters = self._metrics.of(config.name)
                active = _ActiveConfig(config, replace(channel, on_epoch=counters.epoch))
                started = True
                task_status.started(active)
                await active.over.wait()
        except Exception:
            if not started:
                raise
            # A key source that fails to close must not end the others.
            LOG.exception("%s: closing its key sources failed", config.name)

    async def _accept(self, endpoint: _Endpoint) -> None:
        with endpoint.scope:
            try:
                if self._go is not None:
                    await self._go.wait()
                await endpoint.supervisor.serve(
                    endpoint.listening.listeners, connections=self._connections
                )
            finally:
                endpoint.listening.unlink()

    # -- one connection

    async def _accepted(
        self, endpoint: _Endpoint, socket: trio.SocketStream, connection: Connection
    ) -> None:
        active = endpoint.active
        name = active.config.name
        counters = self._metrics.of(name)
        counters.total.inc()
        self._open[name] += 1
        try:
            with counters.open.track_inprogress():
                await _Connection(
                    active, socket, counters, connection, endpoint.budget, self._readiness
                ).run()
        finally:
            self._open[name] -= 1


class _Connection:
    def __init__(
        self,
        active: _ActiveConfig,
        socket: trio.SocketStream,
        counters: TunnelCounters,
        connection: Connection,
        budget: Budget,
        readiness: Readiness,
    ) -> None:
        self._active = active
        self._config = active.config
        self._counters = counters
        self._connection = connection
        self._budget = budget
        self._readiness = readiness
        self._what = f"{active.config.name}: {connection.peer}"
        self._accepted = socket
        self._activity = Activity()
        self._out, self._back = _Sum(counters.out.inc), _Sum(counters.back.inc)
        self._sockets = [socket]
        """Everything that has been opened, closed at the end."""
        self._channel: SecureStream[Any] | None = None
        self._log: Callable[..., object] = partial(connection.served.log, logging.INFO)
        """The log for this connection, rate-limited until the client is known."""

    async def run(self) -> None:
        began = trio.current_time()
        out, back = self._out, self._back
        end = "cut: the tunnel is ending"  # if it is cancelled, alone or in a group
        try:
            with self._active.used():
                legs = await self._establish()
            await forward(
                *legs,
                out=out,
                back=back,
                idle_timeout=self._config.idle_timeout,
                readiness=self._readiness,
                activity=self._activity,
            )
            for leg in legs:
                set_reset(leg.socket, on_close=False)
                await leg.stream.aclose()
            self._sockets.clear()
            end = "closed"
        except _Rejected as refused:
            self._counters.refused(refused.kind)
            end = f"refused: {refused}"
            self._log = partial(self._connection.log.log, logging.WARNING)
        except ConnectionCut as cut:
            end = f"cut: {cut}"
        except Exception as error:
            end = f"cut: {refusal(error) or 'internal error'}"
            raise
        finally:
            if self._connection.evicted:
                end = "cut to make room for another connection"
            if end.startswith("cut"):
                self._counters.cut.inc()
            for socket in self._sockets:
                reset(socket)
            self._log(
                "%s %s; %d bytes out, %d back, %.1f s",
                self._what,
                end,
                out.sum,
                back.sum,
                trio.current_time() - began,
            )
            if self._channel is not None and self._sockets:  # It may be renewing its keys.
                await trio.aclose_forcefully(self._channel)

    def _admit(self, is_used: Callable[[], bool]) -> None:
        try:
            self._connection.admit(
                self._budget,
                is_used=is_used,
                silence=lambda: trio.current_time() - self._activity.at,
            )
        except TooManyConnections as error:
            raise _Rejected("limit", str(error)) from None

    async def _establish(self) -> tuple[Leg, Leg]:
        """Open both legs, near and far.

        A plain leg is reset unless it ends properly: TLS detects a truncation, but FIN, which the
        kernel sends for a killed process, would look like the end of the data.
        """
        channel = self._active.channel
        keep_alive(self._accepted)
        if isinstance(channel, ServerConfig):
            near = await self._secure(self._accepted, channel, None)
            stream = near.stream
            assert isinstance(stream, SecureStream)
            self._admit(lambda: stream.has_carried_data)
            far = await self._connect()
            set_reset(far, on_close=True)
            return near, Leg("the target", far, far)
        set_reset(self._accepted, on_close=True)
        self._admit(lambda: bool(self._out.sum or self._back.sum))
        far = await self._connect()
        return (
            Leg("the program", self._accepted, self._accepted),
            await self._secure(far, channel, self._config.expected_name),
        )

    async def _connect(self) -> trio.SocketStream:
        address, limit = self._config.forward, self._config.connect_timeout
        try:
            with trio.fail_after(limit):
                socket = await connect(address, bind=self._config.bind)
        except trio.TooSlowError:
            raise _Rejected(
                "upstream",
                f"no answer from {address} within {limit:g} s: check the address and the firewalls",
            ) from None
        except OSError as error:
            if is_scarce(error):  # for this process, not for the target
                raise
            raise _Rejected(
                "upstream", f"cannot connect to {address}: {no_connection(error)}"
            ) from None
        self._sockets.append(socket)
        keep_alive(socket)
        return socket

    async def _secure(
        self, socket: trio.SocketStream, channel: ClientConfig | ServerConfig, name: str | None
    ) -> Leg:
        stream = self._channel = SecureStream(
            socket,
            channel,
            server_hostname=name,
            handshake_timeout=self._config.handshake_timeout,
        )
        try:
            await stream.do_handshake()
        except trio.BrokenResourceError as error:
            self._counters.handshake_failed(error.__cause__)
            raise _Rejected("handshake", handshake_failed(error, channel)) from None
        session = stream.session
        self._counters.handshake(session)
        if self._config.allowed and not session.peer_is_one_of(self._config.allowed):
            raise _Rejected("name", f"{session.peer_subject} is not allowed")
        if isinstance(channel, ServerConfig) and session.peer_is_known:
            self._connection.recognize()
            self._log = partial(LOG.log, logging.INFO)
        self._log("%s open; %s", self._what, _described(session, as_json=self._config.json))
        return Leg("the channel", stream, socket)


class _Sum:
    """Counts for the metrics, and adds up for the log."""

    def __init__(self, count: Any) -> None:
        self._count = count
        self.sum = 0

    def __call__(self, amount: int) -> None:
        self.sum += amount
        self._count(amount)


def _described(session: Session, *, as_json: bool) -> str:
    if as_json:
        return json_line(session.as_json())
    return "; ".join(" ".join(line.split()) for line in str(session).splitlines())


def _try(call: Callable[[int], object], value: int) -> None:
    with contextlib.suppress(HybridkexError):
        call(value)


async def _shielded(call: Callable[[], Awaitable[object]]) -> None:
    with trio.CancelScope(shield=True):
        await call()
