"""The key schedule once more, from RFC 5869 and RFC 9846 on hmac and hashlib alone."""

import hashlib
import hmac

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from leaks import leaks

from hybridkex.constants import Label
from hybridkex.crypto.schedule import (
    EarlySecret,
    ExporterSecret,
    HandshakeSecret,
    MainSecret,
    ResumptionSecret,
    TrafficSecret,
    finished_mac,
    hkdf_expand_label,
    hkdf_extract,
)
from hybridkex.crypto.suites import ALL_SUITES, SHA256, SHA384, CipherSuite, HashFunction
from hybridkex.errors import ConfigError
from hybridkex.secret import Secret

hashes = pytest.mark.parametrize("function", [SHA256, SHA384], ids=repr)
suites = pytest.mark.parametrize("suite", ALL_SUITES, ids=repr)


def extract(name: str, salt: bytes, key: bytes) -> bytes:
    """RFC 5869 section 2.2."""
    return hmac.digest(salt, key, name)


def expand(name: str, key: bytes, info: bytes, length: int) -> bytes:
    """RFC 5869 section 2.3."""
    out, block, counter = b"", b"", 1
    while len(out) < length:
        block = hmac.digest(key, block + info + bytes((counter,)), name)
        out += block
        counter += 1
    return out[:length]


def expand_label(name: str, key: bytes, label: str, context: bytes, length: int) -> bytes:
    """RFC 9846 section 7.1."""
    full = f"tls13 {label}".encode()
    info = length.to_bytes(2, "big")
    info += len(full).to_bytes(1, "big") + full
    info += len(context).to_bytes(1, "big") + context
    return expand(name, key, info, length)


def derive_secret(name: str, key: bytes, label: str, messages: bytes) -> bytes:
    """RFC 9846 section 7.1."""
    digest = hashlib.new(name, messages).digest()
    return expand_label(name, key, label, digest, len(digest))


functions = st.sampled_from([SHA256, SHA384])


@settings(deadline=None)
@given(function=functions, salt=st.binary(max_size=150), key=st.binary(max_size=150))
def test_extract(function: HashFunction, salt: bytes, key: bytes) -> None:
    ours = hkdf_extract(function, salt, Secret(key))
    assert ours.reveal() == extract(function.name, salt, key)
    assert len(ours) == function.size


@settings(deadline=None)
@given(
    function=functions,
    key=st.binary(min_size=1, max_size=80),
    label=st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=249),
    context=st.binary(max_size=255),
    length=st.integers(1, 255 * 32),
)
def test_expand_label(
    function: HashFunction, key: bytes, label: str, context: bytes, length: int
) -> None:
    """Over the whole range that HkdfLabel can hold."""
    ours = hkdf_expand_label(function, Secret(key), label.encode(), context, length)
    assert ours == expand_label(function.name, key, label, context, length)


