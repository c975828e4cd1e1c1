"""The HTTP/1.1 server of all ports with HTTP, over any trio stream.

h11 parses and serialises the protocol; this module does the I/O, the limits, and the requirements
of RFC 9110 and RFC 9112 for servers. ``docs/adr/0008-http.md`` explains why it is not a framework.

A response is one send, headers and body together: in two sends, Nagle's algorithm and delayed
acknowledgements would cost 40 ms.
"""

import json
import logging
import math
import time
from collections.abc import Awaitable, Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from email.utils import formatdate
from functools import lru_cache, partial
from typing import Final, NoReturn, TypeAlias
from urllib.parse import unquote

import h11
import trio

from hybridkex.errors import ConfigError
from hybridkex.json_text import load_json
from hybridkex.net.budget import Connection
from hybridkex.net.log import BoundedLog
from hybridkex.net.supervisor import Supervisor
from hybridkex.text import get_logger

LOG: Final = get_logger(__name__)
_LINES: Final = BoundedLog(LOG)
"""Rate-limited, because any client may cause these lines."""

PLAIN_CONNECTIONS: Final = 64
"""The maximum number of connections to a port without authentication. Above it, each new connection
immediately replaces the one that has been silent longest: a scraper sends its request when it
connects and reads the response, so it is served before 64 others have connected."""
LINGER_SECONDS: Final = 2.0
LINGER_SILENCE: Final = 0.5
LINGER_BYTES: Final = 1 << 22
"""Bytes read and discarded after a refused request, so that the client sees the response and not a
reset (RFC 9112 section 9.6)."""
MAX_PIECES: Final = 4096
"""The maximum number of chunks of a body: each costs us more than the client."""
_EMPTY_LINES: Final = b"\r\n"
"""Empty lines before a request, which some clients send, are ignored (RFC 9112 section 2.2)."""
ANY: Final = "*"
"""Stands for any segment in the path of a :class:`Route`."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """A complete request.

    Attributes:
        method: as the client wrote it; methods are case-sensitive.
        path: the segments, split at ``/`` before percent-decoding, since a segment may hold a
            slash; empty segments are left out.
        query: the part after ``?``, not decoded.
        body: at most :attr:`HttpLimits.max_body` bytes.
    """

    method: str
    path: tuple[str, ...]
    query: str
    body: bytes


@dataclass(frozen=True, kw_only=True)
class Response:
    """A complete response; the body is JSON unless ``content_type`` says otherwise."""

    status: int = 200
    body: bytes = b"{}"
    content_type: str = "application/json"
    headers: tuple[tuple[str, str], ...] = ()

    @classmethod
    def json(
        cls,
        status: int,
        value: object,
        content_type: str = "application/json",
        headers: tuple[tuple[str, str], ...] = (),
    ) -> "Response":
        body = json.dumps(value, separators=(",", ":")).encode()
        return cls(status=status, body=body, content_type=content_type, headers=headers)


Handler: TypeAlias = Callable[[Request], Awaitable[Response]]


class HttpError(Exception):
    """A refused request: status, message and headers of the response."""

    def __init__(self, status: int, message: str, *headers: tuple[str, str]) -> None:
        super().__init__(f"{status}: {message}")
        self.status = status
        self.message = message
        self.headers = headers

    def response(self) -> Response:
        """The response, with the message in a JSON object as in ETSI GS QKD 014 clause 6.5."""
        return Response.json(self.status, {"message": self.message}, headers=self.headers)


@dataclass(frozen=True, kw_only=True)
class HttpLimits:
    """Limits for one client. Sizes are in bytes, times in seconds."""

    max_body: int = 1 << 17
    max_headers: int = 1 << 14
    max_requests: int = 100_000
    """The maximum number of requests on one connection, which is then closed."""
    idle: float = 60.0
    """Time that a connection may wait for its next request."""
    request: float = 10.0
    """Time from the first byte of a request to its last, and again for sending the response."""
    handler: float = 30.0
    """Time for the handler of a request."""
    pipelining: bool = True
    """Whether a client may send a request before it has read the previous response (pipelining,
    RFC 9112 section 9.3.2); otherwise the connection ends with that response."""

    def __post_init__(self) -> None:
        for one in fields(self):
            if not getattr(self, one.name) > 0 and one.name != "pipelining":
                raise ConfigError(f"{one.name} must be positive")


# --- routes ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Route:
    """A path and its methods. ``HEAD`` is among them only if GET changes nothing."""

    name: str
    path: tuple[str, ...]
    methods: tuple[str, ...]

    def matches(self, path: tuple[str, ...]) -> bool:
        return len(path) == len(self.path) and all(
            expected in (ANY, found) for expected, found in zip(self.path, path, strict=True)
        )


def find_route(routes: Iterable[Route], request: Request) -> Route | Response:
    """The route of a request, or the response to OPTIONS.

    Raises:
        HttpError: 404 for an unknown path, 405 with ``Allow`` for a method that the path does not
            support (RFC 9110 sections 15.5.5 and 15.5.6).
    """
    route = next((one for one in routes if one.matches(request.path)), None)
    if request.method == "OPTIONS" and (route is not None or not request.path):
        allowed = sorted({m for one in ([route] if route else routes) for m in one.methods})
        return Response(
            status=204, body=b"", headers=(("Allow", ", ".join([*allowed, "OPTIONS"])),)
        )
    if route is None:
        raise HttpError(404, "there is nothing at this URL")
    if request.method not in route.methods:
        raise HttpError(
            405,
            "this URL does not support this method",
            ("Allow", ", ".join([*sorted(route.methods), "OPTIONS"])),
        )
    return route


def parse_json(body: bytes) -> object:
    """Parse an unambiguous JSON text (RFC 8259): UTF-8, with or without a byte order mark, no
    duplicate member, no number outside JSON's grammar, no lone surrogate, and within the limits of
    :func:`~hybridkex.json_text.load_json`.

    Raises:
        ValueError: it is not such a text.
    """
    text = body.decode("utf-8-sig")
    value: object = load_json(text, parse_constant=_not_json, parse_float=_number)
    if "\\u" in text:
        json.dumps(value, ensure_ascii=False).encode()
    return value


def _not_json(_: str) -> NoReturn:
    raise ValueError("NaN and Infinity are not JSON")


def _number(text: str) -> float | int:
    """JSON has one kind of number: 1.0 and 1e0 are the integer 1."""
    value = float(text)
    if abs(value) > 2**53:
        raise ValueError("a number is out of range (RFC 8259 section 6)")
    return int(value) if value.is_integer() else value


# --- connections -------------------------------------------------------------------------------


def http_supervisor(
    handler: Handler,
    name: str,
    logger: logging.Logger,
    *,
    connections: int = PLAIN_CONNECTIONS,
    limits: HttpLimits | None = None,
    closing: trio.Event | None = None,
) -> Supervisor[trio.SocketStream]:
    """A supervisor for HTTP without TLS and authentication, such as metrics."""

    async def handle(stream: trio.SocketStream, connection: Connection) -> None:
        await serve_connection(
            stream,
            handler,
            limits or HttpLimits(pipelining=False),
            closing,
            connection.waiting,
            # A page of metrics can be requested again: a client that does not read it can be
            # evicted, too.
            partial(connection.waiting, unread=True),
        )

    # Clients are never admitted, since they are not authenticated: a silent one can be evicted.
    return Supervisor(
        handle,
        name=name,
        logger=logger,
        handshakes=connections,
        handshake_seconds=math.inf,
        patience=0.0,
    )


async def serve_connection(
    stream: trio.abc.Stream,
    handler: Handler,
    limits: HttpLimits,
    closing: trio.Event | None = None,
    waiting: Callable[[], AbstractContextManager[object]] = nullcontext,
    sending: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> None:
    """Answer the requests of one connection until it ends, or until ``closing`` is set.

    A request that has begun when ``closing`` is set is still answered. The stream is left open. A
    broken stream ends the connection without an error.

    Args:
        stream: the connection.
        handler: answers requests. An :class:`HttpError` that it raises becomes its response; any
            other exception becomes 500 and one log line.
        limits: bounds of size and time.
        closing: set when no new request is to be read.
        waiting: entered while we wait for the client and can close the connection without loss.
        sending: entered while a response is sent.
    """
    try:
        await _Server(
            stream, handler, limits, trio.Event() if closing is None else closing, waiting, sending
        ).run()
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        return


class _Server:
    def __init__(
        self,
        stream: trio.abc.Stream,
        handler: Handler,
        limits: HttpLimits,
        closing: trio.Event,
        waiting: Callable[[], AbstractContextManager[object]],
        sending: Callable[[], AbstractContextManager[object]],
    ) -> None:
        self._stream = stream
        self._handler = handler
        self._limits = limits
        self._closing = closing
        self._waiting = waiting
        self._sending = sending
        self._head = False
        """Whether the request is a HEAD; known before the request is checked."""
        self._silence: trio.CancelScope | None = None
        """The time limit of the wait for the next request."""
        self._http = self._connection()

    async def run(self) -> None:
        failure: Exception | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch)
            try:
                await self._serve()
            except Exception as error:  # raised below, not in a group
                failure = error
            nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure

    async def _watch(self) -> None:
        """Stop waiting for the next request when ``closing`` is set."""
        await self._closing.wait()
        if self._silence is not None:
            self._silence.cancel()

    async def _serve(self) -> None:
        for left in reversed(range(self._limits.max_requests)):
            try:
                with self._waiting():
                    if not await self._begins():
                        return
                    with trio.fail_after(self._limits.request):
                        request = await self._read()
            except HttpError as error:
                await self._refuse(error)
                return
            except h11.RemoteProtocolError as error:
                await self._refuse(HttpError(error.error_status_hint, "malformed HTTP request"))
                return
            except trio.TooSlowError:
                await self._refuse(HttpError(408, "the request did not arrive in time"))
                return
            if request is None:
                return
            response = await self._respond(request)
            pipelined = bool(self._http.trailing_data[0]) and not self._limits.pipelining
            last = self._closing.is_set() or left == 0 or pipelined
            if not await self._send(response, last=last):
                if pipelined:
                    await self._linger()
                return
            self._next_cycle()

    # -- reading

    async def _begins(self) -> bool:
        """Wait for the first bytes of a request. Returns false if there is no further request."""
        if self._http.trailing_data[0]:
            return True
        begin = b""
        with trio.move_on_after(self._limits.idle) as self._silence:
            if self._closing.is_set():
                self._silence.cancel()
            while not begin and (data := await self._receive()):
                begin = data.lstrip(_EMPTY_LINES)
        self._silence = None
        if begin:
            self._http.receive_data(begin)
        return bool(begin)

    async def _receive(self) -> bytes:
        try:
            return bytes(await self._stream.receive_some(1 << 16))
        except trio.BrokenResourceError:
            return b""

    def _next_cycle(self) -> None:
        rest = self._http.trailing_data[0]
        if rest.startswith((b"\r", b"\n")):
            self._http = self._connection()
            if rest := rest.lstrip(_EMPTY_LINES):
                self._http.receive_data(rest)
        else:
            self._http.start_next_cycle()

    def _connection(self) -> h11.Connection:
        return h11.Connection(h11.SERVER, max_incomplete_event_size=self._limits.max_headers)

    async def _read(self) -> Request | None:
        """The next request; ``None`` if the client has closed. Raises ``HttpError`` and h11's
        errors."""
        head: h11.Request | None = None
        self._head = False
        body = bytearray()
        pieces = 0
        while True:
            event = self._http.next_event()
            if event is h11.NEED_DATA:
                if self._http.they_are_waiting_for_100_continue:
                    go_on = h11.InformationalResponse(
                        status_code=100, headers=[], reason=b"Continue"
                    )
                    await self._stream.send_all(self._http.send(go_on))
                self._http.receive_data(await self._receive())
            elif isinstance(event, h11.Request):
                head = event
                self._head = head.method == b"HEAD"
                _check_head(head, self._limits)
            elif isinstance(event, h11.Data):
                body += event.data
                pieces += 1
                if len(body) > self._limits.max_body or pieces > MAX_PIECES:
                    raise _too_large(self._limits)
            elif isinstance(event, h11.EndOfMessage) and head is not None:
                path, query = _target(head)
                return Request(
                    method=head.method.decode("ascii"), path=path, query=query, body=bytes(body)
                )
            else:
                return None

    # -- answering

    async def _respond(self, request: Request) -> Response:
        try:
            with trio.fail_after(self._limits.handler):
                return await self._handler(request)
        except HttpError as error:
            return error.response()
        except trio.TooSlowError:
            return Response.json(503, {"message": "the server is too slow now"})
        except Exception as error:
            # A bug on our side; the client learns no details.
            _LINES.log(logging.ERROR, "a handler of requests failed: %s", type(error).__name__)
            LOG.debug("the internal error", exc_info=error)
            return Response.json(500, {"message": "internal error"})

    async def _send(self, response: Response, *, last: bool) -> bool:
        """Send a response in one call. Returns false if it was the last one on this connection."""
        if self._http.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            return False
        headers = [("Date", _date(int(time.time()))), ("Cache-Control", "no-store")]
        if response.status != 204:
            headers += [
                ("Content-Type", response.content_type),
                ("Content-Length", str(len(response.body))),
            ]
        headers += response.headers
        if last:
            headers.append(("Connection", "close"))
        data = self._http.send(h11.Response(status_code=response.status, headers=headers))
        if not self._head and response.body:  # the fields of GET alone (RFC 9110 section 9.3.2)
            data += self._http.send(h11.Data(data=response.body)) or b""
        data += self._http.send(h11.EndOfMessage()) or b""
        with trio.move_on_after(self._limits.request), self._sending():
            await self._stream.send_all(data)
            return not last and self._http.states == {h11.CLIENT: h11.DONE, h11.SERVER: h11.DONE}
        return False

    async def _refuse(self, error: HttpError) -> None:
        """Answer a request that was not read completely, and end the connection."""
        await self._send(error.response(), last=True)
        await self._linger()

    async def _linger(self) -> None:
        """Read for a while, so that the client reads the last response and does not get a reset."""
        with trio.move_on_after(LINGER_SECONDS), self._sending():
            if isinstance(self._stream, trio.SocketStream):
                await self._stream.send_eof()
            read = 0
            while read < LINGER_BYTES:
                data = b""
                with trio.move_on_after(LINGER_SILENCE):
                    data = bytes(await self._stream.receive_some(1 << 16))
                if not data:
                    return
                read += len(data)


def _check_head(head: h11.Request, limits: HttpLimits) -> None:
    if not head.http_version.startswith(b"1."):
        raise HttpError(505, "this server speaks HTTP/1.1")
    # h11 looks at the size only while a head is incomplete.
    if len(head.target) + sum(len(n) + len(v) + 4 for n, v in head.headers) > limits.max_headers:
        raise HttpError(431, "the header fields are too large")
    fields = dict(head.headers)  # names in lower case
    if b"transfer-encoding" in fields:
        # Two lengths, or a client that does not know chunks: an intermediary could parse such a
        # request differently (RFC 9112 sections 6.1 and 6.3).
        if b"content-length" in fields or head.http_version < b"1.1":
            raise HttpError(400, "Transfer-Encoding with Content-Length, or in HTTP/1.0")
    elif int(fields.get(b"content-length", b"0")) > limits.max_body:
        raise _too_large(limits)
    if fields.get(b"content-encoding", b"identity").lower() != b"identity":
        raise HttpError(415, "the body has a content coding", ("Accept-Encoding", "identity"))
    if fields.get(b"expect", b"100-continue").lower() != b"100-continue":
        raise HttpError(417, "only Expect: 100-continue is supported")
    _target(head)


def _too_large(limits: HttpLimits) -> HttpError:
    return HttpError(413, f"the body is too large: the limit is {limits.max_body} bytes")


def _target(head: h11.Request) -> tuple[tuple[str, ...], str]:
    """Path and query of a request target (RFC 9112 section 3.2)."""
    text = head.target.decode("latin-1")
    if text == "*" and head.method == b"OPTIONS":
        return (), ""
    scheme, separator, rest = text.partition("://")
    if separator and scheme.lower() in ("http", "https"):  # absolute-form, which MUST be accepted
        text = rest[len(rest.partition("/")[0].partition("?")[0]) :]
        text = text if text.startswith("/") else f"/{text}"
    if not text.startswith("/") or "#" in text:
        raise HttpError(400, "malformed request target")
    path, _, query = text.partition("?")
    try:
        return tuple(unquote(part, errors="strict") for part in path.split("/") if part), query
    except UnicodeDecodeError:
        raise HttpError(400, "the request target is not UTF-8") from None


@lru_cache(1)
def _date(seconds: int) -> str:
    return formatdate(seconds, usegmt=True)
