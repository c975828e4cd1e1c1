"""Cascade: find and correct Bob's wrong bits by comparing parities.

G. Brassard, L. Salvail, "Secret-key reconciliation by public discussion", EUROCRYPT '93, with the
improvements that J. Martinez-Mateo, C. Pacher, M. Peev, A. Ciurana, V. Martin, "Demystifying the
information reconciliation protocol Cascade", arXiv:1407.3257, found to matter: blocks of powers of
two, a large second pass, and the use of every parity that was ever disclosed.

A key is cut into *frames* of one length, small enough for the processor's cache. Each pass puts the
bits of every frame in another order, fixed and public, and cuts them into blocks. Above the bits of
a block stands a binary tree of parities, in ``2^(h+1)`` bytes::

    bits     b0 b1 b2 b3 b4 b5 b6 b7          node i of a level of size 2s and node i + s
    level 1  b0^b4 b1^b5 b2^b6 b3^b7          are the children of node i of the next level,
    ...                                       whose size is s
    root     of all, and one byte that says whether the tree below the root is filled in

A tree is filled in when something below its root is asked for, which never happens to most blocks
of the later passes. The trees of all passes and frames are one array, and a *node* is an index into
it.

Alice does nothing but look up parities. Bob keeps two flags for each node: ``DIFFERS``, his own
parity until Alice's is known and from then on whether the two differ, and ``KNOWN``. A node with
both certainly holds a wrong bit. In each round he asks for one parity below every such node, in all
frames at once, corrects the bits that he has reached, and finds the lowest node that now certainly
holds another wrong bit above each of them, in every pass so far. When few are left, the next pass
begins within the same round, so that rounds stay full.

What is disclosed is counted: one bit for each parity that Alice tells. A parity that follows from
two others is never asked for. Bob's requests follow from Alice's parities and his own of the same
nodes, so they disclose no more than as many bits of his (:class:`Correction`).

The inner loops are in numpy (:mod:`~hybridkex.link.cascade_arrays`) or, where numba is installed,
compiled (:mod:`~hybridkex.link.cascade_loops`). Both send the same bytes.
"""

import functools
import importlib
import itertools
import math
from collections.abc import Generator
from dataclasses import dataclass
from types import ModuleType
from typing import ClassVar, Final

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from numpy.typing import NDArray

from hybridkex.link.reconciliation import Correction, ReconciliationError

__all__ = ["Cascade", "Plan"]

Bits = NDArray[np.uint8]
Nodes = NDArray[np.int64]
Orders = NDArray[np.integer]

DIFFERS: Final = np.uint8(1)
KNOWN: Final = np.uint8(2)
WRONG: Final = DIFFERS | KNOWN

LARGE_HEIGHT: Final = 12
"""Blocks of the later passes have up to 4096 bits."""
MISSED_PAIRS: Final = 1e-3
"""Passes are added until so many pairs of wrong bits, on average, share a block in all of them; the
verification finds what is left, at the price of the block."""
MAX_PASSES: Final = 16
FIRST_BLOCK: Final = 0.73
"""Expected wrong bits in a block of the first pass, as in the first Cascade; then rounded."""
SECOND_BLOCK: Final = 5.0
"""The same for the second pass. Larger blocks disclose no less and take many more rounds: each
correction then brings about another one, in a chain that hardly ends."""
FEW: Final = 0.001
"""The next pass begins when the searches are fewer than this share of the wrong bits: more makes
fewer rounds and a higher leak."""

FRAME: Final = 1 << 18
"""Frames have at most so many bits, so that the trees stay in the cache."""
GROUP: Final = 1 << 24
"""So many bits are corrected at once, which bounds the memory."""


