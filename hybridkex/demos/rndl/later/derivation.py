"""The key schedule of TLS 1.3 and its record protection, written a second time.

Deliberately, and with the standard library's HMAC alone: an adversary who derived keys with the
parties' own code would share its mistakes. If the parties omitted a leg from their key schedule,
that code would omit it here as well, and the recording would seem safe.
"""

import hashlib
import hmac
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305


@dataclass(frozen=True)
class Suite:
    """A cipher suite (RFC 9846 appendix B.4)."""

    name: str
    hash: str
    aead: type[AESGCM] | type[ChaCha20Poly1305]
    key_length: int

    @cached_property
    def hash_length(self) -> int:
        return hashlib.new(self.hash).digest_size

    @cached_property
    def empty_digest(self) -> bytes:
        return self.digest(b"")

    def digest(self, data: bytes) -> bytes:
        return hashlib.new(self.hash, data).digest()


SUITES: Final = {
    0x1301: Suite("TLS_AES_128_GCM_SHA256", "sha256", AESGCM, 16),
    0x1302: Suite("TLS_AES_256_GCM_SHA384", "sha384", AESGCM, 32),
    0x1303: Suite("TLS_CHACHA20_POLY1305_SHA256", "sha256", ChaCha20Poly1305, 32),
}

_IMPORT_HASH: Final = "sha256"  # for an external PSK without an agreed hash (RFC 9258 section 5)


def _extract(hash_: str, salt: bytes, key: bytes) -> bytes:
    return hmac.digest(salt, key, hash_)


def _expand_label(hash_: str, secret: bytes, label: bytes, context: bytes, length: int) -> bytes:
    """HKDF-Expand-Label (RFC 9846 section 7.1)."""
    info = _hkdf_label(label, context, length)
    block = out = hmac.digest(secret, info + b"\x01", hash_)
    for counter in range(2, 256):
        if len(out) >= length:
            break
        block = hmac.digest(secret, block + info + bytes((counter,)), hash_)
        out += block
    return out[:length]


@lru_cache(maxsize=64)
def _hkdf_label(label: bytes, context: bytes, length: int) -> bytes:
    """Cached, since a search for a PSK needs the same labels a million times."""
    full = b"tls13 " + label
    sizes = length.to_bytes(2, "big"), bytes((len(full),)), bytes((len(context),))
    return sizes[0] + sizes[1] + full + sizes[2] + context


def _derive(hash_: str, secret: bytes, label: bytes, digest: bytes) -> bytes:
    return _expand_label(hash_, secret, label, digest, len(digest))


def _finished(hash_: str, base: bytes, digest: bytes) -> bytes:
    key = _expand_label(hash_, base, b"finished", b"", len(digest))
    return hmac.digest(key, digest, hash_)


def imported_psk(key: bytes, identity: bytes, hash_length: int) -> bytes:
    """``ipskx`` of RFC 9258 section 5.1, for the identity as it is on the wire."""
    hash_ = _IMPORT_HASH
    epskx = _extract(hash_, bytes(hashlib.new(hash_).digest_size), key)
    digest = hashlib.new(hash_, identity).digest()
    return _expand_label(hash_, epskx, b"derived psk", digest, hash_length)


def ticket_psk(suite: Suite, resumption_secret: bytes, nonce: bytes) -> bytes:
    """The PSK of a session ticket (RFC 9846 section 4.7.1)."""
    return _expand_label(suite.hash, resumption_secret, b"resumption", nonce, suite.hash_length)


def binder(suite: Suite, psk: bytes, label: bytes, digest: bytes) -> bytes:
    """The PSK binder that a ClientHello must have (RFC 9846 section 4.3.11.2).

    It is sent in the clear: anyone with a candidate PSK can test it without breaking anything.
    """
    early = _extract(suite.hash, bytes(suite.hash_length), psk)
    return _finished(suite.hash, _derive(suite.hash, early, label, suite.empty_digest), digest)


