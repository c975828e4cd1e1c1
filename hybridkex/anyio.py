"""anyio: a byte stream, a listener and a connectable, on both of anyio's back ends.

The engine runs over any byte stream of anyio, as ``anyio.streams.tls.TLSStream`` does. Needs
``anyio`` (extra ``anyio``).
"""

import contextlib
import errno
import logging
import math
from collections.abc import Awaitable, Callable, Iterator, Mapping
from functools import partial
from types import TracebackType
from typing import Any, Final, NoReturn, Self

import anyio
from anyio.abc import AnyByteStream, ByteStream, ByteStreamConnectable, Listener, TaskGroup
from anyio.streams.tls import TLSAttribute

from hybridkex.auth import PeerCertificate
from hybridkex.errors import (
    HandshakeTimeout,
    HybridkexError,
    InternalError,
    KeySourceError,
    PeerError,
    TruncationError,
)
from hybridkex.machine import broken
from hybridkex.net.log import BoundedLog
from hybridkex.secret import Secret
from hybridkex.shell.answers import Answers
from hybridkex.shell.key_keeper import KeyKeeper
from hybridkex.shell.ssl_facade import SslObject, cipher_of, peercert_of
from hybridkex.text import get_logger
from hybridkex.tls.config import ClientConfig, ServerConfig, check_config
from hybridkex.tls.connection import connection_for
from hybridkex.tls.events import ApplicationData, PskWanted, SessionProposed, TicketReceived
from hybridkex.tls.session import Session

__all__ = [
    "HybridkexAttribute",
    "SecureByteStream",
    "SecureConnectable",
    "SecureListener",
]

DEFAULT_HANDSHAKE_TIMEOUT: Final = 10.0
"""Seconds that a handshake may take."""

_READ_SIZE: Final = 256 * 1024
_SEND_SIZE: Final = 256 * 1024
_ALERT_TIMEOUT: Final = 1.0
_CLOSE_TIMEOUT: Final = 10.0
_RETRY_SECONDS: Final = 0.1
"""Seconds between two attempts to accept while the system lacks resources."""
_LACKS: Final = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM))

_log: Final = get_logger("hybridkex.anyio")
_LINES: Final = BoundedLog(_log)
"""Rate-limited, because any peer can cause these lines."""


class HybridkexAttribute(anyio.TypedAttributeSet):
    """Typed attributes of :class:`SecureByteStream` in addition to anyio's ``TLSAttribute``."""

    session: Session = anyio.typed_attribute()
    """The :class:`~hybridkex.Session`: groups, keys and the identity of the peer."""


