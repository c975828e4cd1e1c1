"""kill -9 at random instants: nothing is delivered twice, nothing is lost that was not in flight.

The KMEs are real processes, started with ``hybridkex kme serve`` on fixed ports, killed with
SIGKILL and started again while eight pairs of SAEs draw keys from them as fast as they can.
"""

import random
import signal
import socket
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import trio
from forked import Forkserver, Running

from hybridkex.errors import KeySourceError, KeySourceUnavailable, KeyUnknown
from hybridkex.net.address import TcpAddress
from hybridkex.qkd.etsi014.client import KmeAccess, KmeClient
from hybridkex.qkd.etsi014.models import KeyRequest
from hybridkex.qkd.sqlite_store import SqliteKeyStore
from hybridkex.qkd.store import read_key_file, write_key_file
from interop.ports import free_port

Site = Any  # of conftest.py

PAIRS = 8
SAES = {"kme-a": [f"alice-{i}" for i in range(PAIRS)], "kme-b": [f"bob-{i}" for i in range(PAIRS)]}
OTHER = {"kme-a": "kme-b", "kme-b": "kme-a"}


def accepts(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def table(site: Site, kme: str, ports: dict[str, int], *, two_processes: bool) -> str:
    folder = site.holder(kme)
    if not (folder / "store.key").exists():
        write_key_file(folder / "store.key")
    other = OTHER[kme]
    url = f'url = "https://127.0.0.1:{ports[other]}"' if two_processes else ""
    return f"""
[[kme]]
id = "{kme}"
listen = "127.0.0.1:{ports[kme]}"
saes = {SAES[kme]!r}
ca = "{folder}/ca.pem"
certificate = "{folder}/cert.pem"
key = "{folder}/key.pem"
store = "{folder}/store.db"
key_file = "{folder}/store.key"
limits = {{ rate = 100000.0, burst = 100000 }}
[[kme.peer]]
id = "{other}"
saes = {SAES[other]!r}
{url}
"""


@dataclass
class Server:
    """A KME process that is killed and started again."""

    hybridkex: Forkserver
    config: Path
    process: Running | None = None
    kills: int = 0

    def start(self) -> None:
        self.process = self.hybridkex.start("kme", "serve", self.config)

    def kill(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        self.kills += 1

    def stop(self) -> int:
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=20)


@dataclass
class Record:
    """What one run saw."""

    master: dict[str, bytes] = field(default_factory=dict)
    slave: dict[str, bytes] = field(default_factory=dict)
    lost_at_slave: set[str] = field(default_factory=set)
    lost_requests: int = 0
    asked_again: int = 0

    def delivered(self, side: dict[str, bytes], keys: Iterable[tuple[str, bytes]]) -> None:
        for key_id, key in keys:
            assert key_id not in side, f"{key_id} was delivered twice"
            side[key_id] = key


def never_sent(error: KeySourceError) -> bool:
    return "cannot be reached" in str(error) or "cannot be used" in str(error)


async def one_pair(
    index: int, accesses: dict[str, KmeAccess], record: Record, keys: int, batch: int
) -> None:
    alice, bob = SAES["kme-a"][index], SAES["kme-b"][index]
    drawn = 0
    async with KmeClient(accesses[alice]) as master, KmeClient(accesses[bob]) as slave:
        while drawn < keys:
            try:
                found = await master.enc_keys(bob, KeyRequest(number=batch))
            except KeySourceError as error:
                # 503 is an answer (no keys yet, or the other KME is down); the rest are kills.
                if not never_sent(error) and "answered 503" not in str(error):
                    record.lost_requests += 1
                await trio.sleep(0.02)
                continue
            record.delivered(record.master, [(k.key_id, k.key.reveal()) for k in found.keys])
            drawn += len(found.keys)
            await fetch(slave, alice, [k.key_id for k in found.keys], record)


async def fetch(slave: KmeClient, master: str, ids: list[str], record: Record) -> None:
    in_flight = False
    while True:
        try:
            got = await slave.dec_keys(master, ids)
        except KeyUnknown:
            # Only an answer that a kill has cut off may have taken the keys with it.
            assert in_flight, "keys are gone that were never in flight"
            record.lost_at_slave.update(ids)
            return
        except KeySourceUnavailable as error:
            if not never_sent(error) and "answered 503" not in str(error):
                in_flight = True
                record.asked_again += 1
            await trio.sleep(0.02)
            continue
        record.delivered(record.slave, [(k.key_id, k.key.reveal()) for k in got.keys])
        return


async def run_and_kill(
    site: Site, servers: list[Server], ports: dict[str, int], *, keys: int, batch: int, kills: int
) -> Record:
    record = Record()
    accesses = {
        sae: site.access(sae, TcpAddress("127.0.0.1", ports[kme]))
        for kme in SAES
        for sae in SAES[kme]
    }
    choice = random.Random(14)
    done = trio.Event()

    async def killer() -> None:
        while not done.is_set():
            await trio.sleep(choice.uniform(0.05, 0.4))
            server = choice.choice(servers)
            if server.kills < kills:
                before = len(record.slave)
                await trio.to_thread.run_sync(server.kill)
                server.start()
                # Some keys between two kills, so that the test ends.
                while len(record.slave) < before + 50 and not done.is_set():  # noqa: ASYNC110
                    await trio.sleep(0.02)

    for server in servers:
        server.start()
    try:
        with trio.fail_after(150):
            async with trio.open_nursery() as outer:
                outer.start_soon(killer)
                async with trio.open_nursery() as pairs:
                    for index in range(PAIRS):
                        pairs.start_soon(one_pair, index, accesses, record, keys // PAIRS, batch)
                done.set()
        for server, port in zip(servers, ports.values(), strict=False):
            while not accepts(port):  # the last kill may be a moment ago  # noqa: ASYNC110
                await trio.sleep(0.05)
            assert server.stop() == 0
    finally:
        for server in servers:
            if server.process is not None and server.process.poll() is None:
                server.process.kill()
                server.process.wait()
    return record


async def stock(site: Site, kme: str) -> tuple[set[str], set[str]]:
    """The IDs of material and the IDs that are spent, from the database of a stopped KME."""
    folder = site.holder(kme)
    store = SqliteKeyStore(folder / "store.db", read_key_file(folder / "store.key"))
    rows = [
        {row[0] for row in store._db.execute(f"SELECT key_id FROM {name}")}
        for name in ("material", "spent")
    ]
    await store.aclose()
    return rows[0], rows[1]


def check(record: Record, keys: int) -> None:
    assert len(record.master) >= keys
    for key_id, key in record.slave.items():
        assert record.master[key_id] == key, f"the two sides of {key_id} differ"
    assert record.slave.keys() | record.lost_at_slave == record.master.keys()
    assert not record.slave.keys() & record.lost_at_slave


@pytest.mark.slow
async def test_both_kmes_in_one_process(site: Site, hybridkex: Forkserver) -> None:
    ports = {kme: free_port() for kme in SAES}
    config = site.folder / "kme.toml"
    config.write_text("".join(table(site, kme, ports, two_processes=False) for kme in SAES))
    server, batch = Server(hybridkex, config), 40
    record = await run_and_kill(site, [server], ports, keys=10_000, batch=batch, kills=10)
    check(record, 10_000)
    assert server.kills >= 5
    assert record.lost_requests + record.asked_again > 0, "no kill hit a request"

    (here, spent_here), (there, _) = [await stock(site, kme) for kme in SAES]
    # Every key that left the pool reached its master or was in a request that a kill cut off...
    missing = spent_here - record.master.keys()
    link_crash = server.kills * 2 * 64  # the producer's batch that one end had and the other not
    assert len(missing) <= record.lost_requests * batch + link_crash
    # ...and what is left is on both sides, but for a batch on its way when the server was stopped.
    assert len(here ^ there) <= 64 + record.lost_requests * batch
    assert len(here & there) > 0


@pytest.mark.slow
async def test_two_processes(site: Site, hybridkex: Forkserver) -> None:
    """Each KME is killed on its own, so that the message between them is cut off as well."""
    ports = {kme: free_port() for kme in SAES}
    servers = []
    for kme in SAES:
        config = site.folder / f"{kme}.toml"
        config.write_text(table(site, kme, ports, two_processes=True))
        servers.append(Server(hybridkex, config))
    record = await run_and_kill(site, servers, ports, keys=2_000, batch=20, kills=3)
    check(record, 2_000)
    assert all(server.kills for server in servers)
    _, spent = await stock(site, "kme-a")
    # A request that waited for the promise of the KME that was killed is answered with 503, and its
    # keys are erased, for the promise may have been made.
    cut_between = servers[1].kills * len(SAES["kme-b"])
    assert len(spent - record.master.keys()) <= (record.lost_requests + cut_between) * 20
