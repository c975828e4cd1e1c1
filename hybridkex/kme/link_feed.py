"""A QKD link as the key producer of KMEs: see :mod:`hybridkex.qkd.producer`.

Either both parties run here and feed two KMEs of one process, or one party runs here and reaches
the other over TCP, with a connection for the classical and one for the quantum channel. The first
block of such a link is authenticated with the keys of the KMEs' certificates. (A shared secret
would be reused after a restart, and a one-time pad must not be.) They may be renewed while the link
runs; the next session uses the new ones.

Alice listens, and each connection begins with a greeting (:mod:`hybridkex.link.greeting`), so that
only Bob reaches Alice's party. A session begins when both connections with its number are open. A
new session ends the previous one: Bob opens one only after losing the other.
"""

import logging
import math
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Final

import trio

from hybridkex.errors import (
    BlockAborted,
    ConfigError,
    LedgerDry,
    LedgerLost,
    LinkError,
)
from hybridkex.kme.config import KmeConfig, PeerConfig
from hybridkex.kme.metrics import KmeMetrics
from hybridkex.link.authentication import Signatures, suffices
from hybridkex.link.greeting import CLASSICAL, KINDS, NUMBER, QUANTUM, greet, greeted
from hybridkex.link.ledger import Direction, Ledger
from hybridkex.link.optimise import tuned
from hybridkex.link.party import Alice, Block, Bob
from hybridkex.link.presets import preset
from hybridkex.link.quantum import Detections, OpticalLink
from hybridkex.link.remote import LATE, RemoteDetector, serve_detector
from hybridkex.link.settings import LinkSettings
from hybridkex.link.simulated import SimulatedLink
from hybridkex.machine import broken, leaves, reason, refusal
from hybridkex.net.address import TcpAddress
from hybridkex.net.budget import Budget, Connection
from hybridkex.net.listening import open_tcp_listeners
from hybridkex.net.log import BoundedLog
from hybridkex.net.reading import EndOfStream
from hybridkex.net.sockets import keep_alive
from hybridkex.net.supervisor import Supervisor
from hybridkex.net.threads import NoThread
from hybridkex.qkd.producer import ProducedKey
from hybridkex.text import get_logger

LOG: Final = get_logger(__name__)
NAME: Final = "QKD link"
"""The beginning of the log lines of a link that has no other name."""

BATCH: Final = 64
"""Keys handed over at a time, so that a large block does not need room for all of its keys at
once."""
SLOW: Final = 60.0
"""Seconds after which a link logs that it waits for its KME."""
PAUSE: Final = 1.0
"""Seconds before the next attempt, after an aborted block or a broken connection."""
LONG_PAUSE: Final = 10.0
"""Seconds before the next attempt if an operator must restart the KMEs because the authentication
key is used up or lost."""
LONGEST_PAUSE: Final = 600.0
"""The maximum time that Bob waits if attempts use up authentication key without a block, in
seconds."""
FRUITLESS: Final = 2
"""The number of consecutive attempts of this kind after which Bob waits longer. An attempt is an
abandoned block or a session that ends."""
LONGER: Final = 4.0
"""Factor from one of these waits to the next."""
ALONE: Final = 10.0
"""Seconds without a session after which Alice logs that she waits for Bob."""
GREETING_SECONDS: Final = 10.0
"""Seconds for a greeting, and then for the other connection of the session."""
UNAUTHENTICATED: Final = 32
"""Simultaneous connections at Alice's port that are not yet authenticated as Bob's."""
BOBS: Final = 8
"""Simultaneous authenticated connections: two of a session, and remains of earlier ones."""
FEWEST: Final = 4
"""Connections of a session and of the one before it: with fewer there is no link."""

_EXPECTED: Final = (LinkError, OSError, trio.BrokenResourceError, MemoryError, NoThread)
"""The exceptions that end a session without a defect of the program."""

_NOTHING: Final = (trio.TooSlowError, EndOfStream)
"""The exceptions of a connection that is silent or has ended."""

Note = Callable[[Block | BlockAborted], None]