class SecureByteStream(ByteStream):
    """A byte stream that encrypts over another byte stream; :meth:`wrap` makes it.

    The errors are those of anyio's own TLS stream: ``anyio.BrokenResourceError``, whose
    ``__cause__`` is an error of :mod:`hybridkex.errors`, and ``anyio.EndOfStream`` at the peer's
    close_notify. After a :meth:`send` was cancelled, nothing more can be sent, because part of a
    record may have been sent. A :meth:`receive` that is cancelled loses no data.

    Its typed attributes are those of ``TLSAttribute`` that have a meaning in TLS 1.3, those of
    :class:`HybridkexAttribute`, and those of the transport stream.
    """

    def __init__(
        self,
        transport_stream: AnyByteStream,
        config: ClientConfig | ServerConfig,
        *,
        server_hostname: str | None,
        standard_compatible: bool,
    ) -> None:
        self.transport_stream = transport_stream
        # The type may be an object stream's, whose receive() takes no size.
        self._receive_raw: Any = transport_stream.receive
        self._server_side = isinstance(config, ServerConfig)
        self._connection = connection_for(config, server_hostname)
        self._answers = Answers(config, self._connection)
        self._config = config
        self._keeper: KeyKeeper | None = None
        self._send_lock = anyio.Lock()
        self._standard_compatible = standard_compatible
        self._pending: bytes | memoryview = b""
        self._closed = False
        self._failure: BaseException | None = None
        self._send_broken = False
        self._sending = anyio.ResourceGuard("sending to")
        self._receiving = anyio.ResourceGuard("receiving from")

    @classmethod
    async def wrap(
        cls,
        transport_stream: AnyByteStream,
        config: ClientConfig | ServerConfig,
        *,
        server_hostname: str | None = None,
        standard_compatible: bool = True,
        handshake_timeout: float = DEFAULT_HANDSHAKE_TIMEOUT,
    ) -> Self:
        """Secure a stream. This returns when the handshake is complete.

        Args:
            transport_stream: the stream that carries the records. The new stream owns it; it is
                closed if the handshake fails.
            config: the configuration of a client or of a server.
            server_hostname: the name or address that the server's certificate must have (client).
            standard_compatible: send close_notify at the end and demand the peer's. With ``False``,
                as is common in HTTPS, only the application protocol can detect a truncation.
            handshake_timeout: seconds; ``math.inf`` for no limit.

        Raises:
            anyio.BrokenResourceError: the handshake failed; ``__cause__`` is the reason.
            ConfigError: ``config`` is not a configuration, or a server is given a
                ``server_hostname``.
        """
        stream = cls(
            transport_stream,
            config,
            server_hostname=server_hostname,
            standard_compatible=standard_compatible,
        )
        try:
            with anyio.move_on_after(handshake_timeout) as scope:
                await stream._handshake()
            if scope.cancelled_caught:
                error = HandshakeTimeout(f"no handshake within {handshake_timeout:g} seconds")
                stream._connection.abort(error)
                await stream._fail(error)
        except BaseException:
            await anyio.aclose_forcefully(transport_stream)
            raise
        return stream

    @property
    def session(self) -> Session:
        """The parameters of the session: groups, keys and the identity of the peer."""
        return self._connection.session

    def export(self, label: bytes, context: bytes, length: int) -> Secret:
        """Keying material for a protocol above: ``length`` bytes (RFC 9846 section 7.5)."""
        return self._connection.export(label, context, length)

    def export_fresh(self, label: bytes, context: bytes, length: int) -> Secret:
        """As :meth:`export`, from the exporter secret of the epoch in use: another one after each
        key update (draft-ietf-tls-extended-key-update-13 section 10).

        Raises:
            LocalStateError: Extended Key Update was not negotiated.
        """
        return self._connection.export_fresh(label, context, length)

    async def _send_for_keeper(self) -> None:
        async with self._send_lock:
            if not self._send_broken and self._connection.has_data_to_send:
                await self._flush()

    async def _fail_for_keeper(self, error: PeerError) -> None:
        """End the connection: the caller's tasks find the reason."""
        try:
            await self._fail(error)
        finally:
            await anyio.aclose_forcefully(self.transport_stream)

    def _stop_keeper(self) -> None:
        if self._keeper is not None:
            self._keeper.stop()

    async def _handshake(self) -> None:
        connection = self._connection
        try:
            await self._answers.begin()
            while True:
                while not connection.handshake_complete:
                    event = connection.next_event()
                    if event is None:
                        break
                    if isinstance(event, PskWanted | SessionProposed):
                        await self._answers.give(event)
                if connection.has_data_to_send:
                    await self.transport_stream.send(bytes(connection.data_to_send()))
                if connection.handshake_complete:
                    await self._answers.keep_tickets()
                    if KeyKeeper.needed(self._config, connection):
                        self._keeper = KeyKeeper(
                            self._config,
                            connection,
                            self._send_for_keeper,
                            self._fail_for_keeper,
                            (anyio.BrokenResourceError, anyio.ClosedResourceError),
                        )
                    return
                connection.receive_data(await self._read())
        except HybridkexError as error:
            await self._fail(error)

    async def _read(self) -> bytes:
        try:
            data: bytes = await self._receive_raw(_READ_SIZE)
        except anyio.EndOfStream:
            return b""
        return data

    async def receive(self, max_bytes: int = 65536) -> bytes:
        """Receive 1 to ``max_bytes`` bytes.

        Raises:
            anyio.EndOfStream: the peer has ended its direction.
            anyio.BrokenResourceError: the connection failed or was truncated; ``__cause__`` is the
                reason.
            anyio.ClosedResourceError: this stream was closed.
        """
        if max_bytes < 1:
            raise ValueError("max_bytes must be positive")
        with self._receiving:
            self._check_usable()
            if not self._pending:
                self._pending = await self._receive_more()
            else:
                await anyio.lowlevel.cancel_shielded_checkpoint()
            pending = self._pending
            if len(pending) <= max_bytes:
                self._pending = b""
                return bytes(pending)
            self._pending = memoryview(pending)[max_bytes:]
            return bytes(memoryview(pending)[:max_bytes])

    async def _receive_more(self) -> bytes:
        connection = self._connection
        await anyio.lowlevel.checkpoint_if_cancelled()
        while True:
            try:
                event = connection.next_event()
                if self._keeper is not None:
                    if event is not None:
                        self._keeper.saw(event)
                    if connection.has_data_to_send:
                        self._keeper.wake()
                if isinstance(event, ApplicationData):
                    return event.data
                if isinstance(event, TicketReceived):
                    await self._answers.keep_tickets()
                if connection.close_received:
                    raise anyio.EndOfStream
                if event is None:
                    connection.receive_data(await self._read())
            except anyio.ClosedResourceError:
                self._check_usable()  # the keeper of the keys may have ended the connection
                raise
            except TruncationError as error:
                if not self._standard_compatible:
                    raise anyio.EndOfStream from None
                await self._fail(error)
            except HybridkexError as error:
                await self._fail(error)

    async def send(self, item: bytes) -> None:
        """Send all of ``item``. After a cancellation, nothing more can be sent.

        Raises:
            anyio.BrokenResourceError: the connection failed, or an earlier send was cancelled.
            anyio.ClosedResourceError: this stream or its sending direction was closed.
        """
        with self._sending:
            self._check_sendable()
            await anyio.lowlevel.checkpoint_if_cancelled()
            view = memoryview(item).cast("B") if item else memoryview(b"")
            for start in range(0, len(view), _SEND_SIZE):
                piece = view[start : start + _SEND_SIZE]
                await self._put(partial(self._connection.send_data, piece))
                if self._keeper is not None:
                    self._keeper.count(len(piece))

    async def update_keys(self, *, request_peer: bool = False) -> None:
        """Change our sending key, and ask the peer for the same (RFC 9846 section 4.7.3).

        Where Extended Key Update was agreed on, this starts one, with a QKD key where the policy
        has it so: :attr:`session` shows another epoch when it is complete.
        """
        with self._sending:
            self._check_sendable()
            if self._keeper is not None and self._keeper.extended:
                self._keeper.update()
                await anyio.lowlevel.checkpoint()
                return
            await self._put(partial(self._connection.update_keys, request_peer=request_peer))

    async def send_eof(self) -> None:
        """Send close_notify. Receiving continues."""
        with self._sending:
            self._check_usable()
            if not self._connection.close_sent:
                self._check_sendable()
                await self._put(self._connection.send_close)

    async def _put(self, queue: Callable[[], None]) -> None:
        """Call ``queue`` and send what the engine has queued; a partial send breaks sending."""
        if self._keeper is None:
            await self._queue_and_flush(queue)
            return
        async with self._send_lock:
            self._check_usable()
            self._check_whole()
            await self._queue_and_flush(queue)

    async def _queue_and_flush(self, queue: Callable[[], None]) -> None:
        try:
            queue()
        except HybridkexError as error:
            self._check_usable()  # if the receiving side has failed, its reason says more
            raise anyio.BrokenResourceError(str(error)) from error
        await self._flush()

    async def _flush(self) -> None:
        self._send_broken = True
        await self.transport_stream.send(bytes(self._connection.data_to_send()))
        self._send_broken = False

    async def aclose(self) -> None:
        """Send close_notify, if the peer can receive it, and close the transport."""
        if self._closed:
            await anyio.lowlevel.checkpoint()
            return
        polite = self._standard_compatible and self._tellable(wait=True)
        self._closed = True
        try:
            if polite:
                with anyio.move_on_after(_CLOSE_TIMEOUT), _peer_may_be_gone():
                    await self._say_goodbye()
        finally:
            self._stop_keeper()
            await self.transport_stream.aclose()

    async def _say_goodbye(self) -> None:
        """Send close_notify, behind what the keeper of the keys may be sending."""
        if self._keeper is None:
            self._connection.send_close()
            await self.transport_stream.send(bytes(self._connection.data_to_send()))
            return
        async with self._send_lock:
            self._stop_keeper()
            if not self._send_broken:
                self._connection.send_close()
                await self.transport_stream.send(bytes(self._connection.data_to_send()))

    async def abort(self) -> None:
        """Close without close_notify, so that the peer sees a failure, not the end of the data.

        The alert internal_error is sent if that is possible at once. ``async with`` calls this when
        an exception leaves its block.
        """
        if self._closed:
            await anyio.lowlevel.checkpoint()
            return
        tell = self._tellable(wait=False)
        self._closed = True
        self._stop_keeper()
        try:
            if tell:
                self._connection.abort(InternalError("the application has given up"))
                with anyio.move_on_after(_ALERT_TIMEOUT), _peer_may_be_gone():
                    await self.transport_stream.send(bytes(self._connection.data_to_send()))
        finally:
            await anyio.aclose_forcefully(self.transport_stream)

    def _tellable(self, *, wait: bool) -> bool:
        """Whether there is a peer to be told of the end, and a way to it; ``wait``: once the keeper
        of the keys has sent what it is sending."""
        free = not self._send_broken or (wait and self._send_lock.locked())
        return (
            self._failure is None
            and free
            and not self._connection.close_sent
            and anyio.current_effective_deadline() > -math.inf
        )

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await (self.aclose() if error is None else self.abort())

    def _check_usable(self) -> None:
        if self._closed:
            raise anyio.ClosedResourceError
        if self._failure is not None:
            raise anyio.BrokenResourceError(str(self._failure)) from self._failure

    def _check_sendable(self) -> None:
        self._check_usable()
        if self._connection.close_sent:
            raise anyio.ClosedResourceError
        if not self._send_lock.locked():  # else the keeper of the keys is sending now
            self._check_whole()

    def _check_whole(self) -> None:
        if self._send_broken:
            raise anyio.BrokenResourceError("an earlier send did not complete")

    async def _fail(self, error: HybridkexError) -> NoReturn:
        """Send the alert, if there is one, and raise ``anyio.BrokenResourceError``."""
        self._failure = error
        if isinstance(error, PeerError | KeySourceError) and not self._send_broken:
            alert = bytes(self._connection.data_to_send())
            with anyio.move_on_after(_ALERT_TIMEOUT, shield=True), _peer_may_be_gone():
                if alert:
                    await self.transport_stream.send(alert)
        raise anyio.BrokenResourceError(str(error)) from error

    @property
    def extra_attributes(self) -> Mapping[Any, Callable[[], Any]]:
        """The typed attributes; see the class."""
        session = self._connection.session
        shown = session.peer_credential
        return {
            **self.transport_stream.extra_attributes,
            TLSAttribute.alpn_protocol: lambda: session.alpn,
            TLSAttribute.cipher: lambda: cipher_of(session),
            TLSAttribute.peer_certificate: lambda: peercert_of(session),
            TLSAttribute.peer_certificate_binary: lambda: (
                shown.chain[0] if isinstance(shown, PeerCertificate) else None
            ),
            TLSAttribute.server_side: lambda: self._server_side,
            TLSAttribute.ssl_object: lambda: SslObject(session, self._server_side),
            TLSAttribute.standard_compatible: lambda: self._standard_compatible,
            TLSAttribute.tls_version: lambda: "TLSv1.3",
            HybridkexAttribute.session: lambda: session,
        }


