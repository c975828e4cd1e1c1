"""KMEs as running servers: sockets, TLS, producers, metrics, an orderly end."""

from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, replace
from typing import Final

import trio

from hybridkex.errors import ConfigError, HybridkexError, KeySourceUnavailable
from hybridkex.kme.api import kme_handler
from hybridkex.kme.config import Address, KmeConfig, ServeConfig
from hybridkex.kme.delivery import Kme
from hybridkex.kme.metrics import KmeMetrics
from hybridkex.kme.peering import MAX_MESSAGE_BYTES, HttpPeer, LocalPeer
from hybridkex.net.http import http_supervisor, serve_connection
from hybridkex.net.supervisor import Budget, Connection, Supervisor
from hybridkex.qkd.etsi014.hop import client_hop, server_hop
from hybridkex.qkd.etsi014.naming import IdRule, id_of_certificate, problems_of_certificate
from hybridkex.qkd.etsi014.transport import KmeTransport
from hybridkex.qkd.producer import KeyProducer, RandomProducer, random_link
from hybridkex.qkd.store import KeyStore, read_key_file
from hybridkex.text import get_logger

__all__ = ["KmeServer", "Serving"]

LOG: Final = get_logger(__name__)

CLOSE_SECONDS: Final = 1.0


@dataclass(frozen=True, kw_only=True)
class Serving:
    """Where a server listens, ports filled in."""

    kmes: Mapping[str, Address]
    metrics: Address | None


