"""The key that authenticates the classical channel: where it came from and where it went.

Both parties keep the same ledger. Each direction has a lane of its own, used from the front and
filled up at the end, so that the two agree on every byte whatever the order of events.
"""

from collections import deque
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from hybridkex.errors import ConfigError, LedgerDry
from hybridkex.secret import Secret

__all__ = ["LANE_RESERVE", "Direction", "Entry", "Ledger"]

HISTORY: Final = 1000
LANE_RESERVE: Final = 256
"""Bytes that each lane is filled up to: what three blocks use."""


class Direction(IntEnum):
    """Who speaks."""

    ALICE_TO_BOB = 0
    BOB_TO_ALICE = 1


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One line of the ledger; bytes."""

    block: int
    what: str
    change: int
    balance: int


class Ledger:
    """Authentication key in stock."""

    def __init__(self, shared: Secret | None = None) -> None:
        """``shared``: a secret that both parties were given, an even number of bytes."""
        self._lanes = {direction: bytearray() for direction in Direction}
        self.history: Final[deque[Entry]] = deque(maxlen=HISTORY)
        """The last entries, oldest first."""
        if shared is not None:
            if len(shared) < 2 * LANE_RESERVE or len(shared) % 2:
                raise ConfigError(
                    f"the shared secret of a link has an even number of bytes, {2 * LANE_RESERVE} "
                    "or more"
                )
            self.add(0, "shared secret", shared.reveal())

    @property
    def balance(self) -> int:
        """Bytes in stock, both lanes together."""
        return sum(map(len, self._lanes.values()))

    @property
    def wanting(self) -> int:
        """Bytes that both lanes lack to be full."""
        return sum(max(0, LANE_RESERVE - len(lane)) for lane in self._lanes.values())

    def add(self, block: int, what: str, key: bytes) -> None:
        """Put key in: to each lane what it lacks, and of what is left half to each."""
        want = [max(0, LANE_RESERVE - len(lane)) for lane in self._lanes.values()]
        spare = len(key) - sum(want)
        first = want[0] + spare // 2 if spare >= 0 else len(key) * want[0] // sum(want)
        self._lanes[Direction.ALICE_TO_BOB] += key[:first]
        self._lanes[Direction.BOB_TO_ALICE] += key[first:]
        self._note(block, what, len(key))

    def draw(self, block: int, direction: Direction, count: int) -> bytes:
        """Use ``count`` bytes. Raises ``LedgerDry``."""
        lane = self._lanes[direction]
        if len(lane) < count:
            raise LedgerDry("no authentication key is left: the link stops")
        taken = bytes(lane[:count])
        del lane[:count]
        self._note(block, f"tag, {direction.name.lower().replace('_', ' ')}", -count)
        return taken

    def _note(self, block: int, what: str, change: int) -> None:
        self.history.append(Entry(block=block, what=what, change=change, balance=self.balance))
