"""Value classes: dataclasses that are never changed after creation.

``@dataclass(frozen=True)`` checks this while the program runs: each field is set by a call of
``object.__setattr__``, which makes an object four times as expensive, and each class takes half a
millisecond to define. A handshake makes more than forty such objects, of fifty classes. For
:func:`value` only the type checker checks this.

Objects that applications receive and base decisions on (configurations, policies, sessions,
identities) remain ``@dataclass(frozen=True)``.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar, dataclass_transform, overload

C = TypeVar("C", bound=type)


@overload
def value(cls: C) -> C: ...
@overload
def value(*, kw_only: bool) -> Callable[[C], C]: ...
@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def value(cls: Any = None, *, kw_only: bool = False) -> Any:
    """A dataclass that a type checker takes for a frozen one.

    It has ``__init__``, ``__eq__``, ``__hash__`` and ``__repr__`` as any other.
    """

    def made(cls: Any) -> Any:
        for name, method in (("__eq__", _equal), ("__hash__", _hash), ("__repr__", _shown)):
            if name not in cls.__dict__:
                setattr(cls, name, method)
        return dataclass(eq=False, repr=False, kw_only=kw_only)(cls)

    return made if cls is None else made(cls)


def _content(one: Any) -> tuple[object, ...]:
    return tuple(getattr(one, field.name) for field in fields(one) if field.compare)


def _equal(self: Any, other: object) -> bool:
    if type(other) is not type(self):
        return False
    return _content(self) == _content(other)


def _hash(self: Any) -> int:
    return hash(_content(self))


def _shown(self: Any) -> str:
    content = (f"{one.name}={getattr(self, one.name)!r}" for one in fields(self) if one.repr)
    return f"{type(self).__qualname__}({', '.join(content)})"
