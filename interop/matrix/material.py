"""Certificates of every kind, made once per run, as files that any peer can read."""

from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock

from cryptography.hazmat.primitives import hashes

from hybridkex.auth import DevCa
from hybridkex.auth.dev_ca import write_identity
from interop.matrix.task import Material

__all__ = ["Authority", "Materials"]


@dataclass(frozen=True, kw_only=True)
class Authority:
    """A development CA's certificate (a file) and what it has certified."""

    ca: str
    server: Material
    other: Material
    """The certificate of a server with another name."""
    client: Material


@dataclass
class Materials:
    """All authorities, below one folder; each is made when it is wanted."""

    folder: Path
    _made: dict[str, Authority] = field(default_factory=dict)
    _making: Lock = field(default_factory=Lock)

    def of(self, algorithm: str) -> Authority:
        """The authority whose keys, and those that it certifies, are of this kind."""
        with self._making:
            if algorithm not in self._made:
                self._made[algorithm] = _make(algorithm, self.folder / algorithm)
            return self._made[algorithm]


def _make(algorithm: str, folder: Path) -> Authority:
    ca = DevCa.create(f"interop {algorithm}", algorithm)

    def issue(name: str) -> Material:
        identity = ca.issue(name, algorithm=algorithm)
        _, chain, key = write_identity(folder / name, ca, identity)
        fingerprint = identity.leaf.fingerprint(hashes.SHA256()).hex()
        return Material(name=name, chain=str(chain), key=str(key), fingerprint=fingerprint)

    server = issue("localhost")
    return Authority(
        ca=str(Path(server.chain).with_name("ca.pem")),
        server=server,
        other=issue("other.test"),
        client=issue("client.test"),
    )
