"""A small HTTP/1.1 server over any trio stream: h11 does the protocol, this file the I/O.

One send for a response, headers and body together: in two sends, Nagle's algorithm and delayed
acknowledgements would cost 40 ms.
"""

import json
import logging
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Final, TypeAlias
from urllib.parse import unquote

import h11
import trio

from hybridkex.net.supervisor import Budget, Connection, Supervisor
from hybridkex.text import get_logger

__all__ = ["Handler", "HttpLimits", "Request", "Response", "http_supervisor", "serve_connection"]

LOG: Final = get_logger(__name__)

PLAIN_CONNECTIONS: Final = 16
"""Connections at once to a port without authentication: a few scrapers and their owner."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """A complete request."""

    method: str
    path: tuple[str, ...]
    """The segments, split at ``/`` before percent-decoding: a segment may hold a slash."""
    query: str
    body: bytes


@dataclass(frozen=True, kw_only=True)
class Response:
    """A complete response; the body is JSON unless ``content_type`` says otherwise."""

    status: int = 200
    body: bytes = b"{}"
    content_type: str = "application/json"
    headers: tuple[tuple[str, str], ...] = field(default=())

    @classmethod
    def json(cls, status: int, value: object, content_type: str = "application/json") -> "Response":
        body = json.dumps(value, separators=(",", ":")).encode()
        return cls(status=status, body=body, content_type=content_type)


Handler: TypeAlias = Callable[[Request], Awaitable[Response]]


@dataclass(frozen=True, kw_only=True)
class HttpLimits:
    """What one client may cost."""

    max_body: int = 1 << 17
    max_headers: int = 1 << 14
    idle: float = 60.0
    """Seconds that a connection may wait for its next request."""
    request: float = 10.0
    """Seconds from the first byte of a request to the end of its response."""


class _TooLarge(Exception):
    pass


async def serve_connection(
    stream: trio.abc.Stream,
    handler: Handler,
    limits: HttpLimits,
    closing: trio.Event | None = None,
    waiting: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> None:
    """Answer the requests of one connection until it ends, or until ``closing`` is set.

    A request that has begun when ``closing`` is set is still answered. The stream is left open.
    ``waiting`` is entered while the client owes us its next request.
    """
    connection = h11.Connection(h11.SERVER, max_incomplete_event_size=limits.max_headers)
    while True:
        with waiting():
            begins = await _request_begins(stream, connection, limits.idle, closing)
        if not begins:
            return
        with trio.move_on_after(limits.request) as scope:
            last = closing is not None and closing.is_set()
            if not await _one_exchange(stream, connection, handler, limits, last):
                return
        if scope.cancelled_caught:
            return
        connection.start_next_cycle()


def http_supervisor(
    handler: Handler,
    name: str,
    logger: logging.Logger,
    *,
    connections: int = PLAIN_CONNECTIONS,
    limits: HttpLimits | None = None,
    closing: trio.Event | None = None,
) -> Supervisor[trio.SocketStream]:
    """A supervisor for plain HTTP without authentication, such as metrics."""
    budget = Budget(connections)

    async def handle(stream: trio.SocketStream, connection: Connection) -> None:
        connection.admit(budget, connection.address)
        await serve_connection(stream, handler, limits or HttpLimits(), closing, connection.waiting)

    return Supervisor(handle, name=name, logger=logger, handshakes=connections)


async def _request_begins(
    stream: trio.abc.Stream,
    connection: h11.Connection,
    idle: float,
    closing: trio.Event | None,
) -> bool:
    """Wait for the first bytes of a request. False: there will be none."""
    if connection.trailing_data[0]:
        return True
    began = False

    async with trio.open_nursery() as nursery:

        async def watch(event: trio.Event) -> None:
            await event.wait()
            nursery.cancel_scope.cancel()

        if closing is not None:
            nursery.start_soon(watch, closing)
        with trio.move_on_after(idle):
            try:
                data = await stream.receive_some(1 << 16)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                data = b""
            if data:
                connection.receive_data(bytes(data))
                began = True
        nursery.cancel_scope.cancel()
    return began


async def _one_exchange(
    stream: trio.abc.Stream,
    connection: h11.Connection,
    handler: Handler,
    limits: HttpLimits,
    last: bool,
) -> bool:
    """Read one request and answer it. False: the connection is at its end."""
    try:
        request = await _read_request(stream, connection, limits)
    except h11.RemoteProtocolError as error:
        status = error.error_status_hint
        return await _send(
            stream, connection, Response.json(status, {"message": "not HTTP"}), last=True
        )
    except _TooLarge:
        answer = Response.json(400, {"message": "the request body is too large"})
        return await _send(stream, connection, answer, last=True)
    if request is None:
        return False
    try:
        response = await handler(request)
    except Exception as error:
        # A bug of ours must not end the server; the client learns no more than that.
        LOG.error("request handler failed: %s", type(error).__name__)  # noqa: TRY400
        LOG.debug("the internal error", exc_info=error)
        response = Response.json(500, {"message": "internal error"})
    return await _send(stream, connection, response, last=last, head=request.method == "HEAD")


async def _read_request(
    stream: trio.abc.Stream, connection: h11.Connection, limits: HttpLimits
) -> Request | None:
    head: h11.Request | None = None
    body = bytearray()
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            if connection.they_are_waiting_for_100_continue:
                go_on = connection.send(
                    h11.InformationalResponse(status_code=100, headers=[], reason=b"Continue")
                )
                await stream.send_all(go_on)
            try:
                connection.receive_data(bytes(await stream.receive_some(1 << 16)))
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                return None
        elif isinstance(event, h11.Request):
            head = event
        elif isinstance(event, h11.Data):
            body += event.data
            if len(body) > limits.max_body:
                raise _TooLarge
        elif isinstance(event, h11.EndOfMessage) and head is not None:
            target, _, query = head.target.decode("latin-1").partition("?")
            return Request(
                method=head.method.decode("ascii"),
                path=tuple(unquote(part) for part in target.split("/")[1:]),
                query=query,
                body=bytes(body),
            )
        else:
            return None  # the other end is gone


async def _send(
    stream: trio.abc.Stream,
    connection: h11.Connection,
    response: Response,
    *,
    last: bool,
    head: bool = False,
) -> bool:
    """Send a response with one call. False: it was the last one."""
    if not _may_answer(connection):
        return False
    headers = [
        ("Content-Type", response.content_type),
        ("Content-Length", str(len(response.body))),
        ("Cache-Control", "no-store"),
        *response.headers,
    ]
    if last:
        headers.append(("Connection", "close"))
    data = connection.send(h11.Response(status_code=response.status, headers=headers))
    if not head:  # headers as those of GET, and no body (RFC 9110 section 9.3.2)
        data += connection.send(h11.Data(data=response.body)) or b""
    data += connection.send(h11.EndOfMessage()) or b""
    try:
        await stream.send_all(data)
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        return False
    return not last and connection.states == {h11.CLIENT: h11.DONE, h11.SERVER: h11.DONE}


def _may_answer(connection: h11.Connection) -> bool:
    return connection.our_state in (h11.IDLE, h11.SEND_RESPONSE)
