"""The rotator: when the two ends agree on a pre-shared key, and what happens while that fails.

The responder installs a new key first and confirms it, then the initiator installs it. A WireGuard
handshake in between fails and is repeated within seconds, while the previous session lives for up
to
:data:`~hybridkex.apps.wireguard.tunnel.REJECT_AFTER` seconds: no packet is lost.

Fail closed: a rotator starts by installing a random key, so that no WireGuard handshake succeeds
before the first rotation, and does so again when the agreed key is older than
:attr:`RotationPolicy.max_age`. Session keys that exist at that moment end by WireGuard's own limit,
180 s at most. :attr:`RotationPolicy.fresh_psk` chooses between that and a warning.
"""

import logging
import os
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from enum import Enum
from typing import Final, Literal

import trio

from hybridkex import Requirement, Secret
from hybridkex.apps.backoff import Backoff
from hybridkex.apps.wireguard.tunnel import REKEY_AFTER, Tunnel, Uncertain
from hybridkex.combiner import ExchangeConfig, Exchanged, exchange
from hybridkex.errors import (
    ConfigError,
    HybridkexError,
    IllegalParameter,
    LocalStateError,
    TruncationError,
)
from hybridkex.net.log import BoundedLog
from hybridkex.text import get_logger, said

LABEL: Final = b"hybridkex wireguard psk v2"
"""The label of the exchange between two ends of this library."""

_INSTALLED: Final = b"\x01"
_INTERVALS: Final = 3
"""Default age limit, in intervals: tolerates two failed rotations."""
_CHECK_EVERY: Final = 10.0
"""Seconds between two checks of the key's age and of the interface."""

log = get_logger("hybridkex.apps.wireguard")

Clock = Callable[[], float]
Connect = Callable[[], Awaitable[trio.abc.Stream]]


