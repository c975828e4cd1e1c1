"""From recordings to plaintext: the attack itself.

For each recorded connection the adversary lists the secrets that its keys are derived from, its
*legs* (the parts of the key exchange, and the PSK if one was used), tries to find each of these
secrets, rebuilds the key schedule and decrypts the records. If a secret is missing it still tries:
with the secret left out, and with zeros in its place. Between correct parties that decrypts
nothing; it exposes a key schedule that omits one of its legs.

A decrypted connection may contain secrets of another one (a ticket, a QKD key in transit from a
KME), so the attack repeats until no further connection is decrypted.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Final

from hybridkex.constants import ContentType, HandshakeType, Label, UpdateType
from hybridkex.crypto.kex import ALL_GROUPS, Group
from hybridkex.demos.rndl import toy_curve
from hybridkex.demos.rndl.later import derivation
from hybridkex.demos.rndl.later.derivation import Chain, Secrets, TrafficKey
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
from hybridkex.wire.update_messages import (
    FreshRequest,
    FreshResponse,
    SlotAnswer,
    UpdateRequest,
    UpdateResponse,
)

_GROUPS: Final = {group.code: group for group in (*ALL_GROUPS, toy_curve.TOY_GROUP)}
_PSK_LENGTH: Final = 32
"""Length in bytes of a QKD key, to try overheard bytes as a key."""
_MOST_CANDIDATES: Final = 1 << 12
"""Offsets at either end of an overheard stream to try as a key."""

Progress = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Leg:
    """One of the secrets that a connection's keys are derived from."""

    kind: str
    """``exchange``, ``qkd``, ``psk`` or ``ticket``; those of a key update ``update-exchange`` and
    ``update-qkd``; ``session`` for the stolen secrets of a session."""
    name: str
    how: str | None
    """The means by which it was found; ``None`` if it was not."""
    secret: bytes | None = field(repr=False)
    needed: bool = True
    """Whether it is needed: if the session was stolen, the secrets of the handshake are not."""


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
        return tuple(leg.name for leg in self.legs if leg.secret is None and leg.needed)

    @property
    def resumed(self) -> bool:
        return any(leg.kind == "ticket" for leg in self.legs)

    def as_json(self) -> dict[str, object]:
        """Plain values; the only secret among them is the plaintext."""
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
        stolen = self.knowledge.sessions.get(connection.client_hello.random)
        if stolen is not None:
            legs = (
                *(replace(leg, needed=False) for leg in legs),
                Leg(kind="session", name="session secrets", how="they were stolen", secret=b""),
            )
        for start in self._starts(connection, legs, stolen):
            opened = _open(connection, start)
            if opened is not None:
                self._learn(connection, opened)
                return Verdict(
                    connection=connection,
                    legs=(*legs, *opened.update_legs),
                    events=tuple(opened.events),
                    decrypted=not opened.stuck,
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

    def _starts(
        self, connection: Connection, legs: tuple[Leg, ...], stolen: dict[str, bytes] | None
    ) -> "Iterator[_Opened]":
        """The starting points of the decryption: stolen secrets, or each key schedule."""
        if stolen is not None:
            yield _Opened(connection, self._update_options).from_stolen(stolen)
            return
        for attempt in _attempts(connection, legs):
            yield _Opened(connection, self._update_options).from_handshake(attempt)

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

    # --- key updates ---------------------------------------------------------------------------

    def _update_options(
        self, connection: Connection, request: bytes, response: bytes
    ) -> "tuple[list[Leg], list[_Option]]":
        """The legs of a key update, and every pair of secrets that may be in it: those of honest
        parties where all is known, and of faulty ones."""
        asked, answered = decode(request), decode(response)
        assert isinstance(asked, UpdateRequest | FreshRequest)
        assert isinstance(answered, UpdateResponse | FreshResponse)
        group = _GROUPS[connection.group]
        legs, parts = [], list[list[bytes | None]]()
        for name, offer, answer in _split(group, asked.key_share.share, answered.key_share.share):
            found = self.knowledge.solve(offer, answer)
            legs.append(_leg("update-exchange", f"{name} of the key update", found))
            parts.append(_guesses(legs[-1]))
        slots: list[tuple[bytes | None, Known | None]] = [(None, None)]
        if isinstance(asked, FreshRequest):
            assert isinstance(answered, FreshResponse)
            size = connection.suite.hash_length
            slots = [(bytes(size), None)]
            if answered.answer is SlotAnswer.USED:
                imported = ImportedIdentity.decode(asked.identity)
                parts_of_key = name_of(imported.external_identity) if imported is not None else None
                ids = ", ".join(part.key_id for part in parts_of_key or ())
                legs.append(_leg("update-qkd", f"QKD key {ids} of the key update", None))
                for one in (*self._candidates(), Known(b"", ""), Known(bytes(32), "")):
                    psk = derivation.imported_psk(one.secret, asked.identity, size)
                    slots.append((psk, one if one.how else None))
                slots.append((None, None))  # a schedule without the slot
        options = []
        for shared in product(*parts):
            secret = b"".join(piece for piece in shared if piece is not None)
            options += [_Option(secret, slot, known) for slot, known in slots]
        return legs, options

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
    """A PSK, or if it is missing: nothing, and PSKs imported from nothing and from zeros."""
    if leg.secret is not None or leg.kind == "ticket":
        return [leg.secret]
    identity, suite = connection.psk_identity, connection.suite
    imported = [
        derivation.imported_psk(key, identity, suite.hash_length) for key in (b"", bytes(32))
    ]
    return [None, *imported]


@dataclass(frozen=True)
class _Option:
    """Secrets that may be in a key update."""

    shared: bytes
    slot: bytes | None
    qkd_key: Known | None
    """The QKD key that the slot was made of."""


_Epoch = tuple[dict[bool, TrafficKey], Chain, _Option]
_Options = Callable[[Connection, bytes, bytes], tuple[list[Leg], list[_Option]]]


class _Opened:
    """A connection being decrypted, record by record."""

    def __init__(self, connection: Connection, options: _Options) -> None:
        self._connection = connection
        self._options = options
        self._suite = connection.suite
        self._secrets: Secrets | None = None
        self._transcript = bytearray(connection.hellos)
        self._buffers = {True: bytearray(), False: bytearray()}
        self.keys: dict[bool, list[TrafficKey]] = {True: [], False: []}
        """The key of each direction, or its candidates."""
        self.begun = False
        """Whether records are to be opened from the first on; else until one opens."""
        self._client_application: TrafficKey | None = None
        self._server_finished = b""
        self._resumption = b""
        self._chain: Chain | None = None
        self._request = (b"", False)
        self._epochs: list[_Epoch] = []
        """The candidates for the epoch after a key update, until a record shows which it is."""
        self.update_legs: list[Leg] = []
        self.stuck = False
        """Whether no key of the new epoch could be found."""
        self.data = {True: bytearray(), False: bytearray()}
        self.tickets: list[tuple[bytes, bytes]] = []
        self.events: list[Event] = []

    def from_handshake(self, secrets: Secrets) -> "_Opened":
        """Begin with the handshake's keys."""
        self._secrets, self.begun = secrets, True
        client, server = secrets.handshake_keys(self._suite.digest(self._connection.hellos))
        self.keys = {True: [client], False: [server]}
        return self

    def from_stolen(self, stolen: dict[str, bytes]) -> "_Opened":
        """Begin with the traffic secrets of an epoch, wherever that begins."""
        self.keys = {
            side: [TrafficKey(self._suite, stolen[name])]
            for side, name in ((True, "client"), (False, "server"))
        }
        self._resumption = stolen.get("resumption", b"")
        if "salt" in stolen:
            self._chain = Chain(
                self._suite, stolen["salt"], stolen["transcript"], stolen["exporter"]
            )
        return self

    def take(self, record: WireRecord) -> bool:
        """Decrypt the next record of its direction; false on failure."""
        found = self._decrypt(record)
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

    def _decrypt(self, record: WireRecord) -> tuple[int, bytes] | None:
        side = record.from_client
        for key in self.keys[side]:
            found = key.open(record.header, record.fragment)
            if found is not None:
                for epoch in self._epochs if self.stuck else ():
                    if epoch[0][side] is key:
                        self._choose(epoch, other=not side)
                self.keys[side] = [key]
                return found
        return None

    def _choose(self, epoch: "_Epoch", *, other: bool) -> None:
        """A record shows which epoch it is."""
        keys, self._chain, option = epoch
        if len(self.keys[other]) > 1:
            self.keys[other] = [keys[other]]
        self._epochs, self.stuck = [epoch], False
        last = self.update_legs[-1]
        if last.kind == "update-qkd" and option.qkd_key is not None:
            self.update_legs[-1] = _leg(last.kind, last.name, option.qkd_key)

    def _message(self, raw: bytes, *, from_client: bool) -> None:
        type_ = raw[0]
        if type_ == HandshakeType.KEY_UPDATE:
            self.keys[from_client] = [self.keys[from_client][0].updated()]
            return
        if type_ == HandshakeType.EXTENDED_KEY_UPDATE:
            self._update(raw, from_client=from_client)
            return
        if type_ == HandshakeType.NEW_SESSION_TICKET:
            ticket = decode(raw)
            assert isinstance(ticket, NewSessionTicket)
            psk = derivation.ticket_psk(self._suite, self._resumption, ticket.nonce)
            self.tickets.append((ticket.ticket, psk))
            return
        self._transcript += raw
        if type_ == HandshakeType.FINISHED:
            assert self._secrets is not None  # or the handshake's records would not open
            digest = self._suite.digest(bytes(self._transcript))
            if from_client:
                if self._client_application is None:
                    raise RecordingError("the server's Finished is missing")
                self.keys[True] = [self._client_application]
                self._resumption = self._secrets.resumption_secret(digest)
                self._chain = self._secrets.chain(self._server_finished, digest)
            else:
                client, server = self._secrets.application_keys(digest)
                self._server_finished = digest
                self._client_application, self.keys[False] = client, [server]

    def _update(self, raw: bytes, *, from_client: bool) -> None:
        """A message of an Extended Key Update; none of them cross in what was recorded."""
        subtype = raw[4]
        if subtype in (UpdateType.REQUEST, UpdateType.FRESH_REQUEST):
            self._request = raw, from_client
        elif subtype in (UpdateType.RESPONSE, UpdateType.FRESH_RESPONSE):
            if self._chain is None:
                raise RecordingError("a key update before the handshake is complete")
            legs, options = self._options(self._connection, self._request[0], raw)
            self.update_legs += legs
            self._epochs = [
                (*self._chain.next(self._request[0], raw, one.shared, one.slot), one)
                for one in options
            ]
            self.stuck = True  # until a record opens
            self.keys[from_client] = [keys[from_client] for keys, _, _ in self._epochs]
        elif subtype == UpdateType.FINISH:
            self.keys[from_client] = [keys[from_client] for keys, _, _ in self._epochs]


def _open(connection: Connection, opened: _Opened) -> _Opened | None:
    """Decrypt a whole connection; ``None`` if the first record cannot be decrypted."""
    todo = {side: deque(connection.protected(from_client=side)) for side in (False, True)}
    # A capture may end anywhere; everything before that is read.
    with suppress(HybridkexError):
        if opened.begun:
            for side in (False, True):  # the client's keys follow from the server's flight
                key = opened.keys[side]
                while todo[side] and opened.keys[side] == key and opened.take(todo[side].popleft()):
                    pass
        else:
            for side in (False, True):
                while todo[side] and not opened.take(todo[side].popleft()):
                    pass  # a record before the epoch of the stolen secrets
        # A key update takes messages of both directions: in the order on the wire.
        rest = sorted((*todo[True], *todo[False]), key=lambda record: record.number)
        broken: set[bool] = set()
        for record in rest:
            if record.from_client not in broken and not opened.take(record):
                broken.add(record.from_client)
    if not opened.events:
        return None
    seen = {event.number for event in opened.events}
    opened.events.extend(
        _event(record) for record in connection.records if record.number not in seen
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
