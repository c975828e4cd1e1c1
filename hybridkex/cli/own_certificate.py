"""Warnings about a certificate of our own that expires while a command runs."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import trio

from hybridkex.auth import Identity
from hybridkex.crypto.expiry import problem_of_expiry, seconds_to_next
from hybridkex.crypto.x509_parsing import certificate_from_der
from hybridkex.text import get_logger

__all__ = ["watched"]

LOG: Final = get_logger("hybridkex.cli.own_certificate")

LOOK_EVERY: Final = 3600.0
"""Seconds after which the clock is looked at again: it may be set, and the machine may sleep."""


@contextmanager
def watched(path: Path | None, identity: object) -> Iterator[None]:
    """In this context, log when our certificate is about to expire and when it has expired: each
    once, and at once if it is so from the beginning."""
    if not isinstance(identity, Identity):
        yield
        return
    ends = certificate_from_der(identity.chain[0]).not_valid_after_utc
    scope = trio.CancelScope()

    async def watch() -> None:
        told = None
        with scope:
            while True:
                problem = problem_of_expiry(str(path), ends)
                if problem is not None and problem != told:
                    LOG.warning("%s", problem)
                told = problem
                left = seconds_to_next(ends, datetime.now(UTC))
                if left is None:
                    return
                await trio.sleep(min(left + 1, LOOK_EVERY))

    # Not in a nursery: an error in the context must not be wrapped in an exception group.
    trio.lowlevel.spawn_system_task(watch)
    try:
        yield
    finally:
        scope.cancel()
