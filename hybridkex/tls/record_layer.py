"""The record layer (RFC 9846 section 5): records to messages and data, and back.

The states of the handshake read and write messages through the two halves of a :class:`RecordLayer`
and change their keys; they never see a record. The rules of RFC 9846 section 5 are all here: what
may be fragmented, what may be empty, what may come between two fragments of a message, and how much
is buffered.
"""

from collections import deque
from collections.abc import Callable, Mapping
from io import BytesIO
from typing import Final, TypeAlias

from hybridkex.constants import (
    LEGACY_VERSION,
    MAX_PLAINTEXT,
    PAD_RECORD,
    Alert,
    ContentType,
    HandshakeType,
)
from hybridkex.crypto.one_time_pad import OVERHEAD, Pad
from hybridkex.crypto.schedule import TrafficSecret
from hybridkex.errors import (
    BadRecordMac,
    DecodeError,
    IllegalParameter,
    InternalError,
    PeerError,
    UnexpectedMessage,
)
from hybridkex.reasons import Reason
from hybridkex.secret import Secret
from hybridkex.tls.config import ClientConfig, Limits, ServerConfig
from hybridkex.tls.events import Event
from hybridkex.tls.protection import (
    SMALL,
    Padding,
    ReadProtection,
    WriteProtection,
    content_length,
    plaintext_records,
)
from hybridkex.wire.layout import Message
from hybridkex.wire.messages import HEADER_LENGTH, encode
from hybridkex.wire.records import Record, RecordBuffer

_HANDSHAKE: Final = int(ContentType.HANDSHAKE)
_APPLICATION: Final = int(ContentType.APPLICATION_DATA)
_ALERT: Final = int(ContentType.ALERT)
_CERTIFICATE: Final = int(HandshakeType.CERTIFICATE)
_CHANGE_CIPHER_SPEC: Final = plaintext_records(ContentType.CHANGE_CIPHER_SPEC, b"\x01")

# Early data that we skip: a client may send as much as its ticket allows (section 4.3.10). Our
# tickets allow none, so the ticket is another server's; the figure is BoringSSL's.
_MAX_SKIPPED_EARLY_DATA: Final = 16384

_LONGEST: Final[Mapping[int, int]] = {
    HandshakeType.CLIENT_HELLO: 1 << 17,  # two or three key shares of up to 64 KiB
    HandshakeType.SERVER_HELLO: (1 << 16) + 512,
    HandshakeType.NEW_SESSION_TICKET: (1 << 16) + 1024,
    HandshakeType.CERTIFICATE_VERIFY: (1 << 16) + 16,
    HandshakeType.FINISHED: 64,
    HandshakeType.KEY_UPDATE: 1,
    HandshakeType.EXTENDED_KEY_UPDATE: 1 << 17,  # a key share and the identity of a QKD key
}
_LONGEST_OTHER: Final = 1 << 16


class DataItem:
    __slots__ = ("data",)

    def __init__(self, data: bytes) -> None:
        self.data = data


class AlertItem:
    __slots__ = ("description", "level")

    def __init__(self, level: int, description: int) -> None:
        self.level = level
        self.description = description


def _buffer_of(size: int) -> BytesIO:
    """A buffer for decryption that becomes ``bytes`` without a copy.

    ``BytesIO`` keeps its content in a ``bytes`` object, which ``getvalue`` returns without a copy
    once no view of it is left.
    """
    buffer = BytesIO()
    if size:
        buffer.seek(size - 1)
        buffer.write(b"\0")
    return buffer


Item: TypeAlias = bytes | DataItem | AlertItem
"""A received item: a whole handshake message with its header, application data, or an alert."""


