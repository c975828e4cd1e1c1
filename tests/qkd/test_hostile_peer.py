"""A KME at the other end of a link that sends what it likes, under its own certificate."""

import logging
import ssl
import uuid
from typing import Any

import httpx
import pytest
import trio

from hybridkex.kme.config import PeerConfig, ServeConfig
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