class _LinkLog:
    """Rate-limited logging while a link produces no key."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._begin()

    def _begin(self) -> None:
        self._log = BoundedLog(LOG, rate=1 / 60, burst=5)
        self._stopped = BoundedLog(LOG, rate=1 / 60, burst=1)  # the same line each time

    def over(self) -> None:
        self._log.flush()
        self._begin()

    def log(self, level: int, message: str, *args: object) -> bool:
        """Log this, unless there were many lines of the level since the last block.

        Returns whether it was logged.
        """
        return self._log.log(level, f"%s: {message}", self._name, *args)

    async def log_abandoned_block(self, error: BlockAborted) -> None:
        """Log why a block was given up, and wait until it is time for the next one."""
        self.log(logging.WARNING, "a block was given up: %s", error)
        await trio.sleep(PAUSE)

    async def log_session_end(self, error: BaseException) -> None:
        """Log why a session ended, and wait until it is time for the next one.

        No error ends the feed: its cause may be over when the next session begins.
        """
        pause = LONG_PAUSE
        if isinstance(error, LedgerDry | LedgerLost):
            self._stopped.log(logging.ERROR, "%s: %s", self._name, error)  # it says all
        elif isinstance(error, _EXPECTED):
            why = str(error) if isinstance(error, LinkError) else refusal(error) or broken(error)
            self.log(logging.WARNING, "%s; a new session begins", why)
            pause = PAUSE
        else:
            kind = type(error).__name__
            self.log(logging.ERROR, "internal error: %s; please report it", kind)
            LOG.debug("%s: the internal error", self._name, exc_info=error)
        await trio.sleep(pause)


class LinkEnd:
    """One end of a link as a key producer."""

    def __init__(self, name: str = NAME) -> None:
        self._name = name
        self._put, self._take = trio.open_memory_channel[list[ProducedKey]](math.inf)
        self._ready = trio.Event()
        self._ready.set()

    def __aiter__(self) -> "LinkEnd":
        return self

    async def __anext__(self) -> list[ProducedKey]:
        if not self._take.statistics().current_buffer_used:
            self._ready.set()
        try:
            return await self._take.receive()
        except trio.EndOfChannel:
            raise StopAsyncIteration from None

    async def ready(self) -> None:
        """Wait until the KME has stored everything and asks for more.

        A block is begun only then: the keys of a finished one are handed over at once, so no end
        of a session loses them.
        """
        with trio.move_on_after(SLOW):
            await self._ready.wait()
            return
        LOG.warning(
            "%s: no block is begun, because the KME has not stored the keys of the last one "
            "for %g s: it is full until applications take keys, or its store fails",
            *(self._name, SLOW),
        )
        await self._ready.wait()

    def put(self, keys: tuple[ProducedKey, ...]) -> None:
        if keys:
            self._ready = trio.Event()
        for start in range(0, len(keys), BATCH):
            self._put.send_nowait(list(keys[start : start + BATCH]))

    def end(self) -> None:
        self._put.close()


class PairFeed:
    """Both ends of a link within one process.

    Args:
        make: creates the link, with both its ends, once for each session.
    """

    def __init__(self, make: Callable[[], SimulatedLink], *, name: str = NAME) -> None:
        self.ends: Final[tuple[LinkEnd, ...]] = (LinkEnd(name), LinkEnd(name))
        self._make = make
        self._troubles = _LinkLog(name)

    async def run(self) -> None:
        """Make keys until cancelled."""
        try:
            while True:
                await self._session()
        finally:
            for end in self.ends:
                end.end()

    async def _session(self) -> None:
        try:
            async with self._make().open() as link:
                while True:
                    await self._block(link)
        except* Exception as group:
            await self._troubles.log_session_end(next(leaves(group)))

    async def _block(self, link: SimulatedLink) -> None:
        for end in self.ends:
            await end.ready()
        try:
            blocks = await link.block()
        except BlockAborted as error:
            await self._troubles.log_abandoned_block(error)
            return
        self._troubles.over()
        for end, block in zip(self.ends, blocks, strict=True):
            end.put(block.keys)


class PartyFeed:
    """One end of a link whose other end is in another process."""

    def __init__(
        self,
        settings: LinkSettings,
        *,
        party: str,
        address: TcpAddress,
        signatures: Signatures,
        note: Note,
        name: str = NAME,
    ) -> None:
        self.ends: Final[tuple[LinkEnd, ...]] = (LinkEnd(name),)
        self._name = name
        self._settings = settings
        self._party = party
        self._address = address
        self.renew(signatures)
        self._note = note
        self._troubles = _LinkLog(name)
        self.ledger: Final = Ledger()  # outlives a session: only the first uses signatures
        self._used = 0
        """Bytes of the ledger that were used when the last attempt at a block ended."""
        self._fruitless = 0
        """Attempts since the last block that used some and made none."""

    def renew(self, signatures: Signatures) -> None:
        """Authenticate later sessions with other keys."""
        self._signatures = signatures
        LOG.info(
            "%s: signatures authenticate its first block: ours %s, those of the other party %s",
            *(self._name, *signatures.kinds),
        )

    async def run(self) -> None:
        """Make keys until cancelled.

        A broken connection is replaced by a new session, authenticated with the stored key.
        """
        try:
            await (self._run_alice() if self._party == "alice" else self._run_bob())
        finally:
            self.ends[0].end()

    async def _run_bob(self) -> None:
        while True:
            await self._session(*await self._reach())
            await self._slow_down()

    async def _slow_down(self) -> None:
        """Wait after an attempt that used authentication key and made no block, if it is not the
        first one in a row.

        An attacker who can disturb the light or cut the connection can make each attempt use some.
        """
        used, self._used = self._used, self.ledger.used
        if used == self._used or not suffices(self.ledger.positions):
            return  # nothing is left that a pause could save
        self._fruitless += 1
        if self._fruitless <= FRUITLESS:
            return
        pause = min(PAUSE * LONGER ** (self._fruitless - 1), LONGEST_PAUSE)
        LOG.warning(
            "%s: %d consecutive attempts used authentication key and made no block; %d bytes of it "
            "are left; the next attempt in %g s: find out who or what disturbs the light or cuts "
            "the connection, before the link stops",
            *(self._name, self._fruitless, self.ledger.balance, pause),
        )
        await trio.sleep(pause)

    async def _reach(self) -> list[trio.SocketStream]:
        """Open the classical and the quantum connection of a session; wait for Alice's greeting."""
        said = set[float]()  # of refusals and of other troubles
        while True:
            number = secrets.token_bytes(NUMBER)  # Alice may still have connections of the last one
            streams: list[trio.SocketStream] = []
            try:
                for kind in KINDS:
                    with trio.fail_after(GREETING_SECONDS):
                        there = await trio.open_tcp_stream(self._address.host, self._address.port)
                        streams.append(there)
                        await greet(
                            there, self._signatures, kind, number, sends=Direction.BOB_TO_ALICE
                        )
            except BaseException as error:
                with trio.CancelScope(shield=True):
                    for stream in streams:
                        await trio.aclose_forcefully(stream)
                if not isinstance(error, (LinkError, OSError, trio.BrokenResourceError, *_NOTHING)):
                    raise
                # A refusal does not pass by itself.
                pause = LONG_PAUSE if isinstance(error, LinkError) else PAUSE
                if pause not in said and self._troubles.log(
                    logging.WARNING,
                    "no session with the other party at %s: %s; it is tried again every %g s",
                    *(self._address, _no_greeting(error), pause),
                ):
                    said.add(pause)
                await trio.sleep(pause)
            else:
                return streams

    async def _run_alice(self) -> None:
        listeners = await self._listeners()
        pairs, arrived = trio.open_memory_channel[_Pair](0)
        desk = _Reception(lambda: self._signatures, pairs)
        supervisor = Supervisor(
            desk.receive,
            name=self._name,
            logger=LOG,
            handshakes=UNAUTHENTICATED,
            handshake_seconds=GREETING_SECONDS,
        )
        async with trio.open_nursery() as nursery:
            nursery.start_soon(supervisor.serve, listeners)
            while True:
                pair = await self._next_session(arrived)
                try:
                    with pair.scope:
                        await self._session(pair.streams[CLASSICAL], pair.streams[QUANTUM])
                finally:
                    pair.over.set()

    async def _next_session(self, arrived: "trio.MemoryReceiveChannel[_Pair]") -> "_Pair":
        """The connections of the next session."""
        silent = True
        while True:
            with trio.move_on_after(ALONE):
                return await arrived.receive()
            if silent:
                silent = not self._troubles.log(
                    logging.WARNING,
                    "no session for %g s: the other party has not connected to %s, or was refused",
                    *(ALONE, self._address),
                )

    async def _listeners(self) -> list[trio.SocketListener]:
        silent = True
        while True:
            try:
                return await open_tcp_listeners(self._address.port, host=self._address.host)
            except OSError as error:
                if silent:
                    silent = not self._troubles.log(
                        logging.ERROR,
                        "cannot listen on %s: %s; it is tried again every second",
                        *(self._address, error.strerror),
                    )
                await trio.sleep(PAUSE)

    async def _session(self, classical: trio.SocketStream, quantum: trio.SocketStream) -> None:
        """Make blocks until the connection breaks.

        Nothing that the other end says ends more than the session: its HELLO is not authenticated
        when it contradicts our ledger, and a tag that does not verify may be an attacker's.
        """
        for stream in (classical, quantum):
            # Alice waits for Bob without a limit: Bob's KME may be full for long.
            keep_alive(stream)
        try:
            async with classical, quantum, trio.open_nursery() as nursery:
                party = self._make(classical, quantum, nursery)
                try:
                    while True:
                        await self._block(party)
                finally:
                    nursery.cancel_scope.cancel()
        except* Exception as group:
            await self._troubles.log_session_end(next(leaves(group)))

    def _make(
        self, classical: trio.SocketStream, quantum: trio.SocketStream, nursery: trio.Nursery
    ) -> Alice | Bob:
        if self._party == "bob":
            detector = RemoteDetector(quantum, late=self._late)
            return Bob(
                classical,
                self._settings,
                detector,
                bootstrap=self._signatures,
                ledger=self.ledger,
            )
        chosen = self._settings.preset
        light = OpticalLink(chosen.channel, chosen.transmitter, real_time=self._settings.real_time)

        async def shine() -> None:
            ready = _ReadySource(self.ends[0], light)
            try:
                await serve_detector(ready, quantum, most=self._settings.detections)
            except LinkError:
                await trio.sleep(PAUSE)  # the classical channel may show why Bob has ended it
                raise

        nursery.start_soon(shine)
        return Alice(
            classical,
            self._settings,
            light.record,
            bootstrap=self._signatures,
            ledger=self.ledger,
            patient=True,
        )

    def _late(self, times: int) -> None:
        if times == round(SLOW / LATE) and not self._settings.real_time:
            self._troubles.log(
                logging.WARNING,
                "the other party announces that its light is delayed, and no block is made "
                "meanwhile: its KME is full until applications take keys, or its store fails",
            )

    async def _block(self, party: Alice | Bob) -> None:
        if isinstance(party, Bob):  # Alice sends no light before she is ready
            await self.ends[0].ready()
        try:
            block = await party.block()
        except BlockAborted as error:
            self._note(error)
            await self._troubles.log_abandoned_block(error)
            if isinstance(party, Bob):  # Alice waits for Bob, who begins each block
                await self._slow_down()
            return
        self._note(block)
        self._used, self._fruitless = self.ledger.used, 0
        self._troubles.over()
        self.ends[0].put(block.keys)


