"""tlslite-ng: TLS in Python, with the hybrid groups of kyber-py."""

import hashlib
import os
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from threading import Lock
from typing import Any

from tlslite.api import (  # type: ignore[import-untyped,unused-ignore]
    HandshakeSettings,
    TLSConnection,
    X509CertChain,
    parsePEMKey,
)
from tlslite.constants import GroupName, KeyUpdateMessageType  # type: ignore[import-untyped,unused-ignore]

from interop.matrix.agents.loop import Blocked, serve
from interop.matrix.task import Material, Task

_CIPHERS = {
    "TLS_AES_128_GCM_SHA256": "aes128gcm",
    "TLS_AES_256_GCM_SHA384": "aes256gcm",
    "TLS_CHACHA20_POLY1305_SHA256": "chacha20-poly1305",
}
_SUITES = {0x1301 + number: name for number, name in enumerate(_CIPHERS)}


class _Memory:
    """The part of a socket's interface that tlslite uses."""

    def __init__(self) -> None:
        self.incoming, self.outgoing = bytearray(), bytearray()
        self.ended = False

    def recv(self, size: int) -> bytes:
        if not self.incoming and not self.ended:
            raise BlockingIOError(11, "nothing yet")
        data = bytes(self.incoming[:size])
        del self.incoming[:size]
        return data

    def send(self, data: bytes) -> int:
        self.outgoing += data
        return len(data)

    def sendall(self, data: bytes) -> None:
        self.outgoing += data

    def close(self) -> None:
        pass


class _Engine:
    def __init__(
        self, task: Task, settings: HandshakeSettings, session: Any, own: Material | None
    ) -> None:
        self._task = task
        self._memory = _Memory()
        self.connection = TLSConnection(self._memory)
        self.connection.ignoreAbruptClose = False
        self.connection.closeSocket = False
        chain, key = _load(own) if own is not None else (None, None)
        alpn = [name.encode() for name in task.alpn] or None
        self._waiting: Iterator[Any] | None = None
        if task.role == "client":
            self._handshake = self.connection.handshakeClientCert(
                chain,
                key,
                session=session,
                settings=settings,
                serverName=task.server_name or "",
                alpn=alpn,
                async_=True,
            )
        else:
            self._handshake = self.connection.handshakeServerAsync(
                certChain=chain,
                privateKey=key,
                reqCert=task.ca is not None,
                settings=settings,
                alpn=alpn,
            )

    def feed(self, data: bytes) -> None:
        self._memory.incoming += data
        self._memory.ended = not data

    def take(self) -> bytes:
        taken = bytes(self._memory.outgoing)
        self._memory.outgoing.clear()
        return taken

    def handshake(self) -> None:
        _finish(self._handshake)

    def read(self) -> bytes:
        if self.connection.closed:
            return b""
        if self._waiting is None:
            self._waiting = self.connection.readAsync()
        data = _finish(self._waiting)
        self._waiting = None
        return bytes(data)

    def write(self, data: bytes) -> None:
        _finish(self.connection.writeAsync(data))

    def update_keys(self) -> None:
        _finish(self.connection.send_keyupdate_request(KeyUpdateMessageType.update_requested))

    def close(self) -> None:
        if not self.connection.closed:
            self._waiting = self.connection.closeAsync()
            try:
                _finish(self._waiting)
            except Blocked:
                self._waiting = _then_empty(self._waiting)

    def report(self) -> dict[str, Any]:
        connection, session = self.connection, self.connection.session
        chain = session.serverCertChain if self._task.role == "client" else session.clientCertChain
        group = getattr(connection, "ecdhCurve", None)
        return {
            "group": _NAMES.get(GroupName.toStr(group)) if group else None,
            "suite": _SUITES[session.cipherSuite],
            "alpn": bytes(session.appProto or b"").decode(),
            # Its server does not keep that of a TLS 1.3 session.
            "resumed": connection.resumed if self._task.role == "client" else None,
            "server_name": str(session.serverName) if session.serverName else None,
            "peer": chain and hashlib.sha256(chain.x509List[0].bytes).hexdigest(),
            "exporter": None if self._mutual() else self._export(),
        }

    def _mutual(self) -> bool:
        client = self._task.role == "client"
        return (self._task.own if client else self._task.ca) is not None

    def _export(self) -> str:
        # 0.9.0b2 takes the client's certificate into the transcript of the exporter's secret, where
        # RFC 9846 section 7.1 ends with the server's Finished: no exporter with mutual TLS.
        label = bytearray(self._task.exporter.encode())
        exported: bytearray = self.connection.keyingMaterialExporter(label, 32)
        return exported.hex()


_NAMES = {
    "x25519mlkem768": "X25519MLKEM768",
    "secp256r1mlkem768": "SecP256r1MLKEM768",
    "secp384r1mlkem1024": "SecP384r1MLKEM1024",
    "x25519": "x25519",
    "secp256r1": "secp256r1",
    "secp384r1": "secp384r1",
}


# dilithium-py makes wrong signatures where two threads use it at once.
_ALONE = Lock()


def _finish(steps: Iterator[Any]) -> Any:
    """Drive one of tlslite's generators: 0 and 1 mean that it waits for its socket."""
    with _ALONE:
        for result in steps:
            if isinstance(result, int) and result in (0, 1):
                raise Blocked
            return result
    return None


def _then_empty(steps: Iterator[Any]) -> Iterator[Any]:
    """Treat a close that waits for the other end's as a read without data."""
    yield from steps
    yield b""


def _load(own: Material) -> tuple[Any, Any]:
    chain = X509CertChain()
    with _ALONE:
        chain.parsePemList(Path(own.chain).read_text())
        return chain, parsePEMKey(Path(own.key).read_text(), private=True)


def configure(task: Task) -> Callable[[], _Engine]:
    """Engines of one configuration; the second resumes the first's session."""
    settings = HandshakeSettings()
    settings.minVersion = settings.maxVersion = (3, 4)
    settings.use_heartbeat_extension = False
    if task.groups:
        settings.eccCurves = [name.lower() for name in task.groups]
        settings.keyShares = settings.eccCurves[:1]
        settings.dhGroups = []
    if task.suites:
        settings.cipherNames = [_CIPHERS[name] for name in task.suites]
    if task.role == "server":
        settings.ticketKeys = [os.urandom(32)]
    if task.psk is not None:
        key = bytes.fromhex(task.psk.key)
        settings.pskConfigs = [(task.psk.identity.encode(), key, "sha256")]
        settings.psk_modes = ["psk_dhe_ke"]
    before: list[_Engine] = []

    def connect() -> _Engine:
        session = None
        if before and task.role == "client":
            session = before[-1].connection.session
            session.tickets = before[-1].connection.tickets
        before.append(_Engine(task, settings, session, task.own))
        return before[-1]

    return connect


if __name__ == "__main__":
    serve(version("tlslite-ng"), configure)
