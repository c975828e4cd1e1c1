"""The key database: one transaction for each step, and nothing readable on the disk."""

import ast
import errno
import inspect
import os
import re
import sqlite3
import subprocess
import sys
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, NoReturn

import pytest
import trio
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

import hybridkex.qkd.sqlite_store as store_module
from hybridkex.errors import (
    ConfigError,
    KeyConsumed,
    KeySourceError,
    KeySourceUnavailable,
)
from hybridkex.qkd.sqlite_store import SqliteKeyStore
from hybridkex.qkd.store import (
    Allotment,
    BlocksRefused,
    read_key_file,
    write_key_file,
)
from hybridkex.secret import Secret


def key_id(number: int) -> str:
    return str(uuid.UUID(int=(7 << 64) + number))


def keys(*numbers: int) -> list[tuple[str, Secret]]:
    return [(key_id(number), Secret(bytes([number]) * 32)) for number in numbers]


def block(*numbers: int, size: int = 32) -> Allotment:
    return Allotment(blocks=tuple(key_id(number) for number in numbers), size=size)


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[SqliteKeyStore]:
    write_key_file(tmp_path / "key")
    store = SqliteKeyStore(tmp_path / "db", read_key_file(tmp_path / "key"))
    yield store
    await store.aclose()


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
    assert key_id(1).encode() in on_disk, "the write-ahead log is among them"
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
    [(granted,)] = store._db.execute("SELECT sealed FROM grants").fetchall()
    [(waiting,)] = store._db.execute("SELECT sealed FROM material").fetchall()
    await store.collect("a", [key_id(1)], slave="s", master="m")
    assert granted in b"".join(contents(tmp_path)), "the log still has it: the search works"
    await store.scrub()
    assert granted not in b"".join(contents(tmp_path))
    assert waiting in b"".join(contents(tmp_path))
    assert (tmp_path / "db-wal").stat().st_size == 0
    await store.aclose()


def alter(store: SqliteKeyStore, statement: str, *values: str) -> None:
    """Change rows as one who can write the file, and removes the triggers that refuse it."""
    refusing = "SELECT name FROM sqlite_master WHERE type = 'trigger' AND sql LIKE '%RAISE%'"
    for (name,) in store._db.execute(refusing).fetchall():
        store._db.execute(f"DROP TRIGGER {name}")
    store._db.execute(statement, values)


async def test_a_row_cannot_pose_as_another(store: SqliteKeyStore) -> None:
    await store.add("a", keys(1, 2))
    await store.allot("a", [block(1)], master="m", slaves=["s"])
    await store.allot("a", [block(2)], master="m", slaves=["t"])
    alter(store, "UPDATE grants SET slave = 'x' WHERE slave = 's'")
    with pytest.raises(KeySourceUnavailable, match="damaged"):
        await store.collect("a", [key_id(1)], slave="x", master="m")


def test_key_files(tmp_path: Path) -> None:
    path = tmp_path / "key"
    with pytest.raises(ConfigError, match="cannot read"):
        read_key_file(path)
    write_key_file(path)
    assert len(read_key_file(path)) == 32
    with pytest.raises(ConfigError, match="cannot write"):
        write_key_file(path)
    path.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        read_key_file(path)
    path.chmod(0o600)
    for text in ("00" * 31, "not hexadecimal, and secret"):
        path.write_text(text)
        with pytest.raises(ConfigError) as caught:
            read_key_file(path)
        assert text not in str(caught.value)


# -- state belongs to the link that made it


async def snapshot(store: SqliteKeyStore, link: str) -> list[Any]:
    return [
        store._db.execute(f"SELECT * FROM {table} WHERE link = ?", (link,)).fetchall()
        for table in ("material", "grants", "spent")
    ]


def names_the_keys_of_another(
    ids: list[str],
) -> dict[str, Callable[[SqliteKeyStore], Awaitable[Any]]]:
    """Everything that a peer, or an SAE of another link, can ask for."""
    one = [Allotment(blocks=(key_id,), size=32) for key_id in ids]
    relayed = [Allotment(blocks=(key_id,), size=4, value=Secret(b"evil")) for key_id in ids]
    return {
        "void": lambda s: s.void("c", ids),
        "discard": lambda s: s.discard("c", ids),
        "accept": lambda s: s.accept("c", one, master="eve", slaves=["s"]),
        "accept by value": lambda s: s.accept("c", relayed, master="eve", slaves=["s"]),
        "accept by value, posing as the master": lambda s: s.accept(
            "c", relayed, master="m", slaves=["s"]
        ),
        "add": lambda s: s.add("c", [(key_id, Secret(bytes(32))) for key_id in ids]),
        "allot": lambda s: s.allot("c", one, master="eve", slaves=["s"]),
        "release": lambda s: s.release("c", ids),
        "collect": lambda s: s.collect("c", ids[:1], slave="s", master="m"),
        "collect as another slave": lambda s: s.collect("a", ids[:1], slave="x", master="m"),
        "collect of another master": lambda s: s.collect("a", ids[:1], slave="s", master="x"),
    }


