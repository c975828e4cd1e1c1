"""Another sealing key, without a stop: on SQLite and on PostgreSQL."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
import trio.testing
from forked import Forkserver
from test_store_battery import SCHEMAS, block, key_id, keys, postgres_store
from waiting import until

from hybridkex.cli import main
from hybridkex.errors import ConfigError, KeySourceUnavailable
from hybridkex.qkd.sqlite_store import SqliteKeyStore
from hybridkex.qkd.store import KeyStore, write_key_file
from hybridkex.secret import Secret
from interop.postgres import PostgresServer

OLD, NEW, NEWER = (Secret(bytes([number]) * 32) for number in (1, 2, 3))
Open = Callable[..., KeyStore]


@pytest.fixture(params=["sqlite", "postgres"])
def opened(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Open:
    """Opens the same store, with these keys."""
    monkeypatch.setattr(KeyStore, "PAGE", 2)
    if request.param == "sqlite":
        return lambda key, *others: SqliteKeyStore(tmp_path / "db", key, read_keys=others)
    from hybridkex.qkd import postgres_store as module

    monkeypatch.setattr(module, "TRANSACTION_SECONDS", 0.0)
    server, schema = request.getfixturevalue("postgres"), f"sealing_{next(SCHEMAS)}"
    return lambda key, *others: postgres_store(server, schema, seal_key=key, read_keys=others)


async def fill(store: KeyStore) -> None:
    await store.add("a", keys(1, 2, 3, 4, 5))
    await store.accept("a", [block(1), block(2)], master="m", slaves=["s", "t"])


async def check(store: KeyStore) -> None:
    """Every key that :func:`fill` stored is there, and can be delivered."""
    for slave in ("s", "t"):
        found = await store.collect("a", [key_id(1), key_id(2)], slave=slave, master="m")
        assert [key.reveal()[0] for _, key in found] == [1, 2]
    found_material = await store.reserve("a", 9)
    assert sorted(one.key.reveal()[0] for one in found_material)[:3] == [3, 4, 5]


async def renewed(store: KeyStore) -> None:
    with trio.fail_after(10):
        while not await store.renew():
            pass


async def test_a_new_key_while_the_store_is_open(opened: Open) -> None:
    store = opened(OLD)
    await fill(store)
    assert await store.renew()
    with pytest.raises(ConfigError, match="to replace it by this one, in read_key_files"):
        await store.change_keys(NEW)
    await store.change_keys(NEW, [OLD])
    await store.add("a", keys(6))
    await renewed(store)
    await store.aclose()
    with pytest.raises(ConfigError, match="not the one under which"):
        opened(OLD)
    store = opened(NEW)
    await check(store)
    assert await store.count("a") == 4
    await store.aclose()


async def test_a_key_that_rows_need_cannot_be_left_out(opened: Open) -> None:
    store = opened(OLD)
    await fill(store)
    await store.aclose()
    store = opened(NEW, OLD)
    for wrong in ((NEW, []), (NEWER, [NEW])):
        with pytest.raises(ConfigError, match="still encrypted under an earlier key file"):
            await store.change_keys(wrong[0], wrong[1])
    await store.aclose()
    with pytest.raises(ConfigError, match="still encrypted under an earlier key file"):
        opened(NEW)
    store = opened(NEWER, NEW, OLD)  # a second change before the first is done
    await renewed(store)
    await store.aclose()
    store = opened(NEWER)
    await check(store)
    await store.aclose()


async def test_another_new_key_while_the_first_is_being_taken_up(opened: Open) -> None:
    """The walk through the keys began under the first one, and does not count for the second."""
    store = opened(OLD)
    await store.add("a", keys(*range(40)))
    await store.change_keys(NEW, [OLD])
    async with trio.open_nursery() as nursery:
        nursery.start_soon(store.renew)
        await trio.testing.wait_all_tasks_blocked()
        await store.change_keys(NEWER, [OLD, NEW])
    with pytest.raises(ConfigError, match="still encrypted under an earlier key file"):
        await store.change_keys(NEWER)
    await renewed(store)
    await store.change_keys(NEWER)
    assert len(await store.reserve("a", 40)) == 40
    await store.aclose()


async def test_a_key_that_was_replaced_is_not_taken_up_again(opened: Open) -> None:
    """As when one of several configurations has the files the wrong way round."""
    store = opened(OLD)
    await store.aclose()
    store = opened(NEW, OLD)
    await renewed(store)
    await store.aclose()
    store = opened(OLD, NEW)
    await fill(store)
    await store.aclose()
    store = opened(NEW)
    await check(store)
    await store.aclose()


async def test_another_process_follows(
    postgres: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It encrypts under the new key as soon as another process does; one that lacks the key
    refuses, erases nothing, and goes on once it has the key."""
    from hybridkex.qkd import postgres_store as module

    schema = f"sealing_{next(SCHEMAS)}"
    first, second, third = (
        postgres_store(postgres, schema, seal_key=OLD, read_keys=others)
        for others in ((), (NEW,), ())
    )
    await fill(first)
    await first.change_keys(NEW, [OLD])
    await second.add("a", keys(6))
    for _ in range(2):
        with pytest.raises(KeySourceUnavailable, match="the key file is not the one"):
            await third.reserve("a", 9)
    # Not done before transactions that began under the earlier key must have ended.
    assert not await first.renew()
    assert not await second.renew()
    monkeypatch.setattr(module, "TRANSACTION_SECONDS", 0.0)
    await renewed(first)
    assert await second.renew()
    await third.change_keys(NEW)
    assert await third.count("a") == 4
    await check(third)
    for store in (first, second, third):
        await store.aclose()


