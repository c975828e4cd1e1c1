"""The KME server, asked over HTTP as an SAE would, message by message."""

import base64
import logging
import ssl
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import httpx
import pytest
import trio
import trio.testing
from leaks import leaks

from hybridkex.errors import ConfigError, KeySourceExhausted, KeySourceUnavailable
from hybridkex.kme.config import PeerConfig, ServeConfig
from hybridkex.kme.entity import KeyManagementEntity
from hybridkex.kme.serve import KmeServer
from hybridkex.kme.settings import KmeLimits
from hybridkex.net.address import TcpAddress
from hybridkex.net.http import HttpLimits, Request, Response, serve_connection
from hybridkex.qkd.etsi014.client import Etsi014Source, KmeClient
from hybridkex.qkd.etsi014.models import KeyRequest
from hybridkex.qkd.etsi014.naming import IdRule
from hybridkex.qkd.sqlite_store import SqliteKeyStore
from hybridkex.qkd.store import read_key_file
from hybridkex.secret import Secret
from interop.ports import free_port

Site = Any  # of conftest.py
NOT_FOUND = {"message": "one or more keys specified are not found on KME"}


def context_of(site: Site, holder: str) -> ssl.SSLContext:
    folder = site.holder(holder)
    context = ssl.create_default_context(cafile=str(folder / "ca.pem"))
    context.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    return context


@asynccontextmanager
async def as_sae(site: Site, holder: str, address: TcpAddress) -> AsyncIterator[httpx.AsyncClient]:
    """A plain HTTP client with the certificate of an SAE; none of this project's code."""
    async with httpx.AsyncClient(
        base_url=f"https://{address}/api/v1/keys", verify=context_of(site, holder), timeout=5
    ) as client:
        yield client


async def filled(where: Any, site: Site, number: int = 20, tls: str = "stdlib") -> None:
    """Wait until the producer has made some keys."""
    async with KmeClient(site.access("alice", where.kmes["kme-a"], tls=tls)) as alice:
        source = Etsi014Source(alice, sae="alice", peer_sae="bob")
        with trio.fail_after(5):
            while (await source.status()).stored < number:  # noqa: ASYNC110
                await trio.sleep(0.01)


async def once_stocked(client: KmeClient) -> None:
    while True:
        try:
            await client.enc_keys("bob")
        except KeySourceExhausted:
            await trio.sleep(0.01)
        else:
            return


@pytest.fixture
async def two(site: Site, serve: Any) -> AsyncIterator[tuple[httpx.AsyncClient, httpx.AsyncClient]]:
    """alice at kme-a and bob at kme-b."""
    async with serve(site.pair()) as where:
        await filled(where, site)
        async with (
            as_sae(site, "alice", where.kmes["kme-a"]) as alice,
            as_sae(site, "bob", where.kmes["kme-b"]) as bob,
        ):
            yield alice, bob


async def test_status(two: Any) -> None:
    alice, _ = two
    answer = await alice.get("/bob/status")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/json"
    body = answer.json()
    assert body.pop("stored_key_count") > 0
    assert body == {
        "source_KME_ID": "kme-a",
        "target_KME_ID": "kme-b",
        "master_SAE_ID": "alice",
        "slave_SAE_ID": "bob",
        "key_size": 256,
        "max_key_count": 4096,
        "max_key_per_request": 128,
        "max_key_size": 4096,
        "min_key_size": 64,
        "max_SAE_ID_count": 8,
    }


async def test_the_default_key(two: Any) -> None:
    alice, bob = two
    for method, body in (
        ("GET", None),
        ("POST", None),
        ("POST", {}),
        ("POST", {"number": 1}),
        ("POST", {"number": 1, "size": None, "additional_slave_SAE_IDs": None}),
        ("POST", {"number": None, "extension_mandatory": None, "extension_optional": None}),
    ):
        answer = await alice.request(method, "/bob/enc_keys", json=body)
        assert answer.status_code == 200, (method, body)
        [key] = answer.json()["keys"]
        assert len(base64.b64decode(key["key"], validate=True)) == 32
        got = await bob.get("/alice/dec_keys", params={"key_ID": key["key_ID"]})
        assert got.json() == {"keys": [key]}, (method, body)


