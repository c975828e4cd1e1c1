"""Connections in a server, and the budgets that bound their number.

A connection begins in the budget of those that have not yet authenticated, with a deadline, and
moves to the budget of its kind when its handler knows the peer (:meth:`Connection.admit`). A budget
is shared fairly among its holders (see :class:`Budget`), so that idle clients cannot deny service
to others.
"""

import contextlib
from collections.abc import Callable, Hashable, Iterator
from typing import Final

from hybridkex.errors import HybridkexError
from hybridkex.net.descriptors import bounded, room_for
from hybridkex.net.event_loop import current_time
from hybridkex.net.log import BoundedLog
from hybridkex.net.sockets import (
    Carrier,
    has_unread,
    has_unsent,
    network_of,
    peer_name,
    silence_of,
)

PATIENCE: Final = 1.0
"""Seconds that a connection must have waited for its peer before a newcomer may replace it."""
IDLE_SECONDS: Final = 60.0
"""Seconds without data in either direction before a newcomer may replace a connection that has
carried data."""


class TooManyConnections(HybridkexError):
    """A connection was refused because a budget of connections is used up."""


class Connection:
    """An accepted connection under supervision.

    Attributes:
        peer: the peer's address and port, or ``a local program``.
        address: the peer's network, which is the holder of the slot until the peer has
            authenticated: an IPv4 address, the /64 prefix of an IPv6 address, the user ID of a
            local program, or empty.
        log: for log lines that the peer can cause; one for all unknown peers, and another for known
            ones (:meth:`recognize`).
        served: the log for routine lines about unauthenticated peers.
        evicted: whether it was closed to make room for another connection.
    """

    def __init__(
        self,
        transport: Carrier | None,
        log: BoundedLog,
        served: BoundedLog | None = None,
        known: BoundedLog | None = None,
    ) -> None:
        self.log = log
        self.served: Final = served or log
        self._known: Final = known or log
        self.peer: Final = peer_name(transport)
        self.address: Final = network_of(transport)
        self._transport = transport
        self._cut: Callable[[], object] = lambda: None
        self._may_stay: Callable[[], object] = lambda: None
        self._budget: Budget | None = None
        self._holder: Hashable = None
        self._waiting_since: float | None = None
        self._unread = False
        self._admitted = 0.0
        self._is_used: Callable[[], bool] = lambda: True
        self._silence: Callable[[], float] = lambda: -1.0
        self.evicted = False

    @property
    def is_silent(self) -> bool:
        """Whether no unread bytes from the peer are waiting."""
        return self._transport is not None and not has_unread(self._transport)

    def fileno(self) -> int:
        assert self._transport is not None
        number: int = self._transport.socket.fileno()
        return number

    def begin(
        self,
        budget: "Budget",
        *,
        cut: Callable[[], object],
        may_stay: Callable[[], object] = lambda: None,
    ) -> None:
        """Take a slot for authentication.

        Args:
            budget: the budget of slots.
            cut: ends the connection, to make room for another.
            may_stay: called when the peer has authenticated, which ends the deadline.
        """
        budget._add(self, self.address)
        self._waiting_since = current_time()
        self._cut, self._may_stay = cut, may_stay

    def recognize(self) -> None:
        """Mark the peer as authenticated for logging, so that unknown peers cannot suppress its log
        lines."""
        self.log = self._known

    def release(self) -> None:
        """Free the slot, at the end of the connection or of its handshake."""
        if self._budget is not None:
            self._budget._give_back(self, self._holder)
            self._budget = None

    def admit(
        self,
        budget: "Budget",
        holder: Hashable = None,
        *,
        is_used: Callable[[], bool] = lambda: True,
        silence: Callable[[], float] = lambda: -1.0,
    ) -> None:
        """Mark the peer as authenticated: move to ``budget``, counted for ``holder``; ends the
        deadline.

        Args:
            budget: of the connections of its kind.
            holder: the identity of the peer; :attr:`address` if ``None``.
            is_used: whether the connection has carried any data of the application. As long as it
                has not, a new connection may replace it, as in :meth:`waiting`; afterwards it keeps
                its slot while data flows (see :class:`Budget`). So clients cannot lock out honest
                clients at the same address.
            silence: seconds since data of the application last crossed the connection. It is called
                if the system does not know, as for a Unix socket; a negative result means unknown.

        Raises:
            TooManyConnections: the budget is used up. Deadline and slot are unchanged, so that the
                handler has the rest of its time to tell the peer.
        """
        before, place = self._budget, self._holder
        budget._take(self, self.address if holder is None else holder)
        if before is not None:
            before._give_back(self, place)
        self._waiting_since = None
        self._admitted, self._is_used, self._silence = current_time(), is_used, silence
        self._may_stay()

    @contextlib.contextmanager
    def waiting(self, *, unread: bool = False) -> Iterator[None]:
        """Context in which we wait for the peer: a new connection may replace this one, since
        closing it now loses nothing.

        Args:
            unread: also while bytes of the peer are unread, because we wait for the peer to read.
        """
        self._waiting_since, self._unread = current_time(), unread
        try:
            yield
        finally:
            self._waiting_since = None

    def _has_waited(self, seconds: float, now: float) -> float:
        """The seconds for which we have waited for the peer; negative if fewer than ``seconds``,
        or if the peer waits for us."""
        since = self._waiting_since
        if since is None and not self._is_used():
            since = self._admitted
        # The system call comes last: there may be many connections to check.
        if since is None or self.evicted or now - since < seconds:
            return -1.0
        if not self._unread and has_unread(self._transport):
            return -1.0
        return now - since

    def _has_idled(self, seconds: float, now: float) -> float:
        """The time since data last crossed the connection; negative if it is less than ``seconds``
        or unknown, or if the delay is ours: bytes of the peer are unread, and it reads ours."""
        transport = self._transport
        if self.evicted or (has_unread(transport) and not has_unsent(transport)):
            return -1.0
        silence = silence_of(transport)
        if silence < 0:
            silence = self._silence()
        return silence if silence >= seconds else -1.0

    def _evict(self) -> None:
        self.evicted = True
        self.release()
        self._cut()


