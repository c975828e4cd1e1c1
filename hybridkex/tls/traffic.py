"""After the handshake: application data, KeyUpdate, tickets (RFC 9846 section 4.7)."""

from dataclasses import dataclass
from typing import Final, Self

from hybridkex.auth import Presented
from hybridkex.constants import CertificateType
from hybridkex.crypto.schedule import ExporterSecret, ResumptionSecret
from hybridkex.crypto.suites import CipherSuite
from hybridkex.errors import IllegalParameter, LocalStateError, UnexpectedMessage
from hybridkex.reasons import Reason
from hybridkex.tls.admission import remaining_lifetime
from hybridkex.tls.config import ClientConfig, ServerConfig
from hybridkex.tls.events import KeyUpdated, TicketReceived
from hybridkex.tls.record_layer import RecordLayer
from hybridkex.tls.session import MAX_TICKET_LIFETIME, Session, SessionTicket
from hybridkex.tls.tickets import TicketState
from hybridkex.wire import extensions as ext
from hybridkex.wire.messages import KeyUpdate, Message, NewSessionTicket

__all__ = ["ClientTraffic", "Connected", "ServerTraffic", "store_key"]

X509: Final = CertificateType.X509

MAX_KEY_UPDATES: Final = (1 << 48) - 1
"""How often a sender may change its key (section 4.7.3)."""


def store_key(name: str | None) -> str:
    """Under which a client's ticket store keeps the tickets of a server."""
    return name or ""


@dataclass(frozen=True)
class Connected:
    """What a finished handshake leaves: made only by the code that checked Finished."""

    session: Session
    suite: CipherSuite
    exporter: ExporterSecret
    resumption: ResumptionSecret


class _Traffic:
    """The last state: lasts until the connection ends."""

    def __init__(self, connected: Connected) -> None:
        self.connected = connected
        self._updates_in_a_row = 0
        self._read_generation = 0
        self._write_generation = 0
        self._answer_update = False
        self._update_requested = False

    def handle(self, message: Message, raw: bytes, records: RecordLayer) -> Self:
        """One message after the handshake."""
        assert isinstance(message, KeyUpdate)
        self._updates_in_a_row += 1
        if self._updates_in_a_row > records.reader.limits.key_updates:
            raise UnexpectedMessage(
                "too many KeyUpdates without data between them", Reason.KEY_UPDATES_TOO_MANY
            )
        # MAX_KEY_UPDATES is the sender's: "receiving implementations MUST NOT enforce this rule"
        # (section 4.7.3).
        records.reader.update_key()
        self._read_generation += 1
        self._update_requested = False
        # The answer waits for our next data (section 4.7.3 asks for no more): a peer that only
        # writes cannot make us send without end.
        self._answer_update |= message.update_requested
        records.emit(KeyUpdated(self._read_generation))
        return self

    def data_received(self) -> None:
        """Application data came, so the KeyUpdates before it are no storm of them."""
        self._updates_in_a_row = 0

    @property
    def receives_only(self) -> bool:
        """Whether :meth:`data_received` would change nothing."""
        return not self._updates_in_a_row

    @property
    def sends_only(self) -> bool:
        """Whether :meth:`send_data` would send nothing but the data."""
        return not self._answer_update

    def send_data(self, data: memoryview, records: RecordLayer) -> None:
        """Queue application data; our key changes before its limit (section 5.5)."""
        if self._answer_update:
            self._answer_update = False
            # Section 4.7.3: a sender at the limit "MUST NOT send its own KeyUpdate [...] and SHOULD
            # instead ignore the 'update_requested' flag".
            if self._write_generation < MAX_KEY_UPDATES:
                self.update_keys(records, request=False)
        while True:
            assert records.writer.protection is not None
            room = records.writer.protection.remaining
            if room <= 0:
                self.update_keys(records, request=False)
                continue
            piece = data[: room * records.writer.record_limit]
            records.writer.send_data(piece)
            data = data[len(piece) :]
            if not data:
                return

    def update_keys(self, records: RecordLayer, *, request: bool) -> None:
        """Change our key, and ask the peer to change its own if ``request``.

        Raises:
            LocalStateError: our key has changed 2^48-1 times (section 4.7.3).
        """
        if self._write_generation >= MAX_KEY_UPDATES:
            raise LocalStateError("our key cannot change any more; open a new connection")
        self._answer_update = False
        self._write_generation += 1
        # "Until receiving a subsequent KeyUpdate from the peer, the sender MUST NOT send another
        # KeyUpdate with request_update set to 'update_requested'" (section 4.7.3).
        records.writer.send(KeyUpdate(request and not self._update_requested))
        self._update_requested |= request
        records.writer.update_key()


