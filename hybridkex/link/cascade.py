"""Cascade: find and correct Bob's wrong bits by comparing parities.

G. Brassard, L. Salvail, "Secret-key reconciliation by public discussion", EUROCRYPT '93, with the
improvements that J. Martinez-Mateo, C. Pacher, M. Peev, A. Ciurana, V. Martin, "Demystifying the
information reconciliation protocol Cascade", arXiv:1407.3257, found to matter: blocks of powers of
two, a large second pass, and the use of every parity that was ever disclosed.

Each pass puts the key in another order, fixed and public, and cuts it into blocks. Above the bits
of a block stands a binary tree of parities. The trees of a pass lie level by level, and each level
is folded in half to get the next::

    bits     b0 b1 b2 b3 b4 b5 b6 b7          node i of a level of size 2s and node i + s
    level 1  b0^b4 b1^b5 b2^b6 b3^b7          are the children of node i of the next level,
    roots    b0^b4^b2^b6  b1^b5^b3^b7         whose size is s

which numpy does at the speed of memory, and which puts the bit at place ``p`` below node
``p mod s`` of every level. The trees of all passes are one flat array, and a *node* is an index
into it.

Alice does nothing but look up parities. Bob keeps two flags for each node: ``DIFFERS``, his own
parity until Alice's is known and from then on whether the two differ, and ``KNOWN``. A wrong bit
sits in one node of each level of each pass; to correct it is to flip ``DIFFERS`` in all of them. A
node with both flags set certainly holds a wrong bit. Bob descends from many such nodes at once, one
level with each question, and after each wave of corrections looks for the lowest such node above
each corrected bit, in every pass so far.

What is disclosed is counted: one bit for each parity that Alice tells. A parity that follows from
two others is never asked for.
"""

import functools
import math
from collections.abc import Generator
from dataclasses import dataclass
from typing import Final

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from numpy.typing import NDArray

__all__ = ["FRAME", "CascadeAlice", "CascadeError", "Plan", "Question", "cascade_bob"]

Bits = NDArray[np.uint8]
Nodes = NDArray[np.int64]

DIFFERS: Final = np.uint8(1)
KNOWN: Final = np.uint8(2)
WRONG: Final = DIFFERS | KNOWN

LARGE_HEIGHT: Final = 12
"""Blocks of the later passes have up to 4096 bits."""
MISSED_PAIRS: Final = 1e-6
"""Passes are added until so many pairs of wrong bits, on average, share a block in all of them; the
verification finds what is left, at the price of the frame."""
MAX_PASSES: Final = 24
WAVE: Final = 0.02
"""Searches that are worth a round of messages of their own, for each expected error: more make
fewer rounds and a higher leak."""

FIRST_BLOCK: Final = 0.73
"""Expected wrong bits in a block of the first pass, as in the first Cascade; then rounded."""
EARLY_PASSES: Final = 3
"""These begin as soon as the searches get few, so that rounds stay full; later ones cost Bob a walk
up more trees for each correction, and begin at a sixteenth of that."""

FRAME: Final = 1 << 20
"""Longer keys are cut into frames of at most so many bits, so that the trees stay in the cache."""


