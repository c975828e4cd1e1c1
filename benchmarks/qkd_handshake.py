"""Handshakes with a QKD key beside those without, over loopback TCP.

X25519MLKEM768 with an ECDSA certificate: without a QKD key, with one of an in-process pair, with
one that was drawn and looked up ahead (``PrefetchSource`` on both sides; without certificates the
key is the authentication), and with one that each side fetches from its KME while the other waits.
The KMEs are a process of their own.
"""

import contextlib
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import trio

from benchmarks.processes import COMMAND
from benchmarks.results import Options, Row
from hybridkex import (
    ClientConfig,
    DevCa,
    QkdPskSource,
    SecureStream,
    ServerConfig,
    TrustStore,
    open_secure_tcp_stream,
    serve_secure_tcp,
)
from hybridkex.qkd.etsi014.client import Etsi014Source, KmeAccess, KmeClient
from hybridkex.qkd.in_process import in_process_pair
from hybridkex.qkd.prefetch import PrefetchConfig, PrefetchSource
from hybridkex.qkd.source import KeyReference, KeySource, QkdKey, SourceStatus

PER_ROUND = 10
WITHOUT = "without QKD"


class Counted:
    """A source that counts its requests."""

    def __init__(self, inner: KeySource) -> None:
        self.inner = inner
        self.local_sae, self.peer_sae = inner.local_sae, inner.peer_sae
        self.requests = 0

    async def get_key(self) -> QkdKey:
        self.requests += 1
        return await self.inner.get_key()

    async def get_key_with_id(self, name: KeyReference) -> QkdKey:
        self.requests += 1
        return await self.inner.get_key_with_id(name)

    def knows(self, name: KeyReference) -> bool:
        return self.inner.knows(name)

    async def status(self) -> SourceStatus:
        return await self.inner.status()


class Way:
    """A way to get a key, or none, and how it prepares each handshake."""

    def __init__(
        self,
        alice: KeySource | None = None,
        bob: KeySource | None = None,
        prepare: Callable[[], Awaitable[None]] | None = None,
        certificates: bool = True,
    ) -> None:
        self.sources = alice, bob
        self.prepare = prepare
        self.certificates = certificates

    async def open(self, ca: DevCa, nursery: trio.Nursery) -> "Way":
        alice, bob = (None if one is None else QkdPskSource(one) for one in self.sources)
        trust = TrustStore((ca.certificate,)) if self.certificates else None
        identities = (ca.issue("localhost"),) if self.certificates else ()
        self.client = ClientConfig(verifier=trust, psk_source=alice)
        # No tickets: a client that offers a PSK says that it could use them, one without does not.
        server = ServerConfig(identities=identities, psk_source=bob, tickets=None)
        listeners = await nursery.start(
            lambda task_status: serve_secure_tcp(
                _close, 0, server, host="127.0.0.1", task_status=task_status
            )
        )
        self.port = listeners[0].transport_listener.socket.getsockname()[1]
        return self

    async def time(self, count: int) -> float:
        """Measure the seconds of one handshake, with connecting and without preparations."""
        total = 0.0
        for _ in range(count):
            began = time.perf_counter()
            stream = await open_secure_tcp_stream(
                "127.0.0.1", self.port, self.client, server_hostname="localhost"
            )
            # The server answers after the client's Finished, so both are done then.
            await stream.receive_some()
            total += time.perf_counter() - began
            await stream.aclose()
        return total / count


async def _close(stream: SecureStream[trio.SocketStream]) -> None:
    await stream.send_all(b"!")
    await stream.aclose()


@contextlib.asynccontextmanager
async def kmes(folder: Path) -> AsyncIterator[tuple[KeySource, KeySource]]:
    """The two KMEs of ``kme dev-up``, and a source at each."""
    command = [*COMMAND, "kme", "dev-up", str(folder), "--ports", "0,0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)  # noqa: ASYNC220
    try:
        assert process.stdout is not None
        urls = [process.stdout.readline().split()[-1] for _ in range(2)]
        async with contextlib.AsyncExitStack() as stack:
            sources = []
            for url, sae, peer in zip(urls, ("alice", "bob"), ("bob", "alice"), strict=True):
                files = folder / sae
                access = KmeAccess(
                    url=url,
                    ca=files / "ca.pem",
                    certificate=files / "cert.pem",
                    key=files / "key.pem",
                )
                client = await stack.enter_async_context(KmeClient(access))
                source = Etsi014Source(client, sae=sae, peer_sae=peer)
                await source.status()  # asked once in the life of a source, for the KMEs' IDs
                sources.append(Counted(source))
            yield sources[0], sources[1]
    finally:
        process.terminate()
        process.communicate()  # closes the pipe, too


async def measure(rounds: int) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Seconds of the handshakes, and requests to KMEs for one, by the way to a key."""
    ca = DevCa.create()
    with tempfile.TemporaryDirectory() as name:
        async with kmes(Path(name) / "kmes") as (alice, bob), trio.open_nursery() as nursery:
            # A round leaves the low watermark; one key more starts the filling, between rounds.
            config = PrefetchConfig(low=2, high=PER_ROUND + 2)
            ahead = PrefetchSource(alice, config)
            behind = PrefetchSource(bob, PrefetchConfig(high=1000))  # keeps the burnt ones, too
            nursery.start_soon(ahead.fill)

            async def look_up_ahead() -> None:
                if len(ahead.upcoming()) == config.low:
                    await ahead.get_key()
                # As two sites do over an existing session.
                while len(ahead.upcoming()) < config.high:  # noqa: ASYNC110  # no event for it
                    await trio.sleep(0.001)
                for name in ahead.upcoming():
                    await behind.expect(name)

            ways = {
                WITHOUT: await Way().open(ca, nursery),
                "of an in-process pair": await Way(*in_process_pair("alice", "bob")).open(
                    ca, nursery
                ),
                "prefetched": await Way(ahead, behind, look_up_ahead).open(ca, nursery),
                "prefetched, without certificates": await Way(
                    ahead, behind, look_up_ahead, certificates=False
                ).open(ca, nursery),
                "from the KMEs": await Way(alice, bob).open(ca, nursery),
            }
            for way in ways.values():
                if way.prepare is not None:
                    await way.prepare()
                await way.time(PER_ROUND)
            assert isinstance(alice, Counted)
            assert isinstance(bob, Counted)
            seconds: dict[str, list[float]] = {key: [] for key in ways}
            trips: dict[str, float] = {}
            for _ in range(rounds):
                for key, way in ways.items():
                    if way.prepare is not None:
                        await way.prepare()
                    before = alice.requests + bob.requests
                    seconds[key].append(await way.time(PER_ROUND))
                    trips[key] = (alice.requests + bob.requests - before) / PER_ROUND
            nursery.cancel_scope.cancel()
    return seconds, trips


def run(options: Options) -> Iterator[Row]:
    """Measure."""
    seconds, trips = trio.run(measure, options.size(3 * options.rounds, 2))
    without = seconds.pop(WITHOUT)
    for name, figures in seconds.items():
        requests = f", {trips[name]:.0f} requests to KMEs" if trips[name] else ""
        goal = 0.91 if name.startswith("prefetched") else None
        milliseconds = [1e3 * one for one in figures], [1e3 * one for one in without]
        both = dict(zip(("with the key", WITHOUT), milliseconds, strict=True))
        yield Row(f"key {name}{requests}", "ms", both, goal)