@dataclass(frozen=True)
class _ReadySource:
    """Alice's source, enabled only while her KME can store another block."""

    end: LinkEnd
    light: OpticalLink

    async def detect(self, count: int) -> Detections:
        await self.end.ready()
        return await self.light.detect(count)


@dataclass(eq=False)
class _Pair:
    """The two connections of a session."""

    streams: dict[bytes, trio.SocketStream] = field(default_factory=dict)
    complete: trio.Event = field(default_factory=trio.Event)
    over: trio.Event = field(default_factory=trio.Event)
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)


class _Reception:
    """Pairs the two connections of each session, once Bob has authenticated himself."""

    def __init__(
        self, signatures: Callable[[], Signatures], pairs: "trio.MemorySendChannel[_Pair]"
    ) -> None:
        self._signatures = signatures
        self._pairs = pairs
        self._budget = Budget(BOBS, what="link connections", fewest=FEWEST)
        self._by_number: dict[bytes, _Pair] = {}
        self._newest: _Pair | None = None

    async def receive(self, stream: trio.SocketStream, connection: Connection) -> None:
        """Serve one connection for as long as its session lasts."""
        kind, number = await greeted(stream, self._signatures(), receives=Direction.BOB_TO_ALICE)
        connection.admit(self._budget)
        pair = self._by_number.setdefault(number, _Pair())
        if kind in pair.streams:
            raise LinkError("this session already has a channel of this kind")
        pair.streams[kind] = stream
        try:
            if len(pair.streams) == len(KINDS):
                pair.complete.set()
                if self._newest is not None:
                    self._newest.scope.cancel()
                self._newest = pair
                await self._pairs.send(pair)
            with trio.move_on_after(GREETING_SECONDS):
                await pair.complete.wait()
            if pair.complete.is_set():
                await pair.over.wait()
        finally:
            self._by_number.pop(number, None)


