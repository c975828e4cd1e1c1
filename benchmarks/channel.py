"""Compares each shell with its event loop's own TLS, in one process, over loopback TCP, in turns.

On trio that is SecureStream beside ``trio.SSLStream``; on asyncio and uvloop, transports beside the
loop's own (``benchmarks/channel_asyncio.py``).

Run: ``python benchmarks/channel.py [--rounds N] [--clock cpu] [--loops trio,asyncio,uvloop]``.
Every figure is a ratio of the two in the same round; the median and the spread over the rounds are
printed. The peer is the standard library's ``ssl`` with X25519, and for the engine alone pyOpenSSL
with X25519MLKEM768.

For bulk there is a third: bare sockets with the AEAD and nothing else, no protocol, no checks; what
is left of the time is the cipher's, the kernel's and trio's.

Both ends run in one thread that never idles, so that the process's CPU time (the kernel's part
included) is what an otherwise idle machine's clock would show; ``--clock cpu`` counts that, for a
machine that others use too.
"""

import argparse
import asyncio
import os
import ssl
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import trio
from channel_asyncio import idle_connection, measures
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from OpenSSL import SSL, crypto

from hybridkex import (
    ClientConfig,
    ClientConnection,
    DevCa,
    SecureStream,
    ServerConfig,
    ServerConnection,
    TrustStore,
)
from hybridkex.auth.dev_ca import write_identity
from hybridkex.tls.events import SessionProposed

CA = DevCa.create()
IDENTITY = CA.issue("localhost")
CLIENT = ClientConfig(verifier=TrustStore((CA.certificate,)))
SERVER = ServerConfig(identities=(IDENTITY,))

with tempfile.TemporaryDirectory() as folder:
    write_identity(Path(folder), CA, IDENTITY)
    SSL_SERVER = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    SSL_SERVER.load_cert_chain(f"{folder}/cert.pem", f"{folder}/key.pem")
    SSL_CLIENT = ssl.create_default_context(cafile=f"{folder}/ca.pem")

Pair = tuple[Any, Any]
Wrap = Callable[[trio.abc.Stream, trio.abc.Stream], Pair]


now: Callable[[], float] = time.perf_counter


def ours(client: trio.abc.Stream, server: trio.abc.Stream) -> Pair:
    return SecureStream(client, CLIENT, server_hostname="localhost"), SecureStream(server, SERVER)


def theirs(client: trio.abc.Stream, server: trio.abc.Stream) -> Pair:
    return (
        trio.SSLStream(client, SSL_CLIENT, server_hostname="localhost"),
        trio.SSLStream(server, SSL_SERVER, server_side=True),
    )


class Bare:
    """AES-256-GCM on a stream, 16 KiB at a time: an upper bound for any channel in Python."""

    PIECE, BATCH, HEADER, TAG = 16384, 16, b"\x17\3\3\x40\x11", 17

    def __init__(self, transport: trio.abc.Stream) -> None:
        self.transport = transport
        self.aead, self.sent, self.received = AESGCM(bytes(32)), 0, 0
        self.record = len(self.HEADER) + self.PIECE + self.TAG
        self.inner = memoryview(bytearray(self.PIECE + 1))
        self.out = memoryview(bytearray(self.BATCH * self.record))
        self.left = b""

    async def do_handshake(self) -> None:
        await trio.lowlevel.checkpoint()

    async def send_all(self, data: bytes) -> None:
        view, inner, out = memoryview(data), self.inner, self.out
        for start in range(0, len(view), self.BATCH * self.PIECE):
            end = 0
            for at in range(start, min(start + self.BATCH * self.PIECE, len(view)), self.PIECE):
                inner[: self.PIECE] = view[at : at + self.PIECE]
                begin, end = end + 5, end + self.record
                out[begin - 5 : begin] = self.HEADER
                nonce = self.sent.to_bytes(12, "big")
                self.aead.encrypt_into(nonce, inner, self.HEADER, out[begin:end])
                self.sent += 1
            await self.transport.send_all(out[:end])

    async def receive_some(self) -> bytearray:
        data = b""
        while len(data) < self.record:
            data = self.left + await self.transport.receive_some(1 << 18)
            self.left = data
        count = len(data) // self.record
        view, plain = memoryview(data), bytearray(count * self.PIECE + 1)
        inner = memoryview(plain)
        for number in range(count):
            begin, at = number * self.record + 5, number * self.PIECE
            nonce = self.received.to_bytes(12, "big")
            record = view[begin : begin + self.record - 5]
            self.aead.decrypt_into(nonce, record, self.HEADER, inner[at : at + self.PIECE + 1])
            self.received += 1
        self.left = data[count * self.record :]
        inner.release()
        del plain[-1]
        return plain

    async def aclose(self) -> None:
        await self.transport.aclose()