async def test_sizes(two: Any) -> None:
    alice, bob = two
    for size in (64, 128, 256, 264, 512, 4096):
        keys = (await alice.get(f"/bob/enc_keys?number=3&size={size}")).json()["keys"]
        assert [len(base64.b64decode(key["key"])) * 8 for key in keys] == [size] * 3
        ids = {"key_IDs": [{"key_ID": key["key_ID"]} for key in keys]}
        assert (await bob.post("/alice/dec_keys", json=ids)).json()["keys"] == keys, size
        # The first 64 bits are not used again for another key.
        assert len({key["key"][:8] for key in keys}) == 3, size


async def test_bad_key_requests(two: Any) -> None:
    alice, _ = two
    cases: list[tuple[Any, str]] = [
        ({"size": 257}, "size shall be a multiple of 8"),
        ({"size": 56}, "min_key_size"),
        ({"size": 4104}, "max_key_size"),
        ({"size": 0}, "min_key_size"),
        ({"size": -8}, "min_key_size"),
        ({"size": "256"}, "Bad request format: size"),
        ({"size": True}, "Bad request format: size"),
        ({"number": 0}, "max_key_per_request"),
        ({"number": 129}, "max_key_per_request"),
        ({"number": 1.5}, "Bad request format: number"),
        ({"additional_slave_SAE_IDs": "dave"}, "Bad request format"),
        ({"additional_slave_SAE_IDs": [""]}, "Bad request format"),
        ({"additional_slave_SAE_IDs": ["bob"]}, "named twice"),
        ({"additional_slave_SAE_IDs": ["nobody"]}, "unknown"),
        ({"additional_slave_SAE_IDs": [f"x{i}" for i in range(9)]}, "too many"),
        ({"extension_mandatory": [5]}, "Bad request format"),
        ([], "Bad request format"),
    ]
    for request, message in cases:
        answer = await alice.post("/bob/enc_keys", json=request)
        assert answer.status_code == 400, request
        assert message in answer.json()["message"], request


async def test_the_standards_own_words(two: Any) -> None:
    alice, _ = two
    answer = await alice.post("/bob/enc_keys", json={"size": 257})
    assert answer.json() == {"message": "size shall be a multiple of 8"}
    wanted = {"extension_mandatory": [{"abc_route_type": "direct"}]}
    answer = await alice.post("/bob/enc_keys", json=wanted)
    assert (answer.status_code, answer.json()) == (
        400,
        {
            "message": "not all extension_mandatory parameters are supported",
            "details": [{"extension_mandatory_unsupported": "abc_route_type is not supported"}],
        },
    )
    optional = {"extension_optional": [{"abc_anything": [1, 2]}]}
    assert (await alice.post("/bob/enc_keys", json=optional)).status_code == 200


async def test_bad_requests(two: Any) -> None:
    alice, _ = two
    cases: list[tuple[str, str, bytes | None, int]] = [
        ("GET", "/bob/enc_keys?number=x", None, 400),
        ("GET", "/bob/enc_keys?number=1&number=2", None, 400),
        ("GET", "/bob/enc_keys?number=99999999999999999999", None, 400),
        ("GET", "/bob/enc_keys?extension_mandatory=1", None, 400),
        ("GET", "/bob/dec_keys", None, 400),
        ("GET", "/bob/dec_keys?key_ID=1", None, 400),
        ("GET", "/nobody/status", None, 400),
        ("GET", "/carol/status", None, 400),  # attached to the same KME
        ("POST", "/bob/enc_keys", b"{", 400),
        ("POST", "/bob/enc_keys", b"\xff", 400),
        ("POST", "/bob/enc_keys", b"[" * 50_000, 400),
        ("POST", "/bob/enc_keys", b" " * 200_000, 413),
        ("POST", "/bob/enc_keys", b'{"number": 1, "number": 2}', 400),
        ("POST", "/bob/enc_keys", b'{"number": "1"}', 400),
        ("DELETE", "/bob/status", None, 405),
        ("PUT", "/bob/enc_keys", b"{}", 405),
        ("POST", "/bob/dec_keys", b"", 400),
        ("POST", "/bob/dec_keys", b'{"key_IDs": []}', 400),
        ("POST", "/bob/dec_keys", b'{"key_IDs": [{"key_ID": "{0}"}]}', 400),
        ("POST", "/bob/status", b"", 405),
        ("DELETE", "/bob/enc_keys", None, 405),
        ("GET", "/bob/nothing", None, 404),
        ("GET", "/", None, 404),
    ]
    for method, path, body, status in cases:
        case = method, path, body
        answer = await alice.request(method, path, content=body)
        assert answer.status_code == status, case
        assert isinstance(answer.json()["message"], str), case
        assert (await alice.get("/bob/status")).status_code == 200, f"the server goes on: {case}"


