"""The small authority: its certificates as others see them, and ``hybridkex dev-ca``."""

import os
import stat
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, mldsa, padding, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID
from forked import Forkserver
from OpenSSL import crypto

from hybridkex.auth import DevCa, Identity, TrustStore, parse_peer_name, spki_sha256
from hybridkex.auth.dev_ca import ALGORITHMS, write_identity
from hybridkex.errors import CertificateRejected, ConfigError

every_algorithm = pytest.mark.parametrize("algorithm", ALGORITHMS)
NAMES = ("localhost", "127.0.0.1", "::1")
# What stock OpenSSL 3.0 knows; the one inside `cryptography` knows all.
CLASSICAL = [name for name in ALGORITHMS if not name.startswith("mldsa")]


def extension(certificate: x509.Certificate, kind: type[x509.ExtensionType]) -> x509.Extension:  # type: ignore[type-arg]
    return certificate.extensions.get_extension_for_class(kind)


@every_algorithm
def test_certificates_have_what_verifiers_want(algorithm: str) -> None:
    ca = DevCa.create(algorithm=algorithm)
    leaf = ca.issue(*NAMES, algorithm=algorithm).leaf
    root = ca.certificate
    assert root.subject == root.issuer == leaf.issuer
    assert extension(root, x509.BasicConstraints).critical
    assert extension(root, x509.BasicConstraints).value.ca
    assert extension(root, x509.KeyUsage).critical
    assert extension(root, x509.KeyUsage).value.key_cert_sign
    assert extension(leaf, x509.BasicConstraints).value.ca is False
    assert extension(leaf, x509.KeyUsage).critical
    assert extension(leaf, x509.KeyUsage).value.digital_signature
    assert not extension(leaf, x509.KeyUsage).value.key_cert_sign
    assert not extension(leaf, x509.SubjectAlternativeName).critical
    assert set(extension(leaf, x509.ExtendedKeyUsage).value) == {
        ExtendedKeyUsageOID.SERVER_AUTH,
        ExtendedKeyUsageOID.CLIENT_AUTH,
    }
    assert (
        extension(leaf, x509.AuthorityKeyIdentifier).value.key_identifier
        == extension(root, x509.SubjectKeyIdentifier).value.digest
    )
    assert extension(leaf, x509.SubjectKeyIdentifier).value.digest
    assert root.serial_number != leaf.serial_number


@every_algorithm
def test_keys_are_what_they_are_called(algorithm: str) -> None:
    ca = DevCa.create(algorithm=algorithm)
    key = ca.issue("a", algorithm=algorithm).private_key
    kind = {
        "ecdsa": ec.EllipticCurvePrivateKey,
        "rsa": rsa.RSAPrivateKey,
        "ed25519": ed25519.Ed25519PrivateKey,
        "mldsa44": mldsa.MLDSA44PrivateKey,
        "mldsa65": mldsa.MLDSA65PrivateKey,
        "mldsa87": mldsa.MLDSA87PrivateKey,
    }[algorithm if algorithm.startswith("mldsa") else algorithm.partition("-")[0]]
    assert isinstance(key, kind)
    issuer = ec.EllipticCurvePrivateKey if algorithm == "ed25519" else kind
    assert isinstance(ca.private_key, issuer)
    assert ca.algorithm == ("ecdsa" if algorithm == "ed25519" else algorithm)
    if isinstance(key, ec.EllipticCurvePrivateKey):
        assert key.key_size == int(algorithm.partition("-p")[2] or 256)
    signed_with = ca.certificate.signature_algorithm_parameters
    assert isinstance(signed_with, padding.PSS) is (algorithm == "rsa-pss")


@every_algorithm
def test_openssl_in_memory_accepts_the_chain(algorithm: str) -> None:
    """The OpenSSL of the `cryptography` wheel, at its strictest about X.509."""
    root = DevCa.create(algorithm=algorithm)
    middle = root.intermediate(algorithm=algorithm)
    identity = middle.issue("localhost", algorithm=algorithm)
    store = crypto.X509Store()
    store.add_cert(crypto.X509.from_cryptography(root.certificate))
    store.set_flags(crypto.X509StoreFlags.X509_STRICT | crypto.X509StoreFlags.CHECK_SS_SIGNATURE)
    leaf, *others = (
        crypto.X509.from_cryptography(x509.load_der_x509_certificate(one)) for one in identity.chain
    )
    crypto.X509StoreContext(store, leaf, chain=others).verify_certificate()
    with pytest.raises(crypto.X509StoreContextError, match="unable to get local issuer"):
        crypto.X509StoreContext(store, leaf, chain=[]).verify_certificate()


