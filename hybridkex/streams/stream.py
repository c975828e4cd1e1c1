"""SecureStream: the engine on a trio stream, in the shape of ``trio.SSLStream``.

How it works:

- The engine does no I/O. Every method here moves bytes between it and the transport, and each
  direction has one owner at a time: a task that receives and a task that sends never touch the same
  half of the transport.
- The handshake is lazy: the first call that needs it runs it, under a lock, with a deadline.
- *Encrypting advances the sequence number.* A send that is cancelled half-way leaves the peer with
  part of a record and us unable to say which, so it breaks sending for good; receiving goes on. A
  receive that is cancelled loses nothing: what was read is in the engine.
- Answers to the peer (KeyUpdate, tickets) ride on our next send, so receiving never waits for the
  transport to take bytes. Only an alert is sent from the receiving side: once, shielded, and with a
  time limit, before the error is raised.
- Where the session renews its keys, a :class:`~hybridkex.shell.key_keeper.KeyKeeper` runs beside
  the caller's tasks and sends too; a lock keeps the two apart.
"""

import contextlib
import math
import operator
from types import TracebackType
from typing import Final, Generic, NoReturn, TypeVar

import trio
from trio.abc import HalfCloseableStream, Stream

from hybridkex.errors import (
    HandshakeTimeout,
    HybridkexError,
    InternalError,
    KeySourceError,
    LocalStateError,
    PeerError,
    TruncationError,
)
from hybridkex.fields import Kind, check_fields
from hybridkex.secret import Secret
from hybridkex.shell.answers import Answers
from hybridkex.shell.key_keeper import KeyKeeper
from hybridkex.tls.config import ClientConfig, ServerConfig
from hybridkex.tls.connection import connection_for
from hybridkex.tls.events import ApplicationData, PskWanted, SessionProposed, TicketReceived
from hybridkex.tls.session import Session

__all__ = ["DEFAULT_HANDSHAKE_TIMEOUT", "SecureStream"]

DEFAULT_HANDSHAKE_TIMEOUT: Final = 10.0
"""Seconds for a whole handshake."""

_READ_SIZE: Final = 256 * 1024
_SEND_SIZE: Final = 256 * 1024
_ALERT_TIMEOUT: Final = 1.0

# Buffers of these sizes come and go with every call. The GNU C library gives memory back to the
# kernel beyond twice the size of the largest block that was ever freed (mallopt(3), the dynamic
# mmap threshold), and every page of the next buffer would have to be fetched again: a third of the
# time of a bulk transfer. A block that is freed once sets the bound; elsewhere this does nothing.
bytearray(4 * _READ_SIZE)
_CLOSE_TIMEOUT: Final = 10.0

_STREAM: Final = Kind(
    lambda value: all(hasattr(value, name) for name in ("send_all", "receive_some", "aclose")),
    "a trio stream",
)

T = TypeVar("T", bound=Stream)