def bare(client: trio.abc.Stream, server: trio.abc.Stream) -> Pair:
    return Bare(client), Bare(server)


async def connect(wrap: Wrap, listener: trio.SocketListener) -> Pair:
    port = listener.socket.getsockname()[1]
    client = await trio.open_tcp_stream("127.0.0.1", port)
    pair = wrap(client, await listener.accept())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pair[0].do_handshake)
        nursery.start_soon(pair[1].do_handshake)
    return pair


async def close(pair: Pair) -> None:
    for stream in pair:
        await trio.aclose_forcefully(stream)


async def bulk(wrap: Wrap, listener: trio.SocketListener, size: int) -> float:
    """Measure bytes per second in one direction."""
    pair = await connect(wrap, listener)
    data, total = os.urandom(size), 128 << 20

    async def send() -> None:
        for _ in range(total // size):
            await pair[0].send_all(data)

    started = now()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        received = 0
        while received < total:
            received += len(await pair[1].receive_some())
    elapsed = now() - started
    await close(pair)
    return total / elapsed


async def handshakes(wrap: Wrap, listener: trio.SocketListener) -> float:
    """Measure connections with a full handshake per second."""
    count = 100
    started = now()
    for _ in range(count):
        await close(await connect(wrap, listener))
    return count / (now() - started)


async def ping_pong(wrap: Wrap, listener: trio.SocketListener, size: int) -> float:
    """Measure round trips per second."""
    pair = await connect(wrap, listener)
    data, count = os.urandom(size), 1000

    async def echo() -> None:
        for _ in range(count):
            await pair[1].send_all(await pair[1].receive_some())

    started = now()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(echo)
        for _ in range(count):
            await pair[0].send_all(data)
            await pair[0].receive_some()
    elapsed = now() - started
    await close(pair)
    return count / elapsed


def engine() -> float:
    """Measure our handshakes in memory per second."""
    count = 100
    started = now()
    for _ in range(count):
        client, server = ClientConnection(CLIENT, "localhost"), ServerConnection(SERVER)
        client.start()
        while not (client.handshake_complete and server.handshake_complete):
            for one, other in ((client, server), (server, client)):
                if one.has_data_to_send:
                    other.receive_data(one.data_to_send())
                    while (event := other.next_event()) is not None:
                        if isinstance(event, SessionProposed):
                            other.accept()
    return count / (now() - started)


def pyopenssl() -> float:
    """Measure pyOpenSSL's handshakes in memory per second."""
    server_context, client_context = SSL.Context(SSL.TLS_METHOD), SSL.Context(SSL.TLS_METHOD)
    server_context.use_certificate(crypto.X509.from_cryptography(IDENTITY.leaf))
    server_context.use_privatekey(crypto.PKey.from_cryptography_key(IDENTITY.private_key))
    store = client_context.get_cert_store()
    assert store is not None
    store.add_cert(crypto.X509.from_cryptography(CA.certificate))
    client_context.set_verify(SSL.VERIFY_PEER)
    count = 100
    started = now()
    for _ in range(count):
        client, server = SSL.Connection(client_context), SSL.Connection(server_context)
        client.set_connect_state()
        server.set_accept_state()
        waiting = {client, server}
        while waiting:
            for one, other in ((client, server), (server, client)):
                try:
                    one.do_handshake()
                    waiting.discard(one)
                except SSL.WantReadError:
                    pass
                try:
                    while True:
                        other.bio_write(one.bio_read(65536))
                except SSL.WantReadError:
                    pass
    elapsed = now() - started
    assert client.get_group_name() == "X25519MLKEM768", client.get_group_name()
    return count / elapsed


def show(name: str, unit: str, scale: float, pairs: list[tuple[float, float]]) -> None:
    ratios = [one / other for one, other in pairs]
    mine = statistics.median(one for one, _ in pairs) / scale
    peer = statistics.median(other for _, other in pairs) / scale
    print(
        f"{name:<36} {mine:8.0f} {peer:8.0f} {unit:<5} "
        f"ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
        flush=True,
    )


async def main(rounds: int) -> None:
    listener = (await trio.open_tcp_listeners(0, host="127.0.0.1"))[0]
    measures: list[tuple[str, str, float, Callable[[Wrap], Awaitable[float]]]] = [
        ("full handshakes over TCP", "1/s", 1, lambda wrap: handshakes(wrap, listener)),
        ("ping-pong, 1 byte", "1/s", 1, lambda wrap: ping_pong(wrap, listener, 1)),
        ("ping-pong, 100 bytes", "1/s", 1, lambda wrap: ping_pong(wrap, listener, 100)),
        ("ping-pong, 1000 bytes", "1/s", 1, lambda wrap: ping_pong(wrap, listener, 1000)),
    ]
    print(f"{ssl.OPENSSL_VERSION} below trio, {SSL.OpenSSL_version(0).decode()} below pyOpenSSL")
    print(f"{'':<36} {'ours':>8} {'peer':>8}")
    for name, size in (("bulk, send_all of 1 MiB", 1 << 20), ("bulk, send_all of 64 KiB", 1 << 16)):
        triples = [
            [await bulk(wrap, listener, size) for wrap in (ours, theirs, bare)]
            for _ in range(rounds)
        ]
        show(name, "MB/s", 1e6, [(mine, peer) for mine, peer, _ in triples])
        show(f"{name}, to bare", "MB/s", 1e6, [(mine, limit) for mine, _, limit in triples])
    for name, unit, scale, measure in measures:
        show(
            name, unit, scale, [(await measure(ours), await measure(theirs)) for _ in range(rounds)]
        )
    show("engine alone, in memory", "1/s", 1, [(engine(), pyopenssl()) for _ in range(rounds)])


def on_asyncio(loop: str, rounds: int) -> None:
    factory = None
    if loop == "uvloop":
        import uvloop  # noqa: PLC0415

        factory = uvloop.new_event_loop
    configs, contexts = (CLIENT, SERVER), (SSL_CLIENT, SSL_SERVER)
    print(f"{loop} beside {ssl.OPENSSL_VERSION} below its own TLS")
    with asyncio.Runner(loop_factory=factory) as runner:
        for name, unit, scale, measure in measures:
            pairs = [
                (runner.run(measure(configs, now)), runner.run(measure(contexts, now)))
                for _ in range(rounds)
            ]
            show(f"{loop}, {name}", unit, scale, pairs)
        both = [runner.run(idle_connection(kind)) for kind in (configs, contexts)]
        print(f"{f'{loop}, idle connection':<36} {both[0]:8.0f} {both[1]:8.0f} bytes of Python")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--loops", default="trio,asyncio,uvloop")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    arguments = parser.parse_args()
    if arguments.clock == "cpu":
        now = time.process_time
    for loop in arguments.loops.split(","):
        if loop == "trio":
            trio.run(main, arguments.rounds)
        else:
            on_asyncio(loop, arguments.rounds)
