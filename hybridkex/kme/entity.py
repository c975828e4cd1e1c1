"""A key management entity: the decisions, without HTTP, TLS or a database.

Both KMEs of a link hold its keys. When a master asks for keys, its KME reserves blocks, asks the
peer KME to promise them to the slaves, marks them as delivered in its own store, and
only then answers. Two KMEs may reserve the same block at the same time. Its *half*, the last bit of
its ID, decides: each KME prefers its own half, and if both have reserved a block, the KME that owns
its half gets it.

Wherever this sequence is interrupted, no key is delivered twice: the peer KME promises a block at
most once, durably. It refuses a block whose promise was not used, and both KMEs erase the block.

Only material is erased, never a promise. "Spent" does not mean that a block is lost: while our own
request for it was in transit, the other KME may have delivered it to its own SAE, and this KME may
have promised it to the slave.
"""

import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

import trio

from hybridkex.errors import (
    ConfigError,
    KeyConsumed,
    KeyExpired,
    KeySourceUnavailable,
    KeyUnauthorized,
    KeyUnknown,
)
from hybridkex.kme.audit import AuditTrail
from hybridkex.kme.metrics import KmeMetrics
from hybridkex.kme.peering import (
    IDS_AT_ONCE,
    ExtKeys,
    PeerLink,
)
from hybridkex.kme.settings import EntitySettings, KmeLimits
from hybridkex.net.log import BoundedLog
from hybridkex.net.token_bucket import TokenBucket
from hybridkex.qkd.etsi014.models import (
    DeliveredKey,
    ErrorResponse,
    KeyContainer,
    KeyRequest,
    Message,
    Status,
)
from hybridkex.qkd.producer import KeyProducer, ProducedKey
from hybridkex.qkd.store import (
    Allotment,
    BlocksRefused,
    BlockState,
    KeyStore,
    Material,
    OutcomeUnknown,
    Position,
)
from hybridkex.secret import Secret
from hybridkex.text import get_logger

LOG: Final = get_logger(__name__)

CHECK_EVERY: Final = 600.0
"""Seconds between two comparisons of our blocks with the peer KME's."""
CHECK_LONGEST: Final = 120.0
"""Seconds after which another process compares them if the first one has not finished."""

RETRY_AFTER: Final = 0.25
RETRY_AFTER_MOST: Final = 10.0
"""Seconds between two attempts to store keys while the store fails; doubled each time."""

TRY_AGAIN_AFTER: Final = 1.0
"""After a delivery that could not be recorded, at most one request draws keys in so many
seconds."""

LATE_WAITS: Final = (0.05, 0.1, 0.2, 0.4, 0.8)
"""Seconds before each retry of a request while the peer KME lacks some of the blocks."""

LOST: Final = {
    "refused": "the peer KME refused to reserve them (it has spent them, or never had them)",
    "unknown": "the peer KME does not have them",
    "voided": "the peer KME has discarded them",
    "short": "they are shorter than limits.key_size, which was raised after they were made, or "
    "which is smaller in another process of this KME",
    "unrecorded": "their delivery could not be recorded for certain",
    "overtaken": "one block of their request expired or went to the peer KME in the meantime",
}
"""Why keys are lost, as stated by the counter and the log."""

SHORT_AT_ONCE: Final = 1000
"""Blocks that are examined together once one is too short."""

VOIDS_RATE: Final = 1.0
VOIDS_BURST: Final = 10_000
"""The maximum number of unknown IDs in one peer KME's void messages that are recorded, per second
and in a burst. The record of an ID that is still in transit only saves a comparison of the
stores."""

EXCESS: Final = {
    "rate": "requests above limits.peer_rate; they get 503",
    "promised": "keys by value beyond limits.max_promised, which no SAE collects; they get 503",
    "voids": "void messages with IDs that were never in this store; they are not recorded",
}
"""Rate-limited calls of a peer KME, by their names in the counter and the log."""

TIDY_EVERY: Final = 0.5
"""Half the time in seconds for which a delivered key may remain, encrypted, on the disk."""

RENEW_EVERY: Final = 5.0
"""Seconds between two attempts to encrypt the stored keys under the current sealing key."""

COUNT_EVERY: Final = 1.0
"""Seconds between two counts of a full stock: this process does not notice keys that expire or that
another process delivers. (A notice of each delivery would cost more: PostgreSQL commits
transactions with a NOTIFY one at a time.)"""


_Unsettled = TypeVar("_Unsettled", str, tuple[str, str, str])


