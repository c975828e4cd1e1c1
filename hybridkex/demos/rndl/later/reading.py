"""TLS connections in a capture: the messages in the clear, and the protected records."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Final

from hybridkex.constants import ContentType, HandshakeType
from hybridkex.demos.rndl.capture.pcapng import read_pcapng
from hybridkex.demos.rndl.capture.tcpip import Flow, reassemble
from hybridkex.demos.rndl.later.derivation import SUITES, Suite
from hybridkex.errors import HybridkexError, RecordingError
from hybridkex.wire import extensions as ext
from hybridkex.wire.messages import ClientHello, HelloRetryRequest, ServerHello, decode
from hybridkex.wire.records import RecordBuffer

_MESSAGE_HASH: Final = 254


@dataclass(frozen=True)
class WireRecord:
    number: int
    """Its number in the connection, counting both directions."""
    time: float
    from_client: bool
    type: int
    header: bytes
    fragment: bytes

    @property
    def size(self) -> int:
        return len(self.header) + len(self.fragment)


@dataclass(frozen=True, kw_only=True)
class Connection:
    """One recorded TLS 1.3 connection, parsed up to and including its ServerHello."""

    capture: str
    flow: Flow
    records: tuple[WireRecord, ...]
    """Both directions, in order of time."""
    suite: Suite
    client_hello: ClientHello
    """The ClientHello that ServerHello answers: the second one after a retry."""
    server_hello: ServerHello
    raw_client_hello: bytes
    before: bytes
    """The transcript before that ClientHello: empty, or the retry (section 4.4.1)."""
    raw_server_hello: bytes

    @property
    def hellos(self) -> bytes:
        """The transcript ClientHello...ServerHello."""
        return self.before + self.raw_client_hello + self.raw_server_hello

    @property
    def retried(self) -> bool:
        """Whether there was a HelloRetryRequest."""
        return bool(self.before)

    @property
    def group(self) -> int:
        """The code point of the key exchange."""
        return self._choice.entry.group

    @property
    def shares(self) -> tuple[bytes, bytes]:
        offer = self.client_hello.extensions.get(ext.KeyShareOffer)
        entries = offer.entries if offer is not None else ()
        for entry in entries:
            if entry.group == self.group:
                return entry.share, self._choice.entry.share
        raise RecordingError("a ServerHello without the ClientHello that it answers")

    @property
    def psk_identity(self) -> bytes:
        """The identity of the PSK that the server accepted; empty if none."""
        chosen = self._chosen_psk
        return chosen[0].identity if chosen is not None else b""

    @property
    def psk_is_ticket(self) -> bool:
        """Whether that is a session ticket: other identities have an age of 0.

        RFC 9846 section 4.3.11.1.
        """
        chosen = self._chosen_psk
        return chosen is not None and chosen[0].obfuscated_ticket_age != 0

    @property
    def binder(self) -> bytes:
        """The binder, which proves that the client has that PSK."""
        chosen = self._chosen_psk
        return chosen[1] if chosen is not None else b""

    @property
    def bound(self) -> bytes:
        """The hash of the transcript that binders cover (RFC 9846 section 4.3.11.2)."""
        offer = self.client_hello.extensions.get(ext.PreSharedKeyOffer)
        length = offer.binders_length if offer is not None else 0
        return self.suite.digest(self.before + self.raw_client_hello[:-length])

    @cached_property
    def _chosen_psk(self) -> tuple[ext.OfferedPskIdentity, bytes] | None:
        choice = self.server_hello.extensions.get(ext.PreSharedKeyChoice)
        offer = self.client_hello.extensions.get(ext.PreSharedKeyOffer)
        if choice is None or offer is None or choice.selected >= len(offer.identities):
            return None
        return offer.identities[choice.selected], offer.binders[choice.selected]

    @property
    def _choice(self) -> ext.KeyShareChoice:
        choice = self.server_hello.extensions.get(ext.KeyShareChoice)
        if choice is None:
            raise RecordingError("a ServerHello without a key share")
        return choice

    def protected(self, *, from_client: bool) -> Iterator[WireRecord]:
        for record in self.records:
            if record.from_client == from_client and record.type == ContentType.APPLICATION_DATA:
                yield record


def read_capture(path: Path) -> tuple[list[Connection], list[Flow]]:
    """The TLS 1.3 connections in a capture, and all other TCP connections.

    Raises:
        RecordingError: the file is not a capture.
    """
    connections, others = [], []
    for flow in reassemble(read_pcapng(path)):
        try:
            connections.append(_connection(path.name, flow))
        except HybridkexError:
            others.append(flow)
    return connections, others


def _connection(capture: str, flow: Flow) -> Connection:
    records = tuple(_records(flow))
    clients = _plain_messages(records, from_client=True)
    servers = _plain_messages(records, from_client=False)
    if not clients or not servers:
        raise RecordingError("no handshake")
    server_hello = decode(servers[-1])
    client_hello = decode(clients[-1])
    if not isinstance(server_hello, ServerHello) or not isinstance(client_hello, ClientHello):
        raise RecordingError("no ClientHello with a ServerHello")
    suite = SUITES.get(server_hello.cipher_suite)
    if suite is None:
        raise RecordingError(f"cipher suite {server_hello.cipher_suite:#06x}")
    before = b""
    if len(servers) > 1:
        if not isinstance(decode(servers[0]), HelloRetryRequest):
            raise RecordingError("two ServerHellos")
        digest = suite.digest(clients[0])
        before = bytes((_MESSAGE_HASH, 0, 0, len(digest))) + digest + servers[0]
    connection = Connection(
        capture=capture,
        flow=flow,
        records=records,
        suite=suite,
        client_hello=client_hello,
        server_hello=server_hello,
        raw_client_hello=clients[-1],
        before=before,
        raw_server_hello=servers[-1],
    )
    if not all(connection.shares):  # raises if the hellos do not match
        raise RecordingError("a key share without content")
    return connection


def _records(flow: Flow) -> Iterator[WireRecord]:
    buffers = {True: RecordBuffer(), False: RecordBuffer()}
    number = count()
    for chunk in flow.chunks:
        buffer = buffers[chunk.from_client]
        buffer.feed(chunk.data)
        while (record := buffer.take()) is not None:
            header, fragment = bytes(record.header), bytes(record.fragment)
            yield WireRecord(
                next(number), chunk.time, chunk.from_client, record.type, header, fragment
            )


def _plain_messages(records: tuple[WireRecord, ...], *, from_client: bool) -> list[bytes]:
    """The handshake messages that one side sent in the clear."""
    return split_messages(
        bytearray().join(
            record.fragment
            for record in records
            if record.from_client == from_client and record.type == ContentType.HANDSHAKE
        )
    )


def split_messages(buffer: bytearray) -> list[bytes]:
    """Take complete handshake messages from the front of a buffer."""
    messages = []
    while len(buffer) >= 4 and len(buffer) >= (end := 4 + int.from_bytes(buffer[1:4], "big")):
        messages.append(bytes(buffer[:end]))
        del buffer[:end]
    return messages


def message_name(raw: bytes) -> str:
    """The name of a handshake message in RFC 9846."""
    try:
        name = HandshakeType(raw[0]).name
    except ValueError:
        return f"handshake message {raw[0]}"
    if raw[0] == HandshakeType.SERVER_HELLO and isinstance(decode(raw), HelloRetryRequest):
        return "HelloRetryRequest"
    return name.title().replace("_", "")
