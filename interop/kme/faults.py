"""The faults that a run injects, each of them into one site or one process of it."""

import random
import signal
from collections.abc import Awaitable, Callable
from typing import Final

import trio

from interop.kme.sites import Site

__all__ = ["OF_PROCESSES", "OF_SITES", "Fault"]

Fault = Callable[[Site, int, random.Random, float], Awaitable[None]]
"""A fault of so many seconds; the number is that of a process."""


async def kill(site: Site, index: int, choice: random.Random, seconds: float) -> None:
    """kill -9 of a process, which is started again."""
    async with site.turns[index]:
        await site.kill_soon(index)
        await trio.sleep(choice.uniform(0, seconds / 2))
        site.start(index)


async def stop(site: Site, index: int, choice: random.Random, seconds: float) -> None:
    """A process hangs (SIGSTOP), for longer than all time limits where these are short."""
    async with site.turns[index]:
        site.signal(index, signal.SIGSTOP)
        try:
            await trio.sleep(max(seconds, 1.1) if site.manner.quick else seconds)
        finally:
            site.signal(index, signal.SIGCONT)


async def cut(site: Site, _: int, choice: random.Random, seconds: float) -> None:
    """The network towards the site is cut."""
    with site.cable.cut():
        await trio.sleep(seconds)


async def clock(site: Site, _: int, choice: random.Random, seconds: float) -> None:
    """The clock of a site jumps by a day, and back."""
    site.set_clock(choice.choice([-86_400.0, 86_400.0]))
    await trio.sleep(seconds)
    site.set_clock(0)


async def full_disk(site: Site, _: int, choice: random.Random, seconds: float) -> None:
    """The files of a site's processes cannot grow."""
    with site.full_disk():
        await trio.sleep(seconds)


async def read_only(site: Site, _: int, choice: random.Random, seconds: float) -> None:
    """The files of the store can be read and not written."""
    with site.read_only():
        await trio.sleep(seconds)


async def kill_database(site: Site, _: int, choice: random.Random, seconds: float) -> None:
    """kill -9 of PostgreSQL with all its processes; it comes back."""
    async with site.database_turn:
        assert site.database is not None
        await trio.to_thread.run_sync(site.database.kill)
        await trio.sleep(choice.uniform(0, seconds))
        await trio.to_thread.run_sync(site.database.start)


async def stop_database(site: Site, _: int, choice: random.Random, seconds: float) -> None:
    """PostgreSQL neither answers nor fails (SIGSTOP)."""
    async with site.database_turn:
        assert site.database is not None
        site.database.signal_all(signal.SIGSTOP)
        await trio.sleep(max(seconds, 1.1) if site.manner.quick else seconds)
        site.database.signal_all(signal.SIGCONT)


async def full_database(site: Site, _: int, choice: random.Random, seconds: float) -> None:
    """The disk of PostgreSQL is full, which may end it; it is started again when there is room."""
    async with site.database_turn:
        assert site.database is not None
        with site.database.full_disk():
            await trio.sleep(seconds)
        if not await trio.to_thread.run_sync(site.database.is_alive):
            await trio.to_thread.run_sync(site.database.start)


OF_PROCESSES: Final[tuple[Fault, ...]] = (kill, stop)
OF_SITES: Final[dict[str, tuple[Fault, ...]]] = {
    "sqlite": (cut, clock, full_disk, read_only),
    "postgresql": (cut, clock, kill_database, stop_database, full_database),
}
"""By the kind of store."""
