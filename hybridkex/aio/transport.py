"""The secure transport: the engine between an asyncio transport and the application's protocol.

Two objects share a connection. The application uses :class:`SecureTransport` to write, pause and
close. ``Receiver`` is the protocol of the transport below and passes the received bytes on.

- The application's ``connection_made`` is called when the handshake is complete, as with asyncio's
  own TLS.
- Received data is decrypted at once. While the application has paused reading, the decrypted data
  waits and the transport below is paused, so that no more than one read is held.
- Short writes are joined until the loop's next iteration, or until the end of the read that they
  answer.
- A long write is encrypted and sent in batches, one in each iteration of the loop. Other
  connections are served in between, and the rest waits as the application's own bytes object,
  without an encrypted copy.
- Once a callback has paused reading, closed the connection or replaced the protocol, the old
  protocol gets no more data, not even the rest of the record that is being delivered.
- An exception raised by the application's protocol ends its connection: the loop's exception
  handler and ``connection_lost`` get the exception, and the peer gets the alert internal_error.
"""

import asyncio
import logging
import threading
from asyncio import constants, transports
from collections import deque
from collections.abc import Callable, Coroutine, Iterable
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
from hybridkex.net.event_loop import ask
from hybridkex.net.log import BoundedLog
from hybridkex.secret import Secret
from hybridkex.shell.answers import Answers
from hybridkex.shell.key_renewer import KeyRenewer
from hybridkex.shell.pad_filler import PadFiller
from hybridkex.shell.ssl_facade import SslObject, cipher_of, peercert_of
from hybridkex.text import get_logger
from hybridkex.tls.config import ClientConfig, ServerConfig
from hybridkex.tls.connection import connection_for
from hybridkex.tls.events import ApplicationData, PskWanted, SessionProposed, TicketReceived
from hybridkex.tls.one_time_pad import PadBudget
from hybridkex.tls.protection import FULL_RECORD
from hybridkex.tls.session import Session
from hybridkex.wire.records import HEADER_LENGTH

_log: Final = get_logger("hybridkex.aio")
_LINES: Final = BoundedLog(_log)
"""Rate-limited, because any peer can cause these lines."""

_HANDSHAKE_TIMEOUT: Final = 10.0
"""Seconds that a handshake may take."""
_SHUTDOWN_TIMEOUT: Final = 30.0
"""Seconds from ``close`` until the peer's close_notify; asyncio's default."""

_READ_SIZE: Final = 16 * FULL_RECORD
_READ_WAITING: Final = 2048
"""Bytes that are read of a connection that waits for a place: a ClientHello."""
_JOIN: Final = 16 * 1024
"""Bytes up to which writes wait to be joined; more is encrypted at once."""
_BATCH: Final = 16 * MAX_PLAINTEXT
"""Bytes that are encrypted and sent in one iteration of the loop."""
_ALERT_TIMEOUT: Final = 1.0
_IGNORED_WRITES: Final = 5
"""Number of writes to a lost connection at which a warning is logged; asyncio's figure."""


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


# What ends a connection when the application's protocol raises it. A callback that asks a cancelled
# future for its result raises CancelledError, which is no request to cancel the event loop.
_FAULTS: Final = (Exception, asyncio.CancelledError)


_ABORTED: Final = connection_error(LocalStateError("the connection was aborted"))
"""Stands for the failure of a connection that the application has aborted; it is never raised."""


class _Scratch(threading.local):
    """The read buffer that all connections of a thread share: it is empty between two reads.

    The thread is the one that reads. A loop may run in another thread than the one in which its
    connections were made.
    """

    def __init__(self) -> None:
        self.view = memoryview(bytearray(_READ_SIZE))
        self.head = self.view[:HEADER_LENGTH]


_SCRATCH: Final = _Scratch()