@pytest.mark.parametrize("algorithm", CLASSICAL)
def test_stock_openssl_accepts_the_files(algorithm: str, tmp_path: Path, openssl: str) -> None:
    ca = DevCa.create(algorithm=algorithm)
    write_identity(tmp_path, ca, ca.issue(*NAMES, "*.b.example", algorithm=algorithm))

    def verify(*options: str) -> "subprocess.CompletedProcess[str]":
        files = ["-CAfile", str(tmp_path / "ca.pem"), str(tmp_path / "cert.pem")]
        return subprocess.run(
            [openssl, "verify", "-x509_strict", *options, *files],
            capture_output=True,
            text=True,
            check=False,
            timeout=20,
        )

    for options in (
        ("-purpose", "sslserver", "-verify_hostname", "localhost"),
        ("-purpose", "sslserver", "-verify_hostname", "a.b.example"),
        ("-purpose", "sslserver", "-verify_ip", "::1"),
        ("-purpose", "sslclient"),
    ):
        done = verify(*options)
        assert done.returncode == 0, done.stderr
    assert verify("-verify_hostname", "other.test").returncode != 0


def test_names_are_recognised() -> None:
    identity = DevCa.create().issue(
        "bücher.example", "*.bücher.example", "10.0.0.1", "[2001:db8::1]", uris=["urn:sae:alice"]
    )
    names = extension(identity.leaf, x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == [
        "xn--bcher-kva.example",
        "*.xn--bcher-kva.example",
    ]
    assert [str(one) for one in names.get_values_for_type(x509.IPAddress)] == [
        "10.0.0.1",
        "2001:db8::1",
    ]
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == ["urn:sae:alice"]
    assert identity.leaf.subject.rfc4514_string() == "CN=bücher.example"


def test_subjects() -> None:
    ca = DevCa.create("Our CA")
    assert ca.certificate.subject.rfc4514_string() == "CN=Our CA"
    assert ca.issue("a", common_name="Alice").leaf.subject.rfc4514_string() == "CN=Alice"
    long = "a" * 60 + ".example"
    assert ca.issue(long).leaf.subject.rfc4514_string() == "CN=" + long[:64]
    nameless = ca.issue().leaf
    assert nameless.subject.rfc4514_string() == "CN=hybridkex"
    with pytest.raises(x509.ExtensionNotFound):
        extension(nameless, x509.SubjectAlternativeName)


def test_usages_and_dates_and_keys_can_be_chosen() -> None:
    start, end = datetime(2031, 1, 1, tzinfo=UTC), datetime(2031, 2, 1, tzinfo=UTC)
    ca = DevCa.create(not_before=start, not_after=end)
    key = ec.generate_private_key(ec.SECP256R1())
    identity = ca.issue(
        "a.example",
        usages=[ExtendedKeyUsageOID.CLIENT_AUTH],
        not_before=start,
        not_after=end,
        private_key=key,
    )
    assert identity.private_key is key
    assert identity.leaf.not_valid_before_utc == ca.certificate.not_valid_before_utc == start
    assert identity.leaf.not_valid_after_utc == ca.certificate.not_valid_after_utc == end
    store = TrustStore((ca.certificate,))
    assert store.verify_client(identity.chain, at=start)
    with pytest.raises(CertificateRejected, match="not for a server"):
        store.verify_server(identity.chain, parse_peer_name("a.example"), at=start)


def test_a_chain_is_as_long_as_the_root_allows() -> None:
    root = DevCa.create(path_length=2)
    inner = root.intermediate("Inner", path_length=1).intermediate("Innermost")
    identity = inner.issue("a.example")
    assert len(identity.chain) == 3
    store = TrustStore((root.certificate,))
    assert store.verify_client(identity.chain)
    too_deep = inner.intermediate("Too deep").issue("a.example")
    with pytest.raises(CertificateRejected, match="CN=Innermost allows 0 authorities below"):
        store.verify_client(too_deep.chain)


def test_what_cannot_be_issued() -> None:
    ca = DevCa.create()
    now = datetime.now(UTC)
    with pytest.raises(ConfigError, match="unknown algorithm 'dsa'; known are ecdsa, "):
        DevCa.create(algorithm="dsa")
    with pytest.raises(ConfigError, match="unknown algorithm"):
        ca.issue("a", algorithm="md5")
    with pytest.raises(ConfigError, match="unknown algorithm"):
        ca.intermediate(algorithm="dsa")
    for name in ("not a name", "*.127.0.0.1", "*.*.example", "*", ""):
        with pytest.raises(ConfigError):
            ca.issue(name)
    with pytest.raises(ConfigError, match="URI"):
        ca.issue("a", uris=["urn:sae:ä"])
    with pytest.raises(ConfigError, match="cannot be a common name"):
        DevCa.create("")
    with pytest.raises(ConfigError, match="dates"):
        ca.issue("a", not_before=now, not_after=now - timedelta(1))


def test_keys_do_not_show() -> None:
    ca = DevCa.create()
    assert "rivateKey" not in repr(ca)
    assert "private_key" not in repr(ca)


# Files


def test_files(tmp_path: Path) -> None:
    ca = DevCa.create()
    identity = ca.intermediate().issue("localhost")
    folder = tmp_path / "new" / "folder"
    before = os.umask(0)
    try:
        written = write_identity(folder, ca, identity)
    finally:
        os.umask(before)
    assert written == [folder / "ca.pem", folder / "cert.pem", folder / "key.pem"]
    assert sorted(folder.iterdir()) == sorted(written)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in written}
    assert modes == {"ca.pem": 0o644, "cert.pem": 0o644, "key.pem": 0o600}
    loaded = Identity.from_files(folder / "cert.pem", folder / "key.pem")
    assert loaded.chain == identity.chain
    assert TrustStore.from_file(folder / "ca.pem").authorities == (ca.certificate,)


