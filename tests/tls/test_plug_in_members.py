"""An object of the caller that lacks a member is refused when it is given, with the member's name.

One test for every place that takes an object by a protocol: verifier, PSK source, ticket store, key
source, key exchange, authentication, error correction; and for TLS extensions.
"""

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, make_dataclass, replace
from functools import partial
from typing import Any
from unittest.mock import AsyncMock

import pytest
from tls_glue import Pair

from hybridkex import (
    ApplicationExtension,
    ClientConfig,
    ExternalPsk,
    Group,
    Pins,
    Policy,
    QkdPeer,
    QkdPskSource,
    RawIdentity,
    Requirement,
    Secret,
    ServerConfig,
)
from hybridkex.auth.verified import (
    ClientKeyVerifier,
    ClientVerifier,
    ServerKeyVerifier,
    ServerVerifier,
)
from hybridkex.combiner.exchange import Authentication, ExchangeConfig, PskAuthentication
from hybridkex.crypto.kex import X25519, Concat, KeyExchange
from hybridkex.errors import ConfigError
from hybridkex.qkd.composite import CombinedSource, FailoverSource
from hybridkex.qkd.in_process import in_process_pair
from hybridkex.qkd.prefetch import PrefetchSource
from hybridkex.qkd.source import KeySource
from hybridkex.tls.config import PskSource
from hybridkex.tls.fresh_keys import FreshKeys, UpdateKeySource
from hybridkex.tls.one_time_pad import OneTimePad, PadSource
from hybridkex.tls.session import MemoryTicketStore, TicketStore
from hybridkex.wire.codec import Reader
from hybridkex.wire.extensions import CH, CR, EE, NST

RAW = RawIdentity.generate()
PINS = Pins(frozenset((RAW.pin,)))
PSK = ExternalPsk(identity=b"site", key=Secret(bytes(32)))
SOURCE = in_process_pair("a", "b")[0]
EXCHANGE = ExchangeConfig(
    role="initiator",
    local="a",
    peer="b",
    authentication=PskAuthentication(Secret(bytes(16))),
    label=b"x",
)
client = partial(ClientConfig, verifier=PINS)
server = partial(ServerConfig, identities=(RAW,))


def link_settings(reconciler: Any) -> object:
    pytest.importorskip("numpy")
    from hybridkex.link.presets import PRESETS
    from hybridkex.link.settings import LinkSettings

    return LinkSettings(preset=next(iter(PRESETS.values())), reconciler=reconciler)


def reconciler() -> type:
    pytest.importorskip("numpy")
    from hybridkex.link.reconciliation import Reconciler

    return Reconciler


PLACES: list[tuple[type | Callable[[], type], Callable[[Any], object]]] = [
    (ServerVerifier, lambda one: ClientConfig(verifier=one)),
    (ServerKeyVerifier, lambda one: ClientConfig(verifier=one)),
    (ClientVerifier, lambda one: server(client_verifier=one)),
    (ClientKeyVerifier, lambda one: server(client_verifier=one)),
    (TicketStore, lambda one: client(ticket_store=one)),
    (PskSource, lambda one: client(psk_source=one)),
    (PskSource, lambda one: server(psk_source=one)),
    (KeySource, QkdPskSource),
    (KeySource, lambda one: QkdPeer(source=one)),
    (KeySource, PrefetchSource),
    (KeySource, lambda one: FailoverSource([one, one])),
    (KeySource, lambda one: CombinedSource([one, one])),
    (KeySource, lambda one: replace(EXCHANGE, key_source=one)),
    (KeyExchange, lambda one: Group(code=0xFEC0, name="x", exchange=one)),
    (KeyExchange, lambda one: Concat(X25519.exchange, one)),
    (KeyExchange, lambda one: replace(EXCHANGE, exchanges=(one,))),
    (Authentication, lambda one: replace(EXCHANGE, authentication=one)),
    (reconciler, link_settings),
]


def members(protocol: type) -> list[str]:
    return [name for name in vars(protocol) if not name.startswith("_")]


def lacking(protocol: type, *names: str, inherits: bool = False) -> object:
    """An object with all members of a protocol but these, or with the protocol's own for these."""
    whole = {
        name: (lambda *_: None) if inspect.isfunction(vars(protocol)[name]) else None
        for name in members(protocol)
    }
    own = {name: value for name, value in whole.items() if name not in names}
    return type("Mine", (protocol,) if inherits else (), own)()


@pytest.mark.parametrize(("protocol", "give"), PLACES)
@pytest.mark.parametrize("inherits", [False, True])
def test_every_missing_member_is_named(
    protocol: type | Callable[[], type], give: Callable[[Any], object], inherits: bool
) -> None:
    if protocol is reconciler:
        protocol = reconciler()
    assert isinstance(protocol, type)
    all_of_them = members(protocol)
    for names in ([all_of_them[0]], [all_of_them[-1]], all_of_them[1:] or all_of_them):
        with pytest.raises(ConfigError) as caught:
            give(lacking(protocol, *names, inherits=inherits))
        # A verifier may be of either kind; the first of those that lack the least is named.
        named = str(caught.value).partition(" that lacks ")[2].partition(";")[0].split(", ")
        if protocol in (ServerKeyVerifier, ClientKeyVerifier):
            named = [f"{name}_key" for name in named]
        assert named == names, str(caught.value)


OPTIONAL = [
    (PINS, "refresh", lambda one: ClientConfig(verifier=one)),
    (PINS, "refresh", lambda one: server(client_verifier=one)),
    (PINS, "refresh", lambda one: replace(EXCHANGE, authentication=authenticated(one))),
    (MemoryTicketStore(), "flush", lambda one: client(ticket_store=one)),
]


