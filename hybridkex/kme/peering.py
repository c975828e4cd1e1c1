"""The messages by which two KMEs agree on who gets which key.

The messages have the shape of ETSI GS QKD 020 (``POST /kmapi/v1/ext_keys``): the KME of the master
tells the KME of the slaves which keys it is about to deliver, and to whom. Where both have the
keys from a QKD link, the message carries **no key**, only the IDs of the blocks of which it is
made. A relayed key is sent as ``value``.

Two smaller messages keep the two stores consistent: ``void`` says that keys will not be used, and
``check``, our own addition, asks which of the given blocks the other KME lacks.

The response 202 is sent after the durable write, so it is also the acknowledgement, and no callback
is needed. A refusal is 409 in the form of RFC 9457, with the reason for each block.
"""

import base64
import binascii
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol, Self

import trio

from hybridkex.errors import KeySourceUnavailable
from hybridkex.json_text import load_json
from hybridkex.qkd.etsi014.models import Json, ModelError, message_of, parse_uuid
from hybridkex.qkd.etsi014.transport import HTTP_FAILURES, Answer, KmeTransport, what_failed
from hybridkex.qkd.store import Allotment, BlocksRefused, BlockState
from hybridkex.secret import Secret
from hybridkex.text import printable

EXT_KEYS: Final = "/kmapi/v1/ext_keys"
VOID: Final = "/kmapi/v1/ext_keys/void"
CHECK: Final = "/kmapi/v1/ext_keys/check"

MAX_MESSAGE_BYTES: Final = 1 << 22
"""The longest message that every KME accepts from another one, whatever limits it announces."""

IDS_AT_ONCE: Final = 1000
"""Most IDs in one void or check message: another KME must not occupy the store for long."""

BLOCKS_AT_ONCE: Final = 1 << 13
"""The maximum number of blocks in one ext_keys message, for the same reason."""

MAX_ANSWER_BYTES: Final = 1 << 20
"""The longest answer of another KME: a refusal names every block of a message, with its state,
in less than 100 bytes."""

SAE_IDS_BYTES: Final = 1 << 16
"""Bytes of a message that its SAE IDs may take."""


def message_bytes(keys: int, blocks: int, size: int) -> int:
    """The maximum length of an ``ext_keys`` message: keys of ``blocks`` blocks and ``size`` bits,
    sent by value."""
    return SAE_IDS_BYTES + keys * (160 + 40 * blocks + math.ceil(size / 6))


@dataclass(frozen=True, kw_only=True)
class ExtKeys:
    """The keys that a master is about to receive, announced to the KME of its slaves."""

    allotments: tuple[Allotment, ...]
    master: str
    slaves: tuple[str, ...]

    def to_json(self) -> Json:
        return {
            "keys": [_allotment_json(one) for one in self.allotments],
            "initiator_sae_id": self.master,
            "target_sae_ids": list(self.slaves),
        }

    @classmethod
    def from_json(cls, data: object) -> Self:
        """Raises :class:`~hybridkex.qkd.etsi014.models.ModelError`."""
        if not isinstance(data, dict):
            raise ModelError("ext_keys is not an object")
        keys, master = data.get("keys"), data.get("initiator_sae_id")
        slaves = data.get("target_sae_ids")
        if not (isinstance(keys, list) and keys and isinstance(master, str)):
            raise ModelError("keys or initiator_sae_id is missing")
        if not (isinstance(slaves, list) and all(isinstance(slave, str) for slave in slaves)):
            raise ModelError("target_sae_ids is not a list of SAE IDs")
        if len(set(slaves)) != len(slaves):
            raise ModelError("target_sae_ids has an SAE ID twice")
        allotments = tuple(_allotment(item) for item in keys)
        if sum(len(one.blocks) for one in allotments) > BLOCKS_AT_ONCE:
            raise ModelError(f"the keys have more than {BLOCKS_AT_ONCE} blocks")
        return cls(allotments=allotments, master=master, slaves=tuple(slaves))


def _allotment_json(allotment: Allotment) -> Json:
    item: Json = {
        "key_id": str(allotment.key_id),
        "extension": {
            "blocks": [str(block) for block in allotment.blocks],
            "size": allotment.size * 8,
        },
    }
    if allotment.value is not None:
        item["value"] = base64.b64encode(allotment.value.reveal()).decode("ascii")
    return item


