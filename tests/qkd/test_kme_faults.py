"""Two KMEs of one link while everything around them fails, in a simulation with a seed.

Messages between the KMEs are late, are lost on their way there or back, or arrive after the sender
has given up. A KME stops at any instant and starts again with what its disk has. The disk refuses
to write, or reports a commit as failed that did take place. A third KME, with a link of its own,
names the keys of this one. The clock is simulated and worker threads run inline, so that a seed
fixes the run.

The checker sees what SAEs see and nothing else.
"""

import random
import sqlite3
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from hybridkex.errors import KeySourceUnavailable
from hybridkex.kme.entity import KeyManagementEntity
from hybridkex.kme.metrics import KmeMetrics
from hybridkex.kme.peering import ExtKeys
from hybridkex.kme.settings import EntitySettings, KmeLimits
from hybridkex.qkd.etsi014.models import ErrorResponse, KeyContainer, KeyRequest
from hybridkex.qkd.producer import ProducedKey
from hybridkex.qkd.sqlite_store import SqliteKeyStore
from hybridkex.qkd.store import Allotment, BlocksRefused, half_of
from hybridkex.secret import Secret

SAES = {"kme-a": ("alice", "carol"), "kme-b": ("bob", "dave")}
OTHER = {"kme-a": "kme-b", "kme-b": "kme-a"}
HOSTILE = "kme-c"


@dataclass
class Checker:
    """What SAEs were given, and what they may never be given."""

    masters: dict[str, tuple[str, str, tuple[str, ...], Secret]] = field(default_factory=dict)
    """By key ID: KME and SAE of the master, the slaves, the key."""
    slaves: set[tuple[str, str]] = field(default_factory=set)
    uncertain: set[tuple[str, str]] = field(default_factory=set)
    """What a slave asked for and may have lost: the disk said that it failed, and it had not."""

    def drawn(self, kme: str, master: str, slaves: tuple[str, ...], keys: KeyContainer) -> None:
        for item in keys.keys:
            assert item.key_id not in self.masters, f"{item.key_id} was given to two masters"
            self.masters[item.key_id] = kme, master, slaves, item.key

    def collected(self, master: str, slave: str, keys: KeyContainer) -> None:
        for item in keys.keys:
            place = item.key_id, slave
            assert place not in self.slaves, f"{item.key_id} was given to {slave} twice"
            self.slaves.add(place)
            drawn = self.masters.get(item.key_id)
            if drawn is not None:
                assert drawn[1] == master
                assert slave in drawn[2], f"{item.key_id} was given to {slave}, who is no slave"
                assert drawn[3] == item.key, f"the two sides of {item.key_id} differ"


class FailingDisk:
    """A database connection that fails as a full or broken disk makes it fail."""

    def __init__(self, db: sqlite3.Connection, choice: random.Random) -> None:
        self._db = db
        self._choice = choice
        self.broken = False
        self.odds = 0.0
        self.took_place = 0
        """Commits that were reported as failed and did take place."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._db, name)

    def execute(self, statement: str, *arguments: Any) -> Any:
        self._may_fail(statement)
        return self._db.execute(statement, *arguments)

    def executemany(self, statement: str, *arguments: Any) -> Any:
        self._may_fail(statement)
        return self._db.executemany(statement, *arguments)

    def _may_fail(self, statement: str) -> None:
        writes = statement.startswith(("INSERT", "UPDATE", "DELETE", "COMMIT"))
        if writes and (self.broken or self._choice.random() < self.odds):
            if statement == "COMMIT" and self._choice.random() < 0.5:
                self._db.execute(statement)
                self.took_place += 1
            raise sqlite3.OperationalError("database or disk is full")


class Site:
    """A KME that can be stopped at any instant, and started with what is on its disk."""

    def __init__(self, world: "World", kme_id: str) -> None:
        self.id = kme_id
        self.world = world
        self.start()

    def start(self) -> None:
        world = self.world
        self.store = SqliteKeyStore(world.folder / f"{self.id}.db", Secret(bytes(32)))
        self.disk = FailingDisk(self.store._db, world.choice)
        self.store._db = self.disk  # type: ignore[assignment]
        other = OTHER[self.id]
        self.kme = KeyManagementEntity(
            EntitySettings(
                id=self.id,
                saes=frozenset(SAES[self.id]),
                peers={other: frozenset(SAES[other]), HOSTILE: frozenset({"eve"})},
                limits=KmeLimits(rate=1e9, burst=10**9, sync_grace=5.0),
            ),
            store=self.store,
            metrics=KmeMetrics(),
        )
        self.kme.connect(other, Wire(world, self.id, other))
        self.tasks: set[trio.CancelScope] = set()
        self.up = True

    @contextmanager
    def life(self) -> Iterator[None]:
        """What runs in this KME's process ends with it."""
        tasks, scope = self.tasks, trio.CancelScope()
        tasks.add(scope)
        try:
            with scope:
                yield
        finally:
            tasks.remove(scope)

    async def stop(self) -> None:
        self.up = False
        for scope in self.tasks:
            scope.cancel()
        await self.store.aclose()

    async def ask(
        self, call: Callable[[KeyManagementEntity], Awaitable[KeyContainer]]
    ) -> KeyContainer | None:
        """A request by an SAE. ``None``: cut off, or answered with an error."""
        if not self.up:
            return None
        kme = self.kme
        with self.life():
            try:
                with trio.move_on_after(4):
                    return await call(kme)
            except (ErrorResponse, KeySourceUnavailable):
                pass
        return None