@pytest.mark.parametrize("call", names_the_keys_of_another([]))
async def test_no_call_for_one_link_touches_another(store: SqliteKeyStore, call: str) -> None:
    await store.add("a", keys(1, 2, 3, 4))
    await store.accept("a", [block(1)], master="m", slaves=["s"])
    await store.accept("a", [block(2)], master="m", slaves=["s"])
    await store.collect("a", [key_id(2)], slave="s", master="m")
    await store.void("a", [key_id(5)])
    [reserved] = await store.reserve("a", 1, half=1)
    before = await snapshot(store, "a")
    everything = [key_id(number) for number in range(1, 7)]
    with suppress(KeySourceError, BlocksRefused):
        await names_the_keys_of_another(everything)[call](store)
    assert await snapshot(store, "a") == before
    [free] = await store.reserve("a", 9)
    assert free.key_id != reserved.key_id, "the reservation holds"
    [(_, key)] = await store.collect("a", [key_id(1)], slave="s", master="m")
    assert key.reveal() == bytes([1]) * 32


def test_every_statement_names_the_link() -> None:
    """A statement on the three tables that does not, and is no work of the clock, is a mistake."""
    source = ast.parse(inspect.getsource(store_module.SqliteKeyStore))
    texts = [node.value for node in ast.walk(source) if isinstance(node, ast.Constant)]
    statements = [
        text
        for text in texts
        if isinstance(text, str) and re.match(r"(SELECT|INSERT|UPDATE|DELETE) ", text)
    ]
    assert len(statements) > 12
    for statement in statements:
        if statement in ("SELECT ", "DELETE FROM material", "DELETE FROM grants"):
            continue  # of a move of all keys into another store
        if "meta" in statement or "old_" in statement or "created < ?" in statement:
            continue
        assert (
            re.search(r"link( = | IN |,)", statement)
            or re.search(r"INTO (spent|grants) VALUES \(\?", statement)
            or statement == "DELETE FROM spent WHERE at < ?"
            or statement.startswith("SELECT name FROM sqlite_master")
        ), statement


# -- one process, one file


OPEN = """
import sys
from pathlib import Path
from hybridkex.errors import ConfigError
from hybridkex.qkd.sqlite_store import SqliteKeyStore
from hybridkex.qkd.store import read_key_file
try:
    store = SqliteKeyStore(Path(sys.argv[1]), read_key_file(Path(sys.argv[2])))
except ConfigError as error:
    print("refused:", error, flush=True)
else:
    print("open", flush=True)
    sys.stdin.read()
"""


