"""The key schedule of RFC 9846 section 7.1, one class per stage.

``EarlySecret -> HandshakeSecret -> MainSecret``: a stage is derived from the one before it and
returns the secrets of its own level, so a secret cannot be derived too early or from the wrong
stage. A QKD key enters at the first stage (as an external PSK), ECDHE and ML-KEM at the second;
everything after that is derived from all of them.
"""

from functools import cache, lru_cache

from cryptography.hazmat.primitives.hmac import HMAC
from cryptography.hazmat.primitives.kdf.hkdf import HKDF, HKDFExpand

from hybridkex.constants import Label
from hybridkex.crypto.suites import IV_LENGTH, CipherSuite, HashFunction
from hybridkex.errors import ConfigError
from hybridkex.secret import Secret
from hybridkex.values import value


def hkdf_extract(hash_function: HashFunction, salt: bytes, key: Secret) -> Secret:
    """HKDF-Extract (RFC 5869 section 2.2): ``hash.size`` bytes."""
    return Secret(HKDF.extract(hash_function.algorithm, salt, key.reveal()))


def hkdf_expand_label(
    hash_function: HashFunction, secret: Secret, label: bytes, context: bytes, length: int
) -> bytes:
    """HKDF-Expand-Label (RFC 9846 section 7.1): ``length`` bytes."""
    info = _hkdf_label_head(label, len(context), length) + context
    return HKDFExpand(hash_function.algorithm, length, info).derive(secret.reveal())


@lru_cache(maxsize=64)
def _hkdf_label_head(label: bytes, context_length: int, length: int) -> bytes:
    """The structure HkdfLabel (section 7.1) without the context, which ends it."""
    full = Label.PREFIX + label
    return b"%b%c%b%c" % (length.to_bytes(2, "big"), len(full), full, context_length)


def finished_mac(hash_function: HashFunction, base: Secret, digest: bytes) -> bytes:
    """``verify_data`` of Finished and of a PSK binder (sections 4.5.3 and 4.3.11.2)."""
    return _Base(hash_function, base).finished(digest)


class _Base:
    """A secret that others are derived from: HMAC is keyed with it once for all their labels.

    What the schedule derives is never longer than the hash, and then HKDF-Expand is a single HMAC
    (RFC 5869 section 2.3). Copying a keyed HMAC takes a fifth of the time of keying one.
    """

    __slots__ = ("_keyed", "hash", "secret")

    def __init__(self, hash_function: HashFunction, secret: Secret) -> None:
        self.hash = hash_function
        self.secret = secret
        self._keyed = HMAC(secret.reveal(), hash_function.algorithm)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.hash}, {self.secret})"

    def expand(self, label: bytes, context: bytes, length: int) -> bytes:
        """HKDF-Expand-Label: ``length`` bytes, of at most ``hash.size``."""
        mac = self._keyed.copy()
        mac.update(_hkdf_label_head(label, len(context), length) + context + b"\1")
        return mac.finalize()[:length]

    def derive(self, label: bytes, digest: bytes) -> Secret:
        """Derive-Secret, given the transcript's hash in place of the messages."""
        return Secret(self.expand(label, digest, self.hash.size))

    def finished(self, digest: bytes) -> bytes:
        """Finished.verify_data over a transcript's hash (section 4.5.3)."""
        mac = HMAC(self.expand(Label.FINISHED, b"", self.hash.size), self.hash.algorithm)
        mac.update(digest)
        return mac.finalize()

    def _salt(self) -> Secret:
        """The salt for extracting the secret of the next stage."""
        return self.derive(Label.DERIVED, self.hash.empty_digest)


class TrafficSecret(_Base):
    """A traffic secret of one direction: gives record keys, Finished and its own successor."""

    __slots__ = ("suite",)

    def __init__(self, suite: CipherSuite, secret: Secret) -> None:
        self.hash, self.secret, self.suite = suite.hash, secret, suite
        self._keyed = HMAC(secret.reveal(), suite.hash.algorithm)

    def key_and_iv(self) -> tuple[bytes, bytes]:
        """``suite.key_length`` and 12 bytes (section 7.3)."""
        return (
            self.expand(Label.KEY, b"", self.suite.key_length),
            self.expand(Label.IV, b"", IV_LENGTH),
        )

    def updated(self) -> "TrafficSecret":
        """The next generation, after KeyUpdate (section 7.2)."""
        return TrafficSecret(self.suite, self.derive(Label.TRAFFIC_UPDATE, b""))


class EarlySecret(_Base):
    """The first stage: a PSK, or zeros where there is none."""

    __slots__ = ("_kept_salt",)

    def __init__(self, hash_function: HashFunction, secret: Secret) -> None:
        super().__init__(hash_function, secret)
        self._kept_salt: Secret | None = None

    @classmethod
    def start(cls, hash_function: HashFunction, psk: Secret | None = None) -> "EarlySecret":
        """Begin with a PSK of any length, or with ``hash.size`` zeros."""
        if psk is None:
            return _early_secret_without_psk(hash_function)
        return cls(hash_function, hkdf_extract(hash_function, bytes(hash_function.size), psk))

    def binder(self, label: bytes, digest: bytes) -> bytes:
        """The PSK binder over the hash of the truncated ClientHello (section 4.3.11.2)."""
        return finished_mac(self.hash, self.derive(label, self.hash.empty_digest), digest)

    def handshake_secret(self, shared: Secret) -> "HandshakeSecret":
        """The second stage, from the key exchange's secret."""
        if self._kept_salt is None:  # the stage without a PSK serves all handshakes
            self._kept_salt = self._salt()
        secret = hkdf_extract(self.hash, self._kept_salt.reveal(), shared)
        return HandshakeSecret(self.hash, secret)


