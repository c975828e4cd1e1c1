"""SecureStream: the engine on a trio stream, with the interface of ``trio.SSLStream``.

:mod:`hybridkex.shell.secure_duplex` explains how it works.
"""

import operator
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import ClassVar, Generic, TypeVar

import trio
from trio.abc import HalfCloseableStream, Stream

from hybridkex.errors import ConfigError, HybridkexError, LocalStateError, TruncationError
from hybridkex.fields import described
from hybridkex.net.acknowledged import unacknowledged
from hybridkex.shell.secure_duplex import (
    DEFAULT_HANDSHAKE_TIMEOUT,
    READ_SIZE,
    SecureDuplex,
    check_options,
)
from hybridkex.shell.secure_pipe import SecurePipe
from hybridkex.tls.config import ClientConfig, ServerConfig
from hybridkex.tls.connection import ClientConnection, ServerConnection

T = TypeVar("T", bound=Stream)


class SecureStream(SecureDuplex, HalfCloseableStream, Generic[T]):
    """An encrypted stream over another stream.

    Args:
        transport_stream: the stream that carries the records; the new stream owns it.
        config: a :class:`ClientConfig` makes this the client, a :class:`ServerConfig` the server.
        server_hostname: the name or address that the server's certificate must be valid for
            (client).
        https_compatible: neither send nor require close_notify at the end, as usual for HTTPS; then
            only the application protocol can detect a truncated connection.
        handshake_timeout: time limit for the handshake in seconds; ``math.inf`` for no limit.

    Errors are those of ``trio.SSLStream``: :exc:`trio.BrokenResourceError`, whose ``__cause__`` is
    the reason, an error of :mod:`hybridkex.errors`.

    Raises:
        ConfigError: an argument has the wrong type or is out of range.
    """

    _lib: ClassVar = trio

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
        if not all(
            hasattr(transport_stream, name) for name in ("send_all", "receive_some", "aclose")
        ):
            raise ConfigError(
                f"SecureStream takes a trio stream, not {described(transport_stream)}; write, for "
                "example: SecureStream(tcp_stream, config)"
            )
        check_options(handshake_timeout, https_compatible=https_compatible)
        super().__init__(
            config,
            server_hostname,
            close_notify=not https_compatible,
            handshake_timeout=handshake_timeout,
        )

    async def _read_some(self) -> bytes | bytearray:
        return await self.transport_stream.receive_some(READ_SIZE)

    async def _write(self, data: bytes | bytearray) -> None:
        await self.transport_stream.send_all(data)

    @property
    def _unacknowledged(self) -> int:
        stream = self.transport_stream
        return unacknowledged(stream.socket) if isinstance(stream, trio.SocketStream) else 0

    @staticmethod
    def _busy(action: str) -> Exception:
        return trio.BusyResourceError(f"another task is {action} this SecureStream")

    @property
    def _connected(self) -> ClientConnection | ServerConnection:
        if not self._complete:
            raise trio.NeedHandshakeError("call do_handshake() first")
        return self._connection

    @property
    def has_carried_data(self) -> bool:
        """Whether application data, or its end, has passed in either direction."""
        return self._has_carried_data or (self._pipe is not None and self._pipe.has_carried_data)

    async def do_handshake(self) -> None:
        """Run the handshake, unless it has already run. The first send or receive also runs it.

        Raises:
            trio.BrokenResourceError: the handshake failed; ``__cause__`` is the reason.
        """
        await self._handshake()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Return data from the peer, or ``b""`` once it has closed its direction.

        Raises:
            trio.BrokenResourceError: the connection failed or was truncated; ``__cause__`` is the
                reason. trio.ClosedResourceError: this stream was closed.
            trio.BusyResourceError: another task is receiving.
        """
        if max_bytes is not None and operator.index(max_bytes) < 1:
            raise ValueError("max_bytes must be >= 1")
        return await self._receive(max_bytes)

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send all of ``data``. If this is cancelled, nothing more can be sent.

        Under a one-time pad this waits if there are too few QKD keys; :attr:`pad` shows this in
        advance. If no key arrives before the deadline of :class:`~hybridkex.OneTimePad`, the
        session ends with :exc:`~hybridkex.errors.PadExhausted`.

        Raises:
            trio.BrokenResourceError: the connection failed; ``__cause__`` is the reason.
            trio.ClosedResourceError: this stream was closed, or its sending direction was.
            trio.BusyResourceError: another task is sending.
        """
        await self._send(data)

    async def wait_send_all_might_not_block(self) -> None:
        """Wait until ``send_all`` may go through at once; see ``trio.abc.SendStream``."""
        with self._sending:
            self._check_sendable()
            await self.transport_stream.wait_send_all_might_not_block()

    async def wait_peer_gone(self) -> None:
        """Wait until the transport ends, once :meth:`receive_some` has returned ``b""``.

        Data after close_notify is ignored (section 6.1). The transport may end by a close or by a
        reset; neither loses data.

        Raises:
            trio.ClosedResourceError: this stream was closed.
            trio.BusyResourceError: another task is receiving.
        """
        with self._receiving:
            try:
                while await self.transport_stream.receive_some(READ_SIZE):
                    pass
            except trio.BrokenResourceError:
                pass

    @asynccontextmanager
    async def piped(
        self,
        *,
        deliver: Callable[[bytes | bytearray], object],
        put: Callable[[bytes | bytearray], object],
        resume: Callable[[], object],
        failed: Callable[[HybridkexError], object],
    ) -> AsyncIterator[SecurePipe]:
        """Context in which the caller moves the bytes between the socket of the transport and the
        returned :class:`~hybridkex.shell.secure_pipe.SecurePipe`; the handshake must be complete.
        Afterwards the stream can be closed, with close_notify if all bytes for the socket have been
        sent.

        Args:
            deliver: called with application data.
            put: called with records of the engine itself, for the socket.
            resume: called when data that waited for a one-time pad can continue.
            failed: called with the error if the renewal of keys ends the connection.

        Raises:
            trio.NeedHandshakeError: there has been no handshake.
            trio.BrokenResourceError: the connection has failed.
            trio.ClosedResourceError: this stream was closed.
            trio.BusyResourceError: another task is sending or receiving.
        """
        with self._receiving, self._sending:
            self._check_usable()
            async with self._send_lock:  # The key renewer may be sending.
                pipe = self._pipe = SecurePipe(
                    self._connected,
                    self._renewer,
                    close_notify=self._close_notify,
                    deliver=deliver,
                    put=put,
                    resume=resume,
                    failed=failed,
                )
            try:
                pending, self._pending = self._pending, memoryview(b"")
                if pending:
                    deliver(bytes(pending))
                yield pipe
            finally:
                self._pipe = None
                self._has_carried_data |= pipe.has_carried_data
                self._failure = self._failure or pipe.failure

    async def unwrap(self) -> tuple[Stream, bytes]:
        """End TLS in both directions; returns the transport and the bytes received after
        close_notify.

        Raises:
            trio.BrokenResourceError: the peer did not end it cleanly, or data came that nobody has
                received.
        """
        with self._receiving, self._sending:
            self._check_usable()
            await trio.lowlevel.checkpoint_if_cancelled()
            if not self._complete:
                await self.do_handshake()
            async with self._send_lock:
                self._stop_renewer()
                self._queue(self._connection.send_close)
                await self._flush()
            if self._pending or await self._receive_more() is not None:
                await self._fail(LocalStateError("cannot unwrap: there is data left to receive"))
            if not self._connection.close_received:
                await self._fail(TruncationError())
            transport, self._closed = self.transport_stream, True
            trailing = self._connection.trailing_data()
            self._release()
            return transport, trailing
