"""When a certificate expires, and what its owner reads about it, ahead of time and when it has."""

from datetime import UTC, datetime, timedelta
from typing import Final

from cryptography import x509

SOON: Final = timedelta(days=14)
"""How long ahead its owner is told, of a certificate that lives for months."""
LAST_PART: Final = 3
"""One that lives for days is renewed as a matter of course, usually when a third of its life is
left: its owner is told in the last third."""


def problem_of_expiry(
    name: str,
    certificate: x509.Certificate,
    now: datetime | None = None,
    *,
    remedy: str = "renew it",
) -> str | None:
    """A problem with the expiry date of a certificate, if there is one.

    Args:
        name: what the text calls it, such as ``our own certificate cert.pem``.
        certificate: whose validity counts.
        now: the time; the clock's if ``None``.
        remedy: the next step, for the end of the text.
    """
    now = now or datetime.now(UTC)
    warned_from, ends = _moments(certificate)
    if ends < now:
        return f"{name} expired on {ends:%Y-%m-%d}: {remedy}"
    if warned_from < now:
        return f"{name} expires on {ends:%Y-%m-%d}: {remedy}"
    return None


def seconds_to_next(certificate: x509.Certificate, now: datetime | None = None) -> float | None:
    """Seconds until the result of :func:`problem_of_expiry` changes; ``None`` if it never does."""
    now = now or datetime.now(UTC)
    return next(
        ((one - now).total_seconds() for one in _moments(certificate) if one >= now),
        None,
    )


def _moments(certificate: x509.Certificate) -> tuple[datetime, datetime]:
    """From when on its owner is warned, and the end of its validity."""
    ends = certificate.not_valid_after_utc
    life = ends - certificate.not_valid_before_utc
    return ends - min(SOON, life / LAST_PART), ends
