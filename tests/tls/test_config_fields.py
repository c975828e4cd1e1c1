"""A configuration that cannot mean what it says is refused when it is made, with the right line."""

import ssl
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from typing import Any

import pytest
import trio.testing

from hybridkex import (
    X25519MLKEM768,
    Authentication,
    ClientConfig,
    ClientConnection,
    DevCa,
    ExternalPsk,
    FreshKeys,
    Identity,
    Limits,
    MemoryTicketStore,
    OneTimePad,
    PadToMultiple,
    Pins,
    Policy,
    QkdLimits,
    QkdPeer,
    QkdPskSource,
    RawIdentity,
    Requirement,
    Secret,
    SecureListener,
    SecureStream,
    ServerConfig,
    ServerConnection,
    TicketIssuer,
    TrustStore,
)
from hybridkex.errors import ConfigError
from hybridkex.qkd.in_process import in_process_pair

KEY = "the key must not be shown"
PSK = ExternalPsk(identity=b"site", key=Secret(bytes(32)))
RAW = RawIdentity.generate()
PINS = Pins(frozenset((RAW.pin,)))
SOURCE = in_process_pair("alice", "bob")[0]
GOOD: dict[type, dict[str, Any]] = {
    ClientConfig: {"verifier": PINS},
    ServerConfig: {"identities": (RAW,)},
    Policy: {},
    FreshKeys: {},
    OneTimePad: {},
    Limits: {},
    ExternalPsk: {"identity": b"site", "key": Secret(bytes(32))},
    TicketIssuer: {},
    QkdLimits: {},
    QkdPeer: {"source": SOURCE},
    PadToMultiple: {"size": 16},
}
# Of no field the type. A tuple with one of them inside is no better.


async def waits(*_: object) -> None:
    """What nobody awaits."""


class Waits:
    """The same as an object."""

    async def __call__(self, *_: object) -> None:
        pass


WRONG: tuple[Any, ...] = (
    waits,
    partial(waits, 1),
    Waits(),
    object(),
    KEY,
    KEY.encode(),
    [KEY],
    {},
    ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT),
    1.5,
    True,
    -7,
    (object(),),
    ("x", object()),
    None,
    ClientConfig,
    TrustStore,
    MemoryTicketStore,
)
RIGHT = {  # What of these is right, or free, by field.
    "groups": (None,),
    "alpn": (),
    "extensions": (),
    "psk_source": (None,),
    "record_size_limit": (None,),
    "padding": (None,),
    "key_log": (None,),
    "verifier": (None,),
    "client_verifier": (None,),
    "identity": (None,),
    "ticket_store": (None,),
    "tickets": (None,),
    "first_key": (None,),
    "psk": (None,),
    "authentication": (None,),
    "compatibility_mode": (True,),
    "require_known_name": (True,),
    "require_client_certificate": (True,),
    "timeout": (1.5,),
    "retry_after": (1.5,),
    "look_ups_per_second": (1.5,),
    "fresh_keys": (None,),
    "fresh_qkd": (None,),
    "every": (1.5,),
    "deadline": (1.5,),
    "stretch": (1.5,),
    "after_bytes": (None,),
    "one_time_pad": (None,),
    "on_epoch": (None,),
}


def right(kind: type, name: str, value: object) -> bool:
    if kind is ExternalPsk and name == "identity":
        return isinstance(value, bytes)
    if kind is ExternalPsk and name == "context":
        return value is None or isinstance(value, bytes)
    if kind is ExternalPsk and name == "origin":
        return True
    return any(
        value is one or (value == one and type(value) is type(one)) for one in RIGHT.get(name, ())
    )


