"""PadFiller: fetches the QKD keys of one connection's one-time pads, for every shell.

Two independent tasks: one requests keys for the data that we send, the other looks up those that
the peer names. They call the key source and the engine; the
:class:`~hybridkex.shell.key_renewer.KeyRenewer` writes the bytes that the engine has queued to the
transport.
"""

import logging
import math
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Final

from hybridkex.errors import (
    InternalError,
    KeyConsumed,
    KeySourceError,
    KeySourceExhausted,
    LocalStateError,
    PadExhausted,
    PeerError,
    UnknownPskIdentity,
)
from hybridkex.net.event_loop import Background, Event, ask, current_time, time_limit
from hybridkex.net.log import BoundedLog
from hybridkex.reasons import Reason
from hybridkex.secret import Secret
from hybridkex.shell.inquiry import Inquiry
from hybridkex.text import get_logger
from hybridkex.tls.connection import ClientConnection, ServerConnection
from hybridkex.tls.events import PadKeyWanted
from hybridkex.tls.one_time_pad import OneTimePad, PadBudget, PadSource, piece_of

_log: Final = get_logger("hybridkex.one_time_pad")
_LINES: Final = BoundedLog(_log)
"""Rate-limited, because any peer can cause these lines."""

_NO_KEY: Final = "a QKD key that the peer added to its one-time pad is missing: "
_USED_BEFORE: Final = (
    "a QKD key that the peer added to its one-time pad was used before. If the peer's key pool or "
    "its KME's store was restored from a copy, its data may be readable: give both ends new keys: "
)

_FIRST_RETRY: Final = 0.25
_LAST_RETRY: Final = 5.0
"""Seconds between attempts, while the key source has no key."""


