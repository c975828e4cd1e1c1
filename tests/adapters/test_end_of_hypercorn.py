"""However ``serve()`` of hypercorn's adapter ends, nothing of it is left: no task, no socket."""

import asyncio
import gc
import os
import socket
import types
from collections.abc import Awaitable, Callable, Coroutine, Generator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest
from h2.connection import H2Connection
from hypercorn.config import Config
from suspensions import cancelled_at
from waiting import asyncio_until

from hybridkex import ClientConfig, ClientConnection, DevCa, ServerConfig, TrustStore
from hybridkex.adapters import hypercorn
from hybridkex.adapters.hypercorn import serve
from hybridkex.aio import open_connection
from hybridkex.tls.events import SessionProposed

CA = DevCa.create(algorithm="ed25519")
IDENTITY = CA.issue("localhost", algorithm="ed25519")


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks whose connection is lost are cancelled sooner than by default, and more often."""
    monkeypatch.setattr(hypercorn, "_LOST_SECONDS", 0.02)


def client_config(*alpn: str) -> ClientConfig:
    return ClientConfig(verifier=TrustStore((CA.certificate,)), alpn=alpn)


class Application:
    """Never answers; catches ``catches`` cancellations before it ends."""

    def __init__(self, catches: int = 0) -> None:
        self.said: list[str] = []
        self.catches = catches

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "lifespan":
            self.said.append("asked")
            await self._work()
            return
        for _ in range(2):
            message = await receive()
            self.said.append(message["type"])
            await send({"type": message["type"] + ".complete"})

    async def _work(self) -> None:
        for _ in range(self.catches):
            with suppress(asyncio.CancelledError):
                await asyncio.sleep(3600)
        await asyncio.sleep(3600)


class Server:
    """``serve()``, not started yet."""

    def __init__(self, application: Application, graceful: float, *alpn: str) -> None:
        settings = Config()
        settings.graceful_timeout = graceful
        self.port: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self.coroutine = serve(
            application,
            0,
            ServerConfig(identities=(IDENTITY,), alpn=alpn),
            host="127.0.0.1",
            settings=settings,
            started=self.port.set_result,
        )


def request_of_http_2() -> bytes:
    connection = H2Connection()
    connection.initiate_connection()
    headers = {":method": "GET", ":path": "/", ":scheme": "https", ":authority": "localhost"}
    connection.send_headers(1, list(headers.items()), end_stream=True)
    return connection.data_to_send()


def hello() -> tuple[ClientConnection, bytes]:
    client = ClientConnection(client_config(), "localhost")
    client.start()
    return client, bytes(client.data_to_send())


async def tcp(port: int, says: bytes) -> socket.socket:
    one = socket.create_connection(("127.0.0.1", port))
    one.setblocking(False)
    one.sendall(says)
    for _ in range(10):
        await asyncio.sleep(0)
    return one


async def asking(port: int, application: Application, *alpn: str) -> asyncio.StreamWriter:
    _, writer = await open_connection("localhost", port, client_config(*alpn))
    writer.write(request_of_http_2() if alpn else b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
    await asyncio_until(lambda: "asked" in application.said)
    return writer


Client = Callable[[int, Application], Awaitable[Any]]

CLIENTS: dict[str, tuple[Client, int]] = {
    "a connection": (lambda port, _: tcp(port, b""), 0),
    "a byte": (lambda port, _: tcp(port, b"\x16"), 0),
    "a ClientHello": (lambda port, _: tcp(port, hello()[1]), 0),
    "nothing more": (lambda port, _: open_connection("localhost", port, client_config()), 0),
    "a request": (asking, 0),
    "a request of HTTP/2": (lambda port, application: asking(port, application, "h2"), 0),
    "a stubborn request": (asking, 3),
    "a stubborn request of HTTP/2": (lambda port, application: asking(port, application, "h2"), 3),
}


def descriptors() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


async def end(client: Any) -> None:
    if isinstance(client, socket.socket):
        client.close()
        return
    if client is not None:
        writer = client[1] if isinstance(client, tuple) else client
        writer.transport.abort()
        with suppress(ConnectionError):
            await writer.wait_closed()


async def ended_by(
    name: str | None, graceful: float, serving: Callable[[Any], Awaitable[None]]
) -> bool:
    """Run a server with one client until it has ended; whether it had begun."""
    connect, catches = CLIENTS[name] if name is not None else (None, 0)
    application = Application(catches)
    loop, told = asyncio.get_running_loop(), list[Any]()
    loop.set_exception_handler(lambda _, context: told.append(context))
    before, own = descriptors(), asyncio.all_tasks()
    server = Server(application, graceful, *(("h2",) if name and "HTTP/2" in name else ()))
    client: Any = None
    running = loop.create_task(serving(server.coroutine))  # type: ignore[arg-type]
    await asyncio.wait((running, server.port), return_when=asyncio.FIRST_COMPLETED)
    if server.port.done() and connect is not None and not running.done():
        client = await connect(server.port.result(), application)
    if not running.done():
        running.cancel()
        await asyncio.wait((running,))
    with suppress(asyncio.CancelledError):
        running.result()
    assert asyncio.all_tasks() == own
    await end(client)
    await asyncio.sleep(0)
    assert descriptors() == before
    assert application.said[-1:] != ["asked"]
    assert told == []
    return server.port.done()


@pytest.mark.parametrize("name", CLIENTS)
def test_after_one_cancellation(name: str) -> None:
    """When the time of grace is over, it ends."""

    async def main() -> None:
        async def whole(coroutine: Any) -> None:
            await coroutine

        assert await ended_by(name, 0.05, whole)

    asyncio.run(main())


@types.coroutine
def cancelled_again(work: Coroutine[Any, Any, None], later: int) -> Generator[Any, Any, None]:
    """Run ``work``; once it has been cancelled, cancel it at suspension number ``later`` again."""
    task, since = asyncio.current_task(), None
    assert task is not None
    act: Callable[[], Any] = partial(work.send, None)
    while True:
        try:
            waits_for = act()
        except StopIteration:
            return
        if since is not None:
            if since == later:
                task.cancel()
            since += 1
        try:
            value = yield waits_for
        except BaseException as error:  # handed on to the coroutine
            act, since = partial(work.throw, error), since or 0
        else:
            act = partial(work.send, value)


@pytest.mark.parametrize("name", CLIENTS)
def test_a_second_cancellation_ends_the_time_of_grace(name: str) -> None:
    """At each point up to there."""
    waits = "request" in name

    async def main() -> None:
        for later in range(4 if waits else 8):

            async def twice(coroutine: Any, later: int = later) -> None:
                await cancelled_again(coroutine, later)

            async with asyncio.timeout(30):
                assert await ended_by(name, 3600 if waits else 0.05, twice)

    asyncio.run(main())


def test_a_cancellation_at_each_point_of_the_start() -> None:
    async def main() -> None:
        step, started = 0, False
        while not started:
            reached: list[bool] = []

            async def one(coroutine: Any, step: int = step, reached: Any = reached) -> None:
                task = asyncio.current_task()
                assert task is not None
                await cancelled_at(step, coroutine, task.cancel, reached)

            started = await ended_by(None, 0.05, one)
            assert reached or started
            step += 1
        assert step >= 2

    asyncio.run(main())


@pytest.mark.parametrize("name", [None, *CLIENTS])
def test_within_a_cancel_scope(name: str | None) -> None:
    """anyio cancels in each turn of the loop. The time of grace, an hour, is over at once."""

    async def main() -> None:
        scope = anyio.CancelScope()

        async def within(coroutine: Any) -> None:
            with scope:
                await coroutine

        async def cancel_scope(coroutine: Any) -> None:
            inner = asyncio.create_task(within(coroutine))
            try:
                await asyncio.wait((inner,))
            except asyncio.CancelledError:
                scope.cancel()
                await asyncio.wait((inner,))
                inner.result()

        async with asyncio.timeout(30):
            await ended_by(name, 3600, cancel_scope)

    asyncio.run(main())


def test_a_handshake_that_is_completed_too_late() -> None:
    """While another connection has its time of grace, nobody new is served."""

    async def main() -> None:
        loop, application = asyncio.get_running_loop(), Application()
        server = Server(application, 0.3)
        running = loop.create_task(server.coroutine)  # type: ignore[arg-type]
        port = await server.port
        writer = await asking(port, application)
        engine, says = hello()
        late = await tcp(port, says)
        while not engine.handshake_complete:
            engine.receive_data(await loop.sock_recv(late, 65536))
            while not engine.handshake_complete and (event := engine.next_event()) is not None:
                if isinstance(event, SessionProposed):
                    engine.accept(event.session)
        engine.send_data(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        running.cancel()
        await asyncio.sleep(0)
        with suppress(ConnectionError):
            await loop.sock_sendall(late, bytes(engine.data_to_send()))
        await asyncio.wait((running,))
        assert application.said == ["lifespan.startup", "asked", "lifespan.shutdown"]
        late.close()
        await end(writer)

    asyncio.run(main())


PROGRAM = """
import asyncio, contextlib, os, signal, sys
from hybridkex import ClientConfig, DevCa, ServerConfig, TrustStore
from hybridkex.adapters.hypercorn import serve
from hybridkex.aio import open_connection

