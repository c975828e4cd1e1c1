"""The SQLite store under many callers: groups, flushes, counters, and no search through a table."""

import random
import re
import sqlite3
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from hybridkex.errors import KeyConsumed, KeySourceError, KeySourceUnavailable, KeyUnknown
from hybridkex.kme.entity import KeyManagementEntity, LocalPeer
from hybridkex.kme.metrics import KmeMetrics
from hybridkex.kme.settings import EntitySettings, KmeLimits
from hybridkex.qkd.etsi014.models import KeyRequest
from hybridkex.qkd.sqlite_store import SqliteKeyStore
from hybridkex.qkd.store import Allotment, BlocksRefused
from hybridkex.secret import Secret

SEAL = Secret(bytes(32))


def some_keys(number: int) -> list[tuple[str, Secret]]:
    return [(str(uuid.uuid4()), Secret(uuid.uuid4().bytes * 2)) for _ in range(number)]


def one_block(key_id: str) -> Allotment:
    return Allotment(blocks=(key_id,), size=32)


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[SqliteKeyStore]:
    store = SqliteKeyStore(tmp_path / "db", SEAL)
    yield store
    await store.aclose()


@contextmanager
def statements(*stores: SqliteKeyStore) -> Iterator[list[str]]:
    """What the databases carry out. A statement whose triggers run is traced once for each."""
    seen: list[str] = []

    def note(last: list[str], statement: str) -> None:
        if [statement] != last:
            seen.append(statement)
        last[:] = [statement]

    for store in stores:
        store._db.set_trace_callback(partial(note, []))
    try:
        yield seen
    finally:
        for store in stores:
            store._db.set_trace_callback(None)


async def at_once(calls: list[Callable[[], Awaitable[Any]]]) -> list[Any]:
    """Their results or errors."""
    results: list[Any] = [None] * len(calls)

    async def run(index: int) -> None:
        try:
            results[index] = await calls[index]()
        except (KeySourceError, BlocksRefused) as error:
            results[index] = error

    async with trio.open_nursery() as nursery:
        for index in range(len(calls)):
            nursery.start_soon(run, index)
    return results


# -- groups


async def promise(store: SqliteKeyStore, number: int) -> list[str]:
    keys = some_keys(number)
    await store.add("b", keys)
    ids = [key_id for key_id, _ in keys]
    await store.accept("b", [one_block(key_id) for key_id in ids], master="m", slaves=["s"])
    return ids


async def test_calls_at_once_share_a_flush_and_a_refusal_stays_alone(store: SqliteKeyStore) -> None:
    ids = await promise(store, 40)
    asked = [*ids, *ids[:5], "unknown"]
    calls = [
        lambda key_id=key_id: store.collect("b", [key_id], slave="s", master="m")
        for key_id in asked
    ]
    # All or nothing: this one is refused after it has taken the first of its keys.
    calls.append(lambda: store.collect("b", [ids[0], "unknown"], slave="s", master="m"))
    with statements(store) as seen:
        results = await at_once(calls)
    assert seen.count("COMMIT") <= 2
    given = [result[0][0] for result in results if isinstance(result, list)]
    assert sorted(given) == sorted(ids), "each key once"
    refused = [result for result in results if not isinstance(result, list)]
    assert sum(isinstance(error, KeyConsumed) for error in refused) >= 5
    assert sum(isinstance(error, KeyUnknown) for error in refused) >= 1
    assert len(refused) == 7


