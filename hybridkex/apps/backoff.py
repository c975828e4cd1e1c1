"""Delays between attempts to connect."""

import random

from hybridkex.errors import ConfigError


class Backoff:
    """Exponential back-off with jitter: clients that were cut off together do not reconnect
    together.

    Args:
        first: the longest first wait, in seconds; it doubles each time.
        most: the longest wait, in seconds.
    """

    def __init__(self, *, first: float = 0.5, most: float = 30.0) -> None:
        if not 0 < first <= most:
            raise ConfigError(
                "back-off times must be positive, and the first must not exceed the longest"
            )
        self._first = first
        self._most = most
        self.tries = 0

    def next(self) -> float:
        """The next wait, in seconds."""
        longest = min(self._most, self._first * 2.0 ** min(self.tries, 60))
        self.tries += 1
        # The jitter leaves at least a quarter of the wait.
        return longest * random.uniform(0.25, 1.0)

    def reset(self) -> None:
        """Start again from the first wait, after a success."""
        self.tries = 0
