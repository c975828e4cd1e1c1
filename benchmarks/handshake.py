"""Compares the CPU time of handshakes with pyOpenSSL: both ends, over loopback TCP.

Run: ``python benchmarks/handshake.py [--rounds N] [--count N]``.

Both libraries run through the same loop over the same kind of sockets, in one thread, with
X25519MLKEM768, an ECDSA P-256 certificate and a verifying client. A round takes one figure of each
kind; the medians over the rounds are printed, with the medians of the ratios in each round.
"""

import argparse
import socket
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Final, Protocol

from OpenSSL import SSL, crypto

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

CA: Final = DevCa.create()
IDENTITY: Final = CA.issue("localhost")


class End(Protocol):
    """One end of a handshake on a socket."""

    def start(self) -> None: ...
    def step(self) -> bool:
        """Read and write the available bytes; returns whether the handshake is complete."""
        ...


class Ours:
    """The engine on a socket."""

    def __init__(self, sock: socket.socket, connection: ClientConnection | ServerConnection):
        self.sock, self.connection = sock, connection

    def start(self) -> None:
        if isinstance(self.connection, ClientConnection):
            self.connection.start()
            self._send()

    def step(self) -> bool:
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

    def __init__(self, sock: socket.socket, connection: SSL.Connection, *, server: bool):
        self.sock, self.connection, self.complete = sock, connection, False
        connection.set_accept_state() if server else connection.set_connect_state()
        self.server = server

    def start(self) -> None:
        if not self.server:
            self._advance()

    def step(self) -> bool:
        if not self.complete:
            self.connection.bio_write(self.sock.recv(65536))
            self._advance()
        return self.complete

    def _advance(self) -> None:
        with suppress(SSL.WantReadError):
            self.connection.do_handshake()
            self.complete = True
        with suppress(SSL.WantReadError):
            self.sock.sendall(self.connection.bio_read(65536))


def run(client: End, server: End) -> None:
    client.start()
    complete = False
    while not complete:
        complete = server.step() & client.step()


def cpu(listener: socket.socket, count: int, make: Callable[..., tuple[End, End]]) -> float:
    """Measure the CPU seconds of one connection and its handshake."""
    started = time.process_time()
    for _ in range(count):
        near = socket.create_connection(listener.getsockname())
        far, _ = listener.accept()
        run(*make(near, far))
        near.close()
        far.close()
    return (time.process_time() - started) / count


def ours(client: ClientConfig, server: ServerConfig) -> Callable[..., tuple[End, End]]:
    return lambda near, far: (
        Ours(near, ClientConnection(client, "localhost")),
        Ours(far, ServerConnection(server)),
    )


class SameTicket(MemoryTicketStore):
    """Returns the same ticket every time, so that only handshakes are measured."""

    def take(self, server, binding=None):  # type: ignore[no-untyped-def]
        ticket = super().take(server, binding)
        if ticket is not None:
            self.put(server, ticket)
        return ticket


def with_a_ticket(client: ClientConfig, server: ServerConfig) -> None:
    """Put a ticket into the client's store."""
    near, far = ClientConnection(client, "localhost"), ServerConnection(server)
    near.start()
    for _ in range(8):
        for one, other in ((near, far), (far, near)):
            if one.has_data_to_send:
                other.receive_data(one.data_to_send())
            while (event := other.next_event()) is not None:
                if isinstance(event, SessionProposed):
                    other.accept()
        if far.handshake_complete:
            far.send_data(b"x")


def theirs() -> Callable[..., tuple[End, End]]:
    server, client = SSL.Context(SSL.TLS_METHOD), SSL.Context(SSL.TLS_METHOD)
    server.use_certificate(crypto.X509.from_cryptography(IDENTITY.leaf))
    server.use_privatekey(crypto.PKey.from_cryptography_key(IDENTITY.private_key))
    store = client.get_cert_store()
    assert store is not None
    store.add_cert(crypto.X509.from_cryptography(CA.certificate))
    client.set_verify(SSL.VERIFY_PEER)
    return lambda near, far: (
        Theirs(near, SSL.Connection(client), server=False),
        Theirs(far, SSL.Connection(server), server=True),
    )


def main(rounds: int, count: int) -> None:
    listener = socket.create_server(("127.0.0.1", 0), backlog=64)
    client = ClientConfig(verifier=TrustStore((CA.certificate,)))
    server = ServerConfig(identities=(IDENTITY,))
    again = ClientConfig(verifier=TrustStore((CA.certificate,)), ticket_store=SameTicket())
    with_a_ticket(again, server)
    kinds = (ours(client, server), ours(again, server), theirs())
    figures = []
    for _ in range(rounds):
        figures.append([1e6 * cpu(listener, count, kind) for kind in kinds])
    names = ("full", "resumed", "pyOpenSSL, full")
    for place, name in enumerate(names):
        print(f"{name:<18} {statistics.median(one[place] for one in figures):7.0f} us of CPU")
    for name, near, far in (("full / pyOpenSSL", 0, 2), ("resumed / full", 1, 0)):
        ratios = [one[near] / one[far] for one in figures]
        print(
            f"{name:<18} {statistics.median(ratios):7.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--count", type=int, default=100)
    arguments = parser.parse_args()
    main(arguments.rounds, arguments.count)
