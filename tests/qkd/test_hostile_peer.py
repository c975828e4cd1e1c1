"""A KME at the other end of a link that sends what it likes, under its own certificate."""

import logging
import sqlite3
import ssl
import uuid
from typing import Any

import httpx
import pytest
import trio

from hybridkex.kme.config import PeerConfig, ServeConfig
from hybridkex.kme.entity import KmeLimits
from hybridkex.kme.peering import CHECK, EXT_KEYS, IDS_AT_ONCE, VOID

IDS = [str(uuid.UUID(int=number)) for number in range(IDS_AT_ONCE + 1)]
EXTENSION = {"blocks": [IDS[0]], "size": 8}
KEY = {"key_id": IDS[0], "value": "AA==", "extension": EXTENSION}
GOOD = {"keys": [KEY], "initiator_sae_id": "eve", "target_sae_ids": ["alice"]}
TWO = {"blocks": [IDS[1], IDS[1]], "size": 8}


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
        (EXT_KEYS, GOOD | {"keys": [KEY | {"key_id": IDS[1], "extension": TWO}]}, 409),
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
