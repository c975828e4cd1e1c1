"""QkdPskSource: key sources as the PSK source of a configuration.

Only this module connects QKD to TLS. The client requests a key and offers it as an imported PSK;
the server reads the key's name and the two SAEs from the offered identity, and looks the key up.

The work that an unauthenticated peer can cause is bounded: a look-up is made only for a name whose
parts all belong to our links, once per name, at a limited rate per peer, and within a time limit. A
name counts as used when its look-up begins, whatever the outcome: a key that was taken for a failed
handshake is lost.
"""

import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Final

from hybridkex.auth.names import canonical_peer_name
from hybridkex.crypto.psk import ExternalPsk
from hybridkex.errors import (
    ConfigError,
    KeyConsumed,
    KeyNotYetAvailable,
    KeySourceError,
    KeySourceUnavailable,
    KeyUnauthorized,
    KeyUnknown,
    PolicyRefused,
)
from hybridkex.fields import check_fields, described
from hybridkex.net.event_loop import current_time, sleep, time_limit
from hybridkex.net.log import BoundedLog
from hybridkex.net.token_bucket import TokenBucket
from hybridkex.qkd.composite import CombinedSource
from hybridkex.qkd.psk import (
    as_psk,
    as_update_psk,
    context_of,
    identity_of,
    name_of,
    update_context_of,
)
from hybridkex.qkd.source import (
    KeyPart,
    KeyReference,
    KeySource,
    QkdKey,
    SourceStatus,
    draw_key,
    is_known,
    look_up_key,
)
from hybridkex.reasons import Reason
from hybridkex.secret import Secret
from hybridkex.text import get_logger
from hybridkex.tls.epochs import UpdateKey
from hybridkex.tls.policy import Requirement
from hybridkex.tls.session import Session
from hybridkex.wire.messages import ImportedIdentity

_log = get_logger("hybridkex.qkd.keys")

_COMBINED: Final = (
    "a key combined from several links is derived by a hash, and cannot be used for a one-time pad"
)
_TURN: Final = 20.0
"""How long the look-up for a key update waits for its turn, in seconds: less than the default
deadline of an update."""
_LEAST_PAD_KEY: Final = 16
"""The minimum length of such a key in bytes: a shorter one costs more for its name on the wire than
it is worth."""


@dataclass(frozen=True, kw_only=True)
class QkdLimits:
    """Limits on draws and look-ups of keys.

    Args:
        timeout: seconds for one request or one look-up, including retries.
        retries: how often a look-up that was too early (``KeyNotYetAvailable``) is repeated.
        retry_after: seconds before the first repetition; doubled each time.
        look_ups_per_second: the long-term rate of look-ups for one peer; ``math.inf`` for no limit.
            Look-ups for key updates and one-time pads, which belong to sessions, are counted
            separately and wait for their turn.
        burst: the number of look-ups for one peer that may be made at once.
        remembered: the maximum number of keys to remember; a remembered key is not used again.

    Raises:
        ConfigError: a limit is not positive, or ``retries`` is negative.
    """

    timeout: float = 5.0
    retries: int = 4
    retry_after: float = 0.05
    look_ups_per_second: float = 100.0
    burst: int = 200
    remembered: int = 65_536

    def __post_init__(self) -> None:
        check_fields(self)
        if self.timeout <= 0 or self.retries < 0 or self.retry_after <= 0:
            raise ConfigError(
                "timeout and retry_after must be positive, and retries must not be negative"
            )
        if self.look_ups_per_second <= 0 or self.burst < 1 or self.remembered < 1:
            raise ConfigError("look_ups_per_second, burst and remembered must be positive")


@dataclass(frozen=True, kw_only=True)
class QkdPeer:
    """A peer with which we share QKD keys.

    Args:
        source: the source of the keys that we share with it.
        names: DNS names, IP addresses and URIs in the subjectAltName of its certificate, or
            ``sha256:`` and the pin of its key. If given, they bind the two together: a client with
            such a certified name must use a key of this source, even if the policy only prefers
            one, and nobody else may use this source's keys.

    Raises:
        ConfigError: an invalid name.
    """

    source: KeySource
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_fields(
            self, {"source": "QkdPskSource(key_source)", "names": 'names=("bob.example",)'}
        )
        object.__setattr__(self, "names", tuple(map(canonical_peer_name, self.names)))


@dataclass
class QkdCounters:
    """Counters since the start."""

    drawn: int = 0
    looked_up: int = 0
    failed: int = 0
    """Requests and look-ups that returned no key."""
    repeated: int = 0
    """Names that were offered again: replays or broken clients."""
    limited: int = 0
    """Look-ups that were refused because the peer caused too many."""
    sessions: int = 0
    """Handshakes with a QKD key, resumptions included."""
    fallbacks: int = 0
    """Handshakes without one."""
    update_keys: int = 0
    """QKD keys requested and looked up for key updates."""
    pad_keys: int = 0
    """QKD keys requested and looked up for one-time pads."""


