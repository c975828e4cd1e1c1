"""Streams, in the manner of ``asyncio.open_connection`` and ``asyncio.start_server``."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Final, cast

from hybridkex.aio.connect import check_plain, create_connection, create_server, start_tls
from hybridkex.aio.transport import SecureTransport
from hybridkex.errors import LocalStateError
from hybridkex.tls.config import ClientConfig, ServerConfig

DEFAULT_LIMIT: Final = 1 << 16
"""The default limit of a StreamReader in bytes, as in asyncio; it pauses reading at twice as
many."""


class _Reader(asyncio.StreamReader):
    """Keeps the data that arrived before the peer's close_notify: a later failure of the connection
    is only an error of the writer."""

    _ended = False

    def feed_eof(self) -> None:
        self._ended = True
        super().feed_eof()

    def set_exception(self, exc: Exception) -> None:
        if not self._ended:
            super().set_exception(exc)


class StreamProtocol(asyncio.StreamReaderProtocol):
    """Keeps the connection open after the peer's close_notify, unlike asyncio's own: TLS 1.3 has
    half-close."""

    _plain: "tuple[asyncio.StreamWriter, asyncio.BaseProtocol] | None" = None

    def takes_over(self, writer: asyncio.StreamWriter, protocol: asyncio.BaseProtocol) -> None:
        """Keep the writer of an upgraded connection, because its ``__del__`` would close the
        transport below, and pass the end of the connection on to its protocol, without which
        ``wait_closed`` of that writer would never return."""
        self._plain = writer, protocol

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._plain is not None:
            self._plain[1].connection_lost(exc)
            self._plain = None

    def eof_received(self) -> bool:
        super().eof_received()
        # asyncio's TLS within this connection (StreamWriter.start_tls) has no half-close. After an
        # upgrade there is no transport here: asyncio told the protocol before it.
        transport = self._transport  # type: ignore[attr-defined]
        return transport is None or isinstance(transport, SecureTransport)


Connected = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None] | None]


def stream_protocol(
    connected: Connected | None = None, *, limit: int = DEFAULT_LIMIT
) -> tuple[asyncio.StreamReader, StreamProtocol]:
    """The reader of a connection, and the protocol that feeds it.

    Args:
        connected: called with reader and writer after the handshake.
        limit: see ``asyncio.open_connection``.
    """
    loop = asyncio.get_running_loop()
    reader = _Reader(limit=limit, loop=loop)
    return reader, StreamProtocol(reader, connected, loop=loop)


async def open_connection(
    host: str | None,
    port: int | None,
    config: ClientConfig,
    *,
    limit: int = DEFAULT_LIMIT,
    **options: Any,
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Connect, complete the handshake, and return reader and writer.

    Args:
        host: host name or address; ``None`` with ``sock=...``.
        port: TCP port; ``None`` with ``sock=...``.
        config: the configuration of the client.
        limit: see ``asyncio.open_connection``.
        options: the options of :func:`~hybridkex.aio.create_connection`, such as
            ``server_hostname``.

    Raises:
        OSError: the connection failed.
        SecureConnectionError: the handshake failed; ``__cause__`` is the reason. What code of the
            configuration has raised is raised as it is.
        ConfigError: ``config`` is not a ``ClientConfig``.
    """
    reader, protocol = stream_protocol(limit=limit)
    transport, _ = await create_connection(lambda: protocol, host, port, config, **options)
    return reader, asyncio.StreamWriter(transport, protocol, reader, asyncio.get_running_loop())


async def start_server(
    client_connected_cb: Connected,
    host: Any = None,
    port: int | None = None,
    config: ServerConfig | None = None,
    *,
    limit: int = DEFAULT_LIMIT,
    **options: Any,
) -> asyncio.Server:
    """Listen, and call ``client_connected_cb(reader, writer)`` after each handshake.

    Args:
        client_connected_cb: a function or a coroutine function, as for ``asyncio.start_server``.
        host: addresses to listen on, as for ``loop.create_server``.
        port: TCP port; with 0 the system picks one.
        config: the configuration of the server.
        limit: see ``asyncio.start_server``.
        options: the options of :func:`~hybridkex.aio.create_server`, such as
            ``ssl_handshake_timeout``.

    Raises:
        OSError: the server cannot listen there.
        ConfigError: ``config`` is not a ``ServerConfig``.
    """

    def factory() -> StreamProtocol:
        return stream_protocol(client_connected_cb, limit=limit)[1]

    return await create_server(factory, host, port, config, **options)


async def upgrade(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    config: ClientConfig | ServerConfig,
    *,
    limit: int = DEFAULT_LIMIT,
    **options: Any,
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Secure open streams, as after STARTTLS.

    Args:
        reader: the plain reader; do not use it afterwards.
        writer: the plain writer; do not use it afterwards.
        config: the configuration of a client or of a server.
        limit: see ``asyncio.open_connection``.
        options: the options of :func:`~hybridkex.aio.start_tls`, such as ``server_hostname``.

    Returns:
        The new reader and writer.

    Raises:
        LocalStateError: ``reader`` holds bytes that came before the handshake. An attacker may have
            sent them (CVE-2011-0411, CVE-2021-23222), so the connection is aborted.
        RuntimeError: another task reads from ``reader``.
        SecureConnectionError: the handshake failed; ``__cause__`` is the reason. What code of the
            configuration has raised is raised as it is.

    An argument that is refused leaves the plain connection as it was; see
    :func:`~hybridkex.aio.start_tls`.
    """
    await writer.drain()
    plain = cast(asyncio.Transport, writer.transport)
    check_plain(plain)
    # From here until start_tls has taken over the transport, or has refused its arguments, the loop
    # does not run: no byte can come, and no cancellation.
    if _holds_data(reader):
        plain.abort()
        raise LocalStateError(
            "data arrived before the TLS handshake, perhaps from an attacker: connection aborted"
        )
    secure_reader, protocol = stream_protocol(limit=limit)
    protocol.takes_over(writer, plain.get_protocol())
    transport = await start_tls(plain, protocol, config, **options)
    protocol.connection_made(transport)
    loop = asyncio.get_running_loop()
    return secure_reader, asyncio.StreamWriter(transport, protocol, secure_reader, loop)


def _holds_data(reader: asyncio.StreamReader) -> bool:
    """Whether a reader holds bytes. A read that would have to wait is given up."""
    reading = reader.read(1)
    try:
        reading.send(None)
    except StopIteration as done:
        return bool(done.value)
    reading.close()
    return False
