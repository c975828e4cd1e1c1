"""The interface of key sources, and the QKD keys that they return.

The terms are those of ETSI GS QKD 014: an *SAE* is the application that uses keys, a *KME* delivers
them. Of the two SAEs, the *master* draws a new key from its KME and tells the *slave* the key's ID,
with which the slave gets the same key from its own KME. The standard leaves open how the ID is
sent; in this library the TLS handshake carries it.

A :class:`KeySource` belongs to one pair of SAEs: ourselves and one peer. So it knows everything
that a handshake must bind (both SAEs, both KMEs, the roles), and no call has to name the peer.
"""

import re
from dataclasses import dataclass
from typing import Final, Protocol, TypeAlias, runtime_checkable

from hybridkex.errors import KeyUnknown
from hybridkex.fields import check_result, checked
from hybridkex.secret import Secret
from hybridkex.text import printable

__all__ = ["KeyPart", "KeyReference", "KeySource", "QkdKey", "SourceStatus", "canonical_key_id"]


MAX_KEY_ID_BYTES: Final = 255
UUID_TEXT: Final = re.compile("[0-9A-Fa-f]{8}(-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}")
"""RFC 9562 section 4. (Python's ``UUID()`` takes other texts, too.)"""


@checked
def canonical_key_id(text: str) -> str:
    """The canonical form of a key ID: for a UUID, the lower-case form of RFC 9562 section 4.

    ETSI GS QKD 014 requires UUIDs. Some KMEs use other texts, which are left unchanged.

    Raises:
        ValueError: the text is empty, not printable, or longer than 255 bytes.
    """
    if printable(text) != text or not 1 <= len(text.encode()) <= MAX_KEY_ID_BYTES:
        raise ValueError("a key ID must have 1 to 255 bytes of printable text")
    return text.lower() if UUID_TEXT.fullmatch(text) else text


@dataclass(frozen=True, slots=True)
class KeyPart:
    """The name of one key of one link: its ID and the two KMEs that hold it."""

    master_kme: str
    """The KME of the SAE that drew the key."""
    slave_kme: str
    """The KME of the other SAE."""
    key_id: str
    """The ID in the form of :func:`canonical_key_id`."""


KeyReference: TypeAlias = tuple[KeyPart, ...]
"""The name of a key, the same on both sides: one part, or several for a key combined from several
links, in the order of combination."""


@dataclass(frozen=True, kw_only=True, slots=True)
class QkdKey:
    """A key that two SAEs share and that is not delivered again."""

    name: KeyReference
    """One part for each link; several for a combined key."""
    master_sae: str
    """The SAE that drew the key."""
    slave_sae: str
    """The SAE that looks the key up."""
    key: Secret
    """Its length in bits is a multiple of 8."""

    @property
    def key_ids(self) -> tuple[str, ...]:
        """The IDs of the parts, in order."""
        return tuple(part.key_id for part in self.name)

    @property
    def kmes(self) -> tuple[tuple[str, str], ...]:
        """The (master, slave) KMEs of the parts, in order."""
        return tuple((part.master_kme, part.slave_kme) for part in self.name)


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceStatus:
    """The stock of a source."""

    stored: int
    """The number of keys that :meth:`KeySource.get_key` could return now."""
    capacity: int
    """Maximum of :attr:`stored`."""
    key_bits: int
    """Length of a key, in bits."""


@runtime_checkable
class KeySource(Protocol):
    """The QKD keys that we share with one peer.

    Every method but :meth:`knows` may raise :class:`~hybridkex.errors.KeySourceUnavailable` and
    :class:`~hybridkex.errors.KeyUnauthorized`, and ends within a time limit of the source.
    """

    @property
    def local_sae(self) -> str:
        """Our own SAE ID."""

    @property
    def peer_sae(self) -> str:
        """The SAE ID of the peer."""

    async def get_key(self) -> QkdKey:
        """Draw a new key, with us as its master.

        Raises :class:`~hybridkex.errors.KeySourceExhausted` when none is left now.
        """

    async def get_key_with_id(self, name: KeyReference) -> QkdKey:
        """Get the key of this name, which the peer drew; we are its slave.

        Raises :class:`~hybridkex.errors.KeyUnknown`, :class:`~hybridkex.errors.KeyConsumed`,
        :class:`~hybridkex.errors.KeyExpired`, or
        :class:`~hybridkex.errors.KeyNotYetAvailable`, the only one after which the same name may
        be asked for again.
        """

    def knows(self, name: KeyReference) -> bool:
        """Whether the KMEs in the name are those of this source. No I/O."""

    async def status(self) -> SourceStatus:
        """The current stock."""


async def draw_key(source: KeySource) -> QkdKey:
    """A new key. The source may be an application's, so its result is checked.

    Raises ``TypeError`` if it is no key.
    """
    return check_result(await source.get_key(), QkdKey, source, "get_key")


async def look_up_key(source: KeySource, name: KeyReference) -> QkdKey:
    """The key of this name. Raises ``TypeError`` if the result of the source is another one."""
    method = "get_key_with_id"
    key = check_result(await source.get_key_with_id(name), QkdKey, source, method)
    if key.name != name:
        raise TypeError(f"{method} of {type(source).__name__} returned a key of another name")
    return key


def is_known(source: KeySource, name: KeyReference) -> bool:
    """Whether the name is for this source. Raises ``TypeError`` if its answer is no ``bool``, such
    as a coroutine, which is always true."""
    return check_result(source.knows(name), bool, source, "knows")


def single(name: KeyReference, *, master_kme: str | None, slave_kme: str | None) -> str:
    """The key ID of a single-part name with the given KMEs (``None``: any).

    Raises :class:`~hybridkex.errors.KeyUnknown`.
    """
    if len(name) != 1:
        raise KeyUnknown(f"the name has {len(name)} parts, but this source has single-part keys")
    part = name[0]
    if part.master_kme != (master_kme or part.master_kme) or part.slave_kme != (
        slave_kme or part.slave_kme
    ):
        raise KeyUnknown(
            f"the key is from the KMEs {part.master_kme} and {part.slave_kme}, not {master_kme} "
            f"and {slave_kme}"
        )
    return part.key_id
