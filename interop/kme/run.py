"""Runs two sites under faults and writes the history of their SAEs' calls."""

import hashlib
import random
import re
import tempfile
import time
from collections import Counter, deque
from collections.abc import Awaitable, Sequence
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Final

import trio

from hybridkex.errors import KeySourceError, KeyUnauthorized, KeyUnknown
from hybridkex.qkd.etsi014.client import KmeClient
from hybridkex.qkd.etsi014.models import KeyContainer, KeyRequest
from interop.immutable import can_be_immutable
from interop.kme.faults import OF_PROCESSES, OF_SITES, Fault
from interop.kme.history import Call, Verdict, check
from interop.kme.process import Manner
from interop.kme.sites import KMES, Site, Sites
from interop.postgres import own_databases

__all__ = ["NotRecovered", "Outcome", "Plan", "run"]

BATCH: Final = 5
REMEMBERED: Final = 30
"""Collections that a slave asks for again, and draws that wait to be collected, at most."""
PAUSE: Final = 0.02
"""Seconds after an answer without keys."""
LAZY: Final = {"wal_writer_delay": "10s", "wal_writer_flush_after": "1GB", "wal_buffers": "32MB"}
"""A commit that need not be durable is lost with the server for as long as possible."""
RECOVERY_SECONDS: Final = 60.0
"""For a pair of SAEs to get keys again, once nothing is wrong any more."""


class NotRecovered(Exception):
    """The KMEs did not serve again by themselves."""


# -- SAEs


class Recorder:
    """Writes calls to the history as they end."""

    def __init__(self, path: Path | None) -> None:
        self.calls: list[Call] = []
        self._file = path.open("w") if path is not None else None

    async def draw(self, client: KmeClient, sae: str, slave: str) -> list[str]:
        """Returns the key IDs; none if the answer has no keys."""
        request = client.enc_keys(slave, KeyRequest(number=BATCH))
        return list((await self._note("draw", sae, slave, request)).keys)

    async def collect(self, client: KmeClient, sae: str, master: str, ids: list[str]) -> str:
        """Returns the outcome."""
        call = await self._note("collect", sae, master, client.dec_keys(master, ids), ids)
        return call.outcome

    async def _note(
        self,
        kind: str,
        sae: str,
        other: str,
        request: Awaitable[KeyContainer],
        ids: Sequence[str] = (),
    ) -> Call:
        began, keys = time.monotonic(), {}
        try:
            container = await request
        except (KeyUnknown, KeyUnauthorized):
            outcome = "refused"
        except KeySourceError as error:
            outcome = "unsent" if re.search("cannot be (reached|used)", str(error)) else "unknown"
        else:
            outcome = "keys"
            keys = {
                one.key_id: hashlib.sha256(one.key.reveal()).hexdigest() for one in container.keys
            }
        call = Call(
            kind=kind, sae=sae, other=other, began=began, ended=time.monotonic(), outcome=outcome,
            ids=tuple(ids), keys=keys,
        )  # fmt: skip
        self.calls.append(call)
        if self._file is not None:
            self._file.write(call.to_json() + "\n")
        return call

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


class Pair:
    """A master and its slave; and another SAE of the slave's site, which asks for the same keys.

    The slave also asks again for keys that it has had for some time, and collects some late.
    """

    def __init__(self, sites: Sites, master: tuple[str, str], slave: tuple[str, str], foreign: str):
        self._sites = sites
        self.master, self.slave, self.foreign = master, slave, foreign
        self.rounds = 0
        self._had = deque[list[str]](maxlen=REMEMBERED)
        self._kept = deque[list[str]]()

    async def run(self, recorder: Recorder, choice: random.Random, ends: trio.Event) -> None:
        (master, home), (slave, away) = self.master, self.slave
        async with (
            KmeClient(self._sites.access(master, home)) as draws,
            KmeClient(self._sites.access(slave, away)) as collects,
            KmeClient(self._sites.access(self.foreign, away)) as other,
        ):
            while not ends.is_set():
                ids = await recorder.draw(draws, master, slave)
                if ids:
                    if choice.random() < 0.1:
                        await recorder.collect(other, self.foreign, master, ids)
                    self._kept.append(ids)
                    self.rounds += 1
                else:
                    await trio.sleep(PAUSE)
                while self._kept and (len(self._kept) > REMEMBERED or choice.random() < 0.7):
                    # Mostly the newest, sometimes one that has waited.
                    place = -1 if choice.random() < 0.8 else 0
                    kept = self._kept[place]
                    if not await self._collect(recorder, collects, kept):
                        await trio.sleep(PAUSE)
                        break
                    del self._kept[place]
                if self._had and choice.random() < 0.3:
                    await recorder.collect(collects, slave, master, choice.choice(self._had))
            while self._kept:
                if await self._collect(recorder, collects, self._kept[0]):
                    self._kept.popleft()

    async def _collect(self, recorder: Recorder, client: KmeClient, ids: list[str]) -> bool:
        """Whether the answer is definite."""
        outcome = await recorder.collect(client, self.slave[0], self.master[0], ids)
        if outcome == "keys":
            self._had.append(ids)
        return outcome in ("keys", "refused")


