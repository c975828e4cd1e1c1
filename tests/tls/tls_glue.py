"""Two engines and the bytes between them."""

from collections.abc import Callable
from dataclasses import dataclass, field

from hybridkex.crypto.psk import ExternalPsk
from hybridkex.errors import AlertReceived, LocalStateError, PeerError, TruncationError
from hybridkex.tls.config import ClientConfig, ServerConfig
from hybridkex.tls.connection import ClientConnection, Connection, ServerConnection
from hybridkex.tls.events import ApplicationData, Event, PskWanted, SessionProposed
from hybridkex.tls.policy import Policy, Requirement
from hybridkex.tls.session import Session

ANY_GROUP = Policy(post_quantum=Requirement.PREFER)
"""Lets a test use the small and fast classical groups."""


class Elsewhere:
    """A PskSource that only the engine's caller knows how to ask; the engine must not."""

    async def offer(self) -> ExternalPsk:
        raise AssertionError("the engine does no I/O")

    async def look_up(self, identities: tuple[bytes, ...]) -> ExternalPsk:
        raise AssertionError("the engine does no I/O")

    def authorize(self, session: Session, missing: str | None) -> Session:
        raise AssertionError("authorizing is the shell's business")


ELSEWHERE = Elsewhere()

Lookup = Callable[[tuple[bytes, ...]], ExternalPsk | None]
OnWire = Callable[[Connection, bytes], bytes]


def drain(connection: Connection, lookup: Lookup | None = None) -> list[Event]:
    """All events that are there now."""
    events = []
    while (event := connection.next_event()) is not None:
        if isinstance(event, SessionProposed):
            if event.peer is not None and event.peer.remember is not None:
                event.peer.remember()
            connection.accept()
            continue
        events.append(event)
        if isinstance(event, PskWanted) and lookup is not None:
            connection.provide_psk(lookup(event.identities))
    return events


def data_of(events: list[Event]) -> bytes:
    """The application data in some events."""
    return b"".join(bytes(event.data) for event in events if isinstance(event, ApplicationData))


@dataclass
class Pair:
    """A client and a server; :meth:`pump` carries bytes until both are silent."""

    client: ClientConnection
    server: ServerConnection
    lookup: Lookup | None = None
    on_wire: OnWire | None = None
    """Gets the receiver and the bytes; returns what arrives instead."""
    client_events: list[Event] = field(default_factory=list)
    server_events: list[Event] = field(default_factory=list)
    errors: dict[str, Exception] = field(default_factory=dict)

    @classmethod
    def make(
        cls,
        client: ClientConfig,
        server: ServerConfig,
        name: str | None = "localhost",
        lookup: Lookup | None = None,
        on_wire: OnWire | None = None,
    ) -> "Pair":
        for verifier in (client.verifier, server.client_verifier):
            refresh = getattr(verifier, "refresh", None)
            if refresh is not None:  # as a shell does
                refresh()
        return cls(ClientConnection(client, name), ServerConnection(server), lookup, on_wire)

    @property
    def both_complete(self) -> bool:
        return self.client.handshake_complete and self.server.handshake_complete

    def connect(self) -> "Pair":
        """The whole handshake; any error is the test's."""
        self.client.start()
        self.pump()
        assert self.both_complete
        return self

    def pump(self) -> None:
        """Carry bytes both ways until none move; errors are raised at once."""
        while self._carry(self.client, self.server, self.server_events) | self._carry(
            self.server, self.client, self.client_events
        ):
            pass

    def _carry(self, source: Connection, target: Connection, events: list[Event]) -> bool:
        data = bytes(source.data_to_send())
        if self.on_wire is not None and data:
            data = self.on_wire(target, data)
        if not data:
            return False
        target.receive_data(data)
        events.extend(drain(target, self.lookup if target is self.server else None))
        return True

    def fight(self) -> None:
        """As :meth:`pump`, and keep the typed errors of either side in ``errors``.

        Any other exception is a bug, and so is a PeerError without an alert to send.
        """
        moved = True
        while moved:
            moved = False
            for who, source, target, events in (
                ("server", self.client, self.server, self.server_events),
                ("client", self.server, self.client, self.client_events),
            ):
                try:
                    moved |= self._carry(source, target, events)
                except PeerError as error:
                    moved = True
                    self.errors.setdefault(who, error)
                    assert target.has_data_to_send, "no alert for the peer"
                except AlertReceived as error:
                    moved = True
                    self.errors.setdefault(who, error)
                except LocalStateError:
                    assert who in self.errors, "only a dead engine may refuse bytes"

    def cut(self) -> None:
        """The transport ends: whoever still waits must say so."""
        for who, one in (("client", self.client), ("server", self.server)):
            if who not in self.errors:
                try:
                    one.receive_data(b"")
                except TruncationError as error:
                    self.errors[who] = error

    def exchange(self, to_server: bytes, to_client: bytes) -> None:
        """Application data both ways, checked."""
        before = len(self.client_events), len(self.server_events)
        self.client.send_data(to_server)
        self.server.send_data(to_client)
        self.pump()
        assert data_of(self.client_events[before[0] :]) == to_client
        assert data_of(self.server_events[before[1] :]) == to_server
