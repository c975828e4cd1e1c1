"""SecureDuplex: the engine over a stream; the common base of the streams for trio and anyio.

How it works:

- The engine does no I/O. Every method here moves bytes between it and the transport, and each
direction has one owner at a time: a receiving task and a sending task never use the same half of
the transport.
- The first call that needs the handshake runs it, under a lock, with a deadline.
- *Encrypting advances the sequence number.* A send that is cancelled half-way leaves the peer with
part of a record, and we cannot tell which part, so nothing more can be sent; receiving continues. A
receive that is cancelled loses nothing: the engine has the bytes that were read.
- Answers to the peer (KeyUpdate, tickets) are sent with our next data, so receiving never waits for
  the transport to accept bytes. Only an alert is sent from the receiving side: once, shielded, and
  with a time limit, before the error is raised.
- If the session renews its keys, a :class:`~hybridkex.shell.key_renewer.KeyRenewer` runs in
addition to the caller's tasks and sends too; a lock serialises the two.
"""

import contextlib
import math
from collections.abc import Awaitable, Callable
from functools import partial
from types import TracebackType
from typing import Any, ClassVar, Final, NoReturn

from hybridkex.constants import MAX_PLAINTEXT
from hybridkex.errors import (
    ConfigError,
    HandshakeTimeout,
    HybridkexError,
    InternalError,
    PeerError,
    TruncationError,
)
from hybridkex.fields import described, is_number
from hybridkex.net.event_loop import ask, called
from hybridkex.secret import Secret
from hybridkex.shell.answers import CODE_FAILED, Answers
from hybridkex.shell.key_renewer import KeyRenewer
from hybridkex.shell.pad_filler import PadFiller
from hybridkex.shell.secure_pipe import SecurePipe
from hybridkex.text import said
from hybridkex.tls.config import ClientConfig, ServerConfig
from hybridkex.tls.connection import ClientConnection, ServerConnection, connection_for
from hybridkex.tls.events import ApplicationData, PskWanted, SessionProposed, TicketReceived
from hybridkex.tls.events import Event as EngineEvent
from hybridkex.tls.one_time_pad import PadBudget
from hybridkex.tls.protection import FULL_RECORD
from hybridkex.tls.session import Session

DEFAULT_HANDSHAKE_TIMEOUT: Final = 10.0
"""The default time limit for a handshake in seconds."""

READ_SIZE: Final = 16 * FULL_RECORD
_SEND_SIZE: Final = 16 * MAX_PLAINTEXT
_ALERT_TIMEOUT: Final = 1.0
_CLOSE_TIMEOUT: Final = 10.0
_ACKNOWLEDGED_EVERY: Final = 0.02
"""Seconds between two checks whether our data was acknowledged."""

# Every call allocates and frees buffers of these sizes. The GNU C library returns freed memory to
# the kernel beyond twice the size of the largest block that was ever freed (mallopt(3), the dynamic
# mmap threshold), and every page of the next buffer would fault again: a third of the time of a
# bulk transfer. Freeing one large block raises the threshold; with other C libraries this has no
# effect.
bytearray(4 * READ_SIZE)


def check_options(handshake_timeout: Any, **switches: object) -> None:
    """Check the options of a stream or listener.

    Raises:
        ConfigError: the time limit is not above 0, or one of the switches is no ``bool``.
    """
    if not is_number(handshake_timeout) or not handshake_timeout > 0:
        shown = (
            f"{handshake_timeout}" if is_number(handshake_timeout) else described(handshake_timeout)
        )
        raise ConfigError(
            f"handshake_timeout takes seconds above 0, or math.inf for no limit, not {shown}"
        )
    for name, value in switches.items():
        if type(value) is not bool:
            raise ConfigError(f"{name} takes True or False, not {described(value)}")


