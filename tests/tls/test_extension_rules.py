"""Which message may carry which extension, and extensions that the application adds."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Self

import pytest
from extension_tables import RFC_9846_SECTION_4_3
from tls_glue import ANY_GROUP, Pair

from hybridkex.auth import Identity, TrustStore
from hybridkex.constants import Alert
from hybridkex.crypto.kex import SECP256R1, X25519
from hybridkex.errors import ConfigError, HandshakeFailure, PeerError
from hybridkex.tls.config import ClientConfig, ServerConfig
from hybridkex.wire import extensions as ext
from hybridkex.wire.codec import Reader, u8
from hybridkex.wire.extensions import Extensions, MessageKind
from hybridkex.wire.layout import Message
from hybridkex.wire.messages import ClientHello, decode, encode

SHORT = {
    "CH": MessageKind.CLIENT_HELLO,
    "SH": MessageKind.SERVER_HELLO,
    "HRR": MessageKind.HELLO_RETRY_REQUEST,
    "EE": MessageKind.ENCRYPTED_EXTENSIONS,
    "CR": MessageKind.CERTIFICATE_REQUEST,
    "NST": MessageKind.NEW_SESSION_TICKET,
}


def test_the_declarations_are_the_table_of_the_rfc() -> None:
    declared: dict[int, set[MessageKind]] = {}
    for cls in ext._CLASSES:
        declared.setdefault(int(cls.type), set()).update(cls.messages)
    assert declared == {
        type_: {SHORT[name] for name in names.split()}
        for type_, names in RFC_9846_SECTION_4_3.items()
    }
    assert {41, 42, 44, 51, 21} == ext.MAY_CHANGE  # section 4.2.2


@pytest.mark.parametrize("type_", [*sorted(RFC_9846_SECTION_4_3), 0x0A0A, 0xFF00])
@pytest.mark.parametrize("kind", ["SH", "HRR", "EE"])
def test_what_was_not_offered_is_not_answered(
    kind: str, type_: int, trust: TrustStore, identity: Identity
) -> None:
    sent: list[ext.Extension] = [ext.ServerName("localhost"), ext.SupportedVersionsOffer((0x304,))]
    allowed = ext.answerable(SHORT[kind], tuple(map(type, sent)))
    in_table = kind in RFC_9846_SECTION_4_3.get(type_, "").split()
    unasked = (kind, type_) == ("HRR", 44)  # the cookie
    assert (type_ in allowed) == (unasked or (in_table and type_ in (0, 43)))


@dataclass(frozen=True)
class Level(ext.ApplicationExtension):
    """A number; the server answers with the smaller of the two."""

    level: int
    type = 0xFF77

    @classmethod
    def read(cls, reader: Reader) -> Self:
        return cls(reader.u8())

    def body(self) -> bytes:
        return u8(self.level)

    def answer(self, offered: Self) -> "Level | None":
        if offered.level == 13:
            raise HandshakeFailure("level 13 is refused")
        return Level(min(self.level, offered.level)) if offered.level else None


Configs = tuple[ClientConfig, ServerConfig]


@pytest.fixture
def configs(trust: TrustStore, identity: Identity) -> Configs:
    return (
        ClientConfig(verifier=trust, groups=(SECP256R1, X25519), policy=ANY_GROUP),
        ServerConfig(identities=(identity,), groups=(X25519,), policy=ANY_GROUP),
    )


def with_level(configs: Configs, client: int | None, server: int | None) -> Configs:
    return (
        replace(configs[0], extensions=() if client is None else (Level(client),)),
        replace(configs[1], extensions=() if server is None else (Level(server),)),
    )


@pytest.mark.parametrize("shares", [1, 2], ids=["HelloRetryRequest", "one round trip"])
@pytest.mark.parametrize("client", [None, 0, 3, 9])
@pytest.mark.parametrize("server", [None, 5])
def test_an_extension_of_the_application(
    client: int | None, server: int | None, shares: int, configs: Configs
) -> None:
    ours, theirs = with_level(configs, client, server)
    pair = Pair.make(replace(ours, key_shares=shares), theirs).connect()
    if client and server:
        assert pair.client.session.extensions == (Level(min(client, server)),)
        assert pair.server.session.extensions == (Level(client),)
    else:
        assert pair.client.session.extensions == pair.server.session.extensions == ()


def fought(configs: Configs, number: int, edit: Callable[[Any], Message] | None) -> dict[str, Any]:
    """The errors of a handshake in which one of the server's messages is edited."""
    pair = Pair.make(*configs)
    writer = pair.server._records.writer
    send, count = writer.send_raw, iter(range(99))
    writer.send_raw = lambda raw: send(  # type: ignore[method-assign]
        encode(edit(decode(raw))) if edit and next(count) == number else raw
    )
    pair.client.start()
    pair.fight()
    return pair.errors


def adding(one: ext.AnyExtension) -> Callable[[Any], Message]:
    return lambda message: replace(message, extensions=Extensions([*message.extensions, one]))


@pytest.mark.parametrize(
    ("client", "number", "answer", "alert"),
    [
        (None, 1, Level(1), Alert.UNSUPPORTED_EXTENSION),
        (3, 0, Level(1), Alert.UNSUPPORTED_EXTENSION),  # in ServerHello
        (3, 1, ext.UnknownExtension(0xFF77, b""), Alert.DECODE_ERROR),
        (3, 1, ext.UnknownExtension(0xFF77, b"\1\2"), Alert.DECODE_ERROR),
    ],
)
def test_a_wrong_answer(
    client: int | None, number: int, answer: ext.AnyExtension, alert: Alert, configs: Configs
) -> None:
    ours, theirs = with_level(configs, client, None)
    ours = replace(ours, key_shares=2)
    error = fought((ours, theirs), number, adding(answer))["client"]
    assert isinstance(error, PeerError)
    assert error.alert == alert


def test_a_server_refuses_an_offer(configs: Configs) -> None:
    error = fought(with_level(configs, 13, 5), 0, None)["server"]
    assert isinstance(error, HandshakeFailure)
    assert "level 13" in str(error)


def test_the_second_hello_repeats_the_extension(configs: Configs) -> None:
    ours, theirs = with_level(configs, 3, 5)
    pair = Pair.make(ours, theirs)
    writer = pair.client._records.writer
    send, hellos = writer.send_raw, []

    def changed(raw: bytes) -> None:
        message = decode(raw)
        if isinstance(message, ClientHello):
            hellos.append(message)
            if len(hellos) == 2:
                message = replace(
                    message,
                    extensions=Extensions(
                        Level(4) if one.type == Level.type else one for one in message.extensions
                    ),
                )
                raw = encode(message)
        send(raw)

    writer.send_raw = changed  # type: ignore[method-assign]
    pair.client.start()
    pair.fight()
    assert pair.errors["server"].alert == Alert.ILLEGAL_PARAMETER  # type: ignore[attr-defined]


@pytest.mark.parametrize("type_", sorted(ext.KNOWN_TYPES))
def test_the_types_of_the_engine_are_taken(type_: int, configs: Configs) -> None:
    taken = type("Taken", (Level,), {"type": type_})(1)
    with pytest.raises(ConfigError, match=f"extension type {type_} is implemented by the engine"):
        replace(configs[0], extensions=(taken,))


def test_one_object_for_each_type(configs: Configs) -> None:
    with pytest.raises(ConfigError, match="the same type"):
        replace(configs[0], extensions=(Level(1), Level(2)))
