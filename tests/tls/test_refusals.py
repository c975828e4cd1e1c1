"""Well-formed messages that contradict the protocol, each with the alert that the RFC asks for."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from tls_glue import ANY_GROUP, Pair

from hybridkex.auth import Identity, TrustStore
from hybridkex.constants import Alert
from hybridkex.crypto.kex import SECP256R1, X25519
from hybridkex.crypto.psk import ExternalPsk
from hybridkex.errors import PeerError
from hybridkex.secret import Secret
from hybridkex.tls.config import ClientConfig, ServerConfig
from hybridkex.wire import extensions as ext
from hybridkex.wire.extensions import Extensions
from hybridkex.wire.layout import Message
from hybridkex.wire.messages import decode, encode

Edit = Callable[[Any], Message]


def without(cls: type[ext.Extension]) -> Edit:
    return lambda message: replace(
        message,
        extensions=Extensions(one for one in message.extensions if not isinstance(one, cls)),
    )


def adding(*more: Any) -> Edit:
    """Put these in front, and in place of what has the same type."""
    types = {one.type for one in more}

    def edit(message: Any) -> Message:
        kept = [one for one in message.extensions if one.type not in types]
        edited: Message = replace(message, extensions=Extensions([*more, *kept]))
        return edited

    return edit


def setting(**fields: Any) -> Edit:
    return lambda message: replace(message, **fields)


SHARE = ext.KeyShareEntry(0x1D, bytes(range(32)))
LEGACY_VERSIONS = (0x0000, 0x0002, 0x0300, 0x0301, 0x0302, 0x0304, 0x7F1C, 0xFEFD, 0xFFFF)
CLIENT_HELLO: list[tuple[Edit, Alert]] = [
    (without(ext.SupportedVersionsOffer), Alert.PROTOCOL_VERSION),
    (adding(ext.SupportedVersionsOffer((0x0303,))), Alert.PROTOCOL_VERSION),
    (setting(compression_methods=b"\0\1"), Alert.ILLEGAL_PARAMETER),
    (without(ext.SupportedGroups), Alert.MISSING_EXTENSION),
    (without(ext.KeyShareOffer), Alert.MISSING_EXTENSION),
    (without(ext.SignatureAlgorithms), Alert.MISSING_EXTENSION),
    (adding(ext.KeyShareOffer((SHARE, SHARE))), Alert.ILLEGAL_PARAMETER),
    (adding(ext.KeyShareOffer((ext.KeyShareEntry(0x99, b"x"),))), Alert.ILLEGAL_PARAMETER),
    (adding(ext.KeyShareOffer((ext.KeyShareEntry(0x1D, b"x"),))), Alert.ILLEGAL_PARAMETER),
    (adding(ext.TlsCertWithExternPsk()), Alert.MISSING_EXTENSION),
    (setting(cipher_suites=(0x1304, 0x0A0A)), Alert.HANDSHAKE_FAILURE),
    *((setting(legacy_version=one), Alert.PROTOCOL_VERSION) for one in LEGACY_VERSIONS),
]
SERVER_HELLO: list[tuple[Edit, Alert]] = [
    (without(ext.SupportedVersionsChoice), Alert.PROTOCOL_VERSION),
    (adding(ext.SupportedVersionsChoice(0x0303)), Alert.ILLEGAL_PARAMETER),
    # RFC 9846 section 4.2.3; RFC 8446 had illegal_parameter.
    *((setting(legacy_version=one), Alert.PROTOCOL_VERSION) for one in LEGACY_VERSIONS),
    (setting(session_id=b""), Alert.ILLEGAL_PARAMETER),
    (setting(compression_method=1), Alert.ILLEGAL_PARAMETER),
    (setting(cipher_suite=0x1304), Alert.ILLEGAL_PARAMETER),
    (setting(cipher_suite=0x9999), Alert.ILLEGAL_PARAMETER),
    (without(ext.KeyShareChoice), Alert.MISSING_EXTENSION),
    (adding(ext.KeyShareChoice(ext.KeyShareEntry(0x17, b"x"))), Alert.ILLEGAL_PARAMETER),
    (adding(ext.PreSharedKeyChoice(0)), Alert.UNSUPPORTED_EXTENSION),
    (adding(ext.UnknownExtension(0x0A0A, b"")), Alert.UNSUPPORTED_EXTENSION),
]
ENCRYPTED_EXTENSIONS: list[tuple[Edit, Alert]] = [
    (adding(ext.EarlyDataIndication()), Alert.UNSUPPORTED_EXTENSION),
    (adding(ext.RecordSizeLimit(100)), Alert.UNSUPPORTED_EXTENSION),
    (adding(ext.AlpnChoice(b"other")), Alert.ILLEGAL_PARAMETER),
]


def refuse(pair: Pair, who: str, number: int, edit: Edit, victim: str) -> PeerError:
    channel = (pair.client if who == "client" else pair.server)._records
    send, count = channel.writer.send_raw, iter(range(99))
    channel.writer.send_raw = lambda raw: send(  # type: ignore[method-assign]
        encode(edit(decode(raw))) if next(count) == number else raw
    )
    pair.client.start()
    pair.fight()
    error = pair.errors[victim]
    assert isinstance(error, PeerError)
    assert not pair.server.handshake_complete
    return error


@pytest.fixture
def pair(trust: TrustStore, identity: Identity) -> Pair:
    return Pair.make(
        ClientConfig(verifier=trust, groups=(X25519,), policy=ANY_GROUP, alpn=("h2",)),
        ServerConfig(identities=(identity,), groups=(X25519,), policy=ANY_GROUP, alpn=("h2",)),
    )


@pytest.mark.parametrize(("edit", "alert"), CLIENT_HELLO)
def test_client_hello(edit: Edit, alert: Alert, pair: Pair) -> None:
    assert refuse(pair, "client", 0, edit, "server").alert == alert


@pytest.mark.parametrize(("edit", "alert"), SERVER_HELLO)
def test_server_hello(edit: Edit, alert: Alert, pair: Pair) -> None:
    assert refuse(pair, "server", 0, edit, "client").alert == alert


@pytest.mark.parametrize(("edit", "alert"), ENCRYPTED_EXTENSIONS)
def test_encrypted_extensions(edit: Edit, alert: Alert, pair: Pair) -> None:
    assert refuse(pair, "server", 1, edit, "client").alert == alert


@pytest.mark.parametrize(
    ("edit", "alert"),
    [
        (setting(context=b"x"), Alert.ILLEGAL_PARAMETER),
        (setting(entries=()), Alert.DECODE_ERROR),
        (
            lambda one: replace(
                one,
                entries=((one.chain[0], Extensions((ext.UnknownExtension(5, b"x"),))),),
            ),
            Alert.UNSUPPORTED_EXTENSION,
        ),
    ],
)
def test_certificate(edit: Edit, alert: Alert, pair: Pair) -> None:
    assert refuse(pair, "server", 2, edit, "client").alert == alert


def test_certificate_verify(pair: Pair) -> None:
    scheme = setting(scheme=0x0401)  # PKCS#1 is for certificates only
    assert refuse(pair, "server", 3, scheme, "client").alert == Alert.ILLEGAL_PARAMETER


@pytest.mark.parametrize(
    ("edit", "alert"),
    [
        (
            lambda one: replace(one, extensions=Extensions((ext.SupportedVersionsChoice(0x0304),))),
            Alert.ILLEGAL_PARAMETER,
        ),
        (adding(ext.KeyShareRetry(0x17)), Alert.ILLEGAL_PARAMETER),  # a share that it has
        (adding(ext.KeyShareRetry(0x99)), Alert.ILLEGAL_PARAMETER),  # a group not offered
    ],
)
def test_hello_retry_request(
    edit: Edit, alert: Alert, trust: TrustStore, identity: Identity
) -> None:
    retry = Pair.make(
        ClientConfig(verifier=trust, groups=(SECP256R1, X25519), policy=ANY_GROUP),
        ServerConfig(identities=(identity,), groups=(X25519,), policy=ANY_GROUP),
    )
    assert refuse(retry, "server", 0, edit, "client").alert == alert


@pytest.mark.parametrize(
    ("edit", "alert"),
    [
        (without(ext.Cookie), Alert.MISSING_EXTENSION),
        (adding(ext.EarlyDataIndication()), Alert.ILLEGAL_PARAMETER),
        (adding(ext.KeyShareOffer(())), Alert.ILLEGAL_PARAMETER),
        (setting(cipher_suites=(0x1301,)), Alert.ILLEGAL_PARAMETER),
    ],
)
def test_second_client_hello(
    edit: Edit, alert: Alert, trust: TrustStore, identity: Identity
) -> None:
    retry = Pair.make(
        ClientConfig(verifier=trust, groups=(SECP256R1, X25519), policy=ANY_GROUP),
        ServerConfig(identities=(identity,), groups=(X25519,), policy=ANY_GROUP),
    )
    assert refuse(retry, "client", 1, edit, "server").alert == alert


@pytest.mark.parametrize(
    ("edit", "alert"),
    [
        (adding(ext.PreSharedKeyChoice(9)), Alert.ILLEGAL_PARAMETER),
        (without(ext.PreSharedKeyChoice), Alert.ILLEGAL_PARAMETER),  # RFC 9973 section 4
        (without(ext.TlsCertWithExternPsk), Alert.INSUFFICIENT_SECURITY),
        (setting(cipher_suite=0x1302), Alert.ILLEGAL_PARAMETER),  # not the hash of the PSK
    ],
)
def test_server_hello_with_psk(
    edit: Edit, alert: Alert, trust: TrustStore, identity: Identity
) -> None:
    psk = ExternalPsk(identity=b"qkd-1", key=Secret(bytes(32)))
    pair = Pair.make(
        ClientConfig(verifier=trust, psks=(psk,)),
        ServerConfig(identities=(identity,), psks=(psk,)),
    )
    assert refuse(pair, "server", 0, edit, "client").alert == alert


@pytest.mark.parametrize(
    ("edit", "alert"),
    [
        (setting(context=b"x"), Alert.ILLEGAL_PARAMETER),
        (without(ext.SignatureAlgorithms), Alert.MISSING_EXTENSION),
    ],
)
def test_certificate_request(
    edit: Edit, alert: Alert, trust: TrustStore, identity: Identity
) -> None:
    pair = Pair.make(
        ClientConfig(verifier=trust), ServerConfig(identities=(identity,), client_verifier=trust)
    )
    assert refuse(pair, "server", 2, edit, "client").alert == alert
