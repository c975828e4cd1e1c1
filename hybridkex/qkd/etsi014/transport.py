"""HTTP to a KME, over TLS that confirms the KME's ID before any request is sent.

httpcore takes a network backend, which starts TLS, so that is where another TLS and the check of
the certificate plug in. httpx serialises the request, but its client is not used: what the client
does with an answer (decompress it, store cookies, parse redirects) lets the other end decide how
much memory is used and which errors are raised. Nor is httpcore's pool: it keeps a connection for
ever whose request is cancelled while it waits its turn, and with that a KME that is silent for a
while would be out of reach for good (httpcore issue 1093).
"""

# ruff: noqa: ASYNC109  # the timeouts are httpcore's interface

import os
import socket
import ssl
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from ipaddress import ip_address
from typing import Any, Final
from urllib.parse import urlsplit

import trio

from hybridkex.errors import ConfigError, KeySourceUnavailable
from hybridkex.extras import needs
from hybridkex.machine import causes
from hybridkex.net.event_loop import Lock, on_trio, sleep, time_limit
from hybridkex.qkd.etsi014.mutual_tls import (
    ClientTls,
    TlsHandshake,
    alert_received,
    tls_failure,
)

with needs("kme"):
    import httpcore
    import httpx

_CLOSE_TIMEOUT: Final = 1.0
_DELAY: Final = 0.25
"""Seconds before the next address is tried in parallel (RFC 8305 section 5); trio's value."""

HTTP_FAILURES: Final = (
    httpx.HTTPError,
    httpx.InvalidURL,
    httpcore.ConnectionNotAvailable,
    httpcore.NetworkError,
    httpcore.ProtocolError,
    httpcore.TimeoutException,
    httpcore.UnsupportedProtocol,
)
"""The exceptions of a failed request over :class:`KmeTransport`."""


@contextmanager
def _as_httpcore(
    slow: type[httpcore.TimeoutException], broken: type[httpcore.NetworkError]
) -> Iterator[None]:
    try:
        yield
    except TimeoutError as error:  # of the time limit, or the kernel's: an OSError, so it is first
        raise slow("too slow") from error
    except (OSError, ssl.SSLError, trio.BrokenResourceError, trio.ClosedResourceError) as error:
        raise broken(_reason(error)) from error


def _reason(error: BaseException) -> str:
    """The first message along the chain of causes; trio's own errors are often empty."""
    said = next(filter(None, map(str, causes(error))), type(error).__name__)
    return said.partition(": bytearray(")[0]  # h11 quotes what it could not parse


class _Stream(httpcore.AsyncNetworkStream, ABC):
    """A connection with httpcore's interface."""

    def __init__(self, backend: "_Backend") -> None:
        self._backend = backend
        self._received = 0

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        if self._received > self._backend.max_answer:
            # Checked here, since a reader that stops in the middle of a body leaves generators of
            # httpx and httpcore unfinished.
            raise httpcore.ReadError(f"an answer longer than {self._backend.max_answer} bytes")
        with _as_httpcore(httpcore.ReadTimeout, httpcore.ReadError):
            async with _deadline(timeout):
                data = await self._receive(max_bytes)
        self._received += len(data)
        return data

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._received = 0
        with _as_httpcore(httpcore.WriteTimeout, httpcore.WriteError):
            async with _deadline(timeout):
                await self._send(buffer)

    async def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """The handshake instead of ``ssl_context``, which httpcore always makes."""
        try:
            with _as_httpcore(httpcore.ConnectTimeout, httpcore.ConnectError):
                async with _deadline(timeout):
                    secure, certificate = await self._secure(server_hostname or "")
                    self._backend.check(certificate)
        except BaseException:
            self.drop()
            raise
        self._backend.stream = secure
        return secure

    def get_extra_info(self, info: str) -> Any:
        # An idle connection with readable data has been closed by the other end.
        return self._something_waits() if info == "is_readable" else None

    # What differs between the event loops.

    @abstractmethod
    async def _receive(self, max_bytes: int) -> bytes: ...

    @abstractmethod
    async def _send(self, buffer: bytes) -> None: ...

    @abstractmethod
    async def _secure(self, host: str) -> "tuple[_Stream, bytes]":
        """This connection over TLS, and the certificate of the other end."""

    @abstractmethod
    def drop(self) -> None:
        """Close the connection at once, without close_notify."""

    @abstractmethod
    def _something_waits(self) -> bool: ...


