"""A crowd at a server of asyncio's: its handshakes take turns with those of other addresses."""

import asyncio
import gc
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from aio_glue import Crowd, Run, closed, connect, hello_of, serving
from waiting import asyncio_until

from hybridkex import ClientConfig, ServerConfig
from hybridkex.aio import places


@pytest.fixture
def few_places(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight, that none has to leave: these tests also run on a machine that is busy with others."""
    monkeypatch.setattr(places, "HANDSHAKES", 8)
    monkeypatch.setattr(places, "PATIENCE", 60.0)


@asynccontextmanager
async def crowd_at(port: int) -> AsyncIterator[Crowd]:
    before = len(os.listdir("/proc/self/fd"))
    crowd = Crowd(port)
    try:
        yield crowd
    finally:
        crowd.leave()
        await asyncio_until(lambda: len(os.listdir("/proc/self/fd")) <= before)


async def ask(port: int, config: ClientConfig) -> None:
    reader, writer = await connect(port, config)
    writer.write(b"hello")
    assert await reader.readexactly(5) == b"hello"
    await closed(writer)


@pytest.mark.parametrize("says", ["nothing", "a byte", "a ClientHello"])
def test_a_crowd_of_one_address_has_half_of_the_places(
    run: Run, client_config: ClientConfig, server_config: ServerConfig, few_places: None, says: str
) -> None:
    hello = hello_of(client_config)
    said = {"nothing": b"", "a byte": hello[:1], "a ClientHello": hello}[says]

    async def main() -> None:
        async with serving(server_config) as port, crowd_at(port) as crowd:
            crowd.grow(60, said)
            await ask(port, client_config)
            assert crowd.answered() == (4 if says == "a ClientHello" else 0)
            assert crowd.dismissed() == 0

    run(main())


def test_connections_that_keep_us_waiting_make_room(
    run: Run,
    client_config: ClientConfig,
    server_config: ServerConfig,
    few_places: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A crowd of eight addresses has all places; two of them, of one address, make room."""
    monkeypatch.setattr(places, "PATIENCE", 0.3)

    async def main() -> None:
        async with serving(server_config) as port, crowd_at(port) as crowd:
            crowd.grow(16, hello_of(client_config), addresses=8)
            await asyncio_until(lambda: crowd.answered() == 8)
            await ask(port, client_config)
            assert crowd.dismissed() >= 1

    run(main())


def test_those_who_wait_are_served_when_places_are_free(
    run: Run, client_config: ClientConfig, server_config: ServerConfig, few_places: None
) -> None:
    """A burst of good clients of one address loses nobody."""

    async def main() -> None:
        async with serving(server_config) as port, asyncio.TaskGroup() as group:
            for _ in range(40):
                group.create_task(ask(port, client_config))

    run(main())


def test_a_full_room_loses_the_oldest_of_the_largest_crowd(
    run: Run,
    client_config: ClientConfig,
    server_config: ServerConfig,
    few_places: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(places, "_space", lambda: 10)

    async def main() -> None:
        async with serving(server_config) as port, crowd_at(port) as crowd:
            crowd.grow(30, hello_of(client_config))
            await asyncio_until(lambda: crowd.dismissed() >= 16)
            await ask(port, client_config)
            assert crowd.dismissed() <= 20  # ten wait
            assert crowd.answered() <= 4

    run(main())


@pytest.mark.parametrize("reset", [False, True], ids=["close", "reset"])
@pytest.mark.parametrize("says", [0, 1, 5000])
def test_a_crowd_that_leaves_leaves_nothing_behind(
    run: Run,
    client_config: ClientConfig,
    server_config: ServerConfig,
    few_places: None,
    no_log: None,
    says: int,
    reset: bool,
) -> None:
    def pending() -> list[places.PendingConnections]:
        return [one for one in gc.get_objects() if isinstance(one, places.PendingConnections)]

    async def main() -> None:
        gc.collect()
        there = pending()  # of other tests
        async with serving(server_config) as port:
            await ask(port, client_config)
            before = len(os.listdir("/proc/self/fd"))
            crowd = Crowd(port)
            crowd.grow(40, hello_of(client_config)[:says])
            await asyncio.sleep(0.1)
            crowd.leave(reset=reset)
            await asyncio_until(lambda: len(os.listdir("/proc/self/fd")) == before)
            await ask(port, client_config)
            assert [one for one in pending() if not any(one is other for other in there)] == []

    run(main())
