"""What every key store does, on SQLite and on PostgreSQL."""

import itertools
import signal
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final, LiteralString

import pytest
import trio
from waiting import trio_until

from benchmarks.processes import cpu
from hybridkex.errors import (
    ConfigError,
    KeyConsumed,
    KeyExpired,
    KeySourceUnavailable,
    KeyUnauthorized,
    KeyUnknown,
)
from hybridkex.qkd.sqlite_store import SqliteKeyStore
from hybridkex.qkd.store import (
    Allotment,
    BlocksRefused,
    BlockState,
    KeyStore,
    OutcomeUnknown,
    Seal,
)
from hybridkex.secret import Secret
from interop.postgres import PostgresServer

SEAL = Secret(bytes(range(32)))
SCHEMAS = itertools.count()


def postgres_store(server: PostgresServer, schema: str, **changes: Any) -> Any:
    """The store of one process, in a schema that is created for the first."""
    import psycopg

    from hybridkex.qkd.postgres_store import PostgresKeyStore

    with psycopg.connect(server.url("public")) as connection:
        connection.execute(f"CREATE SCHEMA IF NOT EXISTS {schema}")
    url = Secret(server.url(schema).encode())
    return PostgresKeyStore(url, changes.pop("seal_key", SEAL), **{"owner": "kme-a"} | changes)