def _deadline(timeout: float | None) -> AbstractAsyncContextManager[None]:
    return time_limit(float("inf") if timeout is None else timeout)


class _TrioStream(_Stream):
    def __init__(
        self, stream: trio.abc.Stream, raw: trio.SocketStream, backend: "_Backend"
    ) -> None:
        super().__init__(backend)
        self._stream = stream
        self._raw = raw

    async def _receive(self, max_bytes: int) -> bytes:
        return bytes(await self._stream.receive_some(max_bytes))

    async def _send(self, buffer: bytes) -> None:
        await self._stream.send_all(buffer)

    async def _secure(self, host: str) -> tuple[_Stream, bytes]:
        secure, certificate = await self._backend.handshake(self._stream, host)
        return _TrioStream(secure, self._raw, self._backend), certificate

    def drop(self) -> None:
        self._raw.socket.close()

    async def aclose(self) -> None:
        await self._stream.aclose()

    def _something_waits(self) -> bool:
        return self._raw.socket.is_readable()


class _AsyncioStream(_Stream):
    """asyncio's reader and writer; their types would be an import of asyncio."""

    def __init__(self, reader: Any, writer: Any, backend: "_Backend") -> None:
        super().__init__(backend)
        self._reader = reader
        self._writer = writer

    async def _receive(self, max_bytes: int) -> bytes:
        data: bytes = await self._reader.read(max_bytes)
        return data

    async def _send(self, buffer: bytes) -> None:
        self._writer.write(buffer)
        await self._writer.drain()

    async def _secure(self, host: str) -> tuple[_Stream, bytes]:
        handshake = self._backend.handshake
        if not isinstance(handshake, ClientTls):
            raise ConfigError("this TLS handshake is for trio; pass the result of client_tls()")
        reader, writer, certificate = await handshake.on_asyncio(self._reader, self._writer, host)
        return _AsyncioStream(reader, writer, self._backend), certificate

    def drop(self) -> None:
        self._writer.transport.abort()

    async def aclose(self) -> None:
        self._writer.close()
        try:
            async with time_limit(_CLOSE_TIMEOUT):  # a server need not reply to close_notify
                await self._writer.wait_closed()
        except OSError:  # of the connection, or the time limit
            self.drop()

    def _something_waits(self) -> bool:
        return bool(self._reader.at_eof() or self._writer.is_closing())


class _Backend(httpcore.AsyncNetworkBackend):
    """Makes one connection."""

    def __init__(
        self, handshake: TlsHandshake, check: Callable[[bytes], None], max_answer: int
    ) -> None:
        self.handshake = handshake
        self.max_answer = max_answer
        self.check = check
        self.stream: _Stream | None = None

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        with _as_httpcore(httpcore.ConnectTimeout, httpcore.ConnectError):
            async with _deadline(timeout):
                if on_trio():
                    raw = await trio.open_tcp_stream(host, port)
                    self.stream = _TrioStream(raw, raw, self)
                    return self.stream
                asyncio: Any = sys.modules["asyncio"]  # asyncio is running, so it is loaded
                stdlib = isinstance(asyncio.get_running_loop(), asyncio.BaseEventLoop)
                # uvloop tries one address after the other, and has no such argument.
                more = {"happy_eyeballs_delay": _DELAY} if stdlib and not _is_literal(host) else {}
                reader, writer = await asyncio.open_connection(host, port, **more)
                self.stream = _AsyncioStream(reader, writer, self)
                return self.stream

    async def sleep(self, seconds: float) -> None:
        await sleep(seconds)