async def test_a_key_request_as_clients_write_it(two: Any) -> None:
    alice, _ = two
    for body in (
        b'{"number":1,"additional_slave_SAE_IDs":null,"size":null}',
        b'{"number":null,"size":256,"extension_mandatory":null,"extension_optional":null}',
        b'{"number":1.0}',
        b'\xef\xbb\xbf{"number":1}',
        b"{}",
        b"",
    ):
        answer = await alice.post("/bob/enc_keys", content=body)
        assert answer.status_code == 200, (body, answer.text)
        assert len(answer.json()["keys"]) == 1, body


async def test_methods(two: Any) -> None:
    """HEAD where GET changes nothing; elsewhere it would draw a key that nobody sees."""
    alice, _ = two
    head = await alice.head("/bob/status")
    assert (head.status_code, head.content) == (200, b"")
    for path in ("/bob/enc_keys", "/bob/dec_keys"):
        refused = await alice.head(path)
        assert (refused.status_code, refused.headers["allow"]) == (405, "GET, POST, OPTIONS")
        options = await alice.options(path)
        assert (options.status_code, options.headers["allow"]) == (204, "GET, POST, OPTIONS")
    assert (await alice.get("/bob/status/")).status_code == 200


async def test_dec_keys_is_all_or_nothing_and_once(two: Any) -> None:
    alice, bob = two
    keys = (await alice.get("/bob/enc_keys?number=2")).json()["keys"]
    ids = [{"key_ID": key["key_ID"]} for key in keys]
    strange = [*ids, {"key_ID": str(uuid.uuid4())}]
    for wrong in (strange, [ids[0], ids[0]]):
        answer = await bob.post("/alice/dec_keys", json={"key_IDs": wrong})
        assert (answer.status_code, answer.json()) == (400, NOT_FOUND)
    assert (await bob.post("/alice/dec_keys", json={"key_IDs": ids})).json()["keys"] == keys
    answer = await bob.post("/alice/dec_keys", json={"key_IDs": ids[:1]})
    assert (answer.status_code, answer.json()) == (400, NOT_FOUND)
    # The master asked for it and does not get it a second time either.
    answer = await alice.get("/bob/dec_keys", params={"key_ID": ids[0]["key_ID"]})
    assert answer.status_code == 400


async def test_401(site: Site, serve: Any) -> None:
    async with serve(site.pair()) as where:
        await filled(where, site)
        a, b = where.kmes["kme-a"], where.kmes["kme-b"]
        async with (
            as_sae(site, "alice", a) as alice,
            as_sae(site, "dave", b) as dave,
            as_sae(site, "bob", a) as elsewhere,
            as_sae(site, "mallory", a) as stranger,
            as_sae(site, "kme-b", a) as kme,
        ):
            [key] = (await alice.get("/bob/enc_keys")).json()["keys"]
            # Not among the SAEs of this key.
            answer = await dave.get("/alice/dec_keys", params={"key_ID": key["key_ID"]})
            assert (answer.status_code, answer.json()) == (401, {"message": "Unauthorized"})
            # Good certificates of the same CA, of nobody who is attached here.
            for client in (elsewhere, stranger, kme):
                assert (await client.get("/bob/status")).status_code == 401
            # An SAE is not a KME.
            block = {"size": 256, "blocks": [key["key_ID"]]}
            body = {
                "keys": [{"key_id": key["key_ID"], "extension": block}],
                "initiator_sae_id": "bob",
                "target_sae_ids": ["alice"],
            }
            answer = await alice.post(f"https://{a}/kmapi/v1/ext_keys", json=body)
            assert answer.status_code == 401


