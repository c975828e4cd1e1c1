"""``hybridkex kme migrate``: from a file to PostgreSQL, without losing or doubling a key."""

import itertools
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
import trio
from forked import Forkserver
from waiting import until

from hybridkex.errors import ConfigError, KeyConsumed, KeySourceUnavailable
from hybridkex.net.address import parse_tcp_address
from hybridkex.qkd.etsi014.client import KmeClient
from hybridkex.qkd.sqlite_schema import ANY_LINK
from hybridkex.qkd.sqlite_store import SqliteKeyStore
from hybridkex.qkd.store import Allotment, read_key_file, write_key_file
from hybridkex.secret import Secret
from interop.postgres import PostgresServer

Site = Any  # of conftest.py
SEAL = Secret(bytes(range(32)))
SCHEMAS = itertools.count()
LINKS = ("kme-b", "kme-c")
CONFIG = """
[[kme]]
id = "kme-a"
listen = "127.0.0.1:0"
saes = ["alice"]
ca = "ca.pem"
certificate = "cert.pem"
key = "key.pem"
store = "keys.db"
key_file = "store.key"
self_pairs = true
limits = { max_key_count = 256 }
"""


@pytest.fixture
def url(postgres: PostgresServer) -> Secret:
    import psycopg

    schema = f"move_{next(SCHEMAS)}"
    with psycopg.connect(postgres.url("public")) as connection:
        connection.execute(f"CREATE SCHEMA {schema}")
    return Secret(postgres.url(schema).encode())


def key_id(number: int) -> str:
    return f"00000000-0000-0000-0000-{number:012x}"


def key(number: int) -> Secret:
    return Secret(number.to_bytes(32))


def block(number: int) -> Allotment:
    return Allotment(blocks=(key_id(number),), size=32)


async def fill(store: SqliteKeyStore, number: int) -> None:
    """On each link: free keys, and promised, delivered, void and spent ones."""
    for link in LINKS:
        for start in range(0, number, 1000):
            numbers = range(start, min(start + 1000, number))
            await store.add(link, [(key_id(one), key(one)) for one in numbers])
        await store.accept(link, [block(one) for one in range(6)], master="m", slaves=["s", "t"])
        await store.collect(link, [key_id(0), key_id(1)], slave="s", master="m")
        await store.void(link, [key_id(2), key_id(9), key_id(number + 1)])
    with store._transaction() as db:
        db.execute("INSERT INTO spent VALUES (?, ?, 5)", (ANY_LINK, key_id(number + 2)))


def content(path: Path) -> dict[str, list[tuple[Any, ...]]]:
    with closing(sqlite3.connect(path)) as db:
        return {
            "material": db.execute(
                "SELECT link, key_id, half, shared, created, sealed FROM material"
                " ORDER BY link, half, seq"
            ).fetchall(),
            "grants": db.execute(
                "SELECT link, key_id, slave, master, created, sealed, ended, blocks FROM grants"
                " ORDER BY link, key_id, slave"
            ).fetchall(),
        }


def content_of(url: Secret) -> dict[str, list[tuple[Any, ...]]]:
    import psycopg

    with psycopg.connect(url.reveal().decode(), client_encoding="UTF8") as db:
        db.execute("SELECT set_config('hybridkex.link', '*', false)")
        return {
            "material": db.execute(
                "SELECT link, key_id, half, shared::int, created, sealed FROM material"
                " ORDER BY link, half, seq"
            ).fetchall(),
            "grants": db.execute(
                "SELECT link, key_id, slave, master, created, sealed, ended, blocks FROM grants"
                " ORDER BY link, key_id, slave"
            ).fetchall(),
        }


def all_bytes(folder: Path) -> bytes:
    return b"".join(file.read_bytes() for file in sorted(folder.iterdir()))


def move(path: Path, url: Secret) -> Any:
    from hybridkex.qkd.store_move import move

    return move(path, url, SEAL, owner="kme-a", links=["kme-a", *LINKS])


def opened(url: Secret) -> Any:
    from hybridkex.qkd.postgres_store import PostgresKeyStore

    return PostgresKeyStore(url, SEAL, owner="kme-a")


