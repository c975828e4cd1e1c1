"""Bytes to messages and back; whatever else comes is refused with a typed error."""

import contextlib

import pytest
from extension_tables import VALUES, blobs, codes, entries, offers, u8s, u16s, u32s
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hybridkex.constants import HELLO_RETRY_RANDOM, ExtensionType, HandshakeType
from hybridkex.errors import (
    DecodeError,
    IllegalParameter,
    PeerError,
    RecordOverflow,
    UnexpectedMessage,
)
from hybridkex.wire import codec, messages
from hybridkex.wire import extensions as ext
from hybridkex.wire import update_messages as updates
from hybridkex.wire.codec import Reader
from hybridkex.wire.extensions import Extensions, MessageKind
from hybridkex.wire.records import RecordBuffer, header

# --- strategies: every class of wire/, with values that it may have -------------------------------

KNOWN = {int(type_) for type_ in ExtensionType}
unknown = st.builds(ext.UnknownExtension, u16s.filter(lambda t: t not in KNOWN), st.binary())


@st.composite
def extensions(draw: st.DrawFn, kind: MessageKind) -> Extensions:
    """Any set of extensions that may stand in a message of this kind, in any order."""
    fitting = [cls for cls in VALUES if kind in cls.messages and cls is not ext.PreSharedKeyOffer]
    chosen = draw(st.lists(st.sampled_from(fitting), unique=True)) if fitting else []
    found: list[ext.Extension | ext.UnknownExtension] = [draw(VALUES[cls]) for cls in chosen]
    found += draw(st.lists(unknown, max_size=2, unique_by=lambda one: one.type))
    found = draw(st.permutations(found))
    if kind is MessageKind.CLIENT_HELLO and draw(st.booleans()):
        found = [*found, draw(offers)]
    return Extensions(found)


randoms = st.binary(min_size=32, max_size=32)
session_ids = st.binary(max_size=32)
MESSAGES = st.one_of(
    st.builds(
        messages.ClientHello,
        randoms,
        session_ids,
        codes,
        extensions(MessageKind.CLIENT_HELLO),
        u16s,
        blobs,
    ),
    st.builds(
        messages.ServerHello,
        randoms.filter(lambda one: one != HELLO_RETRY_RANDOM),
        session_ids,
        u16s,
        extensions(MessageKind.SERVER_HELLO),
        u16s,
        u8s,
    ),
    st.builds(
        messages.HelloRetryRequest,
        st.just(HELLO_RETRY_RANDOM),
        session_ids,
        u16s,
        extensions(MessageKind.HELLO_RETRY_REQUEST),
    ),
    st.builds(messages.EncryptedExtensions, extensions(MessageKind.ENCRYPTED_EXTENSIONS)),
    st.builds(
        messages.CertificateRequest,
        st.binary(max_size=255),
        extensions(MessageKind.CERTIFICATE_REQUEST),
    ),
    st.builds(
        messages.Certificate,
        st.binary(max_size=255),
        st.lists(st.tuples(blobs, extensions(MessageKind.CERTIFICATE)), max_size=3).map(tuple),
    ),
    st.builds(messages.CertificateVerify, u16s, st.binary()),
    st.builds(messages.Finished, st.binary()),
    st.builds(
        messages.NewSessionTicket,
        u32s,
        u32s,
        st.binary(max_size=255),
        blobs,
        extensions(MessageKind.NEW_SESSION_TICKET),
    ),
    st.builds(messages.KeyUpdate, st.booleans()),
    st.builds(updates.UpdateRequest, entries),
    st.builds(updates.UpdateResponse, entries),
    st.just(updates.UpdateFinish()),
    st.builds(updates.FreshRequest, entries, st.sampled_from(updates.Demand), st.binary()),
    st.builds(updates.FreshResponse, entries, st.sampled_from(updates.SlotAnswer)),
    st.builds(updates.FreshDecline, st.sampled_from(updates.DeclineReason)),
    st.builds(updates.FreshConfirm, st.binary()),
    st.just(messages.EndOfEarlyData()),
)


# --- messages and extensions ----------------------------------------------------------------------


