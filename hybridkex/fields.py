"""Checks of the fields of a configuration, and of the arguments of a call, against annotations.

Annotations help only users of a type checker. Everyone else gets an error that names the field and
the given type and shows a correct line; it never shows the value, which may be a key.
"""

import inspect
import math
import os
import re
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from enum import Enum
from functools import cache, partial, wraps
from inspect import getattr_static
from itertools import chain, repeat
from pathlib import Path
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    Final,
    Literal,
    NamedTuple,
    ParamSpec,
    TypeVar,
    Union,
    get_args,
    get_origin,
)

from hybridkex.errors import ConfigError, InternalError

P = ParamSpec("P")
R = TypeVar("R")


class Kind(NamedTuple):
    """The values that a field accepts; one in ``Annotated`` replaces the one derived from the
    type."""

    fits: Callable[[Any], bool]
    what: str
    example: str = "..."
    """The right-hand side of a correct line."""
    protocols: tuple[type, ...] = ()
    """The protocols among its types."""


def is_number(value: Any) -> bool:
    """Whether this is an int or a float, but no NaN."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return not math.isnan(value)
    except OverflowError:  # an int that is too large for a float
        return False


def _is_function(value: Any) -> bool:
    return callable(value) and not isinstance(value, type) and not _is_awaited(value)


def _is_awaited(value: Any) -> bool:
    """Whether a call does nothing until its result is awaited or iterated over."""
    called = (
        value if inspect.isroutine(value) or isinstance(value, partial) else type(value).__call__
    )
    known = inspect.iscoroutinefunction(value) or inspect.iscoroutinefunction(called)
    return known or inspect.isasyncgenfunction(called)


_SIMPLE: Final[Mapping[Any, Kind]] = {
    int: Kind(
        lambda value: isinstance(value, int) and not isinstance(value, bool), "an int", "100"
    ),
    float: Kind(is_number, "a number", "1.5"),
    bool: Kind(lambda value: type(value) is bool, "True or False", "True"),
    NoneType: Kind(lambda value: value is None, "None"),
    bytes: Kind(lambda value: isinstance(value, bytes), "bytes", 'b"..."'),
    str: Kind(lambda value: isinstance(value, str), "a str", '"..."'),
    Path: Kind(lambda value: isinstance(value, str | bytes | os.PathLike), "a path", 'Path("...")'),
    object: Kind(lambda _: True, "anything"),
    Any: Kind(lambda _: True, "anything"),
}


def _kind_of(type_: Any) -> Kind:
    """The values that a type accepts."""
    if type_ in _SIMPLE:
        return _SIMPLE[type_]
    origin, inner = get_origin(type_), get_args(type_)
    if origin is Annotated:
        return next(one for one in inner if isinstance(one, Kind))
    if origin in (Union, UnionType):
        return _either([_kind_of(one) for one in inner])
    if origin is tuple:
        return _tuple_of([_kind_of(one) for one in inner if one is not ...], inner[-1] is ...)
    if origin is Literal:
        return Kind(lambda value: value in inner, " or ".join(map(repr, inner)), repr(inner[0]))
    class_ = origin or type_
    if class_ in (Iterable, Sequence):
        return _list_of(_kind_of(inner[0]), class_)
    if class_ is Callable and get_origin(inner[-1]) is Awaitable:
        return Kind(
            lambda value: callable(value) and not isinstance(value, type), "an async function"
        )
    if class_ is Callable or "__call__" in vars(class_):  # or a protocol for one
        return Kind(_is_function, "a function that is not async")
    example = f"{class_.__name__}(...)"
    if issubclass(class_, Enum):
        example = f"{class_.__name__}.{next(iter(class_)).name}"
    what = _with_article(class_.__name__)
    if vars(class_).get("_is_protocol"):
        return Kind(lambda value: not _missing(value, class_), what, example, (class_,))
    return Kind(lambda value: isinstance(value, class_), what, example)


def _either(kinds: list[Kind]) -> Kind:
    *first, last = (kind.what for kind in kinds)
    return Kind(
        lambda value: any(kind.fits(value) for kind in kinds),
        f"{', '.join(first)} or {last}",
        kinds[0].example,
        tuple(one for kind in kinds for one in kind.protocols),
    )


def _tuple_of(kinds: list[Kind], several: bool) -> Kind:
    if several:
        [kind] = kinds
        return Kind(
            lambda value: isinstance(value, tuple) and all(map(kind.fits, value)),
            f"a tuple of {_bare(kind)} objects",
            f"({kind.example},)",
            kind.protocols,
        )
    return Kind(
        lambda value: (
            isinstance(value, tuple)
            and len(value) == len(kinds)
            and all(kind.fits(one) for kind, one in zip(kinds, value, strict=True))
        ),
        f"a tuple of {' and '.join(kind.what for kind in kinds)}",
    )


def _list_of(kind: Kind, class_: type) -> Kind:
    """The items of an iterator are not checked, since that would use it up."""
    return Kind(
        lambda value: (
            isinstance(value, class_)
            and not isinstance(value, str | bytes | bytearray | Mapping)
            and not (isinstance(value, Collection) and not all(map(kind.fits, value)))
        ),
        f"a list of {_bare(kind)} objects",
        f"[{kind.example}]",
        kind.protocols,
    )


def _bare(kind: Kind) -> str:
    return re.sub(r"\ban? ", "", kind.what)


@cache
def _kinds(class_: type) -> dict[str, Kind]:
    return {one.name: _kind_of(one.type) for one in fields(class_) if one.init}


def check_fields(made: Any, examples: Mapping[str, str] | None = None) -> None:
    """Check the fields of a dataclass against their annotations.

    Args:
        made: the object.
        examples: a correct line for fields whose type does not show one.

    Raises:
        ConfigError: a field has another type.
    """
    for name, kind in _kinds(type(made)).items():  # type: ignore[arg-type]
        _check(type(made).__name__, name, getattr(made, name), kind, examples or {})


def checked(call: Callable[P, R]) -> Callable[P, R]:
    """A function or constructor whose arguments are checked against their annotations first.

    A call raises :class:`~hybridkex.errors.ConfigError` for an argument of another type.
    """
    owner = call.__qualname__.removesuffix(".__init__")
    parameters = inspect.signature(call).parameters.values()
    places = [one.name for one in parameters if one.kind is one.POSITIONAL_OR_KEYWORD]
    rest = [repeat(one.name) for one in parameters if one.kind is one.VAR_POSITIONAL]
    hints = call.__annotations__.items()
    kinds = {name: _kind_of(hint) for name, hint in hints if name != "return"}

    @wraps(call)
    def checking(*args: P.args, **kwargs: P.kwargs) -> R:
        for name, value in chain(zip(chain(places, *rest), args, strict=False), kwargs.items()):
            if name in kinds:
                _check(owner, name, value, kinds[name], {})
        return call(*args, **kwargs)

    return checking


def _check(owner: str, name: str, value: Any, kind: Kind, examples: Mapping[str, str]) -> None:
    if not kind.fits(value):
        right = examples.get(name, f"{name}={kind.example}")
        items = value if isinstance(value, list | tuple) else (value,)
        nearest = [
            min((_missing(item, one) for one in kind.protocols), key=len, default=[])
            for item in items
        ]
        lacking = next(filter(None, map(_without, items, nearest)), "")
        raise ConfigError(
            f"{owner}: {name} takes {kind.what}, not {described(value)}{lacking}; "
            f"write, for example: {right}"
        )


def check_members(name: str, value: Any, base: type, members: Iterable[str] | None = None) -> None:
    """Check that an object of the caller is complete.

    Args:
        name: what it is given as.
        value: the object.
        base: the protocol or base class; a member that is only inherited from it is missing.
        members: those that are needed; by default, all public members of the protocol.

    Raises:
        ConfigError: the object lacks a member; the message names all such.
    """
    if missing := _missing(value, base, members):
        raise ConfigError(
            f"{name} takes {_with_article(base.__name__)}, not {described(value)}"
            f"{_without(value, missing)}"
        )


def check_optional(name: str, value: Any, protocol: type) -> None:
    """Check an object that may have the members of a protocol: all of them or none.

    Raises:
        ConfigError: see :func:`check_members`.
    """
    if any(hasattr(value, one) for one in _members(protocol)):
        check_members(name, value, protocol)


def check_result(value: Any, kind: type[R], owner: object, method: str) -> R:
    """Return what a method of an object of the caller has returned.

    Args:
        value: the result.
        kind: what the method returns.
        owner: the object.
        method: the name of the method.

    Raises:
        TypeError: it is something else, for example ``None`` of a forgotten ``return``.
    """
    if not isinstance(value, kind):
        raise TypeError(
            f"{method} of {type(owner).__name__} returned {described(value)}; it returns "
            f"{_with_article(kind.__name__)}"
        )
    return value


def _missing(value: Any, base: type, members: Iterable[str] | None = None) -> list[str]:
    found = ((one, _fault(value, base, one)) for one in members or _members(base))
    return [one + fault for one, fault in found if fault is not None]


def _fault(value: Any, base: type, name: str) -> str | None:
    """Describe the required type of a member of the wrong type; empty for a missing member."""
    wanted = getattr_static(base, name, base)
    # A class has the methods of its instances.
    if isinstance(value, type) or not hasattr(value, name):
        return ""
    if getattr_static(type(value), name, value) is wanted:
        return ""
    given = getattr(value, name)
    if not inspect.isfunction(wanted):
        is_class_method = isinstance(wanted, classmethod | staticmethod)
        return None if is_class_method or not inspect.ismethod(given) else " (not a method)"
    if not callable(given):
        return " (a method)"
    if _is_awaited(given) and not _is_awaited(wanted):
        return " (a method that is not async)"
    return None


@cache
def _members(protocol: type) -> tuple[str, ...]:
    bases = [one for one in protocol.__mro__ if vars(one).get("_is_protocol")]
    names = [name for one in bases for name in (*vars(one), *one.__annotations__)]
    return tuple(dict.fromkeys(name for name in names if not name.startswith("_")))


def _without(value: Any, missing: list[str]) -> str:
    """The members that an object lacks; nothing for a value that no one meant as such an object."""
    if not missing or isinstance(value, type) or type(value).__module__ == "builtins":
        return ""
    return f" that lacks {', '.join(missing)}"


def described(value: Any) -> str:
    """A description of a value's type, without its content."""
    if value is None:
        return "None"
    if isinstance(value, type):
        return f"the class {value.__name__} itself"
    kind = type(value)
    if callable(value) and _is_awaited(value):
        return "an async one, which nothing awaits"
    if kind.__module__ == "ssl":
        return f"an ssl.{kind.__name__}, which configures another TLS library"
    if kind in (tuple, list):
        inside = ", ".join(dict.fromkeys(type(one).__name__ for one in value))
        return f"a {kind.__name__} of {inside}" if inside else f"an empty {kind.__name__}"
    return _with_article(kind.__name__)


