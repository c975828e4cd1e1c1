"""The HTTP server: odd requests, limits of size and time, and clients that leave."""

import contextlib
import json
import logging
import random
import re
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager, suppress

import h11
import pytest
import trio
from http_requests import CASES, GET, POST, Case, post, target
from trio.testing import MockClock, memory_stream_pair

from hybridkex.kme.metrics import KmeMetrics
from hybridkex.net.http import (
    HttpLimits,
    Request,
    Response,
    Route,
    find_route,
    http_supervisor,
    parse_json,
    serve_connection,
)

LIMITS = HttpLimits(max_body=1000, max_headers=2000, idle=60, request=10, handler=30)
ROUTES = [
    Route(name="thing", path=("thing",), methods=("GET", "HEAD", "POST")),
    Route(name="boom", path=("boom",), methods=("GET",)),
    Route(name="slow", path=("slow",), methods=("GET",)),
]


async def handler(request: Request) -> Response:
    route = find_route(ROUTES, request)
    if isinstance(route, Response):
        return route
    if route.name == "boom":
        raise OverflowError("a secret")
    if route.name == "slow":
        await trio.sleep(100)
    if request.method != "POST":
        return Response.json(200, {"query": request.query})
    try:
        return Response.json(200, {"got": parse_json(request.body)})
    except ValueError as error:
        return Response.json(400, {"message": str(error)})


class Answers:
    """What came back, read by h11 as a client."""

    def __init__(self, raw: bytes, methods: list[bytes], closed: bool) -> None:
        self.closed = closed
        self.found: list[tuple[int, dict[bytes, bytes], bytes]] = []
        reader = h11.Connection(h11.CLIENT)
        rest = raw
        for method in [*methods, *[b"GET"] * 9]:
            if not rest:
                break
            reader = h11.Connection(h11.CLIENT)
            reader.send(h11.Request(method=method, target="/", headers=[("Host", "x")]))
            reader.send(h11.EndOfMessage())
            reader.receive_data(rest)
            body = b""
            while True:
                event = reader.next_event()
                if isinstance(event, h11.Response):
                    head = event
                elif isinstance(event, h11.Data):
                    body += event.data
                elif isinstance(event, h11.EndOfMessage):
                    break
                elif event is h11.NEED_DATA:
                    raise AssertionError(f"an incomplete answer: {rest!r}")
            self.found.append((head.status_code, dict(head.headers), body))
            rest = reader.trailing_data[0]

    @property
    def statuses(self) -> tuple[int, ...]:
        return tuple(status for status, _, _ in self.found)


async def exchange(sent: bytes, pieces: int = 0) -> Answers:
    """Send something, wait a little, and see what comes back."""
    ours, theirs = memory_stream_pair()
    raw = b""
    closed = False
    async with trio.open_nursery() as nursery:

        async def serve() -> None:
            await serve_connection(theirs, handler, LIMITS)
            await theirs.aclose()

        async def receive() -> None:
            nonlocal raw, closed
            async for data in ours:
                raw += data
            closed = True

        nursery.start_soon(serve)
        nursery.start_soon(receive)
        for start in range(0, len(sent), pieces or len(sent) or 1):
            with trio.move_on_after(1):
                await ours.send_all(sent[start : start + (pieces or len(sent))])
            await trio.testing.wait_all_tasks_blocked()
        await trio.sleep(5)
        nursery.cancel_scope.cancel()
    methods = re.findall(rb"(?:^|\n)(HEAD) ", sent)[:1]
    return Answers(raw, methods if sent.startswith(b"HEAD") else [], closed)


def agrees(case: Case, answers: Answers) -> bool:
    return len(answers.statuses) == len(case.statuses) and all(
        found == expected or (expected == 0 and (400 <= found < 500 or found in (501, 505)))
        for found, expected in zip(answers.statuses, case.statuses, strict=True)
    )


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
async def test_odd_requests(case: Case, autojump_clock: MockClock) -> None:
    whole = await exchange(case.sent)
    assert agrees(case, whole), whole.statuses
    assert whole.closed == case.closes
    split = await exchange(case.sent, pieces=1 if len(case.sent) < 400 else 37)
    assert split.statuses == whole.statuses
    for status, headers, body in whole.found:
        assert b"date" in headers
        assert headers.get(b"connection", b"") == (b"close" if case.closes else b"")
        if status == 204:
            assert body == b""
            assert b"content-length" not in headers
        elif not case.name.startswith("HEAD"):
            json.loads(body)
        if status in (204, 405):
            assert b"GET" in headers[b"allow"] or "of all" in case.name
        assert b"secret" not in body


