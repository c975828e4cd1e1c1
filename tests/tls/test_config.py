"""Configurations that cannot work are refused when they are made; a session prints well."""

import json
from dataclasses import replace
from typing import Any

import pytest
from tls_glue import Pair

from hybridkex.auth import Identity, TrustStore
from hybridkex.crypto.kex import MLKEM768, X25519
from hybridkex.crypto.psk import ExternalPsk
from hybridkex.crypto.suites import SHA384, TLS_AES_128_GCM_SHA256
from hybridkex.errors import ConfigError
from hybridkex.secret import Secret
from hybridkex.tls.config import ClientConfig, Limits, PadToMultiple, ServerConfig
from hybridkex.tls.policy import Authentication, Policy, Requirement
from hybridkex.tls.session import MemoryTicketStore, SessionTicket
from hybridkex.tls.tickets import CookieProtector, TicketIssuer

PSK = ExternalPsk(identity=b"qkd-1", key=Secret(bytes(32)))
CERTIFICATE = Policy(authentication=Authentication.CERTIFICATE)
BOTH = Policy(authentication=Authentication.BOTH)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"groups": ()}, "at least one group"),
        ({"groups": (MLKEM768, MLKEM768)}, "group is listed twice"),
        ({"groups": (X25519,)}, "no post-quantum part"),
        (
            {"groups": (MLKEM768,), "policy": Policy(post_quantum=Requirement.OFF)},
            "excludes these",
        ),
        ({"suites": ()}, "at least one cipher suite"),
        ({"signature_schemes": ()}, "at least one signature scheme"),
        ({"alpn": ("",)}, "1 to 255 bytes"),
        ({"alpn": ("ü" * 128,)}, "1 to 255 bytes"),
        ({"alpn": ("a", "a")}, "listed twice"),
        ({"psks": (PSK, PSK)}, "same identity"),
        (
            {"psks": (replace(PSK, hash=SHA384),), "suites": (TLS_AES_128_GCM_SHA256,)},
            "no configured cipher suite",
        ),
        ({"record_size_limit": 63}, "record_size_limit"),
        ({"record_size_limit": 16385}, "record_size_limit"),
        ({"policy": BOTH}, "needs a PSK"),
    ],
)
def test_what_neither_side_can_be(
    options: dict[str, Any], reason: str, trust: TrustStore, identity: Identity
) -> None:
    with pytest.raises(ConfigError, match=reason):
        ClientConfig(**{"verifier": trust, **options})
    with pytest.raises(ConfigError, match=reason):
        ServerConfig(**{"identities": (identity,), **options})


def test_what_a_client_cannot_be(trust: TrustStore) -> None:
    for shares in (-1, 4):
        with pytest.raises(ConfigError, match="key_shares"):
            ClientConfig(verifier=trust, key_shares=shares)
    with pytest.raises(ConfigError, match="needs a verifier"):
        ClientConfig(psks=(PSK,), policy=CERTIFICATE)


def test_what_a_server_cannot_be(identity: Identity) -> None:
    with pytest.raises(ConfigError, match="identity"):
        ServerConfig()
    with pytest.raises(ConfigError, match="needs an identity"):
        ServerConfig(psks=(PSK,), policy=CERTIFICATE)
    with pytest.raises(ConfigError, match="client_verifier"):
        ServerConfig(identities=(identity,), require_client_certificate=True)
    with pytest.raises(ConfigError, match="0 to 16"):
        ServerConfig(identities=(identity,), tickets_per_connection=17)
    for options in ({"lifetime": 0}, {"lifetime": 604801}, {"rotation": 0}):
        with pytest.raises(ConfigError):
            TicketIssuer(**options)
    with pytest.raises(ConfigError):
        CookieProtector(Secret(bytes(31)))
    for size in (0, 16385):
        with pytest.raises(ConfigError):
            PadToMultiple(size=size)


def test_the_policy_picks_the_groups(trust: TrustStore) -> None:
    def names(requirement: Requirement) -> list[str]:
        config = ClientConfig(verifier=trust, policy=Policy(post_quantum=requirement))
        return [group.name for group in config.group_list]

    hybrid, classical = names(Requirement.REQUIRE), names(Requirement.OFF)
    assert hybrid == ["X25519MLKEM768", "SecP256r1MLKEM768", "SecP384r1MLKEM1024"]
    assert classical == ["x25519", "secp256r1", "secp384r1"]
    assert names(Requirement.PREFER) == hybrid + classical


def test_a_session_says_what_it_rests_on(trust: TrustStore, identity: Identity) -> None:
    pair = Pair.make(
        ClientConfig(verifier=trust, psks=(PSK,), alpn=("h2",)),
        ServerConfig(identities=(identity,), psks=(PSK,), alpn=("h2",)),
    ).connect()
    assert json.loads(json.dumps(pair.client.session.as_json())) == {
        "version": "TLS 1.3",
        "cipher_suite": "TLS_AES_128_GCM_SHA256",
        "group": "X25519MLKEM768",
        "parts": ["ML-KEM-768", "X25519"],
        "signature_scheme": "ecdsa_secp256r1_sha256",
        "alpn": "h2",
        "psk_identity": "qkd-1",
        "auth": "certificate+psk",
        "resumed": False,
        "peer_subject": "CN=localhost",
        "verified_by": "ca",
        "vouched_names": ["localhost", "127.0.0.1"],
        "qkd_key_ids": [],
        "qkd_sources": [],
        "qkd_fallback": None,
        "policy": {
            "post_quantum": "require",
            "psk": "require",
            "authentication": "certificate+psk",
            "fresh_keys": "off",
            "fresh_qkd": "off",
            "one_time_pad": "off",
        },
        "key_updates": "standard",
        "one_time_pad": False,
        "epoch": 0,
        "epochs": [],
    }
    text = str(pair.client.session)
    for part in ("ML-KEM-768 + X25519 + PSK 'qkd-1'", "certificate+psk", "CN=localhost", "h2"):
        assert part in text


def test_the_memory_store(trust: TrustStore, identity: Identity) -> None:
    source = MemoryTicketStore()
    pair = Pair.make(
        ClientConfig(verifier=trust, ticket_store=source), ServerConfig(identities=(identity,))
    ).connect()
    pair.server.send_data(b"tickets")
    pair.pump()
    ticket = source.take("localhost")
    assert isinstance(ticket, SessionTicket)
    now = [ticket.received_at]
    store = MemoryTicketStore(max_servers=2, tickets_per_server=2, clock=lambda: now[0])
    for number in range(3):
        store.put("a", replace(ticket, ticket=bytes((number,))))
    taken = [store.take("a") for _ in range(3)]
    assert [one.ticket if one else None for one in taken] == [b"\2", b"\1", None]
    for name in ("a", "b", "c"):
        store.put(name, ticket)
    assert store.take("a") is None  # the server that was not heard of for longest
    now[0] -= 1  # the clock has gone back
    assert store.take("b") is None
    now[0] += ticket.lifetime + 2
    assert store.take("c") is None


@pytest.mark.parametrize(
    "limits",
    [{"certificate_message": 1023}, {"key_updates": 0}, {"tickets": 0}, {"empty_records": -1}],
)
def test_limits_that_nobody_keeps(limits: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=r"limit|certificate_message"):
        Limits(**limits)
