"""An attacker on the wire cannot make two willing sides fall back.

Both sides prefer a QKD key and would go on without one. The attacker removes or damages each
extension of each hello, or takes the whole PSK out of it. What was negotiated is what the
transcript authenticates, so no side ever ends up in a session that its peer did not agree to.
"""

from collections.abc import Callable, Iterator

import pytest
from tls_glue import Pair

from hybridkex.auth import DevCa, TrustStore
from hybridkex.constants import ExtensionType, HandshakeType
from hybridkex.crypto.kex import SECP256R1MLKEM768, X25519MLKEM768
from hybridkex.crypto.psk import ExternalPsk
from hybridkex.secret import Secret
from hybridkex.tls.config import ClientConfig, ServerConfig
from hybridkex.tls.connection import Connection
from hybridkex.tls.epochs import KeyUpdates
from hybridkex.tls.policy import Policy, Requirement

PREFER = Policy(psk=Requirement.PREFER, fresh_keys=Requirement.PREFER)
QKD = ExternalPsk(identity=b"qkd-1", key=Secret(bytes(range(32))), context=b"alice bob")

Extension = tuple[int, bytes]
Change = Callable[[list[Extension]], list[Extension]]


def split(hello: bytes) -> tuple[bytes, list[Extension]]:
    """A hello's fixed part and its extensions; for a ClientHello or a ServerHello."""
    at = 4 + 2 + 32
    at += 1 + hello[at]
    if hello[0] == HandshakeType.CLIENT_HELLO:
        at += 2 + int.from_bytes(hello[at : at + 2], "big")
        at += 1 + hello[at]
    else:
        at += 3
    extensions, rest = [], hello[at + 2 :]
    while rest:
        length = int.from_bytes(rest[2:4], "big")
        extensions.append((int.from_bytes(rest[:2], "big"), rest[4 : 4 + length]))
        rest = rest[4 + length :]
    return hello[4:at], extensions


def join(kind: int, head: bytes, extensions: list[Extension]) -> bytes:
    body = b"".join(
        code.to_bytes(2, "big") + len(data).to_bytes(2, "big") + data for code, data in extensions
    )
    body = head + len(body).to_bytes(2, "big") + body
    return bytes((kind,)) + len(body).to_bytes(3, "big") + body


class Attacker:
    """Changes the hellos of one kind; everything else passes."""

    def __init__(self, kind: HandshakeType, change: Change) -> None:
        self.kind = kind
        self.change = change
        self.changed = 0
        self.seen: list[int] = []

    def __call__(self, target: Connection, data: bytes) -> bytes:
        if data[0] != 22 or data[5] != self.kind:
            return data
        length = int.from_bytes(data[3:5], "big")
        head, extensions = split(data[5 : 5 + length])
        self.seen = [code for code, _ in extensions]
        changed = self.change(extensions)
        if changed == extensions:
            return data
        self.changed += 1
        hello = join(self.kind, head, changed)
        return data[:3] + len(hello).to_bytes(2, "big") + hello + data[5 + length :]


def without(*codes: int) -> Change:
    return lambda extensions: [one for one in extensions if one[0] not in codes]


def damaged(code: int, place: int) -> Change:
    def change(extensions: list[Extension]) -> list[Extension]:
        return [
            (one, data[:place] + bytes((data[place] ^ 1,)) + data[place + 1 :])
            if one == code and place < len(data)
            else (one, data)
            for one, data in extensions
        ]

    return change


@pytest.fixture(scope="module")
def ca() -> DevCa:
    return DevCa.create()


@pytest.fixture(scope="module")
def configs(ca: DevCa) -> tuple[ClientConfig, ServerConfig]:
    return (
        ClientConfig(psks=(QKD,), verifier=TrustStore((ca.certificate,)), policy=PREFER),
        ServerConfig(psks=(QKD,), identities=(ca.issue("localhost"),), policy=PREFER),
    )


def attack(configs: tuple[ClientConfig, ServerConfig], attacker: Attacker) -> Pair:
    pair = Pair.make(*configs, on_wire=attacker)
    pair.client.start()
    pair.fight()
    pair.cut()
    return pair