CA = DevCa.create(algorithm="ed25519")
CLIENT = ClientConfig(verifier=TrustStore((CA.certificate,)))
SERVER = ServerConfig(identities=(CA.issue("localhost", algorithm="ed25519"),))
how, library = sys.argv[1:]


async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        for _ in range(2):
            message = await receive()
            print(message["type"])
            await send({"type": message["type"] + ".complete"})
        return
    os.kill(os.getpid(), signal.SIGTERM)
    with contextlib.suppress(ConnectionRefusedError):
        while not how.startswith("own"):
            _, writer = await asyncio.open_connection(*scope["server"])
            writer.close()
    os.kill(os.getpid(), signal.SIGTERM)  # many senders of signals send two
    await asyncio.sleep(0)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"ok"})


async def main():
    loop = asyncio.get_running_loop()
    if how == "own handler":
        loop.add_signal_handler(signal.SIGTERM, print, "own")
    before = signal.getsignal(signal.SIGTERM)
    ports = [loop.create_future() for _ in range(2 if how == "two servers" else 1)]
    servers = [
        loop.create_task(serve(app, 0, SERVER, host="127.0.0.1", started=port.set_result))
        for port in ports
    ]
    for port in ports:
        await port
    if how == "own handler later":
        loop.add_signal_handler(signal.SIGTERM, print, "own")
        before = signal.getsignal(signal.SIGTERM)
    reader, writer = await open_connection("localhost", ports[0].result(), CLIENT)
    writer.write(b"GET / HTTP/1.1\\r\\nHost: a\\r\\nConnection: close\\r\\n\\r\\n")
    print((await reader.read())[:12].decode())
    writer.close()
    if how.startswith("own"):
        servers[0].cancel()
    for ended in await asyncio.gather(*servers, return_exceptions=True):
        print(type(ended).__name__)
    assert signal.getsignal(signal.SIGTERM) is before


