"""The types of configuration fields, checked when an object is made.

Annotations help only users of a type checker. Everyone else gets an error that names the field and
the type that was given and shows a correct line; never the value, which may be a key.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from functools import partial
from types import UnionType
from typing import Any, Final, NamedTuple

from hybridkex.errors import ConfigError


class Kind(NamedTuple):
    """The values that a field accepts."""

    fits: Callable[[Any], bool]
    what: str


def a(what: str, *classes: type[Any] | UnionType) -> Kind:
    """An instance of one of these classes or runtime protocols."""

    def fits(value: Any) -> bool:
        # A class has the methods of its instances, so a protocol check would accept it.
        return not isinstance(value, type) and any(isinstance(value, one) for one in classes)

    return Kind(fits, what)


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return not math.isnan(value)
    except OverflowError:  # an int that is no float
        return False


INTEGER: Final = Kind(lambda value: type(value) is int, "an int")
NUMBER: Final = Kind(_is_number, "a number")
FLAG: Final = Kind(lambda value: type(value) is bool, "True or False")


def _is_function(value: Any) -> bool:
    return callable(value) and not isinstance(value, type) and not _is_awaited(value)


def _is_awaited(value: Any) -> bool:
    """Whether a call does nothing until its result is awaited or iterated over."""
    called = (
        value if inspect.isroutine(value) or isinstance(value, partial) else type(value).__call__
    )
    return inspect.iscoroutinefunction(called) or inspect.isasyncgenfunction(called)


CALLABLE: Final = Kind(_is_function, "an ordinary function, not an async one")


def or_none(kind: Kind) -> Kind:
    """The same kind, or ``None``."""
    return Kind(lambda value: value is None or kind.fits(value), f"{kind.what} or None")


def tuple_of(kind: Kind, plural: str) -> Kind:
    """A tuple of this kind, possibly empty."""

    def fits(value: Any) -> bool:
        return isinstance(value, tuple) and all(map(kind.fits, value))

    return Kind(fits, f"a tuple of {plural}")


def check_fields(made: object, rules: Mapping[str, tuple[Kind, str]]) -> None:
    """Check the attributes of an object.

    Args:
        made: the object.
        rules: for each attribute: the kind it accepts, and an example of a correct line.

    Raises:
        ConfigError: an attribute has another type.
    """
    for name, (kind, right) in rules.items():
        value = getattr(made, name)
        if not kind.fits(value):
            raise ConfigError(
                f"{type(made).__name__}: {name} takes {kind.what}, not {described(value)}; "
                f"write, for example: {right}"
            )


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
    if kind is tuple:
        inside = ", ".join(dict.fromkeys(type(one).__name__ for one in value))
        return f"a tuple of {inside}" if inside else "an empty tuple"
    return f"{'an' if kind.__name__[0] in 'aeiouAEIO' else 'a'} {kind.__name__}"
