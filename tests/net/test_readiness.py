"""Who is served when, among sockets that are ready at the same time."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from socket import socketpair

import pytest
import trio
import trio.testing
from waiting import trio_until

from hybridkex.net import readiness
from hybridkex.net.readiness import BULK, READ, WRITE, Readiness, Watched


class Reader(Watched):
    """Reads, and notes that it did."""

    def __init__(self, name: str, there: Readiness, served: list[str], descriptor: int) -> None:
        super().__init__(descriptor)
        self._name, self._there, self._served = name, there, served
        self.then: Callable[[], object] = lambda: None

    def ready(self, events: int) -> None:
        assert events == READ
        size = os.readv(self.descriptor, (self._there.buffer[:BULK],))
        self.bulk = size >= BULK
        self._served.append(self._name)
        self.then()


class World:
    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self.there = Readiness()
        self.served: list[str] = []
        self.far = {}

    def reader(self, name: str) -> Reader:
        near, self.far[name] = (self._stack.enter_context(one) for one in socketpair())
        self.far[name].setblocking(False)
        found = Reader(name, self.there, self.served, near.fileno())
        self.there.watch(found, READ)
        return found

    def fill(self, name: str) -> None:
        """As many bytes as the socket takes: several reads."""
        with suppress(BlockingIOError):
            while True:
                self.far[name].send(bytes(2 * BULK))


@pytest.fixture
def world() -> Iterator[World]:
    with ExitStack() as stack:
        yield World(stack)


async def test_a_short_message_waits_for_one_read_of_bulk_data(world: World) -> None:
    bulk = world.reader("bulk")
    world.reader("short")
    world.fill("bulk")
    bulk.bulk = True
    reads = 0

    def say() -> None:
        nonlocal reads
        reads += 1
        if reads == 2:
            world.far["short"].send(b"x")

    bulk.then = say
    async with world.there.running():
        await trio_until(lambda: "short" in world.served and world.served.count("bulk") >= 4)
    assert world.served[:4] == ["bulk", "bulk", "short", "bulk"]


async def test_connections_with_bulk_data_take_turns(world: World) -> None:
    for name in "abc":
        world.reader(name).bulk = True
        world.fill(name)
    async with world.there.running():
        await trio_until(lambda: len(world.served) >= 9)
    rounds = [tuple(sorted(world.served[start : start + 3])) for start in (0, 3, 6)]
    assert rounds == [("a", "b", "c")] * 3


async def test_reads_are_short_while_others_wait(world: World) -> None:
    bulk, short = world.reader("bulk"), world.reader("short")
    bulk.bulk = True
    sizes: list[int] = []
    bulk.then = lambda: sizes.append(len(world.there.buffer))
    world.fill("bulk")
    world.there._serve()
    assert set(sizes) == {readiness.BULK_READ}
    sizes.clear()
    bulk.bulk = True
    world.fill("bulk")
    world.far["short"].send(b"x")
    world.there._serve()
    assert set(sizes) == {readiness.SHORT_READ}
    assert not short.bulk


async def test_other_tasks_run_beside_bulk_data(world: World) -> None:
    bulk = world.reader("bulk")
    bulk.bulk = True
    world.far["bulk"].send(bytes(BULK))
    bulk.then = lambda: world.far["bulk"].send(bytes(BULK))  # it never ends
    async with world.there.running():
        with trio.fail_after(5):
            for _ in range(20):
                await trio.lowlevel.checkpoint()
    assert bulk.bulk


async def test_who_is_not_watched_any_more_is_not_called(world: World) -> None:
    """Two are ready, and the first ends the second."""
    one, other = world.reader("one"), world.reader("other")
    one.then = lambda: world.there.watch(other, 0)
    other.then = lambda: world.there.watch(one, 0)
    for name in ("one", "other"):
        world.far[name].send(b"x")
    async with world.there.running():
        await trio.testing.wait_all_tasks_blocked()
    assert len(world.served) == 1


async def test_who_waits_for_nothing_costs_nothing_at_the_end_of_its_peer(world: World) -> None:
    """The kernel reports the end of a connection to whoever is registered, whatever for."""
    one = world.reader("one")
    world.there.watch(one, 0)
    world.far["one"].close()
    async with world.there.running():
        await trio.testing.wait_all_tasks_blocked()
    assert not world.served
    assert one.watched_for == 0
    world.there = Readiness()
    world.there.watch(one, WRITE)
    world.there.watch(one, READ | WRITE)
    world.there.watch(one, 0)
    async with world.there.running():
        await trio.testing.wait_all_tasks_blocked()