@pytest.fixture(params=["sqlite", "postgres"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[KeyStore]:
    store: KeyStore
    if request.param == "sqlite":
        store = SqliteKeyStore(tmp_path / "db", SEAL)
    else:
        server = request.getfixturevalue("postgres")
        store = postgres_store(server, f"test_{next(SCHEMAS)}")
    yield store
    await store.aclose()


def key_id(number: int) -> str:
    return str(uuid.UUID(int=(7 << 64) + number))


def keys(*numbers: int) -> list[tuple[str, Secret]]:
    return [(key_id(number), Secret(bytes([number]) * 32)) for number in numbers]


def block(*numbers: int, size: int = 32) -> Allotment:
    return Allotment(blocks=tuple(key_id(number) for number in numbers), size=size)


async def test_reserve_own_half_first_and_never_twice(store: KeyStore) -> None:
    await store.add("b", keys(1, 2, 3, 4))
    first = await store.reserve("b", 3, half=0)
    assert [m.key_id for m in first] == [key_id(2), key_id(4), key_id(1)]
    assert [m.key.reveal()[0] for m in first] == [2, 4, 1]
    assert [m.key_id for m in await store.reserve("b", 3)] == [key_id(3)]
    assert await store.reserve("other", 1) == []
    await store.release("b", [key_id(2)])
    assert [m.key_id for m in await store.reserve("b", 3, skip=[key_id(4)])] == [key_id(2)]


async def test_allot_and_collect(store: KeyStore) -> None:
    await store.add("b", keys(1, 2, 3))
    await store.allot("b", [block(1, 2, size=40)], master="m", slaves=["s", "t"])
    assert await store.count("b") == 1
    for slave in ("s", "t"):
        [(found, key)] = await store.collect("b", [key_id(1)], slave=slave, master="m")
        assert (found, key.reveal()) == (key_id(1), bytes([1]) * 32 + bytes([2]) * 8)
        with pytest.raises(KeyConsumed):
            await store.collect("b", [key_id(1)], slave=slave, master="m")
    with pytest.raises(KeyUnauthorized):
        await store.collect("b", [key_id(1)], slave="u", master="m")
    with pytest.raises(KeyUnknown):
        await store.collect("b", [key_id(1)], slave="s", master="n")
    with pytest.raises(KeyUnknown):
        await store.collect("b", [key_id(2)], slave="s", master="m")
    with pytest.raises(KeyConsumed):
        await store.allot("b", [block(3), block(1)], master="m")
    assert await store.count("b") == 1, "the transaction was undone as a whole"


async def test_what_was_here_does_not_return(store: KeyStore) -> None:
    await store.add("b", keys(1, 2))
    await store.allot("b", [block(1)], master="m")
    await store.void("b", [key_id(2), key_id(3)])
    await store.add("b", keys(1, 2, 3))
    assert await store.count("b") == 0


async def test_accept_is_all_or_nothing_and_says_why(store: KeyStore) -> None:
    await store.add("a", keys(1, 2, 3, 4))
    await store.accept("a", [block(1)], master="m", slaves=["s"])
    mine = await store.reserve("a", 2, half=0)
    assert [m.key_id for m in mine] == [key_id(2), key_id(4)]
    with pytest.raises(BlocksRefused) as refused:
        await store.accept(
            "a",
            [block(1), block(2), block(3), block(9)],
            master="m",
            slaves=["s"],
            peer_half=1,
        )
    assert refused.value.states == {
        key_id(1): BlockState.SPENT,
        key_id(2): BlockState.RESERVED,
        key_id(9): BlockState.UNKNOWN,
    }
    with pytest.raises(BlocksRefused):
        await store.accept("a", [block(3, 3)], master="m", slaves=["s"], peer_half=1)
    assert await store.count("a") == 3
    # A block of the peer's half goes to the peer, although we have reserved it.
    await store.accept("a", [block(2)], master="m", slaves=["s"], peer_half=0)
    with pytest.raises(KeyConsumed):
        await store.allot("a", [block(2)], master="x")


async def test_no_key_is_made_of_blocks_that_are_too_short(store: KeyStore) -> None:
    await store.add("b", keys(1, 2, 3))
    with pytest.raises(KeyConsumed):
        await store.allot("b", [block(1, size=33)], master="m", slaves=["s"])
    with pytest.raises(BlocksRefused):
        await store.accept("b", [block(2), block(1, 3, size=65)], master="m", slaves=["s"])
    assert await store.count("b") == 3
    await store.allot("b", [block(1, 3, size=64)], master="m", slaves=["s"])


async def test_a_relayed_key_is_taken_once(store: KeyStore) -> None:
    relayed = Allotment(blocks=(key_id(1),), size=16, value=Secret(b"v" * 16))
    await store.accept("a", [relayed], master="m", slaves=["s"])
    with pytest.raises(BlocksRefused):
        await store.accept("a", [relayed], master="m", slaves=["s"])
    [(_, key)] = await store.collect("a", [key_id(1)], slave="s", master="m")
    assert key.reveal() == b"v" * 16


async def test_expiry(store: KeyStore) -> None:
    await store.add("a", keys(1, 2, 3))
    await store.allot("a", [block(1)], master="m", slaves=["s"])
    assert await store.expire(keys_before=0, tombstones_before=0) == 0
    assert await store.expire(keys_before=2e10, tombstones_before=0) == 3
    with pytest.raises(KeyExpired):
        await store.collect("a", [key_id(1)], slave="s", master="m")
    assert await store.count("a") == 0
    await store.expire(keys_before=0, tombstones_before=2e10)
    with pytest.raises(KeyUnknown):
        await store.collect("a", [key_id(1)], slave="s", master="m")


async def test_void_spares_what_was_delivered(store: KeyStore) -> None:
    """And says which keys it erased, each once, so that the log calls no other one voided."""
    await store.add("a", keys(1, 2, 3))
    await store.accept("a", [block(1)], master="m", slaves=["s"])
    await store.accept("a", [block(2)], master="m", slaves=["s", "t"])
    await store.collect("a", [key_id(1)], slave="s", master="m")
    voided = await store.void("a", [key_id(1), key_id(2), key_id(3), key_id(4)])
    assert voided == {key_id(2), key_id(3)}
    with pytest.raises(KeyConsumed, match="delivered"):
        await store.collect("a", [key_id(1)], slave="s", master="m")
    with pytest.raises(KeyConsumed, match="void"):
        await store.collect("a", [key_id(2)], slave="s", master="m")


async def test_what_is_promised_is_not_discarded(store: KeyStore) -> None:
    await store.add("a", keys(1, 2, 3))
    await store.accept("a", [block(1)], master="m", slaves=["s"])
    [held] = await store.reserve("a", 1)
    ids = [key_id(number) for number in (1, 2, 3)]
    gone = await store.discard("a", ids)
    assert set(gone) == {key_id(2), key_id(3)} - {held.key_id}
    await store.collect("a", [key_id(1)], slave="s", master="m")


async def test_what_a_peer_asks_about(store: KeyStore) -> None:
    await store.add("a", keys(1, 2))
    await store.add("a", keys(3), shared=False)
    await store.void("a", [key_id(2), key_id(9)])
    asked = [key_id(number) for number in (1, 2, 3, 4, 9)]
    assert await store.unknown("a", asked) == [key_id(2), key_id(4), key_id(9)]
    assert await store.never_here("a", asked) == [key_id(4)]
    found, position = list[str](), None
    while True:
        ids, position = await store.shared_ids("a", created_before=2e10, after=position)
        found += ids
        if position is None:
            break
    assert found == [key_id(1)]


async def test_promised_blocks_are_counted(store: KeyStore) -> None:
    value = Secret(bytes(80))
    long = Allotment(blocks=tuple(key_id(number) for number in (1, 2, 3)), size=80, value=value)
    await store.accept("a", [long], master="m", slaves=["s", "t"])
    assert await store.promised("a") == 6
    await store.collect("a", [key_id(1)], slave="s", master="m")
    assert (await store.promised("a"), await store.promised("b")) == (3, 0)
    await store.expire(keys_before=2e10, tombstones_before=0)
    assert await store.promised("a") == 0


ROW = "link, key_id, half, shared, created, sealed"
PROMISE = "link, key_id, slave, master, created, blocks, sealed, ended"


FORBIDDEN = (
    # rows of another link
    "DELETE FROM material WHERE link = 'c'",
    "UPDATE material SET sealed = '' WHERE link = 'c'",
    f"INSERT INTO material ({ROW}) VALUES ('c', 'new', 0, true, 1, '')",
    "DELETE FROM grants WHERE link = 'c'",
    "UPDATE grants SET sealed = NULL, ended = 'delivered' WHERE link = 'c'",
    "UPDATE grants SET sealed = NULL, ended = 'void' WHERE link = 'c'",
    f"INSERT INTO grants ({PROMISE}) VALUES ('c', 'new', 's', 'm', 1, 1, '', NULL)",
    "DELETE FROM spent WHERE link = 'c'",
    "UPDATE spent SET at = 0 WHERE link = 'c'",
    "INSERT INTO spent (link, key_id, at) VALUES ('c', 'new', 1)",
    # a key of another SAE
    "UPDATE grants SET sealed = NULL, ended = 'delivered' WHERE slave = 't'",
    # rows that become others
    "UPDATE material SET link = 'c'",
    "UPDATE material SET key_id = 'another'",
    "UPDATE grants SET slave = 's' WHERE slave = 't'",
    "UPDATE grants SET link = 'c'",
    "UPDATE spent SET key_id = 'another'",
    # promises that end twice, or not, or otherwise
    "UPDATE grants SET ended = NULL, sealed = '' WHERE slave = 'd'",
    "UPDATE grants SET ended = 'void' WHERE slave = 'd'",
    "UPDATE grants SET sealed = NULL WHERE slave = 's'",
    "UPDATE grants SET sealed = NULL, ended = 'lost' WHERE slave = 's'",
    f"INSERT INTO grants ({PROMISE}) VALUES ('b', 'new', 's', 'm', 1, 1, NULL, NULL)",
    f"INSERT INTO grants ({PROMISE}) VALUES ('b', 'new', 's', 'm', 1, 0, '', NULL)",
    f"INSERT INTO material ({ROW}) VALUES ('b', 'new', 2, true, 1, '')",
)


async def test_the_database_refuses_what_no_call_may_do(store: KeyStore) -> None:
    """Whatever the statements of a call for the link b and the SAE s are."""
    for link in ("b", "c"):
        await store.add(link, keys(1, 2, 3, 4))
        await store.allot(link, [block(1), block(2)], master="m", slaves=["s", "t", "d"])
        await store.collect(link, [key_id(1)], slave="d", master="m")
    before = await rows(store)
    for statement in FORBIDDEN:
        with suppress(KeySourceUnavailable):  # or no row is seen that could be changed
            await within(store, "b", "s", statement)
        assert await rows(store) == before, statement
    await within(store, "b", "s", "DELETE FROM material WHERE link = 'b'")
    assert await rows(store) != before, "its own rows it may change"


async def within(store: Any, link: str, sae: str, statement: str) -> list[Any]:
    """Run a statement as a call for a link and an SAE would."""

    def work(db: Any) -> list[Any]:
        found = db.execute(statement)
        return found.fetchall() if found.description else []

    found: list[Any] = await store._run(link, work, sae=sae)
    return found


async def rows(store: KeyStore) -> list[list[Any]]:
    """All that is stored."""
    return [
        sorted(map(repr, await within(store, "*", "", f"SELECT * FROM {table}")))
        for table in ("material", "grants", "spent")
    ]


async def test_many_callers_get_each_key_once(store: KeyStore) -> None:
    numbers = range(1, 61)
    await store.add("a", keys(*numbers))
    given: list[str] = []

    async def draw() -> None:
        while found := await store.reserve("a", 2):
            for one in found:
                await store.allot("a", [Allotment(blocks=(one.key_id,), size=32)], master="m")
                given.append(one.key_id)

    async with trio.open_nursery() as nursery:
        for _ in range(8):
            nursery.start_soon(draw)
    assert sorted(given) == sorted(key_id(number) for number in numbers)
    assert await store.count("a") == 0


async def test_a_job_is_done_by_one_and_again_when_it_is_due(store: KeyStore) -> None:
    assert await store.claim("one", 0.3)
    assert await store.claim("other", 60)
    assert not await store.claim("one", 60)
    await store.settle("other", 0)
    assert await store.claim("other", 60)
    await trio.sleep(0.35)
    assert await store.claim("one", 60), "whoever had claimed it did not end it"
    await store.settle("one", 60)
    assert not await store.claim("one", 60)


# -- several processes on one database


async def two(postgres: PostgresServer, **changes: Any) -> list[Any]:
    schema = f"test_{next(SCHEMAS)}"
    return [postgres_store(postgres, schema, **changes) for _ in range(2)]


async def test_two_processes_reserve_different_keys(postgres: PostgresServer) -> None:
    one, other = await two(postgres)
    await one.add("a", keys(*range(40)))
    held: list[str] = []

    async def reserve(store: Any) -> None:
        for _ in range(10):
            held.extend(found.key_id for found in await store.reserve("a", 2))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(reserve, one)
        nursery.start_soon(reserve, other)
    assert len(held) == len(set(held)) == 40
    # What one has reserved, the other can neither give away, nor release, nor discard.
    await one.add("a", keys(50, 51))
    mine = [found.key_id for found in await one.reserve("a", 2)]
    await other.release("a", mine)
    for number in (50, 51):
        with pytest.raises(BlocksRefused):
            await other.accept(
                "a", [block(number)], master="m", slaves=["s"], peer_half=number + 1 & 1
            )
        with pytest.raises(KeyConsumed):
            await other.allot("a", [block(number)], master="m")
    assert await other.discard("a", mine) == []
    await one.allot("a", [block(50), block(51)], master="m")
    for store in (one, other):
        await store.aclose()


async def test_two_processes_deliver_a_key_once(postgres: PostgresServer) -> None:
    one, other = await two(postgres)
    numbers = range(30)
    await one.add("a", keys(*numbers))
    accepted: list[int] = []
    collected: list[int] = []

    async def accept(store: Any, number: int) -> None:
        try:
            await store.accept("a", [block(number)], master="m", slaves=["s"])
        except BlocksRefused:
            return
        accepted.append(number)

    async def collect(store: Any, number: int) -> None:
        try:
            await store.collect("a", [key_id(number)], slave="s", master="m")
        except KeyConsumed:
            return
        collected.append(number)

    for call, done in ((accept, accepted), (collect, collected)):
        async with trio.open_nursery() as nursery:
            for number in numbers:
                for store in (one, other):
                    nursery.start_soon(call, store, number)
        assert sorted(done) == list(numbers)
    for store in (one, other):
        await store.aclose()


async def test_a_reservation_of_a_killed_process_ends(
    postgres: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hybridkex.qkd import postgres_store as module

    monkeypatch.setattr(module, "HOLD_SECONDS", 0.2)
    one, other = await two(postgres)
    await one.add("a", keys(1))
    [held] = await one.reserve("a", 1)
    assert await other.reserve("a", 1) == []
    await trio.sleep(0.25)
    monkeypatch.setattr(module, "HOLD_SECONDS", 30.0)
    [again] = await other.reserve("a", 1)
    assert again.key_id == held.key_id
    # The first was only slow: it comes too late.
    with pytest.raises(KeyConsumed):
        await one.allot("a", [block(1)], master="m")
    await one.release("a", [key_id(1)])
    await other.allot("a", [block(1)], master="m")
    for store in (one, other):
        await store.aclose()


async def test_the_database_itself_keeps_links_apart(postgres: PostgresServer) -> None:
    """A statement that forgets the link, or names another one, finds nothing."""
    import psycopg

    schema = f"test_{next(SCHEMAS)}"
    store = postgres_store(postgres, schema)
    await store.add("a", keys(1, 2))
    await store.accept("a", [block(1)], master="m", slaves=["s"])
    with psycopg.connect(postgres.url(schema)) as connection:
        connection.execute("SELECT set_config('hybridkex.link', 'c', false)")
        for statement in (
            "DELETE FROM material",
            "UPDATE material SET holder = 'x', held_until = now()",
            "UPDATE grants SET sealed = NULL, ended = 'void'",
            "DELETE FROM grants WHERE link = 'a'",
            "DELETE FROM spent",
        ):
            assert connection.execute(statement).rowcount == 0, statement
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            connection.execute("INSERT INTO spent (link, key_id) VALUES ('a', 'x')")
    # And a key that has ended does not begin again, whatever is done to it.
    await store.collect("a", [key_id(1)], slave="s", master="m")
    with psycopg.connect(postgres.url(schema)) as connection:
        connection.execute("SELECT set_config('hybridkex.link', 'a', false)")
        with pytest.raises(psycopg.errors.CheckViolation):
            connection.execute("UPDATE grants SET sealed = 'x', ended = NULL")
    await store.aclose()


async def test_a_database_of_another_kme_or_key_file_is_refused(postgres: PostgresServer) -> None:
    schema = f"test_{next(SCHEMAS)}"
    store = postgres_store(postgres, schema)
    with pytest.raises(ConfigError, match="belongs to kme-a, not to kme-b"):
        postgres_store(postgres, schema, owner="kme-b")
    with pytest.raises(ConfigError, match="the key file is not the one"):
        postgres_store(postgres, schema, seal_key=Secret(bytes(32)))
    await store.aclose()


async def test_no_key_and_no_sealing_key_is_readable_in_the_database(
    postgres: PostgresServer,
) -> None:
    schema = f"test_{next(SCHEMAS)}"
    store = postgres_store(postgres, schema)
    secret = b"a QKD key that no table may show"
    await store.add("a", [(key_id(1), Secret(secret))])
    await store.accept("a", [block(1)], master="m", slaves=["s"])
    await store.aclose()
    files = [path for path in (postgres.folder / "data").rglob("*") if path.is_file()]
    content = b"".join(path.read_bytes() for path in files)
    assert key_id(1).encode() in content, "the search works"
    for value in (secret, secret.hex().encode(), SEAL.reveal(), SEAL.reveal().hex().encode()):
        assert value not in content


async def test_a_job_is_done_by_one_of_two_processes(postgres: PostgresServer) -> None:
    stores = await two(postgres)
    for _ in range(10):
        taken: list[bool] = []

        async def claim(store: Any, taken: list[bool] = taken) -> None:
            taken.append(await store.claim("job", 60))

        async with trio.open_nursery() as nursery:
            for store in stores:
                nursery.start_soon(claim, store)
        assert sorted(taken) == [False, True]
        await stores[0].settle("job", 0)
    for store in stores:
        await store.aclose()


async def test_a_server_that_is_silent_delays_a_call_for_a_bounded_time(
    postgres: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that hangs keeps its connections open, and no limit of the server's counts."""
    from hybridkex.qkd import postgres_connection
    from hybridkex.qkd import postgres_store as module

    monkeypatch.setattr(postgres_connection, "SILENT_SECONDS", 1.0)
    monkeypatch.setattr(module, "WAIT_SECONDS", 1.0)
    store = postgres_store(postgres, f"test_{next(SCHEMAS)}", connections=2)
    await store.add("a", keys(1, 2))
    postgres.signal_all(signal.SIGSTOP)
    try:
        began = trio.current_time()
        failed: list[str] = []

        async def count() -> None:
            with pytest.raises(KeySourceUnavailable) as caught:
                await store.count("a")
            failed.append(str(caught.value))

        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(count)
        assert trio.current_time() - began < 8
        assert any("no answer within 1 s" in one for one in failed)
    finally:
        postgres.signal_all(signal.SIGCONT)
    with trio.fail_after(10):
        while True:
            try:
                assert await store.count("a") == 2
            except KeySourceUnavailable:
                await trio.sleep(0.1)
            else:
                break
    await store.aclose()


async def test_commits_stay_durable_when_the_server_changes_its_default(
    postgres: PostgresServer,
) -> None:
    import psycopg

    def show(cursor: Any) -> list[Any]:
        cursor.execute(
            "SELECT setting, reset_val FROM pg_settings WHERE name = 'synchronous_commit'"
        )
        return list(cursor.fetchone())

    store = postgres_store(postgres, f"test_{next(SCHEMAS)}")
    assert await store._run("a", show) == ["on", "on"]
    with psycopg.connect(postgres.url("public", "postgres"), autocommit=True) as connection:
        connection.execute("ALTER SYSTEM SET synchronous_commit = off")
        connection.execute("SELECT pg_reload_conf()")
        try:
            with trio.fail_after(10):
                while (await store._run("a", show))[1] != "off":  # noqa: ASYNC110
                    await trio.sleep(0.05)
            assert await store._run("a", show) == ["on", "off"]
        finally:
            connection.execute("ALTER SYSTEM RESET synchronous_commit")
            connection.execute("SELECT pg_reload_conf()")
    await store.aclose()


async def test_sessions_that_wait_for_a_standby_are_ended(
    postgres: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each call would leave one on the server, until it has no room for more."""
    import psycopg

    from hybridkex.qkd import postgres_connection

    monkeypatch.setattr(postgres_connection, "SILENT_SECONDS", 0.2)
    store = postgres_store(postgres, f"test_{next(SCHEMAS)}")
    with psycopg.connect(postgres.url("public", "postgres"), autocommit=True) as administrator:
        administrator.execute("ALTER SYSTEM SET synchronous_standby_names = 'away'")
        administrator.execute("SELECT pg_reload_conf()")
        try:
            with trio.fail_after(10):
                while True:
                    try:
                        await store.add("a", keys(1))
                    except OutcomeUnknown:  # the server has read its configuration
                        break
            assert await store.count("a"), "committed all the same"
            waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
            with trio.fail_after(10):
                while administrator.execute(waiting).fetchone() != (0,):  # noqa: ASYNC110
                    await trio.sleep(0.02)
        finally:
            administrator.execute("ALTER SYSTEM RESET synchronous_standby_names")
            administrator.execute("SELECT pg_reload_conf()")
    await store.aclose()


ODD_SETTINGS = (
    "row_security = off",
    "standard_conforming_strings = off",
    "bytea_output = escape",
    "datestyle = 'SQL, DMY'",
    "default_transaction_isolation = serializable",
    "extra_float_digits = -15",
    "statement_timeout = 1",
    "synchronous_commit = off",
)
"""What old applications make an administrator set for a server or a role."""


async def test_settings_and_rights_of_the_role(postgres: PostgresServer) -> None:
    """What keeps a KME from starting is found by ``kme serve --check``, which changes nothing."""
    import psycopg

    from hybridkex.qkd.postgres_store import PostgresKeyStore, check_store

    schema = f"test_{next(SCHEMAS)}"
    url = Secret(f"{postgres.url(schema)}&client_encoding=SQL_ASCII".encode())

    def refused(match: str) -> None:
        with pytest.raises(ConfigError, match=match):
            check_store(url, Seal(SEAL), owner="kme-a")
        with pytest.raises(ConfigError, match=match):
            PostgresKeyStore(url, SEAL, owner="kme-a")

    with psycopg.connect(postgres.url(schema, "postgres"), autocommit=True) as administrator:

        def read_only_is_refused() -> None:
            administrator.execute("ALTER ROLE kme SET default_transaction_read_only = on")
            try:
                refused("must name a server that can be written")
            finally:
                administrator.execute("ALTER ROLE kme RESET ALL")

        administrator.execute(f"CREATE SCHEMA {schema}")
        administrator.execute(f"GRANT USAGE ON SCHEMA {schema} TO kme")
        refused("permission denied for schema .* make the role the owner")
        administrator.execute(f"ALTER SCHEMA {schema} OWNER TO kme")
        read_only_is_refused()
        check_store(url, Seal(SEAL), owner="kme-a")
        assert administrator.execute("SELECT to_regclass('hybridkex_meta')").fetchone() == (None,)
        for change in ODD_SETTINGS:
            administrator.execute(f"ALTER ROLE kme SET {change}")
        try:
            store = PostgresKeyStore(url, SEAL, owner="kme-a")
            await store.add("a", keys(*range(40)))
            await store.accept("a", [block(one) for one in range(20)], master="m", slaves=["s"])
            ids = [key_id(one) for one in range(20)]
            found = await store.collect("a", ids, slave="s", master="m")
            assert [(one, key.reveal()) for one, key in found] == [
                (one, key.reveal()) for one, key in keys(*range(20))
            ]
            assert len(await store.reserve("a", 40)) == 20
            assert abs(store._ahead) < 3600
            await store.aclose()
        finally:
            administrator.execute("ALTER ROLE kme RESET ALL")
        read_only_is_refused()
        check_store(url, Seal(SEAL), owner="kme-a")
        administrator.execute("DELETE FROM hybridkex_meta")
        refused("hybridkex_meta is empty")


async def test_the_check_fails_where_a_delivery_would(
    postgres: PostgresServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Reading works all the same: a managed server is made read-only when its disk is full."""
    import psycopg

    schema = f"test_{next(SCHEMAS)}"
    store = postgres_store(postgres, schema)
    await store.check()
    with psycopg.connect(postgres.url("public", "postgres"), autocommit=True) as connection:
        for statement in (
            "SET default_transaction_read_only = on",
            "RESET default_transaction_read_only",
        ):
            connection.execute(f"ALTER SYSTEM {statement}")
            connection.execute("SELECT pg_reload_conf()")
            with trio.fail_after(10):
                while await fails(store.check) != statement.startswith("SET"):  # noqa: ASYNC110
                    await trio.sleep(0.05)
            assert await store.count("a") == 0
    with psycopg.connect(postgres.url(schema), autocommit=True) as connection:
        connection.execute("REVOKE INSERT ON spent FROM kme")
    for _ in range(30):  # the line is not repeated, although reading works
        assert await fails(store.check)
        assert await store.count("a") == 0
    with psycopg.connect(postgres.url(schema), autocommit=True) as connection:
        connection.execute("GRANT INSERT ON spent TO kme")
    await store.check()
    said = [one.getMessage() for one in caplog.records if "key store" in one.getMessage()]
    assert len(said) <= 6, said
    assert postgres.column(f"SELECT key_id FROM {schema}.spent") == set()
    await store.aclose()
    files = SqliteKeyStore(tmp_path / "db", SEAL)
    [pages] = files._db.execute("PRAGMA page_count").fetchone()
    files._db.execute(f"PRAGMA max_page_count = {pages + 8}")  # there is room for a row
    assert await fails(files.check)
    assert await files.count("a") == 0
    files._db.execute("PRAGMA max_page_count = 1000000")
    await files.check()
    await files.aclose()


async def fails(call: Callable[[], Awaitable[None]]) -> bool:
    try:
        await call()
    except KeySourceUnavailable:
        return True
    return False


async def test_what_was_marked_by_a_wrong_clock_is_free_when_it_is_right(
    postgres: PostgresServer,
) -> None:
    """The clock of the database was a day ahead: of the reservations of a process that was killed
    then, and of the jobs that were claimed."""
    import psycopg

    schema = f"test_{next(SCHEMAS)}"
    killed, store = (postgres_store(postgres, schema) for _ in range(2))
    await store.add("b", keys(1, 2, 3, 4))
    assert len(await killed.reserve("b", 4)) == 4
    assert await store.reserve("b", 4) == []
    assert await killed.claim("job", 60)
    assert not await store.claim("job", 60)
    with psycopg.connect(postgres.url(schema)) as connection:
        connection.execute("SET hybridkex.link = '*'")
        connection.execute("UPDATE material SET held_until = held_until + interval '1 day'")
        connection.execute("UPDATE hybridkex_jobs SET due = due + interval '1 day'")
    assert await store.claim("job", 60)
    assert not await store.claim("job", 60)
    assert await store.discard("b", [key_id(1)]) == [key_id(1)]
    await store.accept("b", [block(2)], master="m", slaves=["s"], peer_half=1)
    assert len(await store.reserve("b", 4)) == 2
    await killed.aclose()
    await store.aclose()


async def test_a_role_that_sees_every_row_is_named(
    postgres: PostgresServer, caplog: pytest.LogCaptureFixture
) -> None:
    from hybridkex.qkd.postgres_store import PostgresKeyStore

    schema = f"test_{next(SCHEMAS)}"
    await postgres_store(postgres, schema).aclose()
    assert "row-level" not in caplog.text
    url = Secret(postgres.url(schema, "postgres").encode())
    await PostgresKeyStore(url, SEAL, owner="kme-a").aclose()
    assert "the role postgres is exempt from row-level security" in caplog.text


async def test_a_check_writes_little(postgres: PostgresServer) -> None:
    """After a checkpoint, PostgreSQL logs each page that changes as a whole, and a load balancer
    checks each process all the time."""
    import psycopg

    schema = f"test_{next(SCHEMAS)}"
    store = postgres_store(postgres, schema)
    written = []
    with psycopg.connect(postgres.url(schema, "postgres"), autocommit=True) as connection:
        connection.execute(
            "INSERT INTO spent (link, key_id)"
            " SELECT 'b', gen_random_uuid()::text FROM generate_series(1, 20000)"
        )
        for _ in range(20):  # others may write in between: one undisturbed check is enough
            connection.execute("CHECKPOINT")
            query: LiteralString = "SELECT pg_wal_lsn_diff(pg_current_wal_lsn(), '0/0')"
            [before] = connection.execute(query).fetchone() or [0]
            await store.check()
            [after] = connection.execute(query).fetchone() or [0]
            written.append(after - before)
            if written[-1] < 200_000:
                break
    await store.aclose()
    assert 0 < min(written) < 200_000


async def test_an_old_server_and_a_pooler_that_drops_the_settings_are_refused(
    postgres: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    import psycopg

    from hybridkex.qkd import postgres_connection
    from hybridkex.qkd.postgres_connection import check_session, prepared

    conninfo, where = prepared(postgres.url("public"))
    with psycopg.connect(conninfo) as connection:
        check_session(connection, where)
        with monkeypatch.context() as patch:
            patch.setattr(postgres_connection, "OLDEST", 99)
            with pytest.raises(ConfigError, match=r"on PostgreSQL \d+: .* needs 99 or later"):
                check_session(connection, where)
    with (
        psycopg.connect(conninfo, options="-c statement_timeout=5000") as connection,
        pytest.raises(ConfigError, match="not through a pooler"),
    ):
        check_session(connection, where)


@pytest.fixture(scope="module")
def large(postgres: PostgresServer) -> "LargeStock":
    """A stock of 20,000 keys and 10,000 promises that the statistics of the database's planner take
    for empty. Each test works on what the one before it left."""
    large = LargeStock(postgres)
    trio.run(large.fill)
    return large


_READ: Final = (
    "SELECT (SELECT sum(seq_tup_read) FROM pg_stat_user_tables WHERE schemaname = %(schema)s)"
    " + (SELECT sum(idx_tup_read) FROM pg_stat_user_indexes WHERE schemaname = %(schema)s)"
)
_OTHERS: Final = (
    "SELECT count(*) FROM pg_stat_activity"
    " WHERE backend_type = 'client backend' AND pid != pg_backend_pid()"
)


class LargeStock:
    def __init__(self, server: PostgresServer) -> None:
        self._server = server
        self._schema = f"test_{next(SCHEMAS)}"
        self.ids = [key_id(number) for number in range(20_000)]

    async def fill(self) -> None:
        before = await self.processor_time()
        store = self.open()
        for start in range(0, len(self.ids), 5000):
            part = self.ids[start : start + 5000]
            await store.add("a", [(one, Secret(bytes(32))) for one in part])
        relayed = [self.relayed(-number) for number in range(1, 10_001)]
        for start in range(0, len(relayed), 5000):
            part = relayed[start : start + 5000]
            await store.accept("a", part, master="m", slaves=["s"])
        await store.aclose()
        self.cost_of_filling = await self.processor_time() - before

    @staticmethod
    def relayed(number: int) -> Allotment:
        value = Secret(bytes(32))
        return Allotment(blocks=(key_id((1 << 32) + number),), size=32, value=value)

    async def processor_time(self) -> float:
        """Of the server's processes, once those for our connections have ended."""
        assert self._server.process is not None
        await self._alone()
        return cpu(self._server.process.pid, children=True)

    async def _alone(self) -> None:
        """The server's processes tell what they have read when they end, and not always before."""
        await trio_until(lambda: not self._ask(_OTHERS))

    def open(self, seal_key: Secret = SEAL, *read_keys: Secret) -> KeyStore:
        return postgres_store(self._server, self._schema, seal_key=seal_key, read_keys=read_keys)

    def url(self, role: str = "kme") -> str:
        return self._server.url(self._schema, role)

    def _ask(self, query: LiteralString) -> int:
        import psycopg

        with psycopg.connect(self._server.url(self._schema)) as connection:
            [(number,)] = connection.execute(query, {"schema": self._schema}).fetchall()
            return int(number)

    async def rows_read(self, work: Callable[[KeyStore], Awaitable[None]], *keys: Secret) -> int:
        """How many rows the database has read for some work."""
        await self._alone()
        before = self._ask(_READ)
        store = self.open(*keys)
        await work(store)
        await store.aclose()
        await self._alone()
        return self._ask(_READ) - before


async def test_the_work_does_not_grow_with_the_stock(large: LargeStock) -> None:
    async def work(store: KeyStore) -> None:
        for half in (0, 1) * 5:
            [one] = await store.reserve("a", 1, half=half)
            await store.allot("a", [Allotment(blocks=(one.key_id,), size=32)], master="m")
            [one] = await store.reserve("a", 1, half=half)
            await store.release("a", [one.key_id])
            allotment = Allotment(blocks=(one.key_id,), size=32)
            await store.accept("a", [allotment], master="m", slaves=["s"])
            await store.collect("a", [one.key_id], slave="s", master="m")
            await store.add("a", [(str(uuid.uuid4()), Secret(bytes(32)))])
            await store.count("a")
            await store.discard("a", [large.ids[-1]])
        await store.expire(keys_before=0, tombstones_before=0)

    assert await large.rows_read(work) < 3000


async def test_keys_are_looked_up_by_their_ids(large: LargeStock) -> None:
    """A call for a hundred keys reads a few rows for each, however many the link has."""

    async def work(store: KeyStore) -> None:
        new = [str(uuid.uuid4()) for _ in range(100)]
        await store.add("a", [(one, Secret(bytes(32))) for one in new])
        found = [one.key_id for one in await store.reserve("a", 100)]
        await store.release("a", found)
        found = [one.key_id for one in await store.reserve("a", 100)]
        await store.allot("a", [Allotment(blocks=(one,), size=32) for one in found], master="m")
        await store.unknown("a", new)
        await store.never_here("a", new)
        blocks = [Allotment(blocks=(one,), size=32) for one in new[:50]]
        await store.accept("a", blocks, master="m", slaves=["s"])
        await store.collect("a", new[:50], slave="s", master="m")
        relayed = [large.relayed(number) for number in range(100)]
        await store.accept("a", relayed, master="m", slaves=["s"])
        await store.void("a", [one.key_id for one in relayed])
        await store.discard("a", new[50:])

    assert await large.rows_read(work) < 20_000


async def test_keys_that_a_long_transaction_keeps_are_passed_over(
    large: LargeStock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dump, or a forgotten session: what was drawn since its start stays in the tables."""
    import psycopg

    from hybridkex.qkd import postgres_store as module

    monkeypatch.setattr(module, "WALK_SECONDS", 3600.0)

    async def draw(store: KeyStore, number: int) -> None:
        found = await store.reserve("a", number)
        blocks = [Allotment(blocks=(one.key_id,), size=32) for one in found]
        await store.allot("a", blocks, master="m")

    async def work(store: KeyStore) -> None:
        for _ in range(30):
            await draw(store, 1)

    with psycopg.connect(large.url("postgres")) as connection:
        connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        connection.execute("SELECT count(*) FROM material")
        store = large.open()
        for _ in range(5):
            await draw(store, 1000)
        await store.aclose()
        assert await large.rows_read(work) < 20_000


async def test_keys_that_were_released_are_not_forgotten(
    postgres: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hybridkex.qkd import postgres_store as module

    store = postgres_store(postgres, f"test_{next(SCHEMAS)}")
    await store.add("b", keys(*range(2, 40, 2)))
    for seconds, number in ((60.0, 6), (0.0, 2)):
        monkeypatch.setattr(module, "WALK_SECONDS", seconds)
        store._from_the_start = 0.0
        [one] = await store.reserve("b", 1)
        assert one.key_id == key_id(2)
        [other] = await store.reserve("b", 1)
        await store.release("b", [one.key_id])
        [third] = await store.reserve("b", 1)
        assert third.key_id == key_id(number), "the oldest, after some time"
        await store.release("b", [other.key_id, third.key_id])
    assert len(await store.reserve("b", 40)) == 19
    await store.aclose()


async def test_the_blocks_of_a_long_key_are_looked_up(large: LargeStock) -> None:
    """Processor time: the database compared each block with each row of the stock, once read."""

    async def work(store: KeyStore) -> None:
        many = await store.reserve("a", 256)
        await store.release("a", [one.key_id for one in many])
        blocks = tuple(one.key_id for one in await store.reserve("a", 256))
        await store.allot("a", [Allotment(blocks=blocks, size=32 * 256)], master="m")

    before = await large.processor_time()
    await large.rows_read(work)
    assert await large.processor_time() - before < 3 * large.cost_of_filling


async def test_another_sealing_key_takes_a_few_walks_through_the_stock(
    large: LargeStock, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hybridkex.qkd import postgres_store as module

    monkeypatch.setattr(module, "TRANSACTION_SECONDS", 0.0)

    async def work(store: KeyStore) -> None:
        while not await store.renew():
            pass

    assert await large.rows_read(work, Secret(b"s" * 32), SEAL) < 10 * len(large.ids)


async def test_a_wrong_clock_of_a_process_makes_no_key_old(
    postgres: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The processes of a database go by its clock."""
    from hybridkex.qkd import postgres_store as module

    store = postgres_store(postgres, f"test_{next(SCHEMAS)}")
    await store.add("a", keys(1, 2))
    for wrong in (86_400.0, -86_400.0):
        now = time.time() + wrong
        clock = SimpleNamespace(time=lambda now=now: now, monotonic=time.monotonic)
        monkeypatch.setattr(module, "time", clock)
        assert await store.expire(keys_before=now - 600, tombstones_before=now - 600) == 0
        ids, _ = await store.shared_ids("a", created_before=now - 600)
        assert ids == []
        ids, _ = await store.shared_ids("a", created_before=now + 600)
        assert ids == [key_id(2)]
        [found] = await store.reserve("a", 1)
        assert abs(found.created - now) < 60
        await store.release("a", [found.key_id])
    await store.aclose()


async def test_the_tables_of_version_1_are_converted(postgres: PostgresServer) -> None:
    import psycopg

    from hybridkex.qkd.postgres_schema import TABLES
    from hybridkex.qkd.store import Seal, place_of

    schema = f"test_{next(SCHEMAS)}"
    with psycopg.connect(postgres.url("public")) as connection:
        connection.execute(f"CREATE SCHEMA {schema}")
    with psycopg.connect(postgres.url(schema)) as connection:
        for statement in TABLES:
            connection.execute(statement)
        seal = Seal(SEAL).seal(Secret(b"seal"), place_of("meta", "kme-a"))
        connection.execute("INSERT INTO hybridkex_meta VALUES (true, 1, 'kme-a', %s)", (seal,))
    for _ in range(2):
        store = postgres_store(postgres, schema)
        await store.add("a", keys(1))
        assert await store.count("a") == 1
        assert await store.claim("job", 0)
        await store.aclose()


async def test_a_server_that_is_killed_and_comes_back(
    postgres: PostgresServer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under load; every key is given at most once, and what was given stays so."""
    from hybridkex.qkd import postgres_store as module

    monkeypatch.setattr(module, "WAIT_SECONDS", 1.0)
    store = postgres_store(postgres, f"test_{next(SCHEMAS)}")
    numbers = range(1, 201)
    await store.add("a", keys(*numbers))
    for number in numbers:
        await store.accept("a", [block(number)], master="m", slaves=["s"])
    given: list[int] = []
    failed: list[int] = []

    async def collect(part: range) -> None:
        for number in part:
            try:
                await store.collect("a", [key_id(number)], slave="s", master="m")
            except KeySourceUnavailable:
                failed.append(number)
            else:
                given.append(number)

    began = trio.current_time()
    async with trio.open_nursery() as nursery:
        for start in range(4):
            nursery.start_soon(collect, range(1 + start, 201, 4))
        while len(given) < 40:  # noqa: ASYNC110
            await trio.sleep(0.001)
        await trio.to_thread.run_sync(postgres.stop)
        while not failed:  # noqa: ASYNC110
            await trio.sleep(0.05)
        await trio.to_thread.run_sync(postgres.start)
    assert trio.current_time() - began < 60
    assert set(given).isdisjoint(failed)
    lost = 0
    for number in numbers:
        try:
            await store.collect("a", [key_id(number)], slave="s", master="m")
        except KeyConsumed:
            lost += number not in given
        else:
            assert number in failed
    assert lost <= 4, "only what was in flight"
    told = [
        record.getMessage()
        for record in caplog.records
        if record.name == "hybridkex.qkd.postgres_store" and "fsync" not in record.getMessage()
    ]
    assert [("failed" in one, "works again" in one) for one in told[:2]] == [
        (True, False),
        (False, True),
    ]
    await store.aclose()