async def test_no_certificate_no_connection(site: Site, serve: Any) -> None:
    async with serve(site.pair()) as where:
        bare = ssl.create_default_context(cafile=str(site.holder("alice") / "ca.pem"))
        async with httpx.AsyncClient(verify=bare) as client:
            with pytest.raises(httpx.TransportError):
                await client.get(f"https://{where.kmes['kme-a']}/api/v1/keys/bob/status")


async def test_multicast(two: Any, site: Site, serve: Any) -> None:
    alice, bob = two
    answer = await alice.post("/bob/enc_keys", json={"additional_slave_SAE_IDs": ["dave"]})
    [key] = answer.json()["keys"]
    address = str(bob.base_url).split("/")[2].rsplit(":", 1)
    async with as_sae(site, "dave", TcpAddress(address[0], int(address[1]))) as dave:
        for slave in (bob, dave):
            query = {"key_ID": key["key_ID"]}
            assert (await slave.get("/alice/dec_keys", params=query)).json()["keys"] == [key]
            assert (await slave.get("/alice/dec_keys", params=query)).status_code == 400


async def test_ids_are_url_encoded(site: Site, serve: Any) -> None:
    strange = "urn:sae/ä b?"
    config = ServeConfig(
        kme=(
            site.kme("kme-a", saes=("alice",), peer=(PeerConfig(id="kme-b", saes=(strange,)),)),
            site.kme("kme-b", saes=(strange,), peer=(PeerConfig(id="kme-a", saes=("alice",)),)),
        )
    )
    async with serve(config) as where, as_sae(site, "alice", where.kmes["kme-a"]) as alice:
        answer = await alice.get("/urn:sae%2F%C3%A4%20b%3F/status")
        assert answer.json()["slave_SAE_ID"] == strange


@pytest.mark.parametrize("rule", IdRule)
async def test_rules_for_ids(
    site: Site, serve: Any, rule: IdRule, caplog: pytest.LogCaptureFixture
) -> None:
    folder = site.holder("alice", uris=("urn:sae:alice",))
    certificate = ssl._ssl._test_decode_cert(str(folder / "cert.pem"))  # type: ignore[attr-defined]
    sae = {
        IdRule.COMMON_NAME: "alice",
        IdRule.SAN_URI: "urn:sae:alice",
        IdRule.DISTINGUISHED_NAME: "CN=alice",
        IdRule.SERIAL_NUMBER: f"{int(certificate['serialNumber'], 16):x}",
    }[rule]
    config = ServeConfig(kme=(site.kme("kme-a", saes=(sae,), self_pairs=True, id_rule=rule),))
    async with serve(config) as where:
        async with as_sae(site, "alice", where.kmes["kme-a"]) as alice:
            answer = await alice.get(f"/{sae}/status")
            assert answer.json()["master_SAE_ID"] == sae
        if rule is IdRule.SAN_URI:
            # Without an ID by the rule the connection is rejected.
            async with as_sae(site, "bob", where.kmes["kme-a"]) as bob:
                with pytest.raises(httpx.TransportError):
                    await bob.get("/alice/status")
            assert "has no ID by id_rule (san-uri)" in caplog.text


async def test_not_found_status_and_self_pairs(site: Site, serve: Any) -> None:
    config = ServeConfig(
        kme=(site.kme("kme-a", saes=("alice",), self_pairs=True, not_found_status=404),)
    )
    async with serve(config) as where, as_sae(site, "alice", where.kmes["kme-a"]) as alice:
        answer = await alice.get("/alice/dec_keys", params={"key_ID": str(uuid.uuid4())})
        assert (answer.status_code, answer.json()) == (404, NOT_FOUND)


async def test_exhaustion_and_refill(site: Site, serve: Any) -> None:
    limits = KmeLimits(max_key_count=128)
    async with serve(site.pair(limits=limits)) as where:
        await filled(where, site, 128)
        async with (
            as_sae(site, "alice", where.kmes["kme-a"]) as alice,
            as_sae(site, "bob", where.kmes["kme-b"]) as bob,
        ):
            answer = await alice.get("/bob/enc_keys?number=10&size=4096")
            assert answer.status_code == 503
            assert answer.json() == {"message": "not enough keys are stored"}
            # Both ends draw at once from what is there: nobody gets the other's keys.
            found: list[str] = []

            async def draw(client: Any, slave: str) -> None:
                for _ in range(30):
                    got = await client.get(f"/{slave}/enc_keys?number=7")
                    if got.status_code == 200:
                        found.extend(key["key_ID"] for key in got.json()["keys"])

            async with trio.open_nursery() as nursery:
                nursery.start_soon(draw, alice, "bob")
                nursery.start_soon(draw, bob, "alice")
            assert len(found) > 128, "the producer fills up"
            assert len(set(found)) == len(found)
            status = (await alice.get("/bob/status")).json()
            assert status["stored_key_count"] <= status["max_key_count"]


