"""Our own certificate and key: what is loaded, and what is refused with which words."""

import subprocess
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa, x25519
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
)
from cryptography.x509.oid import ExtendedKeyUsageOID

from hybridkex import ClientConfig, ServerConfig
from hybridkex.auth import DevCa, DnsName, Identity, TrustStore, parse_peer_name
from hybridkex.errors import ConfigError
from tests.auth.corpus import key_of, leaf, usage
from tests.auth.der import DAY, NOW, ext
from tests.auth.der import time as der_time

CA = DevCa.create()
TRUST = TrustStore((CA.certificate,))
SITE = CA.issue("a.example", "*.b.example", "127.0.0.1", "::1", uris=["urn:sae:a"])


def key_pem(key: Any, password: bytes | None = None, form: PrivateFormat | None = None) -> bytes:
    encryption = NoEncryption() if password is None else BestAvailableEncryption(password)
    made: bytes = key.private_bytes(Encoding.PEM, form or PrivateFormat.PKCS8, encryption)
    return made


def chain_pem(*chain: bytes) -> bytes:
    return b"".join(x509.load_der_x509_certificate(one).public_bytes(Encoding.PEM) for one in chain)


CERT_PEM, KEY_PEM = chain_pem(*SITE.chain), key_pem(SITE.private_key)


def test_from_pem() -> None:
    loaded = Identity.from_pem(CERT_PEM, KEY_PEM)
    assert loaded.chain == SITE.chain
    assert loaded.names == ("a.example", "*.b.example", "127.0.0.1", "::1", "urn:sae:a")
    assert loaded.leaf.public_key() == SITE.private_key.public_key()
    assert loaded.private_key.public_key() == SITE.private_key.public_key()


@pytest.mark.parametrize("algorithm", ["rsa", "ed25519", "mldsa44", "mldsa65", "mldsa87"])
def test_every_kind_of_key(algorithm: str) -> None:
    made = CA.issue("a.example", algorithm=algorithm)
    pem = key_pem(made.private_key)
    assert Identity.from_pem(chain_pem(*made.chain), pem).chain == made.chain


def test_a_chain_comes_along() -> None:
    made = CA.intermediate().issue("a.example")
    assert len(made.chain) == 2
    loaded = Identity.from_pem(chain_pem(*made.chain), key_pem(made.private_key))
    assert loaded.chain == made.chain
    backwards = chain_pem(*reversed(made.chain))
    with pytest.raises(ConfigError, match=r"starts with CN=.*CA: put the leaf first"):
        Identity.from_pem(backwards, key_pem(made.private_key))


def test_one_file_for_both(tmp_path: Path) -> None:
    """As many servers want it: certificate and key in one file, in either order."""
    for content in (CERT_PEM + KEY_PEM, KEY_PEM + CERT_PEM):
        file = tmp_path / "site.pem"
        file.write_bytes(content)
        assert Identity.from_files(file, str(file)).chain == SITE.chain


def test_other_forms_of_keys(tmp_path: Path) -> None:
    old = key_pem(SITE.private_key, form=PrivateFormat.TraditionalOpenSSL)
    assert b"BEGIN EC PRIVATE KEY" in old
    assert Identity.from_pem(CERT_PEM, old).chain == SITE.chain
    locked = key_pem(SITE.private_key, b"secret")
    assert Identity.from_pem(CERT_PEM, locked, password=b"secret").chain == SITE.chain


def refused(words: str, *arguments: Any, **more: Any) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        Identity.from_pem(*arguments, **more)
    # Neither a key nor a password gets into the text, or into a chained error's.
    assert "BEGIN" not in str(caught.value)
    assert "secret" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_what_does_not_load() -> None:
    locked = key_pem(SITE.private_key, b"secret")
    refused("the certificate is not a certificate in PEM form", b"rubbish", KEY_PEM)
    refused("the certificate is not a certificate in PEM form", KEY_PEM, KEY_PEM)
    refused("the certificate is not a certificate in PEM form", SITE.chain[0], KEY_PEM)
    refused("the private key is not a private key in PEM form", CERT_PEM, b"rubbish")
    refused("the private key is not a private key in PEM form", CERT_PEM, CERT_PEM)
    refused("is encrypted, and no password was given", CERT_PEM, locked)
    refused("or the password is wrong", CERT_PEM, locked, password=b"secret no more")
    refused("not encrypted, and a password was given", CERT_PEM, KEY_PEM, password=b"secret")


def test_a_key_that_is_another_ones() -> None:
    other = key_pem(ec.generate_private_key(ec.SECP256R1()))
    refused("not that of the certificate CN=a.example", CERT_PEM, other)
    of_another_kind = key_pem(x25519.X25519PrivateKey.generate())
    refused("not that of the certificate CN=a.example", CERT_PEM, of_another_kind)