class KmeServer:
    """The KMEs of one configuration.

    Opens the stores and reads the certificates when it is made; raises ``ConfigError``.
    """

    def __init__(self, config: ServeConfig) -> None:
        self._config = config
        self.metrics: Final = KmeMetrics()
        self._closing = trio.Event()
        self._stores: dict[str, KeyStore] = {}
        self._kmes: dict[str, Kme] = {}
        try:
            for one in config.kme:
                self._kmes[one.id] = self._make(one)
        except ConfigError:
            for store in self._stores.values():
                store.close()
            raise

    def _make(self, config: KmeConfig) -> Kme:
        for problem in problems_of_certificate(config.certificate, config.id, config.id_rule):
            LOG.warning("%s: %s", config.id, problem)
        store = KeyStore(
            config.store,
            read_key_file(config.key_file),
            on_failure=self.metrics.store_failures.labels(config.id).inc,
        )
        self._stores[config.id] = store
        return Kme(
            config.id,
            saes=frozenset(config.saes),
            peers={peer.id: frozenset(peer.saes) for peer in config.peer},
            store=store,
            limits=config.limits,
            metrics=self.metrics,
            self_pairs=config.self_pairs,
            not_found_status=config.not_found_status,
        )

    def close(self) -> None:
        """Begin an orderly end: no new connections, requests under way are answered."""
        self._closing.set()

    async def serve(
        self, *, task_status: trio.TaskStatus[Serving] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Serve until :meth:`close`; the started value says where. Raises ``ConfigError``."""
        async with AsyncExitStack() as stack:
            for store in self._stores.values():
                stack.push_async_callback(store.aclose)
            for one in self._config.kme:
                await self._connect_peers(one, stack)
            for one in self._config.kme:
                for peer in one.peer:
                    if peer.url is None:
                        # Both stores are ours and at rest: what one of them lacks, it never gets.
                        with suppress(KeySourceUnavailable):  # the store says so itself
                            await self._kmes[one.id].reconcile(peer.id, grace=0)
            producers, links = self._producers()
            ports = [await self._kme_port(one, stack) for one in self._config.kme]
            addresses = {
                one.id: _address(port.listeners[0])
                for one, port in zip(self._config.kme, ports, strict=True)
            }
            metrics = None
            if self._config.metrics is not None:
                ports.append(await self._metrics_port(self._config.metrics, stack))
                metrics = _address(ports[-1].listeners[0])
            # Three nurseries, ended from the inside out: no new connections, then no old ones,
            # then no more keys.
            async with trio.open_nursery() as background:
                for one in self._config.kme:
                    background.start_soon(self._kmes[one.id].maintain)
                for link in links:
                    background.start_soon(_keep_running, link)
                for kme_id, target, producer, shared in producers:
                    background.start_soon(self._feed, self._kmes[kme_id], target, producer, shared)
                async with trio.open_nursery() as connections:
                    async with trio.open_nursery() as accepting:
                        for port in ports:
                            accepting.start_soon(port.serve, connections)
                        task_status.started(Serving(kmes=addresses, metrics=metrics))
                        await self._closing.wait()
                        accepting.cancel_scope.cancel()
                    connections.cancel_scope.deadline = trio.current_time() + self._config.grace
                background.cancel_scope.cancel()

    # -- links

    async def _connect_peers(self, config: KmeConfig, stack: AsyncExitStack) -> None:
        kme = self._kmes[config.id]
        for peer in config.peer:
            if peer.url is None:
                kme.connect(peer.id, LocalPeer(own_id=config.id, other=self._kmes[peer.id]))
                continue
            hop = client_hop(
                config.tls, ca=config.ca, certificate=config.certificate, key=config.key
            )
            # A refusal names every block of the message, with its state.
            transport = KmeTransport(
                hop, _confirms(peer.id, config.id_rule), max_answer=2 * MAX_MESSAGE_BYTES
            )
            link = HttpPeer(peer.url, transport, config.peer_timeout)
            stack.push_async_callback(link.aclose)
            kme.connect(peer.id, link)

    def _producers(
        self,
    ) -> tuple[list[tuple[str, str, KeyProducer, bool]], list[Callable[[], Awaitable[None]]]]:
        """What feeds which KME for which link, and whether the other end is fed the same.

        Also the links that must run for it.
        """
        found: list[tuple[str, str, KeyProducer, bool]] = []
        links: list[Callable[[], Awaitable[None]]] = []
        for config in self._config.kme:
            size = config.limits.key_size
            if config.self_pairs:
                found.append((config.id, config.id, RandomProducer(key_bits=size), False))
            for peer in config.peer:
                if peer.producer == "link":
                    if peer.url is None and config.id > peer.id:
                        continue  # the two ends are made at once
                    from hybridkex.kme.link_feed import link_feed  # noqa: PLC0415  # an extra

                    feed = link_feed(config, peer, self.metrics)
                    links.append(feed.run)
                    found.append((config.id, peer.id, feed.ends[0], True))
                    if peer.url is None:
                        found.append((peer.id, config.id, feed.ends[1], True))
                elif peer.url is not None:
                    # The other end makes keys of its own; ours reach it by value.
                    found.append((config.id, peer.id, RandomProducer(key_bits=size), False))
                elif config.id < peer.id:
                    here, there = random_link(size)
                    found.append((config.id, peer.id, here, True))
                    found.append((peer.id, config.id, there, True))
        return found, links

    @staticmethod
    async def _feed(kme: Kme, target: str, producer: KeyProducer, shared: bool) -> None:
        try:
            await kme.feed(target, producer, shared=shared)
        except HybridkexError as error:
            LOG.error("%s: no more keys for %s: %s", kme.kme_id, target, error)  # noqa: TRY400
        else:
            LOG.warning("%s: the producer for %s has ended", kme.kme_id, target)

    # -- sockets

    async def _kme_port(self, config: KmeConfig, stack: AsyncExitStack) -> "_Port":
        hop = server_hop(config.tls, ca=config.ca, certificate=config.certificate, key=config.key)
        peers = frozenset(peer.id for peer in config.peer)
        of_peers = Budget(config.max_peer_connections, what="peer connections")
        of_saes = Budget(config.max_connections, each=config.max_sae_connections)
        rejected = self.metrics.rejected

        async def handle(stream: trio.SocketStream, connection: Connection) -> None:
            secure, certificate = await hop(stream, "")
            caller = id_of_certificate(certificate, config.id_rule)
            if caller is None:
                # Clause 5.1: without an SAE ID from the certificate, no connection.
                rejected.labels(config.id, "no ID").inc()
                await trio.aclose_forcefully(secure)
                return
            connection.admit(of_peers if caller in peers else of_saes, caller)
            kme = self._kmes[config.id]
            # What a KME announces must also get through: to its SAEs, and between KMEs.
            needed = MAX_MESSAGE_BYTES if caller in peers else kme.limits.request_bytes
            limits = replace(config.http, max_body=max(config.http.max_body, needed))
            try:
                await serve_connection(
                    secure,
                    kme_handler(kme, caller, self.metrics),
                    limits,
                    self._closing,
                    connection.waiting,
                )
            finally:
                with trio.move_on_after(CLOSE_SECONDS, shield=True):
                    await secure.aclose()

        supervisor = Supervisor(
            handle,
            name=config.id,
            logger=LOG,
            handshakes=config.max_handshakes,
            handshake_seconds=config.handshake_timeout,
            on_failure=lambda kind: rejected.labels(config.id, kind).inc(),
        )
        return await _opened(config.listen, supervisor, stack)

    async def _metrics_port(self, address: Address, stack: AsyncExitStack) -> "_Port":
        supervisor = http_supervisor(self.metrics.handle, "metrics", LOG, closing=self._closing)
        return await _opened(address, supervisor, stack)


@dataclass(frozen=True, kw_only=True)
class _Port:
    """Listening sockets and the supervisor of their connections."""

    listeners: list[trio.SocketListener]
    supervisor: Supervisor[trio.SocketStream]

    async def serve(self, connections: trio.Nursery) -> None:
        await self.supervisor.serve(self.listeners, connections=connections)


async def _opened(
    address: Address, supervisor: Supervisor[trio.SocketStream], stack: AsyncExitStack
) -> _Port:
    try:
        listeners = await trio.open_tcp_listeners(address.port, host=address.host)
    except OSError as error:
        raise ConfigError(f"cannot listen on {address}: {error.strerror}") from error
    for listener in listeners:
        stack.push_async_callback(listener.aclose)
    return _Port(listeners=listeners, supervisor=supervisor)


async def _keep_running(link: Callable[[], Awaitable[None]]) -> None:
    """Run a QKD link; a fault of its own ends it and nothing else."""
    try:
        await link()
    except Exception:
        LOG.exception("a QKD link has ended with an internal error")


def _address(listener: trio.SocketListener) -> Address:
    host, port, *_ = listener.socket.getsockname()
    return Address(host, port)


def _confirms(kme_id: str, rule: IdRule) -> Callable[[bytes], None]:
    def check(certificate: bytes) -> None:
        found = id_of_certificate(certificate, rule)
        if found != kme_id:
            raise KeySourceUnavailable(
                f"its certificate is that of {found}; check the url, and which KME is there"
            )

    return check
