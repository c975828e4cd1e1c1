"""Budgets of connections and the process's limit of file descriptors.

A connection takes one descriptor, a forwarded connection two. A process without free descriptors
can neither accept a connection nor open a file, such as a key store or a certificate; so the
budgets of connections together stay below the limit (RLIMIT_NOFILE, getrlimit(2)), however many
sockets the process listens on.
"""

import contextlib
import resource
from collections.abc import Iterator
from typing import Final

from hybridkex.text import get_logger

LOG: Final = get_logger(__name__)

RESERVE: Final = 64
"""Descriptors for everything but listening sockets and accepted connections: stores, the event
loop."""
LISTENING: Final = 3
"""Descriptors of a server that listens: two sockets, and what watches its pending connections."""
BUDGETS: Final = 8
"""The share of the rest for each budget is this part: a KME has budgets for SAEs and for peers, and
at its own port, that of the metrics and that of the link, one for handshakes and one for the
pending connections."""
FEWEST: Final = 8
"""Descriptors that a share has even where all of them are reserved: fewer would make the choice
between addresses a matter of chance."""
OTHERS: Final = 1024
"""Or all but these, if there are many descriptors."""
FEW: Final = 3
"""Servers of a KME. Where there are more, as in a process with many tunnels, all budgets have equal
shares, so that clients of some servers take nothing that the others need:"""
BUDGETS_EACH: Final = 3
"""handshakes, pending connections, and connections that have been admitted,"""
FEWEST_OF_MANY: Final = 2
"""with so many descriptors at least."""


class _Servers:
    """The servers of this process that listen now."""

    count = 0


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """In this context one more server listens, with budgets of its own."""
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
    """Descriptors that a budget may use when the others use theirs: ``most`` or fewer.

    It changes with the number of servers in the process.
    """
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return most
    fewest = FEWEST if _Servers.count <= FEW else FEWEST_OF_MANY
    return min(most, max(fewest, _rest(soft) // _shares()))


def room_for(connections: int, *, each: int = 1, fewest: int = 1) -> int:
    """The number of connections, ``connections`` or fewer, that a budget may have now.

    Args:
        connections: the number that was asked for.
        each: descriptors per connection.
        fewest: the number that it has in any case.
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
    """:func:`room_for`, and a log line about a reduced number.

    Args:
        connections: the number that was asked for.
        what: the name of the budget.
        each: descriptors per connection.
        fewest: the number that it has in any case.
    """
    room = room_for(connections, each=each, fewest=fewest)
    if connections <= room:
        return connections
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    LOG.warning(
        "at most %d %s at once, not %d: this process may open %d files; raise 'ulimit -n' "
        "(LimitNOFILE= of a systemd unit)",
        room,
        what,
        connections,
        soft,
    )
    return room