def test_every_extension_has_a_strategy() -> None:
    assert set(VALUES) == set(ext._CLASSES)


@given(message=MESSAGES)
@settings(deadline=None)
def test_a_message_survives_the_wire(message: messages.Message) -> None:
    raw = messages.encode(message)
    assert messages.decode(raw) == message
    assert type(messages.decode(raw)) is type(message)


@given(message=MESSAGES, data=st.data())
@settings(deadline=None)
def test_a_damaged_message_raises_only_peer_errors(
    message: messages.Message, data: st.DataObject
) -> None:
    raw = bytearray(messages.encode(message))
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(u8s)
    cut = data.draw(st.integers(4, len(raw)))
    for damaged in (bytes(raw), bytes(raw[:cut]), bytes(raw) + b"\0"):
        try:
            again = messages.decode(damaged)
        except (DecodeError, IllegalParameter, UnexpectedMessage):
            pass
        else:
            # What we accept, we can say again.
            assert messages.decode(messages.encode(again)) == again


@given(type_=st.sampled_from(HandshakeType), body=st.binary(max_size=300))
@settings(max_examples=300, deadline=None)
def test_garbage_raises_only_peer_errors(type_: HandshakeType, body: bytes) -> None:
    with contextlib.suppress(DecodeError, IllegalParameter, UnexpectedMessage):
        messages.decode(bytes((type_,)) + len(body).to_bytes(3, "big") + body)


def test_a_hello_without_extensions_is_an_old_one() -> None:
    hello = messages.ClientHello(bytes(32), b"", (1,), Extensions())
    raw = messages.encode(hello)
    short = raw[:1] + (len(raw) - 6).to_bytes(3, "big") + raw[4:-2]
    assert messages.decode(short) == hello
    server = messages.ServerHello(bytes(32), b"", 1, Extensions())
    raw = messages.encode(server)
    short = raw[:1] + (len(raw) - 6).to_bytes(3, "big") + raw[4:-2]
    assert messages.decode(short) == server


def parse(kind: MessageKind, *each: ext.Extension | ext.UnknownExtension) -> Extensions:
    body = b"".join(codec.u16(int(one.type)) + codec.vector16(one.body()) for one in each)
    return ext.parse(kind, Reader(codec.vector16(body)))


TABLE = {
    "CLIENT_HELLO": "0 10 13 16 19 20 21 28 33 41 42 43 44 45 47 49 50 51 65342 65343 65344",
    "SERVER_HELLO": "33 41 43 51",
    "HELLO_RETRY_REQUEST": "43 44 51",
    "ENCRYPTED_EXTENSIONS": "0 10 16 19 20 28 42 65342 65343 65344",
    "CERTIFICATE_REQUEST": "13 47 48 50 65342",
    "CERTIFICATE": "",
    "NEW_SESSION_TICKET": "42 65342",
}
"""The table of RFC 9846 section 4.3, with those of RFC 7250, RFC 7685, RFC 8449, RFC 9973, and of
``docs/fresh-keys.md`` and ``docs/one-time-pad.md``."""


@pytest.mark.parametrize("kind", MessageKind)
@pytest.mark.parametrize("type_", sorted(KNOWN))
def test_where_extensions_may_stand(kind: MessageKind, type_: int) -> None:
    """What we know and what does not belong there is illegal_parameter (section 4.3)."""
    empty = ext.UnknownExtension(type_, b"")
    if str(type_) in TABLE[kind.name].split():
        fitting = [cls for cls in VALUES if cls.type == type_ and kind in cls.messages]
        assert len(fitting) == 1
    elif kind is MessageKind.CERTIFICATE:
        # Whatever stands there answers nothing: the engine refuses it by another alert.
        assert parse(kind, empty).types == (type_,)
    else:
        with pytest.raises(IllegalParameter, match="extension"):
            parse(kind, empty)


def test_duplicates() -> None:
    groups, grease = ext.SupportedGroups((1,)), ext.UnknownExtension(0x0A0A, b"")
    for one in (groups, grease):
        with pytest.raises(IllegalParameter, match="twice"):
            parse(MessageKind.CLIENT_HELLO, one, ext.Padding(3), one)


