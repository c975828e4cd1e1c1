"""The same calls of three stacks: hybridkex, asyncio's own TLS, and plain TCP."""

import asyncio
import socket
import ssl
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Final

from cryptography import x509
from cryptography.hazmat.primitives import serialization

from hybridkex import X25519, ClientConfig, DevCa, Policy, Requirement, ServerConfig, TrustStore
from hybridkex import aio as secure

__all__ = ["Hybridkex", "Plain", "Stack", "Stock", "contexts"]

Factory = Callable[[], asyncio.BaseProtocol]


@cache
def _authority() -> tuple[DevCa, Any]:
    authority = DevCa.create()
    return authority, authority.issue("localhost")


@cache
def contexts() -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """OpenSSL's side of a client and of a server, limited to TLS 1.3."""
    authority, identity = _authority()
    client = ssl.create_default_context(cadata=authority.pem.decode())
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    certificates = [x509.load_der_x509_certificate(one) for one in identity.chain]
    key = identity.private_key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    with tempfile.TemporaryDirectory(prefix="shells-") as folder:
        path = Path(folder) / "identity.pem"
        path.write_bytes(
            key + b"".join(one.public_bytes(serialization.Encoding.PEM) for one in certificates)
        )
        server.load_cert_chain(path)
    for context in (client, server):
        context.minimum_version = ssl.TLSVersion.TLSv1_3
    server.num_tickets = 0
    return client, server


class Stack(ABC):
    """How a program opens, accepts and upgrades connections. All sides are ``localhost``."""

    name: str
    tls = True

    @abstractmethod
    async def connect(self, factory: Factory, own: socket.socket) -> None:
        """Make a protocol's connection of a connected socket."""

    @abstractmethod
    async def listen(self, factory: Factory, own: socket.socket) -> asyncio.Server:
        """Make protocols of the connections that a socket accepts."""

    @abstractmethod
    async def open(self, own: socket.socket) -> "Streams":
        """Make streams of a connected socket."""

    @abstractmethod
    async def serve(self, connected: Any, own: socket.socket) -> asyncio.Server:
        """Make streams of the connections that a socket accepts."""

    @abstractmethod
    async def upgrade(self, transport: Any, protocol: Any, *, server_side: bool) -> Any:
        """Secure a protocol's connection; returns its transport."""

    @abstractmethod
    async def upgrade_streams(self, streams: "Streams", *, server_side: bool) -> "Streams":
        """Secure streams."""


Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Hybridkex(Stack):
    """:mod:`hybridkex.aio`."""

    name = "hybridkex"

    def __init__(self) -> None:
        authority, identity = _authority()
        # OpenSSL has no ML-KEM before 3.5.
        policy = Policy(post_quantum=Requirement.PREFER)
        self._client: Final = ClientConfig(
            verifier=TrustStore((authority.certificate,)), groups=(X25519,), policy=policy
        )
        self._server: Final = ServerConfig(identities=(identity,), groups=(X25519,), policy=policy)

    async def connect(self, factory: Factory, own: socket.socket) -> None:
        await secure.create_connection(
            factory, None, None, self._client, sock=own, server_hostname="localhost"
        )

    async def listen(self, factory: Factory, own: socket.socket) -> asyncio.Server:
        return await secure.create_server(factory, None, None, self._server, sock=own)

    async def open(self, own: socket.socket) -> Streams:
        return await secure.open_connection(
            None, None, self._client, sock=own, server_hostname="localhost"
        )

    async def serve(self, connected: Any, own: socket.socket) -> asyncio.Server:
        return await secure.start_server(connected, None, None, self._server, sock=own)

    async def upgrade(self, transport: Any, protocol: Any, *, server_side: bool) -> Any:
        if server_side:
            return await secure.start_tls(transport, protocol, self._server)
        return await secure.start_tls(
            transport, protocol, self._client, server_hostname="localhost"
        )

    async def upgrade_streams(self, streams: Streams, *, server_side: bool) -> Streams:
        if server_side:
            return await secure.upgrade(*streams, self._server)
        return await secure.upgrade(*streams, self._client, server_hostname="localhost")


class Plain(Stack):
    """asyncio without TLS, which has half-close."""

    name = "plain"
    tls = False
    _client: ssl.SSLContext | None = None
    _server: ssl.SSLContext | None = None

    @property
    def _name(self) -> str | None:
        return None if self._client is None else "localhost"

    async def connect(self, factory: Factory, own: socket.socket) -> None:
        await asyncio.get_running_loop().create_connection(
            factory, sock=own, ssl=self._client, server_hostname=self._name
        )

    async def listen(self, factory: Factory, own: socket.socket) -> asyncio.Server:
        return await asyncio.get_running_loop().create_server(factory, sock=own, ssl=self._server)

    async def open(self, own: socket.socket) -> Streams:
        return await asyncio.open_connection(sock=own, ssl=self._client, server_hostname=self._name)

    async def serve(self, connected: Any, own: socket.socket) -> asyncio.Server:
        return await asyncio.start_server(connected, sock=own, ssl=self._server)

    async def upgrade(self, transport: Any, protocol: Any, *, server_side: bool) -> Any:
        return transport

    async def upgrade_streams(self, streams: Streams, *, server_side: bool) -> Streams:
        return streams


class Stock(Plain):
    """asyncio's own TLS, or uvloop's."""

    name = "ssl"
    tls = True

    def __init__(self) -> None:
        self._client, self._server = contexts()

    async def upgrade(self, transport: Any, protocol: Any, *, server_side: bool) -> Any:
        return await asyncio.get_running_loop().start_tls(
            transport,
            protocol,
            self._server if server_side else self._client,  # type: ignore[arg-type]
            server_side=server_side,
            server_hostname=None if server_side else "localhost",
        )

    async def upgrade_streams(self, streams: Streams, *, server_side: bool) -> Streams:
        if server_side:
            await streams[1].start_tls(self._server)  # type: ignore[arg-type]
        else:
            await streams[1].start_tls(self._client, server_hostname="localhost")  # type: ignore[arg-type]
        return streams
