"""The inner loops of Cascade in numpy; :mod:`hybridkex.link.cascade` says what they do.

:mod:`hybridkex.link.cascade_loops` has the same functions, with the same results, for numba.
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray

__all__ = ["answer", "correct", "descend", "learn", "roots"]

Bits = NDArray[np.uint8]
Nodes = NDArray[np.int64]
Orders = NDArray[np.integer]

DIFFERS: Final = np.uint8(1)
KNOWN: Final = np.uint8(2)
WRONG: Final = np.uint8(3)


def roots(key: Bits, order: Orders, room: int, height: int, blocks: int) -> Bits:
    """The parity of each block of a pass."""
    by_frame = key.reshape(-1, 1 << room)
    used = order[: blocks << height]
    found = np.empty((len(by_frame), blocks), dtype=np.uint8)
    for number, bits in enumerate(by_frame):
        found[number] = np.bitwise_xor.reduce(bits[used].reshape(blocks, -1), axis=1)
    return found.reshape(-1)


def _plant(
    trees: Bits,
    nodes: Nodes,
    key: Bits,
    orders: Orders,
    heights: Nodes,
    span: int,
    room: int,
) -> None:
    """Fill in the parities of the blocks of these nodes, but for the root, where not yet done."""
    width = np.int64(2) << heights[nodes >> span]
    start = nodes - nodes % width
    bare = trees[start + width - 1] == 0  # the slot behind the root says whether it is done
    if not bare.any():
        return
    blocks = np.unique(start[bare])
    of_pass = blocks >> span
    for number in np.unique(of_pass):
        height = int(heights[number])
        size = 1 << height
        forest = trees[number << span : (number + 1) << span].reshape(-1, 2 * size)
        row = (blocks[of_pass == number] - (number << span)) >> (height + 1)
        frame, block = row >> (room - height), row & ((1 << (room - height)) - 1)
        bits = orders[number].reshape(-1, size)[block] + (frame << room)[:, None]
        made = np.empty((len(row), 2 * size), dtype=np.uint8)
        np.take(key, bits, out=made[:, :size], mode="clip")
        offset = 0
        for _ in range(height - 1):
            size >>= 1
            low, high = made[:, offset : offset + size], made[:, offset + size : offset + 2 * size]
            offset += 2 * size
            np.bitwise_xor(low, high, out=made[:, offset : offset + size])
        made[:, -2] = forest[row, -2]
        made[:, -1] = 1
        forest[row] = made


def answer(
    trees: Bits,
    requested: NDArray[np.uint32],
    end: int,
    key: Bits,
    orders: Orders,
    heights: Nodes,
    span: int,
    room: int,
) -> Bits:
    """Alice's parities of nodes below roots and before ``end``; none if there are others."""
    nodes = requested.astype(np.int64)
    if len(nodes) == 0 or int(nodes.max()) >= end:
        return np.empty(0, dtype=np.uint8)
    width = np.int64(2) << heights[nodes >> span]
    if (nodes % width >= width - 2).any():
        return np.empty(0, dtype=np.uint8)
    _plant(trees, nodes, key, orders, heights, span, room)
    found: Bits = trees[nodes]
    return found


def descend(
    flags: Bits,
    active: Nodes,
    key: Bits,
    orders: Orders,
    heights: Nodes,
    span: int,
    room: int,
) -> tuple[Nodes, Nodes, Nodes]:
    """Walk down from nodes that hold a wrong bit, as far as parities are known.

    Returns nodes that hold a wrong bit and whose children are unknown, the sizes of their levels,
    and wrong bits that were reached.
    """
    active = active[flags[active] & WRONG == WRONG]
    _plant(flags, active, key, orders, heights, span, room)
    width = np.int64(2) << heights[active >> span]
    inside = active % width
    # Levels of size 2^h, 2^(h-1), ... follow each other, so that of size s begins at 2^(h+1) - 2 s.
    rest = width - inside - 1
    size = np.int64(1) << np.floor(np.log2(rest)).astype(np.int64)
    while True:
        inner = np.flatnonzero(2 * size < width)
        left = active[inner] - 2 * size[inner]
        known = flags[left]
        move = known & KNOWN != 0
        if not move.any():
            break
        inner, left, known = inner[move], left[move], known[move]
        active[inner] = np.where(known & WRONG == WRONG, left, left + size[inner])
        size[inner] *= 2
    first = np.sort(np.unique(active, return_index=True)[1])
    active, size, width = active[first], size[first], width[first]
    bottom = 2 * size >= width
    return active[~bottom], size[~bottom], active[bottom]


def learn(
    flags: Bits, active: Nodes, size: Nodes, parities: Bits, heights: Nodes, span: int
) -> tuple[Nodes, Nodes]:
    """Take in Alice's parities of the left children; the nodes to go on from, and wrong bits."""
    left = active - 2 * size
    right = left + size
    told = ((flags[left] ^ parities) & DIFFERS) | KNOWN
    flags[left] = told
    # The node differs, so its other child differs if and only if this one does not.
    flags[right] = told ^ DIFFERS
    child = np.where(told == WRONG, left, right)
    bottom = 4 * size >= np.int64(2) << heights[active >> span]
    return child[~bottom], child[bottom]


def correct(
    flags: Bits,
    leaves: Nodes,
    passes: int,
    key: Bits,
    orders: Orders,
    places: Orders,
    heights: Nodes,
    span: int,
    room: int,
) -> tuple[Nodes, Nodes]:
    """Correct the bits at these leaves.

    Returns the bits of the key, and nodes that now certainly hold a wrong bit.
    """
    number = leaves >> span
    width = np.int64(2) << heights[number]
    inside = leaves - (number << span)
    place = (inside // width) * (width // 2) + inside % width
    start = place >> room << room
    bits = start + orders[number, place - start]
    bits = bits[np.sort(np.unique(bits, return_index=True)[1])]
    key[bits] ^= 1
    start = bits >> room << room
    candidates = []
    for one in range(passes):
        height = int(heights[one])
        place = start + places[one][bits - start]
        block = (one << span) + (place >> height << (height + 1))
        root = block + (2 << height) - 2
        above = np.empty((height + 1, len(bits)), dtype=np.int64)
        low = place & ((1 << height) - 1)
        offset, size = 0, 1 << height
        for level in range(height + 1):
            above[level] = block + offset + (low & (size - 1))
            offset += size
            size >>= 1
        bare = flags[root + 1] == 0
        above[:, bare] = root[bare]
        flips = above[:, ~bare].ravel()
        np.bitwise_xor.at(flags, flips, DIFFERS)
        np.bitwise_xor.at(flags, root[bare], DIFFERS)
        hits = flags[above] & WRONG == WRONG
        lowest = hits.argmax(axis=0)
        which = np.flatnonzero(hits.any(axis=0))
        candidates.append(above[lowest[which], which])
    return bits, np.concatenate(candidates)
