"""Programs that know nothing of it, through the tunnel: PostgreSQL, Redis, nginx and curl."""

import hashlib
import os
import pwd
import random
import re
import shutil
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeAlias

import pytest
import trio
from apps_glue import AnyProcess, Run, Wire, descriptors
from waiting import PATIENCE, trio_until, until

from interop.ports import free_port

MakeWire: TypeAlias = Callable[[int], AbstractAsyncContextManager[Wire]]


def needs(package: str, *programs: str) -> list[str]:
    """Where the programs are, or a skip that says how to get them."""
    places = os.pathsep.join(
        [os.environ["PATH"], "/usr/sbin", *map(str, Path("/usr/lib/postgresql").glob("*/bin"))]
    )
    found = [shutil.which(program, path=places) for program in programs]
    missing = [name for name, place in zip(programs, found, strict=True) if place is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not found: apt-get install {package}")
    return [place for place in found if place is not None]


async def call(*words: object, fails: bool = False, **more: str) -> str:
    """Run a program to its end; its output."""
    with trio.fail_after(PATIENCE * 2):
        done = await trio.run_process(
            list(map(str, words)),
            capture_stdout=True,
            capture_stderr=True,
            check=False,
            env={**os.environ, **more},
        )
    if not fails:
        assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode()


@dataclass(frozen=True)
class Ends:
    """A tunnel of two processes, and the wire between them."""

    port: int
    wire: Wire
    processes: tuple[AnyProcess, AnyProcess]

    def descriptors(self) -> list[int]:
        """How many are open at each end."""
        return [descriptors(process) for process in self.processes]


@asynccontextmanager
async def tunnel_to(
    target: str,
    run: Run,
    mutual: list[str],
    wire: MakeWire,
) -> AsyncIterator[Ends]:
    listen, inner = run.server(
        "tunnel", "listen", "--local", "127.0.0.1:0", "--target", target, *mutual
    )
    async with wire(inner) as between:
        connect, outer = run.server(
            *("tunnel", "connect", "--local", "127.0.0.1:0", "--server-name", "localhost"),
            *("--remote", f"127.0.0.1:{between.port}", *mutual),
        )
        ends = Ends(outer, between, (listen, connect))
        before = ends.descriptors()
        yield ends
        # Whatever was cut, refused or left: nothing stays open. (A port file may have been open.)
        await trio_until(
            lambda: all(now <= was for now, was in zip(ends.descriptors(), before, strict=True))
        )


# -- PostgreSQL


@dataclass(frozen=True)
class Postgres:
    """A cluster of the test's own; it is reached through its Unix socket alone."""

    socket: str
    port: int
    psql: str
    pgbench: str

    def options(self, port: int) -> list[str]:
        return ["-h", "127.0.0.1", "-p", str(port), "-U", "tester", "postgres"]


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    initdb, server, psql, pgbench, setpriv = needs(
        "postgresql util-linux", "initdb", "postgres", "psql", "pgbench", "setpriv"
    )
    as_somebody: list[str] = []
    # Not below the test's folder, which is its owner's alone, and short enough for a socket.
    with TemporaryDirectory(prefix="pg", ignore_cleanup_errors=True) as folder:
        if os.geteuid() == 0:  # which PostgreSQL refuses to be
            nobody = pwd.getpwnam("nobody")
            os.chown(folder, nobody.pw_uid, nobody.pw_gid)
            as_somebody = [
                *(setpriv, f"--reuid={nobody.pw_uid}", f"--regid={nobody.pw_gid}"),
                "--clear-groups",
            ]
        data = f"{folder}/data"
        subprocess.run(
            [*as_somebody, initdb, "-D", data, "-U", "tester", "-A", "trust", "--no-sync"],
            check=True,
            capture_output=True,
            timeout=120,
        )
        port = free_port()
        process = subprocess.Popen(
            [
                *(*as_somebody, server, "-D", data, "-k", folder, "-p", str(port), "-F"),
                *("-c", "listen_addresses=", "-c", "max_connections=40"),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            found = Postgres(f"{folder}/.s.PGSQL.{port}", port, psql, pgbench)
            ready = [psql, "-h", folder, "-p", str(port), "-U", "tester", "postgres", "-c", ""]
            until(lambda: subprocess.run(ready, check=False, capture_output=True).returncode == 0)
            yield found
        finally:
            process.terminate()
            process.wait(60)


async def test_psql(
    postgres: Postgres,
    run: Run,
    mutual: list[str],
    wire: MakeWire,
) -> None:
    """A table of 150,000 rows out and back in, and an interrupted query."""
    async with tunnel_to(f"unix:{postgres.socket}", run, mutual, wire) as ends:
        psql = [postgres.psql, *postgres.options(ends.port), "-v", "ON_ERROR_STOP=1", "-Atqc"]
        made = await call(
            *psql,
            "create table big as select i, md5(i::text) as text from generate_series(1, 150000) i;"
            "select md5(string_agg(text, '' order by i)) from big",
        )
        rows = await call(*psql, "select text from big order by i")
        assert hashlib.md5(rows.replace("\n", "").encode()).hexdigest() == made.strip()
        # Into the server: COPY from standard input, which psql ends as one direction of many.
        copied = await trio.run_process(
            [
                *(*psql, "create table back(text text)"),
                *("-c", "copy back from stdin", "-c", "select count(*) from back"),
            ],
            stdin=rows.encode(),
            capture_stdout=True,
        )
        assert copied.stdout.decode().split() == ["150000"]
        # A cancel request is a connection of its own.
        slept = await trio.run_process(
            ["timeout", "-s", "INT", "1", *psql, "select pg_sleep(60)"],
            check=False,
            capture_stderr=True,
        )
        assert b"canceling statement due to user request" in slept.stderr


async def test_pgbench_with_connections_cut(
    postgres: Postgres,
    run: Run,
    mutual: list[str],
    wire: MakeWire,
) -> None:
    """Whatever was cut, a transaction is there as a whole or not at all."""
    async with tunnel_to(f"unix:{postgres.socket}", run, mutual, wire) as ends:
        reach = postgres.options(ends.port)
        await call(postgres.pgbench, *reach, "-i", "-s", "1", "-q")
        quiet = await call(postgres.pgbench, *reach, "-c", "8", "-t", "25", "-n")
        assert "number of transactions actually processed: 200/200" in quiet
        done = 0
        for more in (0, 20_000, 70_000, 200_000):
            name = f"cut after {more}"

            async def cut(name: str = name, more: int = more) -> None:
                # pgbench connects all of its clients before the first of them updates a row.
                begun = (
                    "select count(*) from pg_stat_activity"
                    f" where application_name = '{name}' and query like 'UPDATE%'"
                )
                while await call(postgres.psql, *reach, "-Atqc", begun) == "0\n":
                    pass
                mark = ends.wire.carried + more
                await trio_until(lambda: ends.wire.carried > mark)
                ends.wire.cut()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(cut)
                # All of its clients lose their connections, and it ends.
                text = await call(
                    *(postgres.pgbench, *reach, "-c", "8", "-t", "100000", "-n"),
                    fails=True,
                    PGAPPNAME=name,
                )
            (processed,) = re.findall(r"actually processed: (\d+)/800000", text)
            done += int(processed)
        sums = await call(
            *(postgres.psql, *reach, "-Atqc"),
            "select (select sum(abalance) from pgbench_accounts),"
            " (select sum(tbalance) from pgbench_tellers),"
            " (select sum(bbalance) from pgbench_branches),"
            " (select sum(delta) from pgbench_history), (select count(*) from pgbench_history)",
        )
        accounts, tellers, branches, history, count = map(int, sums.strip().split("|"))
        assert accounts == tellers == branches == history
        # All that pgbench was told is there; what it was not told may be, too.
        assert count >= 200 + done


# -- Redis


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[tuple[int, str, str]]:
    server, cli, benchmark = needs("redis-server", "redis-server", "redis-cli", "redis-benchmark")
    port = free_port()
    with started(*(server, "--port", port, "--bind", "127.0.0.1", "--save", "", "--dir", tmp_path)):
        ping = [cli, "-p", str(port), "ping"]
        until(lambda: b"PONG" in subprocess.run(ping, check=False, capture_output=True).stdout)
        yield port, cli, benchmark


@contextmanager
def started(*words: object) -> Iterator["subprocess.Popen[bytes]"]:
    process = subprocess.Popen(
        list(map(str, words)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        yield process
    finally:
        process.terminate()
        process.wait(30)


async def test_redis(
    redis: tuple[int, str, str],
    run: Run,
    mutual: list[str],
    wire: MakeWire,
) -> None:
    """A pipeline of thousands of commands, then its values; and the benchmark's 50 clients."""
    port, cli, benchmark = redis
    values = {f"key:{number}": random.randbytes(200).hex() for number in range(5000)}
    commands = "".join(f"SET {key} {value}\n" for key, value in values.items())
    async with tunnel_to(f"127.0.0.1:{port}", run, mutual, wire) as ends:
        piped = await trio.run_process(
            [cli, "-p", str(ends.port), "--pipe"], stdin=commands.encode(), capture_stdout=True
        )
        assert b"errors: 0, replies: 5000" in piped.stdout
        # One reply of more than a megabyte.
        found = await call(cli, "-p", ends.port, "MGET", *list(values)[:3000])
        assert found.split() == list(values.values())[:3000]
        text = await call(
            *(benchmark, "-p", ends.port, "-c", "50", "-n", "10000", "-P", "16"),
            *("-t", "set,get", "--csv"),
        )
        rates = [line.split(",")[0] for line in text.splitlines()]
        assert '"SET"' in rates
        assert '"GET"' in rates


# -- nginx and curl


@pytest.fixture
def nginx(tmp_path: Path) -> Iterator[tuple[int, Path]]:
    (program,) = needs("nginx-light", "nginx")
    pages = tmp_path / "pages"
    pages.mkdir()
    port = free_port()
    configuration = tmp_path / "nginx.conf"
    user = "user root;" if os.geteuid() == 0 else ""
    configuration.write_text(
        f"""
        daemon off; {user} pid {tmp_path}/pid; error_log {tmp_path}/errors;
        events {{ }}
        http {{
            access_log off; client_body_temp_path {tmp_path}/b; proxy_temp_path {tmp_path}/p;
            fastcgi_temp_path {tmp_path}/f; uwsgi_temp_path {tmp_path}/u;
            scgi_temp_path {tmp_path}/s;
            server {{
                listen 127.0.0.1:{port}; root {pages};
            }}
        }}
        """
    )
    with started(program, "-c", configuration, "-e", tmp_path / "errors"):
        (pages / "ready").write_text("yes")
        probe = ["curl", "-s", f"http://127.0.0.1:{port}/ready"]
        until(lambda: subprocess.run(probe, check=False, capture_output=True).stdout == b"yes")
        yield port, pages


async def test_nginx_and_curl(
    nginx: tuple[int, Path],
    run: Run,
    mutual: list[str],
    wire: MakeWire,
    tmp_path: Path,
) -> None:
    """A file of 40 MB by its SHA-256, many requests over one connection, many connections."""
    port, pages = nginx
    big = random.randbytes(1 << 20) * 40
    (pages / "big").write_bytes(big)
    for number in range(100):
        (pages / str(number)).write_text(f"page {number}")
    async with tunnel_to(f"127.0.0.1:{port}", run, mutual, wire) as ends:
        url = f"http://127.0.0.1:{ends.port}"
        out = tmp_path / "got"
        await call("curl", "-sSf", "-o", out, f"{url}/big")
        assert hashlib.sha256(out.read_bytes()).digest() == hashlib.sha256(big).digest()
        before = ends.wire.connections
        text = await call("curl", "-sSf", f"{url}/[0-99]", "-w", "|%{num_connects}\\n")
        lines = [line.split("|") for line in text.splitlines()]
        assert [page for page, _ in lines] == [f"page {number}" for number in range(100)]
        assert sum(int(connects) for _, connects in lines) == 1
        assert ends.wire.connections == before + 1
        several = await call(
            *("curl", "-sSf", "--no-progress-meter", "-Z", "--parallel-max", "20"),
            *("--parallel-immediate", f"{url}/[0-99]", "-o", f"{tmp_path}/page-#1"),
        )
        assert several == ""
        for number in range(100):
            assert (tmp_path / f"page-{number}").read_text() == f"page {number}"
