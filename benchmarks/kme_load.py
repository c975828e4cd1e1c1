"""KMEs under load, by store, processes and clients: ``python benchmarks/kme.py --load``.

Two sites, each with so many processes at one address (``reuse_port``), on SQLite or on a PostgreSQL
server of its own, both of which flush every change. Each client is a thread that draws a key at one
site and looks it up at the other, on connections that stay open or on new ones. The stock is the
same at both ends, as from a QKD link.
"""

import json
import os
import statistics
import tempfile
import threading
import time
import uuid
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio
from kme_pairs import Load, _cpu, _exchange, _pair

from hybridkex.qkd.postgres_store import PostgresKeyStore
from hybridkex.qkd.sqlite_store import SqliteKeyStore
from hybridkex.qkd.store import KeyStore, read_key_file
from hybridkex.secret import Secret
from interop.kme.sites import KMES, Sites
from interop.postgres import own_databases

SAES = {"kme-a": ["alice"], "kme-b": ["bob"]}
FILL = 1000


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
    refused: int
    """Draws that got 503."""


class Clients(Load):
    """Clients of both sites."""

    def __init__(self, folder: Path, where: dict[str, str], seconds: float, kind: str) -> None:
        super().__init__(folder, where, seconds)
        self.kind = kind
        self.refused = 0

    def _client(self, ready: threading.Barrier) -> None:
        if self.kind == "kept":
            super()._client(ready)
            return
        try:
            ready.wait()
            self.go.wait()
            if self.kind == "batch":
                self._draw_batches()
            while time.perf_counter() < self.ends:
                began = time.perf_counter()
                with self._connect("alice", "kme-a") as a, self._connect("bob", "kme-b") as b:
                    _pair(a, b, self.query)
                self.times.append(time.perf_counter() - began)
        except BaseException as error:
            self.errors.append(error)
            ready.abort()

    def _draw_batches(self) -> None:
        with self._connect("alice", "kme-a") as a:
            while time.perf_counter() < self.ends:
                began = time.perf_counter()
                if _exchange(a, "/api/v1/keys/bob/enc_keys?number=100") is None:
                    self.refused += 1
                else:
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


def opened(site: Any, key: Secret, kme: str) -> KeyStore:
    if site.database is None:
        return SqliteKeyStore(site.folder / "keys.db", key)
    return PostgresKeyStore(Secret(site.store.encode()), key, owner=kme)


def measure(
    store: str, processes: int, clients: int, seconds: float, stock: int, kind: str, size: int
) -> Run:
    """One run with stores of its own."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hybridkex-")))
        databases = own_databases(folder, stack, fsync="on") if store == "postgresql" else None
        limits = f"max_key_count = {stock}\nmax_key_size = {max(size, 4096)}\n"
        limits += f"max_key_per_request = {100 if size <= 4096 else 4}"
        sites = Sites(folder, SAES, processes, databases, limits=limits, cables=False)
        stack.callback(sites.close)
        trio.run(fill, sites, stock)
        sites.start()
        pids = [one.pid for site in sites.sites.values() for one in site.processes]
        where = {kme: f"https://127.0.0.1:{site.port}" for kme, site in sites.sites.items()}
        _wait_for_all(folder, where)
        _wait_until_idle(pids)
        load = Clients(folder, where, seconds, kind)
        load.query = f"?size={size}" if size else ""
        before = sum(map(_cpu, pids)), _database_cpu(databases)
        took = load.run(clients)
        cpu = sum(map(_cpu, pids)) - before[0]
        database_cpu = _database_cpu(databases) - before[1]
    times = sorted(load.times)
    units = len(times) * (100 if kind == "batch" else 1)
    return Run(
        rate=units / took,
        cpu=cpu / units * 1000,
        database_cpu=database_cpu / units * 1000,
        median=statistics.median(times) * 1000,
        p99=times[len(times) * 99 // 100] * 1000,
        refused=load.refused,
    )


def _database_cpu(databases: list[Any] | None) -> float:
    return sum(_cpu(pid) for database in databases or [] for pid in database.pids())


def _wait_for_all(folder: Path, where: dict[str, str]) -> None:
    """Until both sites serve."""
    ends = time.monotonic() + 60
    while True:
        try:
            load = Load(folder, where, 0.0)
            with load._connect("alice", "kme-a") as a, load._connect("bob", "kme-b") as b:
                _pair(a, b)
        except OSError:
            if time.monotonic() > ends:
                raise
            time.sleep(0.1)
        else:
            return


def _wait_until_idle(pids: list[int]) -> None:
    used = sum(map(_cpu, pids))
    time.sleep(1.0)
    while (now := sum(map(_cpu, pids))) - used > 0.1:
        used = now
        time.sleep(1.0)


def main(
    setups: list[tuple[str, int]], clients: list[int], seconds: float, rounds: int, stock: int,
    kind: str, size: int,
) -> dict[str, list[dict[str, float]]]:  # fmt: skip
    """Print a table; returns the runs."""
    print(
        f"{kind}, {size or 256} bits, stock of {stock:,}, medians of {rounds} runs in turns; "
        f"load {os.getloadavg()}"
    )
    heads = ("a second", "CPU ms", "database", "p50 ms", "p99 ms", "503")
    print(f"{'':<28}" + "".join(f"{head:>10}" for head in heads))
    runs: dict[str, list[Run]] = {}
    for _ in range(rounds):
        for number in clients:
            for store, processes in setups:
                name = f"{store}, {processes} x 2, {number}"
                runs.setdefault(name, []).append(
                    measure(store, processes, number, seconds, stock, kind, size)
                )
    for name, all_runs in runs.items():
        medians = [
            statistics.median(getattr(run, what) for run in all_runs)
            for what in ("rate", "cpu", "database_cpu", "median", "p99", "refused")
        ]
        print(f"{name:<28}" + "".join(f"{value:>10.2f}" for value in medians), flush=True)
    return json.loads(json.dumps({name: [vars(one) for one in all_runs]
                                  for name, all_runs in runs.items()}))  # fmt: skip