def test_certificates_that_nobody_should_accept() -> None:
    key = rsa.generate_private_key(65537, 1024)
    with pytest.raises(ConfigError, match="CN=weak has an RSA key of 1024 bits"):
        CA.issue("weak", private_key=key)
    with pytest.raises(ConfigError, match="at least one"):
        Identity((), SITE.private_key)
    with pytest.raises(ConfigError, match="does not parse"):
        Identity((b"rubbish",), SITE.private_key)
    with pytest.raises(ConfigError, match="does not parse"):
        Identity((*SITE.chain, b"rubbish"), SITE.private_key)
    name = x509.Name([])
    broken = x509.UnrecognizedExtension(x509.SubjectAlternativeName.oid, b"\xff")
    certificate = (
        x509.CertificateBuilder(name, name, SITE.private_key.public_key(), 1)
        .not_valid_before(SITE.leaf.not_valid_before_utc)
        .not_valid_after(SITE.leaf.not_valid_after_utc)
        .add_extension(broken, critical=False)
        .sign(SITE.private_key, hashes.SHA256())
    )
    with pytest.raises(ConfigError, match="does not parse"):
        Identity((certificate.public_bytes(Encoding.DER),), SITE.private_key)


def test_files_are_named(tmp_path: Path) -> None:
    cert, key, missing = tmp_path / "cert.pem", tmp_path / "key.pem", tmp_path / "missing.pem"
    cert.write_bytes(CERT_PEM)
    key.write_bytes(KEY_PEM)
    assert Identity.from_files(cert, key).chain == SITE.chain
    for arguments, named in (
        ((missing, key), missing),
        ((cert, missing), missing),
        ((key, key), key),
        ((cert, cert), cert),
        ((tmp_path, key), tmp_path),
    ):
        with pytest.raises(ConfigError, match=str(named)):
            Identity.from_files(*arguments)
    key.write_bytes(key_pem(SITE.private_key, b"secret"))
    with pytest.raises(ConfigError, match=rf"{key} is encrypted"):
        Identity.from_files(cert, key)
    assert Identity.from_files(cert, key, password=b"secret").chain == SITE.chain


@pytest.mark.parametrize(
    ("name", "fits"),
    [
        ("a.example", True),
        ("A.EXAMPLE.", True),
        ("b.a.example", False),
        ("x.b.example", True),
        ("b.example", False),
        ("y.x.b.example", False),
        ("127.0.0.1", True),
        ("127.0.0.2", False),
        ("[::1]", True),
        ("", False),
        ("not a name", False),
        ("\x00", False),
        ("*.b.example", False),
        ("urn:sae:a", False),
    ],
)
def test_which_names_it_is_for(name: str, fits: bool) -> None:
    assert SITE.matches(name) is fits
    if fits:
        assert SITE.matches(parse_peer_name(name))
    assert not CA.issue(common_name="a.example").matches(DnsName("a.example"))


def test_the_key_does_not_show() -> None:
    shown = repr(SITE)
    assert "rivateKey" not in shown
    assert "private_key" not in shown
    assert "a.example" in shown


def test_a_key_with_its_parameters_before_it(tmp_path: Path, openssl: str) -> None:
    """`openssl ecparam -genkey` writes EC PARAMETERS in front of the key."""
    made = subprocess.run(
        [openssl, "ecparam", "-name", "prime256v1", "-genkey"],
        capture_output=True,
        check=True,
        timeout=20,
    ).stdout
    assert made.startswith(b"-----BEGIN EC PARAMETERS-----")
    refused("not that of the certificate", CERT_PEM, made)


def test_a_certificate_with_an_extension_twice() -> None:
    """The library parses lazily and has errors of its own, which are none of ours."""
    whole = DevCa.create().issue("localhost")
    twice = whole.chain[0].replace(b"\x06\x03\x55\x1d\x23", b"\x06\x03\x55\x1d\x0e", 1)
    assert twice != whole.chain[0]
    with pytest.raises(
        ConfigError,
        match=r"our own certificate does not parse: it has subjectKeyIdentifier .* twice",
    ):
        Identity((twice,), whole.private_key)


# --- certificates that no peer can accept ---------------------------------------------------------


def pem_of(certificate: bytes) -> bytes:
    return x509.load_der_x509_certificate(certificate).public_bytes(Encoding.PEM)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"version": None, "extensions": None}, "X.509 version 1"),
        ({"ku": ext(usage("key_encipherment"), True)}, "keyUsage lacks digitalSignature"),
        ({"ku": ext(usage("key_cert_sign"), True)}, "keyUsage lacks digitalSignature"),
        ({"not_after": der_time(NOW - 3650 * DAY)}, "expired on 2020"),
        ({"not_before": der_time(NOW + 3650 * DAY)}, "is not valid before 2040"),
    ],
)
def test_own_certificates_that_cannot_work(changes: dict[str, Any], words: str) -> None:
    dates = {"not_before": der_time(NOW - 7300 * DAY), "not_after": der_time(NOW + 7300 * DAY)}
    key = key_of("p256/leaf").private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    assert Identity.from_pem(pem_of(leaf(**dates)), key)
    with pytest.raises(ConfigError, match=words):
        Identity.from_pem(pem_of(leaf(**{**dates, **changes})), key)


def test_own_certificates_and_their_role() -> None:
    """extendedKeyUsage that excludes the role of the configuration: no peer accepts it."""
    server, client = ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH
    for uses, serves, calls in (
        ([server], True, False),
        ([client], False, True),
        ([server, client], True, True),
        ([ExtendedKeyUsageOID.EMAIL_PROTECTION], False, False),
    ):
        identity = CA.issue("a.example", usages=uses)
        for accepted, make in (
            (serves, lambda one=identity: ServerConfig(identities=(one,))),
            (calls, lambda one=identity: ClientConfig(verifier=TRUST, identity=one)),
        ):
            if accepted:
                make()
            else:
                with pytest.raises(ConfigError, match="extendedKeyUsage lacks"):
                    make()
