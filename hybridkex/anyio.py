"""anyio: a byte stream, a listener and a connectable, on both of anyio's back ends.

The engine runs over any byte stream of anyio, and over any object stream of bytes, as
``anyio.streams.tls.TLSStream`` does. Needs ``anyio`` (extra ``anyio``).
"""

import contextlib
import errno
import logging
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from functools import partial
from typing import Any, ClassVar, Final, Self

from hybridkex.auth import PeerCertificate
from hybridkex.errors import CertificateRejected
from hybridkex.extras import needs
from hybridkex.machine import broken, leaves
from hybridkex.net.acknowledged import unacknowledged
from hybridkex.net.budget import PATIENCE, Budget, Connection
from hybridkex.net.descriptors import share
from hybridkex.net.event_loop import on_trio
from hybridkex.net.log import BoundedLog
from hybridkex.net.pending import (
    ACCEPTED_BETWEEN,
    HANDSHAKES,
    RETRY_SECONDS,
    PendingConnections,
)
from hybridkex.net.sockets import is_readable
from hybridkex.shell.secure_duplex import (
    DEFAULT_HANDSHAKE_TIMEOUT,
    READ_SIZE,
    SecureDuplex,
    check_options,
)
from hybridkex.shell.ssl_facade import SslObject, cipher_of, describe, is_ssl_error, peercert_of
from hybridkex.text import get_logger
from hybridkex.tls.config import ClientConfig, ServerConfig, check_config
from hybridkex.tls.session import Session

with needs("anyio"):
    import anyio
    from anyio.abc import (
        AnyByteStream,
        AnyByteStreamConnectable,
        ByteStream,
        ByteStreamConnectable,
        Listener,
        ObjectStream,
        SocketAttribute,
        TaskGroup,
    )
    from anyio.streams.tls import TLSAttribute

__all__ = [
    "HybridkexAttribute",
    "SecureByteStream",
    "SecureConnectable",
    "SecureListener",
    "SecureStreamCertificateError",
    "SecureStreamError",
]

_LACKS: Final = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM))

_log: Final = get_logger("hybridkex.anyio")
_LINES: Final = BoundedLog(_log)
"""Rate-limited, because any peer can cause these lines."""


class HybridkexAttribute(anyio.TypedAttributeSet):
    """Typed attributes of :class:`SecureByteStream` in addition to anyio's ``TLSAttribute``."""

    session: Session = anyio.typed_attribute()
    """The :class:`~hybridkex.Session`: groups, keys and the identity of the peer."""
    has_unread: bool = anyio.typed_attribute()
    """Whether unread bytes from the peer are waiting, here or in the socket: data, its end, or a
    key update."""


class SecureStreamError(anyio.BrokenResourceError, ssl.SSLError):
    """The handshake failed, or a record was not authentic. anyio's own TLS stream raises an
    ``ssl.SSLError`` then; this is one, too. ``__cause__`` is the reason, an error of
    :mod:`hybridkex.errors`."""


class SecureStreamCertificateError(SecureStreamError, ssl.SSLCertVerificationError):
    """The peer's certificate was not accepted."""


