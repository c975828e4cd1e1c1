"""Combining secrets (ETSI TS 103 744, NIST SP 800-56C Rev. 2, NIST SP 800-227 section 4.6).

:func:`cat_kdf` and :func:`cas_kdf` are the two key derivations of ETSI TS 103 744 V1.2.1, sections
8.2 and 8.3, with HKDF (section 7.4.2) and, for the cascade, HMAC as the PRF (section 7.3.2). The
text of the standard was not at hand; the formulas are those of ETSI's own reference implementation
(etsi-forge/cyber.103744_QHKEX), whose section numbers these are, and the tests compare with it.

With HKDF, CatKDF is the two-step key derivation of SP 800-56C section 5 over the hybrid secret
``Z || T`` of its section 2: the label is the salt, the hashed context is FixedInfo. All public
shares are in the context, as SP 800-227 section 4.6 asks for where the combination shall be as
strong against chosen ciphertexts as the strongest of its parts.
"""

import hmac
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from hybridkex.crypto.suites import SHA256, HashFunction
from hybridkex.errors import ConfigError
from hybridkex.secret import Secret

__all__ = ["Leg", "Method", "cas_kdf", "cat_kdf", "combine"]

NO_SECRET = Secret(b"")


def _vector(value: bytes) -> bytes:
    """A value behind its length in 32 bits (section 7.2.2)."""
    return len(value).to_bytes(4, "big") + value


def _hashed(function: HashFunction, *values: bytes) -> bytes:
    """The concatenate-and-hash formatting function ``f`` (section 7.2.3)."""
    return function.digest(b"".join(map(_vector, values)))


def _hkdf(
    function: HashFunction, secret: bytes, label: bytes, context: bytes, length: int
) -> bytes:
    """``KDF(secret, label, context, length)`` by HKDF (section 7.4.2): the label is the salt."""
    if not 1 <= length <= 255 * function.size:
        raise ConfigError(f"a key of {length} bytes; 1 to {255 * function.size} can be derived")
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

    The secrets and the PSK must have lengths that are fixed by their kinds: nothing else keeps
    them apart in the concatenation. :func:`combine` sees to that by itself.

    Args:
        secrets: of the key exchanges, in their agreed order.
        message_a: all that the initiator sent; ``message_b``: all that the responder did.
        length: bytes of the key.
    """
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

    Args:
        previous: the chain secret of the round before; in the first round the PSK, or nothing.
        secret: of this round's key exchange; the messages are those of this round.

    Returns:
        The chain secret for the next round (as long as the hash), and ``length`` bytes of key.
    """
    digest = _hashed(hash, secret.reveal(), message_a, message_b)
    round_secret = hmac.digest(previous.reveal(), digest, hash.name)
    output = _hkdf(hash, round_secret, label, info, hash.size + length)
    return Secret(output[: hash.size]), Secret(output[hash.size :])


class Method(Enum):
    """How :func:`combine` mixes."""

    CONCATENATE = "CatKDF"
    """All secrets at once."""
    CASCADE = "CasKDF"
    """One after the other: for secrets that come one after the other."""


@dataclass(frozen=True, kw_only=True)
class Leg:
    """One secret, and all that went over the wire to make it."""

    name: str
    """What it is, for example ``ML-KEM-768``; both sides must say the same."""
    secret: Secret
    offer: bytes
    """What the initiator sent for it: a public key. For a QKD key, its ID."""
    answer: bytes = b""
    """What the responder sent for it: a public key or a ciphertext."""


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
    """One key out of several secrets: unknown to whoever does not know every one of them.

    Names, lengths and shares of all legs go into the derivation beside the secrets, so that both
    sides have the same key only if they mean the same by it, and no byte of one part can be taken
    for a byte of another.

    Args:
        legs: in an order that both sides share.
        label: what the key is for; other uses have other labels.
        context: who the two sides are, in which roles, and whatever else both must agree on.
        length: bytes of the key.
        psk: a key that both had before, if any.
        method: CatKDF or CasKDF.

    Raises:
        ConfigError: no leg, a leg without a secret, no label, or a length that cannot be had.
    """
    if not legs or any(not len(leg.secret) for leg in legs):
        raise ConfigError("there is nothing to combine, or one of the secrets is empty")
    if not label:
        raise ConfigError("a label is needed: it keeps the key's uses apart")
    form = b"".join(
        _vector(leg.name.encode("utf-8")) + len(leg.secret).to_bytes(4, "big") for leg in legs
    )
    info = b"".join(
        map(_vector, (method.value.encode("ascii"), len(psk).to_bytes(4, "big"), form, context))
    )
    if method is Method.CONCATENATE:
        return cat_kdf(
            [leg.secret for leg in legs],
            message_a=b"".join(_vector(leg.offer) for leg in legs),
            message_b=b"".join(_vector(leg.answer) for leg in legs),
            label=label,
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
            label=label,
            info=info,
            length=length,
            hash=hash,
        )
    return key