def test_pre_shared_key_is_last() -> None:
    offer = ext.PreSharedKeyOffer((ext.OfferedPskIdentity(b"x", 0),), (bytes(32),))
    assert parse(MessageKind.CLIENT_HELLO, ext.Padding(1), offer).get(ext.PreSharedKeyOffer)
    with pytest.raises(IllegalParameter, match="last"):
        parse(MessageKind.CLIENT_HELLO, offer, ext.Padding(1))
    assert offer.binders_length == 2 + 33


@pytest.mark.parametrize(
    ("type_", "body", "error"),
    [
        (ExtensionType.SERVER_NAME, "0000", DecodeError),  # no name
        (ExtensionType.SERVER_NAME, "0004 01 0001 61", DecodeError),  # not a host name
        (ExtensionType.SERVER_NAME, "0004 00 0001 ff", IllegalParameter),
        (ExtensionType.SERVER_NAME, "0004 00 0001 00", IllegalParameter),
        (ExtensionType.SERVER_NAME, "0008 00 0001 61 00 0001 62", DecodeError),  # two of a type
        (ExtensionType.SUPPORTED_GROUPS, "0000", DecodeError),
        (ExtensionType.SUPPORTED_GROUPS, "0003 001d 00", DecodeError),
        (ExtensionType.SUPPORTED_GROUPS, "0002 001d 00", DecodeError),  # left over
        (ExtensionType.ALPN, "0001 00", DecodeError),
        (ExtensionType.ALPN, "0002 00 00", DecodeError),  # an empty name
        (ExtensionType.RECORD_SIZE_LIMIT, "003f", IllegalParameter),
        (ExtensionType.PRE_SHARED_KEY, "0007 0001 61 00000000 0020" + "00" * 32, DecodeError),
        (
            ExtensionType.PRE_SHARED_KEY,
            "0007 0001 61 00000000 0042" + ("20" + "00" * 32) * 2,
            IllegalParameter,
        ),
        (ExtensionType.KEY_SHARE, "0004 001d 0000", DecodeError),  # an empty share
        (ExtensionType.COOKIE, "0000", DecodeError),
        (ExtensionType.PSK_KEY_EXCHANGE_MODES, "00", DecodeError),
        (ExtensionType.EARLY_DATA, "00", DecodeError),
    ],
)
def test_malformed_bodies(type_: int, body: str, error: type[PeerError]) -> None:
    with pytest.raises(error):
        parse(MessageKind.CLIENT_HELLO, ext.UnknownExtension(type_, bytes.fromhex(body)))


def test_what_extensions_are() -> None:
    one = Extensions((ext.Padding(1), ext.SupportedGroups((29,))))
    assert one == Extensions((ext.Padding(1), ext.SupportedGroups((29,))))
    assert one != Extensions((ext.SupportedGroups((29,)), ext.Padding(1)))
    assert one != "else"
    assert "SupportedGroups" in repr(one)
    # The same type under another class is not what was asked for.
    assert one.get(ext.Cookie) is None
    assert Extensions((ext.KeyShareRetry(1),)).get(ext.KeyShareOffer) is None


def test_messages_of_no_kind() -> None:
    for type_ in set(range(256)) - {int(one) for one in HandshakeType}:
        with pytest.raises(UnexpectedMessage):
            messages.decode(bytes((type_, 0, 0, 0)))
    with pytest.raises(IllegalParameter):
        messages.decode(b"\x18\0\0\1\2")
    with pytest.raises(DecodeError, match="key_update"):
        messages.decode(b"\x18\0\0\2\0\0")


@given(identity=blobs, context=st.binary(max_size=40), protocol=u16s, kdf=st.sampled_from([1, 2]))
def test_imported_identities(identity: bytes, context: bytes, protocol: int, kdf: int) -> None:
    one = messages.ImportedIdentity(identity, context, protocol, kdf)
    assert messages.ImportedIdentity.decode(one.encode()) == one
    assert messages.ImportedIdentity.decode(one.encode() + b"\0") is None
    assert messages.ImportedIdentity.decode(one.encode()[:-1]) is None
    unknown_kdf = messages.ImportedIdentity(identity, context, protocol, 77)
    assert messages.ImportedIdentity.decode(unknown_kdf.encode()) is None


