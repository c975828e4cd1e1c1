"""Combining secrets (ETSI TS 103 744, NIST SP 800-56C Rev. 2, NIST SP 800-227 section 4.6).

Protocols should call :func:`combine`: calls that differ in any argument give independent keys.

:func:`cat_kdf` and :func:`cas_kdf` are the bare key derivations of ETSI TS 103 744 V1.2.1, sections
8.2 and 8.3, with HKDF (section 7.4.2) and, for the cascade, HMAC as the PRF (section 7.3.2). The
published vectors are for these two. The formulas and section numbers are those of ETSI's reference
implementation (etsi-forge/cyber.103744_QHKEX), since the text of the standard was not available;
the tests compare with its output.

The bare functions use the label as HKDF's salt, as the standard does. A salt is the key of an HMAC
(RFC 5869 section 2.2), which pads it with zeros to the hash's block and hashes it when it is longer
(RFC 2104 section 2): labels that differ in trailing zero bytes give the same key. Nor does HKDF
bind the output length: a short key is the prefix of a longer one (RFC 5869 section 2.3).
:func:`combine` therefore uses a constant salt, and encodes label and length into ``info``, which is
FixedInfo in the terms of SP 800-56C section 5.
"""

import hmac
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final

from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from hybridkex.crypto.suites import SHA256, HashFunction
from hybridkex.errors import ConfigError
from hybridkex.secret import Secret
from hybridkex.wire.codec import u32, vector32

NO_SECRET = Secret(b"")

_SALT: Final = b"hybridkex combine v1"


def require(value: object, kind: type[Any], what: str) -> None:
    """Refuse an argument of the wrong type; ``bool`` does not count as ``int``.

    Raises:
        ConfigError: the value is not of this type. The message does not show the value.
    """
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ConfigError(f"{what} must be {kind.__name__}, not {type(value).__name__}")


def _require_length(length: int, function: HashFunction, extra: int = 0) -> None:
    require(length, int, "length")
    most = 255 * function.size - extra
    if not 1 <= length <= most:
        raise ConfigError(f"length must be 1 to {most} bytes, not {length}")


def _sequence(values: object, kind: type[Any], what: str) -> tuple[Any, ...]:
    if isinstance(values, str | bytes) or not isinstance(values, Sequence):
        raise ConfigError(f"{what} must be a sequence of {kind.__name__}")
    for value in values:
        require(value, kind, f"each of {what}")
    return tuple(values)


def _hashed(function: HashFunction, *values: bytes) -> bytes:
    """The concatenate-and-hash formatting function ``f`` (section 7.2.3); each value is preceded by
    its length in 32 bits (section 7.2.2)."""
    return function.digest(b"".join(map(vector32, values)))


def _hkdf(
    function: HashFunction, secret: bytes, label: bytes, context: bytes, length: int
) -> bytes:
    """``KDF(secret, label, context, length)`` by HKDF (section 7.4.2): the label is the salt."""
    return HKDF(function.algorithm, length, label, context).derive(secret)


def cat_kdf(
    secrets: Sequence[Secret],
    *,
    message_a: bytes,
    message_b: bytes,
    label: bytes,
    info: bytes,
    length: int,
    hash: HashFunction = SHA256,
    psk: Secret = NO_SECRET,
) -> Secret:
    """CatKDF (ETSI TS 103 744 section 8.2)::

        secret       = psk || k_1 || k_2 || ... || k_n
        f_context    = Hash(len(info) || info || len(MA) || MA || len(MB) || MB)
        key material = HKDF(salt=label, IKM=secret, info=f_context, length)

    The caller must keep inputs unambiguous: each secret and the PSK must have a fixed length,
    labels must not differ in trailing zero bytes alone, and ``length`` must be fixed by the label
    or by ``info``.
    :func:`combine` ensures all of this.

    Args:
        secrets: of the key exchanges, in the agreed order.
        message_a: all bytes that the initiator sent.
        message_b: all bytes that the responder sent.
        label: HKDF's salt.
        info: names the parties and the use of the key.
        length: length of the key in bytes, 1 to 255 times the hash's size.
        hash: the hash of HKDF and of the context.
        psk: a key that both sides share beforehand; empty if there is none.

    Raises:
        ConfigError: an argument has the wrong type, or the length is out of range.
    """
    secrets = _sequence(secrets, Secret, "secrets")
    _require_common(message_a, message_b, label, info, hash)
    require(psk, Secret, "psk")
    _require_length(length, hash)
    secret = psk.reveal() + b"".join(one.reveal() for one in secrets)
    context = _hashed(hash, info, message_a, message_b)
    return Secret(_hkdf(hash, secret, label, context, length))


