"""The epochs of a session: the result of each key update and its inputs."""

from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Final

from hybridkex.crypto.psk import ExternalPsk
from hybridkex.errors import ConfigError
from hybridkex.values import value

KEPT_EPOCHS: Final = 64
"""The number of epochs that a session records; a session of weeks has many more."""


class KeyUpdates(Enum):
    """The ways in which the keys of a session can change."""

    STANDARD = "standard"
    """KeyUpdate of RFC 9846 section 4.7.3: each key is derived from the one before it."""
    EXTENDED = "extended"
    """Extended Key Update: a new key exchange each time."""
    FRESH = "fresh"
    """Extended Key Update with a slot for a QKD key and a confirmation by both ends."""


@dataclass(frozen=True, kw_only=True)
class UpdateKey:
    """A QKD key for one key update.

    Args:
        psk: the key, with the context that binds it to the update.
        key_ids: the key IDs that the session reports.
        sources: the two KMEs of each key ID.

    Raises:
        ConfigError: ``psk`` has no context.
    """

    psk: ExternalPsk
    key_ids: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.psk.context is None:
            raise ConfigError(
                "the QKD key of a key update must be imported (RFC 9258): give its PSK a context"
            )


@value(kw_only=True)
class Epoch:
    """One epoch of a session after epoch 0: the result of a key update."""

    number: int
    """1 for the first update."""
    began_at: float
    """The time by the configuration's clock, in seconds since the epoch of that clock."""
    why: str
    """The trigger: ``asked``, ``every``, ``after_bytes``, ``key limit``, or ``peer``."""
    group: str
    """The key exchange."""
    confirmed: bool
    """Whether the peer has confirmed that it has the same keys."""
    qkd_key_ids: tuple[str, ...] = ()
    """The IDs of the QKD keys in it."""
    qkd_sources: tuple[str, ...] = ()
    """The two KMEs of each key; the first is that of the side that requested the key."""
    qkd_missing: str | None = field(default=None)
    """Why it has no QKD key although our policy asks for one."""

    def as_json(self) -> dict[str, object]:
        """A dictionary of JSON values with stable keys."""
        lists = {"qkd_key_ids": list(self.qkd_key_ids), "qkd_sources": list(self.qkd_sources)}
        return asdict(self) | lists
