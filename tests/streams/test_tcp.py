"""Over loopback TCP: the helpers, and servers that get more rubbish than clients."""

import contextlib
import gc
import os
import socket
import struct
import tracemalloc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from hybridkex import (
    ClientConfig,
    ClientConnection,
    DevCa,
    MemoryTicketStore,
    Policy,
    Requirement,
    SecureStream,
    ServerConfig,
    TrustStore,
    open_secure_tcp_listeners,
    open_secure_tcp_stream,
    serve_secure_tcp,
)
from hybridkex.constants import Alert
from hybridkex.crypto.kex import X25519
from hybridkex.wire.extensions import Extensions, ServerName
from hybridkex.wire.messages import ClientHello, decode, encode

CONNECTIONS = 10_000
TRACED = 800
AT_ONCE = 50
MAY_GROW = TRACED * 26
"""Bytes: 26 for each connection, and the smallest leak of an object is more."""


async def echo(stream: SecureStream[trio.SocketStream]) -> None:
    async with stream:
        async for data in stream:
            await stream.send_all(data)


@asynccontextmanager
async def serving(
    config: ServerConfig, deadline: float = 10, max_connections: int = 10_000
) -> AsyncIterator[int]:
    """An echo server; gives its port."""

    async def serve(task_status: Any) -> None:
        await serve_secure_tcp(
            echo,
            0,
            config,
            host="127.0.0.1",
            handshake_timeout=deadline,
            max_connections=max_connections,
            task_status=task_status,
        )

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(serve)
        yield listeners[0].transport_listener.socket.getsockname()[1]
        nursery.cancel_scope.cancel()


async def check_service(port: int, config: ClientConfig) -> None:
    stream = await open_secure_tcp_stream("127.0.0.1", port, config, server_hostname="localhost")
    async with stream:
        await stream.send_all(b"still here")
        assert await stream.receive_some() == b"still here"


async def test_open_and_serve(client_config: ClientConfig, server_config: ServerConfig) -> None:
    with trio.fail_after(10):
        async with serving(server_config) as port:
            await check_service(port, client_config)


async def test_the_host_is_the_name_that_is_checked(
    client_config: ClientConfig, server_config: ServerConfig
) -> None:
    """The certificate is for localhost alone, and no server_hostname says so."""
    with trio.fail_after(10):
        async with (
            serving(server_config) as port,
            await open_secure_tcp_stream("127.0.0.1", port, client_config) as stream,
        ):
            with pytest.raises(trio.BrokenResourceError, match=r"127\.0\.0\.1"):
                await stream.do_handshake()


async def test_idle_connections_of_one_address_keep_no_other_out(
    client_config: ClientConfig, server_config: ServerConfig
) -> None:
    """Their handshakes are complete: nothing but their number tells them from good clients."""

    async def connect(port: int, address: str) -> SecureStream[trio.SocketStream]:
        tcp = await trio.open_tcp_stream("127.0.0.1", port, local_address=address)
        stream = SecureStream(tcp, client_config, server_hostname="localhost")
        try:
            await stream.send_all(b"x")
            assert await stream.receive_some() == b"x"
        except BaseException:
            await trio.aclose_forcefully(tcp)
            raise
        return stream

    with trio.fail_after(20):
        async with serving(server_config, max_connections=6) as port:
            idle = [await connect(port, "127.0.0.1") for _ in range(6)]
            others = [await connect(port, f"127.0.0.{n}") for n in range(2, 6)]
            with pytest.raises(trio.BrokenResourceError):
                await connect(port, "127.0.0.1")  # the address that has two of six
            for stream in (*idle[:2], *others):  # the oldest stay
                await stream.send_all(b"y")
                assert await stream.receive_some() == b"y"
            for stream in (*idle, *others):
                await stream.abort()


