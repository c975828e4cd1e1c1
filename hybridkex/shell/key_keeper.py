"""KeyKeeper: renews the keys of one live connection, for every shell.

A task of its own, beside those that send and receive: it waits for the schedule and for the key
source, so that data never waits for either. It asks the engine, and the shell carries the bytes. It
also handles its own errors, so that each shell only starts it, stops it and passes events on.
"""

import logging
import math
import random
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from typing import Final

from hybridkex.errors import (
    HybridkexError,
    InternalError,
    KeySourceError,
    LocalStateError,
    PeerError,
    PolicyRefused,
)
from hybridkex.net.event_loop import Background, Event, current_time, time_limit
from hybridkex.net.log import BoundedLog
from hybridkex.reasons import Reason
from hybridkex.shell.pad_keeper import PadKeeper
from hybridkex.text import get_logger
from hybridkex.tls.config import ClientConfig, ServerConfig
from hybridkex.tls.connection import ClientConnection, ServerConnection
from hybridkex.tls.epochs import Epoch, KeyUpdates, UpdateKey
from hybridkex.tls.events import (
    ApplicationData,
    EpochBegan,
    PadKeyWanted,
    UpdateDeclined,
    UpdateKeyWanted,
    UpdateWanted,
)
from hybridkex.tls.events import Event as EngineEvent
from hybridkex.tls.fresh_keys import FreshKeys, UpdateKeySource
from hybridkex.tls.one_time_pad import OneTimePad, PadSource
from hybridkex.tls.policy import Requirement
from hybridkex.tls.session import Session

__all__ = ["KeyKeeper"]

_log: Final = get_logger("hybridkex.fresh_keys")
_LINES: Final = BoundedLog(_log)
"""Rate-limited, because any peer can cause these lines."""

_FIRST_RETRY: Final = 0.5
_LAST_RETRY: Final = 30.0
"""Seconds between attempts, while the key source or the peer has no key."""