async def test_a_promise_that_is_encrypted_anew_stays_the_same(postgres: PostgresServer) -> None:
    import psycopg

    schema = f"sealing_{next(SCHEMAS)}"
    store = postgres_store(postgres, schema)
    await fill(store)
    with psycopg.connect(postgres.url(schema), autocommit=True) as connection:
        connection.execute("SELECT set_config('hybridkex.link', 'a', false)")
        connection.execute("UPDATE grants SET sealed = 'x' WHERE slave = 's'")
        for change in ("slave = 'u'", "master = 'n'", "blocks = 7", "created = 0", "key_id = 'x'"):
            with pytest.raises(psycopg.errors.CheckViolation):
                connection.execute(
                    f"UPDATE grants SET {change} WHERE slave = 't' AND key_id = %s", (key_id(2),)
                )
    await store.aclose()


@pytest.mark.parametrize("kind", ["change", "renewal"])
async def test_while_keys_are_drawn(opened: Open, kind: str) -> None:
    store = opened(OLD)
    numbers = range(1, 61)
    await store.add("a", keys(*numbers))
    await store.accept("a", [block(n) for n in numbers], master="m", slaves=["s"])
    given: list[int] = []

    async def collect(part: range) -> None:
        for number in part:
            [(_, key)] = await store.collect("a", [key_id(number)], slave="s", master="m")
            assert key.reveal()[0] == number
            given.append(number)

    async with trio.open_nursery() as nursery:
        for start in range(3):
            nursery.start_soon(collect, range(1 + start, 61, 3))
        await store.change_keys(NEW, [OLD])
        if kind == "change":
            await store.change_keys(NEWER, [NEW, OLD])
        await renewed(store)
    assert sorted(given) == list(numbers)
    await store.aclose()


def test_a_hang_up_changes_the_key_file(hybridkex: Forkserver, tmp_path: Path) -> None:
    """The manual's steps, with a KME that goes on all the time."""
    site = tmp_path / "s"
    assert main(["kme", "dev-up", str(site), "--ports", "0,0", "--no-serve"]) == 0
    path = site / "kme.toml"
    before = path.read_text()
    server = hybridkex.start("kme", "serve", path)
    until(lambda: server.said().count(b"listens on") == 2, server)
    write_key_file(site / "kme-a" / "new.key")
    old, new = 'key_file = "kme-a/store.key"', 'key_file = "kme-a/new.key"'

    def hang_up(text: str, said: str) -> None:
        count = server.told().decode().count(said)
        path.write_text(text)
        os.kill(server.pid, signal.SIGHUP)
        until(lambda: server.told().decode().count(said) > count, server)

    hang_up(before.replace(old, new), "not reloaded, the old configuration stays: kme-a:")
    both = before.replace(old, f'{new}\nread_key_files = ["kme-a/store.key"]')
    hang_up(both, " reloaded")
    until(lambda: b"can be removed" in server.told(), server)
    after = before.replace(old, new)
    hang_up(after, " reloaded")
    server.send_signal(signal.SIGTERM)
    assert server.wait() == 0
    (site / "kme-a" / "store.key").unlink()
    server = hybridkex.start("kme", "serve", path)
    until(lambda: server.said().count(b"listens on") == 2, server)
