"""KMEs under load, by store and processes.

Two sites, each with so many processes at one address (``reuse_port``), on SQLite or on a PostgreSQL
server of its own, both of which flush every change. Each client is a thread that draws a key at one
site and looks it up at the other, on connections that stay open or on new ones. The stock is the
same at both ends, as from a QKD link.
"""

import os
import statistics
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import trio

from benchmarks.kme_pairs import CLIENTS, Load, exchange, pair, wait_until_idle
from benchmarks.processes import cpu, program, until
from benchmarks.results import Options, Row, in_turns
from hybridkex.qkd.postgres_store import PostgresKeyStore
from hybridkex.qkd.sqlite_store import SqliteKeyStore
from hybridkex.qkd.store import KeyStore, read_key_file
from hybridkex.secret import Secret
from interop.kme.sites import KMES, Site, Sites
from interop.postgres import own_databases

__all__ = ["run"]

SAES = {"kme-a": ["alice"], "kme-b": ["bob"]}
FILL = 1000
LONG = 65_536
"""Bits of a long key."""


@dataclass(frozen=True)
class Work:
    """What the clients do, and with what stock."""

    words: str
    kind: str = "pairs"
    """``pairs``, ``new`` (a connection for each request) or ``batches``."""
    clients: int = CLIENTS
    stock: int = 100_000
    """Keys at both ends."""
    bits: int = 256
    """Of a key."""
    setups: int = 4
    """How many of the set-ups take part."""
    rounds: int = 2


WORKS = (
    Work(f"pairs of {CLIENTS} clients, connections kept"),
    Work("the same, on new connections", "new"),
    Work("the same of 1 client", clients=1, rounds=1),
    Work("the same of 32 clients", clients=32, rounds=1),
    Work("the same with 1,000 keys in stock", stock=1000, rounds=1),
    Work("the same with 1,000,000 keys in stock", stock=1_000_000, setups=2, rounds=1),
    Work("keys in batches of 100", "batches"),
    Work(f"pairs of keys of {LONG:,} bits, connections kept", bits=LONG),
)
WORDS = {
    "rate": "rate",
    "cpu": "CPU of the KMEs for one",
    "database_cpu": "CPU of the databases for one",
    "median": "median time",
    "p99": "99th percentile",
}


@dataclass
class Run:
    """What one run measured."""

    rate: float
    """Pairs a second; with batches, keys drawn a second."""
    cpu: float
    """Milliseconds of processor time of all KME processes for each."""
    database_cpu: float
    """The same of the databases."""
    median: float
    """Milliseconds."""
    p99: float


class Clients(Load):
    """Clients of both sites."""

    def __init__(self, folder: Path, where: dict[str, str], seconds: float, kind: str) -> None:
        super().__init__(folder, where, seconds)
        self.kind = kind

    def client(self, ready: threading.Barrier) -> None:
        if self.kind == "pairs":
            super().client(ready)
            return
        try:
            ready.wait()
            self.go.wait()
            if self.kind == "batches":
                self._draw_batches()
            while time.perf_counter() < self.ends:
                began = time.perf_counter()
                with self.connect("alice", "kme-a") as a, self.connect("bob", "kme-b") as b:
                    pair(a, b, self.query)
                self.times.append(time.perf_counter() - began)
        except BaseException as error:
            self.errors.append(error)
            ready.abort()

    def _draw_batches(self) -> None:
        with self.connect("alice", "kme-a") as a:
            while time.perf_counter() < self.ends:
                began = time.perf_counter()
                if exchange(a, "/api/v1/keys/bob/enc_keys?number=100") is not None:
                    self.times.append(time.perf_counter() - began)


