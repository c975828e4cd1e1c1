"""The parts of a secure connection on asyncio, one class for each duty.

- :class:`Lifecycle`: the states of a connection, its end, and the notifications of the application.
- :class:`Handshake`: the state that exists only until the handshake is complete.
- :class:`ReadingHalf`: the protocol of the transport below; decrypts and delivers.
- :class:`WritingHalf`: encrypts and sends what the application has written.
"""

import asyncio
import logging
import threading
from asyncio import transports
from collections import deque
from collections.abc import Callable, Coroutine, MutableSet
from enum import Enum, auto
from functools import partial
from typing import Any, Final, cast

from hybridkex.aio.failures import SecureConnectionTimeout, connection_error
from hybridkex.aio.places import Places
from hybridkex.constants import MAX_PLAINTEXT
from hybridkex.errors import (
    HandshakeTimeout,
    HybridkexError,
    InternalError,
    LocalStateError,
    PeerError,
    TruncationError,
)
from hybridkex.net.budget import Connection
from hybridkex.net.event_loop import ask, for_future
from hybridkex.net.log import BoundedLog
from hybridkex.shell.answers import CODE_FAILED, Answers
from hybridkex.shell.key_renewer import KeyRenewer
from hybridkex.shell.pad_filler import PadFiller
from hybridkex.text import get_logger
from hybridkex.tls.config import ClientConfig, ServerConfig
from hybridkex.tls.connection import ClientConnection, ServerConnection
from hybridkex.tls.events import ApplicationData, PskWanted, SessionProposed, TicketReceived
from hybridkex.tls.protection import FULL_RECORD
from hybridkex.tls.session import Session
from hybridkex.wire.records import HEADER_LENGTH

_log: Final = get_logger("hybridkex.aio")
_LINES: Final = BoundedLog(_log)
"""Rate-limited, because any peer can cause these lines."""

_READ_SIZE: Final = 16 * FULL_RECORD
_READ_WAITING: Final = 2048
"""The maximum number of bytes that are read while a connection waits for a place: a ClientHello."""
_JOIN: Final = 16 * 1024
"""Writes wait to be joined up to so many bytes; more are encrypted at once."""
_BATCH: Final = 16 * MAX_PLAINTEXT
"""Bytes that are encrypted and sent in one iteration of the loop."""
_ALERT_TIMEOUT: Final = 1.0
_IGNORED_WRITES: Final = 5
"""The number of writes to a lost connection at which a warning is logged, as in asyncio."""


class _State(Enum):
    HANDSHAKE = auto()
    OPEN = auto()
    CLOSING = auto()
    """close_notify is queued or sent and the peer's is awaited, an alert is being sent, or the
    connection was aborted."""
    CLOSED = auto()


# Reading an attribute of an Enum class takes 0.1 microseconds, a global name a tenth of that.
_HANDSHAKE: Final = _State.HANDSHAKE
_OPEN: Final = _State.OPEN
_CLOSING: Final = _State.CLOSING
_CLOSED: Final = _State.CLOSED


# What ends a connection when the application's protocol or the engine raises it. A callback that
# asks a cancelled future for its result raises CancelledError, which does not request to cancel the
# event loop.
_FAULTS: Final = (Exception, asyncio.CancelledError)


_NAMES: Final = ("peername", "sockname", "socket")
"""The extra info of the transport below that is read once, at the start: on uvloop,
``get_extra_info`` of a closed transport may raise AttributeError or ValueError."""

_ABORTED: Final = connection_error(LocalStateError("the connection was aborted"))
"""Stands for the failure of a connection that the application has aborted; it is never raised."""


class _Scratch(threading.local):
    """The read buffer that all connections of a thread share: it is empty between two reads.

    It belongs to the thread that reads: a loop may run in another thread than the one in which its
    connections were made.
    """

    def __init__(self) -> None:
        self.view = memoryview(bytearray(_READ_SIZE))
        self.head = self.view[:HEADER_LENGTH]


_SCRATCH: Final = _Scratch()


