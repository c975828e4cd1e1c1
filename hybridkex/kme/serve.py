"""KMEs as running servers: sockets, TLS, producers, metrics, orderly shutdown."""

import logging
import math
import os
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self, TypeAlias, cast

import trio

from hybridkex.crypto.x509_parsing import certificate_from_der
from hybridkex.errors import ConfigError, HybridkexError, KeySourceUnavailable
from hybridkex.kme.api import kme_handler
from hybridkex.kme.audit import AuditTrail, check_folder
from hybridkex.kme.config import KmeConfig, PeerConfig, PostgresUrl, ServeConfig
from hybridkex.kme.entity import KeyManagementEntity, LocalPeer
from hybridkex.kme.health import Pages
from hybridkex.kme.metrics import KmeMetrics
from hybridkex.kme.peering import MAX_ANSWER_BYTES, MAX_MESSAGE_BYTES, HttpPeer
from hybridkex.kme.settings import EntitySettings
from hybridkex.net.address import TcpAddress
from hybridkex.net.budget import Budget, Connection
from hybridkex.net.event_loop import in_thread
from hybridkex.net.http import http_supervisor, serve_connection
from hybridkex.net.listening import check_listening, open_shared_listeners, open_tcp_listeners
from hybridkex.net.supervisor import Supervisor
from hybridkex.qkd import sqlite_store
from hybridkex.qkd.etsi014.mutual_tls import TlsHandshake, client_tls, server_tls
from hybridkex.qkd.etsi014.naming import (
    IdRule,
    id_of_certificate,
    own_certificate,
    problem_of_name,
)
from hybridkex.qkd.etsi014.transport import KmeTransport
from hybridkex.qkd.producer import KeyProducer, RandomProducer, random_link
from hybridkex.qkd.sqlite_store import SqliteKeyStore
from hybridkex.qkd.store import KeyStore, Seal, read_key_file
from hybridkex.secret import Secret
from hybridkex.shell.expiry_watch import ExpiryWatch
from hybridkex.text import get_logger

if TYPE_CHECKING:
    from hybridkex.kme.link_feed import PairFeed, PartyFeed
    from hybridkex.link.authentication import Signatures

LOG: Final = get_logger(__name__)

CLOSE_SECONDS: Final = 1.0

Renewal: TypeAlias = Callable[[], None]
"""Puts new keys of a QKD link in force."""


@dataclass(frozen=True, kw_only=True)
class Serving:
    """The addresses on which a server listens, with the actual ports."""

    kmes: Mapping[str, TcpAddress]
    metrics: TcpAddress | None


async def check_config(config: ServeConfig) -> None:
    """Check what a server needs, without serving: a running one is not disturbed.

    Reads certificates and key files. An audit trail and a store in a file must have a folder that
    can be written to. A store that exists must be a key store that opens under the key files, and
    a database must be reachable and this KME's. The addresses must be this machine's, each for one
    purpose, and QKD links must be possible. Nothing is created. Blocks.

    Raises:
        ConfigError: what :class:`KmeServer` could not use.
    """
    addresses = [one.listen for one in config.kme]
    addresses += [config.metrics] if config.metrics is not None else []
    for link in (peer.link for one in config.kme for peer in one.peer):
        addresses += [link.address] if link.party == "alice" and link.address is not None else []
    try:
        await check_listening(addresses)
    except OSError as error:
        raise ConfigError(f"cannot listen on {error.filename}: {error.strerror}") from error
    stores = [one.store.resolve() for one in config.kme if isinstance(one.store, Path)]
    if len(set(stores)) != len(stores):
        raise ConfigError("two KMEs have the same store")
    for one in config.kme:
        _Settings.of(one)
        for peer in one.peer:
            if peer.producer == "link":
                _link_feed(one, peer, KmeMetrics())
        _entity_settings(one)
        seal_key, *read_keys = _seal_keys(one)
        if one.audit is not None:
            check_folder(one.audit)
        if not isinstance(one.store, PostgresUrl):
            if not os.access(one.store.parent, os.W_OK | os.X_OK):
                raise ConfigError(f"{one.id}: files cannot be created in {one.store.parent}")
            sqlite_store.check_store(one.store, Seal(seal_key, *read_keys))
            continue
        from hybridkex.qkd.postgres_store import check_store  # noqa: PLC0415  # an extra

        check_store(one.store.url, Seal(seal_key, *read_keys), owner=one.id)


