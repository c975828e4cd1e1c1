"""Runs two sites under faults and writes the history of their SAEs' calls."""

import hashlib
import random
import signal
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path
from typing import Final

import trio

from hybridkex.errors import KeySourceError, KeyUnauthorized, KeyUnknown
from hybridkex.qkd.etsi014.client import KmeClient
from hybridkex.qkd.etsi014.models import KeyContainer, KeyRequest
from interop.kme.history import Call, Verdict, check
from interop.kme.sites import KMES, Sites
from interop.postgres import own_databases

__all__ = ["FAULTS", "NotRecovered", "run"]

BATCH: Final = 5
RECOVERY_SECONDS: Final = 60.0
"""For a pair of SAEs to get keys again, once nothing is wrong any more."""

Fault = Callable[[Sites, random.Random, float], Awaitable[None]]


class NotRecovered(Exception):
    """The KMEs did not serve again by themselves."""


# -- faults


async def kill(sites: Sites, choice: random.Random, seconds: float) -> None:
    """kill -9 of a process, which is started again."""
    site = sites.sites[choice.choice(KMES)]
    site.kill(choice.choice(site.processes))
    await trio.sleep(choice.uniform(0, seconds / 2))
    site.start()


async def stop(sites: Sites, choice: random.Random, seconds: float) -> None:
    """A process hangs (SIGSTOP) for some time."""
    process = choice.choice(sites.sites[choice.choice(KMES)].processes)
    process.send_signal(signal.SIGSTOP)
    await trio.sleep(seconds)
    process.send_signal(signal.SIGCONT)


async def cut(sites: Sites, choice: random.Random, seconds: float) -> None:
    """The network between the sites is cut, in one direction or in both."""
    cables = choice.choice([[kme] for kme in KMES] + [list(KMES)])
    for kme in cables:
        sites.cables[kme].set_cut(True)
    await trio.sleep(seconds)
    for kme in cables:
        sites.cables[kme].set_cut(False)


async def clock(sites: Sites, choice: random.Random, seconds: float) -> None:
    """The clock of a site jumps by a day, and back."""
    site = sites.sites[choice.choice(KMES)]
    site.set_clock(choice.choice([-86_400.0, 86_400.0]))
    await trio.sleep(seconds)
    site.set_clock(0)


async def full_disk(sites: Sites, choice: random.Random, seconds: float) -> None:
    """The files of a site cannot grow."""
    with sites.sites[choice.choice(KMES)].full_disk():
        await trio.sleep(seconds)


async def kill_database(sites: Sites, choice: random.Random, seconds: float) -> None:
    """The PostgreSQL of a site dies and comes back."""
    database = sites.sites[choice.choice(KMES)].database
    assert database is not None
    await trio.to_thread.run_sync(database.stop)
    await trio.sleep(choice.uniform(0, seconds))
    await trio.to_thread.run_sync(database.start)


async def stop_database(sites: Sites, choice: random.Random, seconds: float) -> None:
    """The PostgreSQL of a site neither answers nor fails (SIGSTOP)."""
    database = sites.sites[choice.choice(KMES)].database
    assert database is not None
    database.signal_all(signal.SIGSTOP)
    await trio.sleep(seconds)
    database.signal_all(signal.SIGCONT)