async def test_everything_is_there_afterwards_and_only_there(tmp_path: Path, url: Secret) -> None:
    path = tmp_path / "keys.db"
    source = SqliteKeyStore(path, SEAL)
    await fill(source, 2000)
    with pytest.raises(ConfigError, match="in use by another process"):
        move(path, url)
    await source.aclose()
    before = content(path)
    moved = move(path, url)
    assert content_of(url) == before
    assert (moved.rows["material"], moved.rows["grants"]) == (2 * 1993, 24)
    with pytest.raises(ConfigError, match="have been moved to postgres at 127"):
        SqliteKeyStore(path, SEAL)
    assert content(path) == {"material": [], "grants": []}
    assert before["material"][0][-1] not in all_bytes(tmp_path), "no copy is left to a thief"
    assert move(path, url) is None

    target = opened(url)
    assert (await target.count("kme-b"), await target.promised("kme-b")) == (1993, 8)
    [(_, found)] = await target.collect("kme-b", [key_id(1)], slave="t", master="m")
    assert found.reveal() == key(1).reveal()
    with pytest.raises(KeyConsumed):
        await target.collect("kme-b", [key_id(1)], slave="s", master="m")
    first = (await target.reserve("kme-b", 1))[0]
    assert (first.key_id, first.key.reveal()) == (key_id(6), key(6).reveal())
    # An ID that was spent on some link of an old version is spent on every link.
    for link in ("kme-a", *LINKS):
        sizes = await target.count(link)
        await target.add(link, [(key_id(2002), key(0))])
        assert await target.count(link) == sizes
    await target.aclose()