def _is_literal(host: str) -> bool:
    """Whether a host is an address, so that no other can be tried beside it. (A caller who gives up
    while asyncio tries several may leave it with a socket that it has forgotten.)"""
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


class _Content:
    """A request body for httpcore, which leaves a generator unfinished when a write fails."""

    def __init__(self, body: bytes) -> None:
        self._parts = [body] if body else []

    def __aiter__(self) -> "_Content":
        return self

    async def __anext__(self) -> bytes:
        if not self._parts:
            raise StopAsyncIteration
        return self._parts.pop()


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A response: status, header fields and the raw body."""

    status: int
    headers: httpx.Headers
    body: bytes


def check_url(url: str) -> None:
    """Check the URL of a KME: anything but https would send keys in the clear.

    Raises ``ConfigError``.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise ConfigError(f"{url!r} is not the URL of a KME: {error}") from error
    if parts.scheme != "https" or not parts.hostname or parts.path.strip("/") or parts.query:
        raise ConfigError(f"the URL of a KME must be https://host:port, not {url!r}")
    if port == 0:
        raise ConfigError("the port of a KME must not be 0")


class KmeTransport:
    """Connections to one KME. It never retries a request.

    A connection belongs to one request at a time and is kept only if that has ended in order, so
    whatever becomes of a request, the next one finds room.

    Args:
        url: ``https://host:port``.
        handshake: makes a connection secure.
        check: gets the KME's certificate and raises to refuse it.
        connections: the maximum number of connections; further requests wait.
        max_answer: the maximum length of a response in bytes, including headers.

    Raises:
        ConfigError: the URL is not one of that form.
    """

    def __init__(
        self,
        url: str,
        handshake: TlsHandshake,
        check: Callable[[bytes], None],
        *,
        connections: int = 8,
        max_answer: int = 1 << 20,
    ) -> None:
        check_url(url)
        self._url = url.rstrip("/")
        self._backend = partial(_Backend, handshake, check, max_answer)
        self._unused = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # see _Stream.start_tls
        self._turn: Final = Lock(connections)
        self._idle: list[_Connection] = []
        """The one that was used last is the last."""

    async def exchange(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, Any] | None = None,
        content: object = None,
    ) -> Answer:
        """Send one request, with ``content`` as JSON, and read its answer, without a time limit.

        Raises:
            KeySourceUnavailable: the answer has a content coding (RFC 9110 section 8.4).
            Exception: one of :data:`HTTP_FAILURES`.
        """
        headers = {"Accept": "application/json", "Accept-Encoding": "identity"}
        request = httpx.Request(
            method, self._url + path, params=query, json=content, headers=headers
        )
        body = await request.aread()
        url = httpcore.URL(
            scheme=request.url.raw_scheme,
            host=request.url.raw_host,
            port=request.url.port,
            target=request.url.raw_path,
        )
        async with self._turn:
            connection = self._take(url.origin)
            try:
                return await connection.exchange(
                    httpcore.Request(
                        method=request.method,
                        url=url,
                        headers=request.headers.raw,
                        content=_Content(body),
                    )
                )
            finally:
                self._give_back(connection)

    def _take(self, origin: httpcore.Origin) -> "_Connection":
        idle, self._idle = self._idle, []
        for connection in idle:
            self._give_back(connection)
        if self._idle:
            return self._idle.pop()
        return _Connection(origin, self._backend(), self._unused)

    def _give_back(self, connection: "_Connection") -> None:
        """Keep a connection for the next request, or drop it if it is not fit for one."""
        if connection.fit:
            self._idle.append(connection)
        else:
            connection.drop()

    async def aclose(self) -> None:
        idle, self._idle = self._idle, []
        for connection in idle:
            await connection.aclose()


