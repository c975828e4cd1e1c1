"""A KME whose processes share a database of PostgreSQL."""

import re
import shutil
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio

from hybridkex.errors import ConfigError, KeySourceError, KeySourceUnavailable
from hybridkex.kme.config import PeerConfig, PostgresUrl, ServeConfig, load_config
from hybridkex.kme.entity import KeyManagementEntity
from hybridkex.kme.serve import KmeServer, Serving
from hybridkex.net.address import TcpAddress
from hybridkex.qkd.etsi014.client import KmeClient
from hybridkex.qkd.etsi014.models import KeyRequest
from hybridkex.secret import Secret
from interop.ports import free_port
from interop.postgres import PostgresServer

Site = Any  # of conftest.py


def database(server: PostgresServer, schema: str) -> PostgresUrl:
    import psycopg

    with psycopg.connect(server.url("public")) as connection:
        connection.execute(f"CREATE SCHEMA {schema}")
    return PostgresUrl(Secret(server.url(schema).encode()))


@asynccontextmanager
async def running(config: ServeConfig) -> AsyncIterator[Serving]:
    server = KmeServer(config)
    async with trio.open_nursery() as nursery:
        where = await nursery.start(lambda task_status: server.serve(task_status=task_status))
        try:
            yield where
        finally:
            server.close()


async def drawn(client: KmeClient, slave: str) -> dict[str, bytes]:
    with trio.fail_after(20):
        while True:
            try:
                keys = (await client.enc_keys(slave, KeyRequest(number=3))).keys
            except KeySourceError:  # not yet stored
                await trio.sleep(0.1)
            else:
                return {one.key_id: one.key.reveal() for one in keys}