def cas_kdf(
    previous: Secret,
    secret: Secret,
    *,
    message_a: bytes,
    message_b: bytes,
    label: bytes,
    info: bytes,
    length: int,
    hash: HashFunction = SHA256,
) -> tuple[Secret, Secret]:
    """One round of CasKDF (ETSI TS 103 744 section 8.3)::

        round secret               = HMAC(chain_(i-1), Hash(len(k_i) || k_i || len(MA_i) || MA_i
                                                             || len(MB_i) || MB_i))
        chain_i || key material_i  = HKDF(salt=label_i, IKM=round secret, info=info_i)

    The caller must keep labels and lengths unambiguous, as for :func:`cat_kdf`.

    Args:
        previous: the chain secret of the previous round; in the first round the PSK, or empty.
        secret: of this round's key exchange.
        message_a: what the initiator sent in this round.
        message_b: what the responder sent in this round.
        label: HKDF's salt in this round.
        info: names the parties and the use of the key.
        length: length of this round's key in bytes, 1 to 254 times the hash's size.
        hash: the hash of HKDF, of the PRF and of the context.

    Returns:
        The chain secret for the next round (as long as the hash), and the key of this round.

    Raises:
        ConfigError: an argument has the wrong type, or the length is out of range.
    """
    require(previous, Secret, "previous")
    require(secret, Secret, "secret")
    _require_common(message_a, message_b, label, info, hash)
    _require_length(length, hash, extra=hash.size)
    digest = _hashed(hash, secret.reveal(), message_a, message_b)
    round_secret = hmac.digest(previous.reveal(), digest, hash.name)
    output = _hkdf(hash, round_secret, label, info, hash.size + length)
    return Secret(output[: hash.size]), Secret(output[hash.size :])


def _require_common(
    message_a: object, message_b: object, label: object, info: object, hash: object
) -> None:
    require(message_a, bytes, "message_a")
    require(message_b, bytes, "message_b")
    require(label, bytes, "label")
    require(info, bytes, "info")
    require(hash, HashFunction, "hash")


class Method(Enum):
    """The key derivation that :func:`combine` uses."""

    CONCATENATE = "CatKDF"
    """All secrets in one derivation."""
    CASCADE = "CasKDF"
    """One derivation for each secret, chained: for secrets that arrive one after the other."""


@dataclass(frozen=True, kw_only=True)
class Leg:
    """One input of :func:`combine`: a secret and the messages that established it.

    Raises:
        ConfigError: a field has the wrong type, the name is not valid Unicode or is empty, or the
            secret is empty.
    """

    name: str
    """The algorithm or source, for example ``ML-KEM-768``; the same on both sides."""
    secret: Secret
    """What the two sides share; not empty."""
    offer: bytes
    """The initiator's message: a public key. For a QKD key, its ID."""
    answer: bytes = b""
    """The responder's message: a public key or a ciphertext."""

    def __post_init__(self) -> None:
        for field, kind in (("name", str), ("secret", Secret), ("offer", bytes), ("answer", bytes)):
            require(getattr(self, field), kind, f"{field} of a leg")
        if not len(self.secret):
            raise ConfigError("the secret of a leg must not be empty")
        try:
            encoded = self.name.encode("utf-8")
        except UnicodeEncodeError:
            encoded = b""
        if not encoded:
            raise ConfigError("the name of a leg must be non-empty Unicode text")


def combine(
    legs: Sequence[Leg],
    *,
    label: bytes,
    context: bytes,
    length: int = 32,
    hash: HashFunction = SHA256,
    psk: Secret = NO_SECRET,
    method: Method = Method.CONCATENATE,
) -> Secret:
    """Derive one key from several secrets; learning it requires knowing all of them.

    Every argument enters the derivation in an injective encoding: two calls that differ in any
    argument, or in any field of a leg, give independent keys. ::

        info = len(method) || method || len(hash) || hash || len(label) || label
               || length || len(psk) || number of legs
               || for each leg: len(name) || name || len(secret)
               || len(context) || context

    with all lengths and numbers in 32 bits. CatKDF or CasKDF then takes this ``info``, a constant
    label, the PSK, and the secrets and messages of the legs. All public shares enter, as SP 800-227
    section 4.6 requires for a combination that is as strong against chosen ciphertexts as its
    strongest part.

    Args:
        legs: in the order that both sides agreed on; at least one.
        label: the purpose of the key; one label per use, not empty.
        context: the identities and roles of both sides, and anything else that both must agree on.
        length: length of the key in bytes: 1 to 255 times the hash's size for CatKDF, 254 times
            for CasKDF.
        hash: the hash of the derivation.
        psk: a key that both sides share beforehand; empty if there is none.
        method: CatKDF or CasKDF.

    Raises:
        ConfigError: an argument has the wrong type, there is no leg or no label, or the length is
            out of range.
    """
    legs = _sequence(legs, Leg, "legs")
    require(label, bytes, "label")
    require(context, bytes, "context")
    require(hash, HashFunction, "hash")
    require(psk, Secret, "psk")
    require(method, Method, "method")
    _require_length(length, hash, extra=0 if method is Method.CONCATENATE else hash.size)
    if not legs:
        raise ConfigError("at least one leg is required")
    if not label:
        raise ConfigError("the label must not be empty: it separates the uses of a key")
    info = b"".join(
        (
            vector32(method.value.encode("ascii")),
            vector32(hash.name.encode("ascii")),
            vector32(label),
            u32(length),
            u32(len(psk)),
            u32(len(legs)),
            *(vector32(leg.name.encode("utf-8")) + u32(len(leg.secret)) for leg in legs),
            vector32(context),
        )
    )
    if method is Method.CONCATENATE:
        return cat_kdf(
            [leg.secret for leg in legs],
            message_a=b"".join(vector32(leg.offer) for leg in legs),
            message_b=b"".join(vector32(leg.answer) for leg in legs),
            label=_SALT,
            info=info,
            length=length,
            hash=hash,
            psk=psk,
        )
    chain, key = psk, NO_SECRET
    for leg in legs:
        chain, key = cas_kdf(
            chain,
            leg.secret,
            message_a=leg.offer,
            message_b=leg.answer,
            label=_SALT,
            info=info,
            length=length,
            hash=hash,
        )
    return key
