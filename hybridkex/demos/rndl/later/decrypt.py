"""From recordings to plaintext: the attack itself.

For each recorded connection the adversary lists what its keys rest on (the parts of the key
exchange, and the PSK if one was used), tries to find each of these secrets, rebuilds the key
schedule and decrypts the records. If a secret is missing it still tries: with the secret left out,
and with zeros in its place. Between correct parties that decrypts nothing; it exposes a key
schedule that omits one of its legs.

A decrypted connection may contain secrets of another one (a ticket, a QKD key in transit from a
KME), so the attack repeats until no further connection is decrypted.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import product
from typing import Final

from hybridkex.constants import ContentType, HandshakeType, Label
from hybridkex.crypto.kex import ALL_GROUPS, Group
from hybridkex.demos.rndl import toy_curve
from hybridkex.demos.rndl.later import derivation
from hybridkex.demos.rndl.later.derivation import Secrets, TrafficKey
from hybridkex.demos.rndl.later.knowledge import Knowledge, Known
from hybridkex.demos.rndl.later.reading import (
    Connection,
    WireRecord,
    message_name,
    split_messages,
)
from hybridkex.errors import HybridkexError, IllegalParameter, RecordingError
from hybridkex.qkd.psk import name_of
from hybridkex.wire.messages import ImportedIdentity, NewSessionTicket, decode

__all__ = ["Adversary", "Event", "Leg", "Verdict"]

_GROUPS: Final = {group.code: group for group in (*ALL_GROUPS, toy_curve.TOY_GROUP)}
_PSK_LENGTH: Final = 32
"""Length in bytes of a QKD key, to try overheard bytes as a key."""
_MOST_CANDIDATES: Final = 1 << 12
"""Offsets at either end of an overheard stream to try as a key."""

Progress = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Leg:
    """One of the secrets that a connection's keys rest on."""

    kind: str
    """``exchange``, ``qkd``, ``psk`` or ``ticket``."""
    name: str
    how: str | None
    """How it was found; ``None`` if it was not."""
    secret: bytes | None = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class Event:
    """One record on the wire, as far as the adversary can tell."""

    number: int
    time: float
    from_client: bool
    what: str
    size: int
    state: str
    """``clear``, ``decrypted`` or ``protected``."""
    text: str | None = None


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The outcome for one connection."""

    connection: Connection
    legs: tuple[Leg, ...]
    events: tuple[Event, ...]
    decrypted: bool
    to_server: bytes
    """Application data, as far as it was decrypted."""
    to_client: bytes

    @property
    def missing(self) -> tuple[str, ...]:
        """The secrets that were not found."""
        return tuple(leg.name for leg in self.legs if leg.secret is None)

    @property
    def resumed(self) -> bool:
        """Whether the connection resumes another one with a ticket."""
        return any(leg.kind == "ticket" for leg in self.legs)

    def as_json(self) -> dict[str, object]:
        """As plain values; the only secret among them is the plaintext."""
        connection, start = self.connection, self.connection.records[0].time
        group = _GROUPS.get(connection.group)
        return {
            "capture": connection.capture,
            "flow": str(connection.flow),
            "cipher_suite": connection.suite.name,
            "group": group.name if group is not None else f"{connection.group:#06x}",
            "retried": connection.retried,
            "resumed": self.resumed,
            "decrypted": self.decrypted,
            "missing": list(self.missing),
            "legs": [{"kind": leg.kind, "name": leg.name, "how": leg.how} for leg in self.legs],
            "to_server": self.to_server.decode("utf-8", "backslashreplace"),
            "to_client": self.to_client.decode("utf-8", "backslashreplace"),
            "events": [
                {
                    "ms": round((event.time - start) * 1000, 2),
                    "from": "client" if event.from_client else "server",
                    "what": event.what,
                    "size": event.size,
                    "state": event.state,
                    "text": event.text,
                }
                for event in self.events
            ],
        }


class Adversary:
    """Attacks recordings with what it knows.

    Args:
        knowledge: answers of oracles and stolen secrets; it grows.
        progress: called during long computations.
    """

    def __init__(self, knowledge: Knowledge, progress: Progress | None = None) -> None:
        self.knowledge = knowledge
        self._progress = progress
        self._logs: dict[bytes, int] = {}

    def attack(self, connections: Iterable[Connection]) -> list[Verdict]:
        """A verdict on each connection, in order."""
        todo = list(enumerate(connections))
        verdicts: dict[int, Verdict] = {}
        while True:
            for number, connection in todo:
                verdicts[number] = self._attack_one(connection)
            left = [item for item in todo if not verdicts[item[0]].decrypted]
            if len(left) in {0, len(todo)}:
                return [verdicts[number] for number in sorted(verdicts)]
            todo = left

    def _attack_one(self, connection: Connection) -> Verdict:
        legs = (*self._exchange_legs(connection), *self._psk_legs(connection))
        for attempt in _attempts(connection, legs):
            opened = _open(connection, attempt)
            if opened is not None:
                self._learn(connection, opened)
                return Verdict(
                    connection=connection,
                    legs=legs,
                    events=tuple(opened.events),
                    decrypted=True,
                    to_server=bytes(opened.data[True]),
                    to_client=bytes(opened.data[False]),
                )
        return Verdict(
            connection=connection,
            legs=legs,
            events=tuple(_event(record) for record in connection.records),
            decrypted=False,
            to_server=b"",
            to_client=b"",
        )

    # --- the secrets ---------------------------------------------------------------------------

    def _exchange_legs(self, connection: Connection) -> Iterator[Leg]:
        group = _GROUPS.get(connection.group)
        if group is None:
            yield Leg(kind="exchange", name=f"group {connection.group:#06x}", how=None, secret=None)
            return
        for name, offer, answer in _split(group, *connection.shares):
            found: Known | None = None
            with suppress(ValueError, IllegalParameter):  # a share that is none
                if group is toy_curve.TOY_GROUP:
                    found = self._break_toy(offer, answer)
                else:
                    found = self.knowledge.solve(offer, answer)
            yield _leg("exchange", name, found)

    def _break_toy(self, offer: bytes, answer: bytes) -> Known:
        """Compute the client's private key from its public share, without an oracle."""
        if offer not in self._logs:
            self._logs[offer] = toy_curve.discrete_log(toy_curve.decode(offer), self._tell_steps)
        secret = toy_curve.shared_secret(self._logs[offer], toy_curve.decode(answer))
        return Known(secret, "the discrete logarithm of the client's share was computed")

    def _tell_steps(self, what: str, done: int, total: int) -> None:
        if self._progress is not None:
            self._progress(f"{what}: {done:,} of {total:,}")

    def _psk_legs(self, connection: Connection) -> Iterator[Leg]:
        identity = connection.psk_identity
        if not identity:
            return
        imported = ImportedIdentity.decode(identity)
        if imported is None and connection.psk_is_ticket:
            yield _leg("ticket", "PSK of the ticket", self.knowledge.ticket(identity))
            return
        found = self._external_psk(connection, imported=imported is not None)
        name = name_of(imported.external_identity) if imported is not None else None
        if name is None:
            yield _leg("psk", "external PSK", found)
        else:
            yield _leg("qkd", f"QKD key {', '.join(str(part.key_id) for part in name)}", found)

    def _external_psk(self, connection: Connection, *, imported: bool) -> Known | None:
        """Search for the PSK among all keys obtained and all bytes overheard.

        The binder shows whether a candidate is right.
        """
        suite, identity = connection.suite, connection.psk_identity
        label = Label.IMPORTED_BINDER if imported else Label.EXTERNAL_BINDER
        for candidate in self._candidates():
            psk = candidate.secret
            if imported:
                psk = derivation.imported_psk(psk, identity, suite.hash_length)
            if derivation.binder(suite, psk, label, connection.bound) == connection.binder:
                return Known(psk, candidate.how)
        return None

    def _candidates(self) -> Iterator[Known]:
        yield from self.knowledge.qkd_keys
        for stream in self.knowledge.overheard:
            places = range(len(stream) - _PSK_LENGTH + 1)
            for start in {*places[:_MOST_CANDIDATES], *places[-_MOST_CANDIDATES:]}:
                yield Known(stream[start : start + _PSK_LENGTH], "it was overheard in the clear")

    def _learn(self, connection: Connection, opened: "_Opened") -> None:
        """Collect tickets and keys that a KME delivered, for other connections."""
        for ticket, psk in opened.tickets:
            self.knowledge.tickets[ticket] = Known(psk, "read in the connection that it resumes")
        self.knowledge.harvest(bytes(opened.data[False]), connection.capture)