class BrokenFlush:
    """A connection whose commits fail."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db

    def __getattr__(self, name: str) -> Any:
        return getattr(self._db, name)

    def execute(self, statement: str, *arguments: Any) -> Any:
        if statement == "COMMIT":
            raise sqlite3.OperationalError("disk I/O error")
        return self._db.execute(statement, *arguments)


async def test_a_flush_that_fails_fails_the_whole_group_and_gives_no_key(
    store: SqliteKeyStore,
) -> None:
    failures: list[int] = []
    store._on_failure = lambda: failures.append(1)
    ids = await promise(store, 10)
    await store.add("b", some_keys(3))
    calls: list[Callable[[], Awaitable[Any]]] = [
        lambda key_id=key_id: store.collect("b", [key_id], slave="s", master="m") for key_id in ids
    ]
    calls.append(lambda: store.reserve("b", 3))
    calls.append(lambda: store.count("b"))
    working = store._db
    store._db = BrokenFlush(working)  # type: ignore[assignment]
    results = await at_once(calls)
    store._db = working
    for result in results:
        assert isinstance(result, KeySourceUnavailable), result
        assert "disk I/O error" in str(result)
    assert len({id(result) for result in results}) == len(results), "an error of its own for each"
    assert failures
    # Nothing was lost: every key and every reservation is free again.
    assert len(await store.reserve("b", 3)) == 3
    results = await at_once(calls[:10])
    assert sorted(result[0][0] for result in results) == sorted(ids)


async def test_a_draw_that_fails_keeps_its_reservation_until_it_is_released(
    store: SqliteKeyStore,
) -> None:
    """Another draw would reserve the block, and lose it when the first one is released."""
    await store.add("b", some_keys(1))
    [block] = await store.reserve("b", 1)
    working = store._db
    store._db = BrokenFlush(working)  # type: ignore[assignment]
    with pytest.raises(KeySourceUnavailable):
        await store.allot("b", [one_block(block.key_id)], master="m")
    store._db = working
    assert not await store.reserve("b", 1)
    await store.release("b", [block.key_id])
    assert len(await store.reserve("b", 1)) == 1
    await store.allot("b", [one_block(block.key_id)], master="m")
    assert not store._reserved


async def test_a_caller_that_is_cancelled_keeps_no_reservation(store: SqliteKeyStore) -> None:
    await store.add("b", some_keys(8))
    for _ in range(20):
        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(store.reserve, "b", 2)
                # In one group with a reservation, so that it is held until the flush.
                nursery.start_soon(store.add, "b", some_keys(1))
            await trio.lowlevel.checkpoint()
            nursery.cancel_scope.cancel()
        free = await store.count("b")
        found = await store.reserve("b", free)
        assert len(found) == free
        await store.release("b", [one.key_id for one in found])


# -- the guard of speed


async def test_flushes_of_pairs_at_once(tmp_path: Path) -> None:
    """A draw and its look-up are three durable changes; pairs at once share their flushes."""
    stores = {kme: SqliteKeyStore(tmp_path / kme, SEAL) for kme in ("a", "b")}
    saes = {"a": frozenset({"alice"}), "b": frozenset({"bob"})}
    limits = KmeLimits(rate=1e9, burst=10**9)
    kmes = {}
    for one, other in (("a", "b"), ("b", "a")):
        kmes[one] = KeyManagementEntity(
            EntitySettings(id=one, saes=saes[one], peers={other: saes[other]}, limits=limits),
            store=stores[one],
            metrics=KmeMetrics(),
        )
    kmes["a"].connect("b", LocalPeer(own_id="a", other=kmes["b"]))
    keys = some_keys(400)
    for one, other in (("a", "b"), ("b", "a")):
        await stores[one].add(other, keys)
    pairs = 0

    async def draw_and_look_up() -> None:
        nonlocal pairs
        for _ in range(12):
            drawn = await kmes["a"].get_key("alice", "bob", KeyRequest())
            got = await kmes["b"].get_key_with_ids("bob", "alice", [drawn.keys[0].key_id])
            assert got.keys[0].key == drawn.keys[0].key
            pairs += 1

    with statements(*stores.values()) as seen:
        async with trio.open_nursery() as nursery:
            for _ in range(16):
                nursery.start_soon(draw_and_look_up)
    commits = seen.count("COMMIT")
    # Three a pair without groups. In groups of sixteen it would be a fifth of one.
    assert commits <= 0.6 * pairs, f"{commits} flushes for {pairs} pairs"
    # About 16 when every caller is alone; none of them grows with the stock.
    assert len(seen) <= 20 * pairs, f"{len(seen)} statements for {pairs} pairs"
    assert not [one for one in seen if "count(*)" in one]
    for store in stores.values():
        await store.aclose()


# -- no statement searches a table from end to end


VIRTUAL = re.compile(r"SCAN json_each VIRTUAL TABLE")


async def everything(store: SqliteKeyStore, choice: random.Random) -> None:
    """Each call at least once, in its ordinary and its refused form."""
    keys = some_keys(12)
    ids = [key_id for key_id, _ in keys]
    await store.add("b", keys)
    await store.add("b", keys)
    found = await store.reserve("b", 3, half=choice.randrange(2), skip=ids[:1])
    await store.allot("b", [one_block(found[0].key_id)], master="m", slaves=["s"])
    await store.release("b", [one.key_id for one in found])
    with suppress(BlocksRefused):
        await store.accept("b", [one_block(one) for one in ids[:2]], master="m", slaves=["s", "t"])
    value = Allotment(blocks=(str(uuid.uuid4()),), size=4, value=Secret(b"abcd"))
    await store.accept("b", [value], master="m", slaves=["s"])
    await store.collect("b", [value.key_id], slave="s", master="m")
    for slave in ("s", "x"):
        with suppress(KeySourceError):
            await store.collect("b", ids[:2], slave=slave, master="m")
    await store.discard("b", ids[4:6])
    await store.void("b", ids[5:7])
    for call in (store.count, store.promised):
        await call("b")
    await store.unknown("b", ids)
    await store.never_here("b", ids)
    await store.shared_ids("b", created_before=2e10)
    await store.expire(keys_before=1.0, tombstones_before=1.0)
    await store.tidy()
    await store.scrub()


async def test_every_statement_uses_an_index(store: SqliteKeyStore) -> None:
    with statements(store) as seen:
        await everything(store, random.Random(1))
        await store.expire(keys_before=2e10, tombstones_before=2e10)
    own = [one for one in seen if re.match(r"(SELECT|INSERT|UPDATE|DELETE)\b", one)]
    assert len({one[:40] for one in own}) > 15
    for statement in own:
        plan = [row[3] for row in store._db.execute(f"EXPLAIN QUERY PLAN {statement}")]
        for line in plan:
            assert not line.startswith("SCAN") or VIRTUAL.match(line) or "CONSTANT" in line, (
                statement,
                plan,
            )
            assert "TEMP B-TREE" not in line, (statement, plan)


# -- the counters


def counted(store: SqliteKeyStore, link: str) -> tuple[int, int]:
    [free] = store._db.execute("SELECT count(*) FROM material WHERE link = ?", (link,)).fetchone()
    [promised] = store._db.execute(
        "SELECT coalesce(sum(blocks), 0) FROM grants WHERE link = ? AND ended IS NULL", (link,)
    ).fetchone()
    return free, promised


def some_calls(
    store: SqliteKeyStore, choice: random.Random, known: list[str]
) -> list[Callable[[], Awaitable[Any]]]:
    """Calls of every kind that changes something, about keys that may or may not be there."""
    link = choice.choice("bc")
    fresh = some_keys(choice.randrange(1, 6))
    known += [key_id for key_id, _ in fresh]
    ids = choice.sample(known, min(len(known), choice.randrange(1, 5)))
    value = choice.choice((None, Secret(b"v" * 16)))
    allotment = Allotment(blocks=tuple(ids), size=16, value=value)
    slaves = choice.sample(["s", "t", "u"], choice.randrange(1, 4))
    before, forget = choice.choice((0.0, 0.0, 0.0, 2e10)), choice.choice((0.0, 2e10))
    calls: list[Callable[[], Awaitable[Any]]] = [
        lambda: store.add(link, fresh),
        lambda: store.accept(link, [allotment], master="m", slaves=slaves),
        lambda: store.allot(link, [allotment], master="m", slaves=slaves),
        lambda: store.collect(link, ids, slave=slaves[0], master="m"),
        lambda: store.discard(link, ids),
        lambda: store.void(link, ids),
        lambda: store.expire(keys_before=before, tombstones_before=forget),
    ]
    return choice.sample(calls, choice.randrange(1, 4))


@pytest.mark.parametrize("seed", range(6))
async def test_the_counters_never_disagree_with_the_tables(
    store: SqliteKeyStore, seed: int
) -> None:
    choice = random.Random(seed)
    known: list[str] = []
    working = store._db
    for _ in range(60):
        if choice.random() < 0.2:
            store._db = BrokenFlush(working)  # type: ignore[assignment]
        await at_once(some_calls(store, choice, known))
        store._db = working
        for name in "bc":
            assert (await store.count(name), await store.promised(name)) == counted(store, name)


# -- stock of any size


async def test_shared_ids_come_in_pages_and_all_of_them(
    store: SqliteKeyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SqliteKeyStore, "PAGE", 7)
    keys = some_keys(50)
    ids = {key_id for key_id, _ in keys}
    await store.add("b", keys)
    await store.add("c", some_keys(20))
    await store.add("b", some_keys(5), shared=False)
    held = {one.key_id for one in await store.reserve("b", 4)}
    found, position = await store.shared_ids("b", created_before=2e10)
    pages = 1
    while position is not None:
        more, position = await store.shared_ids("b", created_before=2e10, after=position)
        assert len(more) <= 7
        found += more
        pages += 1
    assert sorted(found) == sorted(ids - held)
    assert 7 <= pages <= 12


async def test_expiry_works_in_small_transactions(
    store: SqliteKeyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SqliteKeyStore, "PAGE", 10)
    await store.add("b", some_keys(35))
    await promise(store, 25)
    with statements(store) as seen:
        assert await store.expire(keys_before=2e10, tombstones_before=0) == 60
    assert seen.count("COMMIT") >= 7
    assert counted(store, "b") == (0, 0)
    await store.expire(keys_before=0, tombstones_before=2e10)
    for table in ("grants", "spent"):
        assert store._db.execute(f"SELECT count(*) FROM {table}").fetchone() == (0,)


# -- what is left on the disk


async def test_a_tidied_log_forgets_within_two_calls(tmp_path: Path) -> None:
    """Whether the load goes on, falls or ends. And the log keeps its place under load."""
    store = SqliteKeyStore(tmp_path / "db", SEAL)
    log = tmp_path / "db-wal"

    def sealed() -> set[bytes]:
        return {
            row[0] for row in store._db.execute("SELECT sealed FROM grants WHERE ended IS NULL")
        }

    def on_disk(value: bytes) -> bool:
        return any(value in path.read_bytes() for path in tmp_path.iterdir())

    old: list[set[bytes]] = [set(), set()]
    for number in (30, 40, 35, 3, 20, 1, 0, 0):
        ids = await promise(store, number) if number else []
        gone = sealed()
        if number:
            await store.collect("b", ids, slave="s", master="m")
            assert all(map(on_disk, gone)), "the search works"
        await store.tidy()
        old.append(gone)
        for value in old.pop(0):
            assert not on_disk(value), "gone with the second call"
        if number > 1:
            assert log.stat().st_size > 0, "the log is begun anew, not emptied"
    assert log.stat().st_size == 0
    await store.aclose()


# -- databases of version 2


VERSION_2 = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE material (seq INTEGER PRIMARY KEY, link TEXT NOT NULL, key_id TEXT NOT NULL,
    half INTEGER NOT NULL, shared INTEGER NOT NULL, created REAL NOT NULL, sealed BLOB NOT NULL,
    UNIQUE (link, key_id));
CREATE INDEX material_order ON material (link, half, seq);
CREATE TABLE grants (link TEXT NOT NULL, key_id TEXT NOT NULL, slave TEXT NOT NULL,
    master TEXT NOT NULL, created REAL NOT NULL, sealed BLOB, ended TEXT,
    PRIMARY KEY (link, key_id, slave)) WITHOUT ROWID;
CREATE INDEX grants_age ON grants (created);
CREATE TABLE spent (link TEXT NOT NULL, key_id TEXT NOT NULL, at REAL NOT NULL,
    PRIMARY KEY (link, key_id)) WITHOUT ROWID;
CREATE INDEX spent_age ON spent (at);
PRAGMA user_version = 2;
"""


