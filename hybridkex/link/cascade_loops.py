"""The inner loops of Cascade for numba; :mod:`hybridkex.link.cascade` says what they do.

The functions are those of :mod:`hybridkex.link.cascade_arrays`, with the same results.
"""

from collections.abc import Callable
from typing import Any, Final, TypeVar, cast

import numba
import numpy as np

__all__ = ["answer", "correct", "descend", "learn", "roots"]

Function = TypeVar("Function", bound=Callable[..., Any])

DIFFERS: Final = 1
KNOWN: Final = 2
WRONG: Final = 3
MARK: Final = 4
"""Set on a node while duplicates are looked for."""


def _compiled(function: Function) -> Function:
    try:
        return cast(Function, numba.njit(cache=True, nogil=True)(function))
    except RuntimeError:  # no folder where compiled code could be kept
        return cast(Function, numba.njit(nogil=True)(function))


@_compiled
def roots(key: Any, order: Any, room: int, height: int, blocks: int) -> Any:
    size = 1 << height
    frames = len(key) >> room
    found = np.empty(frames * blocks, dtype=np.uint8)
    for f in range(frames):
        bits = key[f << room : (f + 1) << room]
        for b in range(blocks):
            part = order[b * size : (b + 1) * size]
            one, two = np.uint8(0), np.uint8(0)
            for i in range(0, size, 2):
                one ^= bits[part[i]]
                two ^= bits[part[i + 1]]
            found[f * blocks + b] = one ^ two
    return found


@_compiled
def _plant(
    trees: Any, block: int, place: int, key: Any, order: Any, height: int, room: int
) -> None:
    size = 1 << height
    start = place >> room << room
    bits = key[start : start + (1 << room)]
    some = order[place - start : place - start + size]
    tree = trees[block : block + 2 * size]
    tree[2 * size - 1] = 1  # the slot behind the root says that this is done
    for i in range(size):
        tree[i] = bits[some[i]]
    at = 0
    for _ in range(height - 1):
        half = size >> 1
        for i in range(half):
            tree[at + size + i] = tree[at + i] ^ tree[at + half + i]
        at += size
        size = half


@_compiled
def answer(
    trees: Any,
    nodes: Any,
    end: int,
    key: Any,
    orders: Any,
    heights: Any,
    span: int,
    room: int,
) -> Any:
    found = np.empty(len(nodes), dtype=np.uint8)
    for k in range(len(nodes)):
        node = np.int64(nodes[k])
        number = node >> span
        if node >= end:
            return found[:0]
        height = heights[number]
        block = node >> (height + 1) << (height + 1)
        root = block + (2 << height) - 2
        if node >= root:
            return found[:0]
        if trees[root + 1] == 0:
            place = (block - (number << span)) >> 1
            _plant(trees, block, place, key, orders[number], height, room)
        found[k] = trees[node]
    return found


@_compiled
def descend(
    flags: Any,
    active: Any,
    key: Any,
    orders: Any,
    heights: Any,
    span: int,
    room: int,
) -> Any:
    count = len(active)
    going = np.empty(count, dtype=np.int64)
    sizes = np.empty(count, dtype=np.int64)
    ended = np.empty(count, dtype=np.int64)
    more, over = 0, 0
    for k in range(count):
        node = active[k]
        if flags[node] & WRONG != WRONG:
            continue
        number = node >> span
        height = heights[number]
        block = node >> (height + 1) << (height + 1)
        width = 2 << height
        rest = width - (node - block) - 1
        size = 1
        while 2 * size <= rest:
            size *= 2
        if flags[block + (2 << height) - 1] == 0:
            place = (block - (number << span)) >> 1
            _plant(flags, block, place, key, orders[number], height, room)
        while 2 * size < width:
            left = node - 2 * size
            if flags[left] & KNOWN == 0:
                break
            node = left if flags[left] & WRONG == WRONG else left + size
            size *= 2
        if flags[node] & MARK:
            continue
        flags[node] |= MARK
        if 2 * size < width:
            going[more] = node
            sizes[more] = size
            more += 1
        else:
            ended[over] = node
            over += 1
    for k in range(more):
        flags[going[k]] &= WRONG
    for k in range(over):
        flags[ended[k]] &= WRONG
    return going[:more], sizes[:more], ended[:over]


@_compiled
def learn(flags: Any, active: Any, size: Any, parities: Any, heights: Any, span: int) -> Any:
    count = len(active)
    going = np.empty(count, dtype=np.int64)
    ended = np.empty(count, dtype=np.int64)
    more, over = 0, 0
    for k in range(count):
        left = active[k] - 2 * size[k]
        right = left + size[k]
        told = ((flags[left] ^ parities[k]) & DIFFERS) | KNOWN
        flags[left] = told
        flags[right] = told ^ DIFFERS
        child = left if told == WRONG else right
        if 4 * size[k] < 2 << heights[active[k] >> span]:
            going[more] = child
            more += 1
        else:
            ended[over] = child
            over += 1
    return going[:more], ended[:over]


@_compiled
def correct(
    flags: Any,
    leaves: Any,
    passes: int,
    key: Any,
    orders: Any,
    places: Any,
    heights: Any,
    span: int,
    room: int,
) -> Any:
    bits = np.empty(len(leaves), dtype=np.int64)
    count = 0
    for k in range(len(leaves)):
        number = leaves[k] >> span
        height = heights[number]
        inside = leaves[k] - (number << span)
        place = (inside >> (height + 1) << height) + (inside & ((2 << height) - 1))
        start = place >> room << room
        bit = start + orders[number, place - start]
        if key[bit] & MARK:
            continue
        key[bit] |= MARK
        bits[count] = bit
        count += 1
    for k in range(count):
        key[bits[k]] = (key[bits[k]] ^ 1) & 1
    candidates = np.empty(passes * count, dtype=np.int64)
    found = 0
    for number in range(passes):
        height = heights[number]
        for turn in range(2):  # first all flips, then what they leave
            for k in range(count):
                start = bits[k] >> room << room
                place = start + places[number, bits[k] - start]
                block = (number << span) + (place >> height << (height + 1))
                node = block + (2 << height) - 2
                if flags[node + 1] == 0:
                    if turn == 0:
                        flags[node] ^= DIFFERS
                    elif flags[node] & WRONG == WRONG:
                        candidates[found] = node
                        found += 1
                    continue
                size = 1 << height
                low = place & (size - 1)
                while size > 0:
                    node = block + (low & (size - 1))
                    if turn == 0:
                        flags[node] ^= DIFFERS
                    elif flags[node] & WRONG == WRONG:
                        candidates[found] = node
                        found += 1
                        break
                    block += size
                    size >>= 1
    return bits[:count], candidates[:found]
