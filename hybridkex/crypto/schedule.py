"""The key schedule of RFC 8446 section 7.1, one class per stage.

``EarlySecret -> HandshakeSecret -> MainSecret``: a stage is made from the one before it and gives
out the secrets of its own level, so a secret cannot be derived too early or from the wrong stage.
Where a QKD key is used it enters at the first stage (as an external PSK), ECDHE and ML-KEM at the
second; everything after that rests on all of them.
"""

import hmac
from dataclasses import dataclass
from functools import cache, cached_property

from cryptography.hazmat.primitives.kdf.hkdf import HKDF, HKDFExpand

from hybridkex.constants import Label
from hybridkex.crypto.suites import IV_LENGTH, CipherSuite, HashFunction
from hybridkex.errors import ConfigError
from hybridkex.secret import Secret

__all__ = [
    "EarlySecret",
    "ExporterSecret",
    "HandshakeSecret",
    "MainSecret",
    "ResumptionSecret",
    "TrafficSecret",
    "finished_mac",
    "hkdf_expand_label",
    "hkdf_extract",
]


def hkdf_extract(hash_function: HashFunction, salt: bytes, key: Secret) -> Secret:
    """HKDF-Extract (RFC 5869 section 2.2): ``hash.size`` bytes."""
    return Secret(HKDF.extract(hash_function.algorithm, salt, key.reveal()))


def hkdf_expand_label(
    hash_function: HashFunction, secret: Secret, label: bytes, context: bytes, length: int
) -> bytes:
    """HKDF-Expand-Label (RFC 8446 section 7.1): ``length`` bytes."""
    full = Label.PREFIX + label
    info = b"%b%c%b%c%b" % (length.to_bytes(2, "big"), len(full), full, len(context), context)
    return HKDFExpand(hash_function.algorithm, length, info).derive(secret.reveal())


def _derive_secret(
    hash_function: HashFunction, secret: Secret, label: bytes, digest: bytes
) -> Secret:
    """Derive-Secret, given the transcript's hash in place of the messages."""
    return Secret(hkdf_expand_label(hash_function, secret, label, digest, hash_function.size))


def finished_mac(hash_function: HashFunction, base: Secret, digest: bytes) -> bytes:
    """``verify_data`` of Finished and of a PSK binder (sections 4.4.4 and 4.2.11.2)."""
    key = hkdf_expand_label(hash_function, base, Label.FINISHED, b"", hash_function.size)
    return hmac.digest(key, digest, hash_function.name)


def _next_salt(hash_function: HashFunction, secret: Secret) -> Secret:
    """What one stage gives to the next."""
    return _derive_secret(hash_function, secret, Label.DERIVED, hash_function.empty_digest)


@dataclass(frozen=True)
class TrafficSecret:
    """A traffic secret of one direction: gives record keys, Finished and its own successor."""

    suite: CipherSuite
    secret: Secret

    def key_and_iv(self) -> tuple[bytes, bytes]:
        """``suite.key_length`` and 12 bytes (section 7.3)."""
        hash_function, secret = self.suite.hash, self.secret
        return (
            hkdf_expand_label(hash_function, secret, Label.KEY, b"", self.suite.key_length),
            hkdf_expand_label(hash_function, secret, Label.IV, b"", IV_LENGTH),
        )

    def finished(self, digest: bytes) -> bytes:
        """Finished.verify_data over a transcript's hash (section 4.4.4)."""
        return finished_mac(self.suite.hash, self.secret, digest)

    def updated(self) -> "TrafficSecret":
        """The next generation, after KeyUpdate (section 7.2)."""
        hash_function = self.suite.hash
        return TrafficSecret(
            self.suite,
            _derive_secret(hash_function, self.secret, Label.TRAFFIC_UPDATE, b""),
        )


@dataclass(frozen=True)
class EarlySecret:
    """The first stage: a PSK, or zeros where there is none."""

    hash: HashFunction
    secret: Secret

    @classmethod
    def start(cls, hash_function: HashFunction, psk: Secret | None = None) -> "EarlySecret":
        """From a PSK of any length, or from ``hash.size`` zeros."""
        if psk is None:
            return _early_secret_without_psk(hash_function)
        return cls(hash_function, hkdf_extract(hash_function, bytes(hash_function.size), psk))

    def binder(self, label: bytes, digest: bytes) -> bytes:
        """The PSK binder over the hash of the truncated ClientHello (section 4.2.11.2)."""
        base = _derive_secret(self.hash, self.secret, label, self.hash.empty_digest)
        return finished_mac(self.hash, base, digest)

    def handshake_secret(self, shared: Secret) -> "HandshakeSecret":
        """The second stage, from the key exchange's secret."""
        salt = self._salt.reveal()
        return HandshakeSecret(self.hash, hkdf_extract(self.hash, salt, shared))

    @cached_property
    def _salt(self) -> Secret:
        return _next_salt(self.hash, self.secret)


