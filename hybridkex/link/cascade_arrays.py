"""Bob's steps of Cascade in numpy; :mod:`hybridkex.link.cascade` describes the data.

:mod:`hybridkex.link.cascade_loops` has the same functions for numba, with the same results.
"""

import numpy as np
from numpy.typing import NDArray

Bits = NDArray[np.uint8]
Nodes = NDArray[np.int64]
Orders = NDArray[np.int32]


def _split(nodes: Nodes) -> tuple[Nodes, Bits]:
    """The bytes of the forest that these nodes stand in, and their masks."""
    return nodes >> 3, np.left_shift(np.uint8(1), (nodes & 7).astype(np.uint8))


def _first(nodes: Nodes) -> Nodes:
    """Without duplicates, in the order in which they first occur."""
    _, first = np.unique(nodes, return_index=True)
    return nodes[np.sort(first)]


def learn(
    differs: Bits, known: Bits, active: Bits, nodes: Nodes, told: Bits, room: int
) -> tuple[Nodes, Nodes]:
    """Enter Alice's parities of the left children of ``nodes``.

    Returns the children that differ: first those that are not leaves, then the leaves.
    """
    at, mask = _split(nodes)
    np.bitwise_xor.at(active, at, mask)
    size = 1 << room
    inside = at & (2 * size - 1)
    left = at + inside
    own_left, own_right = differs[left] & mask, differs[left + 1] & mask
    wrong = own_left ^ (told * mask)  # the left child differs
    np.bitwise_xor.at(differs, left, wrong ^ own_left)
    # The node differs, so its right child differs if and only if the left one does not.
    np.bitwise_xor.at(differs, left + 1, wrong ^ mask ^ own_right)
    np.bitwise_or.at(known, left, mask)
    np.bitwise_or.at(known, left + 1, mask)
    child = nodes + (inside << 3) + ((wrong == 0).astype(np.int64) << 3)
    leaf = 2 * inside >= size
    inner = child[~leaf]
    np.bitwise_or.at(active, inner >> 3, mask[~leaf])
    return inner, child[leaf]


def settle(  # noqa: PLR0913  # as cascade_loops.settle
    differs: Bits,
    known: Bits,
    active: Bits,
    nodes: Nodes,
    leaves: Nodes,
    key: Bits,
    orders: Orders,
    places: Orders,
    heights: Nodes,
    passes: int,
    room: int,
    corrected: Bits,
) -> tuple[Nodes, bool]:
    """Correct the bits at ``leaves``, and those that turn out to be wrong because of it.

    Returns the nodes to ask below, and whether it went on to the end: it stops at a bit that is in
    ``corrected`` already, which only false parities lead to.
    """
    trees = len(differs) >> (room + 1)
    bundles = trees // len(heights)
    size = np.int64(1) << room
    # A row for each level of each pass, from the leaf up to the root.
    levels = np.concatenate([np.arange(height + 1) for height in heights[:passes]])[:, None]
    starts = np.cumsum(np.append(0, heights[: passes - 1] + 1))
    of_row = np.repeat(np.arange(passes), heights[:passes] + 1)
    while len(leaves):
        at, lane = leaves >> 3, leaves & 7
        tree, place = at >> (room + 1), at & (size - 1)
        bundle = tree % bundles
        bits = _first(((bundle << room) + orders[tree // bundles, place]) << 3 | lane)
        at, mask = _split(bits)
        if (corrected[at] & mask).any():
            return nodes, False
        np.bitwise_or.at(corrected, at, mask)
        np.bitwise_xor.at(key, at, mask)
        row = places[:passes, at & (size - 1)] + size
        row += (np.arange(passes)[:, None] * bundles + (at >> room)) << (room + 1)
        above = (row & (2 * size - 1))[of_row] >> levels
        above += (row & -2 * size)[of_row]
        masks = np.broadcast_to(mask, above.shape)
        np.bitwise_xor.at(differs, above.ravel(), masks.ravel())
        hits = differs[above] & known[above] & masks
        level = np.where(hits, levels, room + 1)
        lowest = np.minimum.reduceat(level, starts, axis=0)
        number, which = np.nonzero(lowest <= room)
        found = above[starts[number] + lowest[number, which], which]
        nodes = _still(differs, active, nodes)
        found, leaves = _descend(differs, known, found << 3 | (bits[which] & 7), room)
        at, mask = _split(found)
        found = _first(found[active[at] & mask == 0])
        at, mask = _split(found)
        np.bitwise_or.at(active, at, mask)
        nodes = np.concatenate([nodes, found])
    return nodes, True


def _still(differs: Bits, active: Bits, nodes: Nodes) -> Nodes:
    """The nodes that still differ; the others are no longer active."""
    at, mask = _split(nodes)
    still = np.flatnonzero(differs[at] & mask)
    over = np.flatnonzero(differs[at] & mask == 0)
    np.bitwise_xor.at(active, at[over], mask[over])
    return nodes[still]


def _descend(differs: Bits, known: Bits, nodes: Nodes, room: int) -> tuple[Nodes, Nodes]:
    """Descend from nodes that differ to such nodes without a known child, and to leaves."""
    inner, size = nodes.copy(), 1 << room
    moving = np.arange(len(nodes))
    while len(moving):
        at, mask = _split(inner[moving])
        inside = at & (2 * size - 1)
        left = at + inside
        go = (inside < size) & (known[np.minimum(left, len(known) - 1)] & mask != 0)
        moving, left, mask = moving[go], left[go], mask[go]
        right = differs[left] & mask == 0
        inner[moving] = (left + right) << 3 | (inner[moving] & 7)
    leaf = (inner >> 3) & (2 * size - 1) >= size
    return inner[~leaf], inner[leaf]