@pytest.mark.parametrize("present", ["ca.pem", "cert.pem", "key.pem"])
def test_nothing_is_overwritten_unasked(tmp_path: Path, present: str) -> None:
    """Not even a link that leads nowhere, and no other file is written then."""
    ca = DevCa.create()
    identity = ca.issue("localhost")
    (tmp_path / present).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match=rf"{present} exists already; --force"):
        write_identity(tmp_path, ca, identity)
    assert [path.name for path in tmp_path.iterdir()] == [present]
    write_identity(tmp_path, ca, identity, overwrite=True)
    # The link is replaced, not followed.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ca.pem", "cert.pem", "key.pem"]
    assert not any(path.is_symlink() for path in tmp_path.iterdir())


def test_a_failed_write_leaves_nothing_half_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ca = DevCa.create()
    old, new = ca.issue("old"), ca.issue("new")
    write_identity(tmp_path, ca, old)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(ConfigError, match="No space left on device"):
        write_identity(tmp_path, ca, new, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ca.pem", "cert.pem", "key.pem"]
    assert Identity.from_files(tmp_path / "cert.pem", tmp_path / "key.pem").names == ("old",)


def test_a_place_that_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    ca = DevCa.create()
    with pytest.raises(ConfigError, match="cannot write"):
        write_identity(tmp_path / "file" / "below", ca, ca.issue("a"))


# The command


Command = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def dev_ca(hybridkex: Forkserver) -> Command:
    def run(*words: object) -> "subprocess.CompletedProcess[str]":
        done = hybridkex.run("dev-ca", *words)
        said, told = done.stdout.decode(), done.stderr.decode()
        return subprocess.CompletedProcess(done.args, done.returncode, said, told)

    return run


def test_the_command(dev_ca: Command, tmp_path: Path) -> None:
    folder = tmp_path / "my keys"
    done = dev_ca(str(folder))
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    identity = Identity.from_files(folder / "cert.pem", folder / "key.pem")
    assert identity.names == NAMES
    store = TrustStore.from_file(folder / "ca.pem")
    for name in NAMES:
        assert store.verify_server(identity.chain, parse_peer_name(name)).verified_by == "ca"
    assert f"pin of this key: {spki_sha256(identity.leaf)}\n" in done.stdout
    # What it says to try next can be pasted into a shell, spaces and all.
    assert f"  hybridkex listen 4433 --cert '{folder}/cert.pem' --key '{folder}/key.pem'" in (
        done.stdout
    )
    assert f"  hybridkex connect localhost 4433 --ca '{folder}/ca.pem'" in done.stdout
    assert "PRIVATE" not in done.stdout


@pytest.mark.parametrize("algorithm", ["rsa", "ed25519", "mldsa65"])
def test_the_command_with_other_keys(dev_ca: Command, tmp_path: Path, algorithm: str) -> None:
    done = dev_ca(str(tmp_path), "--name", "*.b.example", "--name", "10.0.0.1", "--alg", algorithm)
    assert done.returncode == 0, done.stderr
    identity = Identity.from_files(tmp_path / "cert.pem", tmp_path / "key.pem")
    assert identity.names == ("*.b.example", "10.0.0.1")
    assert TrustStore.from_file(tmp_path / "ca.pem").verify_client(identity.chain)
    assert "hybridkex connect 10.0.0.1 4433" in done.stdout
    assert f"({algorithm})" in done.stdout


def test_the_command_and_what_is_there(dev_ca: Command, tmp_path: Path) -> None:
    assert dev_ca(str(tmp_path)).returncode == 0
    key = (tmp_path / "key.pem").read_bytes()
    again = dev_ca(str(tmp_path))
    assert again.returncode == 1
    assert again.stderr == f"hybridkex: {tmp_path}/ca.pem exists already; --force replaces it\n"
    assert (tmp_path / "key.pem").read_bytes() == key
    assert dev_ca(str(tmp_path), "--force").returncode == 0
    assert (tmp_path / "key.pem").read_bytes() != key


def test_mistakes_at_the_command_line(dev_ca: Command, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for words, status in (
        ((), 2),
        ((str(tmp_path), "--alg", "dsa"), 2),
        ((str(tmp_path), "--name", "not a name"), 1),
        ((str(tmp_path), "--name", ""), 1),
        ((str(tmp_path / "file"),), 1),
    ):
        done = dev_ca(*words)
        assert done.returncode == status, done.stderr
        assert "Traceback" not in done.stderr
        assert done.stderr.splitlines()[-1].startswith("hybridkex")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
