"""The states after the handshake: application data, KeyUpdate, tickets (RFC 9846 section 4.7)."""

from copy import copy
from dataclasses import replace
from typing import Final, Self

from hybridkex.auth import Identity, Presented, RawIdentity
from hybridkex.constants import CertificateType
from hybridkex.crypto.one_time_pad import Pad
from hybridkex.crypto.schedule import ExporterSecret, ResumptionSecret
from hybridkex.crypto.suites import CipherSuite
from hybridkex.crypto.update_schedule import Generation
from hybridkex.errors import IllegalParameter, LocalStateError, PadExhausted, UnexpectedMessage
from hybridkex.reasons import Reason
from hybridkex.tls.admission import remaining_lifetime
from hybridkex.tls.config import ClientConfig, ServerConfig
from hybridkex.tls.epochs import KEPT_EPOCHS, Epoch, KeyUpdates
from hybridkex.tls.events import (
    EpochBegan,
    HandshakeCompleted,
    KeyUpdated,
    PadKeyWanted,
    TicketReceived,
    UpdateWanted,
)
from hybridkex.tls.extended_key_update import Updates
from hybridkex.tls.negotiation import ApplicationKeys, Negotiated
from hybridkex.tls.one_time_pad import MAX_PAD_KEYS, available, content_within
from hybridkex.tls.record_layer import RecordLayer
from hybridkex.tls.session import MAX_TICKET_LIFETIME, Session, SessionTicket
from hybridkex.tls.tickets import TicketIssuer, TicketState
from hybridkex.tls.transcript import Transcript
from hybridkex.values import value
from hybridkex.wire import extensions as ext
from hybridkex.wire.layout import Message
from hybridkex.wire.messages import KeyUpdate, NewSessionTicket
from hybridkex.wire.update_messages import FreshRequest, PadKey, UpdateRequest

X509: Final = CertificateType.X509

MAX_KEY_UPDATES: Final = (1 << 48) - 1
"""The maximum number of key changes of a sender (section 4.7.3)."""


def store_key(name: str | None) -> str:
    """The key of a server's tickets in a client's ticket store."""
    return name or ""


@value
class Connected:
    """The result of a handshake; only the code that verified Finished makes one."""

    session: Session
    suite: CipherSuite
    exporter: ExporterSecret
    resumption: ResumptionSecret | None
    """``None`` if there will be no session tickets."""
    updates: Updates | None
    """The key updates, if Extended Key Update is negotiated."""

    @classmethod
    def complete(
        cls,
        session: Session,
        negotiated: Negotiated,
        keys: ApplicationKeys,
        transcript: Transcript,
        config: ClientConfig | ServerConfig,
        records: RecordLayer,
        *,
        tickets: bool,
    ) -> Self:
        """Complete the handshake with its ``transcript``; ``tickets``: whether tickets may be
        issued."""
        main, suite = keys.main, negotiated.suite
        resumption = main.resumption_secret(transcript.digest()) if tickets else None
        updates, kind = None, negotiated.agreed.key_updates
        if kind is not KeyUpdates.STANDARD:
            first = Generation.first(suite, main, keys.digest, transcript.digest())
            updates = Updates(records, config, kind, negotiated.group, first)
        if negotiated.agreed.one_time_pad:
            records.reader.pad, records.writer.pad = Pad(), Pad()
        records.emit(HandshakeCompleted(session))
        return cls(session, suite, keys.exporter, resumption, updates)


def _after(session: Session, epoch: Epoch) -> Session:
    later = copy(session)  # takes a fifth of the time of dataclasses.replace
    object.__setattr__(later, "epochs", (*session.epochs[1 - KEPT_EPOCHS :], epoch))
    return later


