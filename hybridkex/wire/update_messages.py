"""The messages of Extended Key Update (draft-ietf-tls-extended-key-update-13 section 4), and those
with a slot for a QKD key (``docs/fresh-keys.md``).

All are one handshake type; the byte behind the header is the subtype.
"""

from enum import IntEnum
from typing import ClassVar, Final, Self, TypeVar

from hybridkex.constants import HandshakeType, UpdateType
from hybridkex.errors import IllegalParameter, UnexpectedMessage
from hybridkex.reasons import Reason
from hybridkex.values import value
from hybridkex.wire.codec import Reader, u8, vector16
from hybridkex.wire.extensions import KeyShareEntry
from hybridkex.wire.message import Message

__all__ = [
    "DeclineReason",
    "Demand",
    "ExtendedKeyUpdate",
    "FreshConfirm",
    "FreshDecline",
    "FreshRequest",
    "FreshResponse",
    "PadKey",
    "SlotAnswer",
    "UpdateFinish",
    "UpdateRequest",
    "UpdateResponse",
]


class Demand(IntEnum):
    """Whether the initiator goes on without the QKD key of its request."""

    OPTIONAL = 0
    REQUIRED = 1


class SlotAnswer(IntEnum):
    """What became of the QKD slot of the request."""

    EMPTY = 0
    USED = 1
    NOT_FOUND = 2


class DeclineReason(IntEnum):
    """Why there is no update."""

    KEY_NOT_FOUND = 0
    KEY_REQUIRED = 1


V = TypeVar("V", bound=IntEnum)


def _value(kind: type[V], reader: Reader) -> V:
    value = reader.u8()
    try:
        return kind(value)
    except ValueError:
        raise IllegalParameter(
            f"extended_key_update with {kind.__name__} {value}", Reason.UPDATE_MALFORMED
        ) from None


class ExtendedKeyUpdate(Message):
    """What all of them have. :meth:`read` returns the class of the subtype."""

    type = HandshakeType.EXTENDED_KEY_UPDATE
    subtype: ClassVar[UpdateType]

    @classmethod
    def read(cls, reader: Reader) -> "ExtendedKeyUpdate":
        subtype = reader.u8()
        found = _SUBTYPES.get(subtype)
        if found is None:
            raise UnexpectedMessage(
                f"extended_key_update of unknown subtype {subtype}", Reason.UPDATE_SUBTYPE
            )
        return found.read_fields(reader)

    @classmethod
    def read_fields(cls, reader: Reader) -> Self:
        """Parse what follows the subtype."""
        raise NotImplementedError

    def fields(self) -> bytes:
        """What follows the subtype."""
        raise NotImplementedError

    def body(self) -> bytes:
        return u8(self.subtype) + self.fields()


@value
class _ShareAlone(ExtendedKeyUpdate):
    key_share: KeyShareEntry

    @classmethod
    def read_fields(cls, reader: Reader) -> Self:
        return cls(KeyShareEntry.read(reader))

    def fields(self) -> bytes:
        return self.key_share.encode()


@value
class UpdateRequest(_ShareAlone):
    """The draft's request."""

    subtype = UpdateType.REQUEST


@value
class UpdateResponse(_ShareAlone):
    """The draft's response."""

    subtype = UpdateType.RESPONSE


@value
class UpdateFinish(ExtendedKeyUpdate):
    """The initiator's last message under its old key."""

    subtype = UpdateType.FINISH

    @classmethod
    def read_fields(cls, reader: Reader) -> Self:
        return cls()

    def fields(self) -> bytes:
        return b""


@value
class FreshRequest(ExtendedKeyUpdate):
    """A request with a slot for a QKD key."""

    subtype = UpdateType.FRESH_REQUEST
    key_share: KeyShareEntry
    demand: Demand
    identity: bytes
    """The key's ``ImportedIdentity``; empty where the slot is."""

    @classmethod
    def read_fields(cls, reader: Reader) -> Self:
        return cls(KeyShareEntry.read(reader), _value(Demand, reader), reader.opaque(2))

    def fields(self) -> bytes:
        return self.key_share.encode() + u8(self.demand) + vector16(self.identity)


@value
class FreshResponse(ExtendedKeyUpdate):
    """A response that says what became of the slot."""

    subtype = UpdateType.FRESH_RESPONSE
    key_share: KeyShareEntry
    answer: SlotAnswer

    @classmethod
    def read_fields(cls, reader: Reader) -> Self:
        return cls(KeyShareEntry.read(reader), _value(SlotAnswer, reader))

    def fields(self) -> bytes:
        return self.key_share.encode() + u8(self.answer)


@value
class FreshDecline(ExtendedKeyUpdate):
    """The responder makes no update; both ends stay in their epoch."""

    subtype = UpdateType.FRESH_DECLINE
    reason: DeclineReason

    @classmethod
    def read_fields(cls, reader: Reader) -> Self:
        return cls(_value(DeclineReason, reader))

    def fields(self) -> bytes:
        return u8(self.reason)


@value
class FreshConfirm(ExtendedKeyUpdate):
    """The first message under a new key; its length is checked together with its value."""

    subtype = UpdateType.FRESH_CONFIRM
    verify_data: bytes

    @classmethod
    def read_fields(cls, reader: Reader) -> Self:
        return cls(reader.rest())

    def fields(self) -> bytes:
        return self.verify_data


@value
class PadKey(ExtendedKeyUpdate):
    """A QKD key that the sender appends to the one-time pad of its direction
    (``docs/one-time-pad.md``)."""

    subtype = UpdateType.PAD_KEY
    identity: bytes
    """Its ``QkdIdentity``."""

    @classmethod
    def read_fields(cls, reader: Reader) -> Self:
        return cls(reader.opaque(2, least=1))

    def fields(self) -> bytes:
        return vector16(self.identity)


_SUBTYPES: Final[dict[int, type[ExtendedKeyUpdate]]] = {
    cls.subtype: cls
    for cls in (
        UpdateRequest,
        UpdateResponse,
        UpdateFinish,
        FreshRequest,
        FreshResponse,
        FreshDecline,
        FreshConfirm,
        PadKey,
    )
}
