"""Two KMEs with certificates, in this process, on loopback; and a PostgreSQL server."""

import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import trio

from hybridkex.auth.dev_ca import DevCa, write_identity
from hybridkex.kme.config import KmeConfig, PeerConfig, ServeConfig
from hybridkex.kme.serve import KmeServer, Serving
from hybridkex.net.address import TcpAddress
from hybridkex.qkd.etsi014.client import KmeAccess
from hybridkex.qkd.store import write_key_file
from interop.postgres import NoPostgres, PostgresServer


@dataclass(frozen=True)
class Site:
    """The folder of a test: a CA, and certificates by holder."""

    folder: Path
    ca: DevCa

    def holder(self, name: str, *, uris: tuple[str, ...] = ()) -> Path:
        folder = self.folder / name.replace("/", "_")
        if not folder.exists():
            identity = self.ca.issue("127.0.0.1", "localhost", common_name=name, uris=uris)
            write_identity(folder, self.ca, identity)
        return folder

    def kme(self, kme_id: str, *, saes: tuple[str, ...], **changes: Any) -> KmeConfig:
        folder = self.holder(kme_id)
        key_file = folder / "store.key"
        if not key_file.exists():
            write_key_file(key_file)
        return KmeConfig(
            id=kme_id,
            listen=changes.pop("listen", TcpAddress("127.0.0.1", 0)),
            saes=saes,
            ca=folder / "ca.pem",
            certificate=folder / "cert.pem",
            key=folder / "key.pem",
            store=folder / "store.db",
            key_file=key_file,
            **changes,
        )

    def pair(self, **changes: Any) -> ServeConfig:
        """kme-a with alice and carol, kme-b with bob and dave; one random link in one process."""
        a, b = ("alice", "carol"), ("bob", "dave")
        return ServeConfig(
            kme=(
                self.kme("kme-a", saes=a, peer=(PeerConfig(id="kme-b", saes=b),), **changes),
                self.kme("kme-b", saes=b, peer=(PeerConfig(id="kme-a", saes=a),), **changes),
            )
        )

    def access(self, sae: str, address: TcpAddress, **changes: Any) -> KmeAccess:
        folder = self.holder(sae)
        access = KmeAccess(
            url=f"https://{address}",
            ca=folder / "ca.pem",
            certificate=folder / "cert.pem",
            key=folder / "key.pem",
        )
        return replace(access, **changes)


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path, DevCa.create())


@asynccontextmanager
async def serving(config: ServeConfig) -> AsyncIterator[Serving]:
    server = KmeServer(config)
    async with trio.open_nursery() as nursery:
        where = await nursery.start(lambda task_status: server.serve(task_status=task_status))
        try:
            yield where
        finally:
            server.close()


@pytest.fixture
def serve() -> Callable[[ServeConfig], AbstractAsyncContextManager[Serving]]:
    """``async with serve(config) as where``."""
    return serving


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """A running server with the role ``kme``, which is not a superuser."""
    pytest.importorskip("psycopg")
    with tempfile.TemporaryDirectory(prefix="hybridkex-") as name:
        try:
            # It would fill the planner's statistics at some moment, which one test wants empty.
            server = PostgresServer(Path(name), autovacuum="off")
        except NoPostgres as reason:
            pytest.skip(str(reason))
        server.start()
        try:
            server.make_role()
            yield server
        finally:
            server.stop()