async def test_keys_expire(site: Site, serve: Any) -> None:
    limits = KmeLimits(key_ttl=0.2, tombstone_ttl=100)
    config = site.pair(limits=limits)
    async with serve(config) as where:
        await filled(where, site)
        async with (
            as_sae(site, "alice", where.kmes["kme-a"]) as alice,
            as_sae(site, "bob", where.kmes["kme-b"]) as bob,
        ):
            [key] = (await alice.get("/bob/enc_keys")).json()["keys"]
    await trio.sleep(0.25)
    server = KmeServer(config)
    async with trio.open_nursery() as nursery:
        where = await nursery.start(lambda task_status: server.serve(task_status=task_status))
        erased = server.metrics.expired.labels("kme-b")._value
        with trio.fail_after(20):
            while not erased.get():  # noqa: ASYNC110  # a request would take the key
                await trio.sleep(0.05)
        async with as_sae(site, "bob", where.kmes["kme-b"]) as bob:
            answer = await bob.get("/alice/dec_keys", params={"key_ID": key["key_ID"]})
            assert (answer.status_code, answer.json()) == (400, NOT_FOUND)
        server.close()


async def test_rate_limit(site: Site, serve: Any) -> None:
    async with (
        serve(site.pair(limits=KmeLimits(rate=1.0, burst=3))) as where,
        as_sae(site, "alice", where.kmes["kme-a"]) as alice,
        as_sae(site, "carol", where.kmes["kme-a"]) as carol,
    ):
        statuses = [(await alice.get("/bob/status")).status_code for _ in range(5)]
        assert statuses == [200, 200, 200, 503, 503]
        assert (await carol.get("/bob/status")).status_code == 200, "each SAE has its own"


async def test_restart_keeps_keys_and_what_was_delivered(site: Site, serve: Any) -> None:
    config = site.pair()
    async with serve(config) as where:
        await filled(where, site)
        async with (
            as_sae(site, "alice", where.kmes["kme-a"]) as alice,
            as_sae(site, "bob", where.kmes["kme-b"]) as bob,
        ):
            keys = (await alice.get("/bob/enc_keys?number=2")).json()["keys"]
            await bob.get("/alice/dec_keys", params={"key_ID": keys[0]["key_ID"]})
    async with serve(config) as where, as_sae(site, "bob", where.kmes["kme-b"]) as bob:
        again, other = [
            await bob.get("/alice/dec_keys", params={"key_ID": key["key_ID"]}) for key in keys
        ]
        assert again.status_code == 400
        assert other.json()["keys"] == keys[1:]


@pytest.mark.parametrize("tls", ["stdlib", "hybridkex"])
async def test_two_servers_that_sync_over_tls(site: Site, serve: Any, tls: str) -> None:
    """Each KME is a server of its own; relayed keys go by value, over either TLS."""
    address = TcpAddress("127.0.0.1", free_port())
    here = site.kme(
        "kme-a",
        saes=("alice",),
        tls=tls,
        peer=(PeerConfig(id="kme-b", saes=("bob",), url=f"https://{address}"),),
    )
    there = site.kme(
        "kme-b",
        saes=("bob",),
        tls=tls,
        listen=address,
        peer=(PeerConfig(id="kme-a", saes=("alice",), url="https://127.0.0.1:1"),),
    )
    async with (
        serve(ServeConfig(kme=(here,))) as a,
        KmeClient(site.access("alice", a.kmes["kme-a"], tls=tls)) as alice,
    ):
        await filled(a, site, tls=tls)
        with pytest.raises(KeySourceUnavailable, match="peer KME gave no valid response"):
            await alice.enc_keys("bob")
        async with (
            serve(ServeConfig(kme=(there,))) as b,
            KmeClient(site.access("bob", b.kmes["kme-b"], tls=tls)) as bob,
        ):
            keys = (await alice.enc_keys("bob")).keys
            assert (await bob.dec_keys("alice", [keys[0].key_id])).keys == keys
            # A KME with a good certificate that is not the one that was named.
            impostor = site.kme("kme-a", saes=("alice",), tls=tls, peer=here.peer)
            holder = site.holder("kme-x")
            impostor = replace(
                impostor,
                certificate=holder / "cert.pem",
                key=holder / "key.pem",
                store=site.folder / "x.db",
            )
            async with serve(ServeConfig(kme=(impostor,))) as x:
                access = site.access("alice", x.kmes["kme-a"], tls=tls, kme_id="kme-x")
                async with KmeClient(access) as alice_at_x:
                    with pytest.raises(
                        KeySourceUnavailable, match="peer KME gave no valid response"
                    ):
                        await once_stocked(alice_at_x)


