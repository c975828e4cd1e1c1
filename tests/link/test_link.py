"""The protocol as a whole: keys, aborts, attacks, authentication."""

import dataclasses
import functools
from collections.abc import Sequence

import pytest
import trio

from hybridkex.errors import BlockAborted, ConfigError, LinkAuthenticationError, LinkError
from hybridkex.qkd.link.optimise import tuned
from hybridkex.qkd.link.party import Block
from hybridkex.qkd.link.presets import PRESETS, Preset
from hybridkex.qkd.link.settings import LinkSettings
from hybridkex.qkd.link.simulated import SimulatedLink


@functools.cache
def best(name: str, distance: float, block_bits: int) -> Preset:
    return tuned(PRESETS[name].at(distance), block_bits)


def settings(
    name: str = "lim2014", distance: float = 10, block_bits: int = 200_000
) -> LinkSettings:
    return LinkSettings(preset=best(name, distance, block_bits), block_bits=block_bits)


async def blocks(link: SimulatedLink, count: int) -> list[tuple[Block, Block]]:
    async with link.open():
        return [await link.block() for _ in range(count)]


def keys(made: Sequence[Block]) -> list[tuple[str, bytes]]:
    return [(str(key.key_id), key.key.reveal()) for block in made for key in block.keys]


@pytest.mark.parametrize("bootstrap", ["psk", "ecdsa", "ml-dsa"])
@pytest.mark.parametrize("name", ["lim2014", "rusca2018"])
async def test_both_ends_have_the_same_keys(name: str, bootstrap: str) -> None:
    made = await blocks(SimulatedLink(settings(name), bootstrap=bootstrap, seed=1), 2)
    for alice, bob in made:
        assert dataclasses.replace(alice, keys=(), epsilon=0) == dataclasses.replace(
            bob, keys=(), epsilon=0
        )
        assert alice.epsilon == pytest.approx(bob.epsilon)
        assert keys([alice]) == keys([bob])
        assert len(alice.keys) == (alice.secret_bits - alice.to_ledger) // 256 > 10
    names = [block.authentication for block, _ in made]
    assert names == ["wegman-carter" if bootstrap == "psk" else "signatures", "wegman-carter"]
    ids = [key_id for key_id, _ in keys([alice for alice, _ in made])]
    assert len(set(ids)) == len(ids)
