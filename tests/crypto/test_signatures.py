"""Signature schemes of CertificateVerify: each against `cryptography` with its parameters typed out
again, each against what is not its own."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import (
    ec,
    ed448,
    ed25519,
    mldsa,
    padding,
    rsa,
    x25519,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridkex.constants import Alert
from hybridkex.crypto.rsa_pss import PssParameters, RsaPssKey
from hybridkex.crypto.signatures import (
    ALL_SCHEMES,
    CERTIFICATE_ONLY_SCHEMES,
    SignatureScheme,
    choose_scheme,
)
from hybridkex.errors import DecryptError, IllegalParameter

CONTENT = b" " * 64 + b"TLS 1.3, server CertificateVerify\0" + bytes(32)

MAKE: dict[str, Callable[[], Any]] = {
    "p256": lambda: ec.generate_private_key(ec.SECP256R1()),
    "p384": lambda: ec.generate_private_key(ec.SECP384R1()),
    "p521": lambda: ec.generate_private_key(ec.SECP521R1()),
    "ed25519": ed25519.Ed25519PrivateKey.generate,
    "rsa2048": lambda: rsa.generate_private_key(65537, 2048),
    "rsa1024": lambda: rsa.generate_private_key(65537, 1024),
    "rsa1040": lambda: rsa.generate_private_key(65537, 1040),
    "rsapss": lambda: RsaPssKey(rsa.generate_private_key(65537, 2048), None),
    "rsapss384": lambda: RsaPssKey(
        rsa.generate_private_key(65537, 2048), PssParameters("sha384", "sha384", 48)
    ),
    "rsapss1": lambda: RsaPssKey(
        rsa.generate_private_key(65537, 2048), PssParameters("sha1", "sha1", 20)
    ),
    "mldsa44": mldsa.MLDSA44PrivateKey.generate,
    "mldsa65": mldsa.MLDSA65PrivateKey.generate,
    "mldsa87": mldsa.MLDSA87PrivateKey.generate,
    # Kinds that go with no scheme.
    "secp256k1": lambda: ec.generate_private_key(ec.SECP256K1()),
    "x25519": x25519.X25519PrivateKey.generate,
    "ed448": ed448.Ed448PrivateKey.generate,
}


@cache
def key(kind: str) -> Any:
    return MAKE[kind]()


def pss(algorithm: hashes.HashAlgorithm, salt: int) -> dict[str, Any]:
    return {
        "padding": padding.PSS(mgf=padding.MGF1(algorithm), salt_length=salt),
        "algorithm": algorithm,
    }


# name: code point, kinds of key that suit, the parameters of `cryptography`'s verify.
TABLE: dict[str, tuple[int, set[str], dict[str, Any]]] = {
    "mldsa44": (0x0904, {"mldsa44"}, {"context": b""}),
    "mldsa65": (0x0905, {"mldsa65"}, {"context": b""}),
    "mldsa87": (0x0906, {"mldsa87"}, {"context": b""}),
    "ecdsa_secp256r1_sha256": (
        0x0403,
        {"p256"},
        {"signature_algorithm": ec.ECDSA(hashes.SHA256())},
    ),
    "ecdsa_secp384r1_sha384": (
        0x0503,
        {"p384"},
        {"signature_algorithm": ec.ECDSA(hashes.SHA384())},
    ),
    "ecdsa_secp521r1_sha512": (
        0x0603,
        {"p521"},
        {"signature_algorithm": ec.ECDSA(hashes.SHA512())},
    ),
    "ed25519": (0x0807, {"ed25519"}, {}),
    "rsa_pss_rsae_sha256": (0x0804, {"rsa2048", "rsa1024", "rsa1040"}, pss(hashes.SHA256(), 32)),
    "rsa_pss_rsae_sha384": (0x0805, {"rsa2048", "rsa1024", "rsa1040"}, pss(hashes.SHA384(), 48)),
    "rsa_pss_rsae_sha512": (0x0806, {"rsa2048", "rsa1040"}, pss(hashes.SHA512(), 64)),
    "rsa_pss_pss_sha256": (0x0809, {"rsapss"}, pss(hashes.SHA256(), 32)),
    "rsa_pss_pss_sha384": (0x080A, {"rsapss", "rsapss384"}, pss(hashes.SHA384(), 48)),
    "rsa_pss_pss_sha512": (0x080B, {"rsapss"}, pss(hashes.SHA512(), 64)),
}

every_scheme = pytest.mark.parametrize("scheme", ALL_SCHEMES, ids=str)


def key_of(scheme: SignatureScheme) -> Any:
    return key(sorted(TABLE[scheme.name][1])[-1])


def test_the_table_is_whole() -> None:
    assert {scheme.name: scheme.code for scheme in ALL_SCHEMES} == {
        name: code for name, (code, _, _) in TABLE.items()
    }
    # RFC 9846 section 4.3.3: none of PKCS#1 v1.5 in CertificateVerify, no SHA-1 anywhere.
    assert not {scheme.code for scheme in ALL_SCHEMES} & set(CERTIFICATE_ONLY_SCHEMES)
    assert [hex(code) for code in CERTIFICATE_ONLY_SCHEMES] == ["0x401", "0x501", "0x601"]


@every_scheme
@pytest.mark.parametrize("content", [b"", CONTENT, bytes(100_000)], ids=len)
def test_sign_and_verify(scheme: SignatureScheme, content: bytes) -> None:
    _, kinds, parameters = TABLE[scheme.name]
    for kind in kinds:
        private = key(kind)
        signature = scheme.sign(private, content)
        scheme.verify(private.public_key(), signature, content)
        public = private.public_key()
        bare = public.key if isinstance(public, RsaPssKey) else public
        bare.verify(signature=signature, data=content, **parameters)


@every_scheme
@pytest.mark.parametrize("kind", MAKE)
def test_which_keys_suit(scheme: SignatureScheme, kind: str) -> None:
    private = key(kind)
    expected = kind in TABLE[scheme.name][1]
    assert scheme.suits(private) == expected
    assert scheme.suits(private.public_key()) == expected
    if not expected:
        with pytest.raises(IllegalParameter) as caught:
            scheme.verify(private.public_key(), b"", CONTENT)
        assert caught.value.alert == Alert.ILLEGAL_PARAMETER


@every_scheme
def test_what_is_no_key_does_not_suit(scheme: SignatureScheme) -> None:
    for thing in (None, b"key", object()):
        assert not scheme.suits(thing)


def refuse(scheme: SignatureScheme, public: Any, signature: bytes, content: bytes) -> None:
    with pytest.raises(DecryptError) as caught:
        scheme.verify(public, signature, content)
    assert caught.value.alert == Alert.DECRYPT_ERROR
    assert scheme.name in str(caught.value)


@every_scheme
def test_flipped_bits(scheme: SignatureScheme) -> None:
    """One bit in every byte of the signature (of a long one, in many), one in the content."""
    private = key_of(scheme)
    public, signature = private.public_key(), scheme.sign(private, CONTENT)
    for index in range(0, len(signature), max(1, len(signature) // 150)):
        changed = bytearray(signature)
        changed[index] ^= 1 << index % 8
        refuse(scheme, public, bytes(changed), CONTENT)
    for index in range(len(CONTENT)):
        content = bytearray(CONTENT)
        content[index] ^= 1 << index % 8
        refuse(scheme, public, signature, bytes(content))


@every_scheme
def test_signatures_that_are_none(scheme: SignatureScheme) -> None:
    private = key_of(scheme)
    public, signature = private.public_key(), scheme.sign(private, CONTENT)
    for wrong in (
        b"",
        b"\0",
        signature[:-1],
        signature + b"\0",
        b"\0" + signature,
        bytes(len(signature)),
        b"\xff" * len(signature),
        signature * 2,
        bytes(0xFFFF),
    ):
        refuse(scheme, public, wrong, CONTENT)


@every_scheme
def test_another_key_of_the_same_kind(scheme: SignatureScheme) -> None:
    kind = sorted(TABLE[scheme.name][1])[-1]
    signature = scheme.sign(MAKE[kind](), CONTENT)
    refuse(scheme, key(kind).public_key(), signature, CONTENT)


@settings(max_examples=200, deadline=None)
@given(scheme=st.sampled_from(ALL_SCHEMES), signature=st.binary(max_size=300))
def test_random_signatures(scheme: SignatureScheme, signature: bytes) -> None:
    refuse(scheme, key_of(scheme).public_key(), signature, CONTENT)


def test_the_salt_is_as_long_as_the_hash() -> None:
    """RFC 9846 section 4.3.3: other lengths are refused, and ours is that one."""
    (scheme,) = (scheme for scheme in ALL_SCHEMES if scheme.name == "rsa_pss_rsae_sha256")
    private = key("rsa2048")
    for salt in (0, 20, 31, 33, 48):
        signature = private.sign(CONTENT, **pss(hashes.SHA256(), salt))
        refuse(scheme, private.public_key(), signature, CONTENT)
    with pytest.raises(InvalidSignature):
        private.public_key().verify(
            scheme.sign(private, CONTENT), CONTENT, **pss(hashes.SHA256(), 31)
        )


def test_a_signature_for_another_scheme_of_the_same_key() -> None:
    for kind, prefix in (("rsapss", "rsa_pss_pss"), ("rsa2048", "rsa_pss_rsae")):
        private = key(kind)
        schemes = [scheme for scheme in ALL_SCHEMES if scheme.name.startswith(prefix)]
        for signing in schemes:
            for verifying in schemes:
                if signing is not verifying:
                    signature = signing.sign(private, CONTENT)
                    refuse(verifying, private.public_key(), signature, CONTENT)
    pkcs1 = private.sign(CONTENT, padding.PKCS1v15(), hashes.SHA256())
    refuse(schemes[0], private.public_key(), pkcs1, CONTENT)


def test_mldsa_context_is_empty() -> None:
    """A signature made for another context does not count."""
    (scheme,) = (scheme for scheme in ALL_SCHEMES if scheme.name == "mldsa65")
    private = key("mldsa65")
    refuse(scheme, private.public_key(), private.sign(CONTENT, b"other"), CONTENT)


ALL_CODES = [scheme.code for scheme in ALL_SCHEMES]


@pytest.mark.parametrize("kind", MAKE)
def test_choose_scheme_for_every_key(kind: str) -> None:
    """Our first one that suits, whatever the order of the peer's list."""
    expected = [scheme for scheme in ALL_SCHEMES if kind in TABLE[scheme.name][1]]
    for theirs in (ALL_CODES, ALL_CODES[::-1], [0x0A0A, *ALL_CODES, 0xFFFF]):
        chosen = choose_scheme(key(kind), ALL_SCHEMES, theirs)
        assert chosen is (expected[0] if expected else None)


