"""A simulated QKD link whose classical channel is tapped, and the keys that it makes."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Final

import trio
from cryptography.hazmat.primitives.asymmetric import ec

from hybridkex.demos.rndl.now.escrow import SIGNATURE, Escrow
from hybridkex.demos.rndl.now.tap import wire_tap
from hybridkex.errors import BlockAborted, LinkError
from hybridkex.link.authentication import Signatures
from hybridkex.link.party import Alice, Block, Bob
from hybridkex.link.presets import preset
from hybridkex.link.quantum import OpticalLink
from hybridkex.link.settings import LinkSettings
from hybridkex.qkd.pool import FilePool, PoolNames
from hybridkex.qkd.source import KeyPart, KeySource, QkdKey
from hybridkex.qkd.store import write_key_file

_DISTANCE_KM: Final = 10.0
_BLOCK_BITS: Final = 100_000
_KEY_BASIS: Final = 0.5
"""A test basis this large pays off in a block this small."""
_ATTEMPTS: Final = 4
"""Blocks to try; an aborted block, which statistics allow, is followed by the next."""

_ALICE: Final = PoolNames(sae="alice", kme="link-a", peer_sae="bob", peer_kme="link-b")
_BOB: Final = PoolNames(sae="bob", kme="link-b", peer_sae="alice", peer_kme="link-a")


@asynccontextmanager
async def link_sources(
    folder: Path, capture: Path, escrow: Escrow
) -> AsyncIterator[tuple[KeySource, KeySource]]:
    """Run a link for one block of keys and put them into a pool on either side.

    Args:
        folder: an empty one, for the pools.
        capture: where the tap on the classical channel records.
        escrow: records the keys with which the parties sign the first block.

    Raises:
        LinkError: the link made no keys.
    """
    alice, bob = await _one_block(capture, escrow)
    async with AsyncExitStack() as stack:
        pools = []
        for names, block in ((_ALICE, alice), (_BOB, bob)):
            key_file = folder / f"{names.sae}.key"
            write_key_file(key_file)
            pool = FilePool.open(folder / f"{names.sae}.db", key_file=key_file, names=names)
            await stack.enter_async_context(pool)
            await pool.add(_keys(block))
            pools.append(pool)
        yield pools[0], pools[1]


def _keys(block: Block) -> list[QkdKey]:
    """Put the block's keys into pools; Alice draws them, Bob looks them up."""
    return [
        QkdKey(
            name=(KeyPart(_ALICE.kme, _BOB.kme, item.key_id),),
            master_sae=_ALICE.sae,
            slave_sae=_BOB.sae,
            key=item.key,
        )
        for item in block.keys
    ]


async def _one_block(capture: Path, escrow: Escrow) -> tuple[Block, Block]:
    """Alice's and Bob's results of a block, over TCP through a tap."""
    there = preset("rusca2018").at(_DISTANCE_KM)
    transmitter = replace(there.transmitter, key_basis_probability=_KEY_BASIS)
    settings = LinkSettings(preset=replace(there, transmitter=transmitter), block_bits=_BLOCK_BITS)
    light = OpticalLink(there.channel, transmitter)
    keys = [ec.generate_private_key(ec.SECP256R1()) for _ in range(2)]
    for key in keys:
        escrow.keep(SIGNATURE, key)
    blocks: dict[str, Block] = {}

    async def run(name: str, party: Alice | Bob) -> None:
        for _ in range(_ATTEMPTS):
            try:
                block = await party.block()
            except BlockAborted:
                continue
            if block.keys:
                blocks[name] = block
                return

    async def serve_bob(stream: trio.SocketStream) -> None:
        async with stream:
            ours = Signatures(keys[1], keys[0].public_key())
            await run("bob", Bob(stream, settings, light, bootstrap=ours))

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(partial(trio.serve_tcp, serve_bob, 0, host="127.0.0.1"))
        where = listeners[0].socket.getsockname()
        tap = wire_tap(capture, where)
        async with tap as address, await trio.open_tcp_stream(*address) as stream:
            ours = Signatures(keys[0], keys[1].public_key())
            await run("alice", Alice(stream, settings, light.record, bootstrap=ours))
            await stream.receive_some()  # Bob closes the connection once it has its keys.
        nursery.cancel_scope.cancel()
    if len(blocks) != 2:
        raise LinkError("the simulated link made no keys")
    return blocks["alice"], blocks["bob"]