def _with_article(name: str) -> str:
    return f"{'an' if name[0] in 'aeiouAEIO' else 'a'} {name}"


_YEAR_10000: Final = 253_402_300_800
"""The first second that :class:`datetime.datetime` and certificates cannot express."""


@dataclass(frozen=True)
class _CheckedClock:
    """The clock of a caller; its result is checked at each call."""

    clock: Callable[[], Any]

    def __call__(self) -> float:
        try:
            now = self.clock()
        except Exception as error:
            raise InternalError("the clock of our configuration failed") from error
        if is_number(now) and 0 <= now < _YEAR_10000:
            return float(now)
        raise InternalError(
            "the clock of our configuration is wrong: it must return a number of seconds since "
            f"1970, before the year 10000, and it returned {described(now)}"
            f"{f' of {now:g}' if is_number(now) else ''}; clock=time.time does"
        )


def checked_clock(clock: Callable[[], float]) -> Callable[[], float]:
    """A clock whose every answer is a time of the years 1970 to 9999, in seconds since 1970.

    Where it is not, a call raises :class:`~hybridkex.errors.InternalError`: the connection that
    needs the time ends, and no certificate or ticket is taken as valid.
    """
    trusted = clock is time.time or isinstance(clock, _CheckedClock)
    return clock if trusted else _CheckedClock(clock)