class _Connection:
    """One connection, not yet open at first."""

    def __init__(self, origin: httpcore.Origin, backend: _Backend, context: ssl.SSLContext) -> None:
        self._backend = backend
        self._http = httpcore.AsyncHTTPConnection(
            origin,
            ssl_context=context,
            keepalive_expiry=60.0,
            network_backend=backend,
        )

    @property
    def fit(self) -> bool:
        """Whether the last request has ended in order, and another can follow."""
        return self._http.is_idle() and not self._http.has_expired()

    async def exchange(self, request: httpcore.Request) -> Answer:
        response = await self._http.handle_async_request(request)
        try:
            fields = httpx.Headers(response.headers)
            if fields.get("Content-Encoding", "identity") != "identity":
                raise KeySourceUnavailable(
                    "the KME's answer is compressed, which was not requested"
                )
            body = await response.aread()
        finally:
            await response.aclose()
        return Answer(status=response.status, headers=fields, body=body)

    def drop(self) -> None:
        """Close it at once: there may be no time for more, at the end of the event loop."""
        if self._backend.stream is not None:
            self._backend.stream.drop()

    async def aclose(self) -> None:
        with suppress(OSError, trio.BrokenResourceError):  # it has ended already
            await self._http.aclose()


def what_failed(error: BaseException) -> str:
    """Why a request got no answer, as a predicate of the KME: *cannot be reached: ...*."""
    kind = _outermost(error)
    tls, system = tls_failure(error), _system_reason(error)
    if isinstance(kind, httpcore.ConnectError | httpcore.ConnectTimeout):
        if not tls:
            why = system or _reason(error)
            return f"cannot be reached: {why}; check that it runs, and its address"
        text = f"cannot be used: {tls}"
        if alert_received(error) in _NOTHING_IN_COMMON:
            text += (
                '; it may lack our TLS version or group: a KME with tls = "hybridkex" needs a '
                "client with post-quantum groups, and other KMEs may have none "
                "(--kme-tls hybridkex or stdlib)"
            )
        return text
    ended = isinstance(kind, httpcore.RemoteProtocolError) and "disconnected" in str(kind)
    if "complete message body" in str(kind):
        return "ended the connection before its response was complete; see its log"
    if isinstance(kind, httpcore.ProtocolError) and not ended:
        return f"did not answer in HTTP: {_reason(error)}"
    if "longer than" in str(kind):
        return f"gave {kind}"
    # A TLS 1.3 server verifies our certificate after our handshake is complete.
    why = f" ({tls or system})" if tls or system else ""
    return f"closed the connection without a response{why}; it may not accept our certificate"


def _outermost(error: BaseException) -> BaseException:
    """The error of httpcore or the httpx error that wraps it."""
    ours = (one for one in causes(error) if type(one).__module__.startswith("httpcore"))
    return next(ours, error)


def _system_reason(error: BaseException) -> str | None:
    """The operating system's reason, from the first ``OSError`` among the causes."""
    found: list[BaseException | None] = [error]
    while found:
        cause = found.pop(0)
        if isinstance(cause, BaseExceptionGroup):
            found.extend(cause.exceptions)
        elif cause is not None:
            if isinstance(cause, socket.gaierror):
                return cause.strerror
            if isinstance(cause, OSError) and cause.errno:
                return os.strerror(cause.errno)  # trio's own text has the address again
            found.append(cause.__cause__ or cause.__context__)
    return None


def refusal_of(error: BaseException) -> str | None:
    """The alert by which the other end refused our certificate; ``None`` if it did not.

    A TLS 1.3 server verifies the client's certificate after the client's handshake is complete, so
    the alert comes in place of an answer.
    """
    alert = alert_received(error)
    return alert if alert in _OF_OUR_CERTIFICATE else None


_OF_OUR_CERTIFICATE: Final = frozenset(
    {
        *("bad certificate", "unsupported certificate", "certificate revoked"),
        *("certificate expired", "certificate unknown", "certificate required"),
        *("unknown ca", "access denied"),
    }
)
"""RFC 9846 section 6.2."""
_NOTHING_IN_COMMON: Final = frozenset(
    {"handshake failure", "protocol version", "insufficient security"}
)
"""Alerts of a server that lacks our TLS version, groups or cipher suites."""