async def test_a_database_of_version_2_is_taken_over(tmp_path: Path) -> None:
    store = SqliteKeyStore(tmp_path / "new", SEAL)
    await store.add("b", some_keys(9))
    ids = await promise(store, 5)
    long = Allotment(
        blocks=tuple(key_id for key_id, _ in some_keys(3)), size=80, value=Secret(bytes(80))
    )
    await store.accept("b", [long], master="m", slaves=["s"])
    await store.collect("b", ids[:2], slave="s", master="m")
    await store.aclose()
    with closing(sqlite3.connect(tmp_path / "old", isolation_level=None)) as db:
        db.executescript(VERSION_2)
        db.execute("ATTACH ? AS new", (str(tmp_path / "new"),))
        for table, columns in {
            "meta": "name, value",
            "material": "seq, link, key_id, half, shared, created, sealed",
            "grants": "link, key_id, slave, master, created, sealed, ended",
            "spent": "link, key_id, at",
        }.items():
            db.execute(f"INSERT INTO {table} SELECT {columns} FROM new.{table}")
    for _ in range(2):  # the second time it is of the present version
        store = SqliteKeyStore(tmp_path / "old", SEAL)
        assert (await store.count("b"), await store.promised("b")) == (9, 6)
        assert counted(store, "b") == (9, 6)
        await store.aclose()
    store = SqliteKeyStore(tmp_path / "old", SEAL)
    await store.collect("b", ids[2:], slave="s", master="m")
    with pytest.raises(KeyConsumed):
        await store.collect("b", ids[:1], slave="s", master="m")
    assert (await store.count("b"), await store.promised("b")) == (9, 3)
    await store.aclose()


def test_a_transaction_in_service_has_ended_when_it_is_on_the_disk(tmp_path: Path) -> None:
    """The other tests relax this (``tests/conftest.py``), so a process of its own looks."""
    program = (
        "import sys; from pathlib import Path; from hybridkex.secret import Secret\n"
        "from hybridkex.qkd.sqlite_store import SqliteKeyStore\n"
        "store = SqliteKeyStore(Path(sys.argv[1]), Secret(bytes(32)))\n"
        "print(*store._db.execute('PRAGMA synchronous').fetchone())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "db")],
        capture_output=True,
        text=True,
        check=True,
    )
    full = "2"  # https://sqlite.org/pragma.html#pragma_synchronous
    assert done.stdout.split() == [full]