class TrafficKey:
    """Decrypts the records of one direction, one after the other."""

    def __init__(self, suite: Suite, secret: bytes) -> None:
        self.suite = suite
        self.secret = secret
        self._aead = suite.aead(_expand_label(suite.hash, secret, b"key", b"", suite.key_length))
        self._iv = int.from_bytes(_expand_label(suite.hash, secret, b"iv", b"", 12), "big")
        self._sequence = 0

    def open(self, header: bytes, fragment: bytes) -> tuple[int, bytes] | None:
        """Content type and content (RFC 9846 section 5.2); ``None`` where the key is wrong."""
        nonce = (self._iv ^ self._sequence).to_bytes(12, "big")
        try:
            inner = self._aead.decrypt(nonce, fragment, header).rstrip(b"\0")
        except InvalidTag:
            return None
        self._sequence += 1
        if not inner:
            return None  # RFC 9846 section 5.4: a plaintext of zeros alone is invalid
        return inner[-1], inner[:-1]

    def updated(self) -> "TrafficKey":
        """The key after a KeyUpdate (RFC 9846 section 7.2)."""
        hash_ = self.suite.hash
        return TrafficKey(
            self.suite,
            _expand_label(hash_, self.secret, b"traffic upd", b"", self.suite.hash_length),
        )


@dataclass(frozen=True)
class Secrets:
    """The secrets derived from a PSK and a key exchange (RFC 9846 section 7.1)."""

    suite: Suite
    handshake: bytes

    @classmethod
    def derive(cls, suite: Suite, psk: bytes | None, shared: bytes) -> "Secrets":
        """Derive from the PSK (``None``: zeros, as without a PSK) and the exchange's secret."""
        hash_, zeros, empty = suite.hash, bytes(suite.hash_length), suite.empty_digest
        early = _extract(hash_, zeros, zeros if psk is None else psk)
        return cls(suite, _extract(hash_, _derive(hash_, early, b"derived", empty), shared))

    def handshake_keys(self, digest: bytes) -> Iterator[TrafficKey]:
        """The client's and the server's keys; ``digest`` covers ClientHello...ServerHello."""
        for label in (b"c hs traffic", b"s hs traffic"):
            yield TrafficKey(self.suite, _derive(self.suite.hash, self.handshake, label, digest))

    def application_keys(self, digest: bytes) -> Iterator[TrafficKey]:
        """The client's and the server's keys; ``digest`` covers ClientHello...server Finished."""
        for label in (b"c ap traffic", b"s ap traffic"):
            yield TrafficKey(self.suite, _derive(self.suite.hash, self._main, label, digest))

    def resumption_secret(self, digest: bytes) -> bytes:
        """``digest`` covers ClientHello...client Finished."""
        return _derive(self.suite.hash, self._main, b"res master", digest)

    @property
    def _main(self) -> bytes:
        empty = self.suite.empty_digest
        salt = _derive(self.suite.hash, self.handshake, b"derived", empty)
        return _extract(self.suite.hash, salt, bytes(self.suite.hash_length))

    def chain(self, server_finished: bytes, client_finished: bytes) -> "Chain":
        """The secrets that start key updates; digests cover the handshake up to a Finished."""
        hash_ = self.suite.hash
        return Chain(
            self.suite,
            _derive(hash_, self._main, b"derived", self.suite.empty_digest),
            client_finished,
            _derive(hash_, self._main, b"exporter eku", server_finished),
        )


@dataclass(frozen=True)
class Chain:
    """The secrets from which a key update derives the next epoch
    (draft-ietf-tls-extended-key-update-13 section 7; ``docs/fresh-keys.md`` for the QKD key)."""

    suite: Suite
    salt: bytes
    transcript: bytes
    exporter: bytes

    def next(
        self, request: bytes, response: bytes, shared: bytes, slot: bytes | None
    ) -> tuple[dict[bool, TrafficKey], "Chain"]:
        """The keys of the client (``True``) and of the server, and what follows.

        Args:
            request: the message, with its header.
            response: likewise.
            shared: the secret of the key exchange.
            slot: the imported QKD key, or zeros; ``None`` where there is no slot.
        """
        hash_, empty = self.suite.hash, self.suite.empty_digest
        digest = self.suite.digest(self.transcript + request + response)
        salt = self.salt
        if slot is not None:
            salt = _derive(hash_, _extract(hash_, salt, slot), b"derived", empty)
        main = _extract(hash_, salt, shared)
        keys = {
            client: TrafficKey(self.suite, _derive(hash_, main, label, digest))
            for client, label in ((True, b"c ap traffic"), (False, b"s ap traffic"))
        }
        return keys, Chain(
            self.suite,
            _derive(hash_, main, b"derived", empty),
            digest,
            _derive(hash_, main, b"exp master", digest),
        )

    def confirmation(self, key: TrafficKey) -> bytes:
        """The confirmation of an epoch, whose chain this is, by the side with this key."""
        return _finished(self.suite.hash, key.secret, self.transcript)
