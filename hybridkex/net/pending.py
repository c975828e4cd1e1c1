"""Pending connections: accepted, and waiting for a handshake slot.

The kernel's accept queue (listen(2)) is first in, first out, even if one client fills it. So a
server accepts at once and chooses the next connection itself: connections are grouped by client
address, and the addresses are served round-robin. A pending connection costs a descriptor and a few
kilobytes; no task runs for it and nothing is read from it.
"""

import math
import selectors
from collections import OrderedDict
from collections.abc import Callable
from typing import Final, Generic, TypeVar

from hybridkex.net.budget import Budget, Connection
from hybridkex.net.descriptors import share

WAITING: Final = 2048
"""The maximum number of pending connections of a server; fewer if there are not enough
descriptors."""
HANDSHAKES: Final = 128
"""Handshake slots: the maximum number of unauthenticated connections that are being served."""
ACCEPTED_BETWEEN: Final = 200
"""The maximum number of connections to accept between the starts of two handlers. A handshake takes
as long as tens of calls of accept(2), and a new connection must not wait for the handshakes of
earlier ones."""
RETRY_SECONDS: Final = 0.1
"""Seconds between two attempts to accept while the system lacks resources, or to find a slot."""

T = TypeVar("T")


class PendingConnections(Generic[T]):
    """Pending connections in two groups: those that have sent something, and the silent ones.

    Those that have sent something come first. Among them, the address that holds the fewest slots
    is next; of equals, first those not served yet, the newest first, then the least recently
    served. Of one address, the newest connection comes first: after a flood, the clients that have
    waited longest have most likely given up.

    Args:
        held: returns the number of slots that an address holds.
        total: the maximum number of connections; ``None`` for :data:`WAITING`, or fewer if the
            process may open only few files.
    """

    def __init__(self, held: Callable[[str], int], total: int | None = None) -> None:
        self._total = total
        self._held = held
        self._speaking = _ByAddress[T]()
        self._silent = _ByAddress[T]()
        self._selector = selectors.DefaultSelector()
        self._watched: dict[Connection, int] = {}
        """The descriptors of the silent, under which they were registered."""
        self._crowds: dict[tuple[int, bool], dict[str, None]] = {}
        """Addresses by the number of their connections, places included, and by whether there are
        silent ones; of equals, that of the oldest news first."""
        self._crowd_of: dict[str, tuple[int, bool]] = {}

    def __len__(self) -> int:
        return len(self._speaking) + len(self._silent)

    @property
    def total(self) -> int:
        return share(WAITING) if self._total is None else self._total

    def add(self, connection: Connection, stream: T) -> None:
        if connection.is_silent:
            number = connection.fileno()
            self._selector.register(number, selectors.EVENT_READ, connection)
            self._watched[connection] = number
            self._silent.put(connection, stream)
        else:
            self._speaking.put(connection, stream)
        self._update_crowd(connection.address)

    def fileno(self) -> int:
        """A descriptor that is readable while a silent connection has sent something or has ended;
        then call :meth:`listen`."""
        number: int = self._selector.fileno()
        return number

    def listen(self) -> None:
        """Reclassify silent connections that have sent something or have ended."""
        for key, _ in self._selector.select(0):
            self.heard(key.data)

    def heard(self, connection: Connection) -> None:
        """Reclassify a connection that has sent something."""
        if connection in self._watched:
            self._unwatch(connection)
            self._speaking.put(connection, self._silent.remove(connection))
            self._update_crowd(connection.address)

    def next_address(self) -> tuple[str, bool] | None:
        """The address whose turn it is, and whether it has sent something; ``None`` if no
        connection is pending."""
        for group in (self._speaking, self._silent):
            if len(group):
                return group.first(self._held), group is self._speaking
        return None

    def next(self, places: Budget) -> tuple[Connection, T] | None:
        """Take the connection whose turn it is, if there is a place or another one makes room.

        ``None``: no connection is pending, or there is no place now.
        """
        turn = self.next_address()
        if turn is None or not places.makes_place(turn[0], evict=turn[1]):
            return None
        return self.take(turn[0])

    def take(self, address: str) -> tuple[Connection, T]:
        """The next connection of an address that has one."""
        if address in self._speaking:
            found = self._speaking.take(address)
        else:
            found = self._hushed(self._silent.take(address))
        self._update_crowd(address)
        return found

    def leave(self, connection: Connection) -> bool:
        """Remove a connection that has ended; returns whether it was pending."""
        if connection in self._watched:
            self._silent.remove(connection)
            self._unwatch(connection)
        elif not self._speaking.holds(connection):
            return False
        else:
            self._speaking.remove(connection)
        self._update_crowd(connection.address)
        return True

    def crowded_out(self) -> tuple[Connection, T] | None:
        """Remove and return the connection to close, if more are pending than allowed.

        It belongs to the address with the most connections, including those in slots (as counted
        when its number of pending connections last changed): the oldest silent one if there is one,
        otherwise the oldest.
        """
        return self.remove() if len(self) > self.total else None

    def remove(self) -> tuple[Connection, T] | None:
        """Like :meth:`crowded_out`, but whenever a connection is pending."""
        if not self._crowds:
            return None
        crowd = max(self._crowds)
        address = next(iter(self._crowds[crowd]))
        if crowd[1]:
            found = self._hushed(self._silent.take_oldest(address))
        else:
            found = self._speaking.take_oldest(address)
        self._update_crowd(address)
        return found

    def _update_crowd(self, address: str) -> None:
        """Record the number of connections of an address: with thousands of addresses, counting
        all of them for each new connection would take too long."""
        before = self._crowd_of.pop(address, None)
        if before is not None:
            del self._crowds[before][address]
            if not self._crowds[before]:
                del self._crowds[before]
        silent = self._silent.count(address)
        waiting = silent + self._speaking.count(address)
        if waiting:
            crowd = waiting + self._held(address), silent > 0
            self._crowd_of[address] = crowd
            self._crowds.setdefault(crowd, {})[address] = None

    def _hushed(self, found: tuple[Connection, T]) -> tuple[Connection, T]:
        self._unwatch(found[0])
        return found

    def _unwatch(self, connection: Connection) -> None:
        self._selector.unregister(self._watched.pop(connection))

    def close(self) -> list[T]:
        """Stop watching; returns the streams that were pending."""
        self._selector.close()
        return [stream for group in (self._speaking, self._silent) for stream in group.clear()]


