"""Full and resumed handshakes beside pyOpenSSL: CPU time of both ends, in memory and over TCP.

Both libraries go through the same loop, in one thread, with X25519MLKEM768, an ECDSA P-256
certificate and a verifying client.
"""

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

from benchmarks.engines import Pair
from benchmarks.processes import has
from benchmarks.results import OURS, Options, Row, in_turns
from hybridkex import (
    ClientConfig,
    ClientConnection,
    DevCa,
    MemoryTicketStore,
    ServerConfig,
    ServerConnection,
    TrustStore,
)
from hybridkex.tls.events import SessionProposed

__all__ = ["run"]

CA = DevCa.create()
IDENTITY = CA.issue("localhost")
CLIENT = ClientConfig(verifier=TrustStore((CA.certificate,)))
SERVER = ServerConfig(identities=(IDENTITY,))
PEER = "pyOpenSSL"


class Ours:
    """The engine on a socket."""

    def __init__(self, sock: socket.socket, connection: ClientConnection | ServerConnection):
        self.sock, self.connection = sock, connection
        if isinstance(connection, ClientConnection):
            connection.start()
            self._send()

    def step(self) -> bool:
        """Read and write the available bytes; returns whether the handshake is complete."""
        connection = self.connection
        if not connection.handshake_complete:
            connection.receive_data(self.sock.recv(65536))
            while (event := connection.next_event()) is not None:
                if isinstance(event, SessionProposed):
                    connection.accept()
            self._send()
        return connection.handshake_complete

    def _send(self) -> None:
        if self.connection.has_data_to_send:
            self.sock.sendall(self.connection.data_to_send())


class Theirs:
    """pyOpenSSL on a socket."""

    def __init__(self, sock: socket.socket, connection: Any, *, server: bool):
        from OpenSSL import SSL  # noqa: PLC0415

        self.sock, self.connection, self.complete = sock, connection, False
        self.waits = SSL.WantReadError
        if server:
            connection.set_accept_state()
        else:
            connection.set_connect_state()
            self._advance()

    def step(self) -> bool:
        """As with :class:`Ours`."""
        if not self.complete:
            self.connection.bio_write(self.sock.recv(65536))
            self._advance()
        return self.complete

    def _advance(self) -> None:
        with suppress(self.waits):
            self.connection.do_handshake()
            self.complete = True
        with suppress(self.waits):
            self.sock.sendall(self.connection.bio_read(65536))


Make = Callable[[socket.socket, socket.socket], tuple[Ours | Theirs, Ours | Theirs]]


def over_tcp(listener: socket.socket, count: int, make: Make) -> float:
    """CPU microseconds of a connection and its handshake."""
    began = time.process_time()
    for _ in range(count):
        near = socket.create_connection(listener.getsockname())
        far, _ = listener.accept()
        client, server = make(near, far)
        complete = False
        while not complete:
            complete = server.step() & client.step()
        near.close()
        far.close()
    return (time.process_time() - began) / count * 1e6


def ours(client: ClientConfig) -> Make:
    return lambda near, far: (
        Ours(near, ClientConnection(client, "localhost")),
        Ours(far, ServerConnection(SERVER)),
    )


def peer() -> tuple[Any, Any]:
    """Contexts of a client and a server."""
    from OpenSSL import SSL, crypto  # noqa: PLC0415

    server, client = SSL.Context(SSL.TLS_METHOD), SSL.Context(SSL.TLS_METHOD)
    server.use_certificate(IDENTITY.leaf)
    server.use_privatekey(IDENTITY.private_key)
    store = client.get_cert_store()
    assert store is not None
    store.add_cert(crypto.X509.from_cryptography(CA.certificate))
    client.set_verify(SSL.VERIFY_PEER)
    return client, server


def theirs() -> Make:
    from OpenSSL import SSL  # noqa: PLC0415

    client, server = peer()
    return lambda near, far: (
        Theirs(near, SSL.Connection(client), server=False),
        Theirs(far, SSL.Connection(server), server=True),
    )


class SameTicket(MemoryTicketStore):
    """Returns the same ticket every time, so that only handshakes are measured."""

    def take(self, server, binding=None):  # type: ignore[no-untyped-def]
        ticket = super().take(server, binding)
        if ticket is not None:
            self.put(server, ticket)
        return ticket


def resuming() -> ClientConfig:
    """A client with a ticket."""
    client = ClientConfig(verifier=TrustStore((CA.certificate,)), ticket_store=SameTicket())
    pair = Pair(client, SERVER).handshake()
    pair.server.send_data(b"x")
    pair.carry()
    return client


def in_memory(count: int) -> float:
    """Our handshakes per second."""
    began = time.process_time()
    for _ in range(count):
        Pair(CLIENT, SERVER).handshake()
    return count / (time.process_time() - began)


def their_memory(count: int) -> float:
    """pyOpenSSL's handshakes per second."""
    from OpenSSL import SSL  # noqa: PLC0415

    for_client, for_server = peer()
    began = time.process_time()
    for _ in range(count):
        client, server = SSL.Connection(for_client), SSL.Connection(for_server)
        client.set_connect_state()
        server.set_accept_state()
        waiting = {client, server}
        while waiting:
            for one, other in ((client, server), (server, client)):
                with suppress(SSL.WantReadError):
                    one.do_handshake()
                    waiting.discard(one)
                with suppress(SSL.WantReadError):
                    while True:
                        other.bio_write(one.bio_read(65536))
    elapsed = time.process_time() - began
    assert client.get_group_name() == "X25519MLKEM768", client.get_group_name()
    return count / elapsed


def run(options: Options) -> Iterator[Row]:
    """Measure."""
    rounds, count = options.rounds, options.size(100, 3)
    tools = {OURS: lambda: in_memory(count)}
    if has("OpenSSL"):
        tools[PEER] = lambda: their_memory(count)
    yield Row("full handshake, engines in memory", "1/s", in_turns(rounds, tools), goal=0.8)
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        kinds = {OURS: ours(CLIENT), "resumed": ours(resuming())}
        if has("OpenSSL"):
            kinds[PEER] = theirs()
        figures = in_turns(
            rounds,
            {
                name: lambda kind=kind: over_tcp(listener, count, kind)
                for name, kind in kinds.items()
            },
        )
    resumed = figures.pop("resumed")
    yield Row("full handshake over TCP", "us", figures, goal=0.83)
    own = {"hybridkex, resumed": resumed, "hybridkex, full": figures[OURS]}
    yield Row("resumed handshake over TCP", "us", own, goal=1.43)