class KmeServer:
    """The KMEs of one configuration.

    The constructor opens the stores and reads the certificates; it raises ``ConfigError``.
    """

    def __init__(self, config: ServeConfig) -> None:
        self._config = config
        self.metrics: Final = KmeMetrics()
        self._closing = trio.Event()
        self._stores: dict[str, KeyStore] = {}
        self._trails: list[AuditTrail] = []
        self._seal_keys: dict[str, list[Secret]] = {}
        self._kmes: dict[str, KeyManagementEntity] = {}
        self._settings: dict[str, _Settings] = {}
        self._remote_links: dict[tuple[str, str], PartyFeed] = {}
        self._background: trio.Nursery | None = None
        try:
            for one in config.kme:
                self._kmes[one.id] = self._make(one)
                self._settings[one.id] = _Settings.of(one)
        except ConfigError:
            for store in self._stores.values():
                store.close()
            for trail in self._trails:
                trail.close()
            raise

    def _make(self, config: KmeConfig) -> KeyManagementEntity:
        keys = self._seal_keys[config.id] = _seal_keys(config)
        store = _store(config, keys, self.metrics.store_failures.labels(config.id).inc)
        self._stores[config.id] = store
        audit = None
        if config.audit is not None:
            audit = AuditTrail(config.audit, config.id)
            self._trails.append(audit)
        kme = KeyManagementEntity(
            _entity_settings(config), store=store, metrics=self.metrics, audit=audit
        )
        if config.read_key_files:
            kme.renew_soon()
        return kme

    def close(self) -> None:
        """Begin an orderly shutdown: no new connections; requests in progress are answered."""
        self._closing.set()

    async def reload(self, load: Callable[[], ServeConfig]) -> None:
        """Apply a new configuration, completely or not at all.

        Certificates, authorities and key files are read again, those of QKD links for their next
        sessions; SAEs, limits, timeouts and the URLs of peers may change, for new requests and
        connections. Open connections stay. Files are read
        in a thread, so that an unresponsive file system delays nothing else.

        Args:
            load: reads the configuration; called in a thread.

        Raises:
            ConfigError: the configuration cannot be used, or changes what needs a restart; nothing
                has changed, except the sealing keys that the message names.
        """
        config, settings, seal_keys, renewals = await in_thread(self._prepared, load, abandon=True)
        changed: list[str] = []
        for kme_id, keys in seal_keys.items():
            if keys != self._seal_keys[kme_id]:
                await self._change_keys(kme_id, keys, changed)
                changed.append(kme_id)
        # Nothing below can fail.
        for kme_id, fresh in settings.items():
            live, kme = self._settings[kme_id], self._kmes[kme_id]
            for link in live.links.values():
                self._retire(link, live.config.peer_timeout)
            live.config, live.handshake, live.links = fresh.config, fresh.handshake, fresh.links
            live.expiry = fresh.expiry
            live.resize()
            kme.change(_entity_settings(fresh.config))
            for peer_id, link in fresh.links.items():
                kme.connect(peer_id, link)
        for renew in renewals:
            renew()
        self._config = config

    async def _change_keys(self, kme_id: str, keys: list[Secret], changed: list[str]) -> None:
        try:
            await self._stores[kme_id].change_keys(keys[0], keys[1:])
        except (ConfigError, KeySourceUnavailable) as error:
            names = ", ".join(changed)
            kept = f"; the new key_file of {names} is in use: keep the file" if changed else ""
            raise ConfigError(f"{kme_id}: {error}{kept}") from error
        self._seal_keys[kme_id] = keys
        if len(keys) > 1:
            self._kmes[kme_id].renew_soon()

    def _prepared(
        self, load: Callable[[], ServeConfig]
    ) -> "tuple[ServeConfig, dict[str, _Settings], dict[str, list[Secret]], list[Renewal]]":
        """Prepare a new configuration so that applying it cannot fail. Blocks. Raises
        ``ConfigError``."""
        config = load()
        new = {one.id: one for one in config.kme}
        if new.keys() != self._kmes.keys() or config.metrics != self._config.metrics:
            raise ConfigError("other KMEs or another address of the metrics need a restart")
        settings: dict[str, _Settings] = {}
        for kme_id, one in new.items():
            old = self._settings[kme_id].config
            for name, before, after in _fixed(old, one):
                if before != after:
                    raise ConfigError(f"{kme_id}: another {name} needs a restart")
            _entity_settings(one)
            settings[kme_id] = _Settings.of(one)
        renewals: list[Renewal] = [
            partial(self._remote_links[one.id, peer.id].renew, _link_signatures(one, peer))
            for one in config.kme
            for peer in one.peer
            if (one.id, peer.id) in self._remote_links
        ]
        return config, settings, {one.id: _seal_keys(one) for one in config.kme}, renewals

    def _retire(self, link: HttpPeer, seconds: float) -> None:
        """Close a link to a peer once its last request has been answered or abandoned."""

        async def close() -> None:
            try:
                await trio.sleep(seconds + CLOSE_SECONDS)
            finally:
                with trio.CancelScope(shield=True):
                    await link.aclose()

        if self._background is not None:
            self._background.start_soon(close)

    async def serve(
        self, *, task_status: trio.TaskStatus[Serving] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Serve until :meth:`close`; the started value is a :class:`Serving`. Raises
        ``ConfigError``."""
        async with AsyncExitStack() as stack:
            for store in self._stores.values():
                stack.push_async_callback(store.aclose)
            for trail in self._trails:
                stack.callback(trail.close)
            stack.push_async_callback(self._close_links)
            for one in self._config.kme:
                self._connect_peers(one)
            producers, links = self._producers()
            ports = [await self._kme_port(one, stack) for one in self._settings.values()]
            addresses = {
                one.id: _address(port.listeners[0])
                for one, port in zip(self._config.kme, ports, strict=True)
            }
            metrics = None
            if self._config.metrics is not None:
                ports.append(await self._metrics_port(self._config.metrics, stack))
                metrics = _address(ports[-1].listeners[0])
            # Three nurseries, ended from the inside out: no new connections, then no open ones,
            # then no more keys.
            async with trio.open_nursery() as background:
                self._background = background
                for one in self._config.kme:
                    background.start_soon(self._kmes[one.id].maintain)
                background.start_soon(self._watch_certificates)
                for link in links:
                    background.start_soon(_keep_running, link)
                settled = self._settle_local_links(background)
                for kme_id, target, producer, shared in producers:
                    begin = settled.get(frozenset({kme_id, target}))
                    kme = self._kmes[kme_id]
                    background.start_soon(self._feed, kme, target, producer, shared, begin)
                async with trio.open_nursery() as connections:
                    async with trio.open_nursery() as accepting:
                        for port in ports:
                            accepting.start_soon(port.serve, connections)
                        task_status.started(Serving(kmes=addresses, metrics=metrics))
                        await self._closing.wait()
                        accepting.cancel_scope.cancel()
                    connections.cancel_scope.deadline = trio.current_time() + self._config.grace
                background.cancel_scope.cancel()

    async def _watch_certificates(self) -> None:
        while True:
            seconds = min(one.expiry.check() for one in self._settings.values())
            await trio.sleep(seconds)

    # -- links

    def _connect_peers(self, config: KmeConfig) -> None:
        kme = self._kmes[config.id]
        for peer in config.peer:
            if peer.url is None:
                local = LocalPeer(own_id=config.id, other=self._kmes[peer.id])
                kme.connect(peer.id, local, compared=True)
        for peer_id, link in self._settings[config.id].links.items():
            kme.connect(peer_id, link)

    async def _close_links(self) -> None:
        for settings in self._settings.values():
            for link in settings.links.values():
                await link.aclose()

    def _producers(
        self,
    ) -> tuple[list[tuple[str, str, KeyProducer, bool]], list[Callable[[], Awaitable[None]]]]:
        """The producer of each link of each KME, and whether the other end gets the same keys.

        Also returns the links that must run for them.
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
                        continue  # both ends are created at the same time
                    feed = _link_feed(config, peer, self.metrics)
                    links.append(feed.run)
                    found.append((config.id, peer.id, feed.ends[0], True))
                    if peer.url is None:
                        found.append((peer.id, config.id, feed.ends[1], True))
                    else:
                        self._remote_links[config.id, peer.id] = cast("PartyFeed", feed)
                elif peer.url is not None:
                    # The other end makes its own keys; ours reach it by value.
                    found.append((config.id, peer.id, RandomProducer(key_bits=size), False))
                elif config.id < peer.id:
                    here, there = random_link(size)
                    found.append((config.id, peer.id, here, True))
                    found.append((peer.id, config.id, there, True))
        return found, links

    def _settle_local_links(self, nursery: trio.Nursery) -> dict[frozenset[str], trio.Event]:
        """Compare the stores of each two KMEs in this process. The events tell when it is done."""
        links = {
            frozenset({one.id, peer.id}): trio.Event()
            for one in self._config.kme
            for peer in one.peer
            if peer.url is None
        }
        for ends, done in links.items():
            one, other = sorted(ends)
            nursery.start_soon(self._settle, one, other, done)
        return links

    async def _settle(self, one: str, other: str, done: trio.Event) -> None:
        """Erase the blocks that one of two stores has alone.

        Neither gets new ones from this process before. If no other process has them, a block that
        one lacks will never arrive, however young it is.
        """
        stores = (self._stores[one], self._stores[other])
        alone = all(isinstance(store, SqliteKeyStore) for store in stores)
        for here, there in ((one, other), (other, one)):
            kme = self._kmes[here]
            with suppress(KeySourceUnavailable):  # the store logs it
                await kme.reconcile(there, grace=0 if alone else kme.limits.sync_grace)
        done.set()

    @staticmethod
    async def _feed(
        kme: KeyManagementEntity,
        target: str,
        producer: KeyProducer,
        shared: bool,
        begin: trio.Event | None,
    ) -> None:
        if begin is not None:
            await begin.wait()
        try:
            await kme.feed(target, producer, shared=shared)
        except HybridkexError as error:
            LOG.error("%s: no more keys for %s: %s", kme.kme_id, target, error)  # noqa: TRY400
        else:
            LOG.warning("%s: the producer for %s has ended", kme.kme_id, target)

    # -- sockets

    async def _kme_port(self, settings: "_Settings", stack: AsyncExitStack) -> "_Port":
        kme_id = settings.config.id
        kme = self._kmes[kme_id]
        rejected = self.metrics.rejected

        async def handle(stream: trio.SocketStream, connection: Connection) -> None:
            config = settings.config
            secure, certificate = await settings.handshake(stream, "")
            caller = id_of_certificate(certificate, config.id_rule)
            if caller is None:
                # Clause 5.1: without an SAE ID from the certificate, no connection.
                rejected.labels(kme_id, "no ID").inc()
                kme.log.log(
                    logging.WARNING,
                    "%s: a certificate of our authority has no ID by id_rule (%s), or one with "
                    "invisible characters: its connection was closed",
                    kme_id,
                    config.id_rule.value,
                )
                await trio.aclose_forcefully(secure)
                return
            of_a_peer = caller in kme.settings.peers
            if of_a_peer or caller in config.saes:
                who = f"the {'KME' if of_a_peer else 'SAE'} {caller}"
                settings.expiry.watch_peer(who, certificate_from_der(certificate))
                connection.recognize()
            connection.admit(settings.of_peers if of_a_peer else settings.of_saes, caller)
            # The HTTP limits must fit what a KME announces, to SAEs and between KMEs.
            needed = MAX_MESSAGE_BYTES if of_a_peer else kme.limits.request_bytes
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
            name=kme_id,
            logger=LOG,
            handshakes=settings.config.max_handshakes,
            handshake_seconds=settings.config.handshake_timeout,
            on_failure=lambda kind: rejected.labels(kme_id, kind).inc(),
        )
        config = settings.config
        return await _opened(config.listen, supervisor, stack, shared=config.reuse_port)

    async def _metrics_port(self, address: TcpAddress, stack: AsyncExitStack) -> "_Port":
        pages = Pages(self._kmes, self.metrics, self._closing.is_set)
        supervisor = http_supervisor(pages.handle, "metrics", LOG, closing=self._closing)
        return await _opened(address, supervisor, stack)


