"""Key sources on asyncio: those of tests/qkd/test_sources.py are the same code on trio."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio

from hybridkex import (
    ClientConfig,
    DevCa,
    Policy,
    QkdPskSource,
    Requirement,
    ServerConfig,
    TrustStore,
)
from hybridkex.aio import open_connection, start_server
from hybridkex.errors import KeySourceExhausted, KeySourceUnavailable, KeyUnauthorized
from hybridkex.qkd.composite import CombinedSource, FailoverSource
from hybridkex.qkd.etsi014.client import Etsi014Source, KmeClient
from hybridkex.qkd.in_process import in_process_pair
from hybridkex.qkd.pool import FilePool, PoolNames
from hybridkex.qkd.prefetch import PrefetchConfig, PrefetchSource
from hybridkex.qkd.source import KeySource
from hybridkex.qkd.store import write_key_file

REQUIRED = Policy(psk=Requirement.REQUIRE)


def run(function: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(function(), debug=True)  # type: ignore[arg-type]


async def one_connection(alice: KeySource, bob: KeySource) -> tuple[str, ...]:
    """The QKD keys of a connection from alice to bob."""
    ca = DevCa.create()
    client = ClientConfig(
        verifier=TrustStore((ca.certificate,)), psk_source=QkdPskSource(alice), policy=REQUIRED
    )
    server = ServerConfig(
        identities=(ca.issue("localhost"),), psk_source=QkdPskSource(bob), policy=REQUIRED
    )

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(await reader.read())
        writer.close()

    listening = await start_server(answer, "127.0.0.1", 0, server)
    port = listening.sockets[0].getsockname()[1]
    reader, writer = await open_connection("127.0.0.1", port, client, server_hostname="localhost")
    writer.write(b"hello")
    writer.write_eof()
    assert await reader.read() == b"hello"
    writer.close()
    await writer.wait_closed()
    listening.close()
    await listening.wait_closed()
    keys: tuple[str, ...] = writer.get_extra_info("hybridkex_session").qkd_key_ids
    return keys


def test_in_process_and_combined() -> None:
    async def main() -> None:
        pairs = [in_process_pair("alice", "bob", kmes=(f"a{i}", f"b{i}")) for i in range(2)]
        assert len(await one_connection(*pairs[0])) == 1
        alices, bobs = zip(*pairs, strict=True)
        assert len(await one_connection(CombinedSource(alices), CombinedSource(bobs))) == 2

    run(main)


def test_failover() -> None:
    class Slow:
        local_sae, peer_sae = "alice", "bob"

        async def get_key(self) -> Any:
            await asyncio.sleep(60)

        get_key_with_id = status = get_key

        def knows(self, name: object) -> bool:
            return False

    async def main() -> None:
        alice, bob = in_process_pair("alice", "bob")
        several = FailoverSource([Slow(), alice], timeout=0.05)  # type: ignore[list-item]
        assert len(await one_connection(several, bob)) == 1
        alone = FailoverSource([Slow(), Slow()], timeout=0.05)  # type: ignore[list-item]
        with pytest.raises(KeySourceUnavailable, match="too slow"):
            await alone.get_key()

    run(main)


def test_prefetch() -> None:
    async def main() -> None:
        alice, bob = in_process_pair("alice", "bob")
        ahead = PrefetchSource(alice, PrefetchConfig(low=2, high=4))
        filling = asyncio.create_task(ahead.fill())
        while len(ahead.upcoming()) < 4:  # noqa: ASYNC110
            await asyncio.sleep(0)
        (name, *_) = ahead.upcoming()
        assert await one_connection(ahead, bob) == (name[0].key_id,)
        filling.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await filling

    run(main)


def test_a_pool_in_a_file(tmp_path: Path) -> None:
    """Also: calls of many tasks at once, one of them cancelled."""
    write_key_file(tmp_path / "key")

    def pool(side: int) -> FilePool:
        ends = [("alice", "kme-a"), ("bob", "kme-b")]
        (sae, kme), (peer_sae, peer_kme) = ends if side == 0 else ends[::-1]
        names = PoolNames(sae=sae, kme=kme, peer_sae=peer_sae, peer_kme=peer_kme)
        return FilePool.open(tmp_path / f"{sae}.db", key_file=tmp_path / "key", names=names)

    async def main() -> None:
        source, _ = in_process_pair("alice", "bob", kmes=("kme-a", "kme-b"))
        keys = [await source.get_key() for _ in range(20)]
        async with pool(0) as alice, pool(1) as bob:
            await asyncio.gather(alice.add(keys), bob.add(keys))
            assert len(await one_connection(alice, bob)) == 1
            drawing = [asyncio.create_task(alice.get_key()) for _ in range(15)]
            await asyncio.sleep(0.001)
            drawing[3].cancel()
            drawing[9].cancel()
            drawn = await asyncio.gather(*drawing, return_exceptions=True)
            names = [key.name for key in drawn if not isinstance(key, BaseException)]
            assert len(set(names)) == len(names) >= 13
            for name in names:
                await bob.get_key_with_id(name)
            for _ in range((await alice.status()).stored):
                await alice.get_key()
            with pytest.raises(KeySourceExhausted):
                await alice.get_key()

    run(main)


@pytest.mark.parametrize("tls", ["stdlib", "hybridkex"])
async def test_a_kme(site: Any, serve: Any, tls: str) -> None:
    """The KME runs on trio, its SAEs on asyncio, in threads of this process."""

    async def main(where: Any) -> None:
        async with (
            KmeClient(site.access("alice", where.kmes["kme-a"], tls=tls)) as at_a,
            KmeClient(site.access("bob", where.kmes["kme-b"], tls=tls)) as at_b,
        ):
            alice = Etsi014Source(at_a, sae="alice", peer_sae="bob")
            bob = Etsi014Source(at_b, sae="bob", peer_sae="alice")
            async with asyncio.timeout(10):
                while (await alice.status()).stored < 5:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            assert len(await one_connection(alice, bob)) == 1
            drawn = await asyncio.gather(*(alice.get_key() for _ in range(4)))
            assert len({key.name for key in drawn}) == 4
        late = site.access("alice", where.kmes["kme-a"], tls=tls, timeout=0.0001)
        async with KmeClient(late) as client:
            with pytest.raises(KeySourceUnavailable, match="did not answer within"):
                await client.status("bob")
        other = replace(late, timeout=5, kme_id="another")
        async with KmeClient(other) as client:
            with pytest.raises(KeySourceUnavailable, match="the KME is kme-a, not another"):
                await client.status("bob")
        stranger = site.access("mallory", where.kmes["kme-a"], tls=tls)
        async with KmeClient(stranger) as client:
            with pytest.raises(KeyUnauthorized):
                await client.status("bob")

    async with serve(site.pair(tls=tls)) as where:
        await trio.to_thread.run_sync(lambda: run(lambda: main(where)))


@pytest.mark.parametrize("tls", ["stdlib", "hybridkex"])
def test_a_kme_that_is_not_there(site: Any, tls: str) -> None:
    async def main() -> None:
        for answer in (None, b"", b"HTTP/1.1 200 OK\r\n\r\n"):
            server = await asyncio.start_server(
                lambda _, writer, answer=answer: (writer.write(answer or b""), writer.close()),
                "127.0.0.1",
                0,
            )
            port = server.sockets[0].getsockname()[1]
            if answer is None:
                server.close()
                await server.wait_closed()
            expected = "cannot be reached" if answer is None else "cannot be (used|reached)"
            async with KmeClient(site.access("alice", f"127.0.0.1:{port}", tls=tls)) as client:
                with pytest.raises(KeySourceUnavailable, match=expected):
                    await client.status("bob")
            server.close()
            await server.wait_closed()

    run(main)
