"""The data models of ETSI GS QKD 014 V1.1.1 clause 6, and nothing else.

``from_json`` takes the result of :func:`json.loads` and raises :class:`ModelError` for what the
tables of the standard do not allow; unknown members are ignored. ``to_json`` gives the members of
the tables, optional ones only if they are set. Sizes are in **bits**.
"""

import base64
import binascii
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Self, TypeAlias

from hybridkex.qkd.source import UUID_TEXT, canonical_key_id
from hybridkex.secret import Secret
from hybridkex.text import escaped

API: Final = "/api/v1/keys"

Json: TypeAlias = dict[str, Any]


class Message:
    """Error messages of the standard, word for word (clause 6)."""

    SIZE_MULTIPLE: Final = "size shall be a multiple of 8"
    MANDATORY_UNSUPPORTED: Final = "not all extension_mandatory parameters are supported"
    MANDATORY_UNMET: Final = "not all extension_mandatory request options could be met"
    OPTIONAL_UNHANDLED: Final = "not all extension_optional request options handled"
    NOT_FOUND: Final = "one or more keys specified are not found on KME"


class ModelError(ValueError):
    """A JSON value that does not fit the model. The message never quotes a value."""


def _member(data: Json, name: str, kind: type, default: object = None) -> Any:
    """A member of an object, or ``default`` if it is absent; without a default it is required.

    ``null`` counts as absent: clients and servers in Go, Rust and Python write it for unset
    members.
    """
    value = data.get(name)
    if value is None:
        if default is None:
            raise ModelError(f"{name} is missing")
        return default
    if kind is int and type(value) is float and value.is_integer():
        return int(value)  # JSON has one kind of number
    if kind is str and type(value) is int:
        return str(value)  # some KMEs use numbers as IDs of SAEs and KMEs
    # bool is an int to Python and not to JSON.
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ModelError(f"{name} has the wrong type")
    # An ID that needs escaping cannot be a configured one, and is safe to show.
    return escaped(value) if isinstance(value, str) else value


def _object(data: object, what: str) -> Json:
    if not isinstance(data, dict):
        raise ModelError(f"{what} is not an object")
    return data


def _objects(data: Json, name: str) -> tuple[Json, ...]:
    return tuple(_object(item, name) for item in _member(data, name, list, ()))


def parse_key_id(text: object) -> str:
    """Parse a KME's key ID: a UUID by the standard; some KMEs use other text or numbers.

    Raises :class:`ModelError`.
    """
    if type(text) is int:
        text = str(text)
    try:
        return canonical_key_id(text) if isinstance(text, str) else parse_uuid(text)
    except ValueError:
        raise ModelError("key_ID is not a valid key ID") from None


def parse_uuid(text: object, what: str = "key_ID") -> str:
    """Parse a UUID (RFC 9562 section 4) into lower case. Raises :class:`ModelError`."""
    if isinstance(text, str) and UUID_TEXT.fullmatch(text):
        return text.lower()
    raise ModelError(f"{what} is not a UUID")


@dataclass(frozen=True, kw_only=True)
class Status:
    """Clause 6.1."""

    source_kme_id: str
    target_kme_id: str
    master_sae_id: str
    slave_sae_id: str
    key_size: int
    stored_key_count: int
    max_key_count: int
    max_key_per_request: int
    max_key_size: int
    min_key_size: int
    max_sae_id_count: int
    status_extension: Json | None = None

    _NAMES = (
        ("source_KME_ID", "source_kme_id", str),
        ("target_KME_ID", "target_kme_id", str),
        ("master_SAE_ID", "master_sae_id", str),
        ("slave_SAE_ID", "slave_sae_id", str),
        ("key_size", "key_size", int),
        ("stored_key_count", "stored_key_count", int),
        ("max_key_count", "max_key_count", int),
        ("max_key_per_request", "max_key_per_request", int),
        ("max_key_size", "max_key_size", int),
        ("min_key_size", "min_key_size", int),
        ("max_SAE_ID_count", "max_sae_id_count", int),
    )

    @classmethod
    def from_json(cls, data: object) -> Self:
        body = _object(data, "Status")
        fields = {field: _member(body, name, kind) for name, field, kind in cls._NAMES}
        extension = body.get("status_extension")
        return cls(**fields, status_extension=extension if isinstance(extension, dict) else None)

    def to_json(self) -> Json:
        body: Json = {name: getattr(self, field) for name, field, _ in self._NAMES}
        if self.status_extension is not None:
            body["status_extension"] = self.status_extension
        return body


