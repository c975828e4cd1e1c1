"""Cascade: find and correct Bob's wrong bits by comparing parities.

G. Brassard, L. Salvail, "Secret-key reconciliation by public discussion", EUROCRYPT '93, with the
improvements that J. Martinez-Mateo, C. Pacher, M. Peev, A. Ciurana, V. Martin, "Demystifying the
information reconciliation protocol Cascade", arXiv:1407.3257, found to matter: blocks of powers of
two, a large second pass, and the use of every parity that was ever disclosed.

A key is cut into *frames* of one length. Each pass puts the bits of every frame in another order,
fixed and public, and cuts them into blocks of ``2^h`` bits. Above the bits of a frame stands a
binary tree of parities, of which the lowest ``h`` levels and the roots of the blocks are used. It
is an array of ``2^(room + 1)`` nodes: the bit at place ``i`` is node ``2^room + i``, and nodes
``2 n`` and ``2 n + 1`` are the children of node ``n``.

Frames have the same orders, so eight of them, a *bundle*, are processed at once: each bit of a byte
is the bit, or the parity, at the same place of one frame. The trees of all passes and bundles are
one array of bytes, the *forest*. A *node* of one frame is eight times the index of its byte plus
its *lane*, the number of the bit in the byte.

Alice only looks up parities. Bob keeps two bits for each node: ``known``, and ``differs``, which is
Bob's own parity until Alice's is known, and from then on whether the two differ. A node with both
set contains a wrong bit. The nodes to be searched next are ``active``: in each round Bob requests
the parity of the left child of every active node, in all frames at once. Then Bob corrects the bits
that were reached. Above each of them, in every pass so far, Bob finds the lowest node that now
contains another wrong bit, and below it the lowest one with known children. When few nodes are
active, the next pass begins in the same round, so that rounds stay full.

Each parity that Alice sends counts as one disclosed bit. A parity that follows
from two others is never requested. Bob's requests are determined by Alice's parities and Bob's
parities of the same nodes, so they disclose at most as many bits of Bob's key
(:class:`Correction`).

Bob's steps are in numpy (:mod:`~hybridkex.link.cascade_arrays`) or, where the key is long and numba
is installed, compiled (:mod:`~hybridkex.link.cascade_loops`). Both send the same bytes.
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

from hybridkex.errors import ConfigError
from hybridkex.link.ranges import bit_array, instance, within
from hybridkex.link.reconciliation import Correction, ReconciliationError

Bits = NDArray[np.uint8]
Nodes = NDArray[np.int64]
Orders = NDArray[np.int32]

LARGE_HEIGHT: Final = 12
"""Blocks of the later passes have up to 4096 bits."""
MISSED_PAIRS: Final = 1e-3
"""Passes are added until no more than this number of pairs of wrong bits, on average, share a block
in all of them. If wrong bits are left, the verification finds them and the block is lost."""
MAX_PASSES: Final = 16
FIRST_BLOCK: Final = 0.73
"""Expected wrong bits in a block of the first pass, as in the first Cascade; then rounded."""
SECOND_BLOCK: Final = 40.0
"""In a block of the second pass, the expected wrong bits times its height less 1.2 are at most
this. Larger blocks disclose as little, and take many more rounds, because each correction leads to
another one in a long chain: about five rounds for each unit, as measured from 0.5 to 11 %."""
FEW: Final = (4e-6, 0.001, 0.0015)
"""The next pass begins when the searches are fewer than this share of the bits plus this share of
the wrong bits, and at most the last share of the wrong bits. More searches at that time make fewer
rounds and a higher leak."""

FRAME: Final = 1 << 17
"""The most bits of a frame: the trees of a bundle stay in the processor's cache."""
LANES: Final = 8
"""The most frames of a bundle."""
LEAST_COMPILED: Final = 1 << 17
"""Below this many bits numpy takes 30 ms at most; numba takes 500 to load."""
GROUP: Final = 1 << 24
"""The most bits that are corrected at once. This bounds the memory."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The public parameters that both sides must have before they begin."""

    length: int
    frame: int
    """Bits of a frame; the last may have fewer."""
    lanes: int
    """Frames of a bundle."""
    bundles: int
    heights: tuple[int, ...]
    """Heights of the trees of each pass; blocks have ``2^height`` bits."""
    few: int
    """The next pass begins when there are no more active nodes than this."""

    @classmethod
    def for_error_rate(cls, length: int, error_rate: float) -> "Plan":
        """Block sizes for an expected error rate, and as many passes as MISSED_PAIRS requires."""
        rate = min(max(error_rate, 1e-4), 0.25)
        bundles = -(-length // (LANES * FRAME))
        lanes = -(-length // (bundles * FRAME))
        frames = bundles * lanes
        frame = -(-length // frames)
        # With fewer than eight blocks a pass would hardly tear pairs apart.
        top = max(1, (frame - 1).bit_length() - 3)
        first = max(1, round(math.log2(FIRST_BLOCK / rate)))
        second = LARGE_HEIGHT
        while second > first and (rate * 2**second) * (second - 1.2) > SECOND_BLOCK:
            second -= 1
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
            lanes=lanes,
            bundles=bundles,
            heights=tuple(heights),
            few=int(length * min(FEW[0] + FEW[1] * rate, FEW[2] * rate)),
        )

    @property
    def room(self) -> int:
        """The logarithm of the places of a frame, which are zero beyond its length."""
        return max((self.frame - 1).bit_length(), *self.heights)

    def blocks(self, number: int) -> int:
        """Blocks of a frame in one pass, without those of places that are zero."""
        return -(-self.frame >> self.heights[number])

    def roots(self, number: int) -> slice:
        """The places of the roots of a pass in a tree."""
        first = 1 << (self.room - self.heights[number])
        return slice(first, first + self.blocks(number))

    def slice(self, key: Bits) -> Bits:
        """A key as a byte for each place of each bundle."""
        whole = np.zeros((self.bundles, self.lanes, self.frame), dtype=np.uint8)
        whole.reshape(-1)[: self.length] = key
        whole <<= np.arange(self.lanes, dtype=np.uint8)[:, None]
        sliced = np.zeros((self.bundles, 1 << self.room), dtype=np.uint8)
        np.bitwise_or.reduce(whole, axis=1, out=sliced[:, : self.frame])
        return sliced

    def unslice(self, sliced: Bits) -> Bits:
        """Reverse :meth:`slice`. Raises :class:`ReconciliationError` if the padding is not 0."""
        whole = np.repeat(sliced[:, None, : self.frame], self.lanes, axis=1)
        whole >>= np.arange(self.lanes, dtype=np.uint8)[:, None]
        whole &= 1
        flat: Bits = whole.reshape(-1)
        if flat[self.length :].any() or sliced[:, self.frame :].any():
            raise ReconciliationError("a wrong bit was found in the padding")
        return flat[: self.length]

    def pack(self, bits: Bits) -> Bits:
        """A bit for each root of a pass, lane by lane, as a byte for each root of each bundle."""
        packed: Bits = np.packbits(bits.reshape(-1, self.lanes), axis=1, bitorder="little")
        return packed.reshape(self.bundles, -1)

    def unpack(self, packed: Bits) -> Bits:
        """Reverse :meth:`pack`."""
        lanes = np.unpackbits(packed[..., None], axis=-1, count=self.lanes, bitorder="little")
        flat: Bits = lanes.reshape(-1)
        return flat


@functools.lru_cache(maxsize=64)
def _order(frame: int, room: int, number: int) -> Nodes:
    """The number of the bit of a frame at each place of one pass.

    The order is fixed for each length. Eve may know it, because the requests disclose it anyway,
    and errors do not depend on it. It comes from a stream cipher, so that both sides have the same
    order with any version of numpy.
    """
    order = np.arange(1 << room, dtype=np.int64)
    if number:
        stream = Cipher(ChaCha20(b"hybridkex: the order of Cascade.", number.to_bytes(16)), None)
        keys = np.frombuffer(stream.encryptor().update(bytes(8 * frame)), dtype="<u8")
        order[:frame] = np.argsort(keys, kind="stable")
    order.flags.writeable = False
    return order


@functools.lru_cache(maxsize=8)
def _tables(frame: int, room: int, passes: int) -> tuple[Orders, Orders]:
    """The orders of all passes, and the reverse: the place of each bit."""
    orders: Orders = np.empty((passes, 1 << room), dtype=np.int32)
    places = np.empty_like(orders)
    for number in range(passes):
        orders[number] = _order(frame, room, number)
        places[number][orders[number]] = np.arange(1 << room, dtype=np.int32)
    orders.flags.writeable = places.flags.writeable = False
    return orders, places


class _Side:
    """The base of Alice's and Bob's sides: the forest of one group of frames."""

    def __init__(self, plan: Plan, key: Bits) -> None:
        self.plan = plan
        self.key = plan.slice(key)
        self.passes = 0
        # Fresh memory from the system, of which only what is used becomes real.
        self.forest: Final = np.zeros(
            (len(plan.heights), plan.bundles, 2 << plan.room), dtype=np.uint8
        )

    def next_roots(self) -> Bits:
        """Begin a pass: fill in its trees. Returns the part of the forest with its roots."""
        number, plan = self.passes, self.plan
        size = 1 << plan.room
        order = _order(plan.frame, plan.room, number)
        for tree, key in zip(self.forest[number], self.key, strict=True):
            np.take(key, order, out=tree[size:], mode="clip")
            level = size
            for _ in range(plan.heights[number]):
                # Two children at a time, as the halves of a number.
                pairs = tree[level : 2 * level].view(np.uint16)
                np.bitwise_xor(pairs, pairs >> 8, out=tree[level // 2 : level], casting="unsafe")
                level //= 2
        self.passes += 1
        roots: Bits = self.forest[number][:, plan.roots(number)]
        return roots


class _Alice(_Side):
    def answer(self, begins: bool, nodes: NDArray[np.uint32]) -> Bits:
        """The parities. Raises :class:`ReconciliationError` for an impossible request."""
        plan = self.plan
        if begins and self.passes == len(plan.heights):
            raise ReconciliationError("a pass beyond the last was requested")
        if not begins and len(nodes) == 0:
            raise ReconciliationError("an empty request")
        at: Nodes = (nodes >> 3).astype(np.int64)
        number = at // (plan.bundles << (plan.room + 1))
        if len(nodes) and int(number.max()) >= self.passes:
            raise ReconciliationError("a parity of a pass that has not begun was requested")
        inside = at & ((2 << plan.room) - 1)
        if (inside >> 1 < (1 << plan.room) >> np.array(plan.heights)[number]).any():
            raise ReconciliationError("a parity was requested that is known or does not exist")
        found: Bits = self.forest.reshape(-1)[at]
        found >>= (nodes & 7).astype(np.uint8)
        found &= 1
        return np.concatenate([plan.unpack(self.next_roots()), found]) if begins else found


class _Bob(_Side):
    def __init__(self, plan: Plan, key: Bits, steps: ModuleType) -> None:
        super().__init__(plan, key)
        self.steps = steps
        self.known: Final = np.zeros_like(self.forest)
        self.active: Final = np.zeros_like(self.forest)

    def search(self) -> Generator[tuple[bool, Nodes], Bits, None]:
        """Correct ``self.key``: yields (whether a pass begins, nodes), wants Alice's parities."""
        plan, steps = self.plan, self.steps
        forest = tuple(one.reshape(-1) for one in (self.forest, self.known, self.active))
        heights = np.array(plan.heights)
        tables = _tables(plan.frame, plan.room, len(plan.heights))
        key, corrected = self.key.reshape(-1), np.zeros(self.key.size, dtype=np.uint8)
        nodes = np.empty(0, dtype=np.int64)
        while True:
            begins = self.passes < len(plan.heights) and len(nodes) <= plan.few
            if not begins and len(nodes) == 0:
                return
            roots = self.next_roots() if begins else None
            inside = (nodes >> 3) & ((2 << plan.room) - 1)
            told = yield begins, nodes + (inside << 3)
            below = told[len(told) - len(nodes) :]
            nodes, leaves = steps.learn(*forest, nodes, below, plan.room)
            if roots is not None:
                roots ^= plan.pack(told[: len(told) - len(below)])
                nodes = np.concatenate([nodes, self._wrong_roots()])
            nodes, consistent = steps.settle(
                *forest,
                nodes,
                leaves,
                key,
                *tables,
                heights,
                self.passes,
                plan.room,
                corrected,
            )
            if not consistent:
                raise ReconciliationError("the parities contradict one another")

    def _wrong_roots(self) -> Nodes:
        """The roots of the pass that has begun are known; those that differ become active."""
        plan, number = self.plan, self.passes - 1
        part = plan.roots(number)
        roots = self.forest[number][:, part]
        self.known[number][:, part] = (1 << plan.lanes) - 1
        self.active[number][:, part] = roots
        bundle, block = np.nonzero(roots)
        lanes = np.unpackbits(roots[bundle, block][:, None], axis=1, bitorder="little")
        which, lane = np.nonzero(lanes)
        at = (number * plan.bundles + bundle) * (2 << plan.room) + part.start + block
        found: Nodes = at[which] << 3 | lane
        return found


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

    def __init__(self, key: Bits, error_rate: float) -> None:
        self._key = key
        self._rate = error_rate
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
            self._alice = _Alice(Plan.for_error_rate(len(key), self._rate), key)
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
    """See the module. ``compiled``: use numba; ``None``: if it is installed and the key is long."""

    compiled: bool | None = None

    name: ClassVar[str] = "cascade"

    def _steps(self, length: int) -> ModuleType:
        if self.compiled or (self.compiled is None and length >= LEAST_COMPILED):
            try:
                return importlib.import_module("hybridkex.link.cascade_loops")
            except ImportError:  # numba is an extra
                if self.compiled:
                    raise
        return importlib.import_module("hybridkex.link.cascade_arrays")

    def respond(self, key: Bits, error_rate: float) -> _Responder:
        """Alice's side; see :class:`~hybridkex.link.reconciliation.Reconciler`.

        Raises ``ConfigError``.
        """
        return _Responder(bit_array("key", key), within("error_rate", error_rate, 0.0, 1.0))

    def correct(self, key: Bits, error_rate: float) -> Generator[bytes, bytes, Correction]:
        """Bob's side, which corrects ``key`` in its place. Raises ``ConfigError``."""
        if not (instance("key", key, np.ndarray).flags.writeable and bit_array("key", key) is key):
            raise ConfigError("key takes an array of bytes that can be changed in its place")
        within("error_rate", error_rate, 0.0, 1.0)
        steps, disclosed = self._steps(len(key)), 0
        for part in _groups(len(key)):
            plan = Plan.for_error_rate(part.stop - part.start, error_rate)
            bob = _Bob(plan, key[part], steps)
            search, first = bob.search(), True
            try:
                begins, nodes = next(search)
                while True:
                    kind = NEXT_GROUP if first else BEGIN if begins else MORE
                    first = False
                    answer = yield kind + nodes.astype("<u4").tobytes()
                    count = len(nodes)
                    if begins:
                        count += plan.bundles * plan.lanes * plan.blocks(bob.passes - 1)
                    if len(answer) != -(-count // 8):
                        raise ReconciliationError("an answer has the wrong length")
                    disclosed += count
                    told = np.unpackbits(np.frombuffer(answer, dtype=np.uint8), count=count)
                    begins, nodes = search.send(told)
            except StopIteration:
                key[part] = plan.unslice(bob.key)
                bob.key.fill(0)
        return Correction(disclosed=disclosed, announced=disclosed)