@pytest.mark.parametrize("kind", GOOD, ids=lambda kind: kind.__name__)
def test_every_field_refuses_every_other_type(kind: type) -> None:
    kind(**GOOD[kind])
    names = [one.name for one in fields(kind) if one.init]
    assert names
    for name in names:
        for value in WRONG:
            if right(kind, name, value):
                continue
            with pytest.raises(ConfigError) as caught:
                kind(**{**GOOD[kind], name: value})
            assert KEY not in str(caught.value), (name, value)


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda: ClientConfig(verifier="ca.pem"), 'verifier=TrustStore.from_file("ca.pem")'),
        (lambda: ClientConfig(verifier=PINS, alpn="h2"), 'alpn=("h2", "http/1.1")'),
        (lambda: ClientConfig(verifier=PINS, alpn=["h2"]), 'alpn=("h2", "http/1.1")'),
        (lambda: ServerConfig(identities=RAW), "identities=(Identity.from_files("),
        (lambda: ServerConfig(identities=[RAW]), "identities=(Identity.from_files("),
        (lambda: ClientConfig(psk_source=SOURCE), "psk_source=QkdPskSource(key_source)"),
        (
            lambda: ClientConfig(verifier=ssl.create_default_context()),
            "not an ssl.SSLContext, which configures another TLS library",
        ),
        (lambda: ClientConfig(verifier=TrustStore), "not the class TrustStore itself"),
        (lambda: ClientConfig(psks=PSK), "psks=(ExternalPsk(identity="),
        (lambda: ClientConfig(verifier=PINS, groups=X25519MLKEM768), "groups=(X25519MLKEM768,)"),
        (lambda: ExternalPsk(identity="site", key=Secret(bytes(32))), 'identity=b"site"'),
        (lambda: ExternalPsk(identity=b"site", key=bytes(32)), "key=Secret(key)"),
        (lambda: Policy(psk="require"), "psk=Requirement.REQUIRE"),
        (lambda: Policy(psk=True), "psk=Requirement.REQUIRE"),
        (lambda: QkdPskSource(QkdPskSource(SOURCE)), "QkdPskSource(key_source)"),
        (lambda: QkdPskSource("alice"), "QkdPskSource(key_source)"),
        (lambda: ClientConnection(ServerConfig(identities=(RAW,))), "ClientConfig"),
        (lambda: ServerConnection(ClientConfig(verifier=PINS)), "ServerConfig"),
        (lambda: ClientConnection(ssl.create_default_context()), "ClientConfig"),
    ],
)
def test_the_line_that_would_be_right(make: Callable[[], object], line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make()
    assert line in str(caught.value)


async def test_streams_and_listeners_take_a_configuration() -> None:
    one, _ = trio.testing.memory_stream_pair()
    context: Any = ssl.create_default_context()
    for wrong in (context, "localhost", None):
        with pytest.raises(ConfigError, match="ClientConfig"):
            SecureStream(one, wrong)
        with pytest.raises(ConfigError, match="ServerConfig"):
            SecureListener(None, wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="server_hostname"):
        SecureStream(one, ServerConfig(identities=(RAW,)), server_hostname="localhost")


# --- requirements that cannot hold ----------------------------------------------------------------

PREFER = Requirement.PREFER
CA = DevCa.create(algorithm="ed25519")
OURS: Identity = CA.issue("localhost", algorithm="ed25519")


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        # RFC 9846 section 4.4.2: a server that authenticates with a PSK alone does not ask.
        ({"psks": (PSK,), "client_verifier": PINS, "require_client_certificate": True}, "identit"),
        ({"psks": (PSK,), "client_verifier": PINS}, "identit"),
        ({"psk_source": QkdPskSource(SOURCE), "client_verifier": PINS}, "identit"),
        (
            {
                "psks": (PSK,),
                "identities": (OURS,),
                "client_verifier": PINS,
                "policy": Policy(authentication=Authentication.PSK),
            },
            "identit",
        ),
        (
            {
                "psks": (PSK,),
                "identities": (OURS,),
                "client_verifier": PINS,
                "require_client_certificate": True,
                "policy": Policy(psk=PREFER, authentication=Authentication.EITHER),
            },
            "Authentication.BOTH",
        ),
        ({"identities": (OURS,), "require_client_certificate": True}, "client_verifier"),
        ({"identities": (OURS,), "policy": Policy(psk=Requirement.REQUIRE)}, "none is configured"),
        ({"psks": (PSK,), "require_known_name": True}, "identities"),
        ({"psks": (PSK,), "policy": Policy(psk=Requirement.OFF)}, "identity|PSK"),
        ({"identities": (OURS,), "policy": Policy(authentication=Authentication.BOTH)}, "PSK"),
        ({"psks": (PSK,), "policy": Policy(authentication=Authentication.BOTH)}, "identity"),
    ],
)
def test_what_a_server_cannot_hold(config: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        ServerConfig(**config)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"verifier": PINS, "policy": Policy(psk=Requirement.REQUIRE)}, "none is configured"),
        (
            {
                "verifier": PINS,
                "psks": (PSK,),
                "policy": Policy(authentication=Authentication.PSK),
            },
            "never asks the verifier",
        ),
        ({"psks": (PSK,), "policy": Policy(authentication=Authentication.BOTH)}, "verifier"),
        ({"verifier": PINS, "policy": Policy(authentication=Authentication.PSK)}, "PSK"),
    ],
)
def test_what_a_client_cannot_hold(config: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        ClientConfig(**config)


@pytest.mark.parametrize(
    "policy",
    [
        {"psk": Requirement.OFF, "authentication": Authentication.PSK},
        {"psk": Requirement.OFF, "authentication": Authentication.BOTH},
        {"psk": Requirement.REQUIRE, "authentication": Authentication.EITHER},
        {"psk": Requirement.OFF, "authentication": Authentication.EITHER},
        {"session_lifetime": -1},
    ],
)
def test_policies_that_no_connection_satisfies(policy: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Policy(**policy)