def test_choose_scheme_keeps_to_both_lists() -> None:
    private = key("rsa2048")
    sha256, sha384, sha512 = (
        scheme for scheme in ALL_SCHEMES if scheme.name.startswith("rsa_pss_rsae")
    )
    assert choose_scheme(private, ALL_SCHEMES, [sha512.code, sha384.code]) is sha384
    assert choose_scheme(private, [sha512, sha256], ALL_CODES) is sha512
    assert choose_scheme(private, [sha512, sha256], [sha384.code]) is None
    assert choose_scheme(private, [], ALL_CODES) is None
    assert choose_scheme(private, ALL_SCHEMES, []) is None
    assert choose_scheme(private, ALL_SCHEMES, iter(CERTIFICATE_ONLY_SCHEMES)) is None


def test_a_small_rsa_key_and_sha512() -> None:
    """RFC 8017 section 9.1.1: hash, salt and two bytes must fit, and in 1,024 bits they do not."""
    (sha512,) = (scheme for scheme in ALL_SCHEMES if scheme.name == "rsa_pss_rsae_sha512")
    assert choose_scheme(key("rsa1024"), ALL_SCHEMES, [sha512.code]) is None
    assert choose_scheme(key("rsa1040"), ALL_SCHEMES, [sha512.code]) is sha512
    sha512.sign(key("rsa1040"), CONTENT)


@every_scheme
def test_names(scheme: SignatureScheme) -> None:
    assert str(scheme) == repr(scheme) == scheme.name
