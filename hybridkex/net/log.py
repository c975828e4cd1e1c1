"""Rate-limited logging for lines that any peer can cause."""

import logging
from functools import partial
from typing import Final

from hybridkex.net.token_bucket import TokenBucket

RATE: Final = 1.0
BURST: Final = 20

SERVED_RATE: Final = 5.0
SERVED_BURST: Final = 200
"""The limit for routine lines about unauthenticated peers."""


class BoundedLog:
    """A logger that writes at most ``burst`` lines at once and ``rate`` lines a second.

    Suppressed lines are counted: the next line that is written, or :meth:`flush`, reports the
    number. Each level has its own limit, so that no number of warnings suppresses an error.

    Args:
        logger: where the lines go.
        rate: lines of one level per second in the long run.
        burst: lines of one level at once.
    """

    def __init__(self, logger: logging.Logger, *, rate: float = RATE, burst: int = BURST) -> None:
        self._logger = logger
        self._new_bucket = partial(TokenBucket, rate, burst)
        self._buckets: dict[int, TokenBucket] = {}
        self._suppressed = 0

    def log(self, level: int, message: str, *args: object) -> bool:
        """Write a line, or count it as suppressed. Returns whether it was written."""
        if not (self._logger.isEnabledFor(level) and self.allows(level)):
            return False
        self._logger.log(level, message, *args)
        return True

    def allows(self, level: int = logging.INFO) -> bool:
        """Return whether a line may be written elsewhere now; if not, count it as suppressed."""
        if level not in self._buckets:
            self._buckets[level] = self._new_bucket()
        if not self._buckets[level].take():
            self._suppressed += 1
            return False
        self.flush()
        return True

    def flush(self) -> None:
        """Log how many lines were suppressed, if any."""
        if self._suppressed:
            count, self._suppressed = self._suppressed, 0
            self._logger.warning("%d similar log lines were suppressed", count)
