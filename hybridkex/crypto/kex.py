"""Key exchange as a plug-in with the interface of a KEM.

The client calls :meth:`KeyExchange.start` and sends ``share``; the server calls
:meth:`KeyExchange.respond` with it and sends its own share back; the client gives that to
:meth:`Started.finish`. Diffie-Hellman fits this interface; a KEM does not fit that of
Diffie-Hellman.

A :class:`Group` gives a key exchange its code point on the wire. A hybrid is :class:`Concat` of its
parts: RFC 9954 section 3.2 and 3.3 concatenate shares and secrets, and the order of the parts is
the layout. To add a group, write a :class:`KeyExchange` and put ``Group(code, name, exchange)``
into the configuration; the engine needs no change. To add one that the options know too, list it in
:data:`ALL_GROUPS` and in ``GROUPS`` of ``hybridkex/cli/choices.py``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Flag, auto
from functools import cached_property
from itertools import accumulate
from typing import Final, Protocol

from cryptography.hazmat.primitives.asymmetric import ec, mlkem, x25519
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from hybridkex.constants import GroupCode
from hybridkex.errors import ConfigError, IllegalParameter
from hybridkex.fields import check_fields, check_members, checked
from hybridkex.reasons import Reason
from hybridkex.secret import Secret

MAX_SHARE: Final = 0xFFFF
"""The maximum length of a key share in bytes (RFC 9846 section 4.3.8)."""


class Property(Flag):
    """A property of a key exchange that a policy can require."""

    CLASSICAL = auto()
    """Based on a problem that a quantum computer can solve."""
    POST_QUANTUM = auto()
    """Based on a problem for which no efficient quantum algorithm is known."""


class Started(Protocol):
    """A key exchange of the client that waits for the server's share."""

    @property
    def share(self) -> bytes:
        """The share for the peer: ``offer_length`` bytes."""

    def finish(self, peer_share: bytes) -> Secret:
        """The shared secret, from the peer's ``answer_length`` bytes.

        Raises:
            IllegalParameter: the share is invalid.
        """


class KeyExchange(Protocol):
    """A method to agree on a secret in one round trip."""

    @property
    def name(self) -> str:
        """The standard name, for example ``ML-KEM-768``."""

    @property
    def properties(self) -> Property:
        """The kinds of hard problems that its security is based on."""

    @property
    def parts(self) -> "Sequence[KeyExchange]":
        """The parts of a hybrid, or this key exchange alone."""

    @property
    def offer_length(self) -> int:
        """Bytes of the client's share."""

    @property
    def answer_length(self) -> int:
        """Bytes of the server's share."""

    def start(self) -> Started:
        """Generate a new key pair (client)."""

    def respond(self, peer_share: bytes) -> tuple[bytes, Secret]:
        """Return our share and the secret, given the client's share (server).

        Raises:
            IllegalParameter: the share is invalid.
        """


@dataclass(frozen=True, kw_only=True)
class Group:
    """A key exchange under its code point of the TLS Supported Groups registry.

    Args:
        code: the code point, 1 to 65,535.
        name: its name in logs, settings and the session.
        exchange: the key exchange, for example a :class:`Concat`.

    Raises:
        ConfigError: the code does not fit, or ``exchange`` is not a key exchange with shares that
            fit.
    """

    code: int
    name: str
    exchange: KeyExchange

    def __post_init__(self) -> None:
        check_fields(self)
        if not 0 < self.code <= 0xFFFF:
            raise ConfigError(
                f"{self.name}: the code point of a group must fit 16 bits, not {self.code:#x}"
            )
        check_fits(self.name, self.exchange)

    @property
    def properties(self) -> Property:
        """The union of the parts' properties."""
        return self.exchange.properties

    @cached_property
    def post_quantum(self) -> bool:
        """Whether one of the parts is post-quantum."""
        return Property.POST_QUANTUM in self.properties

    @cached_property
    def part_names(self) -> tuple[str, ...]:
        """The parts' names, in the order of the layout."""
        return tuple([part.name for part in self.exchange.parts])

    def __str__(self) -> str:
        return self.name


def check_fits(name: str, exchange: KeyExchange) -> None:
    """Refuse a key exchange whose shares are too long for a KeyShareEntry."""
    for length in (exchange.offer_length, exchange.answer_length):
        if not 0 < length <= MAX_SHARE:
            raise ConfigError(
                f"{name} has a share of {length} bytes, and a key share in TLS 1.3 "
                f"holds at most {MAX_SHARE}"
            )


def check_length(name: str, share: bytes, expected: int) -> None:
    """Refuse a share of the wrong length."""
    if len(share) != expected:
        raise IllegalParameter(
            f"{name}: a share of {len(share)} bytes instead of {expected}",
            Reason.KEY_SHARE_MALFORMED,
        )


class _Single:
    """A key exchange that is not a hybrid."""

    @property
    def parts(self) -> Sequence[KeyExchange]:
        return (self,)  # type: ignore[return-value]  # every subclass is a KeyExchange