async def test_the_largest_batch_that_status_announces(site: Site, serve: Any) -> None:
    """Between two KMEs, by value: the longest message that the announced limits allow.

    The KME at the other end announces less to its own SAEs, which is not the peer's business.
    """
    address = TcpAddress("127.0.0.1", free_port())
    peer = PeerConfig(id="kme-b", saes=("bob",), url=f"https://{address}")
    here = site.kme("kme-a", saes=("alice",), peer=(peer,))
    there = site.kme(
        "kme-b",
        saes=("bob",),
        listen=address,
        peer=(PeerConfig(id="kme-a", saes=("alice",), url="https://127.0.0.1:1"),),
        limits=KmeLimits(max_key_size=512, max_key_per_request=64),
        http=HttpLimits(max_body=1024),
    )
    async with (
        serve(ServeConfig(kme=(here,))) as a,
        serve(ServeConfig(kme=(there,))) as b,
        KmeClient(site.access("alice", a.kmes["kme-a"])) as alice,
        KmeClient(site.access("bob", b.kmes["kme-b"])) as bob,
    ):
        status = await alice.status("bob")
        assert (status.max_key_per_request, status.max_key_size) == (128, 4096)
        await filled(a, site, number=128 * 16)
        request = KeyRequest(number=status.max_key_per_request, size=status.max_key_size)
        keys = (await alice.enc_keys("bob", request)).keys
        assert len(keys) == 128
        for start in (0, 64):
            part = keys[start : start + 64]
            assert (await bob.dec_keys("alice", [key.key_id for key in part])).keys == part


@pytest.mark.parametrize(
    "changes",
    [
        {"max_key_size": 1 << 20},
        {"max_key_per_request": 20_000},
        {"key_size": 64, "max_key_size": 1 << 16},
    ],
)
def test_limits_that_no_message_could_carry(changes: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="message of"):
        KmeLimits(**{"max_key_size": 16384} | changes)


async def test_the_feed_outlives_a_full_disk(site: Site) -> None:
    server = KmeServer(site.pair())
    disks = [store._db for store in server._stores.values()]
    pages = [db.execute("PRAGMA page_count").fetchone()[0] for db in disks]
    for db, number in zip(disks, pages, strict=True):
        db.execute(f"PRAGMA max_page_count = {number + 4}")
    async with trio.open_nursery() as nursery:
        where = await nursery.start(lambda task_status: server.serve(task_status=task_status))
        failures = server.metrics.store_failures.labels("kme-a")._value
        with trio.fail_after(10):
            while failures.get() < 3:  # noqa: ASYNC110
                await trio.sleep(0.05)
        for db in disks:
            db.execute("PRAGMA max_page_count = 1000000")
        await filled(where, site, number=500)
        async with as_sae(site, "alice", where.kmes["kme-a"]) as alice:
            assert (await alice.get("/bob/enc_keys?number=5")).status_code == 200
        server.close()


