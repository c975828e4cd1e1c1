"""Where trusted authorities come from: files, and the machine's own store."""

import base64
import os
import ssl
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from hybridkex.auth import (
    DevCa,
    KnownPeers,
    RawIdentity,
    TrustStore,
    parse_peer_name,
    spki_sha256,
    system,
    verify,
)
from hybridkex.auth.certificates import read_chain
from hybridkex.errors import CertificateRejected, ConfigError
from tests.auth.corpus import FALSE, authority, flagged
from tests.auth.test_corpus import pem

ONE, TWO, THREE = DevCa.create("One"), DevCa.create("Two"), DevCa.create("Three")
SITE = ONE.issue("a.example")
BROKEN = b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"


def certificates(store: TrustStore) -> set[x509.Certificate]:
    return set(store.authorities)


def test_from_pem_and_file(tmp_path: Path) -> None:
    both = b"# a comment\n" + ONE.pem + TWO.pem
    assert TrustStore.from_pem(both).authorities == (ONE.certificate, TWO.certificate)
    file = tmp_path / "roots.pem"
    file.write_bytes(both)
    store = TrustStore.from_file(file, pins=[spki_sha256(SITE.leaf)])
    assert store.authorities == (ONE.certificate, TWO.certificate)
    assert store.verify_client(SITE.chain).verified_by == "ca"
    stranger = THREE.issue("a.example")
    with pytest.raises(CertificateRejected, match=f"any of the 2 trusted certificates in {file}"):
        store.verify_client(stranger.chain)


