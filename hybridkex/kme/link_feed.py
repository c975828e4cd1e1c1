"""The link as what feeds KMEs: see :mod:`hybridkex.qkd.producer`.

Either both parties run here and feed two KMEs of one process, or one party runs here and reaches
the other over TCP: two connections, which begin with ``C`` for the classical and ``Q`` for the
quantum channel. The first block of such a link is authenticated with the keys of the KMEs'
certificates. (A shared secret would be used again after a restart, and a one-time pad must not be.)
"""

import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

import trio
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from hybridkex.errors import (
    BlockAborted,
    ConfigError,
    LedgerDry,
    LinkAuthenticationError,
    LinkError,
)
from hybridkex.kme.config import Address, KmeConfig, PeerConfig
from hybridkex.kme.metrics import KmeMetrics
from hybridkex.link.authentication import Signatures
from hybridkex.link.optimise import tuned
from hybridkex.link.party import Alice, Block, Bob
from hybridkex.link.presets import preset
from hybridkex.link.quantum import Fibre
from hybridkex.link.remote import RemoteDetector, serve_detector
from hybridkex.link.settings import LinkSettings
from hybridkex.link.simulated import SimulatedLink
from hybridkex.qkd.producer import ProducedKey

__all__ = ["LinkEnd", "PairFeed", "PartyFeed", "link_feed"]

LOG: Final = logging.getLogger(__name__)

BATCH: Final = 64
"""Keys handed over at a time, so that a large block does not need room for all of its keys."""
PAUSE: Final = 1.0
"""Seconds before the next try, after a block that was given up or a connection that broke."""
GREETING_SECONDS: Final = 10.0

Note = Callable[[Block | BlockAborted], None]


class LinkEnd:
    """One end of a link as a key producer."""

    def __init__(self) -> None:
        self._put, self._take = trio.open_memory_channel[list[ProducedKey]](1)
        self._failure: LinkError | None = None

    def __aiter__(self) -> "LinkEnd":
        return self

    async def __anext__(self) -> list[ProducedKey]:
        try:
            return await self._take.receive()
        except trio.EndOfChannel:
            if self._failure is not None:
                raise self._failure from None
            raise StopAsyncIteration from None

    async def put(self, keys: list[ProducedKey]) -> None:
        """Hand keys over, and wait while the KME is full."""
        await self._put.send(keys)

    def end(self, failure: LinkError | None) -> None:
        """No more keys."""
        self._failure = failure
        self._put.close()


def _batches(keys: tuple[ProducedKey, ...]) -> Iterable[slice]:
    return (slice(start, start + BATCH) for start in range(0, len(keys), BATCH))


class PairFeed:
    """Both ends of a link within one process."""

    def __init__(self, link: SimulatedLink) -> None:
        self.ends: Final[tuple[LinkEnd, ...]] = (LinkEnd(), LinkEnd())
        self._link = link

    async def run(self) -> None:
        """Make keys until cancelled, or until the link is over."""
        failure: LinkError | None = None
        try:
            async with self._link.open():
                while True:
                    try:
                        blocks = await self._link.block()
                    except BlockAborted as error:
                        LOG.warning("QKD link: a block was given up: %s", error)
                        await trio.sleep(PAUSE)
                        continue
                    for part in _batches(blocks[0].keys):
                        for end, block in zip(self.ends, blocks, strict=True):
                            await end.put(list(block.keys[part]))
        except LinkError as error:
            failure = error
        finally:
            for end in self.ends:
                end.end(failure)