def _loops() -> ModuleType:
    try:
        return importlib.import_module("hybridkex.link.cascade_loops")
    except ImportError:  # numba is an extra
        return importlib.import_module("hybridkex.link.cascade_arrays")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What both sides must agree on before they begin; all of it is public."""

    length: int
    frame: int
    """Bits of a frame; the last may have fewer."""
    frames: int
    heights: tuple[int, ...]
    """Of the trees of each pass; blocks have ``2^height`` bits."""
    few: int
    """With so many searches or fewer the next pass begins."""

    @classmethod
    def for_error_rate(cls, length: int, error_rate: float) -> "Plan":
        """Block sizes for an expected error rate and what MISSED_PAIRS asks for."""
        rate = min(max(error_rate, 1e-4), 0.25)
        frames = -(-length // FRAME)
        frame = -(-length // frames)
        # With fewer than eight blocks a pass would hardly tear pairs apart.
        top = max(1, (frame - 1).bit_length() - 3)
        first = max(1, round(math.log2(FIRST_BLOCK / rate)))
        second = min(LARGE_HEIGHT, round(math.log2(SECOND_BLOCK / rate)))
        heights = [min(first, top), min(second, top), min(LARGE_HEIGHT, top)]
        pairs = frames * (frame * rate) ** 2 / 2.0
        for height in heights:
            pairs *= min(1.0, (1 << height) / frame)
        while pairs > MISSED_PAIRS and len(heights) < MAX_PASSES:
            heights.append(min(LARGE_HEIGHT, top))
            pairs *= min(1.0, (1 << heights[-1]) / frame)
        return cls(
            length=length,
            frame=frame,
            frames=frames,
            heights=tuple(heights),
            few=int(FEW * rate * length),
        )

    @property
    def room(self) -> int:
        """The logarithm of the room for a frame, whose places beyond its length are zero."""
        return max((self.frame - 1).bit_length(), *self.heights)

    @property
    def span(self) -> int:
        """The logarithm of the room for the nodes of one pass."""
        return self.room + 1 + (self.frames - 1).bit_length()

    def blocks(self, number: int) -> int:
        """Blocks of a frame in one pass, without those of places that are zero."""
        return -(-self.frame >> self.heights[number])

    def roots(self, number: int) -> Nodes:
        """The roots of one pass."""
        width = 2 << self.heights[number]
        frames = np.arange(self.frames, dtype=np.int64)[:, None] << (self.room + 1)
        blocks = np.arange(self.blocks(number), dtype=np.int64) * width + width - 2
        return (frames + blocks + (number << self.span)).reshape(-1)

    def pad(self, key: Bits) -> Bits:
        """A key as frames."""
        whole = np.zeros(self.frames * self.frame, dtype=np.uint8)
        whole[: self.length] = key
        padded = np.zeros((self.frames, 1 << self.room), dtype=np.uint8)
        padded[:, : self.frame] = whole.reshape(self.frames, -1)
        return padded.reshape(-1)

    def unpad(self, padded: Bits) -> Bits:
        """The reverse."""
        return padded.reshape(self.frames, -1)[:, : self.frame].reshape(-1)[: self.length]


@functools.lru_cache(maxsize=8)
def _orders(frame: int, room: int, passes: int) -> tuple[Orders, Orders]:
    """Which bit of a frame stands at each place, for each pass, and the reverse.

    Fixed for a length: that Eve knows where parities will be taken tells her nothing that she
    does not hear anyway, and the errors do not know it. Made from a stream cipher, so that both
    sides have the same ones whatever version of numpy they run.
    """
    kind = np.uint16 if room <= 16 else np.uint32
    orders: Orders = np.tile(np.arange(1 << room, dtype=kind), (passes, 1))
    places = orders.copy()
    for number in range(1, passes):
        stream = Cipher(ChaCha20(b"hybridkex: the order of Cascade.", number.to_bytes(16)), None)
        keys = np.frombuffer(stream.encryptor().update(bytes(8 * frame)), dtype="<u8")
        orders[number, :frame] = np.argsort(keys, kind="stable")
        places[number][orders[number]] = np.arange(1 << room, dtype=kind)
    orders.flags.writeable = places.flags.writeable = False
    return orders, places


class _Side:
    """What Alice and Bob have in common: the trees of one group of frames."""

    def __init__(self, plan: Plan, key: Bits, loops: ModuleType) -> None:
        self.plan = plan
        self.key = plan.pad(key)
        self.loops = loops
        self.passes = 0
        self.heights: Final = np.array(plan.heights, dtype=np.int64)
        self.orders, self.places = _orders(plan.frame, plan.room, len(plan.heights))
        # Fresh memory from the system, of which only what is used becomes real.
        self.trees: Final = np.zeros(len(plan.heights) << plan.span, dtype=np.uint8)

    def next_roots(self) -> Bits:
        """Begin a pass: our parities of its blocks."""
        number, plan = self.passes, self.plan
        found: Bits = self.loops.roots(
            self.key, self.orders[number], plan.room, plan.heights[number], plan.blocks(number)
        )
        self.passes += 1
        return found


class _Alice(_Side):
    def answer(self, begins: bool, nodes: NDArray[np.uint32]) -> Bits:
        """The parities. Raises :class:`ReconciliationError` for a request that makes no sense."""
        plan = self.plan
        if begins and self.passes == len(plan.heights):
            raise ReconciliationError("a pass beyond the last was requested")
        if not begins and len(nodes) == 0:
            raise ReconciliationError("an empty request")
        found: Bits = self.loops.answer(
            self.trees,
            nodes,
            self.passes << plan.span,
            self.key,
            self.orders,
            self.heights,
            plan.span,
            plan.room,
        )
        if len(found) != len(nodes):
            raise ReconciliationError("a parity was requested that is known or does not exist")
        return np.concatenate([self.next_roots(), found]) if begins else found


class _Bob(_Side):
    def search(self) -> Generator[tuple[bool, Nodes], Bits, None]:
        """Correct ``self.key``: yields (whether a pass begins, nodes), wants Alice's parities."""
        plan, loops, flags = self.plan, self.loops, self.trees
        budget = 2 * plan.length + 64  # corrections; honest answers never need so many
        active = np.empty(0, dtype=np.int64)
        shape = (self.heights, plan.span)
        while True:
            active, size, leaves = loops.descend(
                flags, active, self.key, self.orders, *shape, plan.room
            )
            begins = self.passes < len(plan.heights) and len(active) <= plan.few
            roots = self.next_roots() if begins else np.empty(0, dtype=np.uint8)
            if begins or len(active):
                told = yield begins, active - 2 * size
                active, more = loops.learn(flags, active, size, told[len(roots) :], *shape)
                leaves = np.concatenate([leaves, more])
            elif len(leaves) == 0:
                return
            if begins:
                nodes = plan.roots(self.passes - 1)
                known = (roots ^ told[: len(roots)]) | KNOWN
                flags[nodes] = known
                active = np.concatenate([active, nodes[known == WRONG]])
            if len(leaves):
                bits, found = loops.correct(
                    flags,
                    leaves,
                    self.passes,
                    self.key,
                    self.orders,
                    self.places,
                    *shape,
                    plan.room,
                )
                budget -= len(bits)
                if budget < 0:
                    raise ReconciliationError("the corrections do not come to an end")
                frame, place = bits >> plan.room, bits & ((1 << plan.room) - 1)
                if (place >= plan.frame).any() or (frame * plan.frame + place >= plan.length).any():
                    raise ReconciliationError("a wrong bit was found in the padding")
                active = np.concatenate([active, found])