class SecureStream(HalfCloseableStream, Generic[T]):
    """An encrypted stream over another stream.

    Args:
        transport_stream: what carries the bytes; this stream owns it from now on.
        config: a :class:`ClientConfig` makes this the client, a :class:`ServerConfig` the server.
        server_hostname: the name or address that the server's certificate must have (client).
        https_compatible: do not send or ask for close_notify at the end, as HTTPS does not; then
            only the protocol above can tell a cut connection from an ended one.
        handshake_timeout: seconds that the handshake may take; ``math.inf`` for no limit.

    Errors come as ``trio.SSLStream``'s do: :exc:`trio.BrokenResourceError` with the reason, one of
    :mod:`hybridkex.errors`, as its ``__cause__``.
    """

    def __init__(
        self,
        transport_stream: T,
        config: ClientConfig | ServerConfig,
        *,
        server_hostname: str | None = None,
        https_compatible: bool = False,
        handshake_timeout: float = DEFAULT_HANDSHAKE_TIMEOUT,
    ) -> None:
        self.transport_stream: T = transport_stream
        check_fields(self, {"transport_stream": (_STREAM, "SecureStream(tcp_stream, config)")})
        self._session: Session | None = None
        self._connection = connection_for(config, server_hostname)
        self._has_carried_data = False
        self._answers = Answers(config, self._connection)
        self._config = config
        self._keeper: KeyKeeper | None = None
        self._send_lock = trio.Lock()
        self._https_compatible = https_compatible
        self._handshake_timeout = handshake_timeout
        self._handshake_lock = trio.Lock()
        # Users' mistakes: two tasks in one direction.
        self._send_guard = _Guard("another task is sending on this SecureStream")
        self._receive_guard = _Guard("another task is receiving on this SecureStream")
        self._failure: BaseException | None = None
        self._send_failure: BaseException | None = None
        self._closed = False
        self._pending = memoryview(b"")

    # --- properties ---------------------------------------------------------------------------

    @property
    def has_carried_data(self) -> bool:
        """Whether application data, or its end, has passed in either direction."""
        return self._has_carried_data

    @property
    def session(self) -> Session:
        """What the keys of this connection rest on.

        Raises:
            trio.NeedHandshakeError: the handshake is not complete.
        """
        if self._session is None:
            raise trio.NeedHandshakeError("call do_handshake() first")
        return self._connection.session

    def export(self, label: bytes, context: bytes, length: int) -> Secret:
        """Keying material for a protocol above (RFC 9846 section 7.5).

        Raises:
            trio.NeedHandshakeError: the handshake is not complete.
        """
        if self._session is None:
            raise trio.NeedHandshakeError("call do_handshake() first")
        return self._connection.export(label, context, length)

    def export_fresh(self, label: bytes, context: bytes, length: int) -> Secret:
        """As :meth:`export`, from the exporter secret of the epoch in use: another one after each
        key update (draft-ietf-tls-extended-key-update-13 section 10).

        Raises:
            trio.NeedHandshakeError: the handshake is not complete.
            LocalStateError: Extended Key Update was not negotiated.
        """
        if self._session is None:
            raise trio.NeedHandshakeError("call do_handshake() first")
        return self._connection.export_fresh(label, context, length)

    # --- the handshake ------------------------------------------------------------------------

    async def do_handshake(self) -> None:
        """Run the handshake, if it has not been run. The first send or receive does so too.

        Raises:
            trio.BrokenResourceError: it failed; ``__cause__`` says why.
        """
        self._check_usable()
        if self._session is not None:
            await trio.lowlevel.checkpoint()
            return
        if self._handshake_lock.locked():
            async with self._handshake_lock:
                self._check_usable()
                return  # The task that held the lock has run the handshake, or has failed.
        # A caller who is cancelled already leaves the stream as it is.
        await trio.lowlevel.checkpoint_if_cancelled()
        self._handshake_lock.acquire_nowait()
        try:
            await self._handshake_in_time()
        finally:
            self._handshake_lock.release()

    async def _handshake_in_time(self) -> None:
        complete = False
        try:
            with trio.move_on_after(self._handshake_timeout) as scope:
                await self._run_handshake()
                complete = True
            if not complete and scope.cancelled_caught:
                error = HandshakeTimeout(f"no handshake within {self._handshake_timeout:g} seconds")
                self._connection.abort(error)
                await self._fail(error)
        finally:
            if not complete and self._failure is None:
                # Cancelled in the middle: part of a flight may be on its way.
                self._failure = _Interrupted("the handshake was cancelled")

    async def _run_handshake(self) -> None:
        connection = self._connection
        try:
            await self._answers.begin()
            while True:
                await self._advance()
                await self._flush()
                if connection.handshake_complete:
                    await self._answers.keep_tickets()
                    self._session = connection.session
                    if KeyKeeper.needed(self._config, connection):
                        self._keeper = KeyKeeper(
                            self._config,
                            connection,
                            self._send_for_keeper,
                            self._fail_for_keeper,
                            (trio.BrokenResourceError, trio.ClosedResourceError),
                        )
                    return
                connection.receive_data(await self._read_transport())
        except HybridkexError as error:
            await self._fail(error)

    async def _send_for_keeper(self) -> None:
        async with self._send_lock:
            if self._send_failure is None:
                await self._flush()

    async def _fail_for_keeper(self, error: PeerError) -> None:
        """End the connection: the caller's tasks find the reason."""
        try:
            await self._fail(error)
        finally:
            await trio.aclose_forcefully(self.transport_stream)

    def _stop_keeper(self) -> None:
        if self._keeper is not None:
            self._keeper.stop()

    async def _advance(self) -> None:
        """Process the bytes that have come."""
        connection = self._connection
        while not connection.handshake_complete:
            event = connection.next_event()
            if event is None:
                return
            if isinstance(event, PskWanted | SessionProposed):
                await self._answers.give(event)

    # --- receiving ----------------------------------------------------------------------------

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Data from the peer; ``b""`` once it has closed its direction.

        Raises:
            trio.BrokenResourceError: the connection failed or was cut; ``__cause__`` says why.
            trio.ClosedResourceError: this stream was closed.
            trio.BusyResourceError: another task is receiving.
        """
        with self._receive_guard:
            if max_bytes is not None and operator.index(max_bytes) < 1:
                raise ValueError("max_bytes must be >= 1")
            self._check_usable()
            await trio.lowlevel.checkpoint_if_cancelled()
            if self._session is None:
                try:
                    await self.do_handshake()
                except trio.BrokenResourceError as error:
                    if self._https_compatible and isinstance(error.__cause__, TruncationError):
                        return b""  # As in trio: the peer connected and left without a word.
                    raise
            if not self._pending:
                data = await self._receive_more()
                if data is None:
                    return b""
                if max_bytes is None or max_bytes >= len(data):
                    return data  # As it was decrypted, without a copy.
                self._pending = memoryview(data)
            else:
                await trio.lowlevel.cancel_shielded_checkpoint()
            pending = self._pending
            if max_bytes is None or max_bytes >= len(pending):
                self._pending = memoryview(b"")
                return bytes(pending)
            self._pending = pending[max_bytes:]
            return bytes(pending[:max_bytes])

    async def _receive_more(self) -> bytes | None:
        """Wait for application data; ``None`` at the peer's close_notify.

        Always a checkpoint, and one that cannot lose what the engine has handed out.
        """
        connection = self._connection
        waited = False
        while True:
            try:
                event = connection.next_event()
                if isinstance(event, TicketReceived):
                    await self._answers.keep_tickets()
            except HybridkexError as error:
                await self._fail(error)
            if self._keeper is not None:
                if event is not None:
                    self._keeper.saw(event)
                if connection.has_data_to_send:
                    self._keeper.wake()
            if isinstance(event, ApplicationData) or connection.close_received:
                self._has_carried_data = True
                if not waited:
                    await trio.lowlevel.cancel_shielded_checkpoint()
                return event.data if isinstance(event, ApplicationData) else None
            if event is not None:
                continue
            data = await self._read_transport()
            waited = True
            try:
                connection.receive_data(data)
            except TruncationError as error:
                if self._https_compatible:
                    return None
                await self._fail(error)
            except HybridkexError as error:
                await self._fail(error)

    async def _read_transport(self) -> bytes | bytearray:
        try:
            return await self.transport_stream.receive_some(_READ_SIZE)
        except trio.BrokenResourceError as error:
            self._failure = error
            raise
        except trio.ClosedResourceError:
            if self._closed:
                raise
            self._check_usable()
            raise trio.BrokenResourceError("the transport was closed") from None

    # --- sending ------------------------------------------------------------------------------

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send all of ``data``. If this is cancelled, nothing more can be sent.

        Raises:
            trio.BrokenResourceError: the connection failed; ``__cause__`` says why.
            trio.ClosedResourceError: this stream was closed, or its sending direction was.
            trio.BusyResourceError: another task is sending.
        """
        with self._send_guard:
            self._check_sendable()
            # Before anything is encrypted: a cancelled caller must not break what is whole.
            await trio.lowlevel.checkpoint_if_cancelled()
            if self._session is None:
                await self.do_handshake()
                self._check_sendable()
            view = memoryview(data).cast("B") if data else memoryview(b"")
            if not view:
                await trio.lowlevel.checkpoint()
                return
            for start in range(0, len(view), _SEND_SIZE):
                piece = view[start : start + _SEND_SIZE]
                if self._keeper is None:
                    self._queue(piece)
                    await self._flush()
                    continue
                async with self._send_lock:
                    self._check_sendable()
                    self._queue(piece)
                    await self._flush()
                self._keeper.count(len(piece))

    def _queue(self, piece: memoryview) -> None:
        self._has_carried_data = True
        try:
            self._connection.send_data(piece)
        except HybridkexError as error:
            self._check_usable()  # If the receiving side has failed, its reason says more.
            raise trio.BrokenResourceError(str(error)) from error

    async def _flush(self) -> None:
        """Send what the engine has queued. After an incomplete send, nothing more can be sent."""
        connection = self._connection
        if not connection.has_data_to_send:
            return
        complete = False
        try:
            await self.transport_stream.send_all(connection.data_to_send())
            complete = True
        except trio.ClosedResourceError:
            if self._closed:
                raise
            self._check_usable()
            raise trio.BrokenResourceError("the transport was closed") from None
        finally:
            if not complete and self._send_failure is None:
                self._send_failure = _Interrupted("an earlier send did not complete")

    async def wait_send_all_might_not_block(self) -> None:
        """Wait until ``send_all`` may go through at once; see ``trio.abc.SendStream``."""
        with self._send_guard:
            self._check_sendable()
            await self.transport_stream.wait_send_all_might_not_block()

    async def update_keys(self, *, request_peer: bool = False) -> None:
        """Change the key of our direction now (RFC 9846 section 4.7.3); long before the limits of
        the cipher suite it happens by itself.

        Where Extended Key Update was agreed on, this starts one, with a QKD key where the policy
        has it so, and does not wait for its end: :attr:`session` then shows another epoch.

        Args:
            request_peer: ask the peer to change its own too, which it does with its next data. An
                Extended Key Update changes both in any case.
        """
        with self._send_guard:
            self._check_sendable()
            await trio.lowlevel.checkpoint_if_cancelled()
            if self._session is None:
                await self.do_handshake()
                self._check_sendable()
            if self._keeper is not None and self._keeper.extended:
                self._keeper.update()
                await trio.lowlevel.checkpoint()
                return
            async with self._send_lock:
                self._connection.update_keys(request_peer=request_peer)
                await self._flush()

    async def send_eof(self) -> None:
        """Send close_notify: no more data will come from us. Receiving goes on.

        The transport stays open in both directions; TLS says the end by itself.
        """
        with self._send_guard:
            self._check_usable()
            if self._connection.close_sent and self._send_failure is None:
                await trio.lowlevel.checkpoint()
                return
            self._check_sendable()
            await trio.lowlevel.checkpoint_if_cancelled()
            if self._session is None:
                await self.do_handshake()
                self._check_sendable()
            async with self._send_lock:
                self._connection.send_close()
                try:
                    await self._flush()
                except trio.BrokenResourceError:
                    # A peer that has ended its direction may leave at once. All that it sent is
                    # here, and nothing reads our own close_notify (section 6.1).
                    if not self._connection.close_received:
                        raise

    async def wait_peer_gone(self) -> None:
        """Wait until the transport ends, once :meth:`receive_some` has returned ``b""``.

        Any data received behind close_notify is ignored (section 6.1), and so is whether the
        transport ends by an orderly close or by a reset: nothing was lost.

        Raises:
            trio.ClosedResourceError: this stream was closed.
            trio.BusyResourceError: another task is receiving.
        """
        with self._receive_guard:
            try:
                while await self.transport_stream.receive_some(_READ_SIZE):
                    pass
            except trio.BrokenResourceError:
                pass

    # --- the end ------------------------------------------------------------------------------

    async def unwrap(self) -> tuple[Stream, bytes]:
        """End TLS in both directions; returns the transport and what came behind the end.

        Raises:
            trio.BrokenResourceError: the peer did not end it cleanly, or data came that nobody has
                received.
        """
        with self._receive_guard, self._send_guard:
            self._check_usable()
            await trio.lowlevel.checkpoint_if_cancelled()
            if self._session is None:
                await self.do_handshake()
            async with self._send_lock:
                self._stop_keeper()
                if not self._connection.close_sent:
                    self._connection.send_close()
                await self._flush()
            if self._pending or await self._receive_more() is not None:
                await self._fail(LocalStateError("unwrap, and there is data left to receive"))
            if not self._connection.close_received:
                await self._fail(TruncationError())
            transport, self._closed = self.transport_stream, True
            return transport, self._connection.trailing_data()

    async def aclose(self) -> None:
        """Send close_notify, after a handshake and unless a send is under way; close the transport.

        This waits for the transport to take close_notify, for ten seconds and as long as the caller
        lets it, but not for the peer's answer. The transport is closed in any case.
        """
        if self._closed:
            await trio.lowlevel.checkpoint()
            return
        self._closed = True
        try:
            polite = (
                self._session is not None
                and not self._https_compatible
                and self._failure is None
                and self._send_failure is None
                and not self._connection.close_sent
                and not self._send_guard.busy
                and trio.current_effective_deadline() > -math.inf  # or nothing would be sent
            )
            if polite:
                with trio.move_on_after(_CLOSE_TIMEOUT):
                    await self._say_goodbye()
        except (
            HybridkexError,
            trio.BrokenResourceError,
            trio.BusyResourceError,
            trio.ClosedResourceError,
        ):
            pass  # The peer is gone already, and so is the need to tell it.
        finally:
            self._stop_keeper()
            await self.transport_stream.aclose()

    async def _say_goodbye(self) -> None:
        """Send close_notify, behind what the keeper of the keys may be sending."""
        if self._keeper is None:
            self._connection.send_close()
            await self.transport_stream.send_all(self._connection.data_to_send())
            return
        async with self._send_lock:
            self._stop_keeper()
            if self._send_failure is None:
                self._connection.send_close()
                await self.transport_stream.send_all(self._connection.data_to_send())

    async def abort(self) -> None:
        """Close in a way that the peer cannot take for the end of our data.

        It gets the fatal alert internal_error (RFC 9846 section 6.2) if it can be sent now, and in
        any case no close_notify. ``async with`` calls this when an exception leaves its block.
        """
        if self._closed:
            await trio.lowlevel.checkpoint()
            return
        self._closed = True
        self._stop_keeper()
        try:
            tell = (
                self._session is not None
                and self._failure is None
                and self._send_failure is None
                and not self._connection.close_sent
                and not self._send_guard.busy
                and trio.current_effective_deadline() > -math.inf
            )
            if tell:
                self._connection.abort(InternalError("the application has given up"))
                with (
                    trio.move_on_after(_ALERT_TIMEOUT),
                    contextlib.suppress(
                        trio.BrokenResourceError, trio.BusyResourceError, trio.ClosedResourceError
                    ),
                ):
                    await self.transport_stream.send_all(self._connection.data_to_send())
        finally:
            await trio.aclose_forcefully(self.transport_stream)

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            await self.aclose()
        else:
            await self.abort()

    # --- states -------------------------------------------------------------------------------

    def _check_usable(self) -> None:
        if self._closed:
            raise trio.ClosedResourceError("this SecureStream is closed")
        if self._failure is not None:
            raise trio.BrokenResourceError(str(self._failure)) from self._failure

    def _check_sendable(self) -> None:
        self._check_usable()
        if self._send_failure is not None:
            raise trio.BrokenResourceError(str(self._send_failure)) from self._send_failure
        if self._connection.close_sent:
            raise trio.ClosedResourceError("send_eof was called on this SecureStream")

    async def _fail(self, error: HybridkexError) -> NoReturn:
        """Send the alert, if there is one, and raise."""
        self._failure = error
        if isinstance(error, PeerError | KeySourceError) and self._send_failure is None:
            with trio.move_on_after(_ALERT_TIMEOUT) as scope:
                scope.shield = True
                # If it does not get through, or another task is in the middle of a send, the peer
                # will see the connection end, at least.
                with contextlib.suppress(
                    trio.BrokenResourceError, trio.BusyResourceError, trio.ClosedResourceError
                ):
                    await self.transport_stream.send_all(self._connection.data_to_send())
        raise trio.BrokenResourceError(str(error)) from error


class _Interrupted(HybridkexError):
    """What breaks a stream that was cancelled in the middle."""


class _Guard:
    """Refuses a second task in one direction, as trio's streams do."""

    __slots__ = ("_message", "busy")

    def __init__(self, message: str) -> None:
        self._message = message
        self.busy = False

    def __enter__(self) -> None:
        if self.busy:
            raise trio.BusyResourceError(self._message)
        self.busy = True

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.busy = False