class PartyFeed:
    """One end of a link whose other end is in another process."""

    def __init__(
        self,
        settings: LinkSettings,
        *,
        party: str,
        address: Address,
        signatures: Signatures,
        real_time: bool,
        note: Note,
    ) -> None:
        self.ends: Final[tuple[LinkEnd, ...]] = (LinkEnd(),)
        self._settings = settings
        self._party = party
        self._address = address
        self._signatures = signatures
        self._real_time = real_time
        self._note = note

    async def run(self) -> None:
        """Make keys until cancelled, or until the link must not go on.

        A connection that breaks is made again: a new session, authenticated from the start.
        """
        failure: LinkError | None = None
        try:
            if self._party == "alice":
                await self._run_alice()
            else:
                while True:
                    await self._session(await self._reach(b"C"), await self._reach(b"Q"))
        except LinkError as error:
            failure = error
        finally:
            self.ends[0].end(failure)

    async def _run_alice(self) -> None:
        host, port = self._address.host, self._address.port
        try:
            listeners = await trio.open_tcp_listeners(port, host=host)
        except OSError as error:
            raise LinkError(f"the link cannot listen on {self._address}: {error}") from None
        try:
            while True:
                streams: dict[bytes, trio.SocketStream] = {}
                while len(streams) < 2:
                    stream = await listeners[0].accept()
                    kind = b""
                    with trio.move_on_after(GREETING_SECONDS):
                        kind = await stream.receive_some(1)
                    old = streams.pop(kind, None)
                    if kind in (b"C", b"Q"):
                        streams[kind], stream = stream, old or stream
                    if stream not in streams.values():
                        await trio.aclose_forcefully(stream)
                await self._session(streams[b"C"], streams[b"Q"])
        finally:
            for listener in listeners:
                await listener.aclose()

    async def _reach(self, kind: bytes) -> trio.SocketStream:
        while True:
            try:
                stream = await trio.open_tcp_stream(self._address.host, self._address.port)
                await stream.send_all(kind)
            except (OSError, trio.BrokenResourceError):
                await trio.sleep(PAUSE)
            else:
                return stream

    async def _session(self, classical: trio.SocketStream, quantum: trio.SocketStream) -> None:
        """Blocks, until the connection breaks. Raises ``LinkError`` when that is the end."""
        made = 0
        try:
            async with classical, quantum, trio.open_nursery() as nursery:
                party = self._make(classical, quantum, nursery)
                try:
                    while True:
                        made += await self._block(party)
                finally:
                    nursery.cancel_scope.cancel()
        except* LinkError as group:
            error = _first(group)
            final = isinstance(error, LedgerDry | LinkAuthenticationError) and made > 0
            if final:
                raise error from None
            LOG.warning("QKD link: %s; a new session begins", error)
            await trio.sleep(PAUSE)

    def _make(
        self, classical: trio.SocketStream, quantum: trio.SocketStream, nursery: trio.Nursery
    ) -> Alice | Bob:
        if self._party == "bob":
            detector = RemoteDetector(quantum)
            return Bob(classical, self._settings, detector, bootstrap=self._signatures)
        chosen = self._settings.preset
        fibre = Fibre(chosen.channel, chosen.transmitter, real_time=self._real_time)

        async def shine() -> None:
            await serve_detector(fibre, quantum, most=self._settings.detections)

        nursery.start_soon(shine)
        return Alice(classical, self._settings, fibre.log, bootstrap=self._signatures)

    async def _block(self, party: Alice | Bob) -> int:
        try:
            block = await party.block()
        except BlockAborted as error:
            self._note(error)
            LOG.warning("QKD link: a block was given up: %s", error)
            await trio.sleep(PAUSE)
            return 0
        self._note(block)
        for part in _batches(block.keys):
            await self.ends[0].put(list(block.keys[part]))
        return 1


def _first(group: BaseExceptionGroup[LinkError]) -> LinkError:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, LinkError)
    return error


def link_feed(config: KmeConfig, peer: PeerConfig, metrics: KmeMetrics) -> PairFeed | PartyFeed:
    """The feed that a configuration file describes. Raises ``ConfigError``."""
    link = peer.link
    chosen = preset(link.preset).at(link.distance_km)
    if link.tuned:
        chosen = tuned(chosen, link.block_bits)
    settings = LinkSettings(
        preset=chosen, block_bits=link.block_bits, key_bits=config.limits.key_size
    )

    def note(block: Block | BlockAborted) -> None:
        metrics.note_block(config.id, peer.id, block)

    real_time = link.clock == "real"
    if link.party is None:
        return PairFeed(
            SimulatedLink(settings, bootstrap=link.bootstrap, real_time=real_time, observer=note)
        )
    assert link.address is not None
    assert link.peer_certificate is not None  # config.py has checked both
    return PartyFeed(
        settings,
        party=link.party,
        address=link.address,
        signatures=_signatures(config.key, link.peer_certificate),
        real_time=real_time,
        note=note,
    )


def _signatures(key: Path, peer_certificate: Path) -> Signatures:
    try:
        own = load_pem_private_key(key.read_bytes(), None)
        peer = x509.load_pem_x509_certificate(peer_certificate.read_bytes())
        return Signatures(own, peer.public_key())
    except OSError as error:
        raise ConfigError(f"cannot read {error.filename}: {error.strerror}") from None
    except (ValueError, TypeError):
        raise ConfigError(f"{key} or {peer_certificate} cannot be used for the link") from None
