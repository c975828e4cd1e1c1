"""A QKD key as the external PSK of a handshake (RFC 9846 section 4.3.11, imported by RFC 9258).

The *identity* says which key it is, so that the slave can look it up, and the *context* binds what
a key ID leaves open: who drew it, for whom, through which KMEs, and which of the two is the TLS
client. Both are inputs to the derivation of the PSK: another identity or context gives another key,
so that a message reflected to its sender, or a key ID moved to another pair of SAEs or KMEs, leads
to a binder that does not verify.

In the presentation language of RFC 9846 section 3::

    struct {
        opaque master_kme<1..255>;
        opaque slave_kme<1..255>;
        opaque key_id<1..255>;            /* UTF-8; a UUID in lower case with its hyphens */
    } KeyPart;

    struct {
        opaque label[7] = "hkx-qkd";
        uint8 version = 1;
        KeyPart parts<1..2^16-1>;          /* one, or those of a combined key in order */
    } QkdIdentity;                        /* external_identity */

    struct {
        opaque label[11] = "hkx-qkd ctx";
        uint8 version = 1;
        opaque master_sae<1..255>;        /* the TLS client: it drew the key */
        opaque slave_sae<1..255>;         /* the TLS server: it looks the key up */
        KmePair kmes<1..2^16-1>;          /* master_kme, slave_kme of each part, in order */
    } QkdContext;                         /* context */

A key for a key update (``docs/fresh-keys.md``) has the same identity and a context of its own:
there the side that starts the update requests the key::

    struct {
        opaque label[11] = "hkx-qkd upd";
        uint8 version = 1;
        uint8 initiator;                  /* of the update: 0 the TLS client, 1 the TLS server */
        uint64 epoch;                     /* that the update makes */
        opaque master_sae<1..255>;        /* the initiator */
        opaque slave_sae<1..255>;         /* the responder */
        KmePair kmes<1..2^16-1>;
    } QkdUpdateContext;
"""

from collections.abc import Callable
from typing import Final

from hybridkex.crypto.psk import ExternalPsk
from hybridkex.errors import ConfigError, DecodeError, KeySourceUnavailable
from hybridkex.qkd.source import KeyPart, KeyReference, QkdKey, canonical_key_id
from hybridkex.wire.codec import Reader, u8, u64, vector8, vector16

_IDENTITY: Final = b"hkx-qkd\x01"
_CONTEXT: Final = b"hkx-qkd ctx\x01"
_UPDATE_CONTEXT: Final = b"hkx-qkd upd\x01"

MAX_PARTS: Final = 8
"""The maximum number of parts of a key's name: each costs a look-up."""


def as_psk(key: QkdKey) -> ExternalPsk:
    """The PSK derived from a key; its identity names every part of the key.

    Raises:
        KeySourceUnavailable: the source returned a key that is too short or a name that is too
            long.
    """
    return _psk(
        key, lambda: context_of(key.name, master_sae=key.master_sae, slave_sae=key.slave_sae)
    )


def as_update_psk(key: QkdKey, *, by_client: bool, epoch: int) -> ExternalPsk:
    """The PSK that both sides make of a key for a key update.

    Args:
        key: the key; its master is the side that starts the update.
        by_client: whether that side is the TLS client.
        epoch: the epoch that the update makes.

    Raises:
        KeySourceUnavailable: as :func:`as_psk`.
    """
    return _psk(
        key,
        lambda: update_context_of(
            key.name,
            master_sae=key.master_sae,
            slave_sae=key.slave_sae,
            by_client=by_client,
            epoch=epoch,
        ),
    )


def _psk(key: QkdKey, context: Callable[[], bytes]) -> ExternalPsk:
    try:
        return ExternalPsk(identity=identity_of(key.name), key=key.key, context=context())
    except ConfigError as error:
        raise KeySourceUnavailable(f"the key source returned an unusable key: {error}") from None


def identity_of(name: KeyReference) -> bytes:
    """The external identity: ``QkdIdentity``, encoded."""
    if not 1 <= len(name) <= MAX_PARTS:
        raise ConfigError(f"a QKD key must have 1 to {MAX_PARTS} parts, not {len(name)}")
    parts = b"".join(
        _text(part.master_kme) + _text(part.slave_kme) + _text(part.key_id) for part in name
    )
    return _IDENTITY + vector16(parts)


def context_of(name: KeyReference, *, master_sae: str, slave_sae: str) -> bytes:
    """The context: ``QkdContext``, encoded."""
    return _CONTEXT + _ends_of(name, master_sae, slave_sae)


def update_context_of(
    name: KeyReference, *, master_sae: str, slave_sae: str, by_client: bool, epoch: int
) -> bytes:
    """The context of a key for a key update: ``QkdUpdateContext``, encoded."""
    head = _UPDATE_CONTEXT + u8(0 if by_client else 1) + u64(epoch)
    return head + _ends_of(name, master_sae, slave_sae)


def _ends_of(name: KeyReference, master_sae: str, slave_sae: str) -> bytes:
    kmes = b"".join(_text(part.master_kme) + _text(part.slave_kme) for part in name)
    return _text(master_sae) + _text(slave_sae) + vector16(kmes)


def name_of(identity: bytes) -> KeyReference | None:
    """The name of the key in an external identity; ``None`` if the identity is of another kind."""
    if not identity.startswith(_IDENTITY):
        return None
    parts: list[KeyPart] = []
    try:
        reader = Reader(identity, len(_IDENTITY))
        body = reader.vector(2, least=1)
        reader.finish()
        while body.remaining and len(parts) < MAX_PARTS:
            master, slave, key_id = (body.opaque(1, least=1).decode("utf-8") for _ in range(3))
            if canonical_key_id(key_id) != key_id:
                return None  # each key has exactly one spelling
            parts.append(KeyPart(master, slave, key_id))
        body.finish()
    except (DecodeError, ValueError):
        return None
    return tuple(parts)


def _text(text: str) -> bytes:
    data = text.encode("utf-8")
    if not 1 <= len(data) <= 255:
        raise ConfigError("an SAE ID, KME ID or key ID must have 1 to 255 bytes")
    return vector8(data)