def assert_nobody_is_fooled(pair: Pair) -> None:
    assert not pair.client.handshake_complete
    assert not pair.server.handshake_complete
    assert set(pair.errors) == {"client", "server"}


def extensions_of(configs: tuple[ClientConfig, ServerConfig], kind: HandshakeType) -> list[int]:
    watcher = Attacker(kind, lambda extensions: extensions)
    Pair.make(*configs, on_wire=watcher).connect()
    return watcher.seen


KINDS = (HandshakeType.CLIENT_HELLO, HandshakeType.SERVER_HELLO)


def test_left_alone_the_key_is_in(configs: tuple[ClientConfig, ServerConfig]) -> None:
    pair = Pair.make(*configs).connect()
    assert pair.client.session.psk_identity == pair.server.session.psk_identity == QKD.identity
    assert pair.client.session.key_updates is pair.server.session.key_updates is KeyUpdates.FRESH


@pytest.mark.parametrize("kind", KINDS)
def test_each_extension_removed(
    configs: tuple[ClientConfig, ServerConfig], kind: HandshakeType
) -> None:
    codes = extensions_of(configs, kind)
    assert {ExtensionType.PRE_SHARED_KEY, ExtensionType.TLS_CERT_WITH_EXTERN_PSK} <= set(codes)
    for code in codes:
        attacker = Attacker(kind, without(code))
        assert_nobody_is_fooled(attack(configs, attacker))
        assert attacker.changed == 1


@pytest.mark.parametrize("kind", KINDS)
def test_each_extension_damaged(
    configs: tuple[ClientConfig, ServerConfig], kind: HandshakeType
) -> None:
    count = 0
    for code in extensions_of(configs, kind):
        for place in (0, 1, 2, 3, 5, 8, 13, 21, 34, 55):
            attacker = Attacker(kind, damaged(code, place))
            pair = attack(configs, attacker)
            if attacker.changed:
                assert_nobody_is_fooled(pair)
                count += 1
    assert count >= 14


def consistent_changes() -> Iterator[tuple[str, HandshakeType, Change]]:
    """Changes after which each message alone would be correct."""
    psk, both = ExtensionType.PRE_SHARED_KEY, ExtensionType.TLS_CERT_WITH_EXTERN_PSK
    modes = ExtensionType.PSK_KEY_EXCHANGE_MODES
    client, server = KINDS
    yield "the whole PSK taken out of the offer", client, without(psk, both, modes)
    yield "the PSK, but not its modes", client, without(psk, both)
    yield "the certificate taken out of the offer", client, without(both)
    yield "the whole PSK taken out of the answer", server, without(psk, both)
    yield "the certificate taken out of the answer", server, without(both)


@pytest.mark.parametrize(
    ("kind", "change"),
    [(kind, change) for _, kind, change in consistent_changes()],
    ids=[text for text, _, _ in consistent_changes()],
)
def test_consistent_changes(
    configs: tuple[ClientConfig, ServerConfig], kind: HandshakeType, change: Change
) -> None:
    attacker = Attacker(kind, change)
    assert_nobody_is_fooled(attack(configs, attacker))
    assert attacker.changed == 1


def test_the_group_is_not_changed_either(ca: DevCa) -> None:
    """supported_groups and key_share without the favourite: the server would take the other."""
    groups = (X25519MLKEM768, SECP256R1MLKEM768)
    configs = (
        ClientConfig(verifier=TrustStore((ca.certificate,)), groups=groups, key_shares=2),
        ServerConfig(identities=(ca.issue("localhost"),), groups=groups),
    )

    def change(extensions: list[Extension]) -> list[Extension]:
        lists = {
            ExtensionType.SUPPORTED_GROUPS: b"\0\2" + SECP256R1MLKEM768.code.to_bytes(2, "big"),
        }
        changed = []
        for code, data in extensions:
            if code == ExtensionType.KEY_SHARE:
                first = 4 + int.from_bytes(data[4:6], "big")
                rest = data[2 + first :]
                changed.append((code, len(rest).to_bytes(2, "big") + rest))
            else:
                changed.append((code, lists.get(ExtensionType(code), data)))
        return changed

    attacker = Attacker(HandshakeType.CLIENT_HELLO, change)
    assert_nobody_is_fooled(attack(configs, attacker))
    assert attacker.changed == 1