def boot_time() -> float:
    """A clock in seconds that includes time in suspend, like WireGuard's own timers."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


@dataclass(frozen=True, kw_only=True)
class RotationPolicy:
    """When to rotate, and what applies while rotations fail.

    Raises:
        ConfigError: a value cannot work.
    """

    interval: float = REKEY_AFTER
    """Seconds between two rotations; the initiator decides."""
    max_age: float | None = None
    """Seconds for which an agreed key is fresh; three intervals by default."""
    fresh_psk: Requirement = Requirement.REQUIRE
    """``REQUIRE``: without a fresh key no WireGuard handshake succeeds. ``PREFER``: a warning is
    logged and the tunnel continues with the installed key."""
    initial: Literal["random", "keep"] | None = None
    """What to do before the first rotation: install a random key, or keep what is installed. By
    default ``random`` where a fresh key is required, ``keep`` where it is preferred."""

    def __post_init__(self) -> None:
        if not 0 < self.interval < float("inf"):
            raise ConfigError("the rotation interval must be positive")
        if not self.interval <= self.age_limit < float("inf"):
            raise ConfigError("the age limit of a key must not be shorter than the interval")
        if self.fresh_psk is Requirement.OFF:
            raise ConfigError("fresh_psk must be require or prefer, not off")
        if self.initial not in (None, "random", "keep"):
            raise ConfigError(f"initial must be random or keep, not {self.initial!r}")

    @property
    def age_limit(self) -> float:
        """:attr:`max_age`, or its default."""
        return _INTERVALS * self.interval if self.max_age is None else self.max_age

    @property
    def random_at_start(self) -> bool:
        if self.initial is None:
            return self.fresh_psk is Requirement.REQUIRE
        return self.initial == "random"


class _State(Enum):
    UNKNOWN = "it is not known which pre-shared key is in force"
    ABSENT = "the tunnel has NO pre-shared key"
    CONFIGURED = "the pre-shared key that was configured before stays in force"
    RANDOM = "a random pre-shared key blocks the tunnel until a rotation succeeds"
    AGREED = "the pre-shared key agreed {age:.0f} s ago is in force"


@dataclass(frozen=True)
class _InForce:
    state: _State
    since: float
    key: Secret | None = None


class Rotator:
    """Keeps the pre-shared key of one tunnel fresh, at one end.

    Call :meth:`start`, then run :meth:`watch` beside :meth:`run_initiator`, or beside a listener
    that calls :meth:`respond` for each connection.

    Args:
        tunnel: the tunnel whose key it rotates.
        config: this end of the exchange; ``label`` is usually :data:`LABEL`, ``length`` is 32.
        policy: when to rotate, and what applies while that fails.
        on_rotated: called after each rotation.
        on_overdue: called with the policy's requirement when a key has become too old.
        clock: in seconds, including time in suspend.

    Raises:
        ConfigError: the exchange's key does not have 32 bytes.
    """

    def __init__(
        self,
        tunnel: Tunnel,
        config: ExchangeConfig,
        policy: RotationPolicy | None = None,
        *,
        on_rotated: Callable[[Exchanged], object] | None = None,
        on_overdue: Callable[[Requirement], object] | None = None,
        clock: Clock = boot_time,
    ) -> None:
        if config.length != 32:
            raise ConfigError("a WireGuard pre-shared key must have 32 bytes")
        self.tunnel: Final = tunnel
        self.policy: Final = policy or RotationPolicy()
        self._config = config
        self._on_rotated = on_rotated or (lambda _: None)
        self._on_overdue = on_overdue or (lambda _: None)
        self._clock = clock
        self._lock = trio.Lock()
        self._in_force = _InForce(_State.UNKNOWN, clock())
        self._complained = ""
        self._lines = BoundedLog(log)  # the peer may want another key at any time
        self._begun = self._newest = 0

    @property
    def standing(self) -> str:
        """Say which key is in force, for a message."""
        age = self._clock() - self._in_force.since
        return self._in_force.state.value.format(age=age)

    async def start(self) -> None:
        """Check that the peer exists, and apply :attr:`RotationPolicy.initial`.

        Raises:
            LocalStateError: ``wg`` fails, or the interface has no such peer.
        """
        present = await self.tunnel.read_psk()
        if self.policy.random_at_start:
            await self._install(Secret(os.urandom(32)), _State.RANDOM)
        else:
            state = _State.ABSENT if present is None else _State.CONFIGURED
            self._in_force = _InForce(state, self._clock())
        log.log(
            logging.WARNING if self._in_force.state is _State.ABSENT else logging.INFO,
            "%s: before the first rotation: %s",
            self.tunnel.interface,
            self.standing,
        )

    # --- rotations --------------------------------------------------------------------------

    async def run_initiator(self, connect: Connect) -> None:
        """Rotate every interval, forever; after a failure sooner, with back-off.

        Args:
            connect: opens a stream to the responder, or raises a :class:`HybridkexError`.
        """
        interval = self.policy.interval
        backoff = Backoff(first=min(1.0, interval), most=interval)
        while True:
            try:
                await self.initiate(connect)
            except HybridkexError as error:
                wait = backoff.next()
                log.warning(
                    "%s: rotation failed: %s; %s; next try in %.1f s",
                    *(self.tunnel.interface, error, self.standing, wait),
                )
                await trio.sleep(wait)
            else:
                backoff.reset()
                await trio.sleep(interval)

    async def initiate(self, connect: Connect) -> Exchanged:
        """One rotation.

        Raises:
            HybridkexError: as of ``connect`` and :func:`~hybridkex.combiner.exchange`;
                :class:`~hybridkex.errors.LocalStateError` if ``wg`` fails. :attr:`standing` says
                which key is in force then.
        """
        config = replace(self._config, role="initiator")
        async with await connect() as stream:
            result = await exchange(stream, config)
            word = b""
            try:
                with trio.move_on_after(config.time_limit):
                    word = bytes(await stream.receive_some(1))
            except trio.BrokenResourceError as error:
                raise TruncationError(
                    f"the responder did not confirm that it installed the key: {said(error)}"
                ) from None
            if not word:
                raise TruncationError(
                    "the responder did not confirm that it installed the key; see its log"
                )
            if word != _INSTALLED:
                raise IllegalParameter("the responder's message is not a confirmation")
            async with self._lock:
                await self._install(result.key, _State.AGREED)
        return self._rotated(result)

    async def respond(
        self, stream: trio.abc.Stream, *, on_authenticated: Callable[[], None] | None = None
    ) -> Exchanged:
        """One rotation, at the responder. The stream is left open.

        Args:
            stream: an accepted connection, not yet authenticated.
            on_authenticated: called once the peer is authenticated.

        Raises:
            HybridkexError: as of :meth:`initiate`. The new key may be in force: see
                :attr:`standing`.
        """
        self._begun += 1
        number = self._begun
        config = replace(self._config, role="responder")
        result = await exchange(stream, config, on_authenticated=on_authenticated)
        async with self._lock:
            if number < self._newest:
                raise LocalStateError("a newer exchange with the peer has begun")
            await self._install(result.key, _State.AGREED)
            self._newest = number
        try:
            await stream.send_all(_INSTALLED)
        except trio.BrokenResourceError as error:
            raise TruncationError(
                f"the peer disconnected and may not have installed the key: {said(error)}"
            ) from None
        return self._rotated(result)

    def _rotated(self, result: Exchanged) -> Exchanged:
        legs = [*result.parts, *(["QKD"] if result.qkd_key_ids else [])]
        self._lines.log(
            logging.INFO,
            "%s: new pre-shared key with %s, from %s",
            *(self.tunnel.interface, self._config.peer, ", ".join(legs)),
        )
        self._on_rotated(result)
        return result

    async def _install(self, key: Secret, state: _State) -> None:
        try:
            await self.tunnel.set_psk(key)
        except Uncertain:
            self._in_force = _InForce(_State.UNKNOWN, self._clock())
            raise
        self._in_force = _InForce(state, self._clock(), key)
        self._complained = ""

    # --- age --------------------------------------------------------------------------------

    async def watch(self) -> None:
        """Apply the age limit, and restore the key if another program replaced it; runs forever."""
        while True:
            await trio.sleep(min(_CHECK_EVERY, self.policy.age_limit / 10))
            try:
                async with self._lock:
                    await self._check()
            except LocalStateError as error:
                self._complain(str(error))

    async def _check(self) -> None:
        current = self._in_force
        if current.key is not None and await self.tunnel.read_psk() != current.key:
            await self.tunnel.set_psk(current.key)
            log.warning(
                "%s: another program had replaced the pre-shared key; it is restored: %s",
                *(self.tunnel.interface, self.standing),
            )
        if current.state is _State.RANDOM:
            return
        if self._clock() - current.since < self.policy.age_limit:
            return
        if self.policy.fresh_psk is Requirement.PREFER:
            if self._complain("no rotation has succeeded in time"):
                self._on_overdue(Requirement.PREFER)
            return
        await self._install(Secret(os.urandom(32)), _State.RANDOM)
        log.error(
            "%s: no rotation has succeeded for %.0f s: the tunnel is stopped; %s",
            *(self.tunnel.interface, self.policy.age_limit, self.standing),
        )
        self._on_overdue(Requirement.REQUIRE)

    def _complain(self, what: str) -> bool:
        """Log a persistent condition once, until a key is installed."""
        if what == self._complained:
            return False
        self._complained = what
        log.warning("%s: %s: %s", self.tunnel.interface, what, self.standing)
        return True
