"""Certificate and key files as people have them, by kind."""

import base64
from collections.abc import Callable
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    pkcs7,
    pkcs12,
)

from hybridkex import DevCa, Identity, TrustStore
from hybridkex.crypto.pem import contents_of
from hybridkex.crypto.private_keys import load_private_key
from hybridkex.crypto.x509_parsing import UNREADABLE, certificates_from_pem
from hybridkex.errors import ConfigError

CA = DevCa.create()
SITE = CA.issue("a.example")
LEAF = SITE.leaf
KEY: Any = SITE.private_key
CERT_PEM = LEAF.public_bytes(Encoding.PEM)
KEY_PEM = KEY.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
PUBLIC = KEY.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
REQUEST = x509.CertificateSigningRequestBuilder(x509.Name([])).sign(KEY, hashes.SHA256())


def block(label: str, content: bytes) -> bytes:
    body = base64.encodebytes(content)
    return b"-----BEGIN %b-----\n%b-----END %b-----\n" % (label.encode(), body, label.encode())


DER = LEAF.public_bytes(Encoding.DER)
TRUSTED = block("TRUSTED CERTIFICATE", DER + b"\x30\0")

NO_CERTIFICATE: dict[str, tuple[bytes, str]] = {
    "DER": (DER, "x509 -inform DER"),
    "PKCS 12": (
        pkcs12.serialize_key_and_certificates(b"x", KEY, LEAF, None, NoEncryption()),
        "PKCS #12",
    ),
    "PKCS 7 in PEM": (pkcs7.serialize_certificates([LEAF], Encoding.PEM), "PKCS #7"),
    "PKCS 7 in DER": (pkcs7.serialize_certificates([LEAF], Encoding.DER), "PKCS #7 in DER"),
    "request": (REQUEST.public_bytes(Encoding.PEM), "certificate request"),
    "private key": (KEY_PEM, "a private key"),
    "key in DER": (
        KEY.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption()),
        "a key in DER",
    ),
    "public key": (PUBLIC, "a public key"),
    "trusted certificate": (TRUSTED, "trust settings"),
    "OpenSSH": (block("OPENSSH PRIVATE KEY", b"x"), "OpenSSH"),
    "PuTTY": (b"PuTTY-User-Key-File-3: ssh-ed25519\n", "PuTTY"),
    "UTF-16": (CERT_PEM.decode().encode("utf-16"), "UTF-16"),
    "empty": (b" \n", "empty"),
    "page": (b"<!DOCTYPE html><title>404</title>", "HTML"),
    "cut off": (CERT_PEM[:300], "truncated"),
    "typographic dashes": (CERT_PEM.replace(b"-----", "\u2014\u2014".encode()), "five hyphens"),
    "not base64": (CERT_PEM[:99] + b"\0" + CERT_PEM[99:], "not base64"),
    "malformed": (block("CERTIFICATE", DER[:-9]), "malformed"),
    "text": (b"hello", "without a PEM block"),
}


@pytest.mark.parametrize("kind", NO_CERTIFICATE)
def test_what_is_no_certificate_is_named(kind: str) -> None:
    data, words = NO_CERTIFICATE[kind]
    refusals: list[Callable[[], object]] = [
        lambda: Identity.from_pem(data, KEY_PEM),
        lambda: TrustStore.from_pem(data),
        lambda: TrustStore.from_pem(data, source="ca.pem"),
    ]
    for attempt in refusals:
        with pytest.raises(ConfigError) as caught:
            attempt()
        text = str(caught.value)
        assert words in text, text
        # Neither the library's words nor its data structures.
        assert not any(word in text for word in ("MalformedFraming", "ParseError", "http", "asn1"))


