"""The time to get a key: ``python benchmarks/kme.py [--json]``; with ``--pairs``, how many keys a
second eight clients draw and look up, by the number of keys in stock (:mod:`kme_pairs`); with
``--load``, by store, processes and clients (:mod:`kme_load`).

Two KMEs in a separate process, queried over loopback with mutual TLS, once with the standard
library's TLS and once with this library's (X25519MLKEM768). Times are medians in milliseconds.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import kme_load
import kme_pairs
import trio

from hybridkex.errors import KeySourceError
from hybridkex.qkd.etsi014.client import Etsi014Source, KmeAccess, KmeClient
from hybridkex.qkd.etsi014.models import KeyRequest
from hybridkex.qkd.in_process import in_process_pair
from hybridkex.qkd.pool import FilePool, PoolNames
from hybridkex.qkd.prefetch import PrefetchConfig, PrefetchSource
from hybridkex.qkd.source import KeySource
from hybridkex.qkd.store import write_key_file

ROUNDS = 200


async def median_ms(call: Callable[[], Awaitable[Any]], rounds: int = ROUNDS) -> float:
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
        while (await alice.status()).stored < 3 * ROUNDS:  # noqa: ASYNC110
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
                statistics.median([await prefetched() for _ in range(ROUNDS)]) * 1000
            )
            nursery.cancel_scope.cancel()
        found["keys a second, 8 pairs, 1 a request"] = await throughput(to_a, 1, 40)
        found["keys a second, 8 pairs, 25 a request"] = await throughput(to_a, 25, 20)
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
        command = [sys.executable, "-m", "hybridkex", "kme"]
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
        keys = [await master.get_key() for _ in range(ROUNDS)]
        async with (
            FilePool.open(folder / "a", key_file=folder / "key", names=names) as alice,
            FilePool.open(folder / "b", key_file=folder / "key", names=back) as bob,
        ):
            await alice.add(keys)
            await bob.add(keys)
            return await of_sources(alice, bob)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--pairs", action="store_true", help="pairs a second, by stock")
    load = "pairs a second on connections that are kept, or on new ones; keys a second, in batches"
    parser.add_argument("--load", choices=("kept", "new", "batch"), help=load)
    setups = ["sqlite:1", "postgresql:1", "postgresql:2", "postgresql:4"]
    parser.add_argument("--setup", nargs="+", default=setups, help="store:processes, with --load")
    parser.add_argument("--crowd", type=int, nargs="+", default=[1, 8, 32], help="its clients")
    parser.add_argument("--size", type=int, default=0, help="bits of its keys (256)")
    parser.add_argument("--stock", type=int, nargs="+", default=[1_000, 100_000, 1_000_000])
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each run")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--against", type=Path, help="another copy of the project, run in turns")
    args = parser.parse_args()
    if args.load:
        pairs = [one.split(":") for one in args.setup]
        chosen = [(store, int(number)) for store, number in pairs]
        all_runs = [
            kme_load.main(
                chosen, args.crowd, args.seconds, args.rounds, stock, args.load, args.size
            )
            for stock in args.stock
        ]
        if args.json:
            print(json.dumps(all_runs, indent=2))
        return
    if args.pairs:
        runs = kme_pairs.main(args.stock, args.clients, args.seconds, args.rounds, args.against)
        if args.json:
            print(json.dumps(runs, indent=2))
        return
    results = {
        "in-process pair": trio.run(of_sources, *in_process_pair("alice", "bob")),
        "file pool": trio.run(of_pool),
        "KME, TLS of the standard library": measure_kme("stdlib"),
        "KME, TLS of hybridkex": measure_kme("hybridkex"),
    }
    if args.json:
        print(json.dumps(results, indent=2))
        return
    for name, figures in results.items():
        print(name)
        for what, value in figures.items():
            unit = "" if what.startswith("keys") else " ms"
            print(f"  {what:<40} {value:10.3f}{unit}")


if __name__ == "__main__":
    main()