def _groups(length: int) -> list[slice]:
    """A key in groups of frames, all about equal."""
    count = max(1, -(-length // GROUP))
    edges = [length * number // count for number in range(count + 1)]
    return [slice(start, end) for start, end in itertools.pairwise(edges)]


MORE: Final = b"\x00"
BEGIN: Final = b"\x01"
NEXT_GROUP: Final = b"\x02"
"""First byte of a request: for nodes; for the roots of the next pass, then nodes; the same in a new
group."""


class _Responder:
    """Alice's side of a whole key."""

    def __init__(self, key: Bits, error_rate: float, loops: ModuleType) -> None:
        self._key = key
        self._rate = error_rate
        self._loops = loops
        self._groups = iter(_groups(len(key)))
        self._alice: _Alice | None = None
        self.disclosed = 0

    @property
    def announced(self) -> int:
        return self.disclosed

    def answer(self, request: bytes) -> bytes:
        kind, rest = request[:1], request[1:]
        if kind not in (MORE, BEGIN, NEXT_GROUP) or len(rest) % 4:
            raise ReconciliationError("a malformed parity request")
        if kind == NEXT_GROUP:
            part = next(self._groups, None)
            if part is None:
                raise ReconciliationError("a group beyond the last was requested")
            key = self._key[part]
            self._alice = _Alice(Plan.for_error_rate(len(key), self._rate), key, self._loops)
        if self._alice is None:
            raise ReconciliationError("a parity request before the first group")
        nodes = np.frombuffer(rest, dtype="<u4")
        found = self._alice.answer(kind != MORE, nodes)
        self.disclosed += len(found)
        if self.disclosed > 2 * len(self._key) + 4096:
            raise ReconciliationError("more parities were requested than the key has bits")
        return np.packbits(found).tobytes()


@dataclass(frozen=True)
class Cascade:
    """See the module. ``compiled``: use numba; ``None``: if it is installed."""

    compiled: bool | None = None

    name: ClassVar[str] = "cascade"

    def _loops(self) -> ModuleType:
        if self.compiled is None:
            return _loops()
        kind = "loops" if self.compiled else "arrays"
        return importlib.import_module(f"hybridkex.link.cascade_{kind}")

    def respond(self, key: Bits, error_rate: float) -> _Responder:
        """Alice's side."""
        return _Responder(key, error_rate, self._loops())

    def correct(self, key: Bits, error_rate: float) -> Generator[bytes, bytes, Correction]:
        """Bob's side."""
        loops, disclosed = self._loops(), 0
        for part in _groups(len(key)):
            plan = Plan.for_error_rate(part.stop - part.start, error_rate)
            bob = _Bob(plan, key[part], loops)
            search, first = bob.search(), True
            try:
                begins, nodes = next(search)
                while True:
                    kind = NEXT_GROUP if first else BEGIN if begins else MORE
                    first = False
                    answer = yield kind + nodes.astype("<u4").tobytes()
                    count = len(nodes)
                    if begins:
                        count += plan.frames * plan.blocks(bob.passes - 1)
                    if len(answer) != -(-count // 8):
                        raise ReconciliationError("an answer has the wrong length")
                    disclosed += count
                    told = np.unpackbits(np.frombuffer(answer, dtype=np.uint8), count=count)
                    begins, nodes = search.send(told)
            except StopIteration:
                key[part] = plan.unpad(bob.key)
                bob.key.fill(0)
        return Correction(disclosed=disclosed, announced=disclosed)