class _Traffic:
    """The last state, until the connection ends."""

    def __init__(self, connected: Connected, config: ClientConfig | ServerConfig) -> None:
        self.connected = connected
        self._clock = config.clock
        self._updates_in_a_row = 0.0
        self._read_generation = 0
        self._write_generation = 0
        self._answer_update = False
        self._update_requested = False
        self._update_wanted = False
        self._last_request = 0.0

    def handle(self, message: Message, raw: bytes, records: RecordLayer) -> Self:
        updates = self.connected.updates
        if updates is not None:
            self._extended(updates, message, raw, records)
            return self
        if not isinstance(message, KeyUpdate):
            raise UnexpectedMessage(
                "a message of Extended Key Update, which was not negotiated",
                Reason.UPDATE_OUT_OF_ORDER,
            )
        if self._too_many_updates(records):
            raise UnexpectedMessage(
                "too many KeyUpdates without data between them", Reason.KEY_UPDATES_TOO_MANY
            )
        # MAX_KEY_UPDATES is the sender's: "receiving implementations MUST NOT enforce this rule"
        # (section 4.7.3).
        records.reader.update_key()
        self._read_generation += 1
        self._update_requested = False
        # The answer waits for our next data, as section 4.7.3 allows: a peer that only writes
        # cannot make us send endlessly.
        self._answer_update |= message.update_requested
        records.emit(KeyUpdated(self._read_generation))
        return self

    def _extended(
        self, updates: Updates, message: Message, raw: bytes, records: RecordLayer
    ) -> None:
        if isinstance(message, KeyUpdate):
            raise UnexpectedMessage(
                "KeyUpdate where Extended Key Update is negotiated", Reason.STANDARD_KEY_UPDATE
            )
        if isinstance(message, PadKey):
            self._pad_key(message, records)
            return
        if isinstance(message, UpdateRequest | FreshRequest) and self._too_many_updates(records):
            raise UnexpectedMessage(
                "too many key updates without data between them", Reason.UPDATES_TOO_MANY
            )
        epoch = updates.handle(message, raw, records)
        if epoch is not None:
            self._began(epoch, records)

    def _too_many_updates(self, records: RecordLayer) -> bool:
        """Count an update of the peer. A session that renews its keys for weeks may be silent for
        days, so the limit is on bursts: the count decreases by one per second."""
        now = self._clock()
        passed = max(0.0, now - self._last_request)
        self._updates_in_a_row = max(0.0, self._updates_in_a_row - passed) + 1.0
        self._last_request = now
        return self._updates_in_a_row > records.reader.limits.key_updates

    def _pad_key(self, message: PadKey, records: RecordLayer) -> None:
        """The peer appends a key to the one-time pad of its direction."""
        reader = records.reader
        if reader.pad is None:
            raise UnexpectedMessage(
                "a key for a one-time pad, which was not negotiated", Reason.UPDATE_OUT_OF_ORDER
            )
        if reader.confirmation_due:
            raise UnexpectedMessage(
                "the first message under a new key is not its confirmation",
                Reason.UPDATE_NOT_CONFIRMED,
            )
        if reader.pad.keys + reader.pad_keys_due >= MAX_PAD_KEYS:
            raise UnexpectedMessage(
                "too many unused keys for a one-time pad", Reason.PAD_KEYS_TOO_MANY
            )
        reader.pad_keys_due += 1
        records.emit(PadKeyWanted(message.identity))

    def _began(self, epoch: Epoch, records: RecordLayer) -> None:
        session = _after(self.connected.session, epoch)
        self.connected = replace(self.connected, session=session)
        self._update_wanted = False
        records.emit(EpochBegan(epoch))

    @property
    def update_wanted(self) -> bool:
        """Whether our caller has been asked for a key update that has not started."""
        updates = self.connected.updates
        return self._update_wanted and updates is not None and updates.takes_keys

    def data_received(self) -> None:
        """Reset the count of key updates: application data has come between them."""
        self._updates_in_a_row = 0.0

    @property
    def receives_only(self) -> bool:
        """Whether :meth:`data_received` would change nothing."""
        return not self._updates_in_a_row

    @property
    def sends_only(self) -> bool:
        """Whether :meth:`send_data` would send nothing but the data."""
        return not self._answer_update and not self._updates_in_a_row

    def send_data(self, data: memoryview, records: RecordLayer) -> None:
        """Queue application data; our key changes before its limit (section 5.5).

        Raises:
            PadExhausted: our one-time pad is too short; nothing has been queued.
        """
        writer = records.writer
        if writer.pad is not None:
            room = content_within(available(writer.pad), writer.record_limit)
            if room < len(data):
                raise PadExhausted(
                    f"our one-time pad is long enough for {room:,} bytes, and {len(data):,} bytes "
                    "are to be sent"
                )
        if data:
            self._updates_in_a_row = 0.0
        if self._answer_update:
            self._answer_update = False
            # Section 4.7.3: a sender at the limit "MUST NOT send its own KeyUpdate [...] and SHOULD
            # instead ignore the 'update_requested' flag".
            if self._write_generation < MAX_KEY_UPDATES:
                self.update_keys(records, request=False)
        while True:
            room = records.writer.keyed.remaining
            if self.connected.updates is not None:
                self._check_room(self.connected.updates, records)
            elif room <= 0:
                self.update_keys(records, request=False)
                continue
            piece = data[: room * records.writer.record_limit]
            records.writer.send_data(piece)
            data = data[len(piece) :]
            if not data:
                return

    def _check_room(self, updates: Updates, records: RecordLayer) -> None:
        """Ask for a key update long before our key may protect no more records (section 5.5)."""
        protection = records.writer.keyed
        if protection.remaining <= 0:
            raise LocalStateError(
                "our key has reached its limit of records, and no key update was completed; open a "
                "new connection"
            )
        if self._update_wanted or not protection.update_due:
            return
        self._update_wanted = True
        if updates.takes_keys:
            records.emit(UpdateWanted())  # our caller has to request a key
        elif not updates.under_way:
            updates.start(records, None, None, "key limit")

    def update_keys(self, records: RecordLayer, *, request: bool) -> None:
        """Change our key, and ask the peer to change its own if ``request``.

        Where Extended Key Update is negotiated, this starts an update without a QKD key.

        Raises:
            LocalStateError: our key has changed 2^48-1 times (section 4.7.3), or
                :meth:`Updates.start` says why not.
        """
        if self.connected.updates is not None:
            self.connected.updates.start(records, None, None, "asked")
            return
        if self._write_generation >= MAX_KEY_UPDATES:
            raise LocalStateError("our key has reached its limit of updates; open a new connection")
        self._answer_update = False
        self._write_generation += 1
        # "Until receiving a subsequent KeyUpdate from the peer, the sender MUST NOT send another
        # KeyUpdate with request_update set to 'update_requested'" (section 4.7.3).
        records.writer.send(KeyUpdate(request and not self._update_requested))
        self._update_requested |= request
        records.writer.update_key()