@dataclass(kw_only=True)
class _Settings:
    """The settings of a KME in force that a new configuration may change."""

    config: KmeConfig
    handshake: TlsHandshake
    links: dict[str, HttpPeer]
    """Links to peers in other processes."""
    expiry: ExpiryWatch
    """The watch over our own certificate and those of our SAEs and peers."""
    of_saes: Budget
    of_peers: Budget

    @classmethod
    def of(cls, config: KmeConfig) -> Self:
        """Read the certificates and build the settings. Raises ``ConfigError``."""
        files = {"ca": config.ca, "certificate": config.certificate, "key": config.key}
        handshake = server_tls(config.tls, **files)
        expiry = ExpiryWatch(lambda text: LOG.warning("%s: %s", config.id, text))
        links = {}
        for peer in config.peer:
            if peer.url is not None:
                transport = KmeTransport(
                    peer.url,
                    client_tls(config.tls, **files),
                    _confirms(peer.id, config.id_rule, expiry),
                    max_answer=MAX_ANSWER_BYTES,
                )
                links[peer.id] = HttpPeer(transport, config.peer_timeout)
        own = own_certificate(config.certificate)
        if own is not None:
            problem = problem_of_name(config.certificate, own, config.id, config.id_rule)
            if problem is not None:
                LOG.warning("%s: %s", config.id, problem)
            expiry.watch_own(config.certificate, own)
        made = cls(
            config=config,
            handshake=handshake,
            links=links,
            expiry=expiry,
            # Between its requests a connection waits; while one is answered it is not idle.
            of_saes=Budget(0, idle=math.inf),
            of_peers=Budget(0, what="peer connections", idle=math.inf),
        )
        made.resize()
        return made

    def resize(self) -> None:
        self.of_saes.total = self.config.max_connections
        self.of_saes.each = self.config.max_sae_connections
        self.of_peers.total = self.config.max_peer_connections