# -- a run


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is injected into the sites.

    Args:
        store: ``postgresql`` or ``sqlite`` (which has one process).
        seed: chooses the faults' times, places and kinds.
        seconds: how long faults are injected.
        each: instead, how many of each kind are injected into each site.
        at_once: faults in force at one time, on average; those of different kinds overlap.
        processes: of each site.
        pairs: of SAEs in each direction.
        lasts: the longest time of a fault.
        kinds: names of faults; all if there are none.
        manner: of the processes.
    """

    store: str = "postgresql"
    seed: int = 1
    seconds: float = 60.0
    each: int | None = None
    at_once: float = 1.0
    processes: int = 2
    pairs: int = 3
    lasts: float = 5.0
    kinds: tuple[str, ...] = ()
    manner: Manner = field(default_factory=Manner)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run did and what came of it."""

    verdict: Verdict
    faults: Counter[str]
    """How many of each kind."""
    left: int
    """Keys that left the stock of a site, which a master got or nobody."""


async def _inject(
    plan: Plan, site: Site, fault: Fault, index: int, done: Counter[str], number: int | None
) -> None:
    """One kind of fault, in one place, again and again."""
    choice = random.Random(f"{plan.seed} {fault.__name__} {site.folder.name} {index}")
    rest = plan.lasts * (_streams(plan) / plan.at_once - 1)
    ends = trio.current_time() + plan.seconds
    for _ in count() if number is None else range(number):
        await trio.sleep(choice.uniform(0, rest))
        if number is None and trio.current_time() > ends:
            break
        await fault(site, index, choice, choice.uniform(0.1, 1) * plan.lasts)
        done[fault.__name__] += 1


def _faults(plan: Plan) -> list[tuple[Fault, int]]:
    """The faults of a site, each with the number of processes that it may hit."""
    found = [*((one, plan.processes) for one in OF_PROCESSES)]
    found += [(one, 1) for one in OF_SITES[plan.store]]
    return [(one, n) for one, n in found if not plan.kinds or one.__name__ in plan.kinds]


def _streams(plan: Plan) -> int:
    return len(KMES) * sum(places for _, places in _faults(plan))


async def _run(plan: Plan, sites: Sites, pairs: list[Pair], recorder: Recorder) -> Counter[str]:
    ends, done = trio.Event(), Counter[str]()
    async with trio.open_nursery() as nursery, AsyncExitStack() as stack:
        stack.callback(nursery.cancel_scope.cancel)
        for site in sites.sites.values():
            nursery.start_soon(site.cable.run)
            for index in range(plan.processes):
                nursery.start_soon(site.keep_alive, index)
        async with trio.open_nursery() as callers:
            for index, pair in enumerate(pairs):
                callers.start_soon(pair.run, recorder, random.Random(f"{plan.seed} {index}"), ends)
            await _all_serve(pairs, "after the start")
            async with trio.open_nursery() as injected:
                for site in sites.sites.values():
                    for fault, places in _faults(plan):
                        for index in range(places):
                            number = None if plan.each is None else -(-plan.each // places)
                            injected.start_soon(_inject, plan, site, fault, index, done, number)
            await _all_serve(pairs, "after the last fault")
            ends.set()
    return done


async def _all_serve(pairs: list[Pair], when: str) -> None:
    before = {pair: pair.rounds for pair in pairs}
    with trio.move_on_after(RECOVERY_SECONDS):
        while any(pair.rounds == rounds for pair, rounds in before.items()):  # noqa: ASYNC110
            await trio.sleep(0.05)
        return
    silent = [pair.master[0] for pair, rounds in before.items() if pair.rounds == rounds]
    raise NotRecovered(f"{', '.join(silent)} got no keys within {RECOVERY_SECONDS:g} s {when}")


def run(plan: Plan, history: Path | None = None, keep: Path | None = None) -> Outcome:
    """Run two sites under faults, and check what their SAEs saw.

    Args:
        plan: what is injected.
        history: a file for the calls.
        keep: a new folder for the files of the sites, which stay there.

    Raises:
        NotRecovered: a pair of SAEs got no more keys.
        NoPostgres: it is needed and not installed.
    """
    pairs = plan.pairs
    saes = {kme: [f"{kme}-sae-{number}" for number in range(pairs * 2)] for kme in KMES}
    with ExitStack() as stack:
        folder = keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hybridkex-")))
        folder.mkdir(exist_ok=True)
        databases = None
        if plan.store == "postgresql":
            databases = own_databases(folder, stack, **LAZY)
        elif not can_be_immutable(folder):
            kinds = [fault.__name__ for fault, _ in _faults(plan)]
            plan = replace(plan, kinds=tuple(one for one in kinds if one != "read_only"))
        recorder = Recorder(history)
        stack.callback(recorder.close)
        plan = replace(plan, processes=plan.processes if databases else 1)
        sites = Sites(folder, saes, plan.processes, databases, manner=plan.manner)
        stack.callback(sites.close)
        sites.start()
        all_pairs = [
            Pair(
                sites,
                (saes[home][number], home),
                (saes[away][pairs + number], away),
                saes[away][pairs + (number + 1) % pairs],
            )
            for home, away in (KMES, KMES[::-1])
            for number in range(pairs)
        ]
        done = trio.run(_run, plan, sites, all_pairs, recorder)
        sites.close()
        left = len(set[str]().union(*(site.spent() for site in sites.sites.values())))
    return Outcome(verdict=check(recorder.calls), faults=done, left=left)