@dataclass(kw_only=True)
class _Link:
    """The link to another KME, or to this KME itself for pairs of its own SAEs."""

    target: str
    saes: frozenset[str]
    half: int
    peer: PeerLink | None
    answers: bool | None = None
    """Whether the peer KME answered the last message; ``None`` before the first message."""
    left: trio.Event = field(default_factory=trio.Event)
    """Set when ``gone`` reaches ``awaited``."""
    turn: trio.Lock = field(default_factory=trio.Lock)
    """Held while a message of the peer KME is processed: the peer has many connections, and our
    SAEs must not wait for more than one of its messages."""
    next_check: float = 0.0
    """When our blocks must be compared with the peer KME's again."""
    gone: int = 0
    """Blocks that this process has seen leave the stock since the start."""
    awaited: int = 0
    """The value of ``gone`` at which the stock has room for the next keys."""
    try_again: float | None = None
    """When the next delivery may be tried after one that could not be recorded, for example on a
    full disk. The keys of that delivery are lost, because the peer KME had promised them."""
    unsettled: set[str] = field(default_factory=set)
    """Blocks of requests that failed, though the store may have recorded their delivery."""
    uncollected: set[tuple[str, str, str]] = field(default_factory=set)
    """Likewise promises: key ID, slave and master."""
    voids: TokenBucket = field(default_factory=lambda: TokenBucket(VOIDS_RATE, VOIDS_BURST))
    log: BoundedLog = field(default_factory=lambda: BoundedLog(LOG, rate=1 / 60, burst=5))
    """Rate-limits the lines that an SAE or the peer KME can cause repeatedly."""

    def note_gone(self, blocks: int) -> None:
        self.gone += blocks
        if self.gone >= self.awaited:
            self.left.set()

    async def wait_for_room(self, since: int, blocks: int) -> None:
        """Wait until some blocks have left the stock since ``gone`` was ``since``."""
        self.left, self.awaited = trio.Event(), since + blocks
        if self.gone < self.awaited:
            await self.left.wait()


