"""KeyRenewer: renews the keys of one live connection, for every shell.

A separate task, in addition to those that send and receive: it waits for the schedule, so that data
never does. It calls the key source by an :class:`~hybridkex.shell.inquiry.Inquiry`, so that neither
the deadline nor the peer's request waits for the result. It calls the engine, and the shell
transports the bytes. It also handles its own errors, so that each shell only starts it, stops it
and passes events on.
"""

import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from typing import Final, TypeAlias

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
from hybridkex.shell.inquiry import Inquiry
from hybridkex.shell.pad_filler import PadFiller
from hybridkex.shell.update_timer import AT_ONCE, UpdateTimer
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

_log: Final = get_logger("hybridkex.fresh_keys")
_LINES: Final = BoundedLog(_log)
"""Rate-limited, because any peer can cause these lines."""

_DECLINED: Final = {
    "key_not_found": (
        "the peer declined it: it did not get the QKD key from its KME; see the log of that KME"
    ),
    "key_required": "the peer declined it: its policy requires a QKD key, and we named none",
}

_Found: TypeAlias = tuple[UpdateKey | None, str | None]
"""A QKD key, or why there is none."""


class KeyRenewer:
    """Renews the keys of one connection, in a separate task, until :meth:`stop`.

    Args:
        config: the configuration of the connection.
        connection: its engine, with the handshake complete.
        send: writes the bytes that the engine has queued to the transport.
        fail: ends the connection with an error, after the engine has queued the alert.
        gone: the exceptions by which ``send`` and ``fail`` report that the transport has ended. The
            task that sends or receives next reports the reason.
        pads_changed: called when a one-time pad has grown, or will not grow any more.
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
        self._timer = UpdateTimer(config.fresh_keys)
        self._on_epoch = config.on_epoch
        policy = config.policy_in_force
        self._required = policy.fresh_keys is Requirement.REQUIRE
        self._qkd_required = policy.fresh_qkd is Requirement.REQUIRE
        source = config.psk_source
        self._source = source if isinstance(source, UpdateKeySource) else _NoKeys()
        self.extended: Final = connection.session.key_updates is not KeyUpdates.STANDARD
        """Whether the peers agreed on Extended Key Update."""
        self._lines = BoundedLog(_log)
        """The log of the epochs of this connection; the peer can cause any number of them."""
        self.pads: Final = self._pad_filler(config, pads_changed)
        """The keys of the one-time pads, if these were negotiated."""
        self._wake = Event()
        self._wanted: UpdateKeyWanted | None = None
        self._looked_up: Inquiry[_Found] | None = None
        """The key that the peer has named."""
        self._drawn: Inquiry[_Found] | None = None
        """The key for our own update."""
        self._stretched: Inquiry[float] | None = None
        """The factor by which a low stock of keys increases the interval."""
        self._asked_for = 0
        """The epoch that a program has asked for."""
        self._unplanned = True
        self._in_a_row = 0
        """The number of KeyUpdates that we have sent without data of ours between them."""
        self._task: Final = Background(self._run, cancelled=self._cancelled)

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
        """End the task at its next checkpoint."""
        self._task.cancel()
        for inquiry in (self._looked_up, self._drawn, self._stretched):
            if inquiry is not None:
                inquiry.cancel()
        if self.pads is not None:
            self.pads.stop()

    def _pad_filler(
        self, config: ClientConfig | ServerConfig, changed: Callable[[], None]
    ) -> PadFiller | None:
        if self._connection.pad is None:
            return None
        assert isinstance(config.psk_source, PadSource)  # otherwise the policy would not require it

        def on_change(error: PeerError | None) -> None:
            changed()
            self.wake()
            if error is not None:  # at once: our own task may be sending
                Background(partial(self._end, error))

        pads = config.one_time_pad or OneTimePad()
        return PadFiller(pads, self._connection, config.psk_source, on_change)

    # --- calls of the shell -------------------------------------------------------------------

    def saw(self, event: EngineEvent) -> None:
        match event:
            case ApplicationData(data):
                self.received(len(data))
            case PadKeyWanted():
                assert self.pads is not None  # otherwise the engine would not ask
                self.pads.saw(event)
                return
            case UpdateKeyWanted():
                self._wanted = event
            case UpdateWanted():
                self._timer.want("key limit")
            case UpdateDeclined(reason):
                self._lines.log(logging.INFO, "the peer has declined a key update: %s", reason)
                self._timer.try_later(_DECLINED[reason])
            case EpochBegan(epoch):
                self._began(epoch)
            case _:
                return
        if not isinstance(event, ApplicationData):
            self.wake()

    def received(self, size: int) -> None:
        """Count bytes of application data from the peer."""
        if self._timer.count(size):
            self.wake()

    def sent(self, size: int) -> None:
        """Count bytes of application data from us."""
        self._in_a_row = 0
        self.received(size)  # the schedule counts both directions
        if self._connection.update_wanted and self._timer.why is None and not self._under_way:
            self._timer.want("key limit")
            self.wake()

    def update(self) -> None:
        """Renew the keys now; if an update is under way, once more after it."""
        # The connection's epoch may be ahead of the epochs whose events have arrived here.
        self._asked_for = self._connection.session.epoch + (2 if self._under_way else 1)
        self._timer.want("asked", at_once=True)
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
                _LINES.log(logging.WARNING, "the keys are no longer renewed: %s", error)
        except Exception:
            _log.exception("the keys are no longer renewed")
            await self._end(InternalError("the renewal of the keys has failed"))

    async def _cancelled(self) -> None:
        await self._end(InternalError("the renewal of the keys was cancelled"))

    async def _end(self, error: PeerError) -> None:
        self._connection.abort(error)
        with suppress(*self._gone):
            await self._fail(error)

    async def _renew(self) -> None:
        while True:
            self._wake = Event()
            if self._connection.close_sent or self._connection.close_received:
                self._timer.close()
            await self._answer()
            if self._connection.has_data_to_send:
                await self._send_in_time()
            self._plan()
            now = current_time()
            if now >= self._timer.late:
                await self._missed()
                continue
            self._timer.check(now)
            why = self._timer.why
            if why is not None and not self._under_way and self._may_start(now):
                await self._start(why)
                continue
            await self._wait(now)

    @property
    def _under_way(self) -> bool:
        return self.extended and self._connection.update_under_way

    async def _wait(self, now: float) -> None:
        until = self._timer.next_time(idle=not self._under_way and self._drawn is None)
        try:
            async with time_limit(max(0.0, until - now)):
                await self._wake.wait()
        except TimeoutError:
            pass

    def _may_start(self, now: float) -> bool:
        """Whether it is time for the update that is due, or its key has arrived."""
        return self._drawn.over if self._drawn is not None else self._timer.may_start(now)

    async def _start(self, why: str) -> None:
        """Request a key, if the update takes one; when it has arrived, send the update request."""
        connection = self._connection
        if not self.extended:
            # Without data, the keys have protected nothing. A peer may accept no more than 32
            # updates without data of ours between them, however slowly they arrive (as BoringSSL
            # does).
            if (self._timer.bytes or why != "every") and self._in_a_row < AT_ONCE:
                self._in_a_row += 1
                connection.update_keys(request_peer=True)
                self._timer.started()
                await self._send()
            self._timer.done()
            self._unplanned = True
            return
        key, missing = None, None
        if connection.updates_take_keys:
            if self._drawn is None:
                self._drawn = Inquiry(self._draw, self.wake)
                return
            inquiry, self._drawn = self._drawn, None
            key, missing = inquiry.result()
            if key is None and self._qkd_required:
                _LINES.log(logging.WARNING, "no key update now: %s", missing)
                self._timer.try_later(f"there was no QKD key for it: {missing}")
                return
        connection.start_update(key, missing=missing, why=why)
        self._timer.started()
        await self._send_in_time()

    async def _draw(self) -> _Found:
        session = self._connection.session
        try:
            key = await self._source.draw_for_update(
                session, client=self._client, epoch=session.epoch + 1
            )
        except KeySourceError as error:
            return None, str(error)
        return key, None

    async def _answer(self) -> None:
        """Answer the peer's request once we have its key."""
        if self._wanted is not None and self._looked_up is None:
            wanted, self._wanted = self._wanted, None
            self._looked_up = Inquiry(partial(self._look_up, wanted), self.wake)
        if self._looked_up is None or not self._looked_up.over:
            return
        inquiry, self._looked_up = self._looked_up, None
        key, missing = inquiry.result()
        try:
            self._connection.provide_update_key(key, missing)
        except LocalStateError as error:
            _LINES.log(logging.WARNING, "the peer's key update cannot be answered: %s", error)
        except PeerError as error:
            await self._end(error)

    async def _look_up(self, wanted: UpdateKeyWanted) -> _Found:
        try:
            key = await self._source.look_up_for_update(
                wanted.identity, self._connection.session, client=self._client, epoch=wanted.epoch
            )
        except KeySourceError as error:
            _LINES.log(
                logging.WARNING,
                "the QKD key of the peer's key update is not available: %s",
                error,
            )
            return None, str(error)
        return key, None

    async def _send_in_time(self) -> None:
        """Send; if updates are required, give up once the update is late."""
        if not self._required:
            await self._send()
            return
        try:
            async with time_limit(max(0.0, self._timer.late - current_time())):
                await self._send()
        except TimeoutError:
            await self._missed()

    async def _missed(self) -> None:
        obstacle = self._timer.missed()
        if self._under_way:
            obstacle = "the peer has not answered, or our program does not receive its answer"
        elif self._drawn is not None and not self._drawn.over:
            obstacle = "our key source has not answered"
        if not self._required:
            _LINES.log(
                logging.WARNING,
                "a key update is late, and the session continues under its old keys: %s",
                obstacle,
            )
            return
        _LINES.log(
            logging.WARNING,
            "a key update is late, and the policy requires it; the session ends: %s",
            obstacle,
        )
        await self._end(
            PolicyRefused(
                "no key update was completed before its deadline, and our policy requires one: "
                + obstacle,
                Reason.FRESH_KEYS_LATE,
            )
        )

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
        self._timer.done()
        if self._drawn is not None:  # the peer was faster; the key is for no other epoch
            self._drawn.cancel()
            self._drawn = None
        self._unplanned = True
        if epoch.number < self._asked_for:
            self._timer.want("asked")
        if self._on_epoch is not None:
            self._on_epoch(self._connection.session)

    def _plan(self) -> None:
        """Set the time of the next update; it comes later if keys are scarce."""
        if self._unplanned:
            self._unplanned = False
            if self._stretched is not None:
                self._stretched.cancel()
                self._stretched = None
            schedule = self._timer.plan()
            if schedule is not None and self._connection.updates_take_keys:
                self._stretched = Inquiry(partial(self._stretch, schedule), self.wake)
        if self._stretched is not None and self._stretched.over:
            inquiry, self._stretched = self._stretched, None
            self._timer.stretch(inquiry.result())

    async def _stretch(self, schedule: FreshKeys) -> float:
        try:
            stock = await self._source.stock_for_updates(self._connection.session)
        except HybridkexError:
            return 1.0  # The source may have keys nevertheless.
        if stock is None or stock >= schedule.low_stock:
            return 1.0
        return min(schedule.stretch, schedule.low_stock / max(stock, 1))


class _NoKeys:
    """Stands for the :class:`UpdateKeySource` of a configuration without one."""

    async def draw_for_update(self, session: Session, *, client: bool, epoch: int) -> UpdateKey:
        raise KeySourceError("the PSK source supplies no keys for key updates")

    async def look_up_for_update(
        self, identity: bytes, session: Session, *, client: bool, epoch: int
    ) -> UpdateKey:
        raise KeySourceError("the PSK source supplies no keys for key updates")

    async def stock_for_updates(self, session: Session) -> int | None:
        return 0