class WritingHalf:
    """The sending half: turns messages and data into records under our key."""

    def __init__(self, padding: Padding | None) -> None:
        self.protection: WriteProtection | None = None
        self.record_limit = MAX_PLAINTEXT
        """The maximum number of content bytes in a record that the peer accepts."""
        self.change_cipher_spec_due = False
        """Whether the compatibility record precedes our next record, even a fatal alert. It is not
        sent at once: if both ends send at the same time, both could block."""
        self.closed = False
        """Whether close_notify or a fatal alert has been sent: nothing may follow."""
        self.pad: Pad | None = None
        """The one-time pad of our direction, if negotiated."""
        self._updates_early = False
        self._padding = padding
        self._outgoing: list[bytes | bytearray] = []
        self._flight = bytearray()
        self._change_cipher_spec_sent = False

    @property
    def keyed(self) -> WriteProtection:
        """The protection under our key. Without a key, application data is never sent.

        Raises:
            InternalError: there is no key yet.
        """
        if self.protection is None:
            raise InternalError("application data or a key update before there is a key")
        return self.protection

    def send(self, message: Message) -> bytes:
        """Queue a handshake message; returns its bytes for the transcript."""
        raw = encode(message)
        self.send_raw(raw)
        return raw

    def send_raw(self, raw: bytes) -> None:
        self._flight += raw

    def flush(self, version: int = LEGACY_VERSION) -> None:
        """End the flight: its messages share records (section 5.1)."""
        if self._flight:
            flight = bytes(self._flight)
            self._flight.clear()
            self._emit(ContentType.HANDSHAKE, flight, version)

    def send_change_cipher_spec(self) -> None:
        """Queue the record that makes TLS 1.3 look like TLS 1.2 (appendix E.4), once per
        connection."""
        if self._change_cipher_spec_sent:
            return
        self._change_cipher_spec_sent = True
        self.flush()
        self._outgoing.append(_CHANGE_CIPHER_SPEC)

    def send_alert(self, alert: Alert) -> None:
        """Queue an alert; all alerts except close_notify and user_canceled are fatal (section
        6)."""
        self._flight.clear() if self.protection is None else self.flush()
        warning = alert in (Alert.CLOSE_NOTIFY, Alert.USER_CANCELED)
        self.closed |= alert != Alert.USER_CANCELED
        content = bytes((1 if warning else 2, alert))
        if self.pad is None or not self.pad.begun:
            self._emit(ContentType.ALERT, content)
        elif self.pad.covers(len(content) + OVERHEAD):
            self._seal_with(self.pad, _ALERT, content)
        if self.pad is not None and self.closed:
            self.pad.erase()

    def send_data(self, data: memoryview) -> None:
        """Queue application data; the caller ensures that the one-time pad, if there is one, is
        long enough.

        Raises:
            LocalStateError: the pad is too short.
        """
        keyed = self.keyed
        self.flush()
        if self.pad is None:
            self._outgoing.append(keyed.seal(_APPLICATION, data, self.record_limit))
            return
        size = self.record_limit - OVERHEAD
        for start in range(0, len(data), size):
            self._seal_with(self.pad, _APPLICATION, data[start : start + size])

    def _seal_with(self, pad: Pad, type_: int, content: bytes | memoryview) -> None:
        """Queue one record under the pad, which the present key encrypts again."""
        sealed = memoryview(pad.seal(type_, content))
        self._outgoing.append(self.keyed.seal(PAD_RECORD, sealed, self.record_limit))

    def change_key(self, traffic: TrafficSecret) -> None:
        """Change the key of our direction."""
        self.flush()
        self.protection = WriteProtection(traffic, self._padding)
        if self._updates_early:
            self.protection.update_early()

    def update_early(self) -> None:
        """Make updates due long before a key's limit, because from now on an update takes a round
        trip."""
        self._updates_early = True
        self.keyed.update_early()

    def update_key(self) -> None:
        """Our next key (section 7.2)."""
        self.flush()
        self.protection = self.keyed.updated()

    @property
    def seal_one(self) -> Callable[[bytes], bytes | None] | None:
        """:meth:`WriteProtection.seal_one`, if a record may be sent at once; otherwise ``None``."""
        protection = self.protection
        if (
            protection is None
            or self.pad is not None
            or protection.padding is not None
            or self.record_limit < SMALL
            or self.change_cipher_spec_due
            or self._outgoing
            or self._flight
        ):
            return None
        return protection.seal_one

    @property
    def has_output(self) -> bool:
        return bool(self._outgoing or self._flight)

    def take_output(self) -> bytes | bytearray:
        self.flush()
        outgoing = self._outgoing
        if len(outgoing) == 1:
            return outgoing.pop()
        data = b"".join(outgoing)
        outgoing.clear()
        return data

    def release(self) -> None:
        """Discard the keys and the queued records."""
        self.protection = None
        self.closed = True
        self._outgoing.clear()
        self._flight.clear()
        if self.pad is not None:
            self.pad.erase()

    def _emit(self, type_: ContentType, content: bytes, version: int = LEGACY_VERSION) -> None:
        if self.change_cipher_spec_due:
            self.change_cipher_spec_due = False
            self.send_change_cipher_spec()
        if self.protection is None:
            self._outgoing.append(plaintext_records(type_, content, version))
        else:
            self._outgoing.append(
                self.protection.seal(type_, memoryview(content), self.record_limit)
            )


