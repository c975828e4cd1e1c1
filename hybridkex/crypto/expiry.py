"""When a certificate of our own expires: words for the log, ahead of time and when it happens."""

from datetime import UTC, datetime, timedelta
from typing import Final

__all__ = ["SOON", "problem_of_expiry", "seconds_to_next"]

SOON: Final = timedelta(days=14)
"""How long ahead its owner is told."""


def problem_of_expiry(name: str, ends: datetime, now: datetime | None = None) -> str | None:
    """What is wrong with the date of a certificate of our own, if anything.

    Args:
        name: of the certificate, such as its file.
        ends: the end of its validity.
        now: the time; the clock's if ``None``.
    """
    now = now or datetime.now(UTC)
    if ends < now:
        return f"our own certificate {name} expired on {ends:%Y-%m-%d}: renew it"
    if ends < now + SOON:
        return f"our own certificate {name} expires on {ends:%Y-%m-%d}: renew it"
    return None


def seconds_to_next(ends: datetime, now: datetime | None = None) -> float | None:
    """Seconds until :func:`problem_of_expiry` says something else; ``None`` if that is never."""
    now = now or datetime.now(UTC)
    return next(
        ((one - now).total_seconds() for one in (ends - SOON, ends) if one >= now),
        None,
    )