def _link_feed(config: KmeConfig, peer: PeerConfig, metrics: KmeMetrics) -> "PairFeed | PartyFeed":
    from hybridkex.kme.link_feed import link_feed  # noqa: PLC0415  # an extra

    return link_feed(config, peer, metrics)


def _link_signatures(config: KmeConfig, peer: PeerConfig) -> "Signatures":
    from hybridkex.kme.link_feed import link_signatures  # noqa: PLC0415  # an extra

    return link_signatures(config, peer)


def _seal_keys(config: KmeConfig) -> list[Secret]:
    return [read_key_file(path) for path in (config.key_file, *config.read_key_files)]


def _store(config: KmeConfig, keys: Sequence[Secret], on_failure: Callable[[], object]) -> KeyStore:
    seal_key, *read_keys = keys
    if not isinstance(config.store, PostgresUrl):
        return SqliteKeyStore(config.store, seal_key, read_keys=read_keys, on_failure=on_failure)
    from hybridkex.qkd.postgres_store import PostgresKeyStore  # noqa: PLC0415  # an extra

    return PostgresKeyStore(
        config.store.url, seal_key, owner=config.id, read_keys=read_keys, on_failure=on_failure
    )


def _entity_settings(config: KmeConfig) -> EntitySettings:
    """Raises ``ConfigError``."""
    return EntitySettings(
        id=config.id,
        saes=frozenset(config.saes),
        peers={peer.id: frozenset(peer.saes) for peer in config.peer},
        limits=config.limits,
        self_pairs=config.self_pairs,
        not_found_status=config.not_found_status,
    )


