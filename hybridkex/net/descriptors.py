"""Connections and the file descriptors of the process.

Each connection takes one, a connection that is forwarded two. When a process has none left, it can
neither accept a connection nor open a file, such as a key store or a certificate; so the budgets of
connections together stay below its limit (RLIMIT_NOFILE, getrlimit(2)).
"""

import resource
from typing import Final

from hybridkex.text import get_logger

__all__ = ["bounded", "raise_soft_limit"]

LOG: Final = get_logger(__name__)

RESERVE: Final = 64
"""Descriptors for everything that is no accepted connection: listeners, stores, the event loop."""
BUDGETS: Final = 5
"""Each budget may take this share of the rest: a KME has one for SAEs and one for peers, and those
of the handshakes at its own port, the metrics and the link."""
OTHERS: Final = 1024
"""Or all but these, where there are many descriptors."""


def raise_soft_limit() -> None:
    """Raise the soft limit to the hard one, which any process may (getrlimit(2))."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        except (OSError, ValueError) as error:  # the kernel's own limit, in a container
            LOG.debug("the limit of open files stays at %d: %s", soft, error)


def bounded(connections: int, what: str, *, each: int = 1) -> int:
    """How many connections a budget may have with the descriptors of this process.

    Args:
        connections: the number that was asked for.
        what: the name of the budget, for the log line that says so if there may be fewer.
        each: descriptors of one connection.
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
