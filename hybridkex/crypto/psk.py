"""External pre-shared keys, plain (RFC 9846 section 4.3.11) and imported (RFC 9258).

A QKD key is an external PSK. Importing it binds it to its identity, to a context and to one
protocol and hash, so the same key never serves two purposes (RFC 9257 section 6).
"""

from dataclasses import dataclass, field
from typing import Final

from hybridkex.constants import Label
from hybridkex.crypto.schedule import hkdf_expand_label, hkdf_extract
from hybridkex.crypto.suites import SHA256, HashFunction
from hybridkex.errors import ConfigError
from hybridkex.fields import check_fields
from hybridkex.secret import Secret

MIN_PSK_LENGTH: Final = 16
"""Bytes: 128 bits of entropy at least (RFC 9257 section 6, item 1)."""


@dataclass(frozen=True, kw_only=True)
class ExternalPsk:
    """A key that both sides already share.

    Args:
        identity: its identity on the wire, 1 to 65,535 bytes, sent unencrypted.
        key: 16 bytes or more, from a source of full entropy; never a password.
        hash: its hash; a plain PSK works only with cipher suites of that hash.
        context: ``None`` for a plain PSK; bytes (which may be empty) to import it by RFC 9258.
        origin: any object; the session has it as ``psk_origin``.

    Raises:
        ConfigError: a field has the wrong type or length.
    """

    identity: bytes
    key: Secret
    hash: HashFunction = field(default=SHA256)
    context: bytes | None = None
    origin: object = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_fields(self, {"identity": 'identity=b"site"', "key": "key=Secret(key)"})
        if not 1 <= len(self.identity) <= 0xFFFF:
            raise ConfigError(
                f"a PSK identity must have 1 to 65,535 bytes, not {len(self.identity)}"
            )
        if len(self.key) < MIN_PSK_LENGTH:
            raise ConfigError(
                f"a PSK must have at least {MIN_PSK_LENGTH} bytes, not {len(self.key)} (passwords "
                "and short keys can be guessed from one recorded handshake)"
            )
        # Length of ImportedIdentity: two vectors with 2-byte lengths and two 16-bit fields.
        if self.context is not None and len(self.identity) + len(self.context) + 8 > 0xFFFF:
            raise ConfigError(
                "the identity and the context of an imported PSK are together too long"
            )

    @property
    def imported(self) -> bool:
        """Whether RFC 9258 applies."""
        return self.context is not None


def import_key(psk: ExternalPsk, imported_identity: bytes, target: HashFunction) -> Secret:
    """``ipskx`` of RFC 9258 section 5.1, ``target.size`` bytes.

    Args:
        psk: the external PSK; its own hash drives the derivation.
        imported_identity: the encoded ``ImportedIdentity``.
        target: the hash named by ``target_kdf``.
    """
    epskx = hkdf_extract(psk.hash, bytes(psk.hash.size), psk.key)
    digest = psk.hash.digest(imported_identity)
    return Secret(hkdf_expand_label(psk.hash, epskx, Label.DERIVED_PSK, digest, target.size))