async def test_no_process_is_special(site: Site, postgres: PostgresServer) -> None:
    """Two sites with two processes each: what one process drew, another one hands out, once."""
    ports = {(kme, number): free_port() for kme in ("kme-a", "kme-b") for number in (1, 2)}
    saes = {"kme-a": ("alice",), "kme-b": ("bob",)}
    other = {"kme-a": "kme-b", "kme-b": "kme-a"}
    stores = {"kme-a": database(postgres, "site_a"), "kme-b": database(postgres, "site_b")}
    async with AsyncExitStack() as stack:
        for (kme, number), port in ports.items():
            peer = PeerConfig(
                id=other[kme],
                saes=saes[other[kme]],
                url=f"https://127.0.0.1:{ports[other[kme], 3 - number]}",
            )
            listen = TcpAddress("127.0.0.1", port)
            config = replace(
                site.kme(kme, saes=saes[kme], peer=(peer,), listen=listen), store=stores[kme]
            )
            await stack.enter_async_context(running(ServeConfig(kme=(config,))))

        async def client(sae: str, kme: str, number: int) -> KmeClient:
            address = TcpAddress("127.0.0.1", ports[kme, number])
            return await stack.enter_async_context(KmeClient(site.access(sae, address)))

        alice = [await client("alice", "kme-a", number) for number in (1, 2)]
        bob = [await client("bob", "kme-b", number) for number in (1, 2)]
        seen: dict[str, bytes] = {}
        for round_number in range(8):
            keys = await drawn(alice[round_number % 2], "bob")
            assert not seen.keys() & keys.keys()
            seen |= keys
            ids = list(keys)
            where = bob[round_number // 2 % 2]
            found = (await where.dec_keys("alice", ids)).keys
            assert {one.key_id: one.key.reveal() for one in found} == keys
            for process in bob:
                with pytest.raises(KeySourceError):
                    await process.dec_keys("alice", ids)
        # And in the other direction.
        keys = await drawn(bob[0], "alice")
        found = (await alice[1].dec_keys("bob", list(keys))).keys
        assert {one.key_id: one.key.reveal() for one in found} == keys


async def test_two_sites_of_two_processes_behind_one_address_each(
    site: Site, postgres: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The processes of a site listen at one port, and one of them compares the stocks."""
    compared: list[tuple[str, str]] = []
    reconcile = KeyManagementEntity.reconcile

    async def noted(self: KeyManagementEntity, target: str, *, grace: float) -> None:
        compared.append((self.kme_id, target))
        await reconcile(self, target, grace=grace)

    monkeypatch.setattr(KeyManagementEntity, "reconcile", noted)
    ports = {"kme-a": free_port(), "kme-b": free_port()}
    saes = {"kme-a": ("alice",), "kme-b": ("bob",)}
    other = {"kme-a": "kme-b", "kme-b": "kme-a"}
    stores = {"kme-a": database(postgres, "shared_a"), "kme-b": database(postgres, "shared_b")}
    async with AsyncExitStack() as stack:
        for kme in ("kme-a", "kme-b", "kme-a", "kme-b"):
            to = other[kme]
            peer = PeerConfig(id=to, saes=saes[to], url=f"https://127.0.0.1:{ports[to]}")
            listen = TcpAddress("127.0.0.1", ports[kme])
            config = replace(
                site.kme(kme, saes=saes[kme], peer=(peer,), listen=listen, reuse_port=True),
                store=stores[kme],
            )
            await stack.enter_async_context(running(ServeConfig(kme=(config,))))
        seen: dict[str, bytes] = {}
        for sae, kme, to in (("alice", "kme-a", "bob"), ("bob", "kme-b", "alice")) * 4:
            # A connection of its own for each call: the kernel spreads them.
            async with KmeClient(site.access(sae, TcpAddress("127.0.0.1", ports[kme]))) as master:
                keys = await drawn(master, to)
            assert not seen.keys() & keys.keys()
            seen |= keys
            address = TcpAddress("127.0.0.1", ports[other[kme]])
            async with KmeClient(site.access(to, address)) as slave:
                found = (await slave.dec_keys(sae, list(keys))).keys
                assert {one.key_id: one.key.reveal() for one in found} == keys
                with pytest.raises(KeySourceError):
                    await slave.dec_keys(sae, list(keys))
    assert sorted(set(compared)) == [("kme-a", "kme-b"), ("kme-b", "kme-a")]
    assert len(compared) <= 4, "a site compares again if the other was not up yet, and once then"


async def test_requests_get_503_while_the_database_is_away(
    site: Site, postgres: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hybridkex.qkd import postgres_store

    monkeypatch.setattr(postgres_store, "WAIT_SECONDS", 1.0)
    config = site.kme("kme-c", saes=("alice",), self_pairs=True)
    config = replace(config, store=database(postgres, "away"))
    async with running(ServeConfig(kme=(config,))) as where:
        access = site.access("alice", where.kmes["kme-c"], timeout=15.0)
        async with KmeClient(access) as alice:
            keys = await drawn(alice, "alice")
            await trio.to_thread.run_sync(postgres.stop)
            try:
                began = trio.current_time()
                for _ in range(2):
                    with pytest.raises(KeySourceUnavailable, match="503"):
                        await alice.dec_keys("alice", list(keys))
                assert trio.current_time() - began < 8
            finally:
                await trio.to_thread.run_sync(postgres.start)
            with trio.fail_after(15):
                while True:
                    try:
                        found = (await alice.dec_keys("alice", list(keys))).keys
                    except KeySourceUnavailable:
                        await trio.sleep(0.1)
                    else:
                        break
    assert {one.key_id: one.key.reveal() for one in found} == keys


async def test_behind_a_balancer(site: Site, postgres: PostgresServer, tmp_path: Path) -> None:
    """HAProxy with our example: a process that ends, or is not ready, gets no connections."""
    haproxy = shutil.which("haproxy")
    if haproxy is None:
        pytest.skip("haproxy is not installed: apt install haproxy")
    ports = [free_port() for _ in range(5)]
    example = (Path(__file__).parents[2] / "examples" / "kme" / "haproxy.cfg").read_text()
    text = example.replace("bind :8443", f"bind 127.0.0.1:{ports[0]}").replace("2s", "200ms")
    text = text.replace("timeout connect 3s", "timeout connect 200ms")  # and between two tries
    for index in (1, 2):
        text = text.replace(
            f"192.0.2.1{index}:8443 port 9464", f"127.0.0.1:{ports[index]} port {ports[index + 2]}"
        )
    (tmp_path / "haproxy.cfg").write_text(text)
    store = database(postgres, "balanced")
    address = TcpAddress("127.0.0.1", ports[0])
    async with AsyncExitStack() as stack:
        for index in (1, 2):
            listen, metrics = (TcpAddress("127.0.0.1", ports[index + more]) for more in (0, 2))
            one = site.kme("kme-a", saes=("alice",), self_pairs=True, listen=listen)
            config = ServeConfig(kme=(replace(one, store=store),), metrics=metrics)
            last = AsyncExitStack()
            stack.push_async_callback(last.aclose)
            await last.enter_async_context(running(config))
        process = await trio.lowlevel.open_process([haproxy, "-f", tmp_path / "haproxy.cfg"])
        stack.push_async_callback(process.wait)
        stack.callback(process.kill)
        seen: dict[str, bytes] = {}
        for part in range(6):
            if part == 3:
                await last.aclose()
            with trio.fail_after(20):
                while True:
                    try:
                        async with KmeClient(site.access("alice", address)) as alice:
                            keys = (await alice.enc_keys("alice", KeyRequest(number=2))).keys
                            ids = [one.key_id for one in keys]
                            found = (await alice.dec_keys("alice", ids)).keys
                    except KeySourceError:  # the balancer has not noticed yet
                        await trio.sleep(0.1)
                    else:
                        break
            assert [one.key.reveal() for one in found] == [one.key.reveal() for one in keys]
            assert not seen.keys() & set(ids)
            seen |= {one.key_id: one.key.reveal() for one in keys}


async def test_two_sites_behind_balancers_become_ready(site: Site, tmp_path: Path) -> None:
    """Each is ready only if the other one answers, and reaches it through a balancer that prefers
    those that are ready. Both balancers have found that nobody is ready, as after a failure of the
    network between the sites."""
    haproxy = shutil.which("haproxy")
    if haproxy is None:
        pytest.skip("haproxy is not installed: apt install haproxy")
    example = (Path(__file__).parents[2] / "examples" / "kme" / "haproxy.cfg").read_text()
    saes = {"kme-a": ("alice",), "kme-b": ("bob",)}
    front, port, metrics = ({kme: free_port() for kme in saes} for _ in range(3))
    async with AsyncExitStack() as stack:
        for kme in saes:
            text = example.replace("bind :8443", f"bind 127.0.0.1:{front[kme]}").replace(
                "2s", "100ms"
            )
            text = re.sub(
                r"192\.0\.2\.1\d:8443 port 9464", f"127.0.0.1:{port[kme]} port {metrics[kme]}", text
            )
            (tmp_path / f"{kme}.cfg").write_text(text)
            log = (tmp_path / f"{kme}.log").open("wb")
            stack.callback(log.close)
            process = await trio.lowlevel.open_process(
                [haproxy, "-f", tmp_path / f"{kme}.cfg"], stderr=log
            )
            stack.push_async_callback(process.wait)
            stack.callback(process.kill)
        with trio.fail_after(20):
            for kme in saes:
                log = tmp_path / f"{kme}.log"
                while log.read_text().count("has no server") < example.count("\nbackend "):  # noqa: ASYNC110
                    await trio.sleep(0.05)
        for kme, to in (("kme-a", "kme-b"), ("kme-b", "kme-a")):
            peer = PeerConfig(id=to, saes=saes[to], url=f"https://127.0.0.1:{front[to]}")
            one = site.kme(
                kme, saes=saes[kme], peer=(peer,), listen=TcpAddress("127.0.0.1", port[kme])
            )
            config = ServeConfig(kme=(one,), metrics=TcpAddress("127.0.0.1", metrics[kme]))
            await stack.enter_async_context(running(config))
        for sae, kme, to in (("alice", "kme-a", "bob"), ("bob", "kme-b", "alice")):
            with trio.fail_after(20):
                while True:
                    try:
                        async with KmeClient(
                            site.access(sae, TcpAddress("127.0.0.1", front[kme]))
                        ) as client:
                            await client.enc_keys(to, KeyRequest())
                    except KeySourceError:
                        await trio.sleep(0.1)
                    else:
                        break


def test_the_url_in_the_configuration(site: Site, tmp_path: Path) -> None:
    folder = site.holder("kme-a")
    path = tmp_path / "kme.toml"
    path.write_text(f"""
[[kme]]
id = "kme-a"
listen = "127.0.0.1:0"
saes = ["alice"]
ca = "{folder}/ca.pem"
certificate = "{folder}/cert.pem"
key = "{folder}/key.pem"
store = "postgresql://kme:secret-word@127.0.0.1:{free_port()}/keys"
key_file = "store.key"
""")
    site.kme("kme-a", saes=("alice",))
    (tmp_path / "store.key").write_bytes((folder / "store.key").read_bytes())
    (tmp_path / "store.key").chmod(0o600)
    config = load_config(path)
    assert isinstance(config.kme[0].store, PostgresUrl)
    assert "secret-word" not in repr(config)
    pytest.importorskip("psycopg")
    with pytest.raises(ConfigError, match="cannot use the key store keys at 127") as caught:
        KmeServer(config)
    assert "secret-word" not in str(caught.value)
