"""Which QKD keys a one-time pad gets, and which it does not, whatever a peer or a KME says."""

import asyncio
import contextlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import trio

from hybridkex import QkdLimits, QkdPskSource, Secret
from hybridkex.errors import (
    KeyConsumed,
    KeySourceUnavailable,
    KeyUnauthorized,
    KeyUnknown,
)
from hybridkex.qkd.composite import CombinedSource
from hybridkex.qkd.in_process import InProcessSource, in_process_pair
from hybridkex.qkd.psk import identity_of
from hybridkex.qkd.source import KeyPart, KeyReference, QkdKey, SourceStatus
from hybridkex.wire.messages import ImportedIdentity

SESSION: Any = SimpleNamespace(psk_origin=None, resumed=False, psk_identity=None)


def pair(**limits: Any) -> tuple[QkdPskSource, QkdPskSource]:
    alice, bob = in_process_pair("alice", "bob")
    return QkdPskSource(alice), QkdPskSource(bob, limits=QkdLimits(**limits))


async def test_both_ends_get_the_same_bytes_once() -> None:
    alice, bob = pair()
    identity, key = await alice.draw_for_pad(SESSION)
    assert await bob.look_up_for_pad(identity, SESSION) == key
    assert (alice.counters.pad_keys, bob.counters.pad_keys) == (1, 1)
    with pytest.raises(KeyConsumed):
        await bob.look_up_for_pad(identity, SESSION)
    assert bob.counters.repeated == 1


async def test_a_key_is_in_one_direction_and_in_one_use() -> None:
    alice, bob = pair()
    identity, _ = await alice.draw_for_pad(SESSION)
    with pytest.raises(KeyUnknown):  # bob names alice's key to her: a key of the other direction
        await alice.look_up_for_pad(identity, SESSION)
    psk = await alice.offer()  # what went into a handshake is no pad
    from_handshake = await bob.look_up((wire(psk),))
    assert from_handshake.key == psk.key
    with pytest.raises(KeyConsumed):
        await bob.look_up_for_pad(psk.identity, SESSION)


def wire(psk: Any) -> bytes:
    return ImportedIdentity(psk.identity, psk.context, 0x0304, 1).encode()


@pytest.mark.parametrize("act", ["flip", "drop", "double"])
async def test_each_byte_of_a_name(act: str) -> None:
    alice, bob = pair()
    identity, _ = await alice.draw_for_pad(SESSION)
    for place in range(len(identity)):
        before, one, after = identity[:place], identity[place], identity[place + 1 :]
        changed = {
            "flip": before + bytes((one ^ 1,)) + after,
            "drop": before + after,
            "double": before + bytes((one, one)) + after,
        }[act]
        with pytest.raises((KeyUnknown, KeyUnauthorized)):
            await bob.look_up_for_pad(changed, SESSION)
    assert await bob.look_up_for_pad(identity, SESSION)


class Kme:
    """A key source of which a test says what it gives."""

    local_sae, peer_sae = "alice", "bob"

    def __init__(self, *keys: QkdKey) -> None:
        self.keys = list(keys)

    async def get_key(self) -> QkdKey:
        return self.keys.pop(0)

    async def get_key_with_id(self, name: KeyReference) -> QkdKey:
        found = self.keys.pop(0)
        if found.name != name:
            raise KeySourceUnavailable("down")
        return found

    def knows(self, name: KeyReference) -> bool:
        return all((part.master_kme, part.slave_kme) == ("a", "b") for part in name)

    async def status(self) -> SourceStatus:
        return SourceStatus(stored=len(self.keys), capacity=9, key_bits=256)


def key(*ids: str, size: int = 32) -> QkdKey:
    name = tuple(KeyPart("a", "b", one) for one in ids)
    return QkdKey(name=name, master_sae="alice", slave_sae="bob", key=Secret(bytes(size)))


async def test_keys_that_are_no_pad() -> None:
    combined = CombinedSource(
        [in_process_pair("alice", "bob", kmes=(f"a{n}", f"b{n}"))[0] for n in range(2)]
    )
    before = (await combined.status()).stored
    with pytest.raises(KeyUnauthorized, match="combined"):
        await QkdPskSource(combined).draw_for_pad(SESSION)
    assert (await combined.status()).stored == before  # none is spent
    source = QkdPskSource(Kme(key("x", "y"), key("z", size=15), key("same"), key("same")))
    for match in ("combined", "16 bytes or more"):
        with pytest.raises(KeyUnauthorized, match=match):
            await source.draw_for_pad(SESSION)
    await source.draw_for_pad(SESSION)
    with pytest.raises(KeySourceUnavailable, match="twice"):
        await source.draw_for_pad(SESSION)
    with pytest.raises(KeyUnauthorized, match="combined"):
        await source.look_up_for_pad(identity_of(key("x", "y").name), SESSION)