def _allotment(item: Any) -> Allotment:
    extension = item.get("extension") if isinstance(item, dict) else None
    if not isinstance(extension, dict):
        raise ModelError("a key has no extension object")
    size, blocks = extension.get("size"), extension.get("blocks")
    if type(size) is not int or size <= 0 or size % 8:
        raise ModelError("size is not a positive multiple of 8")
    if not isinstance(blocks, list) or not blocks:
        raise ModelError("blocks is not a list of IDs")
    ids = tuple(parse_uuid(block, "a block") for block in blocks)
    if parse_uuid(item.get("key_id"), "key_id") != ids[0]:
        raise ModelError("key_id is not that of the first block")
    value: Secret | None = None
    if item.get("value") is not None:
        try:
            value = Secret(base64.b64decode(str(item["value"]), validate=True))
        except (ValueError, binascii.Error):
            raise ModelError("value is not base64") from None
        if len(value) * 8 != size:
            raise ModelError("value is not of the size given")
    return Allotment(blocks=ids, size=size // 8, value=value)


def ids_from_json(data: object) -> list[str]:
    """The IDs of a void or check message. Raises ``ModelError``."""
    if not isinstance(data, dict) or not isinstance(data.get("key_ids"), list):
        raise ModelError("key_ids is missing")
    if len(data["key_ids"]) > IDS_AT_ONCE:
        raise ModelError(f"key_ids has more than {IDS_AT_ONCE} items")
    return [parse_uuid(item) for item in data["key_ids"]]


class PeerLink(Protocol):
    """The interface of the peer KME."""

    async def ext_keys(self, message: ExtKeys) -> None:
        """Ask for keys to be promised to the slaves.

        Raises ``BlocksRefused``, or ``KeySourceUnavailable`` if the outcome is unknown.
        """

    async def void(self, key_ids: Sequence[str]) -> None:
        """Announce that these keys will not be used. Raises ``KeySourceUnavailable``."""

    async def check(self, key_ids: Sequence[str]) -> list[str]:
        """Return those of these blocks that the peer KME lacks. Raises ``KeySourceUnavailable``."""


class HttpPeer:
    """The other KME of a link, over mutual TLS."""

    def __init__(self, transport: KmeTransport, seconds: float) -> None:
        self._http = transport
        self._seconds = seconds

    async def aclose(self) -> None:
        await self._http.aclose()

    async def ext_keys(self, message: ExtKeys) -> None:
        answer = await self._post(EXT_KEYS, message.to_json())
        if answer.status == 202:
            return
        if answer.status == 409:
            raise BlocksRefused(_refusals(answer))
        raise KeySourceUnavailable(_said(answer))

    async def void(self, key_ids: Sequence[str]) -> None:
        answer = await self._post(VOID, {"key_ids": [str(key_id) for key_id in key_ids]})
        if answer.status != 202:
            raise KeySourceUnavailable(_said(answer))

    async def check(self, key_ids: Sequence[str]) -> list[str]:
        answer = await self._post(CHECK, {"key_ids": [str(key_id) for key_id in key_ids]})
        try:
            if answer.status == 200:
                return ids_from_json(load_json(answer.body))
        except ValueError:
            pass
        raise KeySourceUnavailable(_said(answer))

    async def _post(self, path: str, body: Json) -> Answer:
        try:
            with trio.fail_after(self._seconds):
                return await self._http.exchange("POST", path, content=body)
        except trio.TooSlowError:
            raise KeySourceUnavailable(f"it did not answer within {self._seconds:g} s") from None
        except HTTP_FAILURES as error:
            raise KeySourceUnavailable(f"it {what_failed(error)}") from None


def _said(answer: Answer) -> str:
    """A KME's response as text for a log line, bounded and printable."""
    if answer.status == 401:
        return "it answered 401: no peer has our ID there, or not our saes; compare both files"
    try:
        message = message_of(load_json(answer.body))
    except ValueError:
        message = ""
    if not message:
        return f"it answered {answer.status}"
    return f"it answered {answer.status}: {printable(message, most=200)}"


def _refusals(answer: Answer) -> dict[str, BlockState]:
    try:
        found = load_json(answer.body).get("refused")
        return {parse_uuid(name): BlockState(reason) for name, reason in found.items()}
    except (ValueError, AttributeError):
        raise KeySourceUnavailable("it refused keys and did not say which") from None