def test_files_that_are_none(tmp_path: Path) -> None:
    empty, missing = tmp_path / "empty.pem", tmp_path / "missing.pem"
    for content in (b"", b"rubbish", SITE.chain[0], BROKEN, ONE.pem + BROKEN):
        empty.write_bytes(content)
        with pytest.raises(ConfigError, match=f"cannot use the certificates of {empty}: "):
            TrustStore.from_file(empty)
    with pytest.raises(ConfigError, match="cannot use the certificates of the trust store"):
        TrustStore.from_pem(b"rubbish")
    with pytest.raises(ConfigError, match=f"cannot read {missing}: No such file"):
        TrustStore.from_file(missing)
    with pytest.raises(ConfigError, match=f"cannot read {tmp_path}: Is a directory"):
        TrustStore.from_file(str(tmp_path))
    with pytest.raises(ConfigError, match="at least one certificate"):
        TrustStore(())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"version": 1}, "it is of X.509 version 2; it needs version 3"),
        ({"ku": flagged("2.5.29.15", FALSE, b"\3\2\1\6")}, "critical of extension 2: DER omits"),
        ({"serial": b"\2\0"}, "serialNumber of tbsCertificate"),
    ],
)
def test_a_file_names_the_certificate_that_does_not_parse(
    changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        TrustStore.from_pem(pem(authority(), authority(**changes)))
    assert "the trust store: certificate 2 of 2 in it does not parse: " in str(caught.value)
    assert words in str(caught.value)


def test_roots_with_a_serial_number_that_is_not_positive(tmp_path: Path) -> None:
    """Old roots have some; the library warns, and a command line would show that to its user."""
    der = ONE.certificate.public_bytes(Encoding.DER)
    number = ONE.certificate.serial_number
    length = (number.bit_length() + 8) // 8
    start = der.index(b"\x02" + bytes([length]) + number.to_bytes(length, "big")) + 2
    old = der[:start] + b"\x80" + der[start + 1 :]
    text = base64.encodebytes(old)
    pem = b"-----BEGIN CERTIFICATE-----\n" + text + b"-----END CERTIFICATE-----\n"
    with pytest.warns(UserWarning, match="serial number"):
        x509.load_pem_x509_certificates(pem)
    file = tmp_path / "roots.pem"
    file.write_bytes(pem)
    assert len(TrustStore.from_file(file).authorities) == 1


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine whose store is nowhere."""
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    monkeypatch.delenv("SSL_CERT_DIR", raising=False)
    nowhere = ssl.DefaultVerifyPaths(None, None, "", "", "", "")  # type: ignore[arg-type]
    monkeypatch.setattr(ssl, "get_default_verify_paths", lambda: nowhere)
    monkeypatch.setattr(system, "_FILES", ())
    monkeypatch.setattr(system, "_DIRECTORIES", ())
    return monkeypatch


def test_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    monkeypatch.delenv("SSL_CERT_DIR", raising=False)
    try:
        store = TrustStore.system()
    except ConfigError as error:
        pytest.skip(str(error))
    assert len(store.authorities) > 10
    with pytest.raises(CertificateRejected, match=f"trusted certificates in {store.source}"):
        store.verify_server(SITE.chain, parse_peer_name("a.example"))


def test_no_store(bare: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="install ca-certificates"):
        TrustStore.system()


def test_the_environments_file(bare: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "roots.pem"
    file.write_bytes(ONE.pem)
    bare.setenv("SSL_CERT_FILE", str(file))
    store = TrustStore.system()
    assert store.authorities == (ONE.certificate,)
    assert store.source == str(file)
    assert store.verify_server(SITE.chain, parse_peer_name("a.example"))
    with_pin = TrustStore.system(pins=[spki_sha256(ONE.certificate)])
    with pytest.raises(CertificateRejected, match="not pinned"):
        with_pin.verify_client(SITE.chain)


def test_the_environment_replaces_the_machines(bare: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours.pem", tmp_path / "theirs.pem"
    ours.write_bytes(ONE.pem)
    theirs.write_bytes(TWO.pem)
    bare.setattr(system, "_FILES", (str(theirs),))
    assert TrustStore.system().authorities == (TWO.certificate,)
    bare.setenv("SSL_CERT_FILE", str(ours))
    assert TrustStore.system().authorities == (ONE.certificate,)


def test_the_environments_folders(bare: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every readable file counts, each certificate once; rubbish among them vouches for nobody."""
    first, second, extra = tmp_path / "first", tmp_path / "second", tmp_path / "extra.pem"
    first.mkdir()
    second.mkdir()
    (first / "deadbeef.0").write_bytes(ONE.pem)
    (first / "one.pem").symlink_to(first / "deadbeef.0")
    (first / "README").write_text("no certificate")
    (first / "broken.pem").write_bytes(BROKEN)
    (first / "folder").mkdir()
    (first / "dangling").symlink_to(first / "nowhere")
    (second / "two.crt").write_bytes(b"Two\n=====\n" + TWO.pem)
    extra.write_bytes(THREE.pem + ONE.pem)
    bare.setenv("SSL_CERT_DIR", f"{first}{os.pathsep}{second}")
    store = TrustStore.system()
    assert len(store.authorities) == 2
    assert certificates(store) == {ONE.certificate, TWO.certificate}
    assert store.source == f"{first} and {second}"
    bare.setenv("SSL_CERT_FILE", str(extra))
    store = TrustStore.system()
    assert len(store.authorities) == 3
    assert certificates(store) == {ONE.certificate, TWO.certificate, THREE.certificate}


def test_the_environment_is_taken_at_its_word(bare: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A mistyped name must not bring back the machine's authorities."""
    good = tmp_path / "roots.pem"
    good.write_bytes(ONE.pem)
    bare.setattr(system, "_FILES", (str(good),))
    for variable in ("SSL_CERT_FILE", "SSL_CERT_DIR"):
        bare.setenv(variable, str(tmp_path / "missing"))
        with pytest.raises(ConfigError, match=r"missing, named by .*, does not exist"):
            TrustStore.system()
        bare.delenv(variable)
    empty = tmp_path / "empty"
    empty.mkdir()
    bare.setenv("SSL_CERT_DIR", str(empty))
    with pytest.raises(ConfigError, match=f"{empty} .* has no certificate"):
        TrustStore.system()
    bare.setenv("SSL_CERT_DIR", "")
    assert TrustStore.system().authorities == (ONE.certificate,)


def test_the_usual_places(bare: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What Python was built with comes first; then the files of distributions; then folders."""
    file, folder = tmp_path / "roots.pem", tmp_path / "certs"
    folder.mkdir()
    (folder / "two.pem").write_bytes(TWO.pem)
    bare.setattr(system, "_DIRECTORIES", (str(tmp_path / "missing"), str(folder)))
    assert TrustStore.system().source == str(folder)
    bare.setattr(system, "_FILES", (str(tmp_path / "missing"), str(file)))
    assert TrustStore.system().authorities == (TWO.certificate,)
    file.write_bytes(ONE.pem)
    assert TrustStore.system().source == str(file)
    built = tmp_path / "built.pem"
    built.write_bytes(THREE.pem)
    known = ssl.DefaultVerifyPaths(str(built), "", "", "", "", "")
    bare.setattr(ssl, "get_default_verify_paths", lambda: known)
    assert TrustStore.system().authorities == (THREE.certificate,)


def test_two_first_uses_of_one_name_at_once(tmp_path: Path) -> None:
    """The second to finish has met somebody else: its session is refused, the file stays."""
    one, other = RawIdentity.generate(), RawIdentity.generate()
    path, name = tmp_path / "known", parse_peer_name("server.example")
    first = KnownPeers(path).verify_server_key(one.chain[0], name)
    same = KnownPeers(path).verify_server_key(one.chain[0], name)
    second = KnownPeers(path).verify_server_key(other.chain[0], name)
    assert first.remember is not None
    assert same.remember is not None
    assert second.remember is not None
    first.remember()
    same.remember()
    with pytest.raises(CertificateRejected, match="another key"):
        second.remember()
    assert path.read_text().count("\n") == 1


# --- results that are kept ------------------------------------------------------------------------


def verifications(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bytes, ...]]:
    """The chains that are read from now on: one that is answered from a kept result is not."""
    read: list[tuple[bytes, ...]] = []

    def counted(chain: tuple[bytes, ...]) -> object:
        read.append(chain)
        return read_chain(chain)

    monkeypatch.setattr(verify, "read_chain", counted)
    return read


def test_a_chain_is_verified_once(monkeypatch: pytest.MonkeyPatch) -> None:
    read = verifications(monkeypatch)
    store, name = TrustStore((ONE.certificate,)), parse_peer_name("a.example")
    assert store.verify_server(SITE.chain, name) == store.verify_server(list(SITE.chain), name)
    assert len(read) == 1
    store.verify_client(SITE.chain)  # another question
    assert len(read) == 2
    with pytest.raises(CertificateRejected, match=r"not for b\.example"):
        store.verify_server(SITE.chain, parse_peer_name("b.example"))
    assert len(read) == 3


def test_trust_that_is_withdrawn_is_withdrawn_at_once() -> None:
    """A store's authorities never change: another set of them is another store."""
    name = parse_peer_name("a.example")
    both = TrustStore((ONE.certificate, TWO.certificate))
    both.verify_server(SITE.chain, name)
    without = TrustStore((TWO.certificate,))
    pinned = replace(both, pins=frozenset({spki_sha256(THREE.certificate)}))
    for store in (without, replace(both, authorities=(TWO.certificate,)), pinned):
        with pytest.raises(CertificateRejected):
            store.verify_server(SITE.chain, name)
    both.verify_server(SITE.chain, name)


@pytest.mark.parametrize("which", ["leaf", "intermediate", "root"])
def test_a_kept_result_ends_with_the_first_certificate_of_the_path(which: str) -> None:
    """To the second, before and after, whichever certificate of the path it is."""
    now = datetime.now(UTC).replace(microsecond=0)
    start, end = now - timedelta(hours=1), now + timedelta(hours=1)
    short = {"not_before": start, "not_after": end}
    root = DevCa.create("Root", **short if which == "root" else {})  # type: ignore[arg-type]
    middle = root.intermediate("Middle", **short if which == "intermediate" else {})  # type: ignore[arg-type]
    leaf = middle.issue("a.example", **short if which == "leaf" else {})  # type: ignore[arg-type]
    store, name = TrustStore((root.certificate,)), parse_peer_name("a.example")
    for at in (now, start, end, now):
        store.verify_server(leaf.chain, name, at=at)
        store.verify_client(leaf.chain, at=at)
    second = timedelta(seconds=1)
    for at in (start - second, end + second):
        with pytest.raises(CertificateRejected, match=r"expired on|not valid before"):
            store.verify_server(leaf.chain, name, at=at)
        with pytest.raises(CertificateRejected, match=r"expired on|not valid before"):
            store.verify_client(leaf.chain, at=at)


def test_few_results_are_kept() -> None:
    store = TrustStore((ONE.certificate,))
    for number in range(verify._MAX_KEPT + 2):
        store.verify_client(ONE.issue(f"{number}.example", private_key=SITE.private_key).chain)
    assert len(store._kept) <= verify._MAX_KEPT