async def test_idle_connections_of_the_same_address_keep_nobody_out(
    client_config: ClientConfig, server_config: ServerConfig
) -> None:
    """Behind one NAT: they have completed their handshakes, and then say nothing."""

    async def connect(port: int) -> SecureStream[trio.SocketStream]:
        tcp = await trio.open_tcp_stream("127.0.0.1", port)
        stream = SecureStream(tcp, client_config, server_hostname="localhost")
        await stream.do_handshake()
        return stream

    with trio.fail_after(20):
        async with serving(server_config, max_connections=4) as port:
            good = await connect(port)
            await good.send_all(b"x")
            assert await good.receive_some() == b"x"
            idle = [await connect(port) for _ in range(3)]
            await trio.sleep(1.2)
            for _ in range(3):
                other = await connect(port)
                await other.send_all(b"y")
                assert await other.receive_some() == b"y"
                idle.append(other)
            await good.send_all(b"z")  # it has worked, and stays, however long it was silent
            assert await good.receive_some() == b"z"
            for stream in (good, *idle):
                await stream.abort()


async def test_listeners_of_all_interfaces(server_config: ServerConfig) -> None:
    listeners = await open_secure_tcp_listeners(0, server_config)
    assert listeners
    for listener in listeners:
        await listener.aclose()