@dataclass
class Wire:
    """The road from one KME to the other."""

    world: "World"
    own: str
    other: str

    async def _carry(self, call: Callable[[KeyManagementEntity], Awaitable[Any]]) -> Any:
        """Deliver a message, late or never; its answer, late or never."""
        world, outcome = self.world, list[Any]()
        answered = trio.Event()

        async def arrive() -> None:
            await trio.sleep(world.delay())
            site = world.sites[self.other]
            if not site.up or world.happens(world.loss):
                return
            with site.life():
                try:
                    outcome.append((await call(site.kme), None))
                except (BlocksRefused, ErrorResponse, KeySourceUnavailable) as error:
                    outcome.append((None, error))
            await trio.sleep(world.delay())
            if outcome and not world.happens(world.loss):
                answered.set()

        world.nursery.start_soon(arrive)
        with trio.move_on_after(0.5):
            await answered.wait()
            result, error = outcome[0]
            if isinstance(error, BlocksRefused):
                raise error
            if error is None:
                return result
        raise KeySourceUnavailable("the other KME does not answer")

    async def ext_keys(self, message: ExtKeys) -> None:
        await self._carry(lambda kme: kme.peer_allots(self.own, message))

    async def void(self, key_ids: Sequence[str]) -> None:
        await self._carry(lambda kme: kme.peer_voids(self.own, key_ids))

    async def check(self, key_ids: Sequence[str]) -> list[str]:
        found: list[str] = await self._carry(lambda kme: kme.peer_checks(self.own, key_ids))
        return found


