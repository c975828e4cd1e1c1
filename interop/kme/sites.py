"""Two sites: their processes, their stores, and the network between them."""

import os
import resource
import signal
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Final

import trio

from hybridkex.auth.dev_ca import DevCa, write_identity
from hybridkex.qkd.etsi014.client import KmeAccess
from hybridkex.qkd.store import write_key_file
from interop.immutable import immutable
from interop.kme.process import QUICK_GRACE, QUICK_LIMITS, Manner, start
from interop.ports import free_port
from interop.postgres import PostgresServer

__all__ = ["KMES", "Cable", "Site", "Sites"]

KMES: Final = ("kme-a", "kme-b")

CONFIG: Final = """
[[kme]]
id = "{kme}"
listen = "127.0.0.1:{port}"
reuse_port = {shared}
saes = {saes}
ca = "ca.pem"
certificate = "cert.pem"
key = "key.pem"
store = "{store}"
key_file = "store.key"
{times}
[kme.limits]
rate = 1e9
burst = 1000000000
peer_rate = 1e9
peer_burst = 1000000000
# A clock that is a day ahead makes no key too old.
key_ttl = 864000.0
{limits}

[[kme.peer]]
id = "{peer}"
saes = {peer_saes}
url = "https://127.0.0.1:{url}"
"""


@dataclass
class Cable:
    """What leads to a site: a port that passes on connections unless it is cut."""

    to: int
    port: int = field(default_factory=free_port)
    _cuts: int = 0
    _scopes: set[trio.CancelScope] = field(default_factory=set)

    async def run(self) -> None:
        await trio.serve_tcp(self._pass_on, self.port, host="127.0.0.1")

    @contextmanager
    def cut(self) -> Iterator[None]:
        """It is cut, and with it all connections."""
        self._cuts += 1
        for scope in self._scopes:
            scope.cancel()
        try:
            yield
        finally:
            self._cuts -= 1

    async def _pass_on(self, here: trio.SocketStream) -> None:
        if self._cuts:
            return
        with trio.CancelScope() as scope, suppress(OSError, trio.BrokenResourceError):
            self._scopes.add(scope)
            try:
                there = await trio.open_tcp_stream("127.0.0.1", self.to)
                async with there, trio.open_nursery() as nursery:
                    nursery.start_soon(_copy, here, there, nursery.cancel_scope)
                    nursery.start_soon(_copy, there, here, nursery.cancel_scope)
            finally:
                self._scopes.discard(scope)


async def _copy(one: trio.SocketStream, other: trio.SocketStream, end: trio.CancelScope) -> None:
    with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
        async for data in one:
            await other.send_all(data)
    end.cancel()


@dataclass
class Site:
    """A KME: one process or several, and their store."""

    folder: Path
    port: int
    log: Path
    database: PostgresServer | None
    store: str
    """As in the configuration."""
    schema: str
    """Of the tables in the database."""
    cable: Cable
    manner: Manner
    number: int
    """Of processes."""
    processes: list[BaseProcess] = field(default_factory=list)
    turns: list[trio.Lock] = field(init=False)
    """For each process, of those who kill, stop or start it."""
    database_turn: trio.Lock = field(default_factory=trio.Lock)

    def __post_init__(self) -> None:
        self.turns = [trio.Lock() for _ in range(self.number)]

    def start_all(self) -> None:
        """Start all processes."""
        for index in range(self.number):
            self.start(index)

    def start(self, index: int) -> None:
        """Start a process that has not been started or has ended."""
        self.processes[index : index + 1] = [start(self.folder, self.log, self.manner)]

    def signal(self, index: int, number: int) -> None:
        """Send a signal to a process that may have ended."""
        process = self.processes[index]
        if process.is_alive() and process.pid is not None:
            with suppress(ProcessLookupError):
                os.kill(process.pid, number)

    def kill(self, index: int) -> None:
        """kill -9; blocks briefly."""
        self.signal(index, signal.SIGKILL)
        self.processes[index].join()

    async def kill_soon(self, index: int) -> None:
        """kill -9."""
        self.signal(index, signal.SIGKILL)
        while self.processes[index].is_alive():  # noqa: ASYNC110
            await trio.sleep(0.002)

    async def keep_alive(self, index: int) -> None:
        """Start a process again whenever it ends by itself, as systemd does."""
        while True:
            await trio.sleep(0.1)
            async with self.turns[index]:
                if not self.processes[index].is_alive():
                    self.start(index)

    def set_clock(self, ahead: float) -> None:
        """Let the clocks of all processes be so many seconds ahead."""
        new = self.folder / "clock.new"
        new.write_text(str(ahead))
        new.replace(self.folder / "clock")

    @contextmanager
    def full_disk(self) -> Iterator[None]:
        """No file of the processes that run now can grow."""
        with limited_files([one.pid for one in self.processes if one.is_alive()]):
            yield

    @contextmanager
    def read_only(self) -> Iterator[None]:
        """The files of the store cannot be changed, whoever has them open."""
        with immutable(self.folder.glob("keys.db*")):
            yield

    def spent(self) -> set[str]:
        """The IDs of all keys that have left the stock, while no process runs."""
        if self.database is not None:
            return self.database.column(f"SELECT key_id FROM {self.schema}.spent")
        with closing(sqlite3.connect(self.folder / "keys.db")) as db:
            return {key_id for (key_id,) in db.execute("SELECT key_id FROM spent")}