@contextlib.contextmanager
def _peer_may_be_gone() -> Iterator[None]:
    """Ignore that the transport has failed or was closed."""
    with contextlib.suppress(
        anyio.BrokenResourceError, anyio.BusyResourceError, anyio.ClosedResourceError
    ):
        yield


class SecureListener(Listener[SecureByteStream]):
    """A listener that secures its connections. Each handshake runs in the task of its connection.

    A handshake that fails ends only its own connection and is logged to ``hybridkex.anyio``.

    Args:
        listener: the listener that accepts the connections.
        config: the configuration of the server.
        standard_compatible: see :meth:`SecureByteStream.wrap`.
        handshake_timeout: seconds that a handshake may take.

    Raises:
        ConfigError: ``config`` is not a ``ServerConfig``.
    """

    def __init__(
        self,
        listener: Listener[Any],
        config: ServerConfig,
        *,
        standard_compatible: bool = True,
        handshake_timeout: float = DEFAULT_HANDSHAKE_TIMEOUT,
    ) -> None:
        check_config(config, ServerConfig)
        self.listener = listener
        self._standard_compatible = standard_compatible
        self._wrap = partial(
            SecureByteStream.wrap,
            config=config,
            standard_compatible=standard_compatible,
            handshake_timeout=handshake_timeout,
        )

    async def serve(
        self,
        handler: Callable[[SecureByteStream], Awaitable[Any]],
        task_group: TaskGroup | None = None,
    ) -> None:
        """Call ``handler`` with each connection after its handshake, until cancelled.

        No peer ends the server, unlike with anyio's own listeners: a handshake that fails, or a
        connection that breaks or ends while ``handler`` uses it, ends that connection alone and
        becomes one log line. Any other exception of ``handler`` goes to the task group. While the
        system has no descriptors or no memory for another connection, new ones wait in the queue.

        Args:
            handler: serves one connection, and closes it.
            task_group: where handlers run, if they must outlive this call.
        """

        async def handle(stream: AnyByteStream) -> None:
            try:
                secure = await self._wrap(stream)
            except (anyio.BrokenResourceError, anyio.ClosedResourceError) as error:
                _LINES.log(logging.WARNING, "a handshake failed: %s", error.__cause__ or error)
                return
            try:
                await handler(secure)
            except* (anyio.BrokenResourceError, anyio.EndOfStream) as group:
                await anyio.aclose_forcefully(secure)
                first = next(_leaves(group))
                reason = broken(first) if str(first) else "the peer ended it"
                _LINES.log(logging.WARNING, "a connection ended early: %s", reason)

        full = BoundedLog(_log, rate=1 / 60, burst=1)
        async with contextlib.AsyncExitStack() as stack:
            # Not the listener's own group, which would end the connections with the accept loop.
            group = task_group or await stack.enter_async_context(anyio.create_task_group())
            while True:
                try:
                    await self.listener.serve(handle, group)
                except Exception as error:
                    reason = _lack(error)
                    if reason is None:
                        raise
                else:
                    return
                message = "cannot accept connections now: %s; new ones wait in the queue"
                full.log(logging.ERROR, message, reason)
                await anyio.sleep(_RETRY_SECONDS)

    async def aclose(self) -> None:
        """Close the listener."""
        await self.listener.aclose()

    @property
    def extra_attributes(self) -> Mapping[Any, Callable[[], Any]]:
        """The attributes of the listener, and ``TLSAttribute.standard_compatible``."""
        return {
            **self.listener.extra_attributes,
            TLSAttribute.standard_compatible: lambda: self._standard_compatible,
        }