if library == "uvloop":
    import uvloop
    uvloop.run(main())
else:
    asyncio.run(main())
"""


@pytest.mark.parametrize("library", ["asyncio", "uvloop"])
@pytest.mark.parametrize("how", ["a server", "two servers", "own handler", "own handler later"])
def test_sigterm(hybridkex: Any, tmp_path: Path, how: str, library: str) -> None:
    """A request that runs is answered, and the application gets its end, as with hypercorn's own
    ``serve``."""
    if library == "uvloop":
        pytest.importorskip("uvloop", reason="uvloop is not installed: pip install uvloop")
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    result = hybridkex.run(how, library, program=str(program))
    assert (result.returncode, result.stderr) == (0, b"")
    number = 2 if how == "two servers" else 1
    own = ["own"] * 2 if how.startswith("own") else []
    lines = result.stdout.decode().splitlines()
    if how == "two servers":  # the other one, which has no request, ends as soon
        lines.sort(key=["lifespan.startup", "HTTP/1.1 200", "lifespan.shutdown", "NoneType"].index)
    assert lines == [
        *["lifespan.startup"] * number,
        *own,
        "HTTP/1.1 200",
        *["lifespan.shutdown"] * number,
        *["CancelledError" if own else "NoneType"] * number,
    ]


def test_a_loop_that_was_closed_under_its_server_takes_no_signal_from_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    closed = asyncio.new_event_loop()
    closed.close()

    async def main() -> None:
        event = asyncio.Event()
        serving = {asyncio.Event(): closed, event: asyncio.get_running_loop()}
        monkeypatch.setattr(hypercorn, "_SERVING", serving)
        hypercorn._terminate()
        await asyncio.wait_for(event.wait(), 10)

    asyncio.run(main())
