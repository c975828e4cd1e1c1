"""Two sites: their processes, their stores, and the network between them."""

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import trio

from hybridkex.auth.dev_ca import DevCa, write_identity
from hybridkex.qkd.etsi014.client import KmeAccess
from hybridkex.qkd.store import write_key_file
from interop.ports import free_port
from interop.postgres import PostgresServer

__all__ = ["KMES", "Cable", "Site", "Sites"]

KMES: Final = ("kme-a", "kme-b")
ROOT: Final = Path(__file__).parents[2]

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
    """What connects one site with the other: a port that passes on connections until it is cut."""

    to: int
    port: int = field(default_factory=free_port)
    cut: bool = False
    _scopes: set[trio.CancelScope] = field(default_factory=set)

    async def run(self) -> None:
        await trio.serve_tcp(self._pass_on, self.port, host="127.0.0.1")

    def set_cut(self, cut: bool) -> None:
        self.cut = cut
        if cut:
            for scope in self._scopes:
                scope.cancel()

    async def _pass_on(self, here: trio.SocketStream) -> None:
        if self.cut:
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
    processes: list["subprocess.Popen[bytes]"] = field(default_factory=list)

    def start(self) -> None:
        """One more process."""
        with self.log.open("ab") as log:
            self.processes.append(
                subprocess.Popen(
                    [
                        *(sys.executable, "-m", "interop.kme.clock", self.folder / "clock"),
                        *("kme", "serve", self.folder / "kme.toml"),
                    ],
                    stdout=subprocess.DEVNULL,
                    stderr=log,
                    cwd=ROOT,
                )
            )

    def set_clock(self, ahead: float) -> None:
        """Let the clocks of all processes be so many seconds ahead."""
        new = self.folder / "clock.new"
        new.write_text(str(ahead))
        new.replace(self.folder / "clock")

    def kill(self, process: "subprocess.Popen[bytes]") -> None:
        process.kill()
        process.wait()
        self.processes.remove(process)

    @contextmanager
    def full_disk(self) -> Iterator[None]:
        """No file can grow."""
        kind = resource.RLIMIT_FSIZE
        for process in self.processes:
            resource.prlimit(process.pid, kind, (0, resource.RLIM_INFINITY))
        try:
            yield
        finally:
            for process in self.processes:
                if process.poll() is None:
                    resource.prlimit(process.pid, kind, (resource.RLIM_INFINITY,) * 2)


class Sites:
    """Both sites, with their certificates and files.

    Args:
        folder: empty.
        saes: of each site.
        processes: of each site.
        databases: of each site; ``None``: SQLite.
        limits: further limits of the KMEs, in TOML.
        cables: the sites reach each other through these; otherwise directly.
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
    ) -> None:
        self.folder = folder
        self._processes = processes
        self._ca = DevCa.create("two sites")
        ports = {kme: free_port() for kme in KMES}
        self.cables = {kme: Cable(to=ports[kme]) for kme in KMES}
        """By the site that they lead to."""
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
                    url=self.cables[peer].port if cables else ports[peer],
                    limits=limits,
                )
            )
            site = Site(folder / kme, ports[kme], folder / f"{kme}.log", database, store)
            site.set_clock(0)
            self.sites[kme] = site

    def start(self) -> None:
        """Start all processes."""
        for site in self.sites.values():
            for _ in range(self._processes):
                site.start()

    def access(self, sae: str, kme: str) -> KmeAccess:
        files = self.folder / sae
        return KmeAccess(
            url=f"https://127.0.0.1:{self.sites[kme].port}",
            ca=files / "ca.pem",
            certificate=files / "cert.pem",
            key=files / "key.pem",
            timeout=8.0,
        )

    def close(self) -> None:
        for site in self.sites.values():
            for process in site.processes:
                with suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGCONT)
                process.kill()
                process.wait()
