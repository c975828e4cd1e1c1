"""A KME at the other end of a link that sends what it likes, under its own certificate."""

import base64
import json
import logging
import sqlite3
import ssl
import uuid
from typing import Any

import httpx
import pytest
import trio

from hybridkex.kme.config import PeerConfig, ServeConfig
from hybridkex.kme.peering import CHECK, EXT_KEYS, IDS_AT_ONCE, VOID, ExtKeys
from hybridkex.kme.serve import KmeServer
from hybridkex.kme.settings import KmeLimits
from hybridkex.qkd.etsi014.models import ErrorResponse, KeyRequest
from hybridkex.qkd.store import BlocksRefused, BlockState
from hybridkex.secret import Secret

IDS = [str(uuid.UUID(int=number)) for number in range(IDS_AT_ONCE + 1)]
EXTENSION = {"blocks": [IDS[0]], "size": 8}
KEY = {"key_id": IDS[0], "value": "AA==", "extension": EXTENSION}
GOOD = {"keys": [KEY], "initiator_sae_id": "eve", "target_sae_ids": ["alice"]}
TWO = {"blocks": [IDS[1], IDS[1]], "size": 8}
LONG = base64.b64encode(bytes(64)).decode()
TWICE = {"key_id": IDS[1], "value": LONG, "extension": TWO | {"size": 512}}


def client(site: Any, name: str) -> httpx.AsyncClient:
    folder = site.holder(name)
    context = ssl.create_default_context(cafile=folder / "ca.pem")
    context.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    return httpx.AsyncClient(verify=context, trust_env=False)


async def test_an_odd_message_is_refused_and_is_no_fault_of_the_store(
    site: Any, serve: Any, caplog: pytest.LogCaptureFixture
) -> None:
    pair = site.pair()
    a = site.kme(
        "kme-a",
        saes=("alice", "carol"),
        peer=(
            PeerConfig(id="kme-b", saes=("bob", "dave")),
            PeerConfig(id="kme-c", saes=("eve",), url="https://127.0.0.1:1"),
        ),
    )
    odd: list[tuple[str, object, int]] = [
        (EXT_KEYS, GOOD | {"target_sae_ids": ["alice", "alice"]}, 400),
        (EXT_KEYS, GOOD | {"target_sae_ids": ["alice", "carol", "alice"]}, 400),
        (EXT_KEYS, GOOD | {"target_sae_ids": []}, 400),
        (EXT_KEYS, GOOD | {"target_sae_ids": ["bob"]}, 400),
        (EXT_KEYS, GOOD | {"initiator_sae_id": "bob"}, 401),
        (EXT_KEYS, GOOD | {"keys": [KEY, KEY]}, 409),
        (EXT_KEYS, GOOD | {"keys": [KEY | {"key_id": IDS[1], "extension": TWO}]}, 400),
        (EXT_KEYS, GOOD | {"keys": [TWICE]}, 409),
        (EXT_KEYS, GOOD | {"keys": [KEY | {"extension": EXTENSION | {"size": 8 << 70}}]}, 400),
        (EXT_KEYS, GOOD | {"keys": [KEY | {"value": ""}]}, 400),
        (EXT_KEYS, GOOD | {"keys": [[]]}, 400),
        (VOID, {"key_ids": IDS}, 400),
        (CHECK, {"key_ids": IDS}, 400),
        (CHECK, {"key_ids": IDS[1:]}, 200),
        (EXT_KEYS, GOOD | {"target_sae_ids": ["alice", "carol"]}, 202),
        (EXT_KEYS, GOOD, 409),
    ]
    with caplog.at_level(logging.ERROR), trio.fail_after(30):
        async with serve(ServeConfig(kme=(a, pair.kme[1]))) as where:
            async with client(site, "kme-c") as hostile:
                for path, message, status in odd:
                    answer = await hostile.post(
                        f"https://{where.kmes['kme-a']}{path}", json=message
                    )
                    assert answer.status_code == status, (path, message, answer.text)
            async with client(site, "alice") as alice:
                url = f"https://{where.kmes['kme-a']}/api/v1/keys"
                assert (await alice.get(f"{url}/bob/enc_keys")).status_code == 200
    assert not caplog.records