class PadFiller:
    """The keys of one connection's one-time pads.

    Args:
        config: how much pad to keep ready.
        connection: the engine, with the handshake complete.
        source: the source of the keys.
        changed: called when the engine has something to send or a pad has grown, and with the error
            for which the session has to end.
    """

    def __init__(
        self,
        config: OneTimePad,
        connection: ClientConnection | ServerConnection,
        source: PadSource,
        changed: Callable[[PeerError | None], None],
    ) -> None:
        self._config = config
        self._connection = connection
        self._source = source
        self._changed = changed
        self._grown = Event()
        self._stopped = False
        self._stock: int | None = None
        budget = self.budget
        self.piece: Final = piece_of(config.hold, budget.record)
        """The number of data bytes to send at once: as many as our pad has room for."""
        self.error: PeerError | None = None
        """Why the session has to end."""
        # Drawing.
        self._draw = Event()
        self._drawn: Inquiry[tuple[bytes, Secret]] | None = None
        self._counted: Inquiry[int | None] | None = None
        """The stock at our KME."""
        self._filling = False
        self._waiting = False
        self._late = math.inf
        self._not_before, self._retry = -math.inf, _FIRST_RETRY
        self._why = ""
        # Looking up.
        self._named = deque[PadKeyWanted]()
        self._look_up = Event()
        self._tasks: Final = tuple(
            Background(partial(self._guarded, task))
            for task in (self._draw_keys, self._look_up_keys)
        )

    def stop(self) -> None:
        """End both tasks at their next checkpoint, and the tasks that wait for them."""
        self._stopped = True
        self._grown.set()
        for one in (*self._tasks, self._drawn, self._counted):
            if one is not None:
                one.cancel()

    @property
    def budget(self) -> PadBudget:
        """The remaining pad."""
        budget = self._connection.pad
        assert budget is not None  # otherwise there would be no filler
        return replace(budget, stock=self._stock)

    # --- what the shell asks and tells --------------------------------------------------------

    def ready(self, size: int) -> bool:
        """Whether the pad has room for ``size`` bytes of data, of at most :attr:`piece`. If not, it
        is filled and ``changed`` is called; after the deadline, :attr:`error` has the reason."""
        budget = self.budget
        self._waiting = budget.message < size
        if not self._waiting:
            self._late = math.inf
        elif self._late == math.inf:
            self._late = current_time() + self._config.deadline
            self._not_before, self._retry = -math.inf, _FIRST_RETRY
        if self._waiting or budget.message < self.piece // 2:
            self._filling = True
            self._draw.set()
        return not self._waiting

    async def wait_until_ready(self, size: int) -> None:
        """Wait until the pad has room for ``size`` bytes of data.

        Raises:
            PeerError: the session has to end.
            LocalStateError: it has ended.
        """
        try:
            while not self.ready(size):
                await self._growth()
        finally:
            self._waiting, self._late = False, math.inf

    async def wait_for_key(self) -> None:
        """Wait until the key for the next record is available. Raises as
        :meth:`wait_until_ready`."""
        while self._connection.waits_for_pad:
            await self._growth()

    async def _growth(self) -> None:
        if self.error is None and not self._stopped:
            await self._grown.wait()
        if self.error is not None:
            raise self.error
        if self._stopped:
            raise LocalStateError("the connection has ended")

    def saw(self, event: PadKeyWanted) -> None:
        """The peer has named a key."""
        self._named.append(event)
        self._look_up.set()

    # --- the tasks ----------------------------------------------------------------------------

    async def _guarded(self, task: Callable[[], Awaitable[None]]) -> None:
        try:
            await task()
        except LocalStateError:
            if self._connection.failed:
                self.stop()
        except PeerError as error:
            self._tell(error)
        except Exception:
            _log.exception("the one-time pad no longer gets keys")
            self._tell(InternalError("the one-time pad no longer gets keys"))

    def _tell(self, error: PeerError | None = None) -> None:
        self.error = self.error or error
        grown, self._grown = self._grown, Event()
        grown.set()
        self._changed(error)

    async def _look_up_keys(self) -> None:
        while True:
            if not self._named:
                self._look_up = Event()
                await self._look_up.wait()
                continue
            wanted, session = self._named.popleft(), self._connection.session
            try:
                async with time_limit(self._config.deadline):
                    look_up = partial(self._source.look_up_for_pad, wanted.identity, session)
                    key = await ask(look_up)
            except TimeoutError:
                why = f"our key source did not deliver it within {self._config.deadline:g} s"
                raise UnknownPskIdentity(_NO_KEY + why, Reason.PAD_KEY_MISSING) from None
            except KeyConsumed as error:
                why = _USED_BEFORE + str(error)
                raise UnknownPskIdentity(why, Reason.PAD_KEY_MISSING) from None
            except KeySourceError as error:
                raise UnknownPskIdentity(_NO_KEY + str(error), Reason.PAD_KEY_MISSING) from None
            self._connection.provide_pad_key(key)
            self._tell()

    async def _draw_keys(self) -> None:
        while not self._connection.close_sent:
            now = current_time()
            if self._drawn is not None and self._drawn.over:  # first, even if it is late
                inquiry, self._drawn = self._drawn, None
                self._take(inquiry)
                continue
            if self._waiting and now >= self._late:
                raise PadExhausted(
                    "our one-time pad is used up, and no QKD key arrived within "
                    f"{self._config.deadline:g} s{self._why}"
                )
            if self._counted is not None and self._counted.over:
                inquiry_of_stock, self._counted = self._counted, None
                with suppress(KeySourceError):
                    self._stock = inquiry_of_stock.result()
            idle = self._filling and self._drawn is None
            if idle and now >= self._not_before:
                session = self._connection.session
                ask = partial(self._source.draw_for_pad, session)
                self._drawn, idle = Inquiry(ask, self._wake), False
            self._draw = Event()
            until = min(self._late, self._not_before if idle else math.inf)
            with suppress(TimeoutError):
                async with time_limit(until - now):
                    await self._draw.wait()

    def _wake(self) -> None:
        self._draw.set()

    def _take(self, drawn: Inquiry[tuple[bytes, Secret]]) -> None:
        """Append the key that we requested, or wait before the next attempt."""
        try:
            identity, key = drawn.result()
        except KeySourceError as error:
            why = f": {error}"
            if why != self._why:  # once, not at each attempt
                _LINES.log(logging.WARNING, "no QKD key for the one-time pad now%s", why)
            self._why = why
            if isinstance(error, KeySourceExhausted):
                self._stock = 0
            self._not_before = current_time() + max(self._retry, error.retry_after or 0.0)
            self._retry = min(2 * self._retry, _LAST_RETRY)
            return
        if self._connection.close_sent:
            return
        self._retry, self._why, self._late = _FIRST_RETRY, "", math.inf
        self._connection.extend_pad(identity, key)
        self._filling = self.budget.message < self.piece
        if self._waiting or not self._filling:
            self._tell()
        if self._stock is not None and self._filling:
            self._stock = max(0, self._stock - len(key))
        elif self._counted is None:
            ask = partial(self._source.stock_for_pads, self._connection.session)
            self._counted = Inquiry(ask, self._wake)
