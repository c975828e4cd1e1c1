"""The one-time pad of a session: its configuration, its budget, and the protocol for its keys."""

from dataclasses import asdict, dataclass
from typing import Final, Protocol, runtime_checkable

from hybridkex.crypto.one_time_pad import OVERHEAD, POINT, Pad
from hybridkex.errors import ConfigError
from hybridkex.fields import check_fields
from hybridkex.secret import Secret
from hybridkex.tls.session import Session

MAX_PAD_KEYS: Final = 1024
"""The maximum number of keys with unused bytes in one direction."""
_ALERTS: Final = 2 * (2 + OVERHEAD)
"""Bytes of pad that are reserved for alerts: user_canceled and close_notify, or a fatal alert."""


@runtime_checkable
class PadSource(Protocol):
    """Methods that a :class:`~hybridkex.tls.config.PskSource` adds if it supplies QKD keys for
    one-time pads (``docs/one-time-pad.md``). The shell calls it; the engine never does."""

    async def draw_for_pad(self, session: Session) -> tuple[bytes, Secret]:
        """Draw a new key for our sending direction of ``session``: its ``QkdIdentity``, and the
        key.

        Raises :class:`~hybridkex.errors.KeySourceError`.
        """

    async def look_up_for_pad(self, identity: bytes, session: Session) -> Secret:
        """The key that the peer of ``session`` requested and named by its ``QkdIdentity``,
        ``identity``; it is delivered once. The shell sets a time limit.

        Raises :class:`~hybridkex.errors.KeySourceError`.
        """

    async def stock_for_pads(self, session: Session) -> int | None:
        """Bytes of key that can be drawn for the peer of ``session``; ``None`` if it is not known.

        Raises :class:`~hybridkex.errors.KeySourceError`.
        """


@dataclass(frozen=True, kw_only=True)
class OneTimePad:
    """Application data under a one-time pad of QKD keys (experimental, ``docs/one-time-pad.md``).

    Args:
        hold: bytes of pad for our sending direction, 256 to 16,384, that are requested in advance
            once we have begun to send. Unused pad is discarded at the end of the session.
        deadline: seconds that data waits for a QKD key, at the sender and at the receiver. Then the
            session ends.

    Raises:
        ConfigError: a field has the wrong type or is out of range.
    """

    hold: int = 1024
    deadline: float = 30.0

    def __post_init__(self) -> None:
        check_fields(self)
        if not 256 <= self.hold <= 16 * MAX_PAD_KEYS:
            raise ConfigError(f"hold of OneTimePad must be 256 to {16 * MAX_PAD_KEYS:,} bytes")
        if not self.deadline > 0:
            raise ConfigError("deadline of OneTimePad must be more than 0 seconds")


@dataclass(frozen=True, kw_only=True)
class PadBudget:
    """The remaining one-time pads of a session, in bytes."""

    sending: int
    """Unused pad for our data; some more is reserved for alerts."""
    sent: int
    """Pad that we have used."""
    receiving: int
    """Unused pad for what the peer sends, its alerts included."""
    received: int
    """Pad that the peer has used."""
    record: int
    """The maximum number of data bytes in one record."""
    stock: int | None = None
    """Bytes of further key at our KME, for both directions, when it was last asked; ``None``:
    unknown."""

    def cost(self, size: int) -> int:
        """The bytes of pad that ``size`` bytes of data use when they are sent in one call."""
        return size + OVERHEAD * -(-size // self.record)

    @property
    def message(self) -> int:
        """Bytes of the longest message that could be sent now."""
        return content_within(self.sending, self.record + OVERHEAD)

    @property
    def message_with_stock(self) -> int | None:
        """Bytes of the longest message with the whole stock added; ``None`` if it is unknown."""
        if self.stock is None:
            return None
        return content_within(self.sending + self.stock, self.record + OVERHEAD)

    def as_json(self) -> dict[str, int | None]:
        """Plain values under stable names."""
        computed = {"message": self.message, "message_with_stock": self.message_with_stock}
        return asdict(self) | computed


def content_within(pad: int, record_limit: int) -> int:
    """Bytes of content that so many bytes of pad can protect, in records with at most
    ``record_limit`` bytes of inner plaintext."""
    full, rest = divmod(max(0, pad), record_limit)
    return full * (record_limit - OVERHEAD) + max(0, rest - OVERHEAD)


def piece_of(hold: int, record: int) -> int:
    """The maximum number of data bytes that a direction can send in one call with ``hold`` bytes of
    unused pad, in records of ``record`` bytes."""
    return content_within(hold - POINT - _ALERTS, record + OVERHEAD)


def available(pad: Pad) -> int:
    """Bytes of a pad that data may use: all but those reserved for alerts and for the first
    record."""
    return max(0, pad.left - pad.first - _ALERTS)
