"""Whatever values an encoder gets, it writes what reads back, or it raises EncodeError."""

import dataclasses
import typing
from collections.abc import Callable
from functools import cache
from types import UnionType
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hybridkex.errors import EncodeError, PeerError
from hybridkex.secret import Secret
from hybridkex.tls.session import AuthenticatedBy
from hybridkex.tls.tickets import MAX_TICKET, CookieState, TicketIssuer, TicketState
from hybridkex.wire import codec, messages, update_messages
from hybridkex.wire import extensions as ext
from hybridkex.wire.extensions import Extensions, MessageKind

EDGES = [0, 1, 2, 31, 32, 33, 64, 255, 256, 1 << 15, (1 << 16) - 1, 1 << 16, (1 << 16) + 1]
integers = st.one_of(
    st.sampled_from([edge + off for edge in EDGES for off in (-1, 0)]),
    st.sampled_from([(1 << bits) + off for bits in (8, 16, 24, 32, 64) for off in (-1, 0, 1)]),
    st.integers(0, 255),
)
blobs = st.sampled_from(EDGES).map(lambda size: b"x" * size) | st.binary(max_size=40)
texts = st.sampled_from(["", "a", "a" * 255, "a" * 256, "a" * 70000, "bücher", "\0", "\ud800"])


@cache
def values(hint: Any) -> st.SearchStrategy[Any]:
    """Values of a type, those that no message can carry among them."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple and arguments[-1] is Ellipsis:
        return st.one_of(
            st.lists(values(arguments[0]), max_size=3).map(tuple),
            st.tuples(values(arguments[0]), st.sampled_from([127, 128, 255, 256, 40000])).map(
                # 40,000 times 64 KiB are 5 GB of memory, and refused as 3 times are.
                lambda one: (one[0],) * (one[1] if len(repr(one[0])) < 1000 else 3)
            ),
        )
    if origin is tuple:
        return st.tuples(*map(values, arguments))
    if origin in (typing.Union, UnionType):
        return st.one_of(*map(values, arguments))
    if dataclasses.is_dataclass(hint):
        return build(typing.cast(type, hint))
    return {
        int: integers,
        bool: st.booleans(),
        bytes: blobs,
        str: texts,
        type(None): st.none(),
        Secret: blobs.map(Secret),
        AuthenticatedBy: st.sampled_from(AuthenticatedBy),
        Extensions: any_extensions(),
        frozenset[int]: st.frozensets(integers, max_size=3),
        update_messages.Demand: st.sampled_from(update_messages.Demand),
        update_messages.SlotAnswer: st.sampled_from(update_messages.SlotAnswer),
        update_messages.DeclineReason: st.sampled_from(update_messages.DeclineReason),
    }[hint]


@cache
def build(cls: type) -> st.SearchStrategy[Any]:
    hints = typing.get_type_hints(cls)
    return st.builds(
        cls, **{one.name: values(hints[one.name]) for one in dataclasses.fields(cls) if one.init}
    )


@cache
def any_extensions() -> st.SearchStrategy[Extensions]:
    unknown = st.builds(
        ext.UnknownExtension, integers.filter(lambda type_: type_ not in ext.KNOWN_TYPES), blobs
    )
    return st.lists(unknown, max_size=2).map(Extensions)


def check(encode: Callable[[], bytes], decode: Callable[[bytes], Any], value: Any) -> None:
    try:
        raw = encode()
    except EncodeError:
        return
    try:
        again = decode(raw)
    except PeerError:
        return  # A lower bound of the reader, or a value that RFC 9846 forbids.
    assert again == value


RELAXED = settings(
    deadline=None,
    max_examples=20,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@pytest.mark.parametrize("cls", ext._CLASSES)
@given(data=st.data())
@RELAXED
def test_extensions(cls: type[ext.Extension], data: st.DataObject) -> None:
    value = data.draw(build(cls))
    kind = cls.messages[0]

    def decode(raw: bytes) -> Any:
        reader = codec.Reader(raw)
        found = ext.parse(kind, reader)
        reader.finish()
        return found.get(cls)

    check(Extensions((value,)).encode, decode, value)


MESSAGES = [
    *(one for one in messages._CLASSES.values() if dataclasses.is_dataclass(one)),
    *update_messages._SUBTYPES.values(),
]


@pytest.mark.parametrize("cls", MESSAGES)
@given(data=st.data())
@RELAXED
def test_messages(cls: type[messages.Message], data: st.DataObject) -> None:
    value = data.draw(build(cls))
    check(lambda: messages.encode(value), messages.decode, value)


@pytest.mark.parametrize("cls", [TicketState, CookieState, messages.ImportedIdentity])
@given(data=st.data())
@RELAXED
def test_sealed_states_and_identities(cls: Any, data: st.DataObject) -> None:
    value = data.draw(build(cls))

    def decode(raw: bytes) -> Any:
        again = cls.decode(raw)
        return value if again is None else again  # an identity of another kind

    def encode() -> bytes:
        encoded: bytes = value.encode()
        return encoded

    try:
        raw = encode()
    except EncodeError:
        return
    again = decode(raw)
    if cls is TicketState:  # Absent and empty are one; a Secret has no equality of its own.
        assert again.psk.reveal() == value.psk.reveal()
        same = {"psk": value.psk}
        value = dataclasses.replace(
            value, server_name=value.server_name or None, psk_identity=value.psk_identity or None
        )
        again = dataclasses.replace(again, **same)
    assert again == value


@given(content=st.sampled_from([254, 255, 256, 65535, 65536, (1 << 24) - 1, 1 << 24]))
def test_vectors_at_their_limits(content: int) -> None:
    body = bytes(content)
    for vector, width in ((codec.vector8, 1), (codec.vector16, 2), (codec.vector24, 3)):
        if content < 1 << 8 * width:
            assert len(vector(body)) == width + content
        else:
            with pytest.raises(EncodeError):
                vector(body)


def test_a_message_longer_than_its_header_can_say() -> None:
    """Before, the length ran over into the type: another message with a part missing."""
    finished = messages.Finished(bytes(1 << 24))
    with pytest.raises(EncodeError):
        messages.encode(finished)


@given(chain=st.lists(st.sampled_from([10, 1000, 9000, 16000, 40000]), max_size=5))
def test_a_ticket_is_never_longer_than_its_limit(chain: list[int]) -> None:
    state = TicketState(
        suite=0x1301,
        psk=Secret(bytes(32)),
        issued_at=0,
        server_name=None,
        authenticated_by=AuthenticatedBy.CERTIFICATE,
        psk_identity=None,
        psk_context=None,
        began_at=0,
        binding=b"",
        client_chain=tuple(map(bytes, chain)),
    )
    issuer = TicketIssuer(clock=lambda: 0.0)
    ticket = issuer.seal(state)
    if ticket is None:
        assert len(state.encode()) > MAX_TICKET - 100
    else:
        assert len(ticket) <= MAX_TICKET
        opened = issuer.open(ticket)
        assert opened is not None
        assert opened.client_chain == state.client_chain


def test_every_kind_of_extension_is_tried() -> None:
    assert {kind for cls in ext._CLASSES for kind in cls.messages} == set(MessageKind) - {
        MessageKind.CERTIFICATE
    }