async def test_stalls_end_at_their_deadline_and_hold_up_nobody(
    client_config: ClientConfig, server_config: ServerConfig
) -> None:
    with trio.fail_after(20):
        async with serving(server_config, deadline=0.5) as port:
            silent = [await trio.open_tcp_stream("127.0.0.1", port) for _ in range(20)]
            for stream in silent[::2]:
                await stream.send_all(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03")
            await check_service(port, client_config)
            for stream in silent:
                async with stream:
                    with trio.fail_after(5):
                        while await stream.receive_some():
                            pass


def hello(config: ClientConfig) -> bytes:
    """A ClientHello that is in order."""
    connection = ClientConnection(config, "localhost")
    connection.start()
    return bytes(connection.data_to_send())


async def rubbish(port: int, data: bytes) -> None:
    with trio.socket.socket() as tcp, contextlib.suppress(ConnectionError):
        await tcp.connect(("127.0.0.1", port))
        while data:
            data = data[await tcp.send(data) :]
        tcp.shutdown(socket.SHUT_WR)
        while await tcp.recv(65536):
            pass


async def many(port: int, kinds: list[bytes], count: int) -> None:
    indices = iter(range(count))

    async def worker() -> None:
        for index in indices:
            await rubbish(port, kinds[index % len(kinds)])

    async with trio.open_nursery() as nursery:
        for _ in range(AT_ONCE):
            nursery.start_soon(worker)


def forget_old_deadlines() -> None:
    """trio keeps about 1,000 cancel scopes after their end, until their deadlines have passed: how
    many there are at a moment is chance, and they are no leak."""
    trio._core._run.GLOBAL_RUN_CONTEXT.runner.deadlines._prune()


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts descriptors by /proc")
async def test_ten_thousand_connections_of_rubbish(
    client_config: ClientConfig, server_config: ServerConfig, no_log: None
) -> None:
    good = hello(client_config)
    flipped = bytearray(good)
    flipped[60] ^= 0xFF
    kinds = [
        b"",
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x16\x03\x01\x00\x05\x01",
        b"\x17" * 99,
        b"\x16\x03\x01\x40\x00" + bytes(1 << 14),
        good[: len(good) // 2],
        bytes(flipped),
        os.urandom(500),
    ]

    async def come_and_go(port: int, number: int) -> None:
        await many(port, [*kinds, good], number)
        await check_service(port, client_config)
        await trio.testing.wait_all_tasks_blocked(0.1)
        forget_old_deadlines()
        gc.collect()

    with trio.fail_after(300):
        async with serving(server_config) as port:
            await come_and_go(port, 500)  # caches fill once
            files, tasks = open_files(), trio.lowlevel.current_statistics().tasks_living
            objects = len(gc.get_objects())
            # Tracing makes every allocation slow: of the last connections each byte is counted, of
            # all of them the objects.
            await many(port, [*kinds, good], CONNECTIONS - TRACED - 200)
            tracemalloc.start()
            try:
                await come_and_go(port, 200)  # what is kept of a bounded number
                before, _ = tracemalloc.get_traced_memory()
                await come_and_go(port, TRACED)
                after, _ = tracemalloc.get_traced_memory()
            finally:
                tracemalloc.stop()
            assert after - before < MAY_GROW
            assert len(gc.get_objects()) - objects < CONNECTIONS // 10
            assert open_files() == files
            assert trio.lowlevel.current_statistics().tasks_living == tasks


async def test_values_that_no_message_can_carry_end_one_connection_only(
    stream_ca: DevCa, client_config: ClientConfig
) -> None:
    """A client chain that no ticket can hold, and a server name of 65,350 letters."""
    config = ServerConfig(
        identities=(stream_ca.issue("localhost"),),
        client_verifier=TrustStore((stream_ca.certificate,)),
        groups=(X25519,),
        policy=Policy(post_quantum=Requirement.PREFER),
    )
    options: dict[str, Any] = {"groups": config.groups, "policy": config.policy}
    usual = replace(client_config, ticket_store=MemoryTicketStore(), **options)
    leaf = stream_ca.issue("bob")
    junk = stream_ca.issue(*(f"{'x' * 60}.{number}.example" for number in range(330))).chain[:1]
    bloated = replace(usual, identity=replace(leaf, chain=(*leaf.chain, *junk * 3)))
    hello = ClientConnection(usual, "localhost")
    hello.start()
    message = decode(bytes(hello.data_to_send())[5:])
    assert isinstance(message, ClientHello)
    extensions = [
        ServerName("a" * 65_350) if isinstance(one, ServerName) else one
        for one in message.extensions
    ]
    raw = encode(replace(message, extensions=Extensions(extensions)))
    pieces = [raw[at : at + 16384] for at in range(0, len(raw), 16384)]
    with trio.fail_after(10):
        async with serving(config) as port:
            await check_service(port, bloated)
            async with await trio.open_tcp_stream("127.0.0.1", port) as transport:
                await transport.send_all(
                    b"".join(b"\x16\3\3" + len(one).to_bytes(2, "big") + one for one in pieces)
                )
                answer = await transport.receive_some()
                assert answer == bytes((21, 3, 3, 0, 2, 2, Alert.UNRECOGNIZED_NAME))
            await check_service(port, usual)


@pytest.mark.parametrize("half", ["before our end", "after our end"])
@pytest.mark.parametrize("data", [b"", b"all of it"])
async def test_a_reset_behind_close_notify_is_no_failure(
    half: str, data: bytes, stream_ca: DevCa, client_config: ClientConfig
) -> None:
    """RFC 9846 section 6.1: what comes behind close_notify is ignored, a reset too."""

    async def reset(stream: SecureStream[trio.SocketStream]) -> None:
        if data:
            await stream.send_all(data)
        await stream.send_eof()
        linger = struct.pack("ii", 1, 0)
        stream.transport_stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        await trio.aclose_forcefully(stream)

    config = ServerConfig(identities=(stream_ca.issue("localhost"),))
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            listeners = await nursery.start(
                partial(serve_secure_tcp, reset, 0, config, host="127.0.0.1")
            )
            port = listeners[0].transport_listener.socket.getsockname()[1]
            stream = await open_secure_tcp_stream(
                "127.0.0.1", port, client_config, server_hostname="localhost"
            )
            await stream.do_handshake()
            received = b""
            while piece := await stream.receive_some():
                received += piece
            assert received == data
            if half == "before our end":
                await stream.wait_peer_gone()
            await stream.send_eof()
            await stream.wait_peer_gone()
            assert await stream.receive_some() == b""
            await stream.aclose()
            nursery.cancel_scope.cancel()