@suites
@pytest.mark.parametrize("psk", [None, b"p" * 16, b"p" * 32, b"p" * 48, b"p" * 200])
@pytest.mark.parametrize("shared", [b"s" * 32, b"s" * 64, b"s" * 80])
def test_every_secret(suite: CipherSuite, psk: bytes | None, shared: bytes) -> None:
    """The diagram of section 7.1, from top to bottom."""
    function, name = suite.hash, suite.hash.name
    zeros = bytes(function.size)
    hello, finished, end = (function.digest(message) for message in (b"SH", b"SF", b"CF"))

    early = EarlySecret.start(function, None if psk is None else Secret(psk))
    early_expected = extract(name, zeros, zeros if psk is None else psk)
    assert early.secret.reveal() == early_expected
    for label in ("ext binder", "res binder", "imp binder"):
        binder_key = derive_secret(name, early_expected, label, b"")
        finished_key = expand_label(name, binder_key, "finished", b"", function.size)
        expected = hmac.digest(finished_key, hello, name)
        assert early.binder(label.encode(), hello) == expected

    handshake = early.handshake_secret(Secret(shared))
    handshake_expected = extract(name, derive_secret(name, early_expected, "derived", b""), shared)
    assert handshake.secret.reveal() == handshake_expected

    main = handshake.main_secret()
    main_expected = extract(name, derive_secret(name, handshake_expected, "derived", b""), zeros)
    assert main.secret.reveal() == main_expected

    for ours, base, label, transcript in (
        (handshake.client_handshake_traffic(suite, hello), handshake_expected, "c hs", b"SH"),
        (handshake.server_handshake_traffic(suite, hello), handshake_expected, "s hs", b"SH"),
        (main.client_application_traffic(suite, finished), main_expected, "c ap", b"SF"),
        (main.server_application_traffic(suite, finished), main_expected, "s ap", b"SF"),
    ):
        expected = derive_secret(name, base, f"{label} traffic", transcript)
        assert ours.secret.reveal() == expected
        assert ours.suite is suite
        assert ours.key_and_iv() == (
            expand_label(name, expected, "key", b"", suite.key_length),
            expand_label(name, expected, "iv", b"", 12),
        )
        key = expand_label(name, expected, "finished", b"", function.size)
        assert ours.finished(end) == hmac.digest(key, end, name)
        assert finished_mac(function, ours.secret, end) == hmac.digest(key, end, name)

    exporter = main.exporter_secret(finished)
    assert exporter.secret.reveal() == derive_secret(name, main_expected, "exp master", b"SF")
    resumption = main.resumption_secret(end)
    expected = derive_secret(name, main_expected, "res master", b"CF")
    assert resumption.secret.reveal() == expected
    for nonce in (b"", b"\0\0", b"n" * 255):
        psk_expected = expand_label(name, expected, "resumption", nonce, function.size)
        assert resumption.psk(nonce).reveal() == psk_expected


@suites
def test_updated(suite: CipherSuite) -> None:
    """Section 7.2, several generations; no hash of an empty transcript goes in here."""
    traffic = TrafficSecret(suite, Secret(b"t" * suite.hash.size))
    expected = b"t" * suite.hash.size
    seen = {traffic.key_and_iv()}
    for _ in range(3):
        traffic = traffic.updated()
        expected = expand_label(suite.hash.name, expected, "traffic upd", b"", suite.hash.size)
        assert traffic.secret.reveal() == expected
        assert traffic.suite is suite
        seen.add(traffic.key_and_iv())
    assert len(seen) == 4


@hashes
@pytest.mark.parametrize("length", [1, 16, 32, 48, 64, 255 * 32])
@pytest.mark.parametrize("context", [b"", b"context", b"c" * 100_000])
def test_exporter(function: HashFunction, length: int, context: bytes) -> None:
    """Section 7.5."""
    base = b"e" * function.size
    label = "EXPORTER-Channel-Binding"
    derived = derive_secret(function.name, base, label, b"")
    digest = hashlib.new(function.name, context).digest()
    expected = expand_label(function.name, derived, "exporter", digest, length)
    ours = ExporterSecret(function, Secret(base)).export(label.encode(), context, length)
    assert ours.reveal() == expected


@hashes
def test_exporter_separates(function: HashFunction) -> None:
    """Another label or another context gives something else."""
    exporter = ExporterSecret(function, Secret(b"e" * function.size))
    values = [
        exporter.export(label, context, 32).reveal()
        for label in (b"EXPORTER-a", b"EXPORTER-b")
        for context in (b"", b"a", b"b")
    ]
    assert len(set(values)) == 6


@hashes
@pytest.mark.parametrize("label", [b"", b"x" * 250])
def test_exporter_labels_that_do_not_fit(function: HashFunction, label: bytes) -> None:
    exporter = ExporterSecret(function, Secret(bytes(function.size)))
    assert len(exporter.export(b"x" * 249, b"", 1)) == 1
    with pytest.raises(ConfigError, match="label"):
        exporter.export(label, b"", 32)