def _leaves(error: BaseException) -> Iterator[BaseException]:
    """The errors of nested groups."""
    if isinstance(error, BaseExceptionGroup):
        for one in error.exceptions:
            yield from _leaves(one)
    else:
        yield error


def _lack(error: Exception) -> str | None:
    """What the system lacks for another connection; ``None`` if that is not why accepting failed.

    anyio raises accept(2)'s error as it is or as the cause of its own, alone or in a group.
    """
    reason = None
    for one in _leaves(error):
        cause = one if isinstance(one, OSError) else one.__cause__
        if isinstance(one, MemoryError):
            reason = "out of memory"
        elif isinstance(cause, OSError) and cause.errno in _LACKS:
            reason = cause.strerror
        else:
            return None
    return reason


class SecureConnectable(ByteStreamConnectable):
    """A connectable that secures the connection of another connectable.

    Args:
        connectable: the other connectable, such as ``anyio.TCPConnectable(host, port)``.
        config: the configuration of the client.
        server_hostname: the name or address that the server's certificate must have.
        standard_compatible: see :meth:`SecureByteStream.wrap`.
        handshake_timeout: seconds that the handshake may take.

    Raises:
        ConfigError: ``config`` is not a ``ClientConfig``.
    """

    def __init__(
        self,
        connectable: ByteStreamConnectable,
        config: ClientConfig,
        *,
        server_hostname: str,
        standard_compatible: bool = True,
        handshake_timeout: float = DEFAULT_HANDSHAKE_TIMEOUT,
    ) -> None:
        check_config(config, ClientConfig)
        self.connectable = connectable
        self._wrap = partial(
            SecureByteStream.wrap,
            config=config,
            server_hostname=server_hostname,
            standard_compatible=standard_compatible,
            handshake_timeout=handshake_timeout,
        )

    async def connect(self) -> SecureByteStream:
        """Connect and complete the handshake.

        Raises:
            OSError: the connection failed.
            anyio.BrokenResourceError: the handshake failed; ``__cause__`` is the reason.
        """
        return await self._wrap(await self.connectable.connect())
