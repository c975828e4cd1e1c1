"""Budgets of connections and the process's limit of file descriptors.

A connection takes one descriptor, a forwarded connection two. A process without free descriptors
can neither accept a connection nor open a file, such as a key store or a certificate; so the
budgets of connections together stay below the limit (RLIMIT_NOFILE, getrlimit(2)).
"""

import resource
from typing import Final

from hybridkex.text import get_logger

__all__ = ["bounded", "raise_soft_limit", "share"]

LOG: Final = get_logger(__name__)

RESERVE: Final = 64
"""Descriptors for everything but accepted connections: listeners, stores, the event loop."""
BUDGETS: Final = 8
"""The share of the rest for each budget: a KME has budgets for SAEs and for peers, and at its own
port, that of the metrics and that of the link, one for handshakes and one for the waiting room."""
FEWEST: Final = 8
"""Descriptors that a share has even where all of them are reserved: fewer would make the choice
between addresses a matter of chance."""
OTHERS: Final = 1024
"""Or all but these, if there are many descriptors."""


def raise_soft_limit() -> None:
    """Raise the soft limit to the hard one, which any process may (getrlimit(2))."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        except (OSError, ValueError) as error:  # the kernel's own limit, in a container
            LOG.debug("the limit of open files stays at %d: %s", soft, error)


def share(most: int) -> int:
    """The number of descriptors, ``most`` or fewer, that one budget may have beside the others."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return most
    return min(most, max(FEWEST, (soft - RESERVE) // BUDGETS))


def bounded(connections: int, what: str, *, each: int = 1) -> int:
    """The number of connections that a budget may have, given the process's descriptors.

    Args:
        connections: the number that was asked for.
        what: the name of the budget, for the log line about a reduced number.
        each: descriptors per connection.
    """
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return connections
    rest = soft - RESERVE
    room = max(1, max(rest // BUDGETS, rest - OTHERS) // each)
    if connections <= room:
        return connections
    LOG.warning(
        "at most %d %s at once, not %d: this process may open %d files; raise 'ulimit -n' "
        "(LimitNOFILE= of a systemd unit)",
        room,
        what,
        connections,
        soft,
    )
    return room