class Lifecycle:
    """The states of a connection, from the handshake to the end.

    Args:
        transport: the transport that the application's protocol gets.
        engine: the connection's engine.
        config: its configuration.
        shutdown_timeout: seconds from ``close`` until the peer's close_notify.
        announced: whether the application's protocol knows its transport already.
        ready: a future that is done when the handshake is complete or has failed.
    """

    # Defaults that most connections never change, so that a handshake need not set them.
    state = _HANDSHAKE
    raw: asyncio.Transport | None = None
    """The transport below."""
    handshake: "Handshake | None" = None
    session: Session | None = None
    """Set once the handshake is complete."""
    renewer: KeyRenewer | None = None
    pads: PadFiller | None = None
    failure: Exception | None = None
    register: MutableSet[Any] | None = None
    """Holds the secure transport while there is a transport below."""
    _timer: asyncio.TimerHandle | None = None

    def __init__(
        self,
        transport: transports.Transport,
        engine: ClientConnection | ServerConnection,
        config: ClientConfig | ServerConfig,
        *,
        shutdown_timeout: float,
        announced: bool,
        ready: "asyncio.Future[None] | None",
    ) -> None:
        self.loop: Final = asyncio.get_running_loop()
        self.engine: Final = engine
        self.config: Final = config
        self.answers: Final = Answers(config, engine)
        self.writing = WritingHalf(self)
        self.reading = ReadingHalf(self)
        self._transport: transports.Transport | None = transport
        self._shutdown_timeout = shutdown_timeout
        self._announced = announced
        self._ready = ready
        self._keeping: set[asyncio.Task[None]] = set()
        self._names: dict[str, Any] = {}

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self.protocol = protocol
        # A secure transport within this one gets its bytes by data_received: the shared read buffer
        # may still hold records of this one.
        self.buffered = isinstance(protocol, asyncio.BufferedProtocol) and not isinstance(
            protocol, ReadingHalf
        )

    # --- the beginning ------------------------------------------------------------------------

    def attach(self, raw: asyncio.Transport) -> None:
        """Start the handshake over a connected transport, which this one owns from now on."""
        self.raw = raw
        self._names = {name: raw.get_extra_info(name) for name in _NAMES}
        if self.register is not None:
            self.register.add(self._transport)
        if self.handshake is None or self.failure is not None:  # aborted before it was connected
            self._abort_raw()
            return
        self.writing.attach(raw)
        self.handshake.attach(raw)

    def open(self) -> None:
        """Begin to carry data: the handshake is complete."""
        self._end_handshake()
        self.session = self.engine.session
        self.state = _OPEN
        if self.answers.keeps_tickets:
            self.keep_tickets()
        announced, self._announced = self._announced, True
        if KeyRenewer.needed(self.config, self.engine):
            self._renew_keys()
        try:
            if not announced:
                self.protocol.connection_made(self._transport)  # type: ignore[arg-type]
        except _FAULTS as error:
            self.application_failed(error)
            return
        self.writing.check_marks()
        if self._ready is not None and not self._ready.done():
            self._ready.set_result(None)
        self.reading.process()

    def _renew_keys(self) -> None:
        self.renewer = KeyRenewer(
            self.config,
            self.engine,
            self._send_for_renewer,
            self._fail_for_renewer,
            pads_changed=self._pads_changed,
        )
        self.pads = self.renewer.pads
        if self.pads is not None:
            self.writing.batch = min(_BATCH, self.pads.piece)

    async def _send_for_renewer(self) -> None:
        self.send_output()

    async def _fail_for_renewer(self, error: PeerError) -> None:
        self.fail(error)

    def _pads_changed(self) -> None:
        """Continue with data that waits for a one-time pad, in either direction."""
        if self.failure is None and self.state is not _CLOSED:
            self.reading.pads_changed()
            self.writing.pump_if_due()

    def keep_tickets(self) -> None:
        """Write the ticket store to disk in a task of its own."""
        task = self.loop.create_task(self.answers.keep_tickets())
        self._keeping.add(task)
        task.add_done_callback(self._kept)

    def _kept(self, task: "asyncio.Task[None]") -> None:
        self._keeping.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None:
            self.report("the session tickets could not be stored", error)

    def send_output(self) -> None:
        """Send what the engine has queued."""
        if self.engine.has_data_to_send:
            self.hand_over(self.engine.data_to_send())

    def hand_over(self, records: bytes | bytearray) -> bool:
        """Write to the transport below. Returns whether it has taken the data; if it has not,
        ``connection_lost`` follows."""
        raw = self.raw
        if raw is None or raw.is_closing():
            return False
        try:
            raw.write(records)
        except RuntimeError as error:
            self.abort(connection_error(LocalStateError(f"the plain transport refused: {error}")))
        return not raw.is_closing()

    # --- the end ------------------------------------------------------------------------------

    def is_closing(self) -> bool:
        return self.state in (_CLOSING, _CLOSED) or (self.raw is not None and self.raw.is_closing())

    def close(self) -> None:
        if self.state is _HANDSHAKE:
            self.abort()
            return
        if self.state is not _OPEN:
            return
        self.state = _CLOSING
        self.reading.discard()
        self._timer = self.loop.call_later(self._shutdown_timeout, self._shutdown_late)
        if not self.engine.close_sent:
            self.writing.end()
        elif self.engine.close_received:
            self.close_raw()
            return
        self.reading.resume_raw()

    def abort(self, failure: Exception = _ABORTED) -> None:
        if self.state is _CLOSED:
            return
        if self.failure is None:
            self.failure = failure
        self.state = _CLOSING
        self._discard()
        self._abort_raw()

    def _shutdown_late(self) -> None:
        if self.failure is None and self.writing.unsent:
            seconds = f"{self._shutdown_timeout:g} seconds"
            cause = TruncationError(f"the peer did not take all of our data within {seconds}")
            self.failure = SecureConnectionTimeout(str(cause))
            self.failure.__cause__ = cause
        self._abort_raw()

    def _abort_raw(self) -> None:
        self._stop()
        if self.raw is not None:
            self.raw.abort()

    def close_raw(self) -> None:
        """Close the transport below when its buffer is empty, within the shutdown time limit."""
        self._stop()
        assert self.raw is not None
        self._timer = self.loop.call_later(self._shutdown_timeout, self._shutdown_late)
        self.raw.close()

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self.handshake is not None:
            self.handshake.stop()
        if self.renewer is not None:
            self.renewer.stop()

    def _end_handshake(self) -> None:
        if self.handshake is not None:
            self.handshake.leave()
            self.handshake = None

    def _discard(self) -> None:
        """Discard the data that waits in both directions."""
        self.reading.discard()
        self.writing.discard()

    def report(self, message: str, error: BaseException) -> None:
        """Report a fault of the program to the loop's exception handler."""
        self.loop.call_exception_handler(
            {
                "message": message,
                "exception": error,
                "transport": self._transport,
                "protocol": self.protocol,
            }
        )

    def application_failed(self, error: BaseException) -> None:
        """End the connection after an exception of the application's protocol."""
        self.report("Fatal error: the application's protocol failed.", error)
        # A CancelledError that propagated from here would cancel the user of the connection.
        cause = for_future(error) if isinstance(error, Exception) else None
        self.give_up("the application's protocol failed", cause)

    def engine_failed(self, error: BaseException) -> None:
        """End the connection after an exception of the engine, or of code of the configuration that
        it calls. An exception of such code goes to the caller that awaits the handshake, and
        otherwise to the loop's exception handler and ``connection_lost``."""
        if isinstance(error, HybridkexError):
            self.fail(error)
            return
        waited_for = self._ready is not None and not self._ready.done()
        if not waited_for:
            self.report(CODE_FAILED, error)
        cause = for_future(error) if waited_for or self._announced else None
        self.give_up(CODE_FAILED, cause)

    def give_up(self, why: str, cause: Exception | None = None) -> None:
        """Close with the alert internal_error, for a fault on our side."""
        self.fail(InternalError(why), cause)

    def fail(self, error: HybridkexError, cause: Exception | None = None) -> None:
        """Send the alert, if there is one, and close. ``connection_lost`` gets ``cause`` or a
        :exc:`SecureConnectionError`."""
        if self.failure is not None or self.state is _CLOSED:
            return
        reason = self.engine.reason_of(error)
        self.engine.abort(reason)
        self.failure = cause or connection_error(reason)
        self.state = _CLOSING
        self._stop()
        self._discard()
        assert self.raw is not None
        self.send_output()
        if self.raw.get_write_buffer_size():
            self._timer = self.loop.call_later(_ALERT_TIMEOUT, self._abort_raw)
        self.raw.close()

    def lost(self, error: Exception | None) -> None:
        """Process ``connection_lost`` of the transport below."""
        if self.handshake is not None:
            self.handshake.take_answer()  # it may have refused the session in this turn of the loop
        if self.pads is not None and self.pads.error is not None:
            self.fail(self.pads.error)  # found in this turn of the loop, and not reported yet
        was, self.state = self.state, _CLOSED
        complete = self.engine.close_received
        lossless = complete and not (self.reading.holds_data or self.writing.holds_data)
        self._stop()
        self._end_handshake()
        self._discard()
        # The application, or the traceback of an error that its reader has raised, may keep the
        # transport.
        self.renewer = self.pads = None
        self.engine.release()
        del self.reading, self.writing  # breaks the cycles; nothing is received or sent any more
        # Both hold tracebacks, whose frames refer to this object: a reference kept here would keep
        # the keys in memory until the garbage collector runs.
        failure, self.failure = self.failure, None
        ready, self._ready = self._ready, None
        if self.register is not None:
            self.register.discard(self._transport)
        self._transport = None
        aborted = failure is _ABORTED
        if failure is None and not lossless:
            # After the peer's close_notify a reset is not a failure (RFC 9846 section 6.1).
            failure = error
        if failure is None and not complete and was is not _CLOSING:
            failure = connection_error(TruncationError("the connection was closed"))
        if ready is not None and not ready.done():
            if failure is None or aborted:
                failure = connection_error(LocalStateError("the connection was aborted"))
            ready.set_exception(failure)
        if self._announced:
            protocol, self.protocol = self.protocol, asyncio.BaseProtocol()  # breaks the cycle
            protocol.connection_lost(None if aborted else failure)
        elif ready is None:
            _LINES.log(logging.WARNING, "%s: %s", self._peer, failure)

    def get_extra_info(self, name: str, default: Any) -> Any:
        """``get_extra_info`` of the transport below, also after it was closed."""
        if name in self._names or self.raw is None:
            found = self._names.get(name)
            return default if found is None else found
        return self.raw.get_extra_info(name, default)

    @property
    def _peer(self) -> str:
        """The peer's address, for the log."""
        address = self.get_extra_info("peername", None)
        return f"{address[0]}:{address[1]}" if isinstance(address, tuple) else "a local peer"


