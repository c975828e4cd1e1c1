"""Key encapsulation mechanisms of liboqs as key exchanges and groups.

This module can be imported without liboqs; then :class:`OqsKem` raises
:class:`~hybridkex.errors.ProviderMissing`.

Code points, by one rule:

1. ML-KEM has its own in the TLS registry (0x0200 to 0x0202).
2. Everything else is private use (0xFE00 to 0xFEFF, RFC 9846 section 4.3.7). Where oqs-provider
   has a default code point, it is the same here, so that OpenSSL with it can be the peer.
3. NTRU and NTRU Prime, which it does not have, are at 0xFEA0 and above.
4. 0xFEC0 to 0xFEFF is for your own groups: hybrids, and algorithms that liboqs adds later.
"""

from collections.abc import Sequence
from typing import Any, Final

from hybridkex.constants import GroupCode
from hybridkex.crypto import oqs
from hybridkex.crypto.kex import (
    Concat,
    Group,
    KeyExchange,
    Property,
    Started,
    check_fits,
    check_length,
)
from hybridkex.errors import ConfigError, IllegalParameter
from hybridkex.reasons import Reason
from hybridkex.secret import Secret

CODES: Final = {
    "ML-KEM-512": GroupCode.MLKEM512,
    "ML-KEM-768": GroupCode.MLKEM768,
    "ML-KEM-1024": GroupCode.MLKEM1024,
    "eFrodoKEM-640-AES": 0xFE00,
    "eFrodoKEM-640-SHAKE": 0xFE03,
    "eFrodoKEM-976-AES": 0xFE06,
    "eFrodoKEM-976-SHAKE": 0xFE09,
    "eFrodoKEM-1344-AES": 0xFE0C,
    "eFrodoKEM-1344-SHAKE": 0xFE0E,
    "BIKE-L1": 0xFE10,
    "BIKE-L3": 0xFE13,
    "BIKE-L5": 0xFE16,
    "FrodoKEM-640-AES": 0xFE23,
    "FrodoKEM-640-SHAKE": 0xFE26,
    "FrodoKEM-976-AES": 0xFE29,
    "FrodoKEM-976-SHAKE": 0xFE2C,
    "FrodoKEM-1344-AES": 0xFE2F,
    "FrodoKEM-1344-SHAKE": 0xFE31,
    "HQC-1": 0xFE33,
    "HQC-3": 0xFE36,
    "HQC-5": 0xFE39,
    "NTRU-HPS-2048-509": 0xFEA0,
    "NTRU-HPS-2048-677": 0xFEA1,
    "NTRU-HPS-4096-821": 0xFEA2,
    "NTRU-HPS-4096-1229": 0xFEA3,
    "NTRU-HRSS-701": 0xFEA4,
    "NTRU-HRSS-1373": 0xFEA5,
    "sntrup761": 0xFEA8,
    "Kyber512": 0xFEB0,
    "Kyber768": 0xFEB1,
    "Kyber1024": 0xFEB2,
}
"""Code points by liboqs's names. Classic McEliece has none: its shares (261,120 bytes and more) are
too long for a key share (65,535)."""


class OqsKem:
    """A KEM of liboqs: the public key goes out, the ciphertext comes back.

    Args:
        name: liboqs's name, for example ``FrodoKEM-976-SHAKE``.

    Raises:
        ProviderMissing: liboqs is not installed.
        ConfigError: this liboqs does not support it.
    """

    properties = Property.POST_QUANTUM

    def __init__(self, name: str) -> None:
        self._new = oqs.load().KeyEncapsulation
        enabled = oqs.load().get_enabled_kem_mechanisms()
        if name not in enabled:
            raise ConfigError(f"this liboqs has no KEM {name!r}; it has {', '.join(enabled)}")
        with self._new(name) as kem:
            self.offer_length: int = kem.details["length_public_key"]
            self.answer_length: int = kem.details["length_ciphertext"]
            self._private_length: int = kem.details["length_secret_key"]
        self.name = name

    @property
    def parts(self) -> Sequence[KeyExchange]:
        """The parts: this key exchange alone."""
        return (self,)

    def start(self) -> Started:
        """Generate a new key pair."""
        return _OqsStarted(self)

    def respond(self, peer_share: bytes) -> tuple[bytes, Secret]:
        """Encapsulate to the peer's public key."""
        check_length(self.name, peer_share, self.offer_length)
        with self._new(self.name) as kem:
            try:
                ciphertext, secret = kem.encap_secret(peer_share)
            except RuntimeError:
                # liboqs gives no reason; for ML-KEM it is the modulus check of FIPS 203 section
                # 7.2.
                raise IllegalParameter(
                    f"{self.name}: the public key is malformed", Reason.KEY_SHARE_MALFORMED
                ) from None
        return ciphertext, Secret(secret)

    def open(self, private_key: Secret, peer_share: bytes) -> Secret:
        """Decapsulate the peer's ciphertext."""
        check_length(self.name, peer_share, self.answer_length)
        if len(private_key) != self._private_length:
            # The wrapper would pad a short key with zeros.
            raise ConfigError(f"{self.name}: a private key of {len(private_key)} bytes")
        with self._new(self.name, secret_key=private_key.reveal()) as kem:
            try:
                return Secret(kem.decap_secret(peer_share))
            except RuntimeError:
                raise IllegalParameter(
                    f"{self.name}: the ciphertext is malformed", Reason.KEY_SHARE_MALFORMED
                ) from None

    def key_pair(self) -> tuple[bytes, Secret]:
        with self._new(self.name) as kem:
            public: Any = kem.generate_keypair()
            return public, Secret(kem.export_secret_key())

    def __repr__(self) -> str:
        return f"OqsKem({self.name!r})"


class _OqsStarted:
    __slots__ = ("_kind", "_private", "share")

    def __init__(self, kind: OqsKem) -> None:
        self._kind = kind
        self.share, self._private = kind.key_pair()

    def finish(self, peer_share: bytes) -> Secret:
        return self._kind.open(self._private, peer_share)


def oqs_group(name: str, *, code: int | None = None) -> Group:
    """A KEM of liboqs as a group of its own.

    Args:
        name: liboqs's name.
        code: a code point in place of the one in :data:`CODES`.

    Raises:
        ProviderMissing: liboqs is not installed.
        ConfigError: unknown to liboqs, without a code point, or too large for a key share.
    """
    exchange = OqsKem(name)
    chosen = CODES.get(name) if code is None else code
    if chosen is None:
        check_fits(name, exchange)  # This gives the more precise reason.
        raise ConfigError(f"{name} has no code point of its own; pass one, 0xFEC0 to 0xFEFF")
    return Group(code=chosen, name=name, exchange=exchange)


def via_oqs(group: Group) -> Group:
    """The same group on the wire, its ML-KEM computed by liboqs instead of `cryptography`.

    Both use the same encoding, so each side can choose its own implementation:
    ``ClientConfig(groups=(via_oqs(X25519MLKEM768), X25519))``.

    Raises:
        ProviderMissing: liboqs is not installed.
        ConfigError: the group has no part that liboqs computes.
    """
    parts = [OqsKem(one.name) if one.name in CODES else one for one in group.exchange.parts]
    if not any(isinstance(part, OqsKem) for part in parts):
        raise ConfigError(f"{group} has no part that liboqs computes")
    exchange = parts[0] if len(parts) == 1 else Concat(*parts, name=group.exchange.name)
    return Group(code=group.code, name=group.name, exchange=exchange)