@hashes
@pytest.mark.parametrize("length", [-1, 0, 255 * 48 + 1, 0x10000])
def test_exporter_lengths_that_cannot_be(function: HashFunction, length: int) -> None:
    exporter = ExporterSecret(function, Secret(bytes(function.size)))
    with pytest.raises(ConfigError, match="returns 1 to"):
        exporter.export(b"x", b"", length)
    with pytest.raises(ConfigError, match="returns 1 to"):
        exporter.export(b"x", b"", 255 * function.size + 1)


@hashes
def test_each_input_reaches_the_end(function: HashFunction) -> None:
    """A PSK, a key exchange or a transcript that differs gives other application keys."""
    suite = next(suite for suite in ALL_SUITES if suite.hash is function)

    def application_key(psk: bytes, shared: bytes, transcript: bytes) -> bytes:
        early = EarlySecret.start(function, Secret(psk))
        main = early.handshake_secret(Secret(shared)).main_secret()
        return main.client_application_traffic(suite, function.digest(transcript)).key_and_iv()[0]

    keys = {
        application_key(psk, shared, transcript)
        for psk in (b"p" * 32, b"q" * 32)
        for shared in (b"s" * 64, b"t" * 64)
        for transcript in (b"", b"x")
    }
    assert len(keys) == 8


@suites
def test_no_stage_shows_its_secret(suite: CipherSuite) -> None:
    value = b"\xaa\xbb" * (suite.hash.size // 2)
    secret = Secret(value)
    for holder in (
        TrafficSecret(suite, secret),
        EarlySecret(suite.hash, secret),
        HandshakeSecret(suite.hash, secret),
        MainSecret(suite.hash, secret),
        ExporterSecret(suite.hash, secret),
        ResumptionSecret(suite.hash, secret),
    ):
        assert not leaks(repr(holder), value)
        assert f"Secret({suite.hash.size} bytes)" in repr(holder)


def test_hash_functions() -> None:
    """Each name of a hash names the same one."""
    for function, size in ((SHA256, 32), (SHA384, 48)):
        assert function.size == size == function.algorithm.digest_size
        assert function.algorithm.name == function.name
        assert function.digest(b"abc") == hashlib.new(function.name, b"abc").digest()
        assert function.new().digest_size == size
        assert function.kdf.name == f"HKDF_{function.name.upper()}"
        assert repr(function) == function.name.upper()


def test_suites() -> None:
    """RFC 9846 appendix B.4, and that each AEAD takes keys of the length that it says."""
    assert [(suite.code, suite.hash.size, suite.key_length) for suite in ALL_SUITES] == [
        (0x1302, 48, 32),
        (0x1301, 32, 16),
        (0x1303, 32, 32),
    ]
    for suite in ALL_SUITES:
        assert str(suite) == suite.name
        assert suite.hash.name.upper() == suite.name.rpartition("_")[2]
        # RFC 9846 section 5.5: 2^24.5 records for AES-GCM.
        assert suite.record_limit <= 2**24.5
        out = bytearray(5 + 16)
        aead = suite.aead(bytes(suite.key_length))
        assert aead.encrypt_into(bytes(12), b"hello", b"", out) == len(out)
        back = bytearray(5)
        assert aead.decrypt_into(bytes(12), out, b"", back) == 5
        assert back == b"hello"


def test_labels() -> None:
    """The labels of RFC 9846 section 7 and RFC 9258, typed again."""
    assert (Label.EXTERNAL_BINDER, Label.RESUMPTION_BINDER, Label.IMPORTED_BINDER) == (
        b"ext binder",
        b"res binder",
        b"imp binder",
    )
    assert (Label.SERVER_CERTIFICATE_VERIFY, Label.CLIENT_CERTIFICATE_VERIFY) == (
        b"TLS 1.3, server CertificateVerify",
        b"TLS 1.3, client CertificateVerify",
    )