class _X25519(_Single):
    """X25519 (RFC 7748), as RFC 9846 section 4.3.8.2 and 7.4.2 use it."""

    name = "X25519"
    properties = Property.CLASSICAL
    offer_length = answer_length = 32

    def start(self) -> Started:
        return _X25519Started()

    def respond(self, peer_share: bytes) -> tuple[bytes, Secret]:
        started = _X25519Started()
        return started.share, started.finish(peer_share)


class _X25519Started:
    __slots__ = ("private_key", "share")

    def __init__(self) -> None:
        self.private_key = x25519.X25519PrivateKey.generate()
        self.share = self.private_key.public_key().public_bytes_raw()

    def finish(self, peer_share: bytes) -> Secret:
        check_length("X25519", peer_share, 32)
        public = x25519.X25519PublicKey.from_public_bytes(peer_share)
        try:
            return Secret(self.private_key.exchange(public))
        except ValueError:
            # RFC 9846 section 7.4.2: the all-zero result must be refused.
            raise IllegalParameter(
                "X25519: the share is a point of low order", Reason.KEY_SHARE_MALFORMED
            ) from None


class _Ecdh(_Single):
    """ECDH over a NIST curve; shares are uncompressed points (RFC 9846 section 4.3.8.2)."""

    properties = Property.CLASSICAL

    def __init__(self, name: str, curve: ec.EllipticCurve) -> None:
        self.name = name
        self.curve = curve
        self.offer_length = self.answer_length = 1 + 2 * ((curve.key_size + 7) // 8)

    def start(self) -> Started:
        return _EcdhStarted(self)

    def respond(self, peer_share: bytes) -> tuple[bytes, Secret]:
        started = _EcdhStarted(self)
        return started.share, started.finish(peer_share)


class _EcdhStarted:
    __slots__ = ("_kind", "private_key", "share")

    def __init__(self, kind: _Ecdh) -> None:
        self._kind = kind
        self.private_key = ec.generate_private_key(kind.curve)
        self.share = self.private_key.public_key().public_bytes(
            Encoding.X962, PublicFormat.UncompressedPoint
        )

    def finish(self, peer_share: bytes) -> Secret:
        check_length(self._kind.name, peer_share, self._kind.answer_length)
        # The length alone does not rule out the hybrid form (first byte 6 or 7).
        if peer_share[0] != 4:
            raise IllegalParameter(
                f"{self._kind.name}: the point is not in uncompressed form",
                Reason.KEY_SHARE_MALFORMED,
            )
        try:
            public = ec.EllipticCurvePublicKey.from_encoded_point(self._kind.curve, peer_share)
        except ValueError:
            raise IllegalParameter(
                f"{self._kind.name}: the point is not on the curve", Reason.KEY_SHARE_MALFORMED
            ) from None
        return Secret(self.private_key.exchange(ec.ECDH(), public))


class _MlKem(_Single):
    """ML-KEM (FIPS 203): the encapsulation key goes out, the ciphertext comes back."""

    properties = Property.POST_QUANTUM

    def __init__(
        self,
        name: str,
        private: type[mlkem.MLKEM768PrivateKey | mlkem.MLKEM1024PrivateKey],
        public: type[mlkem.MLKEM768PublicKey | mlkem.MLKEM1024PublicKey],
        *,
        key: int,
        ciphertext: int,
    ) -> None:
        self.name = name
        self.generate = private.generate
        self.from_public_bytes = public.from_public_bytes
        self.offer_length = key
        self.answer_length = ciphertext

    def start(self) -> Started:
        return _MlKemStarted(self)

    def respond(self, peer_share: bytes) -> tuple[bytes, Secret]:
        check_length(self.name, peer_share, self.offer_length)
        try:
            public = self.from_public_bytes(peer_share)
        except ValueError:
            # The modulus check of FIPS 203 section 7.2.
            raise IllegalParameter(
                f"{self.name}: the encapsulation key is malformed", Reason.KEY_SHARE_MALFORMED
            ) from None
        secret, ciphertext = public.encapsulate()
        return ciphertext, Secret(secret)


class _MlKemStarted:
    __slots__ = ("_kind", "private_key", "share")

    def __init__(self, kind: _MlKem) -> None:
        self._kind = kind
        self.private_key = kind.generate()
        self.share = self.private_key.public_key().public_bytes_raw()

    def finish(self, peer_share: bytes) -> Secret:
        check_length(self._kind.name, peer_share, self._kind.answer_length)
        return Secret(self.private_key.decapsulate(peer_share))


class Concat:
    """A hybrid: shares and secrets of the parts, one after the other (RFC 9954 section 3).

    If a part is itself a hybrid, its parts take its place; the layout is the same. The secret is as
    strong as the strongest part, since the TLS 1.3 key schedule extracts from the whole (RFC 9954
    section 3.3). The lengths are fixed, so no part can run into the next.

    Args:
        parts: two key exchanges or more, in the order of their shares.
        name: its name; by default, those of the parts, joined by ``+``.

    Raises:
        ConfigError: there are fewer than two parts, or one is not a key exchange.
    """

    @checked
    def __init__(self, *parts: KeyExchange, name: str | None = None) -> None:
        if len(parts) < 2:
            raise ConfigError("a hybrid key exchange needs at least two parts")
        for part in parts:
            check_members("Concat", part, KeyExchange)
        parts = tuple(single for part in parts for single in part.parts)
        self.parts = parts
        self.name = name or "+".join(part.name for part in parts)
        self.offers = _Layout(self.name, [part.offer_length for part in parts])
        self.answers = _Layout(self.name, [part.answer_length for part in parts])
        self.offer_length, self.answer_length = self.offers.length, self.answers.length
        self.properties = Property(0)
        for part in parts:
            self.properties |= part.properties

    def start(self) -> Started:
        """Generate a new key pair for each part (client)."""
        return _ConcatStarted(self)

    def respond(self, peer_share: bytes) -> tuple[bytes, Secret]:
        """Answer the parts of ``peer_share`` (server): our share, and the concatenation of the
        secrets.

        Raises:
            PeerError: the client's share is not valid.
        """
        shares = self.offers.split(peer_share)
        answers = [part.respond(share) for part, share in zip(self.parts, shares, strict=True)]
        return b"".join([share for share, _ in answers]), _join([secret for _, secret in answers])


class _ConcatStarted:
    __slots__ = ("_kind", "_parts", "share")

    def __init__(self, kind: Concat) -> None:
        self._kind = kind
        self._parts = [part.start() for part in kind.parts]
        self.share = b"".join([part.share for part in self._parts])

    def finish(self, peer_share: bytes) -> Secret:
        shares = self._kind.answers.split(peer_share)
        return _join([part.finish(share) for part, share in zip(self._parts, shares, strict=True)])


class _Layout:
    """The positions of the parts' shares in the share of a hybrid."""

    def __init__(self, name: str, lengths: Sequence[int]) -> None:
        self.name = name
        ends = tuple(accumulate(lengths))
        self.length = ends[-1]
        self._pieces = [slice(end - length, end) for end, length in zip(ends, lengths, strict=True)]

    def split(self, share: bytes) -> list[bytes]:
        check_length(self.name, share, self.length)
        return [share[piece] for piece in self._pieces]


def _join(secrets: Sequence[Secret]) -> Secret:
    return Secret(b"".join([secret.reveal() for secret in secrets]))


_X25519_EXCHANGE: Final = _X25519()
_P256_EXCHANGE: Final = _Ecdh("P-256", ec.SECP256R1())
_P384_EXCHANGE: Final = _Ecdh("P-384", ec.SECP384R1())
_MLKEM768_EXCHANGE: Final = _MlKem(
    "ML-KEM-768", mlkem.MLKEM768PrivateKey, mlkem.MLKEM768PublicKey, key=1184, ciphertext=1088
)
_MLKEM1024_EXCHANGE: Final = _MlKem(
    "ML-KEM-1024", mlkem.MLKEM1024PrivateKey, mlkem.MLKEM1024PublicKey, key=1568, ciphertext=1568
)

X25519: Final = Group(code=GroupCode.X25519, name="x25519", exchange=_X25519_EXCHANGE)
SECP256R1: Final = Group(code=GroupCode.SECP256R1, name="secp256r1", exchange=_P256_EXCHANGE)
SECP384R1: Final = Group(code=GroupCode.SECP384R1, name="secp384r1", exchange=_P384_EXCHANGE)
MLKEM768: Final = Group(code=GroupCode.MLKEM768, name="MLKEM768", exchange=_MLKEM768_EXCHANGE)
MLKEM1024: Final = Group(code=GroupCode.MLKEM1024, name="MLKEM1024", exchange=_MLKEM1024_EXCHANGE)

# RFC 10024: ML-KEM first beside X25519, ECDH first on the NIST curves.
X25519MLKEM768: Final = Group(
    code=GroupCode.X25519MLKEM768,
    name="X25519MLKEM768",
    exchange=Concat(_MLKEM768_EXCHANGE, _X25519_EXCHANGE),
)
SECP256R1MLKEM768: Final = Group(
    code=GroupCode.SECP256R1MLKEM768,
    name="SecP256r1MLKEM768",
    exchange=Concat(_P256_EXCHANGE, _MLKEM768_EXCHANGE),
)
SECP384R1MLKEM1024: Final = Group(
    code=GroupCode.SECP384R1MLKEM1024,
    name="SecP384r1MLKEM1024",
    exchange=Concat(_P384_EXCHANGE, _MLKEM1024_EXCHANGE),
)

HYBRID_GROUPS: Final = (X25519MLKEM768, SECP256R1MLKEM768, SECP384R1MLKEM1024)
"""The default offer; with :data:`CLASSICAL_GROUPS` if post-quantum is only preferred."""
CLASSICAL_GROUPS: Final = (X25519, SECP256R1, SECP384R1)
ALL_GROUPS: Final = (*HYBRID_GROUPS, MLKEM768, MLKEM1024, *CLASSICAL_GROUPS)
"""Also those that are only used when a configuration names them."""