class ReadingHalf:
    """The receiving half: turns records under the peer's key into messages, data and alerts."""

    def __init__(self, limits: Limits) -> None:
        self.incoming = RecordBuffer()
        self.protection: ReadProtection | None = None
        self.limits = limits
        self.data_allowed = False
        """Whether application data may arrive: once the handshake is complete."""
        self.confirmation_due = False
        """Whether the peer must confirm a new key before it may send data under it."""
        self.pad: Pad | None = None
        """The one-time pad of the peer's direction, if negotiated."""
        self.pad_keys_due = 0
        """The number of keys that the peer has appended to it and that we have not looked up
        yet."""
        self.change_cipher_spec_allowed = False
        """Whether the compatibility record may arrive (appendix E.4)."""
        self._inner_limit = MAX_PLAINTEXT + 1
        self._message = bytearray()
        self._stashed: tuple[int, bytes] | None = None
        self._deferred: PeerError | None = None
        self._empty_records = 0  # consecutive, under one key
        self._early_data_budget = 0
        self._skip_unprotected = False

    def change_key(self, traffic: TrafficSecret) -> None:
        """Change the key of the peer's direction."""
        self.check_message_boundary()
        self.protection = ReadProtection(traffic, self._inner_limit)
        self._empty_records = 0

    def release(self) -> None:
        """Discard the keys and the received items that were not taken."""
        self.protection = self._stashed = self._deferred = None
        self.incoming = RecordBuffer()
        self._message = bytearray()
        if self.pad is not None:
            self.pad.erase()

    def limit_records(self, inner_limit: int) -> None:
        """Set the maximum of content and type in a record, in bytes, that the peer was told (RFC
        8449)."""
        self._inner_limit = inner_limit
        if self.protection is not None:
            self.protection.limit = inner_limit

    def update_key(self) -> None:
        """The peer's next key (section 7.2)."""
        self.check_message_boundary()
        if self.protection is None:
            raise InternalError("the peer's key is updated before it is set")
        self.protection = self.protection.updated()

    def check_message_boundary(self) -> None:
        """Check that no message straddles a change of keys (section 5.1)."""
        if self._message:
            raise UnexpectedMessage(
                "handshake bytes after the last message before a key change",
                Reason.KEY_CHANGE_WITHIN_RECORD,
            )

    def skip_early_data(self, *, after_retry: bool) -> None:
        """Ignore the early data of a client, which we never accept (section 4.3.10).

        After HelloRetryRequest these records have another type than the second ClientHello;
        otherwise they are records that do not decrypt.
        """
        self._early_data_budget = _MAX_SKIPPED_EARLY_DATA
        self._skip_unprotected = after_retry

    def stop_skipping_early_data(self) -> None:
        """The second ClientHello has arrived."""
        self._early_data_budget = 0
        self._skip_unprotected = False

    @property
    def open_one(self) -> Callable[[memoryview, memoryview], bytes | None] | None:
        """:meth:`ReadProtection.open_one`, if a record of application data may come next and would
        change only the number of records; otherwise ``None``."""
        if (
            self.protection is None
            or self.pad is not None
            or not self.data_allowed
            or self.confirmation_due
            or self._message
            or self._stashed is not None
            or self._deferred is not None
            or self._empty_records
            or self._early_data_budget
            or self.incoming.pending
        ):
            return None
        return self.protection.open_one

    @property
    def has_unread(self) -> bool:
        """Whether bytes have arrived that :meth:`next_item` has not returned."""
        return bool(
            self.incoming.pending
            or self._message
            or self._stashed is not None
            or self._deferred is not None
        )

    @property
    def waits_for_pad(self) -> bool:
        """Whether the next record needs pad from keys that we have not looked up yet."""
        return (
            self._stashed is not None
            and self._stashed[0] == PAD_RECORD
            and self.pad is not None
            and self.pad_keys_due > 0
            and not self.pad.covers(len(self._stashed[1]))
        )

    def next_item(self) -> Item | None:
        """The next complete item, or ``None``."""
        while True:
            if self._message:
                message = self._take_message()
                if message is not None:
                    return message
            if self._deferred is not None:
                raise self._deferred
            if self._stashed is not None:
                if self.waits_for_pad:
                    self.incoming.keep()
                    return None
                type_, content = self._stashed
                self._stashed = None
            else:
                record = self.incoming.take()
                if record is None:
                    return None
                if self.protection is not None:
                    opened = self._open(self.protection, record)
                    if isinstance(opened, DataItem):
                        return opened
                    continue
                if self._is_skipped(record):
                    continue
                type_, content = record.type, bytes(record.fragment)
            item = self._content(type_, content)
            if item is not None:
                return item

    def _is_skipped(self, record: Record) -> bool:
        """Whether an unprotected record is to be ignored."""
        if record.type == ContentType.CHANGE_CIPHER_SPEC:
            self._check_change_cipher_spec(record)
            return True
        if self._skip_unprotected and record.type == _APPLICATION:
            self._spend_early_data(len(record.fragment))
            return True
        return False

    def _padded(self, pad: Pad, sealed: bytes) -> tuple[int, bytes]:
        """The content of a record under the one-time pad: application data or an alert."""
        if not pad.covers(len(sealed)):
            raise UnexpectedMessage(
                "a record needs more one-time pad than the keys that the peer named provide",
                Reason.PAD_MISSING,
            )
        type_, content = pad.open(sealed)
        if type_ not in (_APPLICATION, _ALERT):
            raise UnexpectedMessage(
                f"a record of type {type_} under the one-time pad", Reason.RECORD_TYPE
            )
        return type_, content

    def _content(self, type_: int, content: bytes) -> Item | None:
        """The content of a record that is not application data under the traffic key alone."""
        if self.pad is not None and type_ == PAD_RECORD:
            type_, content = self._padded(self.pad, content)
            if type_ == _APPLICATION:
                self._check_data(len(content))
                return DataItem(content) if content else None
        elif self.pad is not None and type_ == _ALERT and self.pad.begun:
            raise UnexpectedMessage(
                "an alert that is not protected by the one-time pad", Reason.PAD_MISSING
            )
        if type_ == _HANDSHAKE:
            if not content:
                raise UnexpectedMessage(
                    "an empty handshake record", Reason.RECORD_EMPTY
                )  # section 5.1
            self._message += content
            return None
        if self._message:
            raise UnexpectedMessage(
                "another record between the fragments of a handshake message",
                Reason.RECORD_INTERLEAVED,
            )
        if type_ == _ALERT:
            if not content:
                # Section 5.4: "Implementations MUST NOT send Handshake and Alert records that have
                # a zero-length TLSInnerPlaintext.content; if such a message is received, the
                # receiving implementation MUST terminate the connection with an
                # 'unexpected_message' alert."
                raise UnexpectedMessage("an empty alert record", Reason.RECORD_EMPTY)
            if len(content) != 2:
                raise DecodeError(f"an alert of {len(content)} bytes")
            if content[0] not in (1, 2):
                raise IllegalParameter(f"an alert of level {content[0]}", Reason.ALERT_LEVEL)
            return AlertItem(content[0], content[1])
        raise UnexpectedMessage(f"a record of type {type_} is not allowed here", Reason.RECORD_TYPE)

    def _open(  # noqa: C901  # section 5 has as many cases
        self, read: ReadProtection, first: Record
    ) -> DataItem | None:
        """Decrypt a record and all the application data that follows it, into one buffer.

        Whatever follows the data, an error too, is kept until the data has been taken, so that the
        result does not depend on how the bytes were split on arrival.
        """
        record: Record | None = first
        buffer = _buffer_of(len(first.fragment) + self.incoming.pending)
        view = buffer.getbuffer()
        filled = 0
        try:
            while record is not None:
                if record.type == ContentType.CHANGE_CIPHER_SPEC:
                    self._check_change_cipher_spec(record)
                    record = self.incoming.take()
                    continue
                if record.type != _APPLICATION:
                    self._stashed = self._unprotected(read, record)
                    break
                try:
                    end = filled + read.open(record, view[filled:])
                except BadRecordMac:
                    if self._early_data_budget and not read.opened:
                        self._spend_early_data(len(record.fragment))
                        record = self.incoming.take()
                        continue
                    raise
                self._early_data_budget = 0
                length = content_length(view[filled:end])
                if length < 0:
                    raise UnexpectedMessage(
                        "a record whose inner plaintext has only zeros", Reason.RECORD_EMPTY
                    )  # section 5.4
                end = filled + length
                type_ = view[end]
                if type_ != _APPLICATION:
                    self._stashed = (type_, bytes(view[filled:end]))
                    break
                if self.pad is not None:
                    raise UnexpectedMessage(
                        "application data that is not protected by the one-time pad",
                        Reason.PAD_MISSING,
                    )
                self._check_data(length)
                more = read.open_data(self.incoming, view[end:])
                if more:
                    self._empty_records = 0
                filled = end + more
                record = self.incoming.take()
        except PeerError as error:
            # The error's traceback holds pieces of the buffer. A BytesIO that the garbage collector
            # meets while a piece of it is held crashes Python 3.12 and disturbs 3.13.
            error.__context__ = None
            error.__traceback__ = None
            data = bytes(view[:filled])
            view.release()
            if not filled:
                raise
            self._deferred = error
            return DataItem(data)
        if not filled:
            return None
        view.release()
        buffer.truncate(filled)
        return DataItem(buffer.getvalue())

    def _check_data(self, length: int) -> None:
        if not self.data_allowed:
            raise UnexpectedMessage(
                "application data before the handshake is complete", Reason.DATA_TOO_EARLY
            )
        if self.confirmation_due:
            raise UnexpectedMessage(
                "application data under a new key before the peer confirmed that key",
                Reason.UPDATE_NOT_CONFIRMED,
            )
        if self._message:
            raise UnexpectedMessage(
                "application data between the fragments of a handshake message",
                Reason.RECORD_INTERLEAVED,
            )
        self._empty_records = 0 if length else self._empty_records + 1
        if self._empty_records > self.limits.empty_records:
            raise UnexpectedMessage("too many empty records", Reason.RECORDS_EMPTY_TOO_MANY)

    def _unprotected(self, read: ReadProtection, record: Record) -> tuple[int, bytes]:
        """An unprotected record where a protected one is required.

        A peer that could not process our ServerHello has no keys for its alert, so an unprotected
        alert is accepted until the first record has been decrypted. An attacker who can forge one
        can cut the connection anyway.
        """
        if record.type == _ALERT and not read.opened and not self.data_allowed:
            return record.type, bytes(record.fragment)
        raise UnexpectedMessage(
            "an unprotected record where a protected one is required", Reason.RECORD_UNPROTECTED
        )

    def _check_change_cipher_spec(self, record: Record) -> None:
        """Section 5: a change_cipher_spec of the single byte 1 may come "at any time after the
        first ClientHello message has been sent or received and before the peer's Finished message
        has been received", and is dropped without further processing. Between the records of early
        data that is skipped too."""
        if not self.change_cipher_spec_allowed or bytes(record.fragment) != b"\x01":
            raise UnexpectedMessage("change_cipher_spec is not allowed here", Reason.RECORD_TYPE)
        if self._message:
            raise UnexpectedMessage(
                "change_cipher_spec between the fragments of a message", Reason.CHANGE_CIPHER_SPEC
            )
        self._empty_records += 1
        if self._empty_records > self.limits.empty_records:
            raise UnexpectedMessage(
                "too many change_cipher_spec records", Reason.CHANGE_CIPHER_SPEC
            )

    def _spend_early_data(self, length: int) -> None:
        if length > self._early_data_budget:
            raise UnexpectedMessage("more early data than the limit", Reason.EARLY_DATA_TOO_MUCH)
        self._early_data_budget -= length

    def _take_message(self) -> bytes | None:
        """The next whole handshake message; its length is checked before the rest is buffered."""
        message = self._message
        if len(message) < HEADER_LENGTH:
            return None
        length = int.from_bytes(message[1:HEADER_LENGTH], "big")
        type_ = message[0]
        limit = _LONGEST.get(type_, _LONGEST_OTHER)
        if type_ == _CERTIFICATE:
            limit = self.limits.certificate_message
        if length > limit:
            raise IllegalParameter(
                f"a handshake message of type {type_} with {length} bytes, where {limit} are "
                "allowed",
                Reason.MESSAGE_TOO_LONG,
            )
        end = HEADER_LENGTH + length
        if len(message) < end:
            return None
        raw = bytes(message[:end])
        del message[:end]
        return raw


class RecordLayer:
    """The record layer of one connection, both directions, with its queue of events."""

    def __init__(self, config: ClientConfig | ServerConfig) -> None:
        self.reader = ReadingHalf(config.limits)
        self.writer = WritingHalf(config.padding)
        self.events: deque[Event] = deque()
        self.client_random = b""
        """Identifies the connection in the key log."""
        self._key_log = config.key_log

    def emit(self, event: Event) -> None:
        self.events.append(event)

    def release(self) -> None:
        """Discard the keys of both directions and everything queued."""
        self.events.clear()
        self.reader.release()
        self.writer.release()

    def log_secret(self, label: str, secret: Secret) -> None:
        """Write a line to the key log, if one is configured."""
        if self._key_log is not None:
            self._key_log(f"{label} {self.client_random.hex()} {secret.reveal().hex()}")