@given(data=st.binary(max_size=20), start=st.integers(0, 5))
def test_a_reader_never_reads_past_its_end(data: bytes, start: int) -> None:
    data = bytes(start) + data
    for width in (1, 2, 3):
        reader = Reader(data, start)
        try:
            content = reader.opaque(width)
        except DecodeError:
            continue
        assert len(content) == int.from_bytes(data[start : start + width], "big")
        assert reader.remaining == len(data) - start - width - len(content)


def test_integers() -> None:
    raw = codec.u8(1) + codec.u16(2) + codec.u32(4) + codec.u64(5)
    reader = Reader(raw)
    assert [reader.u8(), reader.u16(), reader.u32(), reader.u64()] == [1, 2, 4, 5]
    reader.finish()
    with pytest.raises(DecodeError):
        reader.u8()
    assert Reader(codec.vector8(b"a")).opaque(1) == b"a"
    with pytest.raises(DecodeError):
        Reader(codec.vector8(b"aa")).opaque(1, most=1)


# --- records --------------------------------------------------------------------------------------


@given(
    bodies=st.lists(
        st.tuples(st.sampled_from([20, 21, 22, 23]), st.binary(max_size=60)), max_size=6
    ),
    sizes=st.lists(st.integers(1, 80), min_size=1, max_size=9),
    eager=st.booleans(),
)
@example(bodies=[(22, b""), (23, b"x")], sizes=[5], eager=True)
@settings(deadline=None)
def test_records_come_out_as_they_went_in(
    bodies: list[tuple[int, bytes]], sizes: list[int], eager: bool
) -> None:
    stream = b"".join(header(type_, len(body)) + body for type_, body in bodies)
    buffer, found, at, turn = RecordBuffer(), [], 0, 0

    def take() -> None:
        while (record := buffer.take()) is not None:
            assert bytes(record.header) == header(record.type, len(record.fragment))
            found.append((record.type, bytes(record.fragment)))

    while at < len(stream):
        size = sizes[turn % len(sizes)]
        buffer.feed(stream[at : at + size])
        at, turn = at + size, turn + 1
        if eager:
            take()
    take()
    assert found == bodies
    assert buffer.pending == 0


@given(data=st.binary(max_size=200), size=st.integers(1, 50))
@settings(deadline=None)
def test_garbage_in_place_of_records(data: bytes, size: int) -> None:
    buffer = RecordBuffer()
    with contextlib.suppress(DecodeError, UnexpectedMessage, RecordOverflow):
        for at in range(0, len(data), size):
            buffer.feed(data[at : at + size])
            while buffer.take() is not None:
                pass


def test_a_partial_record_is_all_that_is_kept() -> None:
    buffer = RecordBuffer()
    buffer.feed(header(23, 16384 + 256) + bytes(1000))
    assert buffer.take() is None
    assert buffer.pending == 1005
    for _ in range(15):
        buffer.feed(bytes(1000))
        assert buffer.take() is None
    assert buffer.pending == 16005
    buffer.feed(bytes(640) + header(21, 2) + b"\2\50" + b"rest")
    record = buffer.take()
    assert record is not None
    assert len(record.fragment) == 16640
    record = buffer.take()
    assert record is not None
    assert bytes(record.fragment) == b"\2\50"
    assert buffer.pending == 4
    assert buffer.take() is None
    assert buffer.drain() == b"rest"
    assert buffer.pending == 0


def test_only_messages_that_peers_send_alike_are_kept_and_only_short_ones() -> None:
    def read_once(message: messages.Message) -> bool:
        raw = messages.encode(message)
        first, again = messages.decode(raw), messages.decode(bytes(bytearray(raw)))
        assert first == again == message
        return first is again

    def chain(size: int) -> messages.Certificate:
        return messages.Certificate(b"", ((bytes(size), Extensions()),))

    assert read_once(messages.EncryptedExtensions(Extensions()))
    assert read_once(chain(1000))
    assert not read_once(chain(5000))
    assert not read_once(messages.Finished(bytes(48)))
