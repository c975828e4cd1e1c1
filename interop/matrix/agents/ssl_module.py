"""The standard library's ``ssl``, and ``rtls`` (rustls), which has the same interface."""

import contextlib
import hashlib
import importlib
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from interop.matrix.agents.loop import Blocked, serve
from interop.matrix.task import Material, Task

NAME = sys.argv[1]
FOLDER = Path(sys.argv[2])
"""For key logs."""
ssl: Any = importlib.import_module(NAME)

_CURVES: dict[tuple[str, ...], str] = {("secp256r1",): "prime256v1", ("secp384r1",): "secp384r1"}
"""Groups that a server of the standard library can be limited to, by OpenSSL's names."""


class _Engine:
    def __init__(self, context: Any, task: Task, key_log: Path, session: Any) -> None:
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        more = {"session": session} if session is not None else {}
        self.object = context.wrap_bio(
            self._incoming,
            self._outgoing,
            server_side=task.role == "server",
            server_hostname=task.server_name if task.role == "client" else None,
            **more,
        )
        self._key_log = key_log
        self._psk = task.psk is not None
        self._closed = False

    def feed(self, data: bytes) -> None:
        if data:
            self._incoming.write(data)
        else:
            self._incoming.write_eof()

    def take(self) -> bytes:
        taken: bytes = self._outgoing.read()
        return taken

    def handshake(self) -> None:
        try:
            self.object.do_handshake()
        except ssl.SSLWantReadError:
            raise Blocked from None

    def read(self) -> bytes:
        try:
            data: bytes = self.object.read(1 << 16)
        except ssl.SSLWantReadError:
            raise Blocked from None
        except ssl.SSLZeroReturnError:
            return b""
        return data

    def write(self, data: bytes) -> None:
        while data:
            data = data[self.object.write(data) :]

    def update_keys(self) -> None:
        raise NotImplementedError

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            with contextlib.suppress(ssl.SSLWantReadError):  # The other end's is read later.
                self.object.unwrap()

    def report(self) -> dict[str, Any]:
        shown = self.object.getpeercert(binary_form=True)
        suite = self.object.cipher()[0]
        if self._key_log.exists():
            lines = self._key_log.read_text().splitlines()
            self._key_log.write_text("")
        else:
            lines = None
        return {
            "group": self.object.group() if hasattr(self.object, "group") else None,
            "suite": suite.replace("TLS13_", "TLS_"),
            "alpn": self.object.selected_alpn_protocol() or "",
            # OpenSSL counts an external PSK as a session.
            "resumed": None if self._psk else getattr(self.object, "session_reused", None),
            "peer": shown and hashlib.sha256(shown).hexdigest(),
            "key_log": lines,
        }


def _context(task: Task, own: Material | None, key_log: Path) -> Any:
    client = task.role == "client"
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT if client else ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.keylog_filename = str(key_log)
    if not client and NAME == "ssl" and task.groups[-1:] in _CURVES:
        context.set_ecdh_curve(_CURVES[task.groups[-1:]])
    if task.psk is not None:
        identity, secret = task.psk.identity, bytes.fromhex(task.psk.key)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        if client:
            context.set_psk_client_callback(lambda hint: (identity, secret))
        else:
            context.set_psk_server_callback(lambda name: secret if name == identity else b"")
    if own is not None:
        context.load_cert_chain(own.chain, own.key)
    if task.ca is not None:
        context.load_verify_locations(task.ca)
        context.verify_mode = ssl.CERT_REQUIRED
    if task.alpn:
        context.set_alpn_protocols(list(task.alpn))
    return context


def configure(task: Task) -> Callable[[], _Engine]:
    """Engines of one context; the second resumes the first's session."""
    key_log = FOLDER / str(task.id)
    context, other = _context(task, task.own, key_log), task.other
    if other is not None:
        second = _context(task, other, key_log)

        def choose(connection: Any, name: str | None, _: Any) -> None:
            if name == other.name:
                connection.context = second

        context.sni_callback = choose
    before: list[_Engine] = []

    def connect() -> _Engine:
        session = getattr(before[-1].object, "session", None) if before else None
        before.append(_Engine(context, task, key_log, session if task.role == "client" else None))
        return before[-1]

    return connect


def _version() -> str:
    if NAME == "ssl":
        return f"{sys.version.split()[0]}, {' '.join(ssl.OPENSSL_VERSION.split()[:2])}"
    rustls = importlib.import_module("rtls._rustls")
    return f"{rustls.rustls_version()}, in rtls {version('rtls')}"


if __name__ == "__main__":
    serve(_version(), configure)