class ClientTraffic(_Traffic):
    """The client's: takes tickets too."""

    def __init__(
        self, connected: Connected, config: ClientConfig, presented: Presented | None
    ) -> None:
        super().__init__(connected)
        self._config = config
        self._presented = presented
        self._tickets = 0

    def handle(self, message: Message, raw: bytes, records: RecordLayer) -> Self:
        """One message after the handshake."""
        if not isinstance(message, NewSessionTicket):
            return super().handle(message, raw, records)
        store, session = self._config.ticket_store, self.connected.session
        if store is None:
            # Section 4.7.1: a client that does "not support resumption MUST silently ignore this
            # message".
            return self
        self._tickets += 1
        if self._tickets > records.reader.limits.tickets:
            raise UnexpectedMessage(
                f"more than {records.reader.limits.tickets} session tickets",
                Reason.TICKETS_TOO_MANY,
            )
        if message.lifetime > MAX_TICKET_LIFETIME:
            raise IllegalParameter(
                f"a ticket with a lifetime of {message.lifetime} s", Reason.TICKET_LIFETIME
            )
        presented = self._presented
        lifetime = min(message.lifetime, remaining_lifetime(self._config, session.began_at))
        if lifetime <= 0:
            return self
        if len(message.ticket) > self._config.ticket_room:
            return self  # No ClientHello of ours could carry it.
        ticket = SessionTicket(
            ticket=message.ticket,
            psk=self.connected.resumption.psk(message.nonce),
            suite=self.connected.suite,
            age_add=message.age_add,
            lifetime=lifetime,
            received_at=self._config.clock(),
            server_name=session.server_name,
            chain=presented.chain if presented is not None else (),
            certificate_type=presented.certificate_type if presented is not None else X509,
            authenticated_by=session.authenticated_by,
            psk_identity=session.psk_identity,
            psk_context=session.psk_context,
            began_at=session.began_at,
            binding=self._config.binding(self._config.identity),
        )
        store.put(store_key(session.server_name), ticket)
        records.emit(TicketReceived(ticket))
        return self


class ServerTraffic(_Traffic):
    """The server's: gives tickets with its first data.

    Not before: a client that only writes would never read them, and both sides could block on full
    sockets.
    """

    def __init__(
        self,
        connected: Connected,
        config: ServerConfig,
        presented: Presented | None,
        binding: bytes,
    ) -> None:
        super().__init__(connected)
        self._config = config
        self._presented = presented
        self._binding = binding
        self._tickets_due = config.tickets_per_connection if config.tickets is not None else 0

    def tickets_wanted(self, wanted: bool) -> None:
        """Whether the client can use tickets: it offered psk_dhe_ke (section 4.3.9)."""
        if not wanted:
            self._tickets_due = 0

    @property
    def sends_only(self) -> bool:
        """Whether :meth:`send_data` would send nothing but the data."""
        return not self._tickets_due and super().sends_only

    def send_data(self, data: memoryview, records: RecordLayer) -> None:
        """Queue application data, behind the tickets that are due."""
        while self._tickets_due:
            self._tickets_due -= 1
            self._send_ticket(records)
        super().send_data(data, records)

    def _send_ticket(self, records: RecordLayer) -> None:
        issuer, session = self._config.tickets, self.connected.session
        presented = self._presented
        assert issuer is not None
        lifetime = min(issuer.lifetime, remaining_lifetime(self._config, session.began_at))
        if lifetime <= 0:
            return  # The next handshake is a full one.
        nonce = bytes((self._tickets_due,))
        state = TicketState(
            suite=self.connected.suite.code,
            psk=self.connected.resumption.psk(nonce),
            issued_at=int(issuer.clock()),
            server_name=session.server_name,
            authenticated_by=session.authenticated_by,
            psk_identity=session.psk_identity,
            psk_context=session.psk_context,
            began_at=int(session.began_at),
            binding=self._binding,
            client_chain=presented.chain if presented is not None else (),
            client_certificate_type=presented.certificate_type if presented is not None else X509,
        )
        ticket = issuer.seal(state)
        if ticket is None:
            return  # Too long; this client makes a full handshake the next time.
        records.writer.send(
            NewSessionTicket(
                lifetime=lifetime,
                age_add=int.from_bytes(self._config.entropy(4), "big"),
                nonce=nonce,
                ticket=ticket,
                extensions=ext.Extensions(),
            )
        )