async def test_head_has_the_headers_of_get(autojump_clock: MockClock) -> None:
    [(_, get, body)] = (await exchange(target(b"/thing"))).found
    [(_, head, nothing)] = (await exchange(target(b"/thing", b"HEAD"))).found
    assert body
    assert nothing == b""
    assert get.pop(b"date") is not None
    assert head.pop(b"date") is not None
    assert get == head


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
async def test_any_odd_request_as_a_head(case: Case, autojump_clock: MockClock) -> None:
    """Whatever is refused is refused without a body, and without an error of ours."""
    sent = re.sub(rb"^(\r?\n)*[A-Z]+ ", rb"HEAD ", case.sent, count=1)
    if sent.startswith(b"HEAD "):
        try:
            await exchange(sent)
        except AssertionError as error:
            # h11 names no method of what it cannot parse; the connection ends with the answer.
            assert "malformed HTTP request" in str(error)  # noqa: PT017


@pytest.mark.parametrize("where", [b"htt#p://a_x/y", b"http://[/", b"?", b"/%zz", b"/" * 5000])
async def test_a_head_that_is_refused(where: bytes, autojump_clock: MockClock) -> None:
    [(status, _, body)] = (await exchange(b"HEAD " + where + b" HTTP/1.1\r\nHost: a\r\n\r\n")).found
    assert status >= 400
    assert body == b""


async def test_a_bug_is_one_line(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    await exchange(target(b"/boom"))
    assert [record.getMessage() for record in caplog.records] == [
        "a handler of requests failed: OverflowError"
    ]
    assert caplog.records[0].exc_info is None


@pytest.mark.parametrize(
    ("sent", "seconds", "status"),
    [
        (b"", 60, None),  # nothing at all
        (GET + b"\r\n", 60, 200),  # and then nothing
        (b"GET /th", 10, 408),
        (GET, 10, 408),
        (POST + b"Content-Length: 5\r\n\r\n123", 10, 408),
        (POST + b"Content-Length: 5\r\nExpect: 100-continue\r\n\r\n", 10, 408),
        (POST + b"Transfer-Encoding: chunked\r\n\r\n5\r\n12", 10, 408),
        (target(b"/slow"), 30 + 60, 503),
    ],
)
async def test_time(
    sent: bytes, seconds: float, status: int | None, autojump_clock: MockClock
) -> None:
    ours, theirs = memory_stream_pair()
    began = trio.current_time()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve_and_close, theirs)
        if sent:
            await ours.send_all(sent)
        raw = b""
        async for data in ours:
            raw += data
        await ours.aclose()
    assert trio.current_time() - began == pytest.approx(seconds, abs=2.1)  # it lingers
    if status is None:
        assert raw == b""
    else:
        assert f"HTTP/1.1 {status} ".encode() in raw


async def serve_and_close(stream: trio.abc.Stream) -> None:
    await serve_connection(stream, handler, LIMITS)
    await stream.aclose()


@pytest.mark.parametrize("sent", [GET + b"X: ", POST + b"Content-Length: 900\r\n\r\n"])
async def test_a_byte_a_second(sent: bytes, autojump_clock: MockClock) -> None:
    """Slow headers and slow bodies end with the time for a request, however lively they are."""
    ours, theirs = memory_stream_pair()
    began = trio.current_time()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve_and_close, theirs)
        await ours.send_all(sent)
        with suppress(trio.BrokenResourceError):
            while trio.current_time() - began < 60:
                await trio.sleep(1)
                await ours.send_all(b"1")
    assert trio.current_time() - began < 15


class Stuck(trio.abc.SendStream):
    """Never takes what is sent."""

    async def send_all(self, data: object) -> None:
        await trio.sleep_forever()

    async def wait_send_all_might_not_block(self) -> None:
        await trio.sleep_forever()

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()


async def test_a_client_that_does_not_read(autojump_clock: MockClock) -> None:
    """A response that nobody takes ends with the time for sending."""
    ours, theirs = memory_stream_pair()
    stream = trio.StapledStream(Stuck(), theirs)
    await ours.send_all(GET + b"\r\n")
    with trio.fail_after(15):
        await serve_connection(stream, handler, LIMITS)


@asynccontextmanager
async def port() -> AsyncIterator[int]:
    supervisor = http_supervisor(handler, "test", logging.getLogger("hybridkex.x"), limits=LIMITS)
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with trio.open_nursery() as nursery:
        await nursery.start(supervisor.serve, listeners)
        yield listeners[0].socket.getsockname()[1]
        nursery.cancel_scope.cancel()