class SecureByteStream(SecureDuplex, ByteStream):
    """A byte stream that encrypts over another byte stream; :meth:`wrap` makes it.

    The errors are those of anyio's own TLS stream: ``anyio.BrokenResourceError``, whose
    ``__cause__`` is an error of :mod:`hybridkex.errors`, and ``anyio.EndOfStream`` at the peer's
    close_notify. Where anyio raises an ``ssl.SSLError``, the ``BrokenResourceError`` is a
    :exc:`SecureStreamError`, which is both.

    After a :meth:`send` was cancelled, nothing more can be sent, because part of a record may have
    been sent. A :meth:`receive` that is cancelled loses no data.

    Its typed attributes are those of ``TLSAttribute`` that have a meaning in TLS 1.3, those of
    :class:`HybridkexAttribute`, and those of the transport stream.

    It is made of ``transport_stream`` and the parameters of :meth:`wrap`; ``standard_compatible``:
    whether close_notify is sent and required.
    """

    _lib: ClassVar = anyio

    def __init__(
        self,
        transport_stream: AnyByteStream,
        config: ClientConfig | ServerConfig,
        *,
        server_hostname: str | None,
        standard_compatible: bool,
        handshake_timeout: float,
    ) -> None:
        check_options(handshake_timeout, standard_compatible=standard_compatible)
        super().__init__(
            config,
            server_hostname,
            close_notify=standard_compatible,
            handshake_timeout=handshake_timeout,
        )
        self.transport_stream = transport_stream

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
                closed if this raises.
            config: the configuration of a client or of a server.
            server_hostname: the name or address that the server's certificate must have (client).
            standard_compatible: send close_notify at the end and demand the peer's. With ``False``,
                as is common in HTTPS, only the application protocol can detect a truncation.
            handshake_timeout: seconds; ``math.inf`` for no limit.

        Raises:
            anyio.BrokenResourceError: the handshake failed; ``__cause__`` is the reason.
            ConfigError: ``config`` is not a configuration, ``server_hostname`` is no name, or a
                server is given one.
        """
        try:
            stream = cls(
                transport_stream,
                config,
                server_hostname=server_hostname,
                standard_compatible=standard_compatible,
                handshake_timeout=handshake_timeout,
            )
            await stream._handshake()
        except BaseException:
            await anyio.aclose_forcefully(transport_stream)
            raise
        return stream

    async def _read_some(self) -> bytes:
        stream: AnyByteStream = self.transport_stream
        item = b""
        with contextlib.suppress(anyio.EndOfStream):
            if not isinstance(stream, ObjectStream):
                return await stream.receive(READ_SIZE)
            while not (item := await stream.receive()):
                pass  # an empty item does not end the stream
        return item

    async def _write(self, data: bytes | bytearray) -> None:
        await self.transport_stream.send(bytes(data))

    @property
    def _unacknowledged(self) -> int:
        raw = self.transport_stream.extra(SocketAttribute.raw_socket, None)
        return 0 if raw is None else unacknowledged(raw)

    def _has_unread(self) -> bool:
        if self._pending or self._connection.has_unread:
            return True
        raw = self.transport_stream.extra(SocketAttribute.raw_socket, None)
        return raw is not None and is_readable(raw)

    def _broken(self, cause: BaseException) -> Exception:
        if not is_ssl_error(cause):
            return super()._broken(cause)
        refused = isinstance(cause, CertificateRejected)
        error = (SecureStreamCertificateError if refused else SecureStreamError)(str(cause))
        describe(error, cause)
        return error

    @staticmethod
    def _busy(action: str) -> Exception:
        return anyio.BusyResourceError(action)

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
        data = await self._receive(max_bytes)
        if not data:
            raise anyio.EndOfStream
        return data

    async def send(self, item: bytes) -> None:
        """Send all of ``item``. After a cancellation, nothing more can be sent.

        Under a one-time pad this waits if there are too few QKD keys; :attr:`pad` shows this in
        advance. If no key arrives before the deadline of :class:`~hybridkex.OneTimePad`, the
        session ends with :exc:`~hybridkex.errors.PadExhausted`.

        Raises:
            anyio.BrokenResourceError: the connection failed, or an earlier send was cancelled.
            anyio.ClosedResourceError: this stream or its sending direction was closed.
        """
        await self._send(item)

    @property
    def extra_attributes(self) -> Mapping[Any, Callable[[], Any]]:
        """The typed attributes; see the class."""
        session = self._connection.session
        shown = session.peer_credential
        server_side = isinstance(self._config, ServerConfig)
        return {
            **self.transport_stream.extra_attributes,
            TLSAttribute.alpn_protocol: lambda: session.alpn,
            TLSAttribute.cipher: lambda: cipher_of(session),
            TLSAttribute.peer_certificate: lambda: peercert_of(session),
            TLSAttribute.peer_certificate_binary: lambda: (
                shown.chain[0] if isinstance(shown, PeerCertificate) else None
            ),
            TLSAttribute.server_side: lambda: server_side,
            TLSAttribute.ssl_object: lambda: SslObject(
                session, isinstance(self._config, ServerConfig)
            ),
            TLSAttribute.standard_compatible: lambda: self._close_notify,
            TLSAttribute.tls_version: lambda: "TLSv1.3",
            HybridkexAttribute.session: lambda: session,
            HybridkexAttribute.has_unread: self._has_unread,
        }


class SecureListener(Listener[SecureByteStream]):
    """A listener that secures its connections. Each handshake runs in the task of its connection.

    A handshake that fails ends only its own connection and is logged to ``hybridkex.anyio``.

    Args:
        listener: the listener that accepts the connections.
        config: the configuration of the server.
        standard_compatible: see :meth:`SecureByteStream.wrap`.
        handshake_timeout: seconds that a handshake may take.

    Raises:
        ConfigError: ``config`` is not a ``ServerConfig``, or an option has another type.
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
        check_options(handshake_timeout, standard_compatible=standard_compatible)
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

        No peer ends the server, unlike with anyio's own listeners: a handshake that fails, whatever
        its PSK source or verifier raises, or a connection that breaks or ends while ``handler``
        uses it, ends that connection alone and becomes one log line. Any other exception of
        ``handler`` goes to the task group. While the system has no descriptors or no memory for
        another connection, new ones wait in the queue. Handshake slots are assigned to the clients'
        addresses round-robin, so that a flood from one address delays others by at most one
        handshake or a second.

        Args:
            handler: serves one connection, and closes it.
            task_group: the task group of handlers that must outlive this call.
        """

        async def handle(stream: AnyByteStream) -> None:
            try:
                async with places.place(stream):
                    secure = await self._wrap(stream)
            except _Dismissed as error:
                _LINES.log(logging.WARNING, "a handshake was ended: %s", error)
                return
            except (anyio.BrokenResourceError, anyio.ClosedResourceError) as error:
                _LINES.log(logging.WARNING, "a handshake failed: %s", broken(error))
                return
            except Exception as error:  # its text may quote a secret, so it is not logged
                reason = f"{type(error).__name__} in a PSK source or verifier"
                _LINES.log(logging.ERROR, "a handshake failed: %s", reason)
                _log.debug("a handshake failed", exc_info=error)
                return
            try:
                try:
                    await handler(secure)
                except BaseException:
                    await anyio.aclose_forcefully(secure)
                    raise
            except* (anyio.BrokenResourceError, anyio.EndOfStream) as group:
                first = next(leaves(group))
                ended = isinstance(first, anyio.EndOfStream)
                reason = "the peer ended it" if ended else broken(first)
                _LINES.log(logging.WARNING, "a connection ended early: %s", reason)

        full = BoundedLog(_log, rate=1 / 60, burst=1)
        places = _Places()
        async with contextlib.AsyncExitStack() as stack:
            # Not the listener's own group, which would end the connections with the accept loop.
            if task_group is None:
                task_group = await stack.enter_async_context(anyio.create_task_group())
            task_group.start_soon(places.run)
            stack.callback(places.close)
            while True:
                try:
                    await self.listener.serve(handle, task_group)
                except Exception as error:
                    reason = _shortage(error)
                    if reason is None:
                        raise
                else:
                    return
                message = "cannot accept connections now: %s; new ones wait in the queue"
                full.log(logging.ERROR, message, reason)
                await anyio.sleep(RETRY_SECONDS)

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


class _Dismissed(Exception):
    """A connection has to end, for others."""


class _PendingHandshake:
    """A connection that has, or waits for, a place for its handshake."""

    def __init__(self) -> None:
        self.scope = anyio.CancelScope()
        self.started = anyio.Event()
        self.reason = ""

    def dismiss(self, reason: str) -> None:
        self.reason = reason
        self.scope.cancel()


class _Places:
    """Handshake slots of a listener, which the client addresses get in turn.

    The order is that of all servers of this project (:mod:`hybridkex.net.pending`,
    :mod:`hybridkex.net.budget`).
    """

    def __init__(self) -> None:
        self._budget = Budget(
            share(HANDSHAKES), what="handshakes", patience=PATIENCE, freed=self._wake
        )
        self._pending = PendingConnections[_PendingHandshake](self._budget.held)
        self._entered = 0
        self._news = anyio.Event()
        self._scope = anyio.CancelScope()
        self._closed = False

    @contextlib.asynccontextmanager
    async def place(self, stream: AnyByteStream) -> AsyncIterator[None]:
        """Wait for a place, which the connection has in this context.

        Raises:
            _Dismissed: it has to end, for others.
        """
        connection, handshake = Connection(_carrier(stream), _LINES), _PendingHandshake()
        try:
            with handshake.scope:
                self._enter(connection, handshake)
                try:
                    await handshake.started.wait()
                except BaseException:
                    self._leave(connection)  # before another connection has its descriptor
                    await anyio.aclose_forcefully(stream)
                    raise
                yield
        finally:
            self._leave(connection)
        if handshake.scope.cancelled_caught:
            raise _Dismissed(handshake.reason)

    def _enter(self, connection: Connection, handshake: _PendingHandshake) -> None:
        if self._closed:
            handshake.started.set()
            return
        self._entered += 1
        self._pending.add(connection, handshake)
        if not on_trio():  # asyncio may have read what it sent
            self._pending.heard(connection)
        while (leaving := self._pending.crowded_out()) is not None:
            leaving[1].dismiss("too many connections of its address are waiting")
        self._wake()

    def _leave(self, connection: Connection) -> None:
        if not self._closed:
            self._pending.leave(connection)
        connection.release()

    def _wake(self) -> None:
        self._news.set()

    async def _give(self) -> None:
        while True:
            self._news = anyio.Event()
            found = self._pending.next(self._budget)
            if found is None:
                with anyio.move_on_after(RETRY_SECONDS if len(self._pending) else None):
                    await self._news.wait()
                continue
            connection, handshake = found
            connection.begin(
                self._budget,
                cut=partial(handshake.dismiss, "it was closed to make room for another connection"),
            )
            handshake.started.set()
            for _ in range(ACCEPTED_BETWEEN):  # the accept loop goes first
                before = self._entered
                await anyio.lowlevel.checkpoint()
                await anyio.lowlevel.checkpoint()
                if self._entered == before:
                    break

    async def _listen(self) -> None:
        while True:
            await anyio.wait_readable(self._pending.fileno())
            self._pending.listen()
            self._wake()

    async def run(self) -> None:
        """Give places until closed."""
        try:
            with self._scope:
                async with anyio.create_task_group() as group:
                    group.start_soon(self._give)
                    group.start_soon(self._listen)
        finally:
            self._pending.close()

    def close(self) -> None:
        """Let waiting connections begin at once: their handlers may outlive the listener."""
        self._closed = True
        while (found := self._pending.remove()) is not None:
            found[1].started.set()
        self._scope.cancel()


class _Carrier:
    def __init__(self, raw: Any) -> None:
        self.socket: Any = raw


def _carrier(stream: AnyByteStream) -> _Carrier | None:
    raw = stream.extra(SocketAttribute.raw_socket, None)
    return None if raw is None else _Carrier(raw)


def _shortage(error: Exception) -> str | None:
    """The resource that the system lacks for another connection; ``None`` for any other error.

    anyio raises accept(2)'s error as it is or as the cause of its own, alone or in a group.
    """
    reason = None
    for one in leaves(error):
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
        connectable: AnyByteStreamConnectable,
        config: ClientConfig,
        *,
        server_hostname: str,
        standard_compatible: bool = True,
        handshake_timeout: float = DEFAULT_HANDSHAKE_TIMEOUT,
    ) -> None:
        check_config(config, ClientConfig)
        check_options(handshake_timeout, standard_compatible=standard_compatible)
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
            ConfigError: ``server_hostname`` is no name.
        """
        return await self._wrap(await self.connectable.connect())