@contextmanager
def limited_files(pids: Iterable[int | None]) -> Iterator[None]:
    """No file of these processes can grow (RLIMIT_FSIZE)."""
    known = [pid for pid in pids if pid is not None]
    try:
        _limit_files(known, 0)
        yield
    finally:
        _limit_files(known, resource.RLIM_INFINITY)


def _limit_files(pids: Iterable[int], size: int) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


class Sites:
    """Both sites, with their certificates and files.

    Args:
        folder: empty.
        saes: of each site.
        processes: of each site.
        databases: of each site; ``None``: SQLite.
        limits: further limits of the KMEs, in TOML.
        cables: the sites reach each other through these; otherwise directly.
        manner: of the processes.
    """

    def __init__(
        self,
        folder: Path,
        saes: dict[str, list[str]],
        processes: int,
        databases: list[PostgresServer] | None,
        *,
        limits: str = "",
        cables: bool = True,
        manner: Manner = Manner(),  # noqa: B008  # it cannot change
    ) -> None:
        self.folder = folder
        self.manner = manner
        self._ca = DevCa.create("two sites")
        ports = {kme: free_port() for kme in KMES}
        lines = {kme: Cable(to=ports[kme]) for kme in KMES}
        self.sites: dict[str, Site] = {}
        for holder in (*KMES, *saes[KMES[0]], *saes[KMES[1]]):
            identity = self._ca.issue("127.0.0.1", "localhost", common_name=holder)
            write_identity(folder / holder, self._ca, identity)
        for index, kme in enumerate(KMES):
            peer = KMES[1 - index]
            write_key_file(folder / kme / "store.key")
            database = databases[index] if databases is not None else None
            store = "keys.db" if database is None else database.make_schema(f"site_{index}")
            (folder / kme / "kme.toml").write_text(
                CONFIG.format(
                    kme=kme,
                    port=ports[kme],
                    shared=str(processes > 1).lower(),
                    saes=saes[kme],
                    store=store,
                    peer=peer,
                    peer_saes=saes[peer],
                    url=lines[peer].port if cables else ports[peer],
                    limits=limits + (f"sync_grace = {QUICK_GRACE}" if manner.quick else ""),
                    times=QUICK_LIMITS if manner.quick else "",
                )
            )
            site = Site(
                folder / kme, ports[kme], folder / f"{kme}.log", database, store, f"site_{index}",
                lines[kme], manner, processes,
            )  # fmt: skip
            site.set_clock(0)
            self.sites[kme] = site

    def start(self) -> None:
        """Start all processes."""
        for site in self.sites.values():
            site.start_all()

    def access(self, sae: str, kme: str) -> KmeAccess:
        files = self.folder / sae
        return KmeAccess(
            url=f"https://127.0.0.1:{self.sites[kme].port}",
            ca=files / "ca.pem",
            certificate=files / "cert.pem",
            key=files / "key.pem",
            timeout=2.0 if self.manner.quick else 8.0,
        )

    def close(self) -> None:
        """End all processes."""
        for site in self.sites.values():
            for index in range(len(site.processes)):
                site.kill(index)