def opener(path: Path, key_file: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", OPEN, str(path), str(key_file)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def state_of(folder: Path) -> dict[str, tuple[int, int]]:
    return {p.name: (p.stat().st_mtime_ns, p.stat().st_size) for p in folder.iterdir()}


def test_a_second_process_is_refused_until_the_first_has_ended(tmp_path: Path) -> None:
    """Under any name of the file, without touching it; and the lock does not outlive kill -9."""
    write_key_file(tmp_path / "key")
    folder = tmp_path / "folder"
    folder.mkdir()
    path = folder / "db"
    (tmp_path / "link").symlink_to(path)
    (tmp_path / "folder-link").symlink_to(folder)
    with opener(path, tmp_path / "key") as first:
        assert said(first) == "open\n"
        before = state_of(folder)
        for name in (path, tmp_path / "link", tmp_path / "folder-link" / "db"):
            with opener(name, tmp_path / "key") as second:
                assert "in use by another process" in said(second)
        # In this process, too.
        with pytest.raises(ConfigError, match="in use"):
            SqliteKeyStore(path, read_key_file(tmp_path / "key"))
        assert state_of(folder) == before
        first.kill()
        first.wait()
        with opener(tmp_path / "link", tmp_path / "key") as third:
            assert said(third) == "open\n"
            third.communicate("")
    assert state_of(tmp_path).keys() == {"key", "folder", "link", "folder-link"}


async def test_a_file_with_two_names_is_refused(tmp_path: Path) -> None:
    """The log is named after the file: under the other name, what was delivered would be back."""
    write_key_file(tmp_path / "key")
    store = SqliteKeyStore(tmp_path / "db", read_key_file(tmp_path / "key"))
    await store.aclose()
    (tmp_path / "other").hardlink_to(tmp_path / "db")
    for name in ("db", "other"):
        with pytest.raises(ConfigError, match="hard links"):
            SqliteKeyStore(tmp_path / name, read_key_file(tmp_path / "key"))


def test_files_that_are_no_key_store(tmp_path: Path) -> None:
    write_key_file(tmp_path / "key")
    key = read_key_file(tmp_path / "key")
    (tmp_path / "folder").mkdir()
    (tmp_path / "text").write_bytes(b"no database" * 1000)
    with closing(sqlite3.connect(tmp_path / "foreign")) as db:
        db.execute("CREATE TABLE something (x)")
    with closing(sqlite3.connect(tmp_path / "newer")) as db:
        db.execute("PRAGMA user_version = 99")
    before = state_of(tmp_path)
    for name, why in {
        "folder": "not a regular file",
        "no/such/folder": "No such file",
        "text": "not a database",
        "foreign": "not a key store",
        "newer": "later version",
    }.items():
        with pytest.raises(ConfigError, match=why):
            SqliteKeyStore(tmp_path / name, key)
    assert state_of(tmp_path) == before


# -- a disk that is full, and free again


async def test_a_full_disk_changes_nothing_and_is_over_when_it_is_over(
    store: SqliteKeyStore, caplog: pytest.LogCaptureFixture
) -> None:
    await store.add("a", keys(1, 2, 3))
    await store.accept("a", [block(1)], master="m", slaves=["s"])
    [pages] = store._db.execute("PRAGMA page_count").fetchone()
    store._db.execute(f"PRAGMA max_page_count = {pages}")
    many = [(str(uuid.uuid4()), Secret(bytes(32))) for _ in range(200)]
    for _ in range(5):
        with pytest.raises(KeySourceUnavailable, match="full"):
            await store.add("a", many)
        assert await store.count("a") == 2
    store._db.execute("PRAGMA max_page_count = 1000000")
    await store.add("a", many)
    assert await store.count("a") == 202
    await store.collect("a", [key_id(1)], slave="s", master="m")
    told = [record.getMessage() for record in caplog.records]
    assert [("failed" in text, "works again" in text) for text in told] == [
        (True, False),
        (False, True),
    ]


LIMITED = """
import resource, sys, trio, uuid
from pathlib import Path
from hybridkex.errors import KeySourceUnavailable
from hybridkex.qkd.sqlite_store import SqliteKeyStore
from hybridkex.qkd.store import read_key_file
from hybridkex.secret import Secret

async def main():
    folder = Path(sys.argv[1])
    failures = []
    key = read_key_file(folder / "key")
    store = SqliteKeyStore(folder / "db", key, on_failure=lambda: failures.append(1))
    def many(): return [(str(uuid.uuid4()), Secret(bytes(32))) for _ in range(50)]
    await store.add("a", many())
    await store.scrub()
    limit = (folder / "db").stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    for _ in range(200):
        try:
            await store.add("a", many())
            await store.scrub()
        except KeySourceUnavailable:
            if len(failures) > 5:
                break
    else:
        sys.exit("the disk was never full")
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    before = await store.count("a")
    await store.add("a", many())
    await store.scrub()
    assert await store.count("a") == before + 50
    await store.aclose()

trio.run(main)
"""


def test_a_file_that_cannot_grow(tmp_path: Path) -> None:
    """The operating system's own refusal, at whatever write it comes."""
    write_key_file(tmp_path / "key")
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path)],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


async def test_a_damaged_key_does_not_stop_the_others(
    store: SqliteKeyStore, caplog: pytest.LogCaptureFixture
) -> None:
    await store.add("a", keys(1, 2, 3))
    alter(store, "UPDATE material SET sealed = zeroblob(60) WHERE key_id = ?", key_id(2))
    assert {one.key_id for one in await store.reserve("a", 5)} == {key_id(1), key_id(3)}
    assert "1 damaged keys" in caplog.text
    assert await store.count("a") == 2


# -- databases of version 1


VERSION_1 = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE material (seq INTEGER PRIMARY KEY, key_id BLOB NOT NULL UNIQUE, link TEXT NOT NULL,
    half INTEGER NOT NULL, shared INTEGER NOT NULL, created REAL NOT NULL, sealed BLOB NOT NULL);
CREATE INDEX material_order ON material (link, half, seq);
CREATE TABLE grants (key_id BLOB NOT NULL, slave TEXT NOT NULL, master TEXT NOT NULL,
    link TEXT NOT NULL, created REAL NOT NULL, sealed BLOB, ended TEXT, PRIMARY KEY (key_id, slave))
    WITHOUT ROWID;
CREATE INDEX grants_age ON grants (created);
CREATE TABLE spent (key_id BLOB PRIMARY KEY, at REAL NOT NULL) WITHOUT ROWID;
"""


async def test_a_database_of_version_1_is_taken_over(tmp_path: Path) -> None:
    write_key_file(tmp_path / "key")
    seal_key = read_key_file(tmp_path / "key")
    seal = AESGCM(seal_key.reveal())
    raw = [uuid.UUID(key_id(number)).bytes for number in range(5)]
    now = time.time()

    def sealed(key: bytes, place: bytes) -> bytes:
        nonce = os.urandom(12)
        return nonce + seal.encrypt(nonce, key, place)

    with closing(sqlite3.connect(tmp_path / "db", isolation_level=None)) as db:
        db.execute("PRAGMA journal_mode=WAL")
        db.executescript(VERSION_1)
        db.execute("INSERT INTO meta VALUES ('seal', ?)", (sealed(b"seal", b"meta"),))
        db.execute("INSERT INTO meta VALUES ('x-sae', 'alice')")
        db.execute("INSERT INTO material VALUES (1, ?, 'a', ?, 1, ?, ?)",
                   (raw[1], 1, now, sealed(b"1" * 32, b"material\0" + raw[1] + b"a")))  # fmt: skip
        db.execute("INSERT INTO grants VALUES (?, 's', 'm', 'a', ?, ?, NULL)",
                   (raw[2], now, sealed(b"2" * 32, b"grant\0" + raw[2] + b"s")))  # fmt: skip
        db.execute("INSERT INTO grants VALUES (?, 's', 'm', 'a', ?, NULL, 'delivered')",
                   (raw[3], now))  # fmt: skip
        db.executemany("INSERT INTO spent VALUES (?, ?)", [(one, now) for one in raw[2:5]])
    for _ in range(2):  # the second time it is of the present version
        store = SqliteKeyStore(tmp_path / "db", seal_key)
        assert store.meta("sae") == "alice"
        assert await store.count("a") == 1
        with pytest.raises(KeyConsumed):
            await store.collect("a", [key_id(3)], slave="s", master="m")
        await store.add("a", keys(2, 3, 4))
        await store.add("b", keys(2, 3, 4))
        assert await store.count("a") == 1, "what was spent remains so"
        assert await store.count("b") == 0
        await store.aclose()
    store = SqliteKeyStore(tmp_path / "db", seal_key)
    [found] = await store.reserve("a", 1)
    assert (found.key_id, found.key.reveal()) == (key_id(1), b"1" * 32)
    [(_, key)] = await store.collect("a", [key_id(2)], slave="s", master="m")
    assert key.reveal() == b"2" * 32
    await store.aclose()


async def test_a_database_of_version_3_gets_its_guards(tmp_path: Path) -> None:
    store = SqliteKeyStore(tmp_path / "db", Secret(bytes(32)))
    await store.add("a", keys(1))
    await store.allot("a", [block(1)], master="m", slaves=["s"])
    names = "SELECT name FROM sqlite_master WHERE type = 'trigger' ORDER BY name"
    triggers = store._db.execute(names).fetchall()
    alter(store, "PRAGMA user_version = 3")
    assert len(store._db.execute(names).fetchall()) < len(triggers)
    await store.aclose()
    store = SqliteKeyStore(tmp_path / "db", Secret(bytes(32)))
    assert store._db.execute(names).fetchall() == triggers
    assert len(await store.collect("a", [key_id(1)], slave="s", master="m")) == 1
    await store.aclose()


# --- files that others touch -----------------------------------------------------------------


@pytest.mark.parametrize("act", ["remove", "replace", "empty file"])
async def test_a_write_ahead_log_that_is_removed(tmp_path: Path, act: str) -> None:
    """Nothing is delivered a second time, even where the process is killed right after a call."""
    write_key_file(tmp_path / "key")
    script = f"""
import logging, os, trio
from pathlib import Path
from hybridkex.qkd.sqlite_store import SqliteKeyStore
from hybridkex.qkd.store import Allotment, read_key_file
from hybridkex.secret import Secret