def _leg(kind: str, name: str, found: Known | None) -> Leg:
    return Leg(
        kind=kind,
        name=name,
        how=found.how if found is not None else None,
        secret=found.secret if found is not None else None,
    )


def _split(group: Group, offer: bytes, answer: bytes) -> Iterator[tuple[str, bytes, bytes]]:
    """Name, client's share and server's share of each part of a key exchange."""
    from_client = from_server = 0
    for part in group.exchange.parts:
        to_client, to_server = from_client + part.offer_length, from_server + part.answer_length
        yield part.name, offer[from_client:to_client], answer[from_server:to_server]
        from_client, from_server = to_client, to_server


# --- rebuilding the keys ----------------------------------------------------------------------


def _attempts(connection: Connection, legs: tuple[Leg, ...]) -> Iterator[Secrets]:
    """Key schedules to try: one if all secrets are known, else those of faulty parties."""
    parts = [_guesses(leg) for leg in legs if leg.kind == "exchange"]
    psks = [_psk_guesses(connection, leg) for leg in legs if leg.kind != "exchange"] or [[None]]
    for *shared, psk in product(*parts, *psks):
        pieces = [piece for piece in shared if piece is not None]
        yield Secrets.derive(connection.suite, psk, b"".join(pieces))


def _guesses(leg: Leg) -> list[bytes | None]:
    """A secret, or if it is missing: nothing, and zeros."""
    return [leg.secret] if leg.secret is not None else [None, bytes(32)]


