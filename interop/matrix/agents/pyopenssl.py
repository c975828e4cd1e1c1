"""OpenSSL of the `cryptography` wheel, through pyOpenSSL."""

import hashlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from OpenSSL import SSL, crypto
from OpenSSL import __version__ as pyopenssl_version

from interop.matrix.agents.loop import Blocked, serve
from interop.matrix.task import Material, Psk, Task

# pyOpenSSL has no methods for groups, PSKs and resumption; its binding has.
_binding: Any = SSL
_lib, _ffi = _binding._lib, _binding._ffi


class _Engine:
    def __init__(
        self, connection: SSL.Connection, task: Task, key_log: list[str], callbacks: list[Any]
    ) -> None:
        self.connection = connection
        self._callbacks = callbacks  # Kept alive as long as OpenSSL may call them.
        self._task = task
        self._key_log = key_log
        self._closed = False

    def feed(self, data: bytes) -> None:
        if data:
            self.connection.bio_write(data)
        else:
            self.connection.bio_shutdown()

    def take(self) -> bytes:
        taken = b""
        while True:
            try:
                taken += self.connection.bio_read(1 << 18)
            except SSL.WantReadError:
                return taken

    def handshake(self) -> None:
        try:
            self.connection.do_handshake()
        except SSL.WantReadError:
            raise Blocked from None

    def read(self) -> bytes:
        try:
            return self.connection.recv(1 << 16)
        except SSL.WantReadError:
            raise Blocked from None
        except SSL.ZeroReturnError:
            return b""

    def write(self, data: bytes) -> None:
        self.connection.sendall(data)

    def update_keys(self) -> None:
        raise NotImplementedError

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self.connection.shutdown()

    def report(self) -> dict[str, Any]:
        connection = self.connection
        shown = connection.get_peer_certificate(as_cryptography=True)
        name = connection.get_servername()
        return {
            "group": connection.get_group_name(),
            "suite": connection.get_cipher_name(),
            "alpn": connection.get_alpn_proto_negotiated().decode(),
            # OpenSSL counts an external PSK as a session.
            "resumed": None if self._task.psk else bool(_lib.SSL_session_reused(connection._ssl)),
            "server_name": name.decode() if name else None,
            "peer": shown and hashlib.sha256(shown.public_bytes(Encoding.DER)).hexdigest(),
            "exporter": connection.export_keying_material(
                self._task.exporter.encode(), 32, b""
            ).hex(),
            "key_log": _taken(self._key_log),
        }


def _taken(lines: list[str]) -> list[str]:
    taken = lines.copy()
    lines.clear()
    return taken


def _load(context: SSL.Context, own: Material) -> None:
    # Through its PEM, since use_privatekey does not take the key objects of ML-DSA.
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
        pem = Path(own.key).read_bytes()
        context.use_privatekey(crypto.load_privatekey(crypto.FILETYPE_PEM, pem))
    leaf, *others = x509.load_pem_x509_certificates(Path(own.chain).read_bytes())
    context.use_certificate(leaf)
    for certificate in others:
        context.add_extra_chain_cert(certificate)


def _offer(context: SSL.Context, psk: Psk) -> list[Any]:
    """Make the callbacks for an external PSK; the caller must keep a reference to them."""
    key = bytes.fromhex(psk.key)

    def client(_: Any, hint: Any, identity: Any, room: int, value: Any, most: int) -> int:
        _ffi.memmove(identity, psk.identity.encode() + b"\0", len(psk.identity) + 1)
        _ffi.memmove(value, key, len(key))
        return len(key)

    def server(_: Any, identity: Any, value: Any, most: int) -> int:
        if _ffi.string(identity).decode() != psk.identity:
            return 0
        _ffi.memmove(value, key, len(key))
        return len(key)

    offer = _ffi.callback(
        "unsigned int(SSL *, const char *, char *, unsigned int, unsigned char *, unsigned int)",
        client,
    )
    find = _ffi.callback("unsigned int(SSL *, const char *, unsigned char *, unsigned int)", server)
    _lib.SSL_CTX_set_psk_client_callback(context._context, offer)
    _lib.SSL_CTX_set_psk_server_callback(context._context, find)
    return [offer, find]


def _context(task: Task, own: Material | None, key_log: list[str]) -> SSL.Context:
    context = SSL.Context(SSL.TLS_METHOD)
    context.set_min_proto_version(SSL.TLS1_3_VERSION)
    context.set_keylog_callback(lambda _, line: key_log.append(line.decode()))
    if task.role == "server":
        context.set_session_id(b"interop")
    if own is not None:
        _load(context, own)
    if task.ca is not None:
        context.load_verify_locations(task.ca)
        context.set_verify(SSL.VERIFY_PEER | SSL.VERIFY_FAIL_IF_NO_PEER_CERT)
    if task.suites:
        context.set_tls13_ciphersuites(":".join(task.suites).encode())
    if task.groups:
        names = ":".join(task.groups).encode()
        if _lib.SSL_CTX_set1_curves_list(context._context, names) != 1:
            raise ValueError(f"OpenSSL does not know one of {names.decode()}")
    if task.alpn and task.role == "client":
        context.set_alpn_protos([name.encode() for name in task.alpn])
    elif task.alpn:
        context.set_alpn_select_callback(
            lambda _, offered: next(name.encode() for name in task.alpn if name.encode() in offered)
        )
    return context


def _verify_name(connection: SSL.Connection, name: str) -> None:
    """Set the name that the certificate must have (X509_VERIFY_PARAM_set1_host)."""
    parameters = _lib.SSL_get0_param(connection._ssl)
    if _lib.X509_VERIFY_PARAM_set1_host(parameters, name.encode(), len(name)) != 1:
        raise ValueError(f"OpenSSL does not take the name {name}")


def configure(task: Task) -> Callable[[], _Engine]:
    """Engines of one context; the second resumes the first's session."""
    other = task.other
    key_log: list[str] = []
    context = _context(task, task.own, key_log)
    callbacks = _offer(context, task.psk) if task.psk is not None else []
    if other is not None:
        second = _context(task, other, key_log)

        def choose(connection: SSL.Connection) -> None:
            if connection.get_servername() == other.name.encode():
                connection.set_context(second)

        context.set_tlsext_servername_callback(choose)
    before: list[_Engine] = []

    def connect() -> _Engine:
        connection = SSL.Connection(context)
        if task.role == "server":
            connection.set_accept_state()
        else:
            connection.set_connect_state()
            if task.server_name is not None:
                connection.set_tlsext_host_name(task.server_name.encode())
                _verify_name(connection, task.server_name)
            if before:
                session = before[-1].connection.get_session()
                assert session is not None
                connection.set_session(session)
        # OpenSSL spoils the session of a connection that is freed before its close.
        before.append(_Engine(connection, task, key_log, callbacks))
        return before[-1]

    return connect


if __name__ == "__main__":
    linked = SSL.SSLeay_version(SSL.SSLEAY_VERSION).decode().split()[1]
    serve(f"{pyopenssl_version}, OpenSSL {linked}", configure)
