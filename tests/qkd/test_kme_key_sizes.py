"""A KME whose stock was made for another key size gives no key that is shorter than asked."""

import uuid
from pathlib import Path

import pytest

from hybridkex.kme.entity import KeyManagementEntity, LocalPeer
from hybridkex.kme.metrics import KmeMetrics
from hybridkex.kme.settings import EntitySettings, KmeLimits
from hybridkex.qkd.etsi014.models import ErrorResponse, KeyRequest
from hybridkex.qkd.sqlite_store import SqliteKeyStore
from hybridkex.secret import Secret

SAES = {"a": frozenset({"alice"}), "b": frozenset({"bob"})}


@pytest.mark.parametrize("size", [64, 256, 512, 1024, 4096])
@pytest.mark.parametrize("others", [0, 20])
async def test_stock_of_a_smaller_key_size(tmp_path: Path, size: int, others: int) -> None:
    stores = {kme: SqliteKeyStore(tmp_path / kme, Secret(bytes(32))) for kme in SAES}
    kmes, metrics = {}, KmeMetrics()
    for own, other in (("a", "b"), ("b", "a")):
        kmes[own] = KeyManagementEntity(
            EntitySettings(
                id=own,
                saes=SAES[own],
                peers={other: SAES[other]},
                limits=KmeLimits(key_size=512),
            ),
            store=stores[own],
            metrics=metrics,
        )
    kmes["a"].connect("b", LocalPeer(own_id="a", other=kmes["b"]))
    short = [(str(uuid.uuid4()), Secret(bytes([number]) * 32)) for number in range(50)]
    whole = [(str(uuid.uuid4()), Secret(bytes([number]) * 64)) for number in range(others)]
    for own, other in (("a", "b"), ("b", "a")):
        await stores[own].add(other, [*short, *whole])
    if others:
        for _ in range(2):
            drawn = await kmes["a"].get_key("alice", "bob", KeyRequest(size=size))
            got = await kmes["b"].get_key_with_ids("bob", "alice", [drawn.keys[0].key_id])
            assert len(drawn.keys[0].key) * 8 == size
            assert got.keys[0].key == drawn.keys[0].key
    else:
        with pytest.raises(ErrorResponse, match="not enough keys"):
            await kmes["a"].get_key("alice", "bob", KeyRequest(size=size))
        assert [await stores[kme].count(other) for kme, other in (("a", "b"), ("b", "a"))] == [0, 0]
    text = metrics.text().decode()
    assert 'keys_lost_total{kme="a",link="b",reason="short"} 0.0' not in text
    for store in stores.values():
        await store.aclose()