def _psk_guesses(connection: Connection, leg: Leg) -> list[bytes | None]:
    """The same for a PSK, which may also have been imported from nothing or from zeros."""
    if leg.secret is not None or leg.kind == "ticket":
        return [leg.secret]
    identity, suite = connection.psk_identity, connection.suite
    imported = [
        derivation.imported_psk(key, identity, suite.hash_length) for key in (b"", bytes(32))
    ]
    return [None, *imported]


class _Opened:
    """A connection being decrypted, record by record."""

    def __init__(self, connection: Connection, secrets: Secrets) -> None:
        self._suite = connection.suite
        self._secrets = secrets
        self._transcript = bytearray(connection.hellos)
        self._buffers = {True: bytearray(), False: bytearray()}
        client, server = secrets.handshake_keys(self._suite.digest(connection.hellos))
        self.keys: dict[bool, TrafficKey] = {True: client, False: server}
        self._client_application: TrafficKey | None = None
        self._resumption = b""
        self.data = {True: bytearray(), False: bytearray()}
        self.tickets: list[tuple[bytes, bytes]] = []
        self.events: list[Event] = []

    def take(self, record: WireRecord) -> bool:
        """Decrypt the next record of its direction; false on failure."""
        found = self.keys[record.from_client].open(record.header, record.fragment)
        if found is None:
            return False
        type_, content = found
        text: str | None = None
        if type_ == ContentType.APPLICATION_DATA:
            self.data[record.from_client] += content
            what, text = "application data", content.decode("utf-8", "backslashreplace")
        elif type_ == ContentType.HANDSHAKE:
            self._buffers[record.from_client] += content
            messages = split_messages(self._buffers[record.from_client])
            for raw in messages:
                self._message(raw, from_client=record.from_client)
            what = ", ".join(map(message_name, messages)) or "part of a handshake message"
        else:
            what = f"alert {content[-1]}" if content[-1:] != b"\0" else "close_notify"
        self.events.append(_event(record, what, text))
        return True

    def _message(self, raw: bytes, *, from_client: bool) -> None:
        type_ = raw[0]
        if type_ == HandshakeType.KEY_UPDATE:
            self.keys[from_client] = self.keys[from_client].updated()
            return
        if type_ == HandshakeType.NEW_SESSION_TICKET:
            ticket = decode(raw)
            assert isinstance(ticket, NewSessionTicket)
            psk = derivation.ticket_psk(self._suite, self._resumption, ticket.nonce)
            self.tickets.append((ticket.ticket, psk))
            return
        self._transcript += raw
        if type_ == HandshakeType.FINISHED:
            digest = self._suite.digest(bytes(self._transcript))
            if from_client:
                if self._client_application is None:
                    raise RecordingError("the server's Finished is missing")
                self.keys[True] = self._client_application
                self._resumption = self._secrets.resumption_secret(digest)
            else:
                client, server = self._secrets.application_keys(digest)
                self._client_application, self.keys[False] = client, server


def _open(connection: Connection, secrets: Secrets) -> _Opened | None:
    """Decrypt a whole connection; ``None`` if the server's first record cannot be decrypted."""
    opened = _Opened(connection, secrets)
    todo = {side: deque(connection.protected(from_client=side)) for side in (False, True)}
    # A capture may end anywhere; everything before that is read.
    with suppress(HybridkexError):
        for side in (False, True):  # the client's keys follow from the server's flight
            key = opened.keys[side]
            while todo[side] and opened.keys[side] is key and opened.take(todo[side].popleft()):
                pass
        for side in (False, True):
            while todo[side] and opened.take(todo[side].popleft()):
                pass
    if not opened.events:
        return None
    opened.events.extend(
        _event(record)
        for record in connection.records
        if record.type != ContentType.APPLICATION_DATA
    )
    opened.events.sort(key=lambda event: event.number)
    return opened


def _event(record: WireRecord, what: str | None = None, text: str | None = None) -> Event:
    """A record in the timeline; ``what`` describes its content if it was decrypted."""
    clear = record.type != ContentType.APPLICATION_DATA
    state = "clear" if clear else "protected" if what is None else "decrypted"
    if what is None:
        if record.type == ContentType.HANDSHAKE:
            messages = split_messages(bytearray(record.fragment))
            what = ", ".join(map(message_name, messages)) or "part of a handshake message"
        elif record.type == ContentType.CHANGE_CIPHER_SPEC:
            what = "change_cipher_spec"
        else:
            what = "alert" if clear else "protected record"
    return Event(
        number=record.number,
        time=record.time,
        from_client=record.from_client,
        what=what,
        size=record.size,
        state=state,
        text=text,
    )