class Budget:
    """A maximum number of open connections, shared fairly among their holders.

    When it is used up, a new connection replaces an existing one, of the first of these kinds that
    exists:

    1. one that has waited ``patience`` seconds for its peer (:meth:`Connection.waiting`), or has
       been admitted for as long and never carried data;
    2. one that has carried data, but none for ``idle`` seconds: a client that sent one byte cannot
    keep a place indefinitely; 3. with ``even_shares``, for holders who need not keep their peers
       waiting to occupy places: the newest connection of the holder with the most connections, if
       that holder then still has at least as many as the newcomer.

    Of the first two kinds it is the one that has been silent longest among those of the holder with
    the most connections, but never one of a holder who has fewer than the newcomer. If there is
    no such connection, the newcomer is refused. Where the newcomer's holder has used up its own
    share (``each``), one of its own connections of the first two kinds makes room.

    Args:
        total: the maximum number of connections.
        each: the maximum number of connections of one holder; ``None`` for no limit but ``total``.
        what: the name of the budget in messages: *connections*, *peer connections*.
        patience: seconds that a connection must have waited before a newcomer may take its place.
        idle: seconds without data in either direction, likewise, of one that has carried data
            (known on Linux or from ``silence``; otherwise such a connection keeps its place).
        even_shares: whether connections that do not wait make room, too.
        descriptors: file descriptors of one connection; there are fewer connections where the
            process may not open enough (:mod:`hybridkex.net.descriptors`),
        fewest: but not fewer than this, which one peer needs.
        freed: called when a place becomes free.
    """

    def __init__(  # noqa: PLR0913  # keywords with defaults
        self,
        total: int,
        *,
        each: int | None = None,
        what: str = "connections",
        descriptors: int = 1,
        fewest: int = 1,
        patience: float = PATIENCE,
        idle: float = IDLE_SECONDS,
        even_shares: bool = False,
        freed: Callable[[], object] | None = None,
    ) -> None:
        self._what = what
        self._descriptors = descriptors
        self._fewest = fewest
        self._logged_total = total
        self.total = total
        self.each = each
        self._patience = patience
        self._idle = idle
        self._even_shares = even_shares
        self._count = 0
        self._held: dict[Hashable, dict[Connection, None]] = {}
        self._freed = freed

    @property
    def total(self) -> int:
        """The maximum number of connections, limited by the descriptors of the process."""
        room = room_for(self._total, each=self._descriptors, fewest=self._fewest)
        if room < self._logged_total:  # there are more servers than before
            self._logged_total = self._bounded()
        return room

    @total.setter
    def total(self, connections: int) -> None:
        self._total = connections
        self._logged_total = self._bounded()

    def _bounded(self) -> int:
        return bounded(self._total, self._what, each=self._descriptors, fewest=self._fewest)

    def __len__(self) -> int:
        return self._count

    def _take(self, connection: Connection, holder: Hashable) -> None:
        own = self.held(holder)
        if self.each is not None and own >= self.each:
            victim = self._silent(holder, only=True)
            if victim is None:
                raise TooManyConnections(f"{holder} has {own} {self._what} open")
            victim._evict()
        elif self._count >= self.total:
            victim = self._silent(holder) or self._surplus(own)
            if victim is None:
                raise TooManyConnections(f"{self._count} {self._what} are open")
            victim._evict()
        self._add(connection, holder)

    def held(self, holder: Hashable) -> int:
        return len(self._held.get(holder, ()))

    def makes_place(self, holder: Hashable, *, evict: bool) -> bool:
        """Return whether a waiting holder may have a slot now.

        It may as long as it has fewer slots than are free, so that no holder has more than half
        of them; or, with ``evict``, if a connection can be evicted because it has waited too long.
        """
        if self.held(holder) < self.total - self._count:
            return True
        victim = self._victim(holder, self._patience) if evict else None
        if victim is None:
            return False
        victim._evict()
        return True

    def evict(self) -> bool:
        """Free the descriptors of a connection that has waited too long, if there is one."""
        victim = self._victim(object(), self._patience)
        if victim is None:
            return False
        victim._evict()
        return True

    def _silent(self, newcomer: Hashable, *, only: bool = False) -> Connection | None:
        """A connection that has been silent or idle for so long that a new one may replace it;
        with ``only``, one of the same holder."""
        return self._victim(newcomer, self._patience, only=only) or self._victim(
            newcomer, self._idle, only=only, of=Connection._has_idled
        )

    def _surplus(self, own: int) -> Connection | None:
        """The newest connection of the holder with the most connections, if a newcomer with ``own``
        connections may replace it."""
        if not self._even_shares:
            return None
        most = max(self._held.values(), key=len, default={})
        return next(reversed(most)) if len(most) >= own + 2 else None

    def _victim(
        self,
        newcomer: Hashable,
        least: float,
        *,
        only: bool = False,
        of: Callable[[Connection, float, float], float] = Connection._has_waited,
    ) -> Connection | None:
        """The first connection to evict, among those that have been silent for at least ``least``
        seconds."""
        now = current_time()
        own = self.held(newcomer)
        best: Connection | None = None
        rank = (0, 0.0)
        for holder, connections in self._held.items():
            if holder != newcomer and (only or len(connections) <= own):
                continue
            for connection in connections:
                age = of(connection, least, now)
                if age >= 0 and (len(connections), age) > rank:
                    best, rank = connection, (len(connections), age)
        return best

    def _add(self, connection: Connection, holder: Hashable) -> None:
        connection._budget, connection._holder = self, holder
        self._held.setdefault(holder, {})[connection] = None
        self._count += 1

    def _give_back(self, connection: Connection, holder: Hashable) -> None:
        connections = self._held[holder]
        del connections[connection]
        if not connections:
            del self._held[holder]
        self._count -= 1
        if self._freed is not None:
            self._freed()