class ClientTraffic(_Traffic):
    """The client's state: it also receives tickets."""

    def __init__(
        self, connected: Connected, config: ClientConfig, presented: Presented | None
    ) -> None:
        super().__init__(connected, config)
        self._config = config
        self._presented = presented
        self._tickets = 0

    def handle(self, message: Message, raw: bytes, records: RecordLayer) -> Self:
        if not isinstance(message, NewSessionTicket):
            return super().handle(message, raw, records)
        if self.connected.updates is not None:
            # Section 7 of draft-ietf-tls-extended-key-update-13: no resumption. The ticket is
            # ignored, unless another message is required here.
            self.connected.updates.handle(message, raw, records)
            return self
        store, session = self._config.ticket_store, self.connected.session
        resumption = self.connected.resumption
        if store is None or resumption is None:
            # Section 4.7.1: a client that does "not support resumption MUST silently ignore this
            # message".
            return self
        self._tickets += 1
        if self._tickets > records.reader.limits.tickets:
            raise UnexpectedMessage(
                f"the server sent more than {records.reader.limits.tickets} session tickets",
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
            return self  # No ClientHello of ours has room for it.
        ticket = SessionTicket(
            ticket=message.ticket,
            psk=resumption.psk(message.nonce),
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
    """The server's state: it sends tickets with its first data.

    Not earlier: a client that only writes would never read them, and both sides could block on full
    sockets.
    """

    def __init__(
        self,
        connected: Connected,
        config: ServerConfig,
        presented: Presented | None,
        identity: Identity | RawIdentity | None,
    ) -> None:
        super().__init__(connected, config)
        self._config = config
        self._presented = presented
        self._identity = identity
        wanted = connected.resumption is not None
        self._tickets_due = config.tickets_per_connection if wanted else 0

    @property
    def sends_only(self) -> bool:
        """Whether :meth:`send_data` would send nothing but the data."""
        return not self._tickets_due and super().sends_only

    def send_data(self, data: memoryview, records: RecordLayer) -> None:
        """Queue the tickets that are due, then application data."""
        issuer, resumption = self._config.tickets, self.connected.resumption
        while issuer is not None and resumption is not None and self._tickets_due:
            self._tickets_due -= 1
            self._send_ticket(issuer, resumption, records)
        super().send_data(data, records)

    def _send_ticket(
        self, issuer: TicketIssuer, resumption: ResumptionSecret, records: RecordLayer
    ) -> None:
        session, presented = self.connected.session, self._presented
        lifetime = min(issuer.lifetime, remaining_lifetime(self._config, session.began_at))
        if lifetime <= 0:
            return  # The next handshake of this client is a full one.
        nonce = bytes((self._tickets_due,))
        state = TicketState(
            suite=self.connected.suite.code,
            psk=resumption.psk(nonce),
            issued_at=int(issuer.clock()),
            server_name=session.server_name,
            authenticated_by=session.authenticated_by,
            psk_identity=session.psk_identity,
            psk_context=session.psk_context,
            began_at=int(session.began_at),
            binding=self._config.binding(self._identity),
            client_chain=presented.chain if presented is not None else (),
            client_certificate_type=presented.certificate_type if presented is not None else X509,
        )
        ticket = issuer.seal(state)
        if ticket is None:
            return  # The ticket is too long; the next handshake of this client is a full one.
        records.writer.send(
            NewSessionTicket(
                lifetime=lifetime,
                age_add=int.from_bytes(self._config.entropy(4), "big"),
                nonce=nonce,
                ticket=ticket,
                extensions=ext.Extensions(),
            )
        )