class CascadeError(Exception):
    """Bob's and Alice's parities contradict each other: what came was not from Alice."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What both sides must agree on before they begin; all of it is public."""

    length: int
    heights: tuple[int, ...]
    """Of the trees of each pass; blocks have ``2^height`` bits."""
    wave: int
    """Searches that are worth a round of messages of their own."""

    @classmethod
    def for_error_rate(cls, length: int, error_rate: float) -> "Plan":
        """Block sizes for an expected error rate (after option 8 of arXiv:1407.3257, table 3)."""
        rate = min(max(error_rate, 1e-4), 0.25)
        # With fewer than eight blocks a pass would hardly tear pairs apart.
        top = max(0, (length - 1).bit_length() - 3)
        first = max(1, round(math.log2(FIRST_BLOCK / rate)))
        second = math.ceil((first + LARGE_HEIGHT) / 2)
        heights = [min(first, top), min(second, top), min(second + 1, LARGE_HEIGHT, top)]
        pairs = (length * rate) ** 2 / 2.0
        for height in heights:
            pairs *= min(1.0, (1 << height) / length)
        while pairs > MISSED_PAIRS and len(heights) < MAX_PASSES:
            heights.append(min(LARGE_HEIGHT, top))
            pairs *= min(1.0, (1 << heights[-1]) / length)
        wave = max(1, round(WAVE * rate * length))
        return cls(length=length, heights=tuple(heights), wave=wave)

    def few(self, number: int) -> int:
        """With fewer searches than this, pass ``number`` begins."""
        return self.wave if number < EARLY_PASSES else max(1, self.wave // 16)

    @functools.cached_property
    def forest(self) -> "Forest":
        """Where the nodes of all passes lie."""
        return Forest(self.length, self.heights)


class Forest:
    """Where the nodes of all passes lie: one column for each level of each pass, bits first."""

    def __init__(self, length: int, heights: tuple[int, ...]) -> None:
        sizes: list[int] = []
        self.first: Final[list[int]] = []
        """The column of the bits of each pass."""
        for height in heights:
            roots = -(-length >> height)
            self.first.append(len(sizes))
            sizes += [roots << (height - level) for level in range(height + 1)]
        self.sizes: Final = np.array(sizes, dtype=np.int64)
        """Nodes of each column, padding included."""
        self.starts: Final = np.concatenate([[0], np.cumsum(self.sizes)])
        """The first node of each column; one more for the end."""
        self.bits: Final = np.isin(np.arange(len(sizes)), self.first)
        """Which columns are of bits."""
        self.down: Final = -np.roll(self.sizes, 1)
        """From a node to its left child; its right child is ``sizes`` of its column further."""
        self.heights: Final = heights

    def span(self, number: int) -> slice:
        """The nodes of one pass."""
        first = self.first[number]
        return slice(self.starts[first], self.starts[first + self.heights[number] + 1])

    def roots(self, number: int) -> slice:
        """The roots of one pass."""
        last = self.first[number] + self.heights[number]
        return slice(self.starts[last], self.starts[last + 1])

    def plant(self, number: int, key: Bits, trees: Bits) -> None:
        """Fill in the parities of a key for one pass."""
        level = trees[self.starts[self.first[number]] :][: self.sizes[self.first[number]]]
        bits = level[: len(key)]
        if number == 0:
            bits[:] = key
        else:
            np.take(key, _order(len(key), number)[0], out=bits, mode="clip")
        level[len(key) :] = 0
        for column in range(self.first[number] + 1, self.first[number] + self.heights[number] + 1):
            start, size = self.starts[column], self.sizes[column]
            above = trees[start : start + size]
            np.bitwise_xor(level[:size], level[size:], out=above)
            level = above


@functools.lru_cache(maxsize=2 * MAX_PASSES)
def _order(length: int, number: int) -> tuple[NDArray[np.intp], NDArray[np.int32]]:
    """Which bit stands at each place of a pass, and the reverse.

    Fixed for a length: that Eve knows where parities will be taken tells her nothing that she
    does not hear anyway, and the errors do not know it. Made from a stream cipher, so that both
    sides have the same one whatever version of numpy they run.
    """
    stream = Cipher(ChaCha20(b"hybridkex: the order of Cascade.", number.to_bytes(16)), None)
    keys = np.frombuffer(stream.encryptor().update(bytes(8 * length)), dtype="<u8")
    order = np.argsort(keys, kind="stable")
    place = np.empty(length, dtype=np.int32)
    place[order] = np.arange(length, dtype=np.int32)
    order.flags.writeable = place.flags.writeable = False
    return order, place


@dataclass(frozen=True)
class Question:
    """Parities that Bob wants: of all roots of the next pass (``None``), or of these nodes."""

    nodes: Nodes | None


class CascadeAlice:
    """Alice's side of one frame: she answers questions about her key, and counts what she told."""

    def __init__(self, plan: Plan, key: Bits) -> None:
        self._forest = plan.forest
        self._key = key
        self._trees = np.empty(self._forest.starts[-1], dtype=np.uint8)
        self._passes = 0
        self._planted = 0
        self.disclosed = 0

    def answer(self, question: Question) -> Bits:
        """The parities. Raises :class:`CascadeError` for a question that Bob would not ask."""
        if question.nodes is None:
            if self._passes == len(self._forest.heights):
                raise CascadeError("there are no more passes")
            self._forest.plant(self._passes, self._key, self._trees)
            self._planted = self._forest.span(self._passes).stop
            found = self._trees[self._forest.roots(self._passes)]
            self._passes += 1
        else:
            nodes = question.nodes
            if len(nodes) == 0 or int(nodes.min()) < 0 or int(nodes.max()) >= self._planted:
                raise CascadeError("a question about a node that is not there")
            found = self._trees[nodes]
        self.disclosed += len(found)
        return found


class _Bob:
    """Bob's flags for all nodes of one frame."""

    def __init__(self, plan: Plan, key: Bits) -> None:
        self.key = key
        self.forest = plan.forest
        self.flags = np.empty(self.forest.starts[-1], dtype=np.uint8)
        self.passes = 0
        self.budget = 2 * plan.length  # corrections; honest answers never need so many

    def plant(self) -> Nodes:
        """Begin a pass: returns the nodes that hold Bob's own parities and want Alice's."""
        self.forest.plant(self.passes, self.key, self.flags)
        roots = self.forest.roots(self.passes)
        self.passes += 1
        return np.arange(roots.start, roots.stop)

    def learn(self, nodes: Nodes, parities: Bits) -> None:
        """Take in Alice's parities."""
        self.flags[nodes] = (self.flags[nodes] ^ parities) | KNOWN

    def descend(self, nodes: Nodes) -> Generator[Question, Bits, Nodes]:
        """From nodes that hold a wrong bit down to one wrong bit of the key below each."""
        forest, flags = self.forest, self.flags
        column = np.searchsorted(forest.starts, nodes, side="right") - 1
        ended: list[Nodes] = []
        while True:
            inner = ~forest.bits[column]
            if not inner.all():
                ended.append(self._named(nodes[~inner], column[~inner]))
                nodes, column = nodes[inner], column[inner]
                if len(nodes) == 0:
                    return np.unique(np.concatenate(ended))
            left = nodes + forest.down[column]
            right = left + forest.sizes[column]
            known = flags[left]
            new = np.flatnonzero(known < KNOWN)
            if len(new):
                ask = left[new]
                told = (known[new] ^ (yield Question(ask))) | KNOWN
                known[new] = told
                flags[ask] = told
                # The node differs, so its other child differs if and only if this one does not.
                flags[right[new]] = told ^ DIFFERS
            nodes = np.where(known == WRONG, left, right)
            column -= 1

    def _named(self, nodes: Nodes, column: NDArray[np.intp]) -> Nodes:
        """Which bits of the key these nodes are."""
        found = []
        for number in range(self.passes):
            mine = column == self.forest.first[number]
            places = nodes[mine] - self.forest.starts[self.forest.first[number]]
            if len(places) and int(places.max()) >= len(self.key):
                raise CascadeError("a wrong bit was found in the padding")
            found.append(places if number == 0 else _order(len(self.key), number)[0][places])
        return np.concatenate(found)

    def correct(self, wrong: Nodes) -> Nodes:
        """Correct bits of the key.

        Returns the nodes that now certainly hold a wrong bit, the lowest above each of these.
        """
        self.budget -= len(wrong)
        if self.budget < 0:
            raise CascadeError("the corrections do not come to an end")
        self.key[wrong] ^= 1
        forest = self.forest
        found = []
        for number in range(self.passes):
            first, height = forest.first[number], forest.heights[number]
            columns = slice(first, first + height + 1)
            places = wrong if number == 0 else _order(len(self.key), number)[1][wrong]
            above = np.empty((height + 1, len(wrong)), dtype=np.int64)
            above[0] = places
            for level, size in enumerate(forest.sizes[columns][1:]):
                # Modulo the size of the next level, which is half: subtract it where there is room.
                np.subtract(above[level], size * (above[level] >= size), out=above[level + 1])
            above += forest.starts[columns][:, None]
            # Bits may share nodes, so the flags are flipped one by one.
            np.bitwise_xor.at(self.flags, above.ravel(), DIFFERS)
            hits = self.flags[above] == WRONG
            lowest = hits.argmax(axis=0)
            which = np.flatnonzero(hits.any(axis=0))
            found.append(above[lowest[which], which])
        return np.concatenate(found)


def cascade_bob(plan: Plan, key: Bits) -> Generator[Question, Bits, Nodes]:
    """Bob's side of one frame: yields questions, wants Alice's parities sent, corrects ``key``.

    Returns the places that were corrected, each once. Raises :class:`CascadeError` when the
    answers contradict each other.
    """
    before = key.copy()
    bob = _Bob(plan, key)
    waiting = np.empty(0, dtype=np.int64)
    while True:
        while bob.passes < len(plan.heights) and len(waiting) < plan.few(bob.passes):
            roots = bob.plant()
            bob.learn(roots, (yield Question(None)))
            waiting = np.concatenate([waiting, roots[bob.flags[roots] == WRONG]])
        if len(waiting) == 0:
            break
        now, later = _choose(waiting, bob, plan.wave)
        wrong = yield from bob.descend(now)
        waiting = np.unique(np.concatenate([later, bob.correct(wrong)]))
        waiting = waiting[bob.flags[waiting] == WRONG]
    return np.flatnonzero(before != key)


def _choose(waiting: Nodes, bob: _Bob, wave: int) -> tuple[Nodes, Nodes]:
    """Which searches to do now: those of the earliest pass, whose blocks are the smallest.

    A few are not worth a round of messages of their own.
    """
    for number in range(bob.passes):
        count = int(np.searchsorted(waiting, bob.forest.span(number).stop))
        if count >= wave:
            return waiting[:count], waiting[count:]
    return waiting, waiting[:0]
