"""A KME that is silent for a while, with many callers who give up on it: it is asked again as soon
as it answers."""

import asyncio
import gc
import random
import socket
import socketserver
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
import trio

from hybridkex.net.event_loop import on_trio, sleep, time_limit
from hybridkex.qkd.etsi014.mutual_tls import ClientTls
from hybridkex.qkd.etsi014.transport import KmeTransport

ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"
MOST = 8
ESTABLISHED = 1
"""Of tcp(7): neither side has closed the connection."""


class SilentKme(socketserver.ThreadingTCPServer):
    """Answers in HTTP without TLS, as far as ``says`` lets it."""

    daemon_threads = True
    request_queue_size = 512

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.awake = threading.Event()
        self.awake.set()
        self.first_part = b""
        """What it says of its answer before it falls silent."""
        self.open: set[socket.socket] = set()
        self.most_open = 0
        self.lock = threading.Lock()

    def count(self) -> None:
        """Count the connections that the client has open. Of one that it has closed, the thread may
        end much later; the kernel knows at once."""
        states = [one.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] for one in self.open]
        self.most_open = max(self.most_open, states.count(ESTABLISHED))


class Handler(socketserver.BaseRequestHandler):
    server: SilentKme

    def handle(self) -> None:
        with self.server.lock:
            self.server.open.add(self.request)
            self.server.count()
        with suppress(OSError):
            while self.request.recv(65536):
                first = b"" if self.server.awake.is_set() else self.server.first_part
                self.request.sendall(first)
                self.server.awake.wait()
                self.request.sendall(ANSWER[len(first) :])
        with self.server.lock:
            self.server.open.discard(self.request)


@pytest.fixture
def kme() -> Iterator[SilentKme]:
    with SilentKme() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.awake.set()
        server.shutdown()
        thread.join()


async def at_once(calls: list[Callable[[], Awaitable[None]]]) -> None:
    if on_trio():
        async with trio.open_nursery() as nursery:
            for call in calls:
                nursery.start_soon(call)
    else:
        await asyncio.gather(*(call() for call in calls))


def transport(kme: SilentKme, *, handshakes: bool = False, host: str = "127.0.0.1") -> KmeTransport:
    """``handshakes``: whether the connection becomes secure while the KME is silent."""

    async def secure() -> None:
        while not handshakes and not kme.awake.is_set():
            await sleep(0.01)

    async def on_trio(stream: trio.abc.Stream, name: str) -> tuple[trio.abc.Stream, bytes]:
        await secure()
        return stream, b""

    async def on_asyncio(reader: Any, writer: Any, name: str) -> tuple[Any, Any, bytes]:
        await secure()
        return reader, writer, b""

    url = f"https://{host}:{kme.server_address[1]}"
    return KmeTransport(url, ClientTls(on_trio, on_asyncio), lambda _: None, connections=MOST)


def on_asyncio(main: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(main())  # type: ignore[arg-type]


def on_uvloop(main: Callable[[], Awaitable[None]]) -> None:
    pytest.importorskip("uvloop", reason="pip install uvloop").run(main())


on_every_loop = pytest.mark.parametrize(
    "run", [trio.run, on_asyncio, on_uvloop], ids=["trio", "asyncio", "uvloop"]
)


@on_every_loop
@pytest.mark.parametrize("patience", ["equal", "random"])
@pytest.mark.parametrize("silent_in", ["handshake", "request", "answer"])
def test_it_is_asked_again(kme: SilentKme, run: Any, patience: str, silent_in: str) -> None:
    chance = random.Random(f"{patience} {silent_in}")
    http = transport(kme, handshakes=silent_in != "handshake")

    async def call() -> None:
        answer = await http.exchange("GET", "/")
        assert answer.body == b"{}"

    async def give_up() -> None:
        with suppress(TimeoutError):
            async with time_limit(0.1 if patience == "equal" else chance.uniform(0.0, 0.2)):
                await call()

    async def main() -> None:
        await at_once([call] * 20)  # some connections are idle now
        kme.first_part = ANSWER[:20] if silent_in == "answer" else b""
        for _ in range(2):
            kme.awake.clear()
            await at_once([give_up] * 40)
            kme.awake.set()
            async with time_limit(5):
                await at_once([call] * 20)
        await http.aclose()

    run(main)
    assert kme.most_open <= 3 * MOST  # those that were given up may end a little later


@on_every_loop
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_it_has_a_name_or_an_address(kme: SilentKme, run: Any, host: str) -> None:
    async def main() -> None:
        http = transport(kme, host=host)
        answer = await http.exchange("GET", "/")
        assert answer.status == 200
        await http.aclose()

    run(main)


@on_every_loop
def test_the_program_ends_meanwhile(
    kme: SilentKme, run: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Calls that are cancelled at the end of the event loop leave no connection and no task."""
    http = transport(kme, handshakes=True)

    async def ask() -> None:
        await http.exchange("GET", "/")

    async def main() -> None:
        kme.awake.clear()
        kept: Any = []
        for _ in range(20):
            if on_trio():
                trio.lowlevel.spawn_system_task(ask)
            else:
                kept.append(asyncio.ensure_future(ask()))
        while kme.most_open < MOST:
            await sleep(0.01)

    run(main)
    kme.awake.set()
    deadline = time.monotonic() + 5
    while kme.open and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not kme.open
    gc.collect()
    assert not [one for one in caplog.records if one.levelname in ("WARNING", "ERROR")]