class SecureDuplex:
    """An encrypted stream over another stream; a subclass adapts it to the streams of a library.

    The errors named below are those of trio or anyio. A ``BrokenResourceError`` has the reason, one
    of :mod:`hybridkex.errors`, as its ``__cause__``.

    Args:
        config: a :class:`ClientConfig` makes this the client, a :class:`ServerConfig` the server.
        server_hostname: the name or address that the server's certificate must have (client).
        close_notify: send close_notify at the end and demand the peer's.
        handshake_timeout: time limit for the handshake in seconds; ``math.inf`` for no limit.
    """

    _lib: ClassVar[Any]
    """trio or anyio, which have the same names for locks, cancel scopes, checkpoints and errors."""

    transport_stream: Any

    def __init__(
        self,
        config: ClientConfig | ServerConfig,
        server_hostname: str | None,
        *,
        close_notify: bool,
        handshake_timeout: float,
    ) -> None:
        self._config = config
        self._connection = connection_for(config, server_hostname)
        self._answers = Answers(config, self._connection)
        self._close_notify = close_notify
        self._handshake_timeout = handshake_timeout
        self._handshake_lock = self._lib.Lock()
        self._handshaking: Any = None
        """The cancel scope of the handshake while it runs."""
        self._complete = False
        self._renewer: KeyRenewer | None = None
        self._pipe: SecurePipe | None = None
        """The pipe that moves the data in place of our own methods."""
        self._send_lock = self._lib.Lock()
        self._telling = self._lib.Lock()
        """Held while a task sends the alert of the failure."""
        # For the error of two tasks in one direction.
        self._sending = _Guard(partial(self._busy, "sending to"))
        self._receiving = _Guard(partial(self._busy, "receiving from"))
        self._flushed: Any = None
        """Set when the current send has ended; ``None`` while there is none."""
        self._failure: BaseException | None = None
        self._send_failure: BaseException | None = None
        self._closed = False
        self._has_carried_data = False
        self._pending = memoryview(b"")

    # --- what a subclass gives ----------------------------------------------------------------

    async def _read_some(self) -> bytes | bytearray:
        """Read from the transport; empty at its end."""
        raise NotImplementedError

    async def _write(self, data: bytes | bytearray) -> None:
        """Write all of it to the transport."""
        raise NotImplementedError

    @property
    def _unacknowledged(self) -> int:
        """Bytes that the transport has accepted and the peer's system has not acknowledged; 0 if
        unknown."""
        raise NotImplementedError

    @staticmethod
    def _busy(action: str) -> Exception:
        """The error for a second task that is ``sending to`` or ``receiving from`` this stream."""
        raise NotImplementedError

    @property
    def _connected(self) -> ClientConnection | ServerConnection:
        """The engine, for queries about the session."""
        return self._connection

    # --- properties ---------------------------------------------------------------------------

    @property
    def session(self) -> Session:
        """The parameters of the session: groups, keys and the identity of the peer."""
        return self._connected.session

    def export(self, label: bytes, context: bytes, length: int) -> Secret:
        """Exported keying material for an application protocol (RFC 9846 section 7.5).

        Args:
            label: the label of the application protocol, 1 to 249 bytes.
            context: the protocol's context; may be empty.
            length: the number of bytes, 1 to 12,240 with SHA-384 and to 8,160 with SHA-256.

        Raises:
            LocalStateError: the handshake is not complete, or the connection was closed.
            ConfigError: ``label`` or ``length`` is out of range.
        """
        return self._connected.export(label, context, length)

    def export_fresh(self, label: bytes, context: bytes, length: int) -> Secret:
        """Like :meth:`export`, from the current epoch's exporter secret, which each key update
        replaces (draft-ietf-tls-extended-key-update-13 section 10).

        ``label``, ``context`` and ``length`` are those of :meth:`export`.

        Raises:
            LocalStateError: Extended Key Update was not negotiated.
        """
        return self._connected.export_fresh(label, context, length)

    @property
    def pad(self) -> PadBudget | None:
        """The remaining one-time pads; ``None`` if none was negotiated."""
        connection = self._connected
        return connection.pad if self._pads is None else self._pads.budget

    @property
    def _pads(self) -> PadFiller | None:
        return None if self._renewer is None else self._renewer.pads

    # --- the handshake ------------------------------------------------------------------------

    async def _handshake(self) -> None:
        """Run the handshake, unless it has been run."""
        self._check_usable()
        if self._complete:
            await self._lib.lowlevel.checkpoint()
            return
        if self._handshake_lock.locked():
            async with self._handshake_lock:
                self._check_usable()
                return  # The task that held the lock has completed the handshake, or has failed.
        # A caller that is already cancelled does not change the stream.
        await self._lib.lowlevel.checkpoint_if_cancelled()
        self._handshake_lock.acquire_nowait()
        try:
            await self._handshake_in_time()
        finally:
            self._handshake_lock.release()

    async def _handshake_in_time(self) -> None:
        try:
            with self._lib.move_on_after(self._handshake_timeout) as scope:
                self._handshaking = scope
                await self._run_handshake()
            if not self._complete and scope.cancelled_caught:
                seconds = f"{self._handshake_timeout:g} seconds"
                await self._fail(
                    HandshakeTimeout(f"the handshake did not complete within {seconds}")
                )
        finally:
            self._handshaking = None
            if not self._complete and self._failure is None:
                # Part of a flight may have been sent.
                self._failure = _Interrupted("the handshake was cancelled")
                self._connection.release()

    async def _run_handshake(self) -> None:
        connection = self._connection
        try:
            await self._ask(self._answers.begin)
            while True:
                await self._ask(self._answer)
                await self._flush()
                if connection.handshake_complete:
                    break
                connection.receive_data(await self._read())
            await self._ask(self._answers.keep_tickets)
        except HybridkexError as error:
            await self._fail(error)
        self._check_usable()  # it may have been closed while the tickets were written
        self._complete = True
        if KeyRenewer.needed(self._config, connection):
            gone = (self._lib.BrokenResourceError, self._lib.ClosedResourceError)
            self._renewer = KeyRenewer(
                self._config,
                connection,
                self._send_for_renewer,
                self._fail_for_renewer,
                gone,
                self._pads_changed,
            )

    async def _ask(self, question: Callable[[], Awaitable[None]]) -> None:
        """Call code of the configuration."""
        try:
            await ask(question)
        except Exception as error:
            await self._fail(error)

    async def _answer(self) -> None:
        connection = self._connection
        while not connection.handshake_complete and (event := connection.next_event()) is not None:
            if isinstance(event, PskWanted | SessionProposed):
                await self._answers.give(event)

    async def _send_for_renewer(self) -> None:
        async with self._send_lock:
            # After a failure or a close, the task that caused it sends what is queued.
            if self._pipe is not None:
                self._pipe.flush()
            elif self._send_failure is None and self._failure is None and not self._closed:
                await self._flush()

    async def _fail_for_renewer(self, error: PeerError) -> None:
        """End the connection; the caller's tasks will raise the reason."""
        if self._pipe is not None:
            self._pipe.end(error)
            return
        try:
            await self._fail(error)
        finally:
            # The first task that failed may be sending its alert.
            with self._lib.CancelScope(shield=True):
                async with self._telling:
                    await self._lib.aclose_forcefully(self.transport_stream)

    def _pads_changed(self) -> None:
        if self._pipe is not None:
            self._pipe.resume()

    def _stop_renewer(self) -> None:
        if self._renewer is not None:
            self._renewer.stop()

    # --- receiving ----------------------------------------------------------------------------

    async def _receive(self, max_bytes: int | None) -> bytes:
        """Data from the peer; ``b""`` once it has closed its direction."""
        with self._receiving:
            self._check_usable()
            await self._lib.lowlevel.checkpoint_if_cancelled()
            if not self._complete:
                try:
                    await self._handshake()
                except self._lib.BrokenResourceError as error:
                    if not self._close_notify and isinstance(error.__cause__, TruncationError):
                        return b""  # As in trio: the peer connected and sent nothing.
                    raise
            if not self._pending:
                data = await self._receive_more()
                if data is None:
                    return b""
                if max_bytes is None or max_bytes >= len(data):
                    return data  # Without a copy of the decrypted buffer.
                self._pending = memoryview(data)
            else:
                await self._lib.lowlevel.cancel_shielded_checkpoint()
            pending = self._pending
            size = len(pending) if max_bytes is None else max_bytes
            self._pending = pending[size:]
            return bytes(pending[:size])

    async def _receive_more(self) -> bytes | None:
        """Wait for application data; ``None`` at the peer's close_notify.

        This is always a checkpoint, and a cancellation never loses data that the engine has
        returned.
        """
        connection = self._connection
        waited = False
        while True:
            try:
                event = called(connection.next_event)
                if isinstance(event, TicketReceived):
                    await self._answers.keep_tickets()
            except Exception as error:
                await self._fail(error)
            if self._renewer is not None:
                self._renew_after(self._renewer, event)
            if isinstance(event, ApplicationData) or connection.close_received:
                self._has_carried_data = True
                if not waited:
                    await self._lib.lowlevel.cancel_shielded_checkpoint()
                return event.data if isinstance(event, ApplicationData) else None
            if event is not None:
                continue
            waited = True
            try:
                if self._pads is not None and connection.waits_for_pad:
                    await self._wait_for_key(self._pads)
                    continue
                connection.receive_data(await self._read())
            except TruncationError as error:
                if not self._close_notify:
                    return None
                await self._fail(error)
            except HybridkexError as error:
                await self._fail(error)

    def _renew_after(self, renewer: KeyRenewer, event: EngineEvent | None) -> None:
        if event is not None:
            renewer.saw(event)
        if self._connection.has_data_to_send:
            renewer.wake()

    async def _wait_for_key(self, pads: PadFiller) -> None:
        try:
            await pads.wait_for_key()
        except HybridkexError:
            self._check_usable()
            raise

    async def _read(self) -> bytes | bytearray:
        try:
            return await self._read_some()
        except self._lib.BrokenResourceError as error:
            self._check_usable()
            self._failure = error
            self._connection.release()
            raise
        except self._lib.ClosedResourceError:
            if self._closed:
                raise
            self._check_usable()
            raise self._lib.BrokenResourceError("the transport was closed") from None

    # --- sending ------------------------------------------------------------------------------

    async def _begin_to_send(self) -> None:
        """Check before anything is encrypted: a cancelled caller must not break the stream."""
        self._check_sendable()
        await self._lib.lowlevel.checkpoint_if_cancelled()
        if not self._complete:
            await self._handshake()
            self._check_sendable()

    async def _send(self, data: bytes | bytearray | memoryview) -> None:
        """Send all of ``data``. If this is cancelled, nothing more can be sent.

        Under a one-time pad this waits if there are too few QKD keys.
        """
        view = memoryview(data)
        view = view.cast("B") if view.nbytes else memoryview(b"")
        with self._sending:
            await self._begin_to_send()
            if not view:
                await self._lib.lowlevel.checkpoint()
                return
            size = _SEND_SIZE if self._pads is None else self._pads.piece
            for start in range(0, len(view), size):
                piece = view[start : start + size]
                if self._pads is not None:
                    await self._wait_for_pad(self._pads, len(piece))
                self._has_carried_data = True
                if self._renewer is None:
                    self._queue(self._connection.send_data, piece)
                    await self._flush()
                    continue
                async with self._send_lock:
                    self._check_sendable()
                    self._queue(self._connection.send_data, piece)
                    self._renewer.sent(len(piece))
                    await self._flush()

    async def _wait_for_pad(self, pads: PadFiller, size: int) -> None:
        try:
            await pads.wait_until_ready(size)
        except HybridkexError as error:
            self._break(error)

    def _queue(self, function: Callable[..., None], *arguments: Any, **options: Any) -> None:
        """Call a function of the engine that queues something to send."""
        try:
            function(*arguments, **options)
        except HybridkexError as error:
            self._break(error)

    async def _flush(self) -> None:
        """Send what the engine has queued. After an incomplete send, nothing more can be sent."""
        connection = self._connection
        if not connection.has_data_to_send:
            return
        self._flushed = self._lib.Event()
        complete = False
        try:
            await self._write(connection.data_to_send())
            complete = True
        except self._lib.BrokenResourceError as error:
            self._send_failure = self._send_failure or error
            self._check_usable()
            raise
        except self._lib.ClosedResourceError:
            if self._closed:
                raise
            self._check_usable()
            raise self._lib.BrokenResourceError("the transport was closed") from None
        finally:
            if not complete and self._send_failure is None:
                self._send_failure = _Interrupted("an earlier send did not complete")
            self._flushed.set()
            self._flushed = None

    async def update_keys(self, *, request_peer: bool = False) -> None:
        """Change the key of our direction now (RFC 9846 section 4.7.3); this happens automatically
        long before the limits of the cipher suite.

        If Extended Key Update was negotiated, this starts one, with a QKD key if the policy uses
        them, and does not wait for its completion; :attr:`session` will then have a new epoch.

        Args:
            request_peer: ask the peer to change its key, too, which it does with its next data. An
                Extended Key Update changes both keys in any case.
        """
        with self._sending:
            await self._begin_to_send()
            if self._renewer is not None and self._renewer.extended:
                self._renewer.update()
                await self._lib.lowlevel.checkpoint()
                return
            async with self._send_lock:
                self._queue(self._connection.update_keys, request_peer=request_peer)
                await self._flush()

    async def send_eof(self) -> None:
        """Send close_notify: we send no more data. Receiving continues.

        The transport stays open in both directions; TLS signals the end itself.
        """
        with self._sending:
            self._check_usable()
            if self._connection.close_sent and self._send_failure is None:
                await self._lib.lowlevel.checkpoint()
                return
            await self._begin_to_send()
            async with self._send_lock:
                self._queue(self._connection.send_close)
                try:
                    await self._flush()
                except self._lib.BrokenResourceError:
                    # A peer that has ended its direction may close at once. All its data has been
                    # received, and nothing needs our close_notify (section 6.1).
                    if not self._connection.close_received:
                        raise

    # --- the end ------------------------------------------------------------------------------

    async def aclose(self) -> None:
        """Send close_notify, after a handshake and unless a send is under way; close the transport.

        This waits until the peer's system has acknowledged close_notify and all data before it, for
        at most ten seconds and unless cancelled, but not for the peer's answer. Data that the peer
        sends meanwhile is discarded. The transport is closed in any case.
        """
        if self._closed:
            await self._lib.lowlevel.checkpoint()
            return
        self._closed = True
        try:
            if self._is_whole and not self._sending.busy:
                with self._lib.move_on_after(_CLOSE_TIMEOUT), self._unless_gone():
                    if self._close_notify and not self._connection.close_sent:
                        await self._send_close_notify()
                    await self._see_off()
        finally:
            self._release()
            await self.transport_stream.aclose()

    async def _send_close_notify(self) -> None:
        """Send close_notify after any send of the key renewer."""
        async with self._send_lock:
            self._stop_renewer()
            if self._send_failure is None:
                self._connection.send_close()
                await self._flush()

    async def _see_off(self) -> None:
        """Read and discard until the peer's system has acknowledged all that we have sent.

        A TCP connection that is closed with received bytes unread, or that receives more after it
        was closed, is reset (RFC 9293 section 3.6.1), and data in flight is lost. The session
        tickets that servers send unrequested are such bytes.
        """
        while self._unacknowledged:
            with self._lib.move_on_after(_ACKNOWLEDGED_EVERY):
                if self._receiving.busy:
                    await self._lib.sleep(_ACKNOWLEDGED_EVERY)
                elif not await self._read_some():
                    return

    async def abort(self) -> None:
        """Close in a way that the peer cannot take for the end of our data.

        The peer gets the fatal alert internal_error (RFC 9846 section 6.2) if it can be sent now,
        and never a close_notify. ``async with`` calls this when an exception leaves its block.
        """
        if self._closed:
            await self._lib.lowlevel.checkpoint()
            return
        self._closed = True
        try:
            if self._can_tell:
                self._connection.abort(InternalError("the application aborted the connection"))
                with self._lib.move_on_after(_ALERT_TIMEOUT), self._unless_gone():
                    await self._send_alert()
        finally:
            self._release()
            await self._lib.aclose_forcefully(self.transport_stream)

    def _release(self) -> None:
        """Discard the keys, which a program that keeps a closed stream would keep, and the errors:
        their tracebacks refer to our frames, and these to this object."""
        self._stop_renewer()
        if self._handshaking is not None:  # it may wait for a key source
            self._handshaking.cancel()
        self._renewer = self._failure = self._send_failure = None
        self._connection.release()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await (self.aclose() if error is None else self.abort())

    # --- states -------------------------------------------------------------------------------

    @property
    def _can_tell(self) -> bool:
        """Whether the peer can be told of the end, and there is time for it."""
        return self._is_whole and not self._connection.close_sent

    @property
    def _is_whole(self) -> bool:
        """Whether the connection is intact, and there is time to close it properly."""
        return (
            self._complete
            and self._failure is None
            and self._send_failure is None
            and self._lib.current_effective_deadline() > -math.inf
        )

    def _unless_gone(self) -> contextlib.suppress:
        """Ignore errors of a connection whose peer has gone: the peer needs no message."""
        lib = self._lib
        return contextlib.suppress(
            HybridkexError,
            *(lib.BrokenResourceError, lib.BusyResourceError, lib.ClosedResourceError),
        )

    def _broken(self, cause: BaseException) -> Exception:
        """The ``BrokenResourceError`` of the library for the reason of a failure."""
        error: Exception = self._lib.BrokenResourceError(said(cause))
        return error

    def _check_usable(self) -> None:
        if self._closed:
            raise self._lib.ClosedResourceError("this stream is closed")
        if self._failure is not None:
            raise self._broken(self._failure) from self._failure.with_traceback(None)

    def _break(self, error: HybridkexError) -> NoReturn:
        """Raise the first failure of this stream; ``error`` if there was none."""
        self._check_usable()
        reason = self._connection.reason_of(error.with_traceback(None))
        raise self._broken(reason) from reason

    def _check_sendable(self) -> None:
        self._check_usable()
        if self._send_failure is not None:
            raise self._broken(self._send_failure) from self._send_failure.with_traceback(None)
        if self._connection.close_sent:
            raise self._lib.ClosedResourceError("send_eof was called on this stream")

    async def _fail(self, error: Exception) -> NoReturn:
        """Send the alert, if there is one, and raise. The first failure is reported: another task
        may notice the end of the engine before it knows the reason.

        An exception of code of the configuration is raised as it is; to the peer and to later calls
        it is an internal error."""
        self._check_usable()
        if isinstance(error, HybridkexError):
            reason = self._connection.reason_of(error.with_traceback(None))
        else:
            reason = InternalError(CODE_FAILED)
        self._connection.abort(reason)
        self._failure = reason
        if self._pads is not None:
            self._pads.stop()
        if self._connection.has_data_to_send:
            with self._lib.move_on_after(_ALERT_TIMEOUT, shield=True), self._unless_gone():
                async with self._telling:
                    await self._send_alert()
        self._connection.release()
        if not isinstance(error, HybridkexError):
            raise error
        raise self._broken(reason) from reason

    async def _send_alert(self) -> None:
        """Send the alert that the engine has queued, after the send of another task. If that send
        does not complete, the peer at least sees the connection end."""
        if self._flushed is not None:
            await self._flushed.wait()
        if self._send_failure is None:
            await self._write(self._connection.data_to_send())


class _Interrupted(HybridkexError):
    """A send was cancelled after it had begun, which breaks the stream."""


class _Guard:
    """Refuses a second task in one direction, as the streams of trio and anyio do."""

    __slots__ = ("_error", "busy")

    def __init__(self, error: Callable[[], Exception]) -> None:
        self._error = error
        self.busy = False

    def __enter__(self) -> None:
        if self.busy:
            raise self._error()
        self.busy = True

    def __exit__(self, *error: object) -> None:
        self.busy = False