@dataclass
class World:
    """Two sites, the road between them, and what goes wrong."""

    folder: Path
    choice: random.Random
    nursery: trio.Nursery
    latest: float = 0.3
    loss: float = 0.0
    sites: dict[str, Site] = field(default_factory=dict)
    checker: Checker = field(default_factory=Checker)
    ids: list[str] = field(default_factory=list)

    def delay(self) -> float:
        return self.choice.uniform(0, self.latest)

    def happens(self, odds: float) -> bool:
        return self.choice.random() < odds

    async def produce(self, number: int, *, halves: tuple[int, ...] = (0, 1)) -> None:
        """Keys of the link, which come to both KMEs at different times."""
        batch = []
        while len(batch) < number:
            key_id = f"{self.choice.getrandbits(128):032x}"
            key_id = "-".join((key_id[:8], key_id[8:12], key_id[12:16], key_id[16:20], key_id[20:]))
            if half_of(key_id) in halves:
                batch.append(ProducedKey(key_id=key_id, key=Secret(self.choice.randbytes(32))))
        self.ids += [item.key_id for item in batch]
        for kme_id in self.choice.sample(sorted(SAES), 2):
            self.nursery.start_soon(self._bring, kme_id, batch)

    async def _bring(self, kme_id: str, batch: list[ProducedKey]) -> None:
        await trio.sleep(self.delay())
        while True:
            site = self.sites[kme_id]
            if site.up:
                with site.life():
                    link = site.kme._links[OTHER[kme_id]]
                    await site.kme._take_batch_until_stored(link, batch, shared=True)
                    return
            await trio.sleep(0.1)

    async def start_request(self, nursery: trio.Nursery, *, pause: float = 0.05) -> None:
        """Begin a request at either site; return after up to ``pause`` seconds."""
        nursery.start_soon(self.request, self.choice.choice(sorted(SAES)))
        await trio.sleep(self.choice.uniform(0, pause))

    async def request(self, kme_id: str, *, most: int = 4) -> None:
        """A master draws keys and its slaves collect them, each as it likes."""
        choice, site = self.choice, self.sites[kme_id]
        master = choice.choice(SAES[kme_id])
        slaves = choice.sample(SAES[OTHER[kme_id]], choice.choice((1, 1, 2)))
        request = KeyRequest(
            number=choice.randint(1, most),
            size=choice.choice((128, 256, 256, 512)),
            additional_slave_sae_ids=tuple(slaves[1:]),
        )
        got = await site.ask(lambda kme: kme.get_key(master, slaves[0], request))
        if got is None:
            return
        self.checker.drawn(kme_id, master, tuple(slaves), got)
        self.ids += [item.key_id for item in got.keys]
        if self.happens(0.5):
            await trio.sleep(self.delay())
            for slave in slaves:
                await self.collect(kme_id, master, slave, [item.key_id for item in got.keys])

    async def collect(self, kme_id: str, master: str, slave: str, ids: list[str]) -> bool:
        """One try of a slave at the other KME."""
        there = self.sites[OTHER[kme_id]]
        ids = [key_id for key_id in ids if (key_id, slave) not in self.checker.slaves]
        if not ids:
            return True
        before = there.disk.took_place
        got = await there.ask(lambda kme: kme.get_key_with_ids(slave, master, ids))
        if got is not None:
            self.checker.collected(master, slave, got)
        elif there.disk.took_place > before:
            self.checker.uncertain.update((key_id, slave) for key_id in ids)
        return got is not None

    async def attack(self) -> None:
        """The third KME, and SAEs that are not meant, try every ID that is known."""
        choice = self.choice
        ids = choice.sample(self.ids, min(len(self.ids), 5))
        site = self.sites[choice.choice(sorted(SAES))]
        if not ids or not site.up:
            return
        kme, own = site.kme, choice.choice(SAES[site.id])
        value = choice.choice((None, Secret(bytes(32))))
        message = ExtKeys(
            allotments=tuple(Allotment(blocks=(one,), size=32, value=value) for one in ids),
            master="eve",
            slaves=(own,),
        )
        for call in (
            lambda: kme.peer_voids(HOSTILE, ids),
            lambda: kme.peer_allots(HOSTILE, message),
            lambda: kme.peer_checks(HOSTILE, ids),
            lambda: kme.get_key_with_ids(own, choice.choice(SAES[site.id]), ids),
        ):
            with site.life(), suppress(BlocksRefused, ErrorResponse, KeySourceUnavailable):
                await call()

    async def settle(self) -> None:
        """The faults have passed. Whatever was delivered to a master is there for its slaves."""
        self.loss = 0.0
        await trio.sleep(2)
        for key_id, (kme_id, master, slaves, _) in self.checker.masters.items():
            for slave in slaves:
                there = await self.collect(kme_id, master, slave, [key_id])
                assert there or (key_id, slave) in self.checker.uncertain, (
                    f"{key_id}, which {master} has, is not there for {slave}"
                )


@contextmanager
def inline_threads(monkeypatch: pytest.MonkeyPatch, seed: int) -> Iterator[None]:
    """Worker threads run inline and tasks in an order that the seed decides."""

    async def in_thread(function: Callable[..., Any], *arguments: Any, **_: Any) -> Any:
        await trio.lowlevel.checkpoint_if_cancelled()
        result = function(*arguments)
        await trio.lowlevel.cancel_shielded_checkpoint()
        return result

    with monkeypatch.context() as patch:
        patch.setattr("hybridkex.qkd.sqlite_store.in_thread", in_thread)
        patch.setattr(trio._core._run, "_ALLOW_DETERMINISTIC_SCHEDULING", True)
        trio._core._run._r.seed(seed)
        yield