def _no_greeting(error: BaseException) -> str:
    """The reason why the other party did not greet us."""
    if isinstance(error, LinkError):
        return str(error)
    if isinstance(error, EndOfStream):
        return "it closed the connection: see its log"
    if isinstance(error, trio.TooSlowError):
        return f"no answer within {GREETING_SECONDS:g} s; is another program at this address?"
    if not isinstance(error, OSError):
        return broken(error)
    return reason(next(leaves(error.__cause__ or error)))


def link_signatures(config: KmeConfig, peer: PeerConfig) -> Signatures:
    """The keys of a link to another process, as the files have them now. Raises ``ConfigError``."""
    asked, remote = peer.link.bootstrap, peer.link.remote
    assert remote is not None
    found = Signatures.from_files(config.key, remote.peer_credential)
    own, other = found.kinds
    if asked is not None and not own == other == asked:
        right = f'write bootstrap = "{own}"' if own == other else "leave it out"
        raise ConfigError(
            f'{config.id}: the link to {peer.id} has bootstrap = "{asked}", but between two '
            f"processes the keys of the certificates sign the first block, {config.key} with {own} "
            f"and that of the other party, {remote.peer_credential}, with {other}: {right}, or use "
            "other certificates"
        )
    return found


def link_feed(config: KmeConfig, peer: PeerConfig, metrics: KmeMetrics) -> PairFeed | PartyFeed:
    """The feed that a configuration file describes. Raises ``ConfigError``."""
    link, name = peer.link, f"{config.id}: the QKD link to {peer.id}"
    chosen = preset(link.preset).at(link.distance_km)
    try:
        if link.tuned:
            chosen = tuned(chosen, link.block_bits)
        settings = LinkSettings(
            preset=chosen,
            block_bits=link.block_bits,
            key_bits=config.limits.key_size,
            reauthentication=link.reauthentication,
            real_time=link.real_time,
        )
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None
    metrics.begin_qkd_link(config.id, peer.id)
    up = False

    def note(block: Block | BlockAborted) -> None:
        nonlocal up
        metrics.note_block(config.id, peer.id, block)
        if isinstance(block, BlockAborted):
            return
        if not up:
            LOG.info("%s is up", name)
            up = True
        LOG.info(
            "%s made a block: %d keys, %d secret bits, QBER %.2f %%",
            name,
            len(block.keys),
            block.secret_bits,
            100 * (block.test_qber if block.qber is None else block.qber),
        )

    remote = link.remote
    if remote is None:
        bootstrap = "ml-dsa" if link.bootstrap is None else link.bootstrap
        make = partial(SimulatedLink, settings, bootstrap=bootstrap, observer=note)
        make()  # a setting that is wrong is so now
        LOG.info("%s: %s authenticates its first block", name, bootstrap)
        return PairFeed(make, name=name)
    feed = PartyFeed(
        settings,
        party=remote.party,
        address=remote.address,
        signatures=link_signatures(config, peer),
        note=note,
        name=name,
    )
    metrics.follow_ledger(config.id, peer.id, feed.ledger)
    return feed
