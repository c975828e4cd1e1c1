"""The stock of key material that authenticates the classical channel, and its history.

Both parties keep the same ledger. Each direction has a lane of its own, used from the front and
filled up at the end, so that the two agree on every byte whatever the order of events. A byte has a
number that it keeps for the life of the ledger: :class:`Position` says which bytes are in stock.

A ledger outlives a session. When a connection was cut in the middle of a block, the party that
speaks on a lane may have used bytes that the listener has not yet seen used, and Bob may have put
in what Alice has not. :meth:`Ledger.agreement` says from which byte on both can go on.
"""

from collections import deque
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from hybridkex.errors import ConfigError, LedgerDry, LedgerLost
from hybridkex.secret import Secret

HISTORY: Final = 1000
LANE_RESERVE: Final = 256
"""Bytes to which each lane is filled: enough for three blocks."""


class Direction(IntEnum):
    """The direction of a message."""

    ALICE_TO_BOB = 0
    BOB_TO_ALICE = 1


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One line of the ledger; amounts in bytes."""

    block: int
    what: str
    change: int
    balance: int


@dataclass(frozen=True)
class Position:
    """The bytes of a lane that are in stock: from ``start`` to before ``end``."""

    start: int
    end: int


class Ledger:
    """Authentication key in stock."""

    def __init__(self, shared: Secret | None = None, *, reserve: int = LANE_RESERVE) -> None:
        """``shared``: a secret that both parties were given, an even number of bytes.

        ``reserve``: bytes to which each lane is filled; 0 where no further block follows.
        """
        self._reserve = reserve
        self._lanes = {direction: bytearray() for direction in Direction}
        self._starts = dict.fromkeys(Direction, 0)
        self.history: Final[deque[Entry]] = deque(maxlen=HISTORY)
        """The last entries, oldest first."""
        self.inherited: float = 0.0
        """Epsilon of the blocks that the key in stock came from."""
        self.conditional = False
        """Whether one of those blocks was authenticated by signatures."""
        if shared is not None:
            if len(shared) < 2 * LANE_RESERVE or len(shared) % 2:
                raise ConfigError(
                    f"the shared secret of a link has an even number of bytes, {2 * LANE_RESERVE} "
                    "or more"
                )
            self.add(0, "shared secret", shared.reveal())

    @property
    def filled(self) -> bool:
        """Whether the ledger ever held key material."""
        return any(self.position(one).end for one in Direction)

    @property
    def balance(self) -> int:
        """Bytes in stock, both lanes together."""
        return sum(map(len, self._lanes.values()))

    @property
    def used(self) -> int:
        """Bytes used since the beginning, both lanes together."""
        return sum(self._starts.values())

    @property
    def wanting(self) -> int:
        """Bytes missing in both lanes together."""
        return sum(max(0, self._reserve - len(lane)) for lane in self._lanes.values())

    def position(self, direction: Direction) -> Position:
        """The bytes of a lane that are in stock."""
        start = self._starts[direction]
        return Position(start, start + len(self._lanes[direction]))

    @property
    def positions(self) -> dict[Direction, Position]:
        """The bytes of both lanes that are in stock."""
        return {lane: self.position(lane) for lane in Direction}

    def add(self, block: int, what: str, key: bytes) -> None:
        """Add key material: fill each lane first, then give half of the rest to each."""
        want = [max(0, self._reserve - len(lane)) for lane in self._lanes.values()]
        spare = len(key) - sum(want)
        first = want[0] + spare // 2 if spare >= 0 else len(key) * want[0] // sum(want)
        self._lanes[Direction.ALICE_TO_BOB] += key[:first]
        self._lanes[Direction.BOB_TO_ALICE] += key[first:]
        self._note(block, what, len(key))

    def draw(self, block: int, direction: Direction, count: int) -> bytes:
        """Use ``count`` bytes. Raises ``LedgerDry``."""
        taken = self.read(direction, self._starts[direction], count)
        self.advance(block, direction, self._starts[direction] + count)
        return taken

    def read(self, direction: Direction, start: int, count: int) -> bytes:
        """Bytes from number ``start`` on; they stay in stock. Raises ``LedgerDry``."""
        lane, at = self._lanes[direction], start - self._starts[direction]
        if at < 0 or len(lane) - at < count:
            raise LedgerDry(f"fewer than {count} bytes of authentication key are left")
        return bytes(lane[at : at + count])

    def advance(self, block: int, direction: Direction, start: int) -> None:
        """Everything before byte number ``start`` is used."""
        count = start - self._starts[direction]
        del self._lanes[direction][:count]
        self._starts[direction] = start
        self._note(block, f"tag, {direction.name.lower().replace('_', ' ')}", -count)

    def agreement(
        self, speaks: Direction, theirs: dict[Direction, Position]
    ) -> dict[Direction, Position]:
        """The bytes that both parties have in stock, from our positions and theirs.

        ``speaks``: our direction. The speaker on a lane uses its bytes first, so the listener
        continues at the speaker's position. Bytes that only one party has are from a block that the
        other never finished, and are discarded. Raises ``LedgerLost`` when the positions contradict
        that order: one party's ledger is an old copy.
        """
        agreed = {}
        for lane in Direction:
            ours, other = self.position(lane), theirs[lane]
            speaker, listener = (ours, other) if lane is speaks else (other, ours)
            if speaker.start < listener.start:
                who = "this" if lane is speaks else "the other"
                raise LedgerLost(f"{who} party's authentication key is an old copy")
            agreed[lane] = Position(speaker.start, min(ours.end, other.end))
        return agreed

    def cut(self, block: int, ends: dict[Direction, Position]) -> None:
        """Drop the bytes beyond the agreed ends."""
        for lane, agreed in ends.items():
            surplus = self.position(lane).end - max(agreed.end, self._starts[lane])
            if surplus > 0:
                del self._lanes[lane][-surplus:]
                self._note(block, "dropped: the other party lacks it", -surplus)

    def clear(self) -> None:
        """Drop everything: the parties authenticate from the beginning."""
        for lane in self._lanes.values():
            lane[:] = bytes(len(lane))
            lane.clear()
        self._starts = dict.fromkeys(Direction, 0)
        self.history.clear()
        self.inherited, self.conditional = 0.0, False

    def _note(self, block: int, what: str, change: int) -> None:
        self.history.append(Entry(block=block, what=what, change=change, balance=self.balance))