class Handshake:
    """A connection until its handshake is complete: its place at the server, its time limit, and
    the wait for a key source or a file.

    Args:
        life: the connection.
        timeout: seconds from the place until the handshake is complete.
        places: the places of the server that has accepted the connection.
    """

    _place: Connection | None = None
    _task: asyncio.Task[None] | None = None
    _timer: asyncio.TimerHandle | None = None
    waits = False
    """Whether the connection waits for a place, and has read enough."""

    def __init__(self, life: Lifecycle, timeout: float, places: Places | None) -> None:
        self._life: Final = life
        self._engine: Final = life.engine
        self._answers: Final = life.answers
        self._timeout: Final = timeout
        self._places = places

    def attach(self, raw: asyncio.Transport) -> None:
        """Begin the handshake, or wait for a place of the server."""
        if self._places is None:
            self.start()
        else:
            self._place = self._places.enter(self, raw, _LINES)

    def wait(self) -> None:
        """Read nothing until :meth:`start`."""
        self.waits = True
        self._life.reading.pause_raw()

    def start(self) -> None:
        """Begin the handshake of a connection that has a place."""
        self.waits = False
        self._life.reading.resume_raw()
        self._timer = self._life.loop.call_later(self._timeout, self._late)
        if self._answers.waits_to_begin:
            self._wait_for(self._answers.begin)
        else:
            self._advance(begin=True)

    def received(self, data: bytes) -> None:
        """Process bytes from the transport below."""
        try:
            self._engine.receive_data(data)
        except HybridkexError as error:
            self._life.fail(error)
            return
        if not self.waits:
            self._advance()
            return
        # uvloop reads once more although connection_made has paused reading.
        assert self._life.raw is not None
        self._life.raw.pause_reading()
        if self._places is not None and self._place is not None:
            self._places.heard(self._place)

    def _advance(self, *, begin: bool = False) -> None:
        """Process the handshake messages that have been received."""
        engine = self._engine
        complete = engine.handshake_complete
        try:
            if begin:
                self._answers.begin_at_once()
            while not complete and (event := engine.next_event()) is not None:
                if isinstance(event, SessionProposed) and not self._answers.waits(event):
                    self._answers.give_at_once(event)
                    complete = engine.handshake_complete
                elif isinstance(event, PskWanted | SessionProposed):
                    self._life.send_output()
                    self._wait_for(partial(self._answers.give, event))
                    return
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # pyo3's PanicException is no Exception
            self._life.engine_failed(error)
            return
        self._life.send_output()
        if engine.handshake_complete and self._life.failure is None:
            self.stop()
            self._life.open()

    def _wait_for(self, answer: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Wait for a key source or a file, with reading paused."""
        self._life.reading.pause_raw()
        self._task = self._life.loop.create_task(ask(answer))
        self._task.add_done_callback(self._answered)

    def take_answer(self) -> None:
        """Process an answer that has arrived, and whose callback is due in this turn of the
        loop."""
        if self._task is not None and self._task.done():
            self._answered(self._task)

    def _answered(self, task: "asyncio.Task[None]") -> None:
        self._task = None
        error = None if task.cancelled() else task.exception()
        life = self._life
        if life.state is not _HANDSHAKE:
            return
        assert life.raw is not None
        if task.cancelled():
            life.give_up("the wait for a PSK source or verifier was cancelled")
        elif error is not None:
            life.engine_failed(error)
        elif not life.raw.is_closing():  # else connection_lost follows
            life.reading.resume_raw()
            self._advance()

    def _late(self) -> None:
        self._life.fail(HandshakeTimeout(f"no handshake within {self._timeout:g} seconds"))

    def dismiss(self, reason: str) -> None:
        """Close the connection to make room for another one."""
        self._life.abort(connection_error(LocalStateError(reason)))

    def stop(self) -> None:
        """Cancel the time limit and any wait."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._task is not None:
            self._task.cancel()
            self._task = None

    def leave(self) -> None:
        """Give back the place."""
        if self._places is not None and self._place is not None:
            self._places.leave(self._place)
            self._places = self._place = None


class ReadingHalf(asyncio.BufferedProtocol):
    """Receives from the transport below, decrypts, and delivers to the application's protocol.

    Args:
        life: the connection.
    """

    paused = False
    """Whether the application has paused reading."""
    below_ended = False
    """Whether the transport below has reported its end while we still send."""
    _raw_paused = False
    _waits_for_pad = False
    _end_delivered = False

    def __init__(self, life: Lifecycle) -> None:
        self._life: Final = life
        self._engine: Final = life.engine
        self._writing: Final = life.writing
        self._held: deque[bytes | memoryview] = deque()
        """Data that was decrypted while reading was paused."""

    # --- the protocol of the transport below --------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._life.attach(cast(asyncio.Transport, transport))  # uvloop's are not asyncio's

    def get_buffer(self, sizehint: int) -> memoryview:
        handshake = self._life.handshake
        if handshake is not None and handshake.waits:
            return _SCRATCH.view[:_READ_WAITING]
        return _SCRATCH.view

    def buffer_updated(self, nbytes: int) -> None:
        buffer = _SCRATCH.view
        if self._life.state is _OPEN and not self.paused and not self._held:
            content = self._engine.receive_record(_SCRATCH.head, buffer[HEADER_LENGTH:nbytes])
            if content is not None:
                self._deliver_record(content)
                return
        self._received(buffer[:nbytes])

    def data_received(self, data: bytes) -> None:
        """Process data from a secure transport that carries this one."""
        self._received(memoryview(data))

    def eof_received(self) -> bool:
        """Process the end of the transport below; returns whether it must stay open to write."""
        state = self._life.state
        if state is _OPEN and self._engine.close_received:
            return True
        if state is _CLOSING and self._writing.end_due:
            self.below_ended = True
            return True
        if state in (_HANDSHAKE, _OPEN) and self._life.failure is None:
            try:
                self._engine.receive_data(b"")
            except HybridkexError as error:
                self._life.fail(error)
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._life.lost(exc)

    def pause_writing(self) -> None:
        self._writing.below_paused(True)

    def resume_writing(self) -> None:
        self._writing.below_paused(False)

    # --- from the transport below to the application ------------------------------------------

    def _received(self, data: memoryview) -> None:
        """Process bytes from the transport below. ``data`` is overwritten after this returns."""
        life = self._life
        if life.handshake is not None and life.state is _HANDSHAKE:
            life.handshake.received(bytes(data))
            return
        if life.state is _CLOSED or life.failure is not None:
            return
        try:
            self._engine.receive_data(data)
        except HybridkexError as error:
            life.fail(error)
        else:
            self.process()

    def _deliver_record(self, content: bytes) -> None:
        """Deliver a read that was one short record, and send the answer to it."""
        life, writing = self._life, self._writing
        if life.renewer is not None:
            life.renewer.received(len(content))
        writing.in_read = True
        try:
            if life.buffered:
                self._deliver(content)
            else:
                life.protocol.data_received(content)  # type: ignore[attr-defined]
        except _FAULTS as error:
            life.application_failed(error)
        finally:
            writing.in_read = False
        if writing.outgoing:
            writing.pump()

    def process(self) -> None:
        """Deliver the engine's events, or keep the data while reading is paused."""
        self._writing.in_read = True
        try:
            self._take_events()
        except _FAULTS as error:
            self._life.application_failed(error)
        finally:
            self._writing.in_read = False
            if self._writing.outgoing:
                self._writing.pump()

    def _take_events(self) -> None:
        life, engine = self._life, self._engine
        next_event = engine.next_event
        while True:
            try:
                event = next_event()
            except (KeyboardInterrupt, SystemExit):
                raise
            except BaseException as error:  # pyo3's PanicException is no Exception
                life.engine_failed(error)
                return
            if event is None:
                break
            engine.keep()  # a callback may run the loop, and another read use the buffer
            if life.renewer is not None:
                life.renewer.saw(event)
            if type(event) is ApplicationData and life.state is _OPEN:
                if self.paused or self._held:
                    self._held.append(event.data)
                else:
                    self._deliver(event.data)
            elif type(event) is TicketReceived and life.answers.keeps_tickets:
                life.keep_tickets()
        if engine.waits_for_pad and not self._waits_for_pad:
            self._waits_for_pad = True
            self.pause_raw()
        if engine.close_received:
            self._writing.peer_closed()
            self._deliver_end()
        if engine.has_data_to_send:
            life.send_output()  # a KeyUpdate that answers the peer

    def _deliver(self, data: bytes | memoryview) -> None:
        """Give data to the protocol; the rest waits if the protocol pauses reading."""
        life = self._life
        view = memoryview(data)
        while view and life.state is _OPEN:
            if self.paused:
                self._held.appendleft(view)
                return
            protocol: Any = life.protocol
            if not life.buffered:
                whole = type(data) is bytes and len(view) == len(data)
                protocol.data_received(data if whole else bytes(view))
                return
            buffer = memoryview(protocol.get_buffer(len(view))).cast("B")
            size = min(len(buffer), len(view))
            if not size:
                raise RuntimeError("get_buffer() returned an empty buffer")
            replaced = life.protocol is not protocol
            if replaced or self.paused or life.state is not _OPEN:
                continue  # by get_buffer
            buffer[:size] = view[:size]
            view = view[size:]
            protocol.buffer_updated(size)

    def _deliver_end(self) -> None:
        """Call ``eof_received`` for the peer's close_notify, once and after all data."""
        life = self._life
        if life.state is _CLOSING:
            if not self._writing.end_due:
                life.close_raw()
        elif self.paused or self._held:
            return
        elif life.state is _OPEN and not self._end_delivered:
            self._end_delivered = True
            protocol: Any = life.protocol
            if not protocol.eof_received():
                life.close()

    # --- pauses -------------------------------------------------------------------------------

    @property
    def is_reading(self) -> bool:
        """Whether received data is delivered."""
        return not self.paused and self._life.state is _OPEN

    def pause(self) -> None:
        """Stop the delivery of data."""
        if not self.paused and self._life.state is _OPEN:
            self.paused = True
            self.pause_raw()

    def resume(self) -> None:
        """Continue the delivery of data, beginning with the data that waits."""
        if self.paused and self._life.state is _OPEN:
            self.paused = False
            self._life.loop.call_soon(self._resume)

    def _resume(self) -> None:
        try:
            self._deliver_held()
        except _FAULTS as error:
            self._life.application_failed(error)

    def _deliver_held(self) -> None:
        life = self._life
        while self._held and not self.paused and life.state is _OPEN:
            self._deliver(self._held.popleft())
        if self.paused or life.state is not _OPEN:
            return
        if self._engine.close_received:
            self._deliver_end()
        if life.state is _OPEN and not self._waits_for_pad:
            self.resume_raw()

    def pads_changed(self) -> None:
        """Continue with data that waited for a one-time pad."""
        if self._waits_for_pad and not self._engine.waits_for_pad:
            self._waits_for_pad = False
            self.process()
            if not self._waits_for_pad and not self.paused:
                self.resume_raw()

    def pause_raw(self) -> None:
        assert self._life.raw is not None
        if not self._raw_paused:
            self._raw_paused = True
            self._life.raw.pause_reading()

    def resume_raw(self) -> None:
        assert self._life.raw is not None
        if self._raw_paused:
            self._raw_paused = False
            self._life.raw.resume_reading()

    @property
    def holds_data(self) -> bool:
        """Whether received data is undelivered."""
        return bool(self._held)

    def discard(self) -> None:
        """Discard the data that waits."""
        self._held.clear()


class WritingHalf:
    """Encrypts the data that the application has written, and sends it as fast as the transport
    below takes it.

    Args:
        life: the connection.
    """

    in_read = False
    """Whether a read is being processed: data written meanwhile is sent at its end."""
    end_due = False
    """Whether close_notify follows the data that waits."""
    batch = _BATCH
    paused = False
    """Whether the application's protocol was asked to pause writing."""
    high = low = 0
    """The water marks, in bytes, at which the protocol is asked to pause and to resume."""
    _size = 0
    _sealed = 0
    """The number of written bytes that were encrypted."""
    _eof_written = False
    _below_full = False
    _not_taken = False
    """Whether the transport below has refused data."""
    _pump_due = False
    _ignored_writes = 0

    def __init__(self, life: Lifecycle) -> None:
        self._life: Final = life
        self._engine: Final = life.engine
        self.outgoing: Final[deque[bytes | memoryview]] = deque()
        """Written data that waits to be encrypted."""
        self._updates: Final[deque[tuple[int, bool]]] = deque()
        """Key updates that wait for the data written before them: the value of ``_sealed`` at which
        one is due, and whether it asks the peer to change its key, too."""

    def attach(self, raw: asyncio.Transport) -> None:
        # The write buffer of an upgraded transport may be full already; only changes are signalled.
        self._below_full = raw.get_write_buffer_size() > raw.get_write_buffer_limits()[1]

    @property
    def unsent(self) -> int:
        """Bytes that wait to be sent."""
        raw = self._life.raw
        return self._size + (0 if raw is None else raw.get_write_buffer_size())

    @property
    def holds_data(self) -> bool:
        """Whether data is known to be unsent."""
        return bool(self.outgoing) or self._below_full or self._not_taken

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Send data; see :meth:`SecureTransport.write`."""
        if type(data) is not bytes:
            if not isinstance(data, bytes | bytearray | memoryview):
                raise TypeError(f"data must be bytes-like, not {type(data).__name__}")
            data = bytes(data)
        if self._life.state is not _OPEN or self.end_due or self._engine.close_sent:
            self._refuse_write()
            return
        if not data:
            return
        self.outgoing.append(data)
        self._size += len(data)
        if self.in_read:
            pass  # it is sent at the end of the read
        elif self._size >= _JOIN:
            self.pump()
        else:
            self._pump_soon()
        if self._size > self.high:
            self.check_marks()

    def _refuse_write(self) -> None:
        """Handle a write after ``write_eof`` or after the end."""
        if self._eof_written or self._life.state is _OPEN:
            raise RuntimeError("Cannot call write() after write_eof()")
        self._ignored_writes += 1
        if self._ignored_writes == _IGNORED_WRITES:
            _LINES.log(logging.WARNING, "data was written to a closed transport and is discarded")

    def _pump_soon(self) -> None:
        if not self._pump_due:
            self._pump_due = True
            self._life.loop.call_soon(self._pump_later)

    def _pump_later(self) -> None:
        self._pump_due = False
        self.pump()

    def pump_if_due(self) -> None:
        """Continue if any data waits."""
        if self.outgoing or self.end_due:
            self.pump()

    def pump(self) -> None:
        """Encrypt and send one batch, unless the transport below is full."""
        life = self._life
        if self._below_full or life.failure is not None:
            return
        if self.outgoing:
            batch = self._next_batch()
            if life.pads is not None and not life.pads.ready(len(batch)):
                self.outgoing.appendleft(batch)
                self._size += len(batch)
                return  # until the pad is extended
            if life.renewer is not None:
                life.renewer.sent(len(batch))
            self._sealed += len(batch)
            records: bytes | bytearray | None = None
            if type(batch) is bytes:
                records = self._engine.seal_record(batch)
            if records is None:
                try:
                    self._engine.send_data(batch)
                except _FAULTS as error:
                    life.engine_failed(error)
                    return
                records = self._engine.data_to_send()
            if not life.hand_over(records):
                self._not_taken = True
            self._update_keys()
        if self.outgoing:
            self._pump_soon()
        elif self.end_due:
            self._send_end()
        if self.paused:
            self.check_marks()

    def _next_batch(self) -> bytes | memoryview:
        """Remove the data of one batch from the queue; short pieces are joined, long ones cut."""
        outgoing, most = self.outgoing, self.batch
        if self._updates:
            most = min(most, self._updates[0][0] - self._sealed)
        if len(outgoing) > 1 and len(outgoing[0]) < most:
            size, pieces = 0, []
            while outgoing and size + len(outgoing[0]) <= most:
                pieces.append(outgoing.popleft())
                size += len(pieces[-1])
            self._size -= size
            return b"".join(pieces)
        first = outgoing.popleft()
        if len(first) > most:
            view = memoryview(first)
            outgoing.appendleft(view[most:])
            first = view[:most]
        self._size -= len(first)
        return first

    def update_keys(self, *, request_peer: bool) -> None:
        """Change our sending key after the data that was written.

        Raises:
            LocalStateError: as the engine's ``update_keys``.
        """
        if self.end_due:
            raise LocalStateError(
                "keys can be updated only after the handshake and before the connection is closed"
            )
        self._updates.append((self._sealed + self._size, request_peer))
        self._update_keys()

    def _update_keys(self) -> None:
        """Send the key updates that wait for no more data."""
        while self._updates and self._updates[0][0] == self._sealed:
            _, request_peer = self._updates.popleft()
            self._engine.update_keys(request_peer=request_peer)
            self._life.send_output()

    def write_eof(self) -> None:
        """Send close_notify after all data that was written; receiving continues."""
        if self._life.state is _OPEN and not self._engine.close_sent:
            self._eof_written = True
            self.end()

    def end(self) -> None:
        """Send close_notify after all data that was written."""
        self.end_due = True
        self.pump()

    def _send_end(self) -> None:
        life = self._life
        self.end_due = False
        self._engine.send_close()
        life.send_output()
        if life.state is _CLOSING and (self._engine.close_received or life.reading.below_ended):
            life.close_raw()

    def discard(self) -> None:
        """Discard the data that waits."""
        self.outgoing.clear()
        self._updates.clear()
        self._size = 0
        self.end_due = False

    # --- flow control -------------------------------------------------------------------------

    def below_paused(self, paused: bool) -> None:
        """Process ``pause_writing`` or ``resume_writing`` of the transport below."""
        self._below_full = paused
        if paused:
            self.check_marks()
        else:
            # A transport of asyncio that is closed within its resume_writing calls connection_lost
            # twice (cpython: _SelectorSocketTransport._write_ready).
            self._life.loop.call_soon(self._below_resumed)

    def _below_resumed(self) -> None:
        if self._below_full or self._life.state is _CLOSED:
            return
        self.pump_if_due()
        self.check_marks()

    def set_marks(self, high: int, low: int) -> None:
        self.high, self.low = high, low
        raw = self._life.raw
        if raw is not None and self._life.state is not _CLOSED:
            raw.set_write_buffer_limits(high, low)
            self.check_marks()

    def peer_closed(self) -> None:
        """Have the transport below report every waiting byte from now on: a reset after the peer's
        close_notify is a failure if any bytes wait."""
        raw = self._life.raw
        if raw is not None and not raw.is_closing():
            raw.set_write_buffer_limits(0)

    def check_marks(self) -> None:
        """Call ``pause_writing`` or ``resume_writing`` where a mark has been crossed."""
        life = self._life
        if life.session is None or life.failure is not None:
            return
        try:
            if not self.paused:
                if self._below_full or self._size > self.high:
                    self.paused = True
                    life.protocol.pause_writing()
            elif not self._below_full and self._size <= self.low:
                self.paused = False
                life.protocol.resume_writing()
        except _FAULTS as error:
            life.application_failed(error)