@cache
def _early_secret_without_psk(hash_function: HashFunction) -> EarlySecret:
    """A constant: nothing secret goes in."""
    zeros = bytes(hash_function.size)
    return EarlySecret(hash_function, hkdf_extract(hash_function, zeros, Secret(zeros)))


@dataclass(frozen=True)
class HandshakeSecret:
    """The second stage: the PSK and the key exchange."""

    hash: HashFunction
    secret: Secret

    def client_handshake_traffic(self, suite: CipherSuite, digest: bytes) -> TrafficSecret:
        """``digest`` covers ClientHello...ServerHello."""
        return self._traffic(suite, Label.CLIENT_HANDSHAKE_TRAFFIC, digest)

    def server_handshake_traffic(self, suite: CipherSuite, digest: bytes) -> TrafficSecret:
        """``digest`` covers ClientHello...ServerHello."""
        return self._traffic(suite, Label.SERVER_HANDSHAKE_TRAFFIC, digest)

    def main_secret(self) -> "MainSecret":
        """The last stage."""
        salt = _next_salt(self.hash, self.secret).reveal()
        zeros = Secret(bytes(self.hash.size))
        return MainSecret(self.hash, hkdf_extract(self.hash, salt, zeros))

    def _traffic(self, suite: CipherSuite, label: bytes, digest: bytes) -> TrafficSecret:
        return TrafficSecret(suite, _derive_secret(self.hash, self.secret, label, digest))


@dataclass(frozen=True)
class MainSecret:
    """The last stage: what protects application data."""

    hash: HashFunction
    secret: Secret

    def client_application_traffic(self, suite: CipherSuite, digest: bytes) -> TrafficSecret:
        """``digest`` covers ClientHello...server Finished."""
        return self._traffic(suite, Label.CLIENT_APPLICATION_TRAFFIC, digest)

    def server_application_traffic(self, suite: CipherSuite, digest: bytes) -> TrafficSecret:
        """``digest`` covers ClientHello...server Finished."""
        return self._traffic(suite, Label.SERVER_APPLICATION_TRAFFIC, digest)

    def exporter_secret(self, digest: bytes) -> "ExporterSecret":
        """``digest`` covers ClientHello...server Finished."""
        secret = _derive_secret(self.hash, self.secret, Label.EXPORTER_MAIN, digest)
        return ExporterSecret(self.hash, secret)

    def resumption_secret(self, digest: bytes) -> "ResumptionSecret":
        """``digest`` covers ClientHello...client Finished."""
        secret = _derive_secret(self.hash, self.secret, Label.RESUMPTION_MAIN, digest)
        return ResumptionSecret(self.hash, secret)

    def _traffic(self, suite: CipherSuite, label: bytes, digest: bytes) -> TrafficSecret:
        return TrafficSecret(suite, _derive_secret(self.hash, self.secret, label, digest))


@dataclass(frozen=True)
class ExporterSecret:
    """Keying material for protocols above (section 7.5)."""

    hash: HashFunction
    secret: Secret

    def export(self, label: bytes, context: bytes, length: int) -> Secret:
        """``length`` bytes bound to the label and to the context (empty and absent are one).

        Raises:
            ConfigError: the label does not have 1 to 249 bytes (section 7.1: HkdfLabel holds 255
                with the prefix), or the length is not in 1 to 255 times the hash's (RFC 5869
                section 2.3).
        """
        hash_function = self.hash
        if not 1 <= len(label) <= 255 - len(Label.PREFIX):
            raise ConfigError(f"an exporter label has 1 to 249 bytes, not {len(label)}")
        if not 1 <= length <= 255 * hash_function.size:
            raise ConfigError(
                f"an exporter gives 1 to {255 * hash_function.size} bytes, not {length}"
            )
        base = _derive_secret(hash_function, self.secret, label, hash_function.empty_digest)
        digest = hash_function.digest(context)
        return Secret(hkdf_expand_label(hash_function, base, Label.EXPORTER, digest, length))


@dataclass(frozen=True)
class ResumptionSecret:
    """What session tickets are made from (section 4.6.1)."""

    hash: HashFunction
    secret: Secret

    def psk(self, nonce: bytes) -> Secret:
        """The PSK of the ticket with this nonce: ``hash.size`` bytes."""
        return Secret(
            hkdf_expand_label(self.hash, self.secret, Label.RESUMPTION, nonce, self.hash.size)
        )
