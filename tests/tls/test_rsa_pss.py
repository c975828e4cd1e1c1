"""Certificates whose key is for RSASSA-PSS alone (RFC 9846 section 4.3.3), in both roles."""

import hashlib
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tls_glue import ANY_GROUP, Pair

from hybridkex.auth import Identity, Pins, TrustStore
from hybridkex.auth.certificates import spki_sha256
from hybridkex.constants import Alert, SignatureSchemeCode
from hybridkex.crypto.kex import X25519
from hybridkex.crypto.rsa_pss import RsaPssKey, raw_key, spki_of
from hybridkex.crypto.signatures import ALL_SCHEMES, choose_scheme
from hybridkex.errors import AlertReceived, HandshakeFailure, IllegalParameter
from hybridkex.tls.config import ClientConfig, ServerConfig

VECTORS = Path(__file__).parents[1] / "vectors" / "rsa_pss"
TRUST = TrustStore.from_file(VECTORS / "ca.pem")
USABLE = {"any": "sha256", "sha256": "sha256", "sha384": "sha384", "sha512": "sha512"}
UNUSABLE = ("sha256-salt-20", "sha256-mgf1-sha1", "sha1")


@cache  # a key of RSA is checked for 40 ms
def identity_of(name: str) -> Identity:
    path = VECTORS / f"{name}.pem"
    return Identity.from_files(path, path)


def configs(server: Identity, **client: Any) -> tuple[ClientConfig, ServerConfig]:
    return (
        ClientConfig(verifier=TRUST, groups=(X25519,), policy=ANY_GROUP, **client),
        ServerConfig(identities=(server,), groups=(X25519,), policy=ANY_GROUP),
    )


@pytest.mark.parametrize("name", USABLE)
def test_a_server_and_a_client(name: str) -> None:
    identity = identity_of(name)
    client, server = configs(identity, identity=identity)
    server = replace(server, client_verifier=TRUST, require_client_certificate=True)
    pair = Pair.make(client, server).connect()
    assert pair.client.session.signature_scheme == f"rsa_pss_pss_{USABLE[name]}"
    pair.exchange(b"question", b"answer")


@pytest.mark.parametrize("name", UNUSABLE)
def test_parameters_that_no_scheme_has(name: str) -> None:
    """ "The parameters in the signature MUST be identical to those in the public key." """
    identity = identity_of(name)
    assert choose_scheme(identity.signing_key, ALL_SCHEMES, range(1 << 16)) is None
    pair = Pair.make(*configs(identity))
    pair.client.start()
    pair.fight()
    assert isinstance(pair.errors["server"], HandshakeFailure)
    assert isinstance(pair.errors["client"], AlertReceived)


@pytest.mark.parametrize("name", [*USABLE, *UNUSABLE])
@pytest.mark.parametrize("scheme", [one for one in ALL_SCHEMES if "rsa" in one.name], ids=str)
def test_the_wrong_scheme_is_refused(name: str, scheme: Any) -> None:
    """A peer that signs with it anyway is refused, and a good signature helps it nothing."""
    identity = identity_of(name)
    if scheme.suits(identity.signing_key):
        return

    class Forced(Identity):
        """Signs with the bare key, as rsaEncryption."""

        signing_key = property(lambda self: self.private_key)  # type: ignore[assignment]

    forced = Forced(identity.chain, identity.private_key)
    cheating = replace(scheme, suits=lambda key: True)
    if "pss_pss" in scheme.name:
        cheating = replace(
            cheating,
            _sign=lambda key, content: scheme.sign(RsaPssKey(key, None), content),
        )
    client, server = configs(forced)
    pair = Pair.make(client, replace(server, signature_schemes=(cheating,)))
    pair.client.start()
    pair.fight()
    assert isinstance(pair.errors["client"], IllegalParameter)
    assert pair.errors["client"].alert == Alert.ILLEGAL_PARAMETER


def test_ordinary_rsa_keys_do_not_sign_by_the_other_schemes() -> None:
    key = identity_of("any").private_key
    for scheme in ALL_SCHEMES:
        if "rsa" in scheme.name:
            assert scheme.suits(key) == ("rsae" in scheme.name)
            assert scheme.suits(RsaPssKey(key, None)) == ("pss_pss" in scheme.name)  # type: ignore[arg-type]


def test_what_is_offered() -> None:
    codes = {scheme.code for scheme in ALL_SCHEMES}
    for size in (256, 384, 512):
        assert SignatureSchemeCode[f"RSA_PSS_PSS_SHA{size}"] in codes
        assert SignatureSchemeCode[f"RSA_PSS_RSAE_SHA{size}"] in codes


@pytest.mark.parametrize("name", USABLE)
def test_the_pin_is_over_the_key_as_it_stands_there(name: str) -> None:
    """As ``openssl x509 -pubkey | openssl pkey -pubin -outform DER | sha256sum`` has it."""
    identity = identity_of(name)
    spki = spki_of(identity.leaf)
    assert spki in identity.chain[0]
    pin = hashlib.sha256(spki).hexdigest()
    assert spki_sha256(identity.leaf) == pin
    client, server = configs(identity)
    Pair.make(replace(client, verifier=Pins(frozenset((pin,)))), server).connect()
    key = identity.leaf.public_key()
    assert raw_key(spki, key) == RsaPssKey(key, identity.signing_key.parameters)  # type: ignore[arg-type]
