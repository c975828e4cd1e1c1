"""Two KMEs with certificates, in this process, on loopback."""

from collections.abc import AsyncIterator, Callable
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
