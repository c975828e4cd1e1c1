"""The loads; each returns its measurements and the expected values."""

import contextlib
import json
import resource
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import trio

from hybridkex import (
    ClientConfig,
    ClientConnection,
    SecureStream,
    TrustStore,
    open_secure_tcp_stream,
)

AT_ONCE = 16
"""Handshakes in progress at the same time."""


@dataclass
class Server:
    """The process under load."""

    process: "subprocess.Popen[str]"
    port: int
    config: ClientConfig

    async def usage(self) -> dict[str, int]:
        """Its resources in use; see :mod:`interop.soak.server`."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("?\n")
        self.process.stdin.flush()
        line = await trio.to_thread.run_sync(self.process.stdout.readline)
        found: dict[str, int] = json.loads(line)
        return found

    async def settled(self, connections: int) -> dict[str, int]:
        """Its usage once it has this number of connections; waits ten seconds at most."""
        for _ in range(100):
            found = await self.usage()
            if found["connections"] == connections:
                break
            await trio.sleep(0.1)
        return found

    async def connect(self) -> SecureStream[trio.SocketStream]:
        """Connect, complete the handshake, and exchange one message."""
        stream = await open_secure_tcp_stream(
            "127.0.0.1",
            self.port,
            self.config,
            server_hostname="localhost",
            handshake_timeout=120,
        )
        await stream.send_all(b"hello")
        if await stream.receive_some() != b"hello":
            raise RuntimeError("the echo is wrong")
        return stream


@asynccontextmanager
async def server(deadline: float = 10.0) -> AsyncIterator[Server]:
    """Start the server's process; it is ended with the block."""
    process = subprocess.Popen(  # noqa: ASYNC220  # over in a moment
        [sys.executable, "-m", "interop.soak.server", str(deadline)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        first = json.loads(await trio.to_thread.run_sync(process.stdout.readline))
        trust = TrustStore.from_pem(first["ca"].encode())
        yield Server(process, first["port"], ClientConfig(verifier=trust))
    finally:
        process.kill()
        process.communicate()


async def idle(connections: int) -> dict[str, Any]:
    """Open many idle connections and measure the resources of each."""
    async with server(deadline=120) as target:
        streams: list[SecureStream[trio.SocketStream]] = []
        slots = trio.Semaphore(AT_ONCE)

        async def one() -> None:
            async with slots:
                streams.append(await target.connect())

        await (await target.connect()).aclose()  # what is made once is made before we count
        before = await target.settled(0)
        began = time.monotonic()
        async with trio.open_nursery() as nursery:
            for _ in range(connections):
                nursery.start_soon(one)
        seconds = time.monotonic() - began
        full = await target.settled(connections)
        alive = sum([await _echoes(stream) for stream in streams[:: max(1, connections // 50)]])
        for stream in streams:
            await trio.aclose_forcefully(stream)
        after = await target.settled(0)
    return {
        "connections": full["connections"],
        "kilobytes per connection": round(
            (full["resident"] - before["resident"]) / connections / 1000, 1
        ),
        "handshakes per second": round(connections / seconds),
        "sampled and alive": alive,
        "connections afterwards": after["connections"],
        "files afterwards, more than before": after["files"] - before["files"],
    }


async def _echoes(stream: SecureStream[trio.SocketStream]) -> bool:
    await stream.send_all(b"still there?")
    return await stream.receive_some() == b"still there?"


async def storm(seconds: float, size: int = 200_000) -> dict[str, Any]:
    """Connect, transfer, close, without end; the server must not grow."""
    async with server() as target:
        count = 0
        payload = bytes(size)

        async def client(until: float) -> None:
            nonlocal count
            while time.monotonic() < until:
                stream = await target.connect()
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(stream.send_all, payload)
                    left = size
                    while left:
                        left -= len(await stream.receive_some())
                if count % 3:
                    await stream.aclose()
                else:
                    await trio.aclose_forcefully(stream)  # without close_notify
                count += 1

        samples = []
        began = time.monotonic()
        steps = 6
        for step in range(1, steps + 1):
            async with trio.open_nursery() as nursery:
                for _ in range(4):
                    nursery.start_soon(client, began + seconds * step / steps)
            samples.append(await target.settled(0))
    # The first sixth warms up: allocator, caches, code.
    first, last = samples[1], samples[-1]
    return {
        "connections": count,
        "seconds": round(time.monotonic() - began, 1),
        "megabytes": [round(sample["resident"] / 1e6, 1) for sample in samples],
        "growth in megabytes": round((last["resident"] - first["resident"]) / 1e6, 2),
        "files more": last["files"] - first["files"],
        "tasks more": last["tasks"] - first["tasks"],
    }


async def slowloris(connections: int, deadline: float) -> dict[str, Any]:
    """Peers that send a byte now and then; others must be served, and the slow ones must go."""
    async with server(deadline) as target:
        hello = _client_hello(target.config)
        waits: list[float] = []
        ended = 0

        async def slow() -> None:
            nonlocal ended
            stream = await trio.open_tcp_stream("127.0.0.1", target.port)
            with contextlib.suppress(trio.BrokenResourceError):
                for byte in hello:
                    await stream.send_all(bytes((byte,)))
                    with trio.move_on_after(deadline / 20):
                        await stream.receive_some()
                        break
            ended += 1
            await stream.aclose()

        async with trio.open_nursery() as nursery:
            for _ in range(connections):
                nursery.start_soon(slow)
            for _ in range(10):
                began = time.monotonic()
                await (await target.connect()).aclose()
                waits.append(time.monotonic() - began)
                await trio.sleep(deadline / 20)
        after = await target.settled(0)
    return {
        "slow connections": connections,
        "ended by the server": ended,
        "left": after["connections"],
        "milliseconds that others waited, at most": round(max(waits) * 1000),
    }


def _client_hello(config: ClientConfig) -> bytes:
    connection = ClientConnection(config, "localhost")
    connection.start()
    return bytes(connection.data_to_send())


async def updates(count: int) -> dict[str, Any]:
    """A peer that asks for new keys again and again, without data between."""
    async with server() as target:
        await (await target.connect()).aclose()
        stream = await target.connect()
        sent = 0
        try:
            for _ in range(count):
                await stream.update_keys(request_peer=True)
                sent += 1
            await stream.receive_some()
        except trio.BrokenResourceError as error:
            reason = str(error)
        else:
            reason = "nothing"
        await trio.aclose_forcefully(stream)
        polite = await target.connect()
        for _ in range(count):
            await polite.update_keys(request_peer=True)
            await _echoes(polite)
        await polite.aclose()
        after = await target.settled(0)
    return {
        "updates in a row": sent,
        "what the peer heard": reason,
        "updates with data between": count,
        "left": after["connections"],
    }


def raise_file_limit() -> int:
    """As many files as this user may have; returns how many that is."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard
