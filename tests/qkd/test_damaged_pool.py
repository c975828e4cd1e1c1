"""A key pool whose content is damaged: every error is typed, and says whose file it is."""

import os
import random
import shutil
import sqlite3
import uuid
from pathlib import Path

import pytest
import trio

from hybridkex.errors import ConfigError, KeySourceError
from hybridkex.qkd.pool import FilePool, PoolNames
from hybridkex.qkd.source import KeyPart, QkdKey
from hybridkex.qkd.sqlite_store import check_store
from hybridkex.qkd.store import Seal, read_key_file
from hybridkex.secret import Secret

NAMES = PoolNames(kme="A", peer_kme="B", sae="alice", peer_sae="bob")
ODD = (None, 1.5, float("inf"), "", "[1]", '["zz"]', "{", b"\xff" * 40)
THEIRS = "11111111-1111-4111-8111-111111111111"


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    key_file = tmp_path / "key"
    key_file.write_text(os.urandom(32).hex())
    key_file.chmod(0o600)
    ours = QkdKey(
        name=(KeyPart("A", "B", str(uuid.uuid4())),),
        master_sae="alice",
        slave_sae="bob",
        key=Secret(bytes(32)),
    )
    theirs = QkdKey(
        name=(KeyPart("B", "A", THEIRS),),
        master_sae="bob",
        slave_sae="alice",
        key=Secret(bytes(32)),
    )

    async def fill() -> None:
        async with FilePool.open(tmp_path / "pool", key_file=key_file, names=NAMES) as made:
            await made.add([ours, theirs])

    trio.run(fill)
    return tmp_path / "pool"


def use(path: Path) -> None:
    async def main() -> None:
        async with FilePool.open(path, key_file=path.with_name("key")) as pool:
            await pool.status()
            await pool.get_key()
            await pool.get_key_with_id((KeyPart("B", "A", THEIRS),))

    trio.run(main)


def check(path: Path) -> None:
    check_store(path, Seal(read_key_file(path.with_name("key"))))


def columns(path: Path) -> list[tuple[str, str]]:
    with sqlite3.connect(path) as db:
        tables = [name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE sql != ''")]
        found = [
            (table, row[1]) for table in tables for row in db.execute(f"PRAGMA table_info({table})")
        ]
    db.close()
    return found


def test_any_value_in_any_column(pool: Path) -> None:
    found = columns(pool)
    assert len(found) >= 15
    good, failed = pool.read_bytes(), 0
    for table, column in found:
        for odd in ODD:
            pool.write_bytes(good)
            db = sqlite3.connect(pool)
            try:
                db.execute("PRAGMA synchronous=OFF")
                triggers = db.execute(
                    "SELECT name, sql FROM sqlite_master WHERE type = 'trigger'"
                ).fetchall()
                with db:  # damage passes by the triggers
                    for name, _ in triggers:
                        db.execute(f"DROP TRIGGER {name}")
                    db.execute(f"UPDATE OR REPLACE {table} SET {column} = ?", (odd,))
                    for _, trigger in triggers:
                        db.execute(trigger)
            except sqlite3.IntegrityError:
                continue
            finally:
                db.close()
            for act in (check, use):
                try:
                    act(pool)
                except (ConfigError, KeySourceError):
                    failed += act is use
    assert failed > 30


def test_bytes_that_are_damaged(pool: Path, tmp_path: Path) -> None:
    good, failed = pool.read_bytes(), 0
    for seed in range(60):
        draw = random.Random(seed)
        damaged = bytearray(good)
        for _ in range(60):
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        here = tmp_path / str(seed)
        here.mkdir()
        shutil.copy(pool.with_name("key"), here)
        (here / "pool").write_bytes(damaged)
        for act in (check, use):
            try:
                act(here / "pool")
            except (ConfigError, KeySourceError):
                failed += act is use
    assert failed > 20
