"""The time to get a key from each kind of source, and from KMEs under load.

Two KMEs in a process of their own, queried over loopback with mutual TLS: once with this library's
TLS (X25519MLKEM768), once with the standard library's. :mod:`benchmarks.kme_pairs` has the load.
"""

import statistics
import subprocess
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import trio

from benchmarks import kme_pairs
from benchmarks.processes import COMMAND
from benchmarks.results import OURS, Curve, Options, Row
from hybridkex.errors import KeySourceError
from hybridkex.qkd.etsi014.client import Etsi014Source, KmeAccess, KmeClient
from hybridkex.qkd.etsi014.models import KeyRequest
from hybridkex.qkd.in_process import in_process_pair
from hybridkex.qkd.pool import FilePool, PoolNames
from hybridkex.qkd.prefetch import PrefetchConfig, PrefetchSource
from hybridkex.qkd.source import KeySource
from hybridkex.qkd.store import write_key_file

__all__ = ["run"]

CALLS = 200
RATE = "keys a second, 8 pairs, "


async def median_ms(call: Callable[[], Awaitable[Any]], rounds: int = CALLS) -> float:
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        await call()
        times.append(time.perf_counter() - began)
    return statistics.median(times) * 1000


async def of_sources(alice: KeySource, bob: KeySource) -> dict[str, float]:
    drawn = []

    async def draw() -> None:
        drawn.append(await alice.get_key())

    async def get() -> None:
        await bob.get_key_with_id(drawn.pop().name)

    return {"draw": await median_ms(draw), "get": await median_ms(get)}


def access(folder: Path, sae: str, url: str, tls: str) -> KmeAccess:
    files = folder / sae
    return KmeAccess(
        url=url, ca=files / "ca.pem", certificate=files / "cert.pem", key=files / "key.pem", tls=tls
    )


async def of_kme(folder: Path, where: dict[str, str], tls: str) -> dict[str, float]:
    found: dict[str, float] = {}
    to_a, to_b = (
        access(folder, "alice", where["kme-a"], tls),
        access(folder, "bob", where["kme-b"], tls),
    )

    async def fresh() -> None:
        async with KmeClient(to_a) as client:
            await client.status("bob")

    async with KmeClient(to_a) as a, KmeClient(to_b) as b:
        alice, bob = (
            Etsi014Source(a, sae="alice", peer_sae="bob"),
            Etsi014Source(b, sae="bob", peer_sae="alice"),
        )
        while (await alice.status()).stored < 3 * CALLS:  # noqa: ASYNC110
            await trio.sleep(0.05)
        found["status, new connection"] = await median_ms(fresh, 30)
        found["status"] = await median_ms(lambda: a.status("bob"))
        found |= await of_sources(alice, bob)
        found["draw 100 in one request"] = await median_ms(
            lambda: a.enc_keys("bob", KeyRequest(number=100)), 20
        )

        stock = PrefetchSource(alice, PrefetchConfig(low=32, high=64))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stock.fill)

            async def prefetched() -> float:
                while not stock.upcoming():  # noqa: ASYNC110
                    await trio.sleep(0.01)
                began = time.perf_counter()
                await stock.get_key()
                return time.perf_counter() - began

            found["draw, prefetched"] = (
                statistics.median([await prefetched() for _ in range(CALLS)]) * 1000
            )
            nursery.cancel_scope.cancel()
        found[f"{RATE}1 a request"] = await throughput(to_a, 1, 40)
        found[f"{RATE}25 a request"] = await throughput(to_a, 25, 20)
    return found


async def throughput(to: KmeAccess, number: int, rounds: int) -> float:
    keys = 0

    async def draw() -> None:
        nonlocal keys
        async with KmeClient(to) as client:
            for _ in range(rounds):
                try:
                    await client.enc_keys("bob", KeyRequest(number=number))
                    keys += number
                except KeySourceError:
                    await trio.sleep(0.01)  # the producer is behind

    began = time.perf_counter()
    async with trio.open_nursery() as nursery:
        for _ in range(8):
            nursery.start_soon(draw)
    return keys / (time.perf_counter() - began)


def measure_kme(tls: str) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = [*COMMAND, "kme"]
        setup = [*command, "dev-up", name, "--ports", "0,0", "--tls", tls, "--no-serve"]
        subprocess.run(setup, check=True, stdout=subprocess.DEVNULL)
        config = folder / "kme.toml"
        limits = "limits = { rate = 100000.0, burst = 100000 }\n"
        config.write_text(config.read_text().replace("tls =", limits + "tls ="))
        serve = [*command, "serve", str(config)]
        with subprocess.Popen(serve, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None
            lines = [server.stdout.readline().split() for _ in range(2)]
            where = {line[0]: line[-1] for line in lines}
            try:
                return trio.run(of_kme, folder, where, tls)
            finally:
                server.terminate()


async def of_pool() -> dict[str, float]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_key_file(folder / "key")
        names = PoolNames(sae="alice", kme="a", peer_sae="bob", peer_kme="b")
        back = PoolNames(sae="bob", kme="b", peer_sae="alice", peer_kme="a")
        # The keys come from an in-process pair with the pools' names.
        master, _ = in_process_pair("alice", "bob", kmes=("a", "b"))
        keys = [await master.get_key() for _ in range(CALLS)]
        async with (
            FilePool.open(folder / "a", key_file=folder / "key", names=names) as alice,
            FilePool.open(folder / "b", key_file=folder / "key", names=back) as bob,
        ):
            await alice.add(keys)
            await bob.add(keys)
            return await of_sources(alice, bob)


def run(options: Options) -> Iterator[Row | Curve]:
    """Measure."""
    sources: dict[str, Callable[[], dict[str, float]]] = {
        "in-process pair": lambda: trio.run(of_sources, *in_process_pair("alice", "bob")),
        "file pool": lambda: trio.run(of_pool),
    }
    for name, measure in sources.items():
        for what, figures in together(measure, options.few()).items():
            yield Row(f"{name}: {what}", "ms", {OURS: figures})
    if not options.quick:
        kinds = {f"TLS of {OURS}": OURS, "TLS of the standard library": "stdlib"}
        found = {
            name: together(lambda tls=tls: measure_kme(tls), options.few(2))
            for name, tls in kinds.items()
        }
        for what in next(iter(found.values())):
            by_kind = {name: one[what] for name, one in found.items()}
            yield Row(f"KME: {what}", "1/s" if what.startswith(RATE) else "ms", by_kind)
    yield from kme_pairs.run(options)


def together(measure: Callable[[], dict[str, float]], rounds: int) -> dict[str, list[float]]:
    """The figures of all rounds by their names."""
    found = [measure() for _ in range(rounds)]
    return {name: [one[name] for one in found] for name in found[0]}
