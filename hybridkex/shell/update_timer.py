"""When the next key update of a connection is due, late, and may be started; no I/O.

Times are seconds of the event loop's clock.
"""

import math
import random
from typing import Final

from hybridkex.net.event_loop import current_time
from hybridkex.net.token_bucket import TokenBucket
from hybridkex.tls.fresh_keys import FreshKeys

_FIRST_RETRY: Final = 0.5
_LAST_RETRY: Final = 30.0
"""Seconds between attempts, while the key source or the peer has no key."""

AT_ONCE: Final = 16
"""The number of consecutive updates that we start without data between them, in addition to one per
second: half of what a peer accepts (:attr:`~hybridkex.tls.config.Limits.key_updates`)."""


class UpdateTimer:
    """The timing of one connection's updates; ``schedule`` is ``None`` if only requests and limits
    cause them."""

    def __init__(self, schedule: FreshKeys | None) -> None:
        self._schedule = schedule
        self._due = math.inf
        self._interval = 0.0
        self._pace = TokenBucket(1.0, AT_ONCE, clock=current_time)
        self._paced = False
        """Whether the rate limit allows the update that is due."""
        self.done()

    def done(self) -> None:
        """An update is complete, or superfluous."""
        self.why: str | None = None
        """Why an update is due now."""
        self.late = math.inf
        """The time at which an update that is due is late."""
        self.bytes = 0
        """Bytes of application data in both directions since the last update."""
        self._obstacle = "it was not started"
        """Why the last attempt failed."""
        self._retry, self._not_before = _FIRST_RETRY, -math.inf

    def close(self) -> None:
        """The connection is closing: no update is due any more."""
        self._due = self.late = math.inf
        self.why = None

    def count(self, size: int) -> bool:
        """Count application data. Returns whether it made an update due."""
        self.bytes += size
        self._pace.fill()
        most = self._schedule.after_bytes if self._schedule is not None else None
        if self.why is not None or most is None or self.bytes < most:
            return False
        self.want("after_bytes")
        return True

    def want(self, why: str, *, at_once: bool = False) -> None:
        """An update is due now; it is late after the deadline.

        ``at_once``: do not wait for the next attempt.
        """
        self.why = self.why or why
        if self._schedule is not None and self.late == math.inf:
            self.late = current_time() + self._schedule.deadline
        if at_once:
            self._not_before = -math.inf

    def check(self, now: float) -> None:
        """Check whether the interval has passed."""
        if self.why is None and now >= self._due:
            self.want("every")

    def try_later(self, obstacle: str) -> None:
        """Wait longer after each attempt, but try once more shortly before the deadline."""
        self._obstacle = obstacle
        now = current_time()
        soon = max(now + _FIRST_RETRY, self.late - 1.0)
        self._not_before = min(now + self._retry, soon)
        self._retry = min(2 * self._retry, _LAST_RETRY)

    def may_start(self, now: float) -> bool:
        """Whether it is time for the update that is due."""
        if now < self._not_before:
            return False
        self._paced = self._paced or self._pace.take()
        if not self._paced:
            self._not_before = now + 1.0
        return self._paced

    def missed(self) -> str:
        """Report, once, that an update is late. Returns why the last attempt failed."""
        self.late = math.inf
        return self._obstacle

    def started(self) -> None:
        """The update that was due has been started."""
        self._paced = False

    def next_time(self, *, idle: bool) -> float:
        """When to act next; ``idle``: whether an update that is due could be started."""
        until = min(self._due if self.why is None else math.inf, self.late)
        return min(until, self._not_before) if self.why is not None and idle else until

    def plan(self) -> FreshKeys | None:
        """Set the time of the next update: a little earlier at random. Returns the schedule."""
        schedule = self._schedule
        if schedule is not None:
            self._interval = schedule.every * (1 - schedule.jitter * random.random())  # no secret
            self._due = current_time() + self._interval
        return schedule

    def stretch(self, factor: float) -> None:
        """Keys are scarce: the next update comes later."""
        self._due += self._interval * (factor - 1.0)
