"""Bob's steps of Cascade for numba; :mod:`hybridkex.link.cascade` describes the data.

The functions are those of :mod:`hybridkex.link.cascade_arrays`, with the same results.
"""

from typing import Any

import numpy as np

from hybridkex.link.compiled import compiled


@compiled
def learn(differs: Any, known: Any, active: Any, nodes: Any, told: Any, room: int) -> Any:
    size = 1 << room
    inner = np.empty(len(nodes), dtype=np.int64)
    leaves = np.empty(len(nodes), dtype=np.int64)
    more, over = 0, 0
    for k in range(len(nodes)):
        at = nodes[k] >> 3
        lane = nodes[k] & 7
        mask = np.uint8(1 << lane)
        active[at] &= ~mask
        inside = at & (2 * size - 1)
        left = at + inside
        wrong = (differs[left] >> lane & 1) ^ told[k]
        if wrong:
            differs[left] |= mask
            differs[left + 1] &= ~mask
            child = left
        else:
            differs[left] &= ~mask
            differs[left + 1] |= mask
            child = left + 1
        known[left] |= mask
        known[left + 1] |= mask
        if 2 * inside < size:
            active[child] |= mask
            inner[more] = child << 3 | lane
            more += 1
        else:
            leaves[over] = child << 3 | lane
            over += 1
    return inner[:more], leaves[:over]


@compiled
def settle(  # noqa: C901, PLR0913  # compiled: arrays and numbers, and no calls
    differs: Any,
    known: Any,
    active: Any,
    nodes: Any,
    leaves: Any,
    key: Any,
    orders: Any,
    places: Any,
    heights: Any,
    passes: int,
    room: int,
    corrected: Any,
) -> Any:
    size = 1 << room
    bundles = (len(differs) >> (room + 1)) // len(heights)
    while len(leaves):
        bits = np.empty(len(leaves), dtype=np.int64)
        count = 0
        for k in range(len(leaves)):
            at = leaves[k] >> 3
            lane = leaves[k] & 7
            tree = at >> (room + 1)
            number = tree // bundles
            bit = ((tree - number * bundles) << room) + orders[number, at & (size - 1)]
            mask = np.uint8(1 << lane)
            if not differs[at] & mask:  # corrected a moment ago, as a leaf of another pass
                continue
            if corrected[bit] & mask:
                return nodes, False
            corrected[bit] |= mask
            bits[count] = bit << 3 | lane
            count += 1
            key[bit] ^= mask
            bundle = bit >> room
            for number in range(passes):
                tree = (number * bundles + bundle) << (room + 1)
                node = size + places[number, bit - (bundle << room)]
                for _ in range(heights[number] + 1):
                    differs[tree + node] ^= mask
                    node >>= 1
        more = 0
        for k in range(len(nodes)):
            at = nodes[k] >> 3
            mask = np.uint8(1 << (nodes[k] & 7))
            if differs[at] & mask:
                nodes[more] = nodes[k]
                more += 1
            else:
                active[at] &= ~mask
        result = np.empty(more + passes * count, dtype=np.int64)
        result[:more] = nodes[:more]
        leaves = np.empty(passes * count, dtype=np.int64)
        over = 0
        for number in range(passes):
            for k in range(count):
                at = bits[k] >> 3
                lane = bits[k] & 7
                mask = np.uint8(1 << lane)
                bundle = at >> room
                tree = (number * bundles + bundle) << (room + 1)
                node = size + places[number, at - (bundle << room)]
                found = False
                for _ in range(heights[number] + 1):
                    if differs[tree + node] & known[tree + node] & mask:
                        found = True
                        break
                    node >>= 1
                if not found:
                    continue
                while node < size and known[tree + 2 * node] & mask:
                    node *= 2
                    if not differs[tree + node] & mask:
                        node += 1
                if node >= size:
                    leaves[over] = (tree + node) << 3 | lane
                    over += 1
                elif not active[tree + node] & mask:
                    active[tree + node] |= mask
                    result[more] = (tree + node) << 3 | lane
                    more += 1
        nodes = result[:more]
        leaves = leaves[:over]
    return nodes, True