@dataclass(frozen=True, kw_only=True)
class KeyRequest:
    """Clause 6.2; ``size`` is ``None`` for the KME's own default."""

    number: int = 1
    size: int | None = None
    additional_slave_sae_ids: tuple[str, ...] = ()
    extension_mandatory: tuple[Json, ...] = ()
    extension_optional: tuple[Json, ...] = ()

    @property
    def simple(self) -> bool:
        """Whether it has only number and size, so that GET is allowed (clause 5.2)."""
        return not (
            self.additional_slave_sae_ids or self.extension_mandatory or self.extension_optional
        )

    @classmethod
    def from_json(cls, data: object) -> Self:
        body = _object(data, "the key request")
        slaves = _member(body, "additional_slave_SAE_IDs", list, ())
        if not all(isinstance(slave, str) and slave for slave in slaves):
            raise ModelError("additional_slave_SAE_IDs has an item that is not an SAE ID")
        return cls(
            number=_member(body, "number", int, 1),
            size=None if body.get("size") is None else _member(body, "size", int),
            additional_slave_sae_ids=tuple(slaves),
            extension_mandatory=_objects(body, "extension_mandatory"),
            extension_optional=_objects(body, "extension_optional"),
        )

    @classmethod
    def from_query(cls, query: Mapping[str, Sequence[str]]) -> Self:
        """The simple form, ``?number=3&size=1024``."""
        if not query.keys() <= {"number", "size"}:
            raise ModelError("GET takes number and size alone; use POST for more")
        return cls(
            number=_query_number(query, "number") if "number" in query else 1,
            size=_query_number(query, "size") if "size" in query else None,
        )

    def to_json(self) -> Json:
        body: Json = {"number": self.number}
        if self.size is not None:
            body["size"] = self.size
        if self.additional_slave_sae_ids:
            body["additional_slave_SAE_IDs"] = list(self.additional_slave_sae_ids)
        if self.extension_mandatory:
            body["extension_mandatory"] = list(self.extension_mandatory)
        if self.extension_optional:
            body["extension_optional"] = list(self.extension_optional)
        return body


def _query_number(query: Mapping[str, Sequence[str]], name: str) -> int:
    values = query[name]
    if len(values) != 1 or not values[0].isascii() or not values[0].isdigit():
        raise ModelError(f"{name} is not a number")
    if len(values[0]) > 9:
        raise ModelError(f"{name} is too large")
    return int(values[0])


@dataclass(frozen=True, kw_only=True)
class DeliveredKey:
    """One item of ``keys`` of clause 6.3."""

    key_id: str
    key: Secret


@dataclass(frozen=True, kw_only=True)
class KeyContainer:
    """Clause 6.3."""

    keys: tuple[DeliveredKey, ...]
    key_container_extension: Json | None = None

    @classmethod
    def from_json(cls, data: object) -> Self:
        body = _object(data, "the key container")
        keys = tuple(
            DeliveredKey(key_id=parse_key_id(item.get("key_ID")), key=_decode_key(item.get("key")))
            for item in (_object(item, "a key") for item in _member(body, "keys", list))
        )
        extension = body.get("key_container_extension")
        return cls(
            keys=keys, key_container_extension=extension if isinstance(extension, dict) else None
        )

    def to_json(self) -> Json:
        return {
            "keys": [
                {
                    "key_ID": item.key_id,
                    "key": base64.b64encode(item.key.reveal()).decode("ascii"),
                }
                for item in self.keys
            ]
        }


def _decode_key(text: object) -> Secret:
    """Strict base64 (RFC 4648 section 4): with padding, nothing outside the alphabet."""
    if not isinstance(text, str):
        raise ModelError("key is not a string")
    try:
        value = base64.b64decode(text.encode("ascii"), validate=True)
    except (UnicodeEncodeError, binascii.Error):
        # The original error quotes the key.
        raise ModelError("key is not base64") from None
    return Secret(value)


@dataclass(frozen=True, kw_only=True)
class KeyIds:
    """Clause 6.4."""

    key_ids: tuple[str, ...]

    @classmethod
    def from_json(cls, data: object) -> Self:
        body = _object(data, "the key IDs request")
        items = (_object(item, "an item of key_IDs") for item in _member(body, "key_IDs", list))
        return cls(key_ids=tuple(parse_uuid(item.get("key_ID")) for item in items))

    @classmethod
    def from_query(cls, query: Mapping[str, Sequence[str]]) -> Self:
        """The simple form for a single ID, ``?key_ID=...``."""
        if query.keys() != {"key_ID"} or len(query["key_ID"]) != 1:
            raise ModelError("GET takes one key_ID; use POST for more")
        return cls(key_ids=(parse_uuid(query["key_ID"][0]),))

    def to_json(self) -> Json:
        return {"key_IDs": [{"key_ID": key_id} for key_id in self.key_ids]}


def message_of(answer: object) -> str:
    """The message of a KME's error body, or ``""``; not escaped.

    The standard's member is ``message``. Frameworks and proxies write others: ``detail`` (FastAPI:
    a text, or a list of objects with ``msg``), ``detail`` and ``title`` (RFC 9457), ``error`` and
    ``error_description``, or an object in place of the text.
    """
    if isinstance(answer, dict):
        for name in ("message", "detail", "error_description", "error", "title", "msg"):
            if found := message_of(answer.get(name)):
                return found
    elif isinstance(answer, list):
        return "; ".join(filter(None, map(message_of, answer[:4])))
    return answer if isinstance(answer, str) else ""


class ErrorResponse(Exception):
    """A KME's answer other than 200, with the standard's status and body (clause 6.5)."""

    def __init__(self, status: int, message: str, *details: dict[str, str]) -> None:
        super().__init__(f"{status}: {message}")
        self.status = status
        self.body: Json = {"message": message}
        if details:
            self.body["details"] = list(details)
