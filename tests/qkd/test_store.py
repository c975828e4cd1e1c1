"""The key database: one transaction for each step, and nothing readable on the disk."""

import sqlite3
import uuid
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path

import pytest

from hybridkex.errors import (
    ConfigError,
    KeyConsumed,
    KeyExpired,
    KeySourceUnavailable,
    KeyUnauthorized,
    KeyUnknown,
)
from hybridkex.qkd.store import (
    Allotment,
    Refused,
    SqliteKeyStore,
    read_key_file,
    write_key_file,
)
from hybridkex.secret import Secret


def key_id(number: int) -> uuid.UUID:
    return uuid.UUID(int=(7 << 64) + number)


def keys(*numbers: int) -> list[tuple[uuid.UUID, Secret]]:
    return [(key_id(number), Secret(bytes([number]) * 32)) for number in numbers]


def block(*numbers: int, size: int = 32) -> Allotment:
    return Allotment(blocks=tuple(key_id(number) for number in numbers), size=size)


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[SqliteKeyStore]:
    write_key_file(tmp_path / "key")
    store = SqliteKeyStore(tmp_path / "db", read_key_file(tmp_path / "key"))
    yield store
    await store.aclose()


async def test_reserve_own_half_first_and_never_twice(store: SqliteKeyStore) -> None:
    await store.add("b", keys(1, 2, 3, 4))
    first = await store.reserve("b", 3, half=0)
    assert [m.key_id for m in first] == [key_id(2), key_id(4), key_id(1)]
    assert [m.key.reveal()[0] for m in first] == [2, 4, 1]
    assert [m.key_id for m in await store.reserve("b", 3)] == [key_id(3)]
    assert await store.reserve("other", 1) == []
    await store.release([key_id(2)])
    assert [m.key_id for m in await store.reserve("b", 3, skip=[key_id(4)])] == [key_id(2)]


async def test_allot_and_collect(store: SqliteKeyStore) -> None:
    await store.add("b", keys(1, 2, 3))
    await store.allot("b", [block(1, 2, size=40)], master="m", slaves=["s", "t"])
    assert await store.count("b") == 1
    for slave in ("s", "t"):
        [(found, key)] = await store.collect([key_id(1)], slave=slave, master="m")
        assert (found, key.reveal()) == (key_id(1), bytes([1]) * 32 + bytes([2]) * 8)
        with pytest.raises(KeyConsumed):
            await store.collect([key_id(1)], slave=slave, master="m")
    with pytest.raises(KeyUnauthorized):
        await store.collect([key_id(1)], slave="u", master="m")
    with pytest.raises(KeyUnknown):
        await store.collect([key_id(1)], slave="s", master="n")
    with pytest.raises(KeyUnknown):
        await store.collect([key_id(2)], slave="s", master="m")
    with pytest.raises(KeyConsumed):
        await store.allot("b", [block(3), block(1)], master="m")
    assert await store.count("b") == 1, "the transaction was undone as a whole"


async def test_what_was_here_does_not_return(store: SqliteKeyStore) -> None:
    await store.add("b", keys(1, 2))
    await store.allot("b", [block(1)], master="m")
    await store.void("b", [key_id(2), key_id(3)])
    await store.add("b", keys(1, 2, 3))
    assert await store.count("b") == 0


async def test_accept_is_all_or_nothing_and_says_why(store: SqliteKeyStore) -> None:
    await store.add("a", keys(1, 2, 3, 4))
    await store.accept("a", [block(1)], master="m", slaves=["s"])
    mine = await store.reserve("a", 2, half=0)
    assert [m.key_id for m in mine] == [key_id(2), key_id(4)]
    with pytest.raises(Refused) as refused:
        await store.accept(
            "a",
            [block(1), block(2), block(3), block(9)],
            master="m",
            slaves=["s"],
            peer_half=1,
        )
    assert refused.value.reasons == {key_id(1): "spent", key_id(2): "busy", key_id(9): "unknown"}
    with pytest.raises(Refused):
        await store.accept("a", [block(3, 3)], master="m", slaves=["s"], peer_half=1)
    assert await store.count("a") == 3
    # A block of the peer's half goes to the peer, although we have reserved it.
    await store.accept("a", [block(2)], master="m", slaves=["s"], peer_half=0)
    with pytest.raises(KeyConsumed):
        await store.allot("a", [block(2)], master="x")


async def test_a_relayed_key_is_taken_once(store: SqliteKeyStore) -> None:
    relayed = Allotment(blocks=(key_id(1),), size=16, value=Secret(b"v" * 16))
    await store.accept("a", [relayed], master="m", slaves=["s"])
    with pytest.raises(Refused):
        await store.accept("a", [relayed], master="m", slaves=["s"])
    [(_, key)] = await store.collect([key_id(1)], slave="s", master="m")
    assert key.reveal() == b"v" * 16