async def fill(sites: Sites, number: int) -> None:
    """The same keys at both ends."""
    stores: list[tuple[KeyStore, str]] = []
    for index, kme in enumerate(KMES):
        site = sites.sites[kme]
        key = read_key_file(site.folder / "store.key")
        stores.append((opened(site, key, kme), KMES[1 - index]))
    for _ in range(0, number, FILL):
        keys = [(str(uuid.uuid4()), Secret(os.urandom(32))) for _ in range(min(number, FILL))]
        async with trio.open_nursery() as nursery:
            for store, other in stores:
                nursery.start_soon(store.add, other, keys)
    for store, _ in stores:
        await store.aclose()


def opened(site: Site, key: Secret, kme: str) -> KeyStore:
    if site.database is None:
        return SqliteKeyStore(site.folder / "keys.db", key)
    return PostgresKeyStore(Secret(site.store.encode()), key, owner=kme)


def measure(store: str, processes: int, work: Work, seconds: float) -> Run:
    """One run with stores of its own."""
    long = work.bits != 256
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hybridkex-")))
        databases = own_databases(folder, stack, fsync="on") if store == "postgresql" else None
        limits = f"max_key_count = {work.stock}\nmax_key_size = {max(work.bits, 4096)}\n"
        limits += f"max_key_per_request = {4 if long else 100}"
        sites = Sites(folder, SAES, processes, databases, limits=limits, cables=False)
        stack.callback(sites.close)
        trio.run(fill, sites, work.stock)
        sites.start()
        pids = [one.pid for site in sites.sites.values() for one in site.processes]
        where = {kme: f"https://127.0.0.1:{site.port}" for kme, site in sites.sites.items()}
        _wait_for_all(folder, where)
        wait_until_idle(pids, seconds)
        load = Clients(folder, where, seconds, work.kind)
        load.query = f"?size={work.bits}" if long else ""
        before = sum(map(cpu, pids)), _database_cpu(databases)
        took = load.run(work.clients)
        used = sum(map(cpu, pids)) - before[0]
        database_cpu = _database_cpu(databases) - before[1]
    times = sorted(load.times)
    units = len(times) * (100 if work.kind == "batches" else 1)
    return Run(
        rate=units / took,
        cpu=used / units * 1000,
        database_cpu=database_cpu / units * 1000,
        median=statistics.median(times) * 1000,
        p99=times[len(times) * 99 // 100] * 1000,
    )


def _database_cpu(databases: list[Any] | None) -> float:
    return sum(cpu(pid) for database in databases or [] for pid in database.pids())


def _wait_for_all(folder: Path, where: dict[str, str]) -> None:
    """Until both sites serve."""

    def serve() -> bool:
        load = Load(folder, where, 0.0)
        try:
            with load.connect("alice", "kme-a") as a, load.connect("bob", "kme-b") as b:
                pair(a, b)
        except OSError:
            return False
        return True

    until(serve, seconds=60)


def run(options: Options) -> Iterator[Row]:
    """Measure."""
    setups = {"SQLite, 1 process": ("sqlite", 1)}
    if not options.quick and program("initdb") is not None:
        setups |= {
            f"PostgreSQL, {number} process{'es' if number > 1 else ''}": ("postgresql", number)
            for number in (1, 2, 4)
        }
    seconds = 0.2 if options.quick else 3.0
    units = {"rate": "1/s", "cpu": "ms", "database_cpu": "ms", "median": "ms", "p99": "ms"}
    for usual in WORKS[: options.size(len(WORKS), 1)]:
        work = replace(usual, stock=options.size(usual.stock, 1000))
        runs: dict[str, list[Run]] = {setup: [] for setup in list(setups)[: work.setups]}

        def once(setup: str, work: Work = work, runs: dict[str, list[Run]] = runs) -> float:
            runs[setup].append(measure(*setups[setup], work, seconds))
            return 0.0

        in_turns(options.few(work.rounds), {setup: partial(once, setup) for setup in runs})
        for what, unit in units.items():
            figures = {
                setup: [getattr(one, what) for one in found] for setup, found in runs.items()
            }
            used = {setup: values for setup, values in figures.items() if all(values)}
            if used:  # a SQLite store has no processes of a database
                yield Row(f"{work.words}: {WORDS[what]}", unit, used, compared=False)