def authenticated(verifier: Any) -> Any:
    """An authentication of the combiner with this verifier."""
    return type("Mine", (PskAuthentication,), {"verifier": verifier})(PSK.key)


@pytest.mark.parametrize(("value", "fault"), [
    (5, "a method"), ("x", "a method"), (None, "a method"),
    (AsyncMock(), "a method that is not async"),
])  # fmt: skip
@pytest.mark.parametrize(("whole", "name", "make"), OPTIONAL)
def test_an_optional_member_of_another_kind(
    whole: Any, name: str, make: Callable[[Any], object], value: Any, fault: str
) -> None:
    """What only a shell calls is checked as well, where an object has it."""
    base = type(whole)
    one = type("Mine", (base,), {name: value})(*([whole.pins] if base is Pins else []))
    with pytest.raises(ConfigError, match=re.escape(f"Mine that lacks {name} ({fault})") + "$"):
        make(one)
    make(type("Mine", (base,), {name: lambda self: None})(*([whole.pins] if base is Pins else [])))
    make(whole)


class WithoutMore:
    """A PSK source for handshakes alone."""

    offer = look_up = authorize = lambda *_: None


@pytest.mark.parametrize(
    ("extra", "protocol"),
    [
        ({"one_time_pad": OneTimePad()}, PadSource),
        (
            {"fresh_keys": FreshKeys(), "policy": Policy(fresh_qkd=Requirement.REQUIRE)},
            UpdateKeySource,
        ),
    ],
)
def test_a_source_for_what_it_does_not_supply(extra: dict[str, Any], protocol: type) -> None:
    with pytest.raises(ConfigError) as caught:
        client(psk_source=WithoutMore(), **extra)
    assert str(caught.value).endswith(" that lacks " + ", ".join(members(protocol)))
    with pytest.raises(ConfigError, match="QkdPskSource"):
        client(psks=(PSK,), **extra)


# --- TLS extensions -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Whole(ApplicationExtension):
    x: bytes = b"a"
    type = 0xFF77

    @classmethod
    def read(cls, reader: Reader) -> "Whole":
        return cls(reader.opaque(1))

    def body(self) -> bytes:
        return bytes((len(self.x),)) + self.x

    def answer(self, _offered: "Whole") -> "Whole":
        return self


def without(*names: str) -> ApplicationExtension:
    kept = {"type", "read", "body", "answer"} - {*names}
    own = {name: vars(Whole)[name] for name in kept}
    return make_dataclass(
        "Mine", [("x", bytes, b"a")], bases=(ApplicationExtension,), namespace=own
    )()


@pytest.mark.parametrize("name", ["type", "read", "body"])
@pytest.mark.parametrize("side", [client, server])
def test_an_extension_without(name: str, side: Callable[..., object]) -> None:
    with pytest.raises(ConfigError, match=f"extensions takes .*Mine that lacks {name}$"):
        side(extensions=(without(name),))


def test_an_extension_without_an_answer() -> None:
    client(extensions=(without("answer"),))
    with pytest.raises(ConfigError, match=r"Mine that lacks answer$"):
        server(extensions=(without("answer"),))
    with pytest.raises(ConfigError, match=r"Mine that lacks type, answer, read$"):
        server(extensions=(without("answer", "type", "read"),))


@pytest.mark.parametrize(
    ("name", "value", "fault"),
    [
        ("answer", None, "answer (a method)"),
        ("answer", b"", "answer (a method)"),
        ("body", b"x", "body (a method)"),
        ("answer", AsyncMock(), "answer (a method that is not async)"),
        ("body", AsyncMock(), "body (a method that is not async)"),
    ],
)
def test_a_member_of_another_kind(name: str, value: Any, fault: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"Mine that lacks {fault}") + "$"):
        server(extensions=(type("Mine", (Whole,), {name: value})(),))


@pytest.mark.parametrize("messages", [(), (CH,), (EE,), (EE, CH), (CH, EE, CR), (NST,)])
def test_an_extension_in_other_messages(messages: Any) -> None:
    """The engine sends those of the application in two messages only."""
    for side in (client, server):
        with pytest.raises(ConfigError, match="in ClientHello and EncryptedExtensions only"):
            side(extensions=(type("Mine", (Whole,), {"messages": messages})(),))


@pytest.mark.parametrize("body", [None, "text", 5, [b""]])
def test_a_body_that_is_not_bytes(body: Any) -> None:
    with pytest.raises(ConfigError, match=r"Mine: body returns .+, not bytes"):
        client(extensions=(type("Mine", (Whole,), {"body": lambda _: body})(),))


@pytest.mark.parametrize("answer", [True, b"", object()])
def test_an_answer_that_is_no_extension(answer: Any) -> None:
    """The server's program hears of it, and the client gets an alert."""
    faulty = type("Mine", (Whole,), {"answer": lambda *_: answer})()
    pair = Pair.make(client(extensions=(Whole(),)), server(extensions=(faulty,)))
    pair.client.start()
    with pytest.raises(TypeError, match=r"answer of Mine returned an? "):
        pair.pump()


@pytest.mark.parametrize("type_", [-1, 0x10000, "x", None, True, 1.5])
def test_the_type_of_an_extension(type_: Any) -> None:
    with pytest.raises(ConfigError, match="0 to 65535"):
        client(extensions=(type("Mine", (Whole,), {"type": type_})(),))


class Flag(ApplicationExtension):
    """Without content, it needs no code to read or write it."""

    type = 0xFF78

    def answer(self, _offered: "Flag") -> "Flag":
        return self


@pytest.mark.parametrize("one", [Flag(), Whole()], ids=lambda one: type(one).__name__)
def test_a_whole_extension(one: ApplicationExtension) -> None:
    client(extensions=(one,))
    server(extensions=(one,))