class KeyManagementEntity:
    """One KME. The methods that serve an SAE's request raise :class:`ErrorResponse`."""

    def __init__(
        self,
        settings: EntitySettings,
        *,
        store: KeyStore,
        metrics: KmeMetrics,
        audit: AuditTrail | None = None,
    ) -> None:
        self.kme_id: Final = settings.id
        self.settings = settings
        self._store = store
        self._audit = audit
        self._metrics = metrics
        self._links = {
            target: _Link(target=target, saes=attached, half=int(settings.id > target), peer=None)
            for target, attached in settings.peers.items()
        }
        if settings.self_pairs:
            self._links[self.kme_id] = _Link(
                target=self.kme_id, saes=settings.saes, half=0, peer=None
            )
        for target in self._links:
            metrics.begin_link(self.kme_id, target, lost=LOST, refused=BlockState, excess=EXCESS)
        self.log: Final = BoundedLog(LOG)
        """For log lines that any peer or SAE can cause repeatedly."""
        self._buckets = self._new_buckets()
        self._renewal = trio.Event()
        """Set while the store may have rows that are encrypted under an earlier sealing key."""

    def _new_buckets(self) -> dict[str, TokenBucket]:
        """A token bucket for each of our SAEs and for each peer."""
        limits = self.limits
        for sae in self.settings.saes:
            for role in ("master", "slave"):
                self._metrics.delivered.labels(self.kme_id, role, sae)
        return {sae: TokenBucket(limits.rate, limits.burst) for sae in self.settings.saes} | {
            peer: TokenBucket(limits.peer_rate, limits.peer_burst) for peer in self._links
        }

    @property
    def limits(self) -> KmeLimits:
        return self.settings.limits

    def change(self, settings: EntitySettings) -> None:
        """Apply new settings for the same peers."""
        self.settings = settings
        self._buckets = self._new_buckets()
        for target, link in self._links.items():
            link.saes = settings.saes if target == self.kme_id else settings.peers[target]

    @property
    def links(self) -> tuple[str, ...]:
        """The KMEs with a link to this one, including itself if ``self_pairs`` is on."""
        return tuple(self._links)

    def connect(self, target: str, peer: PeerLink, *, compared: bool = False) -> None:
        """Set how the KME ``target`` is reached.

        ``compared``: whether the caller calls :meth:`reconcile` for it now.
        """
        link = self._links[target]
        link.peer = peer
        if compared:
            link.next_check = trio.current_time() + CHECK_EVERY

    async def readiness(self) -> dict[str, str | None]:
        """For each link, why it cannot serve a request now; ``None`` if it can."""
        try:
            await self._store.check()
            if self._audit is not None:
                await self._audit.check()
        except KeySourceUnavailable as error:
            return dict.fromkeys(self._links, str(error))
        found: dict[str, str | None] = dict.fromkeys(self._links)

        async def check_link(link: _Link) -> None:
            found[link.target] = await self._hindrance(link)

        async with trio.open_nursery() as nursery:  # a silent KME must not delay the others
            for link in self._links.values():
                nursery.start_soon(check_link, link)
        return found

    async def _hindrance(self, link: _Link) -> str | None:
        try:
            stored = await self._store.count(link.target)
        except KeySourceUnavailable as error:
            return str(error)
        if stored < self.limits.ready_keys:
            return f"{stored} keys are stored, and limits.ready_keys is {self.limits.ready_keys}"
        if link.target == self.kme_id:
            return None
        if link.peer is None:
            return "the peer KME is not connected"
        try:
            await link.peer.check(())
        except KeySourceUnavailable as error:
            return f"the peer KME: {error}"
        return None

    # -- SAEs

    def admit(self, sae: str) -> None:
        """Clause 5.1: check that this SAE is ours and within its rate."""
        if sae not in self.settings.saes:
            raise self._unauthorized(sae, "no SAE of that ID is attached here")
        if not self._buckets[sae].take():
            self.log.log(logging.WARNING, "%s: %s exceeds its rate: it got 503", self.kme_id, sae)
            raise ErrorResponse(503, "too many requests")

    def _unauthorized(self, caller: str, why: str) -> ErrorResponse:
        text = "%s: a certificate of our authority names %s, and %s: it got 401"
        self.log.log(logging.WARNING, text, self.kme_id, caller, why)
        return ErrorResponse(401, "Unauthorized")

    def _link_to(self, slaves: Sequence[str]) -> _Link:
        for link in self._links.values():
            if link.saes.issuperset(slaves):
                return link
        known = {sae for link in self._links.values() for sae in link.saes}
        if known.issuperset(slaves):
            raise ErrorResponse(400, "the slave SAEs are attached to different KMEs")
        raise ErrorResponse(400, "a slave SAE is unknown or cannot be reached from here")

    async def status(self, master: str, slave: str) -> Status:
        """Get status (clause 5.1)."""
        link = self._link_to([slave])
        return Status(
            source_kme_id=self.kme_id,
            target_kme_id=link.target,
            master_sae_id=master,
            slave_sae_id=slave,
            key_size=self.limits.key_size,
            stored_key_count=await self._store.count(link.target),
            max_key_count=self.limits.max_key_count,
            max_key_per_request=self.limits.max_key_per_request,
            max_key_size=self.limits.max_key_size,
            min_key_size=self.limits.min_key_size,
            max_sae_id_count=self.limits.max_sae_id_count,
        )

    async def get_key(self, master: str, slave: str, request: KeyRequest) -> KeyContainer:
        """Get key (clause 5.2)."""
        slaves = [slave, *request.additional_slave_sae_ids]
        size = self._checked_size(request)
        if len(request.additional_slave_sae_ids) > self.limits.max_sae_id_count:
            raise ErrorResponse(400, "too many additional_slave_SAE_IDs")
        if len(set(slaves)) != len(slaves):
            raise ErrorResponse(400, "a slave SAE is named twice")
        link = self._link_to(slaves)
        per_key = self.limits.blocks(size)
        needed = per_key * request.number
        if self._audit is not None:
            await self._audit.check()
        tried: set[str] = set()
        late: set[str] = set()
        waits = iter(LATE_WAITS)
        while True:
            found = await self._store.reserve(link.target, needed, half=link.half, skip=tried)
            if len(found) < needed:
                await self._store.release(link.target, [one.key_id for one in found])
                wait = next(waits, None)
                if not late or wait is None:
                    self._note_shortage(link, needed, len(found))
                    raise ErrorResponse(503, "not enough keys are stored")
                # The peer KME does not have them yet, or is about to release them.
                await trio.sleep(wait)
                tried -= late
                late.clear()
                continue
            if any(map(self._is_short, found)):
                await self._store.release(link.target, [one.key_id for one in found])
                await self._erase_short(link)
                continue
            try:
                keys = _assembled(found, per_key, size // 8)
                try:
                    await self._allot_at_both_ends(link, keys, master, slaves)
                except BlocksRefused as refused:
                    states = {one.key_id: refused.states.get(one.key_id) for one in found}
                    refused_ids = {key_id for key_id, state in states.items() if state}
                    if not refused_ids:  # none of ours: repeating would not end
                        raise ErrorResponse(
                            503, "the peer KME refused keys that were not requested"
                        ) from None
                    tried |= refused_ids
                    late |= {one for one in refused_ids if states[one] is not BlockState.SPENT}
                    await self._erase_refused(link, found, refused.states)
                    continue
            finally:
                with trio.CancelScope(shield=True):
                    await self._store.release(link.target, [one.key_id for one in found])
            key_ids = [one.key_id for one, _ in keys]
            fields = self._fields("drawn", link.target, key_ids, master, slaves)
            try:
                await self._note_delivery(link, key_ids, fields)
            except KeySourceUnavailable:
                await self._tell_void(link, key_ids)
                raise
            self._metrics.delivered.labels(self.kme_id, "master", master).inc(len(keys))
            self._log_keys(fields, "%s drew %d keys for %s", master, len(keys), ", ".join(slaves))
            return KeyContainer(
                keys=tuple(DeliveredKey(key_id=one.key_id, key=key) for one, key in keys)
            )

    def _fields(
        self,
        event: str,
        link: str,
        key_ids: Sequence[str],
        master: str | None = None,
        slaves: Sequence[str] = (),
    ) -> dict[str, object]:
        """An event in the life of keys, as ``--log-format json`` and the audit trail show it."""
        parties = {} if master is None else {"master": master, "slaves": list(slaves)}
        event_of = {"event": event, "kme": self.kme_id, "link": link}
        return {**event_of, **parties, "key_ids": list(key_ids)}

    def _log_keys(self, fields: Mapping[str, Any], text: str, *args: object) -> None:
        """Log an event in the life of keys, with their IDs."""
        ids = ", ".join(fields["key_ids"])
        LOG.info(f"%s: {text}: %s", self.kme_id, *args, ids, extra={"fields": fields})

    async def _note_delivery(
        self, link: _Link, key_ids: Sequence[str], fields: Mapping[str, object]
    ) -> None:
        """Record a delivery before the keys leave. If that fails, the keys are lost."""
        if self._audit is not None:
            try:
                await self._audit.note(fields)
            except KeySourceUnavailable:
                self._note_lost(link, "unrecorded", key_ids)
                raise

    def _note_shortage(self, link: _Link, needed: int, found: int) -> None:
        self._metrics.shortages.labels(self.kme_id, link.target).inc()
        link.log.log(
            logging.WARNING,
            "%s: the link to %s is short of keys: a request needs %d blocks and %d are free; it "
            "got 503. SAEs draw more keys than the link makes, or the link is down",
            self.kme_id,
            link.target,
            needed,
            found,
        )

    def _checked_size(self, request: KeyRequest) -> int:
        if request.extension_mandatory:
            raise ErrorResponse(
                400,
                Message.MANDATORY_UNSUPPORTED,
                *(
                    {"extension_mandatory_unsupported": f"{name} is not supported"}
                    for item in request.extension_mandatory
                    for name in item
                ),
            )
        size = self.limits.key_size if request.size is None else request.size
        if size % 8:
            raise ErrorResponse(400, Message.SIZE_MULTIPLE)
        if not self.limits.min_key_size <= size <= self.limits.max_key_size:
            raise ErrorResponse(400, "size is out of the range of min_key_size and max_key_size")
        if not 1 <= request.number <= self.limits.max_key_per_request:
            raise ErrorResponse(400, "number is out of the range of 1 and max_key_per_request")
        return size

    async def _allot_at_both_ends(
        self,
        link: _Link,
        keys: list[tuple[Allotment, Secret]],
        master: str,
        slaves: list[str],
    ) -> None:
        """Get the peer KME's promise, then record the delivery durably. Raises
        ``BlocksRefused``."""
        allotments = tuple(one for one, _ in keys)
        local = [slave for slave in slaves if link.target == self.kme_id]
        if link.try_again is not None:
            if trio.current_time() < link.try_again:
                raise KeySourceUnavailable("the last delivery could not be recorded")
            link.try_again = trio.current_time() + TRY_AGAIN_AFTER  # other requests wait
            await self._store.check()
        if link.target != self.kme_id:
            if link.peer is None:
                raise ErrorResponse(503, "the peer KME is not connected")
            try:
                await link.peer.ext_keys(
                    ExtKeys(allotments=allotments, master=master, slaves=tuple(slaves))
                )
            except KeySourceUnavailable as error:
                self._note_peer(link, error)
                raise ErrorResponse(503, "the peer KME gave no valid response") from None
            except BlocksRefused:
                self._note_peer(link, None)
                if link.try_again is not None:
                    link.try_again = trio.current_time()  # nothing was promised
                raise
            self._note_peer(link, None)
        try:
            await self._store.allot(link.target, allotments, master=master, slaves=local)
        except KeySourceUnavailable as error:
            link.try_again = trio.current_time() + TRY_AGAIN_AFTER
            if isinstance(error, OutcomeUnknown):
                link.unsettled.update(block for one in allotments for block in one.blocks)
            raise
        except KeyConsumed:
            # A block expired, or went to the peer. The peer KME's promises are useless now, and so
            # are our other blocks, which it will not reserve again.
            blocks = [block for one in allotments for block in one.blocks]
            await self._store.release(link.target, blocks)
            await self._erase(link, blocks, "overtaken")
            await self._tell_void(link, [one.key_id for one in allotments])
            raise ErrorResponse(503, "a key expired while it was being reserved") from None
        link.try_again = None
        link.note_gone(sum(len(one.blocks) for one in allotments))

    def _note_peer(self, link: _Link, error: KeySourceUnavailable | None) -> None:
        """Log when the peer KME becomes unreachable, and when it answers again."""
        before, link.answers = link.answers, error is None
        if error is not None and before is not False:
            link.log.log(
                logging.WARNING,
                "%s: the KME %s: %s. Requests for its SAEs get 503 until it answers",
                self.kme_id,
                link.target,
                error,
            )
        elif error is None and before is not True:
            level = logging.INFO if before is None else logging.WARNING
            again = "" if before is None else " again"
            link.log.log(level, "%s: the KME %s answers%s", self.kme_id, link.target, again)

    async def _erase_refused(
        self, link: _Link, found: list[Material], states: Mapping[str, BlockState]
    ) -> None:
        """Erase material that the peer KME will never reserve, on both sides."""
        arrived = time.time() - self.limits.sync_grace
        dead: list[str] = []
        for material in found:
            state = states.get(material.key_id)
            if state is None:
                continue
            self._metrics.refused.labels(self.kme_id, link.target, state.value).inc()
            if state is BlockState.SPENT or (
                state is BlockState.UNKNOWN and material.created < arrived
            ):
                dead.append(material.key_id)
        # Only material is erased: a promise that was made meanwhile has removed its blocks from it.
        await self._store.release(link.target, dead)
        gone = await self._erase(link, dead, "refused")
        await self._tell_void(link, gone)

    def _is_short(self, material: Material) -> bool:
        """Whether a block is shorter than its place in a key."""
        return len(material.key.reveal()) * 8 < self.limits.key_size

    async def _erase_short(self, link: _Link) -> None:
        """Erase blocks that were made for a smaller ``key_size``, on both sides."""
        found = await self._store.reserve(link.target, SHORT_AT_ONCE, half=link.half)
        await self._store.release(link.target, [one.key_id for one in found])
        short = [one.key_id for one in found if self._is_short(one)]
        await self._tell_void(link, await self._erase(link, short, "short"))

    async def _erase(self, link: _Link, key_ids: Sequence[str], reason: str) -> list[str]:
        """Erase material that cannot be delivered, and log it. Returns the erased IDs."""
        if not key_ids:
            return []
        gone = await self._store.discard(link.target, key_ids)
        link.unsettled.difference_update(gone)
        self._note_lost(link, reason, gone)
        link.note_gone(len(gone))
        return gone

    def _note_lost(self, link: _Link, reason: str, key_ids: Sequence[str]) -> None:
        if not key_ids:
            return
        self._metrics.lost.labels(self.kme_id, link.target, reason).inc(len(key_ids))
        fields = self._fields(reason, link.target, key_ids)
        self._log_keys(fields, "erased keys of the link to %s, %s", link.target, reason)
        text = "%s: %d keys of the link to %s are lost and erased: %s"
        values = self.kme_id, len(key_ids), link.target, LOST[reason]
        self.log.log(logging.WARNING, text, *values)

    async def _tell_void(self, link: _Link, key_ids: list[str]) -> None:
        if link.peer is not None and key_ids:
            try:
                for start in range(0, len(key_ids), IDS_AT_ONCE):
                    await link.peer.void(key_ids[start : start + IDS_AT_ONCE])
            except KeySourceUnavailable as error:
                # Unused promises also expire; this message frees their space sooner.
                link.log.log(logging.INFO, "%s: %s", self.kme_id, error)

    async def get_key_with_ids(
        self, slave: str, master: str, key_ids: Sequence[str]
    ) -> KeyContainer:
        """Get key with key IDs (clause 5.3)."""
        if not 1 <= len(key_ids) <= self.limits.max_key_per_request:
            raise ErrorResponse(400, "the number of key_IDs is out of range")
        link = next((one for one in self._links.values() if master in one.saes), None)
        if link is None:
            raise ErrorResponse(self.settings.not_found_status, Message.NOT_FOUND)
        if self._audit is not None:
            await self._audit.check()
        try:
            found = await self._store.collect(link.target, key_ids, slave=slave, master=master)
        except OutcomeUnknown:
            link.uncollected.update((one, slave, master) for one in key_ids)
            raise
        except KeyUnauthorized:
            raise ErrorResponse(401, "Unauthorized") from None
        except (KeyUnknown, KeyConsumed, KeyExpired):
            raise ErrorResponse(self.settings.not_found_status, Message.NOT_FOUND) from None
        collected = [key_id for key_id, _ in found]
        link.uncollected.difference_update((one, slave, master) for one in collected)
        fields = self._fields("collected", link.target, collected, master, [slave])
        await self._note_delivery(link, collected, fields)
        self._metrics.delivered.labels(self.kme_id, "slave", slave).inc(len(found))
        self._log_keys(fields, "%s collected %d keys of %s", slave, len(found), master)
        return KeyContainer(
            keys=tuple(DeliveredKey(key_id=key_id, key=key) for key_id, key in found)
        )

    # -- the peer KME

    def admit_peer(self, peer: str) -> trio.Lock:
        """Check that this is a peer KME within its rate. Returns the lock under which its messages
        are processed."""
        link = self._links.get(peer)
        if link is None or peer == self.kme_id:
            raise self._unauthorized(peer, "no peer KME has that ID here")
        if not self._buckets[peer].take():
            self._note_excess(link, "rate", 1)
            raise ErrorResponse(503, "too many requests")
        return link.turn

    def _note_excess(self, link: _Link, reason: str, number: int) -> None:
        self._metrics.excess.labels(self.kme_id, link.target, reason).inc(number)
        text = "%s: the KME %s sends more than it may: %s"
        link.log.log(logging.WARNING, text, self.kme_id, link.target, EXCESS[reason])

    async def peer_allots(self, peer: str, message: ExtKeys) -> None:
        """Promise keys to our SAEs. Raises ``BlocksRefused`` or ``ErrorResponse``."""
        link = self._links.get(peer)
        if link is None or message.master not in link.saes:
            raise self._unauthorized(peer, "it draws for an SAE that is not among its saes here")
        if not message.slaves or not self.settings.saes.issuperset(message.slaves):
            raise ErrorResponse(400, "a target SAE is not registered at this KME")
        # Our limits apply to our SAEs; keys for the peer's SAEs follow the limits that it
        # announces.
        if any(len(one.blocks) != self.limits.blocks(one.size * 8) for one in message.allotments):
            raise ErrorResponse(400, "a key has more or fewer blocks of key_size than it needs")
        if any(one.value is not None for one in message.allotments):
            new = sum(len(one.blocks) for one in message.allotments) * len(message.slaves)
            room = self.limits.max_promised - new
            if room < 0 or room < await self._store.promised(peer):
                self._note_excess(link, "promised", new)
                raise ErrorResponse(503, "too many keys wait to be collected")
        await self._store.accept(
            peer,
            message.allotments,
            master=message.master,
            slaves=message.slaves,
            peer_half=1 - link.half,
        )
        ids = [one.key_id for one in message.allotments]
        fields = self._fields("promised", peer, ids, message.master, message.slaves)
        text = "promised %d keys of the link to %s, which %s drew, to %s"
        self._log_keys(fields, text, len(ids), peer, message.master, ", ".join(message.slaves))
        link.note_gone(sum(len(one.blocks) for one in message.allotments))

    async def peer_voids(self, peer: str, key_ids: Sequence[str]) -> None:
        """Erase keys that the peer KME will not use (void message)."""
        link = self._links.get(peer)
        if link is None:
            raise ErrorResponse(401, "Unauthorized")
        new = set(await self._store.never_here(peer, key_ids))
        ignored = {one for one in new if not link.voids.take()}
        if ignored:
            self._note_excess(link, "voids", len(ignored))
        erased = await self._store.void(peer, [one for one in key_ids if one not in ignored])
        self._note_lost(link, "voided", sorted(erased))
        link.note_gone(len(erased))

    async def peer_checks(self, peer: str, key_ids: Sequence[str]) -> list[str]:
        """Return those of these blocks that we lack (check message)."""
        if peer not in self._links:
            raise ErrorResponse(401, "Unauthorized")
        return await self._store.unknown(peer, key_ids)

    async def reconcile(self, target: str, *, grace: float) -> None:
        """Erase blocks that are older than ``grace`` seconds and that the peer KME lacks.

        A crash leaves such blocks at the end of the link that was ahead; they would take up room
        for keys that both ends have.
        """
        link = self._links[target]
        if link.peer is None:
            return
        before = time.time() - grace
        position: Position | None = None
        while True:
            ids, position = await self._store.shared_ids(
                target, created_before=before, after=position
            )
            for start in range(0, len(ids), IDS_AT_ONCE):
                asked = ids[start : start + IDS_AT_ONCE]
                try:
                    lacking = set(await link.peer.check(asked))
                except KeySourceUnavailable as error:
                    self._note_peer(link, error)
                    raise
                self._note_peer(link, None)
                await self._erase(link, [one for one in asked if one in lacking], "unknown")
            if position is None:
                return

    # -- new keys, expired keys

    async def feed(self, target: str, producer: KeyProducer, *, shared: bool) -> None:
        """Take keys for a link from a producer, whenever there is room, until the producer ends.

        ``shared``: whether the peer KME gets the same keys from its own end of the link.
        """
        link = self._links[target]
        batches = aiter(producer)
        try:
            await self._take(link, batches, shared)
        finally:
            # An asynchronous generator must be closed; other iterators need not be.
            close = getattr(batches, "aclose", None)
            if close is not None:
                with trio.CancelScope(shield=True):
                    await close()

    async def _take(
        self, link: _Link, batches: AsyncIterator[list[ProducedKey]], shared: bool
    ) -> None:
        async for batch in batches:
            if any(len(item.key) * 8 != self.limits.key_size for item in batch):
                raise ConfigError("the producer's keys are not of key_size")
            await self._take_batch_until_stored(link, batch, shared=shared)
            self._metrics.produced.labels(self.kme_id, link.target).inc(len(batch))

    async def _take_batch_until_stored(
        self, link: _Link, batch: list[ProducedKey], *, shared: bool
    ) -> None:
        """Store a batch. Both ends of the link have these keys, so retry until the store works."""
        wait = RETRY_AFTER
        while True:
            try:
                await self._take_batch(link, batch, shared)
            except KeySourceUnavailable:  # the store logs it
                await trio.sleep(wait)
                wait = min(wait * 2, RETRY_AFTER_MOST)
            else:
                return

    async def _take_batch(self, link: _Link, batch: list[ProducedKey], shared: bool) -> None:
        while True:
            since = link.gone  # before counting, so that no later change is missed
            excess = await self._store.count(link.target) + len(batch) - self.limits.max_key_count
            if excess <= 0:
                break
            with trio.move_on_after(COUNT_EVERY):
                await link.wait_for_room(since, excess)
        keys = [(item.key_id, item.key) for item in batch]
        await self._store.add(link.target, keys, shared=shared)
        ids = [item.key_id for item in batch]
        fields = self._fields("stored", link.target, ids)
        self._log_keys(fields, "stored %d keys of the link to %s", len(ids), link.target)

    async def maintain(self, every: float = 10.0) -> None:
        """Erase old keys, reconcile with the peer KMEs and count keys, forever."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._renew_when_asked)
            nursery.start_soon(_repeated, TIDY_EVERY, self._store.tidy)
            nursery.start_soon(_repeated, every, self._expire, every)
            for link in self._links.values():  # an unavailable KME must not delay the others
                nursery.start_soon(_repeated, every, self._count_and_reconcile, link)

    async def _expire(self, every: float) -> None:
        if await self._store.claim("expiry", every / 2):
            now = time.time()
            erased = await self._store.expire(
                keys_before=now - self.limits.key_ttl,
                tombstones_before=now - self.limits.tombstone_ttl,
            )
            if erased:
                self._metrics.expired.labels(self.kme_id).inc(erased)

    async def _count_and_reconcile(self, link: _Link) -> None:
        await self._settle(link)
        stored = await self._store.count(link.target)
        self._metrics.stored.labels(self.kme_id, link.target).set(stored)
        if trio.current_time() >= link.next_check and link.peer is not None:
            await self._reconcile_if_due(link)

    async def _settle(self, link: _Link) -> None:
        """Count the keys that the store recorded as delivered although their request failed.

        The others are still in stock: the peer KME, which promised them, refuses the next request.
        """
        promises = await _recorded(link, link.uncollected, self._store.delivered)
        self._note_lost(link, "unrecorded", [key_id for key_id, _, _ in promises])
        blocks = await _recorded(link, link.unsettled, self._store.unknown)
        self._note_lost(link, "unrecorded", blocks)
        await self._tell_void(link, blocks)

    def renew_soon(self) -> None:
        """Encrypt the stored keys under the current sealing key, which may have changed."""
        self._renewal.set()

    async def _renew_when_asked(self) -> None:
        while True:
            await self._renewal.wait()
            self._renewal = trio.Event()
            while not await self._renewed():  # noqa: ASYNC110  # of the store, maybe of others
                await trio.sleep(RENEW_EVERY)
            LOG.warning(
                "%s: all stored keys are encrypted under the key of key_file; the files of "
                "read_key_files can be removed from the configuration",
                self.kme_id,
            )

    async def _renewed(self) -> bool:
        try:
            if not await self._store.claim("renewal", CHECK_LONGEST):
                return False
            try:
                return await self._store.renew()
            finally:
                with trio.CancelScope(shield=True):
                    await self._store.settle("renewal", 0)
        except KeySourceUnavailable:  # the store logs it
            return False

    async def _reconcile_if_due(self, link: _Link) -> None:
        """Reconcile, unless another process that shares the store is doing it or has done it."""
        job = f"comparison with {link.target}"
        if not await self._store.claim(job, CHECK_LONGEST):
            return
        try:
            await self.reconcile(link.target, grace=self.limits.sync_grace)
        except BaseException:
            with trio.CancelScope(shield=True), suppress(KeySourceUnavailable):
                await self._store.settle(job, 0)  # at the next opportunity, by any process
            raise
        await self._store.settle(job, CHECK_EVERY)


async def _recorded(
    link: _Link, unsettled: set[_Unsettled], find: Callable[..., Awaitable[list[_Unsettled]]]
) -> list[_Unsettled]:
    """Empty a set of a link. Returns those that the store recorded as delivered."""
    asked = sorted(unsettled)
    if not asked:
        return []
    found = await find(link.target, asked)
    found = [one for one in found if one in unsettled]  # others were counted meanwhile
    unsettled.difference_update(asked)
    return found


async def _repeated(every: float, work: Callable[..., Awaitable[None]], *arguments: object) -> None:
    """Repeat a task, also while the store or the peer KME is unavailable."""
    while True:
        with suppress(KeySourceUnavailable):  # it is logged where it arises
            await work(*arguments)
        await trio.sleep(every)


def _assembled(
    found: Sequence[Material], per_key: int, size: int
) -> list[tuple[Allotment, Secret]]:
    """Group blocks into keys; a key is sent by value if the peer KME lacks one of its blocks."""
    keys: list[tuple[Allotment, Secret]] = []
    for start in range(0, len(found), per_key):
        blocks = found[start : start + per_key]
        key = Secret(b"".join(block.key.reveal() for block in blocks)[:size])
        value = None if all(block.shared for block in blocks) else key
        ids = tuple(block.key_id for block in blocks)
        keys.append((Allotment(blocks=ids, size=size, value=value), key))
    return keys


@dataclass(frozen=True, kw_only=True)
class LocalPeer:
    """The peer KME of a link, in this process."""

    own_id: str
    other: KeyManagementEntity

    async def ext_keys(self, message: ExtKeys) -> None:
        try:
            await self.other.peer_allots(self.own_id, message)
        except ErrorResponse as refusal:
            raise KeySourceUnavailable(f"it answered {refusal}") from None

    async def void(self, key_ids: Sequence[str]) -> None:
        await self.other.peer_voids(self.own_id, key_ids)

    async def check(self, key_ids: Sequence[str]) -> list[str]:
        return await self.other.peer_checks(self.own_id, key_ids)