FAULTS: Final[dict[str, tuple[Fault, ...]]] = {
    "sqlite": (kill, stop, cut, clock, full_disk),
    "postgresql": (kill, stop, cut, clock, kill_database, stop_database),
}
"""By the kind of store."""


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
            outcome = "unsent" if "cannot be reached" in str(error) else "unknown"
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
    """A master and its slave; and another SAE of the slave's site, which asks for the same keys."""

    def __init__(self, sites: Sites, master: tuple[str, str], slave: tuple[str, str], foreign: str):
        self._sites = sites
        self.master, self.slave, self.foreign = master, slave, foreign
        self.rounds = 0

    async def run(self, recorder: Recorder, choice: random.Random, ends: trio.Event) -> None:
        (master, home), (slave, away) = self.master, self.slave
        async with (
            KmeClient(self._sites.access(master, home)) as draws,
            KmeClient(self._sites.access(slave, away)) as collects,
            KmeClient(self._sites.access(self.foreign, away)) as other,
        ):
            while not ends.is_set():
                ids = await recorder.draw(draws, master, slave)
                if not ids:
                    await trio.sleep(0.05)
                    continue
                if choice.random() < 0.1:
                    await recorder.collect(other, self.foreign, master, ids)
                await self._collect_until_answered(recorder, collects, ids)
                if choice.random() < 0.1:
                    await recorder.collect(collects, slave, master, ids)
                self.rounds += 1

    async def _collect_until_answered(
        self, recorder: Recorder, client: KmeClient, ids: list[str]
    ) -> None:
        while True:
            outcome = await recorder.collect(client, self.slave[0], self.master[0], ids)
            if outcome in ("keys", "refused"):
                return
            await trio.sleep(0.05)


# -- a run


async def _run(
    sites: Sites,
    pairs: list[Pair],
    faults: tuple[Fault, ...],
    recorder: Recorder,
    *,
    seed: int,
    seconds: float,
    lasts: float,
    tell: Callable[[str], object],
) -> None:
    choice = random.Random(seed)
    ends = trio.Event()
    async with trio.open_nursery() as network, AsyncExitStack() as stack:
        stack.callback(network.cancel_scope.cancel)
        for cable in sites.cables.values():
            network.start_soon(cable.run)
        async with trio.open_nursery() as nursery:
            for index, pair in enumerate(pairs):
                nursery.start_soon(pair.run, recorder, random.Random(f"{seed} {index}"), ends)
            await _all_serve(pairs, "after the start")
            deadline = trio.current_time() + seconds
            while trio.current_time() < deadline:
                fault = choice.choice(faults)
                tell(fault.__name__)
                await fault(sites, choice, choice.uniform(0.2, lasts))
                await trio.sleep(choice.uniform(0, 1))
            await _all_serve(pairs, "after the last fault")
            ends.set()


async def _all_serve(pairs: list[Pair], when: str) -> None:
    before = {pair: pair.rounds for pair in pairs}
    with trio.move_on_after(RECOVERY_SECONDS):
        while any(pair.rounds == rounds for pair, rounds in before.items()):  # noqa: ASYNC110
            await trio.sleep(0.05)
        return
    silent = [pair.master[0] for pair, rounds in before.items() if pair.rounds == rounds]
    raise NotRecovered(f"{', '.join(silent)} got no keys within {RECOVERY_SECONDS:g} s {when}")


def run(
    store: str,
    *,
    seed: int,
    seconds: float,
    processes: int = 2,
    pairs: int = 3,
    lasts: float = 5.0,
    history: Path | None = None,
    tell: Callable[[str], object] = print,
) -> Verdict:
    """Run two sites under faults, and check what their SAEs saw.

    Args:
        store: ``postgresql`` or ``sqlite`` (which has one process).
        seed: chooses the faults and their times.
        seconds: how long faults are injected.
        processes: of each site.
        pairs: of SAEs in each direction.
        lasts: the longest time of a fault.
        history: a file for the calls.
        tell: is told each fault.

    Raises:
        NotRecovered: a pair of SAEs got no more keys.
        NoPostgres: it is needed and not installed.
    """
    saes = {kme: [f"{kme}-sae-{number}" for number in range(pairs * 2)] for kme in KMES}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hybridkex-")))
        databases = own_databases(folder, stack) if store == "postgresql" else None
        recorder = Recorder(history)
        stack.callback(recorder.close)
        sites = Sites(folder, saes, processes if databases else 1, databases)
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
        trio.run(
            lambda: _run(
                sites, all_pairs, FAULTS[store], recorder,
                seed=seed, seconds=seconds, lasts=lasts, tell=tell,
            )
        )  # fmt: skip
    return check(recorder.calls)