class KeyKeeper:
    """Renews the keys of one connection, in a task beside the caller's, until :meth:`stop`.

    Args:
        config: the configuration of the connection.
        connection: its engine, with the handshake complete.
        send: puts what the engine has queued on the transport.
        fail: ends the connection with an error, after the engine has queued the alert.
        gone: the exceptions by which ``send`` and ``fail`` report that the transport has ended. The
            task that sends or receives next learns the reason.
        pads_changed: called when there is more of a one-time pad, or no more to hope for.
    """

    def __init__(
        self,
        config: ClientConfig | ServerConfig,
        connection: ClientConnection | ServerConnection,
        send: Callable[[], Awaitable[None]],
        fail: Callable[[PeerError], Awaitable[None]],
        gone: tuple[type[Exception], ...] = (),
        pads_changed: Callable[[], None] = lambda: None,
    ) -> None:
        self._connection = connection
        self._send = send
        self._fail = fail
        self._gone = gone
        self._client = isinstance(config, ClientConfig)
        self._schedule = config.fresh_keys
        self._on_epoch = config.on_epoch
        policy = config.policy_in_force
        self._required = policy.fresh_keys is Requirement.REQUIRE
        self._qkd_required = policy.fresh_qkd is Requirement.REQUIRE
        source = config.psk_source
        self._source = source if isinstance(source, UpdateKeySource) else _NoKeys()
        self.extended: Final = connection.session.key_updates is not KeyUpdates.STANDARD
        """Whether the peers agreed on Extended Key Update."""
        self._lines = BoundedLog(_log)
        """For the epochs of this connection, whose number the peer can choose."""
        self.pads: Final = self._pad_keeper(config, pads_changed)
        """The keys of the one-time pads, where they were negotiated."""
        self._wake = Event()
        self._wanted: UpdateKeyWanted | None = None
        self._bytes = 0
        self._why: str | None = None
        """Why an update is due now."""
        self._due = math.inf
        self._unplanned = True
        self._late = math.inf
        """The time at which an update that is due is late."""
        self._retry = _FIRST_RETRY
        self._not_before = -math.inf
        self._task: Final = Background(self._run)

    @classmethod
    def needed(
        cls,
        config: ClientConfig | ServerConfig,
        connection: ClientConnection | ServerConnection,
    ) -> bool:
        """Whether the peers agreed on Extended Key Update, or the configuration has a schedule."""
        extended = connection.session.key_updates is not KeyUpdates.STANDARD
        return extended or config.fresh_keys is not None

    def stop(self) -> None:
        """End the task where it waits next."""
        self._task.cancel()
        if self.pads is not None:
            self.pads.stop()

    def _pad_keeper(
        self, config: ClientConfig | ServerConfig, changed: Callable[[], None]
    ) -> PadKeeper | None:
        if self._connection.pad is None:
            return None
        assert isinstance(config.psk_source, PadSource)  # or the policy would not have it

        def tell(error: PeerError | None) -> None:
            changed()
            self.wake()
            if error is not None:  # at once: our own task may wait for the key source
                Background(partial(self._end, error))

        pads = config.one_time_pad or OneTimePad()
        return PadKeeper(pads, self._connection, config.psk_source, tell)

    # --- what the shell tells -----------------------------------------------------------------

    def saw(self, event: EngineEvent) -> None:
        """Take notice of an event of the engine."""
        match event:
            case ApplicationData(data):
                self.count(len(data))
            case PadKeyWanted():
                assert self.pads is not None  # or the engine would not ask
                self.pads.saw(event)
                return
            case UpdateKeyWanted():
                self._wanted = event
            case UpdateWanted():
                self._want("key limit")
            case UpdateDeclined(reason):
                self._lines.log(logging.INFO, "the peer has declined a key update: %s", reason)
                self._try_later()
            case EpochBegan(epoch):
                self._began(epoch)
            case _:
                return
        if not isinstance(event, ApplicationData):
            self.wake()

    def count(self, size: int) -> None:
        """Count bytes of application data, sent or received."""
        self._bytes += size
        schedule = self._schedule
        if schedule is None or schedule.after_bytes is None or self._bytes < schedule.after_bytes:
            return
        if self._why is None:
            self._want("after_bytes")
            self.wake()

    def update(self) -> None:
        """Renew the keys now."""
        self._want("asked")
        self._not_before = -math.inf
        self.wake()

    def wake(self) -> None:
        """Wake the task: an event has come, or the engine has something to send."""
        self._wake.set()

    # --- the task -----------------------------------------------------------------------------

    async def _run(self) -> None:
        """Renew keys until cancelled, or until the connection has ended."""
        try:
            await self._renew()
        except self._gone:
            pass
        except LocalStateError as error:
            if not self._connection.failed:
                _LINES.log(logging.WARNING, "the keys are not renewed any more: %s", error)
        except Exception:
            _log.exception("the keys are not renewed any more")
            await self._end(InternalError("the renewal of the keys has failed"))

    async def _end(self, error: PeerError) -> None:
        """End the connection."""
        if not self._connection.close_sent:  # nothing follows a close_notify (section 6.1)
            self._connection.abort(error)
        with suppress(*self._gone):
            await self._fail(error)

    async def _renew(self) -> None:
        while True:
            self._wake = Event()
            if self._connection.close_sent or self._connection.close_received:
                self._due = self._late = math.inf
                self._why = None
            if self._wanted is not None:
                await self._look_up(self._wanted)
            if self._connection.has_data_to_send:
                await self._send_in_time()
            if self._unplanned:
                await self._plan()
            now = current_time()
            if now >= self._late:
                await self._missed()
                continue
            if self._why is None and now >= self._due:
                self._want("every")
            if self._why is not None and now >= self._not_before and not self._under_way:
                await self._start(self._why)
                continue
            await self._wait(now)

    @property
    def _under_way(self) -> bool:
        return self.extended and self._connection.update_under_way

    async def _wait(self, now: float) -> None:
        until = min(self._due if self._why is None else math.inf, self._late)
        if self._why is not None and not self._under_way:
            until = min(until, self._not_before)
        try:
            async with time_limit(max(0.0, until - now)):
                await self._wake.wait()
        except TimeoutError:
            pass

    def _want(self, why: str) -> None:
        """An update is due now; it is late after the deadline."""
        self._why = self._why or why
        if self._schedule is not None and self._late == math.inf:
            self._late = current_time() + self._schedule.deadline

    def _try_later(self) -> None:
        """Wait longer after each attempt, but try once more shortly before the deadline."""
        now = current_time()
        soon = max(now + _FIRST_RETRY, self._late - 1.0)
        self._not_before = min(now + self._retry, soon)
        self._retry = min(2 * self._retry, _LAST_RETRY)

    async def _start(self, why: str) -> None:
        """Draw a key, if the update takes one, and send the request."""
        connection = self._connection
        if not self.extended:
            connection.update_keys(request_peer=True)
            await self._send()
            self._done()
            self._unplanned = True
            return
        key, missing = None, None
        if connection.updates_take_keys:
            key, missing = await self._draw()
            if key is None and self._qkd_required:
                _LINES.log(logging.WARNING, "no key update now: %s", missing)
                self._try_later()
                return
        if connection.close_sent or connection.close_received or connection.update_under_way:
            return  # The peer was faster; the key is not used for anything else.
        connection.start_update(key, missing=missing, why=why)
        await self._send_in_time()

    async def _draw(self) -> tuple[UpdateKey | None, str | None]:
        session = self._connection.session
        try:
            key = await self._source.draw_for_update(
                session, client=self._client, epoch=session.epoch + 1
            )
        except KeySourceError as error:
            return None, str(error)
        return key, None

    async def _look_up(self, wanted: UpdateKeyWanted) -> None:
        """Answer the peer's request."""
        self._wanted = None
        key, missing = None, None
        try:
            key = await self._source.look_up_for_update(
                wanted.identity, self._connection.session, client=self._client, epoch=wanted.epoch
            )
        except KeySourceError as error:
            missing = str(error)
            _LINES.log(
                logging.WARNING,
                "the QKD key of the peer's key update is not available: %s",
                error,
            )
        try:
            self._connection.provide_update_key(key, missing)
        except LocalStateError as error:
            _LINES.log(logging.WARNING, "the peer's key update cannot be answered: %s", error)
        except PeerError as error:
            await self._end(error)

    async def _send_in_time(self) -> None:
        """Send; if updates are required, give up once the update is late."""
        if not self._required:
            await self._send()
            return
        try:
            async with time_limit(max(0.0, self._late - current_time())):
                await self._send()
        except TimeoutError:
            await self._missed()

    async def _missed(self) -> None:
        """No update was completed before its deadline."""
        self._late = math.inf
        if not self._required:
            _LINES.log(
                logging.WARNING, "a key update is late; the session goes on under its old keys"
            )
            return
        _LINES.log(
            logging.WARNING, "a key update is late, and the policy requires it: the session ends"
        )
        await self._end(
            PolicyRefused(
                "no key update was completed before its deadline, and our policy requires one",
                Reason.FRESH_KEYS_LATE,
            )
        )

    # --- the schedule -------------------------------------------------------------------------

    def _began(self, epoch: Epoch) -> None:
        legs = " + ".join((epoch.group, *(f"QKD {one}" for one in epoch.qkd_key_ids)))
        self._lines.log(
            logging.INFO,
            "the session is in epoch %d (%s): %s",
            *(epoch.number, epoch.why, legs),
        )
        if epoch.qkd_missing is not None:
            _LINES.log(
                logging.WARNING,
                "epoch %d has no QKD key: %s",
                *(epoch.number, epoch.qkd_missing),
            )
        self._done()
        self._unplanned = True
        if self._on_epoch is not None:
            self._on_epoch(self._connection.session)

    def _done(self) -> None:
        self._why = None
        self._late = math.inf
        self._retry, self._not_before = _FIRST_RETRY, -math.inf
        self._bytes = 0

    async def _plan(self) -> None:
        """Set the time of the next update: a little earlier at random, later if keys are scarce."""
        self._unplanned = False
        schedule = self._schedule
        if schedule is None:
            self._due = math.inf
            return
        interval = schedule.every * (1 - schedule.jitter * random.random())  # no secret
        self._due = current_time() + interval * await self._stretch(schedule)

    async def _stretch(self, schedule: FreshKeys) -> float:
        if not self._connection.updates_take_keys:
            return 1.0
        try:
            stock = await self._source.stock_for_updates(self._connection.session)
        except HybridkexError:
            return 1.0  # It may have keys all the same.
        if stock is None or stock >= schedule.low_stock:
            return 1.0
        return min(schedule.stretch, schedule.low_stock / max(stock, 1))


class _NoKeys:
    """The :class:`UpdateKeySource` of a configuration that has none."""

    async def draw_for_update(self, session: Session, *, client: bool, epoch: int) -> UpdateKey:
        raise KeySourceError("the PSK source supplies no keys for key updates")

    async def look_up_for_update(
        self, identity: bytes, session: Session, *, client: bool, epoch: int
    ) -> UpdateKey:
        raise KeySourceError("the PSK source supplies no keys for key updates")

    async def stock_for_updates(self, session: Session) -> int | None:
        return 0