async def test_a_refusal_is_read_and_not_a_reset() -> None:
    """413 comes although the client goes on sending, as with a large file."""
    async with port() as number:
        for body in (3_000, 300_000, 3_000_000):
            async with await trio.open_tcp_stream("127.0.0.1", number) as stream:
                await stream.send_all(post(b" " * body))
                with trio.fail_after(5):
                    assert b"413" in await stream.receive_some()


async def test_clients_that_leave_at_every_stage() -> None:
    """A seeded storm of resets and half-open connections; afterwards the port answers."""
    rng = random.Random(14)
    async with port() as number:
        for _ in range(150):
            case = rng.choice(CASES)
            client = socket.create_connection(("127.0.0.1", number))
            client.setblocking(False)
            with suppress(OSError):
                client.send(case.sent[: rng.randrange(len(case.sent) + 1)])
            if rng.random() < 0.7:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            if rng.random() < 0.5:
                await trio.sleep(0.002)
            client.close()
        with trio.fail_after(10):
            async with await trio.open_tcp_stream("127.0.0.1", number) as stream:
                await stream.send_all(GET + b"\r\n")
                assert b" 200 " in await stream.receive_some()


async def test_idle_connections_keep_nobody_out() -> None:
    with ExitStack() as idle:
        async with port() as number:
            for _ in range(300):
                idle.enter_context(socket.create_connection(("127.0.0.1", number)))
            with trio.fail_after(50):
                async with await trio.open_tcp_stream("127.0.0.1", number) as stream:
                    await stream.send_all(GET + b"\r\n")
                    assert b" 200 " in await stream.receive_some()


async def test_the_last_request_of_a_connection(autojump_clock: MockClock) -> None:
    ours, theirs = memory_stream_pair()
    limits = HttpLimits(max_requests=3)
    async with trio.open_nursery() as nursery:

        async def serve() -> None:
            await serve_connection(theirs, handler, limits)
            await theirs.aclose()

        nursery.start_soon(serve)
        await ours.send_all((GET + b"\r\n") * 5)
        raw = b""
        async for data in ours:
            raw += data
    assert raw.count(b"HTTP/1.1 200") == 3
    assert raw.count(b"Connection: close") == 1


def _hostile(port: int, seed: int, held: list[socket.socket]) -> None:
    """320 clients of a port without authentication that are silent, half, or greedy."""
    choice = random.Random(seed)
    get = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"
    said = (b"", b"GET /metr", get * 1500, b"POST /metrics HTTP/1.1\r\nHost: x\r\n\r\n", get[:-1])
    for _ in range(320):
        held.append(socket.create_connection(("127.0.0.1", port), 10))
        held[-1].setblocking(False)
        with contextlib.suppress(OSError):
            held[-1].send(choice.choice(said))


async def test_a_scrape_beside_320_hostile_connections() -> None:
    """They give up their places at once, and none of them makes more than one page."""
    metrics = KmeMetrics()
    supervisor = http_supervisor(metrics.handle, "metrics", logging.getLogger("hybridkex.test"))
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listeners[0].socket.getsockname()[1]
    held: list[socket.socket] = []
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(supervisor.serve, listeners)
            for seed in range(3):
                await trio.to_thread.run_sync(_hostile, port, seed, held)
                began = trio.current_time()
                answer = b""
                async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
                    await stream.send_all(
                        b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
                    )
                    with trio.fail_after(20):
                        async for data in stream:
                            answer += data
                assert answer.startswith(b"HTTP/1.1 200")
                assert trio.current_time() - began < 1
            nursery.cancel_scope.cancel()
    finally:
        for one in held:
            one.close()


async def test_a_pipelining_client_reads_the_last_answer() -> None:
    """Where requests in advance are not served, the first one is, and its answer is not lost."""
    supervisor = http_supervisor(
        KmeMetrics().handle, "metrics", logging.getLogger("hybridkex.test")
    )
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(supervisor.serve, listeners)
        stream = await trio.open_tcp_stream("127.0.0.1", listeners[0].socket.getsockname()[1])
        async with stream:
            await stream.send_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n" * 20)
            await trio.sleep(0.1)
            answer = b""
            with trio.fail_after(10):
                async for data in stream:
                    answer += data
        assert answer.count(b"HTTP/1.1 200") == 1
        assert b"connection: close" in answer.lower()
        nursery.cancel_scope.cancel()