async def test_a_failing_store_says_when_to_ask_again(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fails(_: object, link: str) -> int:
        raise KeySourceUnavailable("the key store failed: disk I/O error")

    monkeypatch.setattr(SqliteKeyStore, "count", fails)
    server = KmeServer(site.pair())
    async with trio.open_nursery() as nursery:
        where = await nursery.start(lambda task_status: server.serve(task_status=task_status))
        async with as_sae(site, "alice", where.kmes["kme-a"]) as alice:
            answer = await alice.get("/bob/status")
        server.close()
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
    assert "disk" not in answer.text


async def test_ends_that_a_crash_has_put_out_of_step(site: Site, serve: Any) -> None:
    config = site.pair()
    stray = {kme.id: (str(uuid.uuid4()), Secret(bytes(32))) for kme in config.kme}
    for kme in config.kme:
        store = SqliteKeyStore(kme.store, read_key_file(kme.key_file))
        [other] = kme.peer
        await store.add(other.id, [stray[kme.id]])
        await store.aclose()
    async with serve(config) as where:
        await filled(where, site)
    for kme in config.kme:
        store = SqliteKeyStore(kme.store, read_key_file(kme.key_file))
        [other] = kme.peer
        assert await store.unknown(other.id, [stray[kme.id][0]]) == [stray[kme.id][0]]
        await store.aclose()


async def test_requests_are_answered_while_the_ends_compare_their_stocks(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no key comes in before they have: it would be at one end first."""
    config = site.pair()
    keys = [(str(uuid.uuid4()), Secret(bytes(32))) for _ in range(10)]
    for kme in config.kme:
        store = SqliteKeyStore(kme.store, read_key_file(kme.key_file))
        await store.add(kme.peer[0].id, keys)
        await store.aclose()
    begun, go_on = trio.Event(), trio.Event()
    compare = KeyManagementEntity.reconcile

    async def slowly(self: KeyManagementEntity, target: str, *, grace: float) -> None:
        begun.set()
        await go_on.wait()
        await compare(self, target, grace=grace)

    monkeypatch.setattr(KeyManagementEntity, "reconcile", slowly)
    server = KmeServer(config)
    async with trio.open_nursery() as nursery:
        where = await nursery.start(lambda task_status: server.serve(task_status=task_status))
        await begun.wait()
        async with as_sae(site, "alice", where.kmes["kme-a"]) as alice:
            answer = await alice.get("/bob/enc_keys?number=4")
            assert answer.status_code == 200
        assert await server._stores["kme-a"].count("kme-b") == 6
        go_on.set()
        await filled(where, site, number=64)
        server.close()


async def test_a_block_that_the_other_end_lacks_is_passed_over(site: Site) -> None:
    """As between two sites whose link delivered to one of them only: young, so not erased."""
    server = KmeServer(site.pair())
    async with trio.open_nursery() as nursery:
        where = await nursery.start(lambda task_status: server.serve(task_status=task_status))
        await filled(where, site)
        here, there = server._stores["kme-a"], server._stores["kme-b"]
        lost = await here.reserve("kme-b", 3)
        await here.release("kme-b", [material.key_id for material in lost])
        await there.void("kme-a", [material.key_id for material in lost])
        async with as_sae(site, "alice", where.kmes["kme-a"]) as alice:
            answer = await alice.get("/bob/enc_keys?number=5")
        server.close()
    assert answer.status_code == 200
    ids = {key["key_ID"] for key in answer.json()["keys"]}
    assert not ids & {material.key_id for material in lost}


async def test_no_key_is_logged(site: Site, serve: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    async with serve(site.pair()) as where:
        await filled(where, site)
        async with (
            as_sae(site, "alice", where.kmes["kme-a"]) as alice,
            as_sae(site, "bob", where.kmes["kme-b"]) as bob,
        ):
            keys = (await alice.get("/bob/enc_keys?number=3")).json()["keys"]
            ids = {"key_IDs": [{"key_ID": key["key_ID"]} for key in keys]}
            assert (await bob.post("/alice/dec_keys", json=ids)).status_code == 200
    assert caplog.text
    for key in keys:
        assert not leaks(caplog.text, base64.b64decode(key["key"]))


async def test_metrics_on_their_own_port(site: Site, serve: Any) -> None:
    config = replace(site.pair(), metrics=TcpAddress("127.0.0.1", 0))
    async with serve(config) as where:
        await filled(where, site)
        async with as_sae(site, "alice", where.kmes["kme-a"]) as alice:
            await alice.get("/bob/enc_keys?number=3")
            await alice.get("/bob/enc_keys?size=1")
            answer = await alice.get(f"http://{where.metrics}/metrics")
            assert (await alice.get(f"http://{where.metrics}/other")).status_code == 404
    text = answer.text
    assert 'hybridkex_kme_keys_delivered_total{kme="kme-a",role="master",sae="alice"} 3.0' in text
    assert 'hybridkex_kme_requests_total{call="enc_keys",kme="kme-a",status="400"} 1.0' in text
    assert "hybridkex_kme_request_seconds_bucket" in text


async def test_a_graceful_end_answers_what_has_begun() -> None:
    """Closing: a request under way is answered and the idle connection beside it ends."""
    begun, go_on, closing = trio.Event(), trio.Event(), trio.Event()

    async def handler(request: Request) -> Response:
        begun.set()
        await go_on.wait()
        return Response.json(200, {"path": request.path})

    busy, busy_end = trio.testing.memory_stream_pair()
    idle, idle_end = trio.testing.memory_stream_pair()
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            for end in (busy_end, idle_end):
                nursery.start_soon(serve_connection, end, handler, HttpLimits(), closing)
            await busy.send_all(b"GET /a%2Fb HTTP/1.1\r\nHost: x\r\n\r\n")
            await begun.wait()
            closing.set()
            go_on.set()
            answer = await busy.receive_some()
    assert b'{"path":["a/b"]}' in answer  # headers and body in one piece
    assert idle is not None


async def test_one_send_for_a_response() -> None:
    sends = 0

    class Counting(trio.abc.Stream):
        async def send_all(self, data: Any) -> None:
            nonlocal sends
            sends += 1
            await theirs.send_all(data)

        async def wait_send_all_might_not_block(self) -> None:
            await theirs.wait_send_all_might_not_block()

        async def receive_some(self, max_bytes: int | None = None) -> Any:
            return await theirs.receive_some(max_bytes)

        async def aclose(self) -> None:
            await theirs.aclose()

    async def handler(request: Request) -> Response:
        return Response.json(200, {"x": "y" * 5000})

    ours, theirs = trio.testing.memory_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve_connection, Counting(), handler, HttpLimits())
        # Two requests at once: pipelining is allowed by HTTP/1.1.
        await ours.send_all(b"GET /1 HTTP/1.1\r\nHost: x\r\n\r\nGET /2 HTTP/1.1\r\nHost: x\r\n\r\n")
        received = b""
        while received.count(b'yyy"}') < 2:
            received += await ours.receive_some()
        await ours.aclose()
    assert sends == 2


@pytest.mark.parametrize(
    "sent", [b"\x16\x03\x01\x00\x00\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n", b"A" * 20_000, b"\r\n"]
)
async def test_what_is_not_http(sent: bytes, autojump_clock: trio.testing.MockClock) -> None:
    async def handler(request: Request) -> Response:
        raise AssertionError

    ours, theirs = trio.testing.memory_stream_pair()
    with trio.fail_after(2):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve_connection, theirs, handler, HttpLimits(request=0.5, idle=0.5))
            await ours.send_all(sent)


async def test_a_slow_client_is_cut_off(autojump_clock: trio.testing.MockClock) -> None:
    async def handler(request: Request) -> Response:
        raise AssertionError

    ours, theirs = trio.testing.memory_stream_pair()
    began = trio.current_time()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve_connection, theirs, handler, HttpLimits(request=0.2, idle=0.2))
        await ours.send_all(b"GET / HT")
    assert trio.current_time() - began < 2


@pytest.mark.parametrize(
    "changes",
    [
        {"tls": "none"},
        {"max_connections": 0},
        {"not_found_status": 418},
        {"saes": ("bob",)},
        {"saes": ("kme-a",)},
        {"peer": (PeerConfig(id="kme-a", saes=("alice",)),)},
        {"key_file": "missing"},
    ],
)
def test_configurations_that_cannot_work(site: Site, changes: dict[str, Any]) -> None:
    settings = {"saes": ("alice",), "peer": (PeerConfig(id="kme-b", saes=("bob",), url="x"),)}
    key_file = changes.pop("key_file", "kme-a/store.key")

    def make() -> KmeServer:
        config = site.kme("kme-a", **(settings | changes))
        return KmeServer(ServeConfig(kme=(replace(config, key_file=site.folder / key_file),)))

    with pytest.raises(ConfigError):
        make()