@cache
def _early_secret_without_psk(hash_function: HashFunction) -> EarlySecret:
    """A constant without secret input."""
    zeros = bytes(hash_function.size)
    return EarlySecret(hash_function, hkdf_extract(hash_function, zeros, Secret(zeros)))


class HandshakeSecret(_Base):
    """The second stage: the PSK and the key exchange."""

    __slots__ = ()

    def client_handshake_traffic(self, suite: CipherSuite, digest: bytes) -> TrafficSecret:
        """``digest`` covers ClientHello...ServerHello."""
        return TrafficSecret(suite, self.derive(Label.CLIENT_HANDSHAKE_TRAFFIC, digest))

    def server_handshake_traffic(self, suite: CipherSuite, digest: bytes) -> TrafficSecret:
        """``digest`` covers ClientHello...ServerHello."""
        return TrafficSecret(suite, self.derive(Label.SERVER_HANDSHAKE_TRAFFIC, digest))

    def main_secret(self) -> "MainSecret":
        """The last stage."""
        zeros = Secret(bytes(self.hash.size))
        return MainSecret(self.hash, hkdf_extract(self.hash, self._salt().reveal(), zeros))


class MainSecret(_Base):
    """The last stage: what protects application data."""

    __slots__ = ()

    def client_application_traffic(self, suite: CipherSuite, digest: bytes) -> TrafficSecret:
        """``digest`` covers ClientHello...server Finished."""
        return TrafficSecret(suite, self.derive(Label.CLIENT_APPLICATION_TRAFFIC, digest))

    def server_application_traffic(self, suite: CipherSuite, digest: bytes) -> TrafficSecret:
        """``digest`` covers ClientHello...server Finished."""
        return TrafficSecret(suite, self.derive(Label.SERVER_APPLICATION_TRAFFIC, digest))

    def exporter_secret(self, digest: bytes) -> "ExporterSecret":
        """``digest`` covers ClientHello...server Finished."""
        return ExporterSecret(self.hash, self.derive(Label.EXPORTER_MAIN, digest))

    def resumption_secret(self, digest: bytes) -> "ResumptionSecret":
        """``digest`` covers ClientHello...client Finished."""
        return ResumptionSecret(self.hash, self.derive(Label.RESUMPTION_MAIN, digest))

    def updatable_exporter_secret(self, digest: bytes) -> "ExporterSecret":
        """The exporter that key updates change (draft-ietf-tls-extended-key-update-13 section
        10.1); ``digest`` covers ClientHello...server Finished."""
        return ExporterSecret(self.hash, self.derive(Label.EXPORTER_UPDATED, digest))

    def update_salt(self) -> Secret:
        """The secret from which the next main secret is derived (section 7 of that draft)."""
        return self._salt()

    @classmethod
    def extract(cls, hash_function: HashFunction, salt: Secret, key: Secret) -> "MainSecret":
        """A later main secret, from the salt of the previous one and new input."""
        return cls(hash_function, hkdf_extract(hash_function, salt.reveal(), key))


@value
class ExporterSecret:
    """Exported keying material for application protocols (section 7.5)."""

    hash: HashFunction
    secret: Secret

    def export(self, label: bytes, context: bytes, length: int) -> Secret:
        """``length`` bytes bound to the label and to the context (an empty context equals an absent
        one).

        Raises:
            ConfigError: the label does not have 1 to 249 bytes (section 7.1: HkdfLabel holds 255
                with the prefix), or the length is not in 1 to 255 times the hash's (RFC 5869
                section 2.3).
        """
        hash_function = self.hash
        if not 1 <= len(label) <= 255 - len(Label.PREFIX):
            raise ConfigError(f"an exporter label must have 1 to 249 bytes, not {len(label)}")
        if not 1 <= length <= 255 * hash_function.size:
            raise ConfigError(
                f"an exporter returns 1 to {255 * hash_function.size} bytes, not {length}"
            )
        base = _Base(hash_function, self.secret).derive(label, hash_function.empty_digest)
        digest = hash_function.digest(context)
        return Secret(hkdf_expand_label(hash_function, base, Label.EXPORTER, digest, length))


@value
class ResumptionSecret:
    """The secret from which the PSKs of session tickets are derived (section 4.7.1)."""

    hash: HashFunction
    secret: Secret

    def psk(self, nonce: bytes) -> Secret:
        """The PSK of the ticket with this nonce: ``hash.size`` bytes."""
        return _Base(self.hash, self.secret).derive(Label.RESUMPTION, nonce)