class _ByAddress(Generic[T]):
    """Connections by address, in the order in which the addresses are served."""

    def __init__(self) -> None:
        self._groups: OrderedDict[str, dict[Connection, T]] = OrderedDict()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __contains__(self, address: str) -> bool:
        return address in self._groups

    def first(self, held: Callable[[str], int]) -> str:
        """The address that holds the fewest slots; of equals, the first in order."""
        fewest, found = math.inf, ""
        for address in self._groups:
            places = held(address)
            if places < fewest:
                fewest, found = places, address
            if not places:  # There may be thousands of addresses.
                break
        return found

    def count(self, address: str) -> int:
        return len(self._groups.get(address, ()))

    def holds(self, connection: Connection) -> bool:
        return connection in self._groups.get(connection.address, ())

    def put(self, connection: Connection, stream: T) -> None:
        address = connection.address
        if address not in self._groups:
            self._groups[address] = {}
            self._groups.move_to_end(address, last=False)
        self._groups[address][connection] = stream
        self._count += 1

    def take(self, address: str) -> tuple[Connection, T]:
        """Remove the newest connection of an address, and move the address to the end."""
        self._groups.move_to_end(address)
        found = next(reversed(self._groups[address]))
        return found, self.remove(found)

    def take_oldest(self, address: str) -> tuple[Connection, T]:
        found = next(iter(self._groups[address]))
        return found, self.remove(found)

    def remove(self, connection: Connection) -> T:
        group = self._groups[connection.address]
        stream = group.pop(connection)
        if not group:
            del self._groups[connection.address]
        self._count -= 1
        return stream

    def clear(self) -> list[T]:
        streams = [stream for group in self._groups.values() for stream in group.values()]
        self._groups.clear()
        self._count = 0
        return streams