async def test_a_peer_cannot_fill_the_store(
    site: Any, serve: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many small voids, many keys by value that nobody collects, many requests."""
    monkeypatch.setattr("hybridkex.kme.entity.VOIDS_RATE", 1e-9)
    monkeypatch.setattr("hybridkex.kme.entity.VOIDS_BURST", 25)
    pair = site.pair()
    limits = KmeLimits(max_promised=30, peer_rate=1e-9, peer_burst=64)
    a = site.kme(
        "kme-a",
        saes=("alice", "carol"),
        limits=limits,
        peer=(
            PeerConfig(id="kme-b", saes=("bob", "dave")),
            PeerConfig(id="kme-c", saes=("eve",), url="https://127.0.0.1:1"),
        ),
    )
    statuses: dict[str, list[int]] = {VOID: [], EXT_KEYS: []}
    with trio.fail_after(60):
        async with serve(ServeConfig(kme=(a, pair.kme[1]))) as where:
            async with client(site, "kme-c") as hostile:

                async def post(path: str, message: object) -> None:
                    answer = await hostile.post(
                        f"https://{where.kmes['kme-a']}{path}", json=message
                    )
                    statuses[path].append(answer.status_code)

                for number in range(20):
                    await post(VOID, {"key_ids": IDS[2 * number : 2 * number + 2]})
                for number in range(50):
                    own = IDS[100 + number]
                    extension = {"blocks": [own], "size": 8}
                    key = KEY | {"key_id": own, "extension": extension}
                    await post(EXT_KEYS, GOOD | {"keys": [key]})
            async with client(site, "alice") as alice:
                url = f"https://{where.kmes['kme-a']}/api/v1/keys"
                assert (await alice.get(f"{url}/bob/enc_keys")).status_code == 200
    assert statuses[VOID] == 20 * [202]
    assert statuses[EXT_KEYS] == 30 * [202] + 20 * [503]
    with sqlite3.connect(a.store) as db:
        (spent,) = db.execute("SELECT count(*) FROM spent WHERE link = 'kme-c'").fetchone()
        (grants,) = db.execute("SELECT count(*) FROM grants WHERE link = 'kme-c'").fetchone()
    db.close()
    assert (spent, grants) == (25 + 30, 30)
    told = [
        record.getMessage() for record in caplog.records if "more than it may" in record.message
    ]
    assert 1 <= len(told) <= 5
    assert all("kme-c" in line for line in told)


def by_value(blocks: int, size: int) -> dict[str, object]:
    ids = [str(uuid.uuid4()) for _ in range(blocks)]
    value = base64.b64encode(bytes(size // 8)).decode()
    return {"key_id": ids[0], "value": value, "extension": {"blocks": ids, "size": size}}


async def test_neither_long_keys_nor_many_blocks_fill_the_store(
    site: Any, serve: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """A key counts for all of its blocks, and has no more of them than it needs."""
    peer = PeerConfig(id="kme-c", saes=("eve",), url="https://127.0.0.1:1")
    limits = KmeLimits(max_promised=100)
    a = site.kme("kme-a", saes=("alice", "carol"), limits=limits, peer=(peer,))
    refused = [by_value(2, 8), by_value(50, 256), by_value(1, 512), by_value(9000, 256 * 9000)]
    with trio.fail_after(30):
        async with serve(ServeConfig(kme=(a,))) as where, client(site, "kme-c") as hostile:
            url = f"https://{where.kmes['kme-a']}{EXT_KEYS}"

            async def status_of(*keys: dict[str, object]) -> int:
                return (await hostile.post(url, json=GOOD | {"keys": list(keys)})).status_code

            assert [await status_of(one) for one in refused] == [400] * len(refused)
            assert await status_of(*(by_value(500, 256 * 500) for _ in range(17))) == 400
            assert await status_of(by_value(60, 256 * 60)) == 202
            assert await status_of(by_value(60, 256 * 60)) == 503
            assert await status_of(by_value(40, 256 * 40)) == 202
            assert await status_of(by_value(1, 8)) == 503
    with sqlite3.connect(a.store) as db:
        assert db.execute("SELECT count(*) FROM spent").fetchone() == (100,)
    db.close()


async def test_an_sae_waits_for_no_more_than_one_message_of_a_peer(site: Any, serve: Any) -> None:
    """The peer sends the longest messages there are, on many connections at once."""
    peer = PeerConfig(id="kme-c", saes=("eve",), url="https://127.0.0.1:1")
    a = site.kme("kme-a", saes=("alice", "carol"), peer=(peer,))
    keys = [by_value(512, 256 * 512) for _ in range(16)]
    for one in keys:
        del one["value"]
    longest = [
        (EXT_KEYS, json.dumps(GOOD | {"keys": keys})),
        (CHECK, '{"key_ids": [' + "1.0," * 1_000_000 + "1]}"),
        (EXT_KEYS, '{"keys": [' + "{}," * 1_300_000 + "1]}"),
    ]
    waited: list[float] = []
    with trio.fail_after(120):
        async with serve(ServeConfig(kme=(a,))) as where, client(site, "alice") as alice:
            base = f"https://{where.kmes['kme-a']}"
            status = f"{base}/api/v1/keys/eve/status"
            await alice.get(status)
            async with trio.open_nursery() as nursery:

                async def send(path: str, body: str) -> None:
                    async with client(site, "kme-c") as hostile:
                        await hostile.post(base + path, content=body, timeout=60)

                async with trio.open_nursery() as hostile_ones:
                    for path, body in longest * 3:
                        hostile_ones.start_soon(send, path, body)

                    async def ask() -> None:
                        while True:
                            began = trio.current_time()
                            assert (await alice.get(status, timeout=60)).status_code == 200
                            waited.append(trio.current_time() - began)
                            await trio.sleep(0.02)

                    nursery.start_soon(ask)
                nursery.cancel_scope.cancel()
    assert max(waited) < 3


class SaysSpent:
    """A KME that refuses every block for good."""

    async def ext_keys(self, message: ExtKeys) -> None:
        blocks = [block for one in message.allotments for block in one.blocks]
        raise BlocksRefused(dict.fromkeys(blocks, BlockState.SPENT))

    async def void(self, key_ids: object) -> None: ...

    async def check(self, key_ids: object) -> list[str]:
        return []


async def test_a_peer_that_refuses_every_key_does_not_flood_the_log(
    site: Any, caplog: pytest.LogCaptureFixture
) -> None:
    peer = PeerConfig(id="kme-c", saes=("eve",), url="https://127.0.0.1:1")
    server = KmeServer(ServeConfig(kme=(site.kme("kme-a", saes=("alice",), peer=(peer,)),)))
    kme, store = server._kmes["kme-a"], server._stores["kme-a"]
    try:
        keys = [(one, Secret(bytes(32))) for one in IDS[:100]]
        await store.add("kme-c", keys, shared=True)
        kme.connect("kme-c", SaysSpent())
        with pytest.raises(ErrorResponse, match="not enough keys"):
            await kme.get_key("alice", "eve", KeyRequest())
    finally:
        await store.aclose()
    lines = [one for one in caplog.messages if "lost and erased" in one]
    assert 1 <= len(lines) <= 25