def _fixed(old: KmeConfig, new: KmeConfig) -> Iterator[tuple[str, object, object]]:
    """The settings that a running KME cannot change: name, current and new value."""
    for name in (
        "listen",
        "reuse_port",
        "store",
        "audit",
        "self_pairs",
        "max_handshakes",
        "handshake_timeout",
    ):
        yield name, getattr(old, name), getattr(new, name)
    yield "key_size", old.limits.key_size, new.limits.key_size
    for what, of in (
        ("set of peers", lambda peer: peer.url is None),
        ("producer", lambda peer: peer.producer),
    ):
        yield what, {one.id: of(one) for one in old.peer}, {one.id: of(one) for one in new.peer}
    links = {peer.id: peer.link for peer in old.peer}
    for peer in new.peer:
        for one in fields(peer.link):
            name = f"{one.name} in the link table of {peer.id}"
            yield name, getattr(links[peer.id], one.name), getattr(peer.link, one.name)


@dataclass(frozen=True, kw_only=True)
class _Port:
    listeners: list[trio.SocketListener]
    supervisor: Supervisor[trio.SocketStream]

    async def serve(self, connections: trio.Nursery) -> None:
        await self.supervisor.serve(self.listeners, connections=connections)


async def _opened(
    address: TcpAddress,
    supervisor: Supervisor[trio.SocketStream],
    stack: AsyncExitStack,
    *,
    shared: bool = False,
) -> _Port:
    open_listeners = open_shared_listeners if shared else open_tcp_listeners
    try:
        listeners = await open_listeners(address.port, host=address.host)
    except OSError as error:
        raise ConfigError(f"cannot listen on {address}: {error.strerror}") from error
    for listener in listeners:
        stack.push_async_callback(listener.aclose)
    return _Port(listeners=listeners, supervisor=supervisor)


async def _keep_running(link: Callable[[], Awaitable[None]]) -> None:
    """Run a QKD link; its failure ends only this link."""
    try:
        await link()
    except Exception:
        LOG.exception("a QKD link has ended with an internal error")


def _address(listener: trio.SocketListener) -> TcpAddress:
    host, port, *_ = listener.socket.getsockname()
    return TcpAddress(host, port)


def _confirms(kme_id: str, rule: IdRule, expiry: ExpiryWatch) -> Callable[[bytes], None]:
    def check(certificate: bytes) -> None:
        found = id_of_certificate(certificate, rule)
        if found != kme_id:
            raise KeySourceUnavailable(
                f"its certificate names {found}; check the url and the KME at that address"
            )
        expiry.watch_peer(f"the KME {kme_id}", certificate_from_der(certificate))

    return check
