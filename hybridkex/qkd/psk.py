"""A QKD key as the external PSK of a handshake (RFC 8446 section 4.2.11, imported by RFC 9258).

The *identity* says which key it is, so that the slave can look it up, and the *context* binds what
a key ID leaves open: who drew it, for whom, through which KMEs, and which of the two is the TLS
client. Both are inputs of the derivation of the PSK: a key under another identity or context is
another key, so that a message reflected to its sender, or a key ID moved to another pair of SAEs
or KMEs, ends in a binder that does not verify.

In the presentation language of RFC 8446 section 3::

    struct {
        opaque master_kme<1..255>;
        opaque slave_kme<1..255>;
        opaque key_id[16];
    } KeyRef;

    struct {
        opaque label[7] = "hkx-qkd";
        uint8 version = 1;
        KeyRef parts<1..2^16-1>;          /* one, or those of a combined key in order */
    } QkdIdentity;                        /* external_identity */

    struct {
        opaque label[11] = "hkx-qkd ctx";
        uint8 version = 1;
        opaque master_sae<1..255>;        /* the TLS client: it drew the key */
        opaque slave_sae<1..255>;         /* the TLS server: it looks the key up */
        KmePair kmes<1..2^16-1>;          /* master_kme, slave_kme of each part, in order */
    } QkdContext;                         /* context */
"""

from typing import Final
from uuid import UUID

from hybridkex.crypto.psk import ExternalPsk
from hybridkex.errors import ConfigError, KeySourceUnavailable
from hybridkex.qkd.source import KeyName, KeyRef, QkdKey

__all__ = ["MAX_PARTS", "as_psk", "context_of", "identity_of", "name_of"]

_IDENTITY: Final = b"hkx-qkd\x01"
_CONTEXT: Final = b"hkx-qkd ctx\x01"

MAX_PARTS: Final = 8
"""Parts of one key's name that are read: each costs a look-up."""


def as_psk(key: QkdKey) -> ExternalPsk:
    """The PSK that both sides make of a key; the identity names its every part.

    Raises:
        KeySourceUnavailable: the source gave a key that is too short or a name that is too long.
    """
    try:
        return ExternalPsk(
            identity=identity_of(key.name),
            key=key.key,
            context=context_of(key.name, master_sae=key.master_sae, slave_sae=key.slave_sae),
        )
    except ConfigError as error:
        raise KeySourceUnavailable(f"the key source gave no usable key: {error}") from None


def identity_of(name: KeyName) -> bytes:
    """The external identity: ``QkdIdentity``, encoded."""
    if not 1 <= len(name) <= MAX_PARTS:
        raise ConfigError(f"a QKD key has 1 to {MAX_PARTS} parts, not {len(name)}")
    parts = b"".join(
        _text(part.master_kme) + _text(part.slave_kme) + part.key_id.bytes for part in name
    )
    return _IDENTITY + _vector(2, parts)


def context_of(name: KeyName, *, master_sae: str, slave_sae: str) -> bytes:
    """The context: ``QkdContext``, encoded."""
    kmes = b"".join(_text(part.master_kme) + _text(part.slave_kme) for part in name)
    return _CONTEXT + _text(master_sae) + _text(slave_sae) + _vector(2, kmes)


def name_of(identity: bytes) -> KeyName | None:
    """The name of the key behind an external identity; ``None`` if it is another kind of one."""
    if not identity.startswith(_IDENTITY):
        return None
    body = identity[len(_IDENTITY) :]
    if len(body) < 2 or int.from_bytes(body[:2], "big") != len(body) - 2:
        return None
    parts: list[KeyRef] = []
    rest = body[2:]
    while rest:
        if len(parts) == MAX_PARTS:
            return None
        texts = []
        for _ in range(2):
            length = rest[0] if rest else 0
            text, rest = rest[1 : 1 + length], rest[1 + length :]
            if not length or len(text) != length:
                return None
            try:
                texts.append(text.decode("utf-8"))
            except UnicodeDecodeError:
                return None
        if len(rest) < 16:
            return None
        parts.append(KeyRef(texts[0], texts[1], UUID(bytes=rest[:16])))
        rest = rest[16:]
    return tuple(parts) or None


def _vector(width: int, content: bytes) -> bytes:
    return len(content).to_bytes(width, "big") + content


def _text(text: str) -> bytes:
    data = text.encode("utf-8")
    if not 1 <= len(data) <= 255:
        raise ConfigError("an SAE ID or KME ID has 1 to 255 bytes")
    return _vector(1, data)