async def test_a_store_with_other_keys_is_not_mixed_with_these(
    tmp_path: Path, postgres: PostgresServer, url: Secret, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hybridkex.qkd.postgres_store import PostgresKeyStore

    in_service = opened(url)
    await in_service.aclose()
    for name in ("one.db", "two.db"):
        SqliteKeyStore(tmp_path / name, SEAL).close()
    with pytest.raises(ConfigError, match="in service or has keys of another store"):
        move(tmp_path / "one.db", url)
    SqliteKeyStore(tmp_path / "one.db", SEAL).close()  # still in service

    import psycopg

    with psycopg.connect(postgres.url("public")) as connection:
        connection.execute("CREATE SCHEMA fresh; CREATE SCHEMA other")
    fresh, other = (Secret(postgres.url(name).encode()) for name in ("fresh", "other"))
    with monkeypatch.context() as patch:
        patch.setattr(PostgresKeyStore, "end_move", failing)
        with pytest.raises(KeySourceUnavailable):
            move(tmp_path / "one.db", fresh)
    with pytest.raises(ConfigError, match="into another database than"):
        move(tmp_path / "one.db", other)
    with pytest.raises(ConfigError, match="has keys of another store"):
        move(tmp_path / "two.db", fresh)
    with pytest.raises(ConfigError, match="is not complete"):
        opened(fresh)
    with pytest.raises(ConfigError, match="are being moved"):
        SqliteKeyStore(tmp_path / "one.db", SEAL)
    assert move(tmp_path / "one.db", fresh) is not None
    opened(fresh).close()


async def test_a_file_whose_sealing_key_is_being_replaced_is_not_moved(
    tmp_path: Path, url: Secret
) -> None:
    from hybridkex.qkd import store_move

    await fill(store := SqliteKeyStore(tmp_path / "one.db", SEAL), 10)
    await store.aclose()
    with pytest.raises(ConfigError, match="serve it until the log says"):
        store_move.move(
            tmp_path / "one.db",
            url,
            Secret(bytes(32)),
            read_keys=[SEAL],
            owner="kme-a",
            links=LINKS,
        )


def failing(*_: Any) -> None:
    raise KeySourceUnavailable("here the move is interrupted")


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize(
    "step", ["set_meta 1", "set_meta 2", "add_rows 1", "add_rows 3", "end_move 1", "end_move 2"]
)
async def test_a_move_that_is_interrupted_at_each_step(
    step: str, after: bool, tmp_path: Path, url: Secret, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every moment one of the stores at most can be served, and the second try completes it."""
    from hybridkex.qkd.postgres_store import PostgresKeyStore

    path = tmp_path / "keys.db"
    monkeypatch.setattr(SqliteKeyStore, "PAGE", 50)
    source = SqliteKeyStore(path, SEAL)
    await fill(source, 100)
    await source.aclose()
    before = content(path)
    name, number = step.split()
    calls = itertools.count(1)

    def interrupting(method: Any) -> Any:
        def call(*arguments: Any) -> Any:
            due = next(calls) == int(number)
            if due and not after:
                failing()
            result = method(*arguments)
            if due:
                failing()
            return result

        return call

    with monkeypatch.context() as patch:
        for kind in (SqliteKeyStore, PostgresKeyStore):
            if hasattr(kind, name):
                patch.setattr(kind, name, interrupting(getattr(kind, name)))
        with pytest.raises(KeySourceUnavailable):
            move(path, url)
    with suppress(ConfigError):
        SqliteKeyStore(path, SEAL).close()
        assert step.startswith("set_meta"), "the file could still be served"
        assert step != "set_meta 2" or not after
    if step != "set_meta 1":  # else the database is still empty
        with suppress(ConfigError):
            opened(url).close()
            assert step == "end_move 2" or (step == "end_move 1" and after), "it is not complete"
    move(path, url)
    assert content_of(url) == before
    assert content(path) == {"material": [], "grants": []}
    opened(url).close()


async def test_kill_9_at_random_moments(site: Site, url: Secret, hybridkex: Forkserver) -> None:
    folder = site.holder("kme-a")
    write_key_file(folder / "store.key")
    path, config = folder / "keys.db", folder / "kme.toml"
    config.write_text(CONFIG.replace("keys.db", url.reveal().decode()))
    source = SqliteKeyStore(path, read_key_file(folder / "store.key"))
    await fill(source, 5000)
    await source.aclose()
    before = content(path)
    choice = random.Random(19)
    killed = 0
    while True:
        process = hybridkex.start("kme", "migrate", config, "--from", path)
        if killed < 5:
            await trio.sleep(choice.uniform(0.05, 0.6))
            process.send_signal(signal.SIGKILL)
            killed += 1
            if process.wait() == 0:
                break
        elif process.wait() == 0:
            break
        else:
            raise AssertionError(process.told())
    assert content_of(url) == before
    assert content(path) == {"material": [], "grants": []}
    again = hybridkex.run("kme", "migrate", config, "--from", path)
    assert (again.returncode, b"moved before" in again.stdout) == (0, True)
    wrong = hybridkex.run("kme", "migrate", config, "--from", folder / "missing.db")
    assert (wrong.returncode, wrong.stderr.count(b"\n")) == (1, 1)
    assert b"there is no key store" in wrong.stderr


def test_the_five_lines_of_the_manual(
    site: Site, postgres: PostgresServer, hybridkex: Forkserver
) -> None:
    """To the letter, but for what installs and starts programs."""
    programs = os.pathsep.join(map(str, Path("/usr/lib/postgresql").glob("*/bin")))
    path = f"{os.environ['PATH']}{os.pathsep}{programs}"
    if shutil.which("createdb", path=path) is None:
        pytest.skip("PostgreSQL's own client programs are not installed")
    manual = (Path(__file__).parents[2] / "docs" / "kme.md").read_text()
    [block] = re.findall(r"```sh\n(systemctl stop .*?kme migrate.*?)```", manual, re.DOTALL)
    lines = block.splitlines()
    assert len(lines) == 5
    [database] = re.findall(r"then\s+`(createdb [^`]*)`", manual)
    login = {
        "PATH": path,
        "PGHOST": "127.0.0.1",
        "PGPORT": str(postgres.port),
        "PGUSER": "postgres",
    }
    for command in ("createuser kme_a", database):  # this server asks nobody for a password
        subprocess.run(["bash", "-ec", command], check=True, env=login)
    folder = site.holder("kme-a")
    write_key_file(folder / "store.key")
    (folder / "kme.toml").write_text(CONFIG)
    password = folder / "pgpass"
    password.write_text("localhost:5432:kme_a:kme_a:PASSWORD\n")
    password.chmod(0o600)
    where: dict[str, Any] = {"folder": folder, "environment": {"PGPORT": str(postgres.port)}}
    server = hybridkex.start("kme", "serve", "kme.toml", **where)

    def stored() -> int:
        address = server.said().decode().split()[-1].removeprefix("https://")
        alice = site.access("alice", parse_tcp_address(address))

        async def ask() -> int:
            async with KmeClient(alice) as client:
                return (await client.status("alice")).stored_key_count

        return trio.run(ask)

    until(lambda: b"listens" in server.said() and stored() == 256, server)
    for line in lines:
        words = line.split("#")[0].split()
        match words[:2]:
            case ["systemctl", "stop"]:
                server.send_signal(signal.SIGTERM)
                assert server.wait() == 0
            case ["systemctl", "start"]:
                server = hybridkex.start("kme", "serve", "kme.toml", **where)
            case ["hybridkex", *_]:
                done = hybridkex.run(*words[1:], **where)
                assert done.returncode == 0, done.stderr
                if "migrate" in words:
                    assert b"256 keys and 0 promised" in done.stdout
            case _:
                here = line.replace("/etc/hybridkex", str(folder))
                subprocess.run(["bash", "-ec", here], check=True, cwd=folder, env={"PATH": path})
    until(lambda: b"listens" in server.said() and stored() == 256, server)
    server.send_signal(signal.SIGTERM)
    assert server.wait() == 0