KEY_ID = {key_id(1)!r}
logging.basicConfig()

async def main():
    store = SqliteKeyStore(Path("db"), read_key_file(Path("key")))
    block = Allotment(blocks=(KEY_ID,), size=32, value=Secret(bytes(32)))
    await store.accept("link", [block], master="m", slaves=["s"])
    await store.scrub()
    log = Path("db-wal")
    saved = log.read_bytes()
    log.unlink()
    if {act!r} != "remove":
        log.write_bytes(saved if {act!r} == "replace" else b"")
    await store.collect("link", [KEY_ID], slave="s", master="m")
    os.kill(os.getpid(), 9)

trio.run(main)
"""
    done = await trio.run_process(
        [sys.executable, "-c", script], cwd=tmp_path, capture_stderr=True, check=False
    )
    assert done.returncode == -9, done.stderr
    assert b"was removed while it was in use" in done.stderr
    store = SqliteKeyStore(tmp_path / "db", read_key_file(tmp_path / "key"))
    with pytest.raises(KeyConsumed):
        await store.collect("link", [key_id(1)], slave="s", master="m")
    await store.aclose()


@pytest.mark.parametrize("step", ["stat", "_write_log", "open_locked"])
async def test_a_removed_log_while_the_disk_or_the_system_fails(
    store: SqliteKeyStore, tmp_path: Path, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each call fails as long as that lasts, and then nothing is lost and nothing given twice."""
    await store.add("link", keys(2, 3))
    given = Allotment(blocks=(key_id(1),), size=32, value=Secret(bytes(32)))
    await store.accept("link", [given], master="m", slaves=["s"])
    await store.collect("link", [key_id(1)], slave="s", master="m")
    (tmp_path / "db-wal").unlink()

    def fail(*_: object, **__: object) -> NoReturn:
        raise sqlite3.OperationalError("disk I/O error") if step == "_write_log" else ConfigError

    def fail_with(path: object) -> os.stat_result:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    with monkeypatch.context() as now:
        if step == "stat":
            now.setattr(store_module.os, "stat", fail_with)
        else:
            now.setattr(store_module, step, fail)
        for _ in range(3):
            with pytest.raises(KeySourceUnavailable):
                await store.count("link")
            with pytest.raises(KeySourceUnavailable):
                await store.reserve("link", 1)
    assert await store.count("link") == 2
    with pytest.raises(KeyConsumed):
        await store.collect("link", [key_id(1)], slave="s", master="m")


async def test_another_process_takes_a_store_that_cannot_be_opened_again(
    store: SqliteKeyStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await store.add("link", keys(1, 2))
    (tmp_path / "db-wal").unlink()

    def fail(*_: object, **__: object) -> NoReturn:
        raise ConfigError

    with monkeypatch.context() as now:
        now.setattr(store_module, "open_locked", fail)
        with pytest.raises(KeySourceUnavailable):
            await store.count("link")
    other = SqliteKeyStore(tmp_path / "db", read_key_file(tmp_path / "key"))
    for _ in range(2):
        with pytest.raises(KeySourceUnavailable, match="in use by another process"):
            await store.reserve("link", 1)
    await other.discard("link", [key_id(1)])
    await other.aclose()
    assert [one.key_id for one in await store.reserve("link", 1)] == [key_id(2)]
    (tmp_path / "db-wal").unlink()
    (tmp_path / "db").rename(tmp_path / "aside")
    with pytest.raises(KeySourceUnavailable, match="was moved, removed or replaced"):
        await store.count("link")
    assert not (tmp_path / "db").exists()


async def test_a_database_that_is_moved(
    store: SqliteKeyStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It gives nothing while another file, or none, is in its place; then it works again."""
    failures = 0

    def count() -> None:
        nonlocal failures
        failures += 1

    store._on_failure = count
    await store.add("link", keys(1, 2))
    place, aside = tmp_path / "db", tmp_path / "aside"
    fresh = iter((3, 4, 5))
    for put in (lambda: None, lambda: place.write_bytes(aside.read_bytes()), place.mkdir):
        place.rename(aside)
        put()
        for _ in range(2):
            with pytest.raises(KeySourceUnavailable, match="was moved, removed or replaced"):
                await store.count("link")
        if place.is_dir():
            place.rmdir()
        aside.replace(place)
        assert await store.count("link") == 2
        [one] = keys(next(fresh))
        await store.add("link", [one])
        await store.discard("link", [one[0]])
    assert failures == 6
    assert caplog.text.count("was moved") == 3
    assert caplog.text.count("works again") == 3
