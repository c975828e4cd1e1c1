"""``connect``: input that was not sent is a failure, and a failure is never a clean end."""

import os
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from forked import Forkserver

from hybridkex import Identity, SecureStream, ServerConfig
from hybridkex.errors import AlertReceived, TruncationError

Handler = Callable[[SecureStream[trio.SocketStream]], Awaitable[object]]


@pytest.fixture
def config(keys: Path) -> ServerConfig:
    return ServerConfig(identities=(Identity.from_files(keys / "cert.pem", keys / "key.pem"),))


@asynccontextmanager
async def serving(config: ServerConfig, handler: Handler) -> AsyncIterator[int]:
    """Runs the handler for one connection."""
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with trio.open_nursery() as nursery:

        async def serve() -> None:
            stream = SecureStream(await listener.accept(), config)
            await stream.do_handshake()
            await handler(stream)
            await trio.aclose_forcefully(stream)

        nursery.start_soon(serve)
        yield listener.socket.getsockname()[1]
    await listener.aclose()


async def connected(
    hybridkex: Forkserver, port: int, keys: Path, **options: Any
) -> "subprocess.CompletedProcess[bytes]":
    words = ("connect", "localhost", port, "--ca", keys / "ca.pem", "--json")
    return await trio.to_thread.run_sync(lambda: hybridkex.run(*words, **options))


async def leave(stream: SecureStream[trio.SocketStream]) -> None:
    """A clean end, and nothing was read."""
    await stream.send_eof()


async def read_a_little_and_leave(stream: SecureStream[trio.SocketStream]) -> None:
    await stream.receive_some()
    await stream.send_eof()


@pytest.mark.parametrize("handler", [leave, read_a_little_and_leave])
async def test_input_that_was_not_sent(
    hybridkex: Forkserver, keys: Path, tmp_path: Path, config: ServerConfig, handler: Handler
) -> None:
    (tmp_path / "large").write_bytes(bytes(31 << 20))
    with (tmp_path / "large").open("rb") as file:
        async with serving(config, handler) as port:
            done = await connected(hybridkex, port, keys, stdin=file)
    assert done.returncode == 1
    lines = done.stderr.decode().splitlines()
    assert len(lines) == 2  # the session, and why
    assert lines[1].startswith("hybridkex: ")


async def test_a_peer_may_end_before_silent_input(
    hybridkex: Forkserver, keys: Path, config: ServerConfig
) -> None:
    """Nothing was typed: nothing is lost."""
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as silent:
        async with serving(config, leave) as port:
            done = await connected(hybridkex, port, keys, stdin=silent)
    os.close(writing)
    assert (done.returncode, done.stderr.count(b"\n")) == (0, 1)


async def test_input_that_cannot_be_read(
    hybridkex: Forkserver, keys: Path, tmp_path: Path, config: ServerConfig
) -> None:
    """The server sees that it did not get all."""
    seen: list[BaseException | None] = []

    async def read(stream: SecureStream[trio.SocketStream]) -> None:
        try:
            while await stream.receive_some():
                pass
        except trio.BrokenResourceError as error:
            seen.append(error.__cause__)

    memory = os.open("/proc/self/mem", os.O_RDONLY)  # whose first byte cannot be read
    with os.fdopen(memory, "rb", buffering=0) as file:
        async with serving(config, read) as port:
            done = await connected(hybridkex, port, keys, stdin=file)
    assert done.returncode == 1
    assert b"cannot read standard input" in done.stderr
    assert isinstance(seen[0], AlertReceived | TruncationError)


async def test_output_that_cannot_be_written(
    hybridkex: Forkserver, keys: Path, config: ServerConfig
) -> None:
    seen: list[BaseException | None] = []

    async def talk(stream: SecureStream[trio.SocketStream]) -> None:
        await stream.send_all(bytes(100_000))
        try:
            while await stream.receive_some():
                pass
        except trio.BrokenResourceError as error:
            seen.append(error.__cause__)

    reading, writing = os.pipe()
    with Path("/dev/full").open("wb") as full, os.fdopen(reading, "rb") as silent:  # noqa: ASYNC230
        async with serving(config, talk) as port:
            done = await connected(hybridkex, port, keys, stdin=silent, stdout=full)
    os.close(writing)
    assert done.returncode == 1
    assert isinstance(seen[0], AlertReceived | TruncationError)