class QkdPskSource:
    """QKD keys as the ``psk_source`` of a configuration.

    A client has exactly one peer, a server any number. Use one object for all connections, since it
    remembers which names were looked up.

    Args:
        peers: a :class:`~hybridkex.qkd.source.KeySource` each, or a :class:`QkdPeer`.
        limits: see :class:`QkdLimits`.

    Raises:
        ConfigError: there is no source, or there are two for the same pair of SAEs.
    """

    def __init__(self, *peers: KeySource | QkdPeer, limits: QkdLimits | None = None) -> None:
        self._peers: Final = tuple(
            peer if isinstance(peer, QkdPeer) else QkdPeer(source=peer) for peer in peers
        )
        pairs = [(peer.source.local_sae, peer.source.peer_sae) for peer in self._peers]
        if not pairs:
            raise ConfigError("QKD keys need at least one key source")
        if len(set(pairs)) != len(pairs):
            raise ConfigError("two sources for one pair of SAEs: combine them in a FailoverSource")
        if not isinstance(limits, QkdLimits | None):
            raise ConfigError(f"limits takes a QkdLimits, not {described(limits)}")
        self._limits: Final = limits or QkdLimits()
        self._budgets: Final = self._full_buckets()
        self._session_budgets: Final = self._full_buckets()
        self._asked: Final = OrderedDict[KeyPart, None]()
        """Every key that was requested or looked up, for any purpose."""
        # Rate-limited, because any peer can cause these lines.
        self._lines = BoundedLog(_log)
        self.counters: Final = QkdCounters()

    def _full_buckets(self) -> dict[int, TokenBucket]:
        rate, burst = self._limits.look_ups_per_second, self._limits.burst
        return {id(peer): TokenBucket(rate, burst, clock=current_time) for peer in self._peers}

    async def offer(self) -> ExternalPsk:
        """Request a new key for a client to offer.

        Raises:
            KeySourceError: the source returned no key. ConfigError: there is more than one peer.
        """
        if len(self._peers) != 1:
            raise ConfigError("a client must have exactly one QKD peer, the server")
        (peer,) = self._peers
        key = await self._draw(peer)
        return replace(as_psk(key), origin=_Origin(peer, key.name))

    async def look_up(self, identities: tuple[bytes, ...]) -> ExternalPsk:
        """Look up the key that one of the identities names.

        Raises:
            KeySourceError: none of them is ours, or the source returned no key.
        """
        for identity in identities:
            found = self._recognise(identity)
            if found is not None:
                key = await self._look_up_once(*found)
                self.counters.looked_up += 1
                return replace(as_psk(key), origin=_Origin(*found))
        raise KeyUnknown("the client offers no identity that names one of our QKD keys")

    async def draw_for_update(self, session: Session, *, client: bool, epoch: int) -> UpdateKey:
        """A new key for a key update that we start; see
        :class:`~hybridkex.tls.fresh_keys.UpdateKeySource`.

        Raises:
            KeySourceError: the source gave no key.
        """
        peer = self._peer_of(session)
        key = await self._draw(peer)
        self.counters.update_keys += 1
        return _update_key(key, by_client=client, epoch=epoch)

    async def look_up_for_update(
        self, identity: bytes, session: Session, *, client: bool, epoch: int
    ) -> UpdateKey:
        """The key that the peer named in its request.

        Raises:
            KeySourceError: it is not one of our keys for this session and this epoch, or is not
                available.
        """
        peer = self._peer_of(session)
        imported, source = ImportedIdentity.decode(identity), peer.source
        name = name_of(imported.external_identity) if imported is not None else None
        if imported is None or name is None:
            raise KeyUnknown("the key update of the peer names no QKD key")
        expected = update_context_of(
            name,
            master_sae=source.peer_sae,
            slave_sae=source.local_sae,
            by_client=not client,
            epoch=epoch,
        )
        if imported.context != expected or not is_known(source, name):
            raise KeyUnknown(
                "the key update of the peer names a QKD key that is not for this session"
            )
        self._check_new(name)
        self._remember(name)
        try:
            async with time_limit(_TURN):
                await self._turn(peer)
        except TimeoutError:
            raise self._limited(peer) from None
        key = await self._ask(lambda: self._look_up_patiently(source, name))
        self.counters.looked_up += 1
        self.counters.update_keys += 1
        return _update_key(key, by_client=not client, epoch=epoch)

    async def stock_for_updates(self, session: Session) -> int | None:
        """The number of keys that can be drawn for this peer.

        Raises:
            KeySourceError: the key source cannot say.
        """
        return (await self._status(session)).stored

    async def _status(self, session: Session) -> SourceStatus:
        source = self._peer_of(session).source
        try:
            async with time_limit(self._limits.timeout):
                return await source.status()
        except TimeoutError:
            raise self._silent() from None

    async def draw_for_pad(self, session: Session) -> tuple[bytes, Secret]:
        """A new key for the one-time pad of our sending direction; see
        :class:`~hybridkex.tls.one_time_pad.PadSource`.

        Raises:
            KeySourceError: the source returned no key, or none that is suitable for a one-time pad.
        """
        peer = self._peer_of(session)
        if isinstance(peer.source, CombinedSource):
            raise KeyUnauthorized(_COMBINED)
        key = await self._draw(peer)
        self.counters.pad_keys += 1
        try:
            return identity_of(key.name), _for_pad(key)
        except ConfigError as error:
            raise KeySourceUnavailable(
                f"the key source returned an unusable key: {error}"
            ) from None

    async def look_up_for_pad(self, identity: bytes, session: Session) -> Secret:
        """The key that the peer has appended to the one-time pad of its direction.

        This waits if the peer names keys faster than allowed, and while our key source does not
        answer: the caller sets a time limit.

        Raises:
            KeySourceError: it is not one of our keys for this session, or is no longer available.
        """
        peer, name = self._peer_of(session), name_of(identity)
        if name is None or not is_known(peer.source, name):
            raise KeyUnknown("the key is not for this session")
        if len(name) != 1:
            raise KeyUnauthorized(_COMBINED)
        self._check_new(name)
        self._remember(name)
        await self._turn(peer)
        wait = self._limits.retry_after
        while True:
            try:
                key = await self._ask(lambda: self._look_up_patiently(peer.source, name))
                break
            except KeySourceUnavailable as error:
                self._lines.log(logging.WARNING, "a key of a one-time pad is due: %s", error)
                await sleep(max(wait, error.retry_after or 0.0))
                wait = min(2 * wait, self._limits.timeout)
        self.counters.looked_up += 1
        self.counters.pad_keys += 1
        return _for_pad(key)

    async def stock_for_pads(self, session: Session) -> int | None:
        """The number of bytes of key that can be drawn for this peer.

        Raises:
            KeySourceError: the key source cannot say.
        """
        status = await self._status(session)
        return status.stored * (status.key_bits // 8)

    def _peer_of(self, session: Session) -> QkdPeer:
        """The peer whose keys are used for the updates of a session: the one whose key is in the
        handshake, the one that the certificate names, or the only one.

        Raises:
            KeyUnknown: nothing tells which of several peers it is.
        """
        used = self._used(session)
        if used is not None and any(used.peer is one for one in self._peers):
            return used.peer
        named = [one for one in self._peers if one.names and session.peer_is_one_of(one.names)]
        fitting = named or (self._peers if len(self._peers) == 1 else ())
        if len(fitting) != 1 or (fitting[0].names and not named):
            raise KeyUnknown("no QKD keys are shared with this peer")
        return fitting[0]

    def _recognise(self, identity: bytes) -> tuple[QkdPeer, KeyReference] | None:
        """The peer whose key an identity names; this only compares names."""
        imported = ImportedIdentity.decode(identity)
        name = name_of(imported.external_identity) if imported is not None else None
        if imported is None or name is None:
            return None
        for peer in self._peers:
            source = peer.source
            expected = context_of(name, master_sae=source.peer_sae, slave_sae=source.local_sae)
            if imported.context == expected and is_known(source, name):
                return peer, name
        return None

    async def _look_up_once(self, peer: QkdPeer, name: KeyReference) -> QkdKey:
        self._check_new(name)
        if not self._budgets[id(peer)].take():
            raise self._limited(peer)
        self._remember(name)
        return await self._ask(lambda: self._look_up_patiently(peer.source, name))

    def _limited(self, peer: QkdPeer) -> KeySourceUnavailable:
        self.counters.limited += 1
        return KeySourceUnavailable(f"too many look-ups for {peer.source.peer_sae}")

    async def _turn(self, peer: QkdPeer) -> None:
        """Wait until a session with this peer may look up a key."""
        while not self._session_budgets[id(peer)].take():
            await sleep(self._limits.retry_after)

    async def _draw(self, peer: QkdPeer) -> QkdKey:
        """Request a new key. For any purpose, a key that was used before is refused.

        Raises:
            KeySourceError: the source returned no key, or one that was used before.
        """
        key = await self._ask(lambda: draw_key(peer.source))
        if any(part in self._asked for part in key.name):
            self.counters.failed += 1
            raise KeySourceUnavailable(
                "our key source returned the same key twice; see the log of our KME, and check "
                "whether its store was restored from a copy"
            )
        self._remember(key.name)
        self.counters.drawn += 1
        return key

    def _check_new(self, name: KeyReference) -> None:
        if any(part in self._asked for part in name):
            self.counters.repeated += 1
            raise KeyConsumed(
                "this key was used before: the message is a replay, or the peer's keys were "
                "restored from a copy"
            )

    def _remember(self, name: KeyReference) -> None:
        for part in name:
            self._asked[part] = None
            if len(self._asked) > self._limits.remembered:
                self._asked.popitem(last=False)

    async def _look_up_patiently(self, source: KeySource, name: KeyReference) -> QkdKey:
        """Look up a key, with retries: the KMEs may be slightly out of step, as the key is new."""
        wait = self._limits.retry_after
        for _ in range(self._limits.retries):
            try:
                return await look_up_key(source, name)
            except KeyNotYetAvailable:
                await sleep(wait)
                wait *= 2
        return await look_up_key(source, name)

    def _silent(self) -> KeySourceUnavailable:
        return KeySourceUnavailable(
            f"our key source timed out (its time limit or ours, {self._limits.timeout:g} s): check "
            "whether our KME runs, and see its log"
        )

    async def _ask(self, call: Callable[[], Awaitable[QkdKey]]) -> QkdKey:
        """One call, with its time limit."""
        try:
            async with time_limit(self._limits.timeout):
                return await call()
        except TimeoutError:
            self.counters.failed += 1
            raise self._silent() from None
        except KeySourceError:
            self.counters.failed += 1
            raise

    def authorize(self, session: Session, missing: str | None) -> Session:
        """The session with its QKD keys, or with the reason for having none.

        Raises:
            PolicyRefused: a QKD key is required, or it must be a key of the peer with these names.
        """
        used = self._used(session)
        self._check_names(session, used)
        if used is not None:
            self.counters.sessions += 1
            return replace(
                session,
                qkd_key_ids=tuple(str(part.key_id) for part in used.name),
                qkd_sources=tuple(f"{part.master_kme} > {part.slave_kme}" for part in used.name),
            )
        if session.policy.psk is Requirement.REQUIRE:
            raise PolicyRefused(
                "our policy requires a QKD key, but the session has another PSK",
                Reason.QKD_KEY_REQUIRED,
            )
        if session.policy.psk is Requirement.OFF:
            return session
        self.counters.fallbacks += 1
        reason = missing or "the peer did not offer or did not select one"
        self._lines.log(logging.WARNING, "a session without a QKD key: %s", reason)
        return replace(session, qkd_fallback=reason)

    def _used(self, session: Session) -> "_Origin | None":
        """The QKD key of the session: that of this handshake, or the one named in the ticket."""
        if isinstance(session.psk_origin, _Origin):
            return session.psk_origin
        if not session.resumed or session.psk_identity is None:
            return None
        name = name_of(session.psk_identity)
        if name is None:
            return None
        for peer in self._peers:
            ours, theirs = peer.source.local_sae, peer.source.peer_sae
            for master, slave in ((ours, theirs), (theirs, ours)):
                if session.psk_context == context_of(name, master_sae=master, slave_sae=slave):
                    return _Origin(peer, name)
        return None

    def _check_names(self, session: Session, used: "_Origin | None") -> None:
        if session.peer_credential is None:
            return
        for peer in self._peers:
            if not peer.names:
                continue
            belongs = session.peer_is_one_of(peer.names)
            if belongs and (used is None or used.peer is not peer):
                raise PolicyRefused(
                    f"{peer.source.peer_sae} must use one of its own QKD keys",
                    Reason.QKD_KEY_REQUIRED,
                )
            if not belongs and used is not None and used.peer is peer:
                raise PolicyRefused(
                    f"a QKD key of {peer.source.peer_sae} was used with the certificate of another "
                    "peer",
                    Reason.QKD_KEY_REQUIRED,
                )


def _for_pad(key: QkdKey) -> Secret:
    """The bytes of a key for a one-time pad: the key of a single link, unchanged."""
    if len(key.name) != 1:
        raise KeyUnauthorized(_COMBINED)
    if len(key.key) < _LEAST_PAD_KEY:
        raise KeyUnauthorized(f"a key for a one-time pad must have {_LEAST_PAD_KEY} bytes or more")
    return key.key


def _update_key(key: QkdKey, *, by_client: bool, epoch: int) -> UpdateKey:
    return UpdateKey(
        psk=as_update_psk(key, by_client=by_client, epoch=epoch),
        key_ids=key.key_ids,
        sources=tuple(f"{master} > {slave}" for master, slave in key.kmes),
    )


@dataclass(frozen=True)
class _Origin:
    """The peer and the key that a PSK comes from."""

    peer: QkdPeer
    name: KeyReference
