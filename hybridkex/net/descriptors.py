"""Budgets of connections and the process's limit of file descriptors.

A connection takes one descriptor, a forwarded connection two. A process without free descriptors
can neither accept a connection nor open a file, such as a key store or a certificate; so the
budgets of connections together stay below the limit (RLIMIT_NOFILE, getrlimit(2)), however many
sockets the process listens on.
"""

import contextlib
import resource
from collections.abc import Iterator
from functools import lru_cache
from typing import Final

from hybridkex.text import get_logger

LOG: Final = get_logger(__name__)

RESERVE: Final = 64
"""Descriptors for everything but listening sockets and accepted connections: stores, the event
loop."""
LISTENING: Final = 3
"""Descriptors of a server that listens: two sockets, and what watches its pending connections."""
BUDGETS: Final = 8
"""Each budget may use 1/BUDGETS of the rest: a KME has budgets for SAEs and for peers, and at each
of its three ports (KME, metrics, link) one for handshakes and one for pending connections."""
FEWEST: Final = 8
"""Minimum descriptors of a share, even if all are reserved: fewer would make the choice between
addresses random."""
OTHERS: Final = 1024
"""If there are many descriptors, a budget may use all but these."""
FEW: Final = 3
"""The servers of a KME. In a process with more servers, such as one with many tunnels, all budgets
have equal shares, so that clients of one server take no descriptors that the others need."""
BUDGETS_EACH: Final = 3
"""Budgets of each server: handshakes, pending connections, and admitted connections."""
FEWEST_OF_MANY: Final = 2
"""Minimum descriptors of a share in a process with more than FEW servers."""


class _Servers:
    """The number of servers of this process that are listening."""

    count = 0


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """Count one more listening server, with its own budgets, in this context."""
    _Servers.count += 1
    try:
        yield
    finally:
        _Servers.count -= 1


def _shares() -> int:
    return BUDGETS if _Servers.count <= FEW else BUDGETS_EACH * _Servers.count


def _rest(soft: int) -> int:
    return soft - RESERVE - LISTENING * _Servers.count


def raise_soft_limit() -> None:
    """Raise the soft limit to the hard one, which any process may (getrlimit(2))."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        except (OSError, ValueError) as error:  # the kernel's own limit, in a container
            LOG.debug("the limit of open files stays at %d: %s", soft, error)


def share(most: int) -> int:
    """Return the descriptors that a budget may use when the others use theirs: at most ``most``.

    The share changes with the number of servers in the process.
    """
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return most
    fewest = FEWEST if _Servers.count <= FEW else FEWEST_OF_MANY
    return min(most, max(fewest, _rest(soft) // _shares()))


def room_for(connections: int, *, each: int = 1, fewest: int = 1) -> int:
    """Return how many connections a budget may have now: at most ``connections``.

    Args:
        connections: the configured number.
        each: descriptors per connection.
        fewest: the minimum.
    """
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return connections
    rest = _rest(soft)
    room = rest // _shares()
    if _Servers.count <= FEW:
        room = max(room, rest - OTHERS)
    return min(connections, max(fewest, room // each))


def bounded(connections: int, what: str, *, each: int = 1, fewest: int = 1) -> int:
    """Return :func:`room_for`, and log a reduced number: once for all budgets of the process that
    are reduced alike.

    Args:
        connections: the configured number.
        what: the name of the budget.
        each: descriptors per connection.
        fewest: the minimum.
    """
    room = room_for(connections, each=each, fewest=fewest)
    if connections <= room:
        return connections
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    _log_reduced(room, what, connections, soft)
    return room


@lru_cache
def _log_reduced(room: int, what: str, connections: int, soft: int) -> None:
    LOG.warning(
        "at most %d %s at once, not %d: this process may open %d files; raise 'ulimit -n' "
        "(LimitNOFILE= of a systemd unit)",
        room,
        what,
        connections,
        soft,
    )