async def test_expiry(store: SqliteKeyStore) -> None:
    await store.add("a", keys(1, 2, 3))
    await store.allot("a", [block(1)], master="m", slaves=["s"])
    assert await store.expire(keys_before=0, tombstones_before=0) == 0
    assert await store.expire(keys_before=2e10, tombstones_before=0) == 3
    with pytest.raises(KeyExpired):
        await store.collect([key_id(1)], slave="s", master="m")
    assert await store.count("a") == 0
    await store.expire(keys_before=0, tombstones_before=2e10)
    with pytest.raises(KeyUnknown):
        await store.collect([key_id(1)], slave="s", master="m")


async def test_void_spares_what_was_delivered(store: SqliteKeyStore) -> None:
    await store.add("a", keys(1, 2))
    await store.accept("a", [block(1), block(2)], master="m", slaves=["s"])
    await store.collect([key_id(1)], slave="s", master="m")
    await store.void("a", [key_id(1), key_id(2)])
    with pytest.raises(KeyConsumed, match="delivered"):
        await store.collect([key_id(1)], slave="s", master="m")
    with pytest.raises(KeyConsumed, match="void"):
        await store.collect([key_id(2)], slave="s", master="m")


def contents(folder: Path) -> list[bytes]:
    files = list(folder.iterdir())
    assert all(path.stat().st_mode & 0o077 == 0 for path in files), "for the owner alone"
    return [path.read_bytes() for path in files]


async def test_a_key_is_in_no_file(tmp_path: Path) -> None:
    write_key_file(tmp_path / "key")
    secret = b"a QKD key that no disk may show!"
    store = SqliteKeyStore(tmp_path / "db", read_key_file(tmp_path / "key"))
    await store.add("a", [(key_id(1), Secret(secret)), (key_id(2), Secret(secret[::-1]))])
    await store.allot("a", [block(1)], master="m", slaves=["s"])
    on_disk = b"".join(contents(tmp_path))
    assert key_id(1).bytes in on_disk, "the write-ahead log is among them"
    for value in (secret, secret[::-1], secret.hex().encode()):
        assert value not in on_disk
    await store.aclose()
    assert secret not in b"".join(contents(tmp_path))


async def test_a_delivered_key_is_in_no_file_even_sealed(tmp_path: Path) -> None:
    """Whoever steals the key file too must not find it: not in the tables, not in the log."""
    write_key_file(tmp_path / "key")
    store = SqliteKeyStore(tmp_path / "db", read_key_file(tmp_path / "key"))
    await store.add("a", keys(1, 2))
    await store.allot("a", [block(1)], master="m", slaves=["s"])
    with closing(sqlite3.connect(tmp_path / "db")) as other:
        [(granted,)] = other.execute("SELECT sealed FROM grants").fetchall()
        [(waiting,)] = other.execute("SELECT sealed FROM material").fetchall()
    await store.collect([key_id(1)], slave="s", master="m")
    assert granted in b"".join(contents(tmp_path)), "the log still has it: the search works"
    await store.scrub()
    assert granted not in b"".join(contents(tmp_path))
    assert waiting in b"".join(contents(tmp_path))
    assert (tmp_path / "db-wal").stat().st_size == 0
    await store.aclose()


async def test_a_row_cannot_pose_as_another(store: SqliteKeyStore) -> None:
    await store.add("a", keys(1, 2))
    await store.allot("a", [block(1)], master="m", slaves=["s"])
    await store.allot("a", [block(2)], master="m", slaves=["t"])
    store._db.execute("UPDATE grants SET slave = 'x' WHERE slave = 's'")
    with pytest.raises(KeySourceUnavailable, match="InvalidTag"):
        await store.collect([key_id(1)], slave="x", master="m")


def test_key_files(tmp_path: Path) -> None:
    path = tmp_path / "key"
    with pytest.raises(ConfigError, match="cannot read"):
        read_key_file(path)
    write_key_file(path)
    assert len(read_key_file(path)) == 32
    with pytest.raises(ConfigError, match="cannot make"):
        write_key_file(path)
    path.chmod(0o644)
    with pytest.raises(ConfigError, match="mode 600"):
        read_key_file(path)
    path.chmod(0o600)
    for text in ("00" * 31, "not hexadecimal, and secret"):
        path.write_text(text)
        with pytest.raises(ConfigError) as caught:
            read_key_file(path)
        assert text not in str(caught.value)