Scenario = Callable[[World], Awaitable[None]]


async def one_half_only(world: World) -> None:
    """Each KME's own half is empty in turn, and both reach for the other."""
    for half in (0, 1):
        await world.produce(60, halves=(half,))
        await trio.sleep(0.5)
        async with trio.open_nursery() as nursery:
            for _ in range(40):
                await world.start_request(nursery)


async def lossy(world: World) -> None:
    world.loss = 0.2
    for _ in range(4):
        await world.produce(30)
        async with trio.open_nursery() as nursery:
            for _ in range(25):
                await world.start_request(nursery, pause=0.1)


async def restarts(world: World) -> None:
    world.loss = 0.05
    for _ in range(6):
        await world.produce(30)
        async with trio.open_nursery() as nursery:
            for _ in range(20):
                await world.start_request(nursery)
            site = world.sites[world.choice.choice(sorted(SAES))]
            await site.stop()
            await trio.sleep(world.delay())
            site.start()
            nursery.start_soon(reconcile, site)


async def reconcile(site: Site) -> None:
    with site.life(), suppress(KeySourceUnavailable):
        await site.kme.reconcile(OTHER[site.id], grace=1.0)


async def failing_disks(world: World) -> None:
    for _ in range(6):
        await world.produce(30)
        site = world.sites[world.choice.choice(sorted(SAES))]
        site.disk.odds = world.choice.choice((0.02, 0.2))
        async with trio.open_nursery() as nursery:
            for number in range(20):
                await world.start_request(nursery)
                site.disk.broken = 8 < number < 14
                if number % 7 == 0:
                    nursery.start_soon(reconcile, world.sites["kme-a"])
        site.disk.odds, site.disk.broken = 0.0, False


async def hostile(world: World) -> None:
    await world.produce(60)
    async with trio.open_nursery() as nursery:
        for _ in range(40):
            nursery.start_soon(world.attack)
            await world.start_request(nursery)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "scenario", [one_half_only, lossy, restarts, failing_disks, hostile], ids=lambda s: s.__name__
)
def test_what_was_delivered_to_one_side_is_there_for_the_other(
    scenario: Scenario, seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> Checker:
        async with trio.open_nursery() as nursery:
            world = World(tmp_path, random.Random(f"{scenario.__name__} {seed}"), nursery)
            world.sites = {kme_id: Site(world, kme_id) for kme_id in SAES}
            await scenario(world)
            await world.settle()
            for site in world.sites.values():
                await site.store.aclose()
            nursery.cancel_scope.cancel()
        return world.checker

    with inline_threads(monkeypatch, seed):
        checker = trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    assert len(checker.masters) > 20, "the run delivered something"


def test_a_key_that_comes_late_to_the_other_end_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in the first moments of a link: one end is fed before the other."""

    async def main() -> KeyContainer | None:
        async with trio.open_nursery() as nursery:
            world = World(tmp_path, random.Random(1), nursery, latest=0.01)
            world.sites = {kme_id: Site(world, kme_id) for kme_id in SAES}
            item = ProducedKey(key_id="0" * 8, key=Secret(bytes(32)))

            async def bring(kme_id: str, seconds: float) -> None:
                await trio.sleep(seconds)
                await world.sites[kme_id].store.add(OTHER[kme_id], [(item.key_id, item.key)])

            await bring("kme-a", 0)
            nursery.start_soon(bring, "kme-b", 0.7)
            kme = world.sites["kme-a"].kme
            found = await world.sites["kme-a"].ask(
                lambda _: kme.get_key("alice", "bob", KeyRequest())
            )
            for site in world.sites.values():
                await site.store.aclose()
            nursery.cancel_scope.cancel()
        return found

    with inline_threads(monkeypatch, 1):
        found = trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    assert found is not None