async def draw(source: QkdPskSource, use: str) -> Any:
    if use == "handshake":
        return await source.offer()
    if use == "key update":
        return await source.draw_for_update(SESSION, client=True, epoch=1)
    return await source.draw_for_pad(SESSION)


USES = ("handshake", "key update", "pad")


@pytest.mark.parametrize("second", USES)
@pytest.mark.parametrize("first", [*USES, "combined"])
async def test_a_key_that_a_source_gives_twice_is_used_once(first: str, second: str) -> None:
    """Whatever for: what was under a one-time pad must be in no key schedule, or the other way."""
    names = ("x", "same") if first == "combined" else ("same",)
    source = QkdPskSource(Kme(key(*names), key("same"), key("other")))
    await draw(source, "handshake" if first == "combined" else first)
    with pytest.raises(KeySourceUnavailable, match="twice"):
        await draw(source, second)
    assert (source.counters.drawn, source.counters.failed) == (1, 1)
    assert await draw(source, second)


async def test_a_look_up_goes_on_until_the_kme_answers(autojump_clock: Any) -> None:
    source = QkdPskSource(Kme(key("other"), key("other"), key("wanted")))
    identity = identity_of(key("wanted").name)
    assert await source.look_up_for_pad(identity, SESSION) == Secret(bytes(32))
    assert trio.current_time() > 0


async def test_a_peer_that_names_keys_too_fast_waits(autojump_clock: Any) -> None:
    alice, bob = pair(look_ups_per_second=10, burst=5)
    began = trio.current_time()
    for _ in range(25):
        identity, drawn = await alice.draw_for_pad(SESSION)
        assert await bob.look_up_for_pad(identity, SESSION) == drawn
    assert 1.9 < trio.current_time() - began < 3
    assert not bob.counters.failed


@pytest.mark.parametrize("strangers", [0, 100])
async def test_many_sessions_renew_their_keys_at_once(strangers: int, autojump_clock: Any) -> None:
    """They wait for each other, and no stranger who begins handshakes takes their turns."""
    alice, bob = pair(look_ups_per_second=10, burst=5)
    found = 0

    async def renew() -> None:
        nonlocal found
        ours = await alice.draw_for_update(SESSION, client=True, epoch=1)
        psk = ours.psk
        theirs = await bob.look_up_for_update(wire(psk), SESSION, client=False, epoch=1)
        found += theirs.psk.key == psk.key

    for _ in range(strangers):
        psk = await alice.offer()
        with contextlib.suppress(KeySourceUnavailable):
            await bob.look_up((wire(psk),))
    limited = bob.counters.limited
    async with trio.open_nursery() as nursery:
        for _ in range(60):
            nursery.start_soon(renew)
    assert found == 60
    assert bob.counters.limited == limited


async def test_a_peer_that_renews_keys_without_end_is_refused(autojump_clock: Any) -> None:
    alice, bob = pair(look_ups_per_second=1, burst=1)
    refused = 0

    async def renew() -> None:
        nonlocal refused
        ours = await alice.draw_for_update(SESSION, client=True, epoch=1)
        try:
            await bob.look_up_for_update(wire(ours.psk), SESSION, client=False, epoch=1)
        except KeySourceUnavailable:
            refused += 1

    async with trio.open_nursery() as nursery:
        for _ in range(60):
            nursery.start_soon(renew)
    assert 35 <= refused <= 45
    assert bob.counters.limited == refused


async def test_the_stock_in_bytes() -> None:
    alice, _ = pair()
    before = await alice.stock_for_pads(SESSION)
    await alice.draw_for_pad(SESSION)
    assert before is not None
    assert await alice.stock_for_pads(SESSION) == before - 32
    assert isinstance(alice._peers[0].source, InProcessSource)


class SlowItself(InProcessSource):
    """A source with a time limit of its own, which it raises at once."""

    async def _time_out(self, *_: Any) -> Any:
        raise TimeoutError

    get_key = get_key_with_id = status = _time_out


@pytest.mark.parametrize("run", [asyncio.run, lambda main: trio.run(lambda: main)])
@pytest.mark.parametrize(
    "ask",
    [
        lambda source, _: source.offer(),
        lambda source, _: source.draw_for_update(SESSION, client=True, epoch=1),
        lambda source, _: source.draw_for_pad(SESSION),
        lambda source, _: source.stock_for_updates(SESSION),
        lambda source, _: source.stock_for_pads(SESSION),
        lambda source, psk: source.look_up((wire(psk),)),
    ],
)
def test_a_time_limit_of_the_source_is_not_told_as_ours(
    ask: Callable[[QkdPskSource, Any], Any], run: Callable[[Any], None]
) -> None:
    """Nobody waited for 5 s."""

    async def main() -> None:
        alice, bob = in_process_pair("alice", "bob")
        psk = await QkdPskSource(alice).offer()
        bob.__class__ = SlowItself
        with pytest.raises(KeySourceUnavailable, match=r"its time limit or ours, 5 s\): "):
            await ask(QkdPskSource(bob), psk)

    run(main())