class SecureTransport(transports._FlowControlMixin):
    """A transport that encrypts over another transport.

    :func:`~hybridkex.aio.create_connection`, :func:`~hybridkex.aio.create_server` and
    :func:`~hybridkex.aio.start_tls` make it.

    ``get_extra_info`` supports ``hybridkex_session`` (the :class:`~hybridkex.Session`),
    ``peercert``, ``cipher``, ``ssl_object``, ``sslcontext`` (the configuration), and the names of
    the transport below (``peername``, ``sockname``, ``socket``).

    Args:
        protocol: the application's protocol.
        config: the configuration of a client or of a server.
        server_hostname: the name or address that the server's certificate must have (client).
        ssl_handshake_timeout: seconds for the handshake; 10 by default.
        ssl_shutdown_timeout: seconds from ``close`` until the peer's close_notify; 30 by default.
        call_connection_made: whether the protocol's ``connection_made`` is called.
        ready: a future that is done when the handshake is complete or has failed.
        places: those of the server that has accepted the connection.

    Raises:
        ConfigError: the configuration is neither a ``ClientConfig`` nor a ``ServerConfig``, or a
            server is given a ``server_hostname``.
        ValueError: a time limit is not positive.
    """

    # asyncio asks a transport for these names, and loop.sendfile for the base class too.
    _start_tls_compatible = True  # loop.start_tls, for a TLS connection inside this one
    _sendfile_compatible = constants._SendfileMode.FALLBACK

    _loop: asyncio.AbstractEventLoop
    _protocol_paused: bool
    _high_water: int
    _low_water: int

    # What most connections never change, so that a handshake does not set it.
    _place: Connection | None = None
    _session: Session | None = None
    _renewer: KeyRenewer | None = None
    _state = _HANDSHAKE
    _failure: Exception | None = None
    _task: asyncio.Task[None] | None = None
    _timer: asyncio.TimerHandle | None = None
    _reading_paused = False
    _raw: asyncio.Transport | None = None
    _raw_paused = False
    _raw_full = False
    _raw_ended = False
    _end_delivered = False
    _outgoing_size = 0
    _eof_written = False
    _end_due = False
    """Whether close_notify follows the data that waits."""
    _batch = _BATCH
    _waits_for_pad = False
    _pump_due = False
    _in_read = False
    _ignored_writes = 0

    def __init__(
        self,
        protocol: asyncio.BaseProtocol,
        config: ClientConfig | ServerConfig,
        *,
        server_hostname: str | None = None,
        ssl_handshake_timeout: float | None = None,
        ssl_shutdown_timeout: float | None = None,
        call_connection_made: bool = True,
        ready: "asyncio.Future[None] | None" = None,
        places: Places | None = None,
    ) -> None:
        super().__init__(loop=asyncio.get_running_loop())
        self._config = config
        self._connection = connection_for(config, server_hostname)
        self._answers = Answers(config, self._connection)
        self._keeping: set[asyncio.Task[None]] = set()
        self._handshake_timeout, self._shutdown_timeout = time_limits(
            ssl_handshake_timeout, ssl_shutdown_timeout
        )
        self._announce = call_connection_made
        self._announced = not call_connection_made
        self._ready = ready
        self._places = places
        self._held: deque[bytes | memoryview] = deque()
        """Data that was decrypted while reading was paused."""
        self._outgoing: deque[bytes | memoryview] = deque()
        """Data that was written and waits to be encrypted."""
        self.receiver: Final = Receiver(self)
        self.set_protocol(protocol)

    def __repr__(self) -> str:
        role = "server" if isinstance(self._config, ServerConfig) else "client"
        return f"<SecureTransport {role} {self._state.name.lower()} {self._raw!r}>"

    # --- what it is ---------------------------------------------------------------------------

    @property
    def session(self) -> Session:
        """The parameters of the session: groups, keys and the identity of the peer.

        Raises:
            LocalStateError: the handshake is not complete.
        """
        return self._connection.session

    def export(self, label: bytes, context: bytes, length: int) -> Secret:
        """Keying material for a protocol above: ``length`` bytes (RFC 9846 section 7.5).

        Raises:
            LocalStateError: the handshake is not complete, or the connection was closed.
        """
        return self._connection.export(label, context, length)

    def export_fresh(self, label: bytes, context: bytes, length: int) -> Secret:
        """As :meth:`export`, from the exporter secret of the epoch in use: another one after each
        key update (draft-ietf-tls-extended-key-update-13 section 10).

        Raises:
            LocalStateError: the handshake is not complete, or Extended Key Update was not
                negotiated.
        """
        return self._connection.export_fresh(label, context, length)

    @property
    def pad(self) -> PadBudget | None:
        """The remaining one-time pads; ``None`` if none was negotiated.

        Raises:
            LocalStateError: the handshake is not complete.
        """
        return self._connection.pad if self._pads is None else self._pads.budget

    def update_keys(self, *, request_peer: bool = False) -> None:
        """Change our sending key, and ask the peer for the same (RFC 9846 section 4.7.3).

        If Extended Key Update was negotiated, this starts one, with a QKD key if the policy uses
        them. When it is complete, :attr:`session` has another epoch.

        Raises:
            LocalStateError: the handshake is not complete, or the sending direction is closed.
        """
        if self._renewer is not None and self._renewer.extended:
            if self._connection.close_sent:
                raise LocalStateError("a key update is started between handshake and close")
            self._renewer.update()
            return
        self._connection.update_keys(request_peer=request_peer)
        self._send_output()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """Information about the connection, by name; see the class."""
        if name == "sslcontext":
            return self._config
        if self._session is not None:
            if name == "hybridkex_session":
                return self._connection.session
            if name == "ssl_object":
                return SslObject(self._session, server_side=isinstance(self._config, ServerConfig))
            if name == "cipher":
                return cipher_of(self._session)
            if name == "peercert":
                return peercert_of(self._session)
        return default if self._raw is None else self._raw.get_extra_info(name, default)

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        """Replace the application's protocol."""
        self._protocol = protocol
        # A secure transport within this one gets its bytes by data_received: the shared read buffer
        # may still hold records of this one.
        self._buffered = isinstance(protocol, asyncio.BufferedProtocol) and not isinstance(
            protocol, Receiver
        )

    def get_protocol(self) -> asyncio.BaseProtocol:
        """The application's protocol."""
        return self._protocol

    def is_closing(self) -> bool:
        """Whether this transport or the one below is closed or is being closed."""
        return self._state in (_CLOSING, _CLOSED) or (
            self._raw is not None and self._raw.is_closing()
        )

    # --- the handshake ------------------------------------------------------------------------

    def attach(self, raw: asyncio.Transport) -> None:
        """Start the handshake over a connected transport, which this one owns from now on."""
        self._raw = raw
        if self._failure is not None:  # aborted before the connection was made
            self._abort_raw()
            return
        # The write buffer of an upgraded transport may be full already; only changes are signalled.
        self._raw_full = raw.get_write_buffer_size() > raw.get_write_buffer_limits()[1]
        if self._places is None:
            self.start()
        else:
            self._place = self._places.enter(self, raw, _LINES)

    def wait(self) -> None:
        """Read nothing until :meth:`start`."""
        self.receiver.waits = True
        self._pause_raw()

    def start(self) -> None:
        """Begin the handshake of a connection that has a place."""
        self.receiver.waits = False
        self._resume_raw()
        self._timer = self._loop.call_later(self._handshake_timeout, self._handshake_late)
        if self._answers.waits_to_begin:
            self._wait_for(self._answers.begin)
        else:
            self._advance_handshake(begin=True)

    def _advance_handshake(self, *, begin: bool = False) -> None:
        """Process the handshake messages that have been received."""
        connection = self._connection
        complete = connection.handshake_complete
        try:
            if begin:
                self._answers.begin_at_once()
            while not complete and (event := connection.next_event()) is not None:
                if isinstance(event, SessionProposed) and not self._answers.waits(event):
                    self._answers.give_at_once(event)
                    complete = connection.handshake_complete
                elif isinstance(event, PskWanted | SessionProposed):
                    self._send_output()
                    self._wait_for(partial(self._answers.give, event))
                    return
        except _FAULTS as error:
            self._answers_failed(error)
            return
        self._send_output()
        if connection.handshake_complete:
            self._open()

    def _wait_for(self, answer: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Wait for a key source or a file, with reading paused."""
        self._pause_raw()
        self._task = self._loop.create_task(ask(answer))
        self._task.add_done_callback(self._answered)

    def _answered(self, task: "asyncio.Task[None]") -> None:
        self._task = None
        error = None if task.cancelled() else task.exception()
        if self._state is not _HANDSHAKE:
            return
        assert self._raw is not None
        if task.cancelled():
            self._give_up("the wait for a PSK source or verifier was cancelled")
        elif error is not None:
            self._answers_failed(error)
        elif not self._raw.is_closing():  # else connection_lost follows
            self._resume_raw()
            self._advance_handshake()

    def _answers_failed(self, error: BaseException) -> None:
        if isinstance(error, HybridkexError):
            self._fail(error)
        else:
            self._report("a PSK source or verifier failed", error)
            self._give_up("a PSK source or verifier failed")

    def _handshake_late(self) -> None:
        error = HandshakeTimeout(f"no handshake within {self._handshake_timeout:g} seconds")
        self._connection.abort(error)
        self._fail(error)

    def _open(self) -> None:
        self._session = self._connection.session
        self._state = _OPEN
        self._stop_timer()
        self._leave()
        if self._answers.keeps_tickets:
            self._keep_tickets()
        self._announced = True
        if KeyRenewer.needed(self._config, self._connection):
            self._renewer = KeyRenewer(
                self._config,
                self._connection,
                self._send_for_renewer,
                self._fail_for_renewer,
                pads_changed=self._pads_changed,
            )
            if self._pads is not None:
                self._batch = min(_BATCH, self._pads.piece)
        try:
            if self._announce:
                self._protocol.connection_made(self)
        except _FAULTS as error:
            self._application_failed(error)
            return
        self._check_marks()
        if self._ready is not None and not self._ready.done():
            self._ready.set_result(None)
        self._process()

    async def _send_for_renewer(self) -> None:
        self._send_output()

    async def _fail_for_renewer(self, error: PeerError) -> None:
        self._fail(error)

    @property
    def _pads(self) -> PadFiller | None:
        return None if self._renewer is None else self._renewer.pads

    def _pads_changed(self) -> None:
        """Go on with what waits for a one-time pad, in either direction."""
        if self._failure is not None or self._state is _CLOSED:
            return
        if self._waits_for_pad and not self._connection.waits_for_pad:
            self._waits_for_pad = False
            self._process()
            if not self._waits_for_pad and not self._reading_paused:
                self._resume_raw()
        if self._outgoing or self._end_due:
            self._pump()

    # --- reading ------------------------------------------------------------------------------

    def received(self, data: memoryview) -> None:
        """Process bytes from the transport below. ``data`` is overwritten after this returns."""
        if self._state is _HANDSHAKE:
            try:
                self._connection.receive_data(bytes(data))
            except HybridkexError as error:
                self._fail(error)
            else:
                if self.receiver.waits:
                    self._heard_while_waiting()
                else:
                    self._advance_handshake()
            return
        if self._state is _CLOSED or self._failure is not None:
            return
        try:
            self._connection.receive_data(data)
        except HybridkexError as error:
            self._fail(error)
        else:
            self._process()

    def _heard_while_waiting(self) -> None:
        """uvloop reads once more although connection_made has paused reading."""
        assert self._raw is not None
        self._raw.pause_reading()
        if self._places is not None and self._place is not None:
            self._places.heard(self._place)

    def _process(self) -> None:
        """Deliver the engine's events, or keep the data while reading is paused."""
        self._in_read = True
        try:
            self._take_events()
        except _FAULTS as error:
            self._application_failed(error)
        finally:
            self._in_read = False
            if self._outgoing:
                self._pump()

    def received_record(self, head: memoryview, fragment: memoryview) -> bool:
        """Process a read that is one short record, without the cost of :meth:`received`.

        Returns ``False`` if it is anything else; then call :meth:`received`.
        """
        if self._state is not _OPEN or self._reading_paused or self._held:
            return False
        content = self._connection.receive_record(head, fragment)
        if content is None:
            return False
        if self._renewer is not None:
            self._renewer.received(len(content))
        self._in_read = True
        try:
            if self._buffered:
                self._deliver(content)
            else:
                self._protocol.data_received(content)  # type: ignore[attr-defined]
        except _FAULTS as error:
            self._application_failed(error)
        finally:
            self._in_read = False
        if self._outgoing:
            self._pump()
        return True

    def _take_events(self) -> None:
        connection = self._connection
        next_event = connection.next_event
        while True:
            try:
                event = next_event()
            except HybridkexError as error:
                self._fail(error)
                return
            if event is None:
                break
            connection.keep()  # a callback may run the loop, and another read use the buffer
            if self._renewer is not None:
                self._renewer.saw(event)
            if type(event) is ApplicationData and self._state is _OPEN:
                if self._reading_paused or self._held:
                    self._held.append(event.data)
                else:
                    self._deliver(event.data)
            elif type(event) is TicketReceived and self._answers.keeps_tickets:
                self._keep_tickets()
        if connection.waits_for_pad and not self._waits_for_pad:
            self._waits_for_pad = True
            self._pause_raw()
        if connection.close_received:
            self._deliver_end()
        if connection.has_data_to_send:
            self._send_output()  # a KeyUpdate that answers the peer

    def _keep_tickets(self) -> None:
        """Write the ticket store to disk in a task of its own."""
        task = self._loop.create_task(self._answers.keep_tickets())
        self._keeping.add(task)
        task.add_done_callback(self._kept)

    def _kept(self, task: "asyncio.Task[None]") -> None:
        self._keeping.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None:
            self._report("the session tickets could not be stored", error)

    def _deliver(self, data: bytes | memoryview) -> None:
        """Give data to the protocol; what it does not take, once it has paused reading, waits."""
        view = memoryview(data)
        while view and self._state is _OPEN:
            if self._reading_paused:
                self._held.appendleft(view)
                return
            protocol: Any = self._protocol
            if not self._buffered:
                whole = type(data) is bytes and len(view) == len(data)
                protocol.data_received(data if whole else bytes(view))
                return
            buffer = memoryview(protocol.get_buffer(len(view))).cast("B")
            size = min(len(buffer), len(view))
            if not size:
                raise RuntimeError("get_buffer() returned an empty buffer")
            replaced = self._protocol is not protocol
            if replaced or self._reading_paused or self._state is not _OPEN:
                continue  # by get_buffer
            buffer[:size] = view[:size]
            view = view[size:]
            protocol.buffer_updated(size)

    def _deliver_end(self) -> None:
        """Call ``eof_received`` for the peer's close_notify, once and after all data."""
        if self._state is _CLOSING:
            if not self._end_due:
                self._close_raw()
        elif self._reading_paused or self._held:
            return
        elif self._state is _OPEN and not self._end_delivered:
            self._end_delivered = True
            protocol: Any = self._protocol
            if not protocol.eof_received():
                self.close()

    def ended(self) -> bool:
        """Process the end of the transport below; returns whether it must stay open to write."""
        if self._state is _OPEN and self._connection.close_received:
            return True
        if self._state is _CLOSING and self._end_due:
            self._raw_ended = True
            return True
        if self._state in (_HANDSHAKE, _OPEN) and self._failure is None:
            try:
                self._connection.receive_data(b"")
            except HybridkexError as error:
                self._fail(error)
        return False

    def is_reading(self) -> bool:
        """Whether received data is delivered."""
        return self._state is _OPEN and not self._reading_paused

    def pause_reading(self) -> None:
        """Stop the delivery of data until :meth:`resume_reading`."""
        if self._reading_paused or self._state is not _OPEN:
            return
        self._reading_paused = True
        self._pause_raw()

    def resume_reading(self) -> None:
        """Continue the delivery of data, beginning with the data that waits."""
        if not self._reading_paused or self._state is not _OPEN:
            return
        self._reading_paused = False
        self._loop.call_soon(self._resume)

    def _resume(self) -> None:
        try:
            self._deliver_held()
        except _FAULTS as error:
            self._application_failed(error)

    def _deliver_held(self) -> None:
        while self._held and not self._reading_paused and self._state is _OPEN:
            self._deliver(self._held.popleft())
        if self._reading_paused or self._state is not _OPEN:
            return
        if self._connection.close_received:
            self._deliver_end()
        if self._state is _OPEN and not self._waits_for_pad:
            self._resume_raw()

    def _pause_raw(self) -> None:
        assert self._raw is not None
        if not self._raw_paused:
            self._raw_paused = True
            self._raw.pause_reading()

    def _resume_raw(self) -> None:
        assert self._raw is not None
        if self._raw_paused:
            self._raw_paused = False
            self._raw.resume_reading()

    # --- writing ------------------------------------------------------------------------------

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Send data. This does not block; what cannot be sent now waits.

        Raises:
            RuntimeError: ``write_eof`` was called.
        """
        if type(data) is not bytes:
            if not isinstance(data, bytes | bytearray | memoryview):
                raise TypeError(f"data must be bytes-like, not {type(data).__name__}")
            data = bytes(data)
        if self._state is not _OPEN or self._end_due or self._connection.close_sent:
            self._refuse_write()
            return
        if not data:
            return
        self._outgoing.append(data)
        self._outgoing_size += len(data)
        if self._in_read:
            pass  # it is sent at the end of the read
        elif self._outgoing_size >= _JOIN:
            self._pump()
        else:
            self._pump_soon()
        if self._outgoing_size > self._high_water:
            self._check_marks()

    def writelines(self, list_of_data: Iterable[bytes | bytearray | memoryview]) -> None:
        """Send several pieces of data."""
        for data in list_of_data:
            self.write(data)

    def _refuse_write(self) -> None:
        """Handle a write after ``write_eof`` or after the end."""
        if self._eof_written or self._state is _OPEN:
            raise RuntimeError("Cannot call write() after write_eof()")
        self._ignored_writes += 1
        if self._ignored_writes == _IGNORED_WRITES:
            _LINES.log(logging.WARNING, "data was written to a closed transport and is discarded")

    def _pump_soon(self) -> None:
        if not self._pump_due:
            self._pump_due = True
            self._loop.call_soon(self._pump_later)

    def _pump_later(self) -> None:
        self._pump_due = False
        self._pump()

    def _pump(self) -> None:
        """Encrypt and send one batch, unless the transport below is full."""
        if self._raw_full or self._failure is not None:
            return
        if self._outgoing:
            batch = self._next_batch()
            if self._pads is not None and not self._pads.ready(len(batch)):
                self._outgoing.appendleft(batch)
                self._outgoing_size += len(batch)
                return  # until more of the pad is there
            if self._renewer is not None:
                self._renewer.sent(len(batch))
            record = self._connection.seal_record(batch) if type(batch) is bytes else None
            if record is not None:
                self._send(record)
            else:
                try:
                    self._connection.send_data(batch)
                except HybridkexError as error:
                    self._fail(error)
                    return
                self._send(self._connection.data_to_send())
        if self._outgoing:
            self._pump_soon()
        elif self._end_due:
            self._send_end()
        if self._protocol_paused:
            self._check_marks()

    def _next_batch(self) -> bytes | memoryview:
        """Remove the data of one batch from the queue; short pieces are joined, long ones cut."""
        outgoing = self._outgoing
        if len(outgoing) > 1 and len(outgoing[0]) < self._batch:
            size, pieces = 0, []
            while outgoing and size + len(outgoing[0]) <= self._batch:
                pieces.append(outgoing.popleft())
                size += len(pieces[-1])
            self._outgoing_size -= size
            return b"".join(pieces)
        first = outgoing.popleft()
        if len(first) > self._batch:
            view = memoryview(first)
            outgoing.appendleft(view[self._batch :])
            first = view[: self._batch]
        self._outgoing_size -= len(first)
        return first

    def _send_end(self) -> None:
        """Send close_notify, after all data that was written."""
        self._end_due = False
        self._connection.send_close()
        self._send_output()
        if self._state is _CLOSING and (self._connection.close_received or self._raw_ended):
            self._close_raw()

    def _send_output(self) -> None:
        if self._connection.has_data_to_send:
            self._send(self._connection.data_to_send())

    def _send(self, data: bytes | bytearray) -> None:
        """Pass records to the transport below."""
        raw = self._raw
        if raw is not None and not raw.is_closing():  # else connection_lost follows
            raw.write(data)

    def can_write_eof(self) -> bool:
        """Always true: TLS 1.3 has half-close."""
        return True

    def write_eof(self) -> None:
        """Send close_notify after the data that was written. Receiving continues."""
        if self._state is _OPEN and not self._connection.close_sent:
            self._eof_written = self._end_due = True
            self._pump()

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """Set the marks, in bytes, at which ``pause_writing`` and ``resume_writing`` are called.

        They apply to the data that waits to be encrypted and to the buffer of the transport below,
        each on its own.

        Raises:
            ValueError: ``high >= low >= 0`` does not hold.
        """
        self._set_write_buffer_limits(high, low)  # type: ignore[attr-defined]
        if self._raw is not None and self._state is not _CLOSED:
            self._raw.set_write_buffer_limits(self._high_water, self._low_water)
            self._check_marks()

    def get_write_buffer_size(self) -> int:
        """Bytes that wait to be sent."""
        return self._outgoing_size + (0 if self._raw is None else self._raw.get_write_buffer_size())

    def writing_paused(self, paused: bool) -> None:
        """Process ``pause_writing`` or ``resume_writing`` of the transport below."""
        self._raw_full = paused
        if paused:
            self._check_marks()
        else:
            # A transport of asyncio that is closed within its resume_writing calls connection_lost
            # twice (cpython: _SelectorSocketTransport._write_ready).
            self._loop.call_soon(self._writing_resumed)

    def _writing_resumed(self) -> None:
        if self._raw_full or self._state is _CLOSED:
            return
        if self._outgoing or self._end_due:
            self._pump()
        self._check_marks()

    def _check_marks(self) -> None:
        """Call ``pause_writing`` or ``resume_writing`` where a mark has been crossed."""
        if self._session is None or self._failure is not None:
            return
        try:
            if not self._protocol_paused:
                if self._raw_full or self._outgoing_size > self._high_water:
                    self._protocol_paused = True
                    self._protocol.pause_writing()
            elif not self._raw_full and self._outgoing_size <= self._low_water:
                self._protocol_paused = False
                self._protocol.resume_writing()
        except _FAULTS as error:
            self._application_failed(error)

    # --- the end ------------------------------------------------------------------------------

    def close(self) -> None:
        """Send the data that was written and close_notify, and close when the peer's has come.

        Data that is received meanwhile is discarded. If the peer has not answered within
        ``ssl_shutdown_timeout``, the connection is aborted; if it has not taken all of our data
        either, ``connection_lost`` gets a :exc:`SecureConnectionError`.
        """
        if self._state is _HANDSHAKE:
            self.abort()
            return
        if self._state is not _OPEN:
            return
        self._state = _CLOSING
        self._held.clear()
        self._timer = self._loop.call_later(self._shutdown_timeout, self._shutdown_late)
        if self._connection.close_sent:
            if self._connection.close_received:
                self._close_raw()
                return
        else:
            self._end_due = True
            self._pump()
        self._resume_raw()

    def abort(self) -> None:
        """Close at once. Data that waits is lost, and no alert is sent."""
        if self._state is _CLOSED:
            return
        if self._failure is None:
            self._failure = _ABORTED
        self._state = _CLOSING
        self._drop()
        self._abort_raw()

    def dismiss(self, reason: str) -> None:
        """Close a connection that waits for its handshake, or is in it, for others."""
        self._failure = connection_error(LocalStateError(reason))
        self.abort()

    def _leave(self) -> None:
        """Give back the place for the handshake."""
        if self._places is not None and self._place is not None:
            self._places.leave(self._place)
            self._places = self._place = None

    def _shutdown_late(self) -> None:
        assert self._raw is not None
        if self._failure is None and self.get_write_buffer_size():
            seconds = f"{self._shutdown_timeout:g} seconds"
            cause = TruncationError(f"the peer did not take all of our data within {seconds}")
            self._failure = SecureConnectionTimeout(str(cause))
            self._failure.__cause__ = cause
        self._abort_raw()

    def _abort_raw(self) -> None:
        self._stop()
        if self._raw is not None:
            self._raw.abort()

    def _close_raw(self) -> None:
        """Close the transport below when its buffer is empty, within the shutdown time limit."""
        self._stop()
        assert self._raw is not None
        self._timer = self._loop.call_later(self._shutdown_timeout, self._shutdown_late)
        self._raw.close()

    def _stop(self) -> None:
        self._stop_timer()
        if self._task is not None:
            self._task.cancel()
            self._task = None
        if self._renewer is not None:
            self._renewer.stop()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _drop(self) -> None:
        """Discard the data that waits in both directions."""
        self._held.clear()
        self._outgoing.clear()
        self._outgoing_size = 0
        self._end_due = False

    def _report(self, message: str, error: BaseException) -> None:
        self._loop.call_exception_handler(
            {
                "message": message,
                "exception": error,
                "transport": self,
                "protocol": self._protocol,
            }
        )

    def _application_failed(self, error: BaseException) -> None:
        """End the connection after an exception of the application's protocol."""
        self._report("Fatal error: the application's protocol failed.", error)
        # A CancelledError that propagated from here would cancel the user of the connection.
        cause = error if isinstance(error, Exception) else None
        self._give_up("the application's protocol failed", cause)

    def _give_up(self, why: str, cause: Exception | None = None) -> None:
        """Close with the alert internal_error, for a reason on our side."""
        error = InternalError(why)
        if not self._connection.close_sent:  # nothing follows a close_notify (section 6.1)
            self._connection.abort(error)
        self._fail(error, cause)

    def _fail(self, error: HybridkexError, cause: Exception | None = None) -> None:
        """Send the alert, if there is one, and close. ``connection_lost`` gets ``cause`` or a
        :exc:`SecureConnectionError`."""
        if self._failure is not None or self._state is _CLOSED:
            return
        self._failure = cause or connection_error(self._connection.reason_of(error))
        self._state = _CLOSING
        self._stop()
        self._drop()
        assert self._raw is not None
        self._send_output()
        if self._raw.get_write_buffer_size():
            self._timer = self._loop.call_later(_ALERT_TIMEOUT, self._abort_raw)
        self._raw.close()

    def lost(self, error: Exception | None) -> None:
        """Process ``connection_lost`` of the transport below."""
        if self._task is not None and self._task.done():
            self._answered(self._task)  # it may have refused the session in this turn of the loop
        if self._pads is not None and self._pads.error is not None:
            self._fail(self._pads.error)  # found in this turn, and not reported yet
        was, self._state = self._state, _CLOSED
        self._stop()
        self._leave()
        self._drop()
        complete = self._connection.close_received
        # The application, or the traceback of an error that its reader has raised, may keep this
        # transport.
        self._renewer = None
        self._connection.release()
        # Both lead to tracebacks, those to our frames, and they to us: a reference kept here would
        # keep the keys in memory until the garbage collector runs.
        failure, self._failure = self._failure, None
        ready, self._ready = self._ready, None
        aborted = failure is _ABORTED
        if failure is None and not (complete and was is _CLOSING):
            # After close_notify in both directions, nothing can be lost: a reset is no failure.
            failure = error
        if failure is None and not complete and was is not _CLOSING:
            failure = connection_error(TruncationError("the connection was closed"))
        if ready is not None and not ready.done():
            if failure is None or aborted:
                failure = connection_error(LocalStateError("the connection was aborted"))
            ready.set_exception(failure)
        if self._announced:
            protocol, self._protocol = self._protocol, asyncio.BaseProtocol()  # breaks the cycle
            protocol.connection_lost(None if aborted else failure)
        elif ready is None:
            _LINES.log(logging.WARNING, "%s: %s", self._peer, failure)

    @property
    def _peer(self) -> str:
        """The peer's address, for the log."""
        address = None if self._raw is None else self._raw.get_extra_info("peername")
        return f"{address[0]}:{address[1]}" if isinstance(address, tuple) else "a local peer"


def time_limits(handshake: float | None, shutdown: float | None) -> tuple[float, float]:
    """Apply the defaults to the time limits, in seconds, with the checks of asyncio's own TLS.

    Raises:
        ValueError: one of them is not positive.
    """
    for name, value in (("handshake", handshake), ("shutdown", shutdown)):
        if value is not None and not value > 0:  # nor is nan
            raise ValueError(f"ssl_{name}_timeout should be a positive number, got {value}")
    return (
        _HANDSHAKE_TIMEOUT if handshake is None else handshake,
        _SHUTDOWN_TIMEOUT if shutdown is None else shutdown,
    )


class Receiver(asyncio.BufferedProtocol):
    """The protocol of the transport below."""

    def __init__(self, transport: SecureTransport) -> None:
        self._transport = transport
        self.waits = False
        """Whether the connection waits for a place, and has read enough."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport.attach(cast(asyncio.Transport, transport))  # uvloop's are not asyncio's

    def get_buffer(self, sizehint: int) -> memoryview:
        return _SCRATCH.view[:_READ_WAITING] if self.waits else _SCRATCH.view

    def buffer_updated(self, nbytes: int) -> None:
        buffer = _SCRATCH.view
        if not self._transport.received_record(_SCRATCH.head, buffer[HEADER_LENGTH:nbytes]):
            self._transport.received(buffer[:nbytes])

    def data_received(self, data: bytes) -> None:
        """Data from a secure transport that carries this one."""
        self._transport.received(memoryview(data))

    def eof_received(self) -> bool:
        return self._transport.ended()

    def connection_lost(self, exc: Exception | None) -> None:
        transport = self._transport
        del self._transport  # the last call; breaks the cycle
        transport.lost(exc)

    def pause_writing(self) -> None:
        self._transport.writing_paused(True)

    def resume_writing(self) -> None:
        self._transport.writing_paused(False)
