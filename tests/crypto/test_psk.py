"""External PSKs, and RFC 9258 derived a second time with hmac and hashlib alone."""

import dataclasses
import hashlib
import hmac
import traceback

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from leaks import leaks

from hybridkex.constants import TLS13
from hybridkex.crypto.psk import MIN_PSK_LENGTH, ExternalPsk, import_key
from hybridkex.crypto.suites import SHA256, SHA384, HashFunction
from hybridkex.errors import ConfigError
from hybridkex.secret import Secret
from hybridkex.wire.messages import ImportedIdentity

functions = st.sampled_from([SHA256, SHA384])
KEY = Secret(bytes(range(32)))


def derive(psk: bytes, own: str, imported_identity: bytes, length: int) -> bytes:
    """RFC 9258 section 5.1, on RFC 5869 and RFC 9846 section 7.1."""
    epskx = hmac.digest(bytes(hashlib.new(own).digest_size), psk, own)
    digest = hashlib.new(own, imported_identity).digest()
    label = b"tls13 derived psk"
    info = length.to_bytes(2, "big")
    info += bytes((len(label),)) + label + bytes((len(digest),)) + digest
    first = hmac.digest(epskx, info + b"\x01", own)
    second = hmac.digest(epskx, first + info + b"\x02", own)
    return (first + second)[:length]


# The first one was produced by GnuTLS and accepted by BoringSSL (identity "qkd-1", context
# "hybridkex"); the others follow from the same structure by hand.
IDENTITIES = [
    (b"qkd-1", b"hybridkex", SHA256, "0005716b642d3100096879627269646b657803040001"),
    (b"qkd-1", b"hybridkex", SHA384, "0005716b642d3100096879627269646b657803040002"),
    (b"x", b"", SHA256, "000178000003040001"),
]


@pytest.mark.parametrize(("identity", "context", "target", "expected"), IDENTITIES)
def test_imported_identity(
    identity: bytes, context: bytes, target: HashFunction, expected: str
) -> None:
    imported = ImportedIdentity(identity, context, TLS13, target.kdf)
    assert imported.encode().hex() == expected
    assert ImportedIdentity.decode(bytes.fromhex(expected)) == imported


@settings(deadline=None)
@given(
    key=st.binary(min_size=MIN_PSK_LENGTH, max_size=100),
    identity=st.binary(min_size=1, max_size=100),
    context=st.binary(max_size=100),
    own=functions,
    target=functions,
)
def test_import(
    key: bytes, identity: bytes, context: bytes, own: HashFunction, target: HashFunction
) -> None:
    psk = ExternalPsk(identity=identity, key=Secret(key), hash=own, context=context)
    assert psk.imported
    imported = ImportedIdentity(identity, context, TLS13, target.kdf).encode()
    ours = import_key(psk, imported, target)
    assert len(ours) == target.size
    assert ours.reveal() == derive(key, own.name, imported, target.size)


def test_every_field_separates() -> None:
    """Identity, context, protocol, target and hash each change the key."""
    seen = set()
    for own in (SHA256, SHA384):
        for identity in (b"a", b"b"):
            for context in (b"", b"a"):
                psk = ExternalPsk(identity=identity, key=KEY, hash=own, context=context)
                for target in (SHA256, SHA384):
                    for protocol in (TLS13, 0xFEFC):
                        imported = ImportedIdentity(identity, context, protocol, target.kdf)
                        derived = import_key(psk, imported.encode(), target)
                        seen.add(derived.reveal()[:32])
    assert len(seen) == 32
    assert KEY.reveal() not in seen


def test_context_and_identity_do_not_run_into_each_other() -> None:
    pairs = [(b"ab", b"c"), (b"a", b"bc"), (b"abc", b"")]
    encoded = {ImportedIdentity(*pair, TLS13, SHA256.kdf).encode() for pair in pairs}
    assert len(encoded) == 3


def test_defaults() -> None:
    """SHA-256 (RFC 9258 section 5.1), and plain unless there is a context."""
    psk = ExternalPsk(identity=b"x", key=KEY)
    assert psk.hash is SHA256
    assert not psk.imported
    assert ExternalPsk(identity=b"x", key=KEY, context=b"").imported


@pytest.mark.parametrize("length", [0, 0x10000])
def test_identity_bounds(length: int) -> None:
    with pytest.raises(ConfigError, match="identity"):
        ExternalPsk(identity=bytes(length), key=KEY)


@pytest.mark.parametrize("length", [1, 0xFFFF])
def test_identities_at_the_bounds(length: int) -> None:
    assert len(ExternalPsk(identity=bytes(length), key=KEY).identity) == length


@pytest.mark.parametrize("length", [0, 1, 15])
def test_short_keys(length: int) -> None:
    """RFC 9257 section 6: at least 128 bits. The message does not hold the key."""
    value = b"\xa5" * length
    with pytest.raises(ConfigError, match="at least 16 bytes") as caught:
        ExternalPsk(identity=b"x", key=Secret(value))
    shown = "".join(traceback.format_exception(caught.value))
    assert length == 0 or value.hex() not in shown
    assert ExternalPsk(identity=b"x", key=Secret(bytes(16)))


def test_an_imported_identity_fits_into_a_psk_identity() -> None:
    """PskIdentity.identity has 16 bits of length, for the whole of ImportedIdentity."""
    most = 0xFFFF - 8
    for identity, context in ((most - 100, 100), (1, most - 1), (most, 0)):
        psk = ExternalPsk(identity=bytes(identity), key=KEY, context=bytes(context))
        imported = ImportedIdentity(psk.identity, bytes(context), TLS13, SHA256.kdf)
        assert len(imported.encode()) == 0xFFFF
        with pytest.raises(ConfigError, match="together too long"):
            ExternalPsk(identity=bytes(identity), key=KEY, context=bytes(context + 1))


def test_a_psk_does_not_show_its_key() -> None:
    psk = ExternalPsk(identity=b"visible", key=KEY, context=b"c")
    for shown in (repr(psk), str(psk), f"{psk}", f"{psk!r}"):
        assert "visible" in shown
        assert "Secret(32 bytes)" in shown
        assert not leaks(shown, KEY.reveal())


def test_a_psk_does_not_change() -> None:
    psk = ExternalPsk(identity=b"x", key=KEY)
    with pytest.raises(dataclasses.FrozenInstanceError):
        psk.identity = b"y"  # type: ignore[misc]