@pytest.mark.parametrize("kind", sorted(set(NO_CERTIFICATE) - {"private key"}))
def test_what_is_no_key_is_named(kind: str) -> None:
    data, words = NO_CERTIFICATE[kind]
    if kind in ("not base64", "malformed"):
        words = "it is a certificate"
    with pytest.raises(ConfigError) as caught:
        load_private_key(data, None, "key.pem")
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "broken",
    [CERT_PEM[:200], block("CERTIFICATE", DER[:-9]), TRUSTED, b"-----BEGIN CERTIFICATE-----"],
)
def test_no_certificate_is_left_out(broken: bytes) -> None:
    """A trust store has all authorities of its file, or there is none."""
    for data in (CA.pem + broken, broken + CA.pem):
        with pytest.raises(UNREADABLE):
            certificates_from_pem(data)


@pytest.mark.parametrize("last", [110, 111, 112, 113])
def test_a_key_of_a_wrong_length_is_refused(last: int) -> None:
    """X25519, X448, Ed25519 and Ed448; `cryptography` has another error for some lengths."""
    for length in (0, 16, 17, 31, 33, 57, 64, 90):
        inner = b"\x04" + bytes([length]) + bytes(length)
        body = b"\2\1\0" + bytes([0x30, 5, 6, 3, 43, 101, last, 4, len(inner)]) + inner
        for label in ("PRIVATE KEY", "EC PRIVATE KEY"):
            if (last, length) != (113, 57):
                with pytest.raises(ConfigError, match="its content is malformed"):
                    load_private_key(block(label, b"\x30" + bytes([len(body)]) + body), None, "x")


FORMS: dict[str, Callable[[bytes], bytes]] = {
    "CRLF": lambda data: data.replace(b"\n", b"\r\n"),
    "CR": lambda data: data.replace(b"\n", b"\r"),
    "byte order mark": lambda data: b"\xef\xbb\xbf" + data,
    "text around it": lambda data: b"# caf\xe9 \xff\n" + data + b"junk\0",
    "spaces": lambda data: data.replace(b"\n", b" \n "),
    "empty lines": lambda data: data.replace(b"\n", b"\n\n"),
    "no last newline": bytes.rstrip,
    "parameters before it": lambda data: block("EC PARAMETERS", b"x") + data,
    "a revocation list behind it": lambda data: data + block("X509 CRL", b"x"),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_that_are_read(form: str) -> None:
    change = FORMS[form]
    identity = Identity.from_pem(change(CERT_PEM + CA.pem), change(CERT_PEM + KEY_PEM))
    assert identity.chain == (
        DER,
        *(
            one.public_bytes(Encoding.DER)
            for one in TrustStore.from_pem(change(CA.pem)).authorities
        ),
    )
    assert certificates_from_pem(change(CERT_PEM.replace(b" CERT", b" X509 CERT"))) == [LEAF]


@pytest.mark.parametrize("label", ["PRIVATE KEY", "EC PRIVATE KEY", "RSA PRIVATE KEY"])
@pytest.mark.parametrize("form", [PrivateFormat.PKCS8, PrivateFormat.TraditionalOpenSSL])
@pytest.mark.parametrize(
    "key", [ec.generate_private_key(ec.SECP256R1()), rsa.generate_private_key(65537, 2048)]
)
def test_a_key_under_another_label(label: str, form: PrivateFormat, key: Any) -> None:
    data = block(label, key.private_bytes(Encoding.DER, form, NoEncryption()))
    assert load_private_key(data, None, "k").public_key() == key.public_key()


def test_passwords_and_ciphers() -> None:
    unknown = block("ENCRYPTED PRIVATE KEY", b"\x30\0")
    for data, password, words in (
        (unknown, None, "openssl pkey -in FILE -out NEW"),
        (unknown, b"", "the password is wrong"),
        (unknown, b"x", "or its cipher is not supported"),
        (KEY_PEM, b"", "is not encrypted"),
    ):
        with pytest.raises(ConfigError, match=words):
            load_private_key(data, password, "k")


@pytest.mark.parametrize("size", range(12))
def test_contents_of_short_files(size: int) -> None:
    for start in (b"\x30\x82", b"\x30\x80", b"-----BEGIN", b"\xff\xfe", b"<"):
        assert contents_of((start + bytes(size))[:size])
