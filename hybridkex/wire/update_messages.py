"""The messages of Extended Key Update (draft-ietf-tls-extended-key-update-13 section 4), and those
with a slot for a QKD key (``docs/fresh-keys.md``).

All are one handshake type; the byte behind the header is the subtype.
"""

from enum import IntEnum
from typing import ClassVar, Final

from hybridkex.constants import HandshakeType, UpdateType
from hybridkex.errors import IllegalParameter, UnexpectedMessage
from hybridkex.reasons import Reason
from hybridkex.values import value
from hybridkex.wire.codec import Reader, u8
from hybridkex.wire.extensions import KEY_SHARE, KeyShareEntry
from hybridkex.wire.layout import REST, Layout, Message, opaque


class Demand(IntEnum):
    """Whether the initiator continues without the QKD key of its request."""

    OPTIONAL = 0
    REQUIRED = 1


class SlotAnswer(IntEnum):
    """The outcome of the QKD slot of the request."""

    EMPTY = 0
    USED = 1
    NOT_FOUND = 2


class DeclineReason(IntEnum):
    """Why the responder declines an update."""

    KEY_NOT_FOUND = 0
    KEY_REQUIRED = 1


def _one_of(kind: type[IntEnum]) -> Layout:
    def read(reader: Reader) -> IntEnum:
        code = reader.u8()
        try:
            return kind(code)
        except ValueError:
            raise IllegalParameter(
                f"extended_key_update with {kind.__name__} {code}", Reason.UPDATE_MALFORMED
            ) from None

    return Layout(read, u8)


class ExtendedKeyUpdate(Message):
    """The base class of the messages. :meth:`read` returns an object of the subtype's class."""

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
        return super(ExtendedKeyUpdate, found).read(reader)

    def body(self) -> bytes:
        return u8(self.subtype) + super().body()


@value
class _ShareAlone(ExtendedKeyUpdate):
    layout = (KEY_SHARE,)
    key_share: KeyShareEntry


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


@value
class FreshRequest(ExtendedKeyUpdate):
    """A request with a slot for a QKD key."""

    subtype = UpdateType.FRESH_REQUEST
    layout = (KEY_SHARE, _one_of(Demand), opaque(2))
    key_share: KeyShareEntry
    demand: Demand
    identity: bytes
    """The key's ``ImportedIdentity``; empty if the slot is empty."""


@value
class FreshResponse(ExtendedKeyUpdate):
    """A response with the outcome of the QKD slot."""

    subtype = UpdateType.FRESH_RESPONSE
    layout = (KEY_SHARE, _one_of(SlotAnswer))
    key_share: KeyShareEntry
    answer: SlotAnswer


@value
class FreshDecline(ExtendedKeyUpdate):
    """The responder declines the update; both ends stay in their epoch."""

    subtype = UpdateType.FRESH_DECLINE
    layout = (_one_of(DeclineReason),)
    reason: DeclineReason


@value
class FreshConfirm(ExtendedKeyUpdate):
    """The first message under a new key; its length is checked together with its value."""

    subtype = UpdateType.FRESH_CONFIRM
    layout = (REST,)
    verify_data: bytes


@value
class PadKey(ExtendedKeyUpdate):
    """A QKD key that the sender appends to the one-time pad of its direction
    (``docs/one-time-pad.md``)."""

    subtype = UpdateType.PAD_KEY
    layout = (opaque(2, least=1),)
    identity: bytes
    """Its ``QkdIdentity``."""


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
