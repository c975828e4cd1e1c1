"""The values that the link accepts, and the types in which a caller may give them.

Numbers may be Python's or numpy's, and lists may be arrays or columns of a table. Checked values
have Python's own types.
"""

import math
import numbers
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import fields
from decimal import Decimal
from fractions import Fraction
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast, get_origin

import numpy as np
from numpy.typing import NDArray

from hybridkex.errors import ConfigError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T")

MOST_EVENTS: Final = 1e30
"""The highest count of events."""
PICTURES: Final = (".png", ".svg")
"""File name extensions of pictures."""


def check_ranges(owner: "DataclassInstance", **limits: tuple[float, float]) -> None:
    """Raise ``ConfigError`` unless each of these fields is a number between its two limits.

    The limits themselves are accepted. A field whose type is a tuple must have such numbers in it.
    """
    several = _tuples(type(owner))
    for name, (least, most) in limits.items():
        check = within_all if name in several else within
        object.__setattr__(owner, name, check(name, getattr(owner, name), least, most))


@cache
def _tuples(kind: "type[DataclassInstance]") -> frozenset[str]:
    """The fields whose type is a tuple."""
    return frozenset(one.name for one in fields(kind) if get_origin(one.type) is tuple)


def within(name: str, value: Any, least: float, most: float) -> Any:
    """The number in a setting, between these limits. Raises ``ConfigError``."""
    if type(value) is not float:
        value = plain(value)
    if not (is_number(value) and least <= value <= most):
        raise ConfigError(f"{name} must be a number from {least:g} to {most:g}")
    return value


def within_all(name: str, values: Any, least: float, most: float) -> tuple[Any, ...]:
    """The numbers in a setting that takes several. Raises ``ConfigError``."""
    given = listed(name, values)
    if all(type(one) is float and least <= one <= most for one in given):
        return given
    return tuple([within(name, one, least, most) for one in given])


def whole(name: str, value: Any) -> int:
    """The integer in a setting: ``1e6`` is one, and so is numpy's. Raises ``ConfigError``."""
    value = plain(value)
    if not (is_number(value) and math.isfinite(value) and value == int(value)):
        raise ConfigError(f"{name} takes a whole number, not {value!r}")
    return int(value)


def is_number(value: Any) -> bool:
    """Whether this is a real number that arithmetic can be done with."""
    if type(value) is float:
        return True
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return False
    try:
        float(value)
    except OverflowError:  # an integer of more than 308 digits
        return False
    return True


def finite(name: str, value: Any) -> float:
    """A number of at most ``MOST_EVENTS``, either sign. Raises ``ConfigError``."""
    return cast(float, within(name, value, -MOST_EVENTS, MOST_EVENTS))


def probability(name: str, value: Any) -> float:
    """The number in an argument, above 0 and below 1. Raises ``ConfigError``."""
    value = within(name, value, 0.0, 1.0)
    if not 0.0 < value < 1.0:
        raise ConfigError(f"{name} must be above 0 and below 1")
    return cast(float, value)


def bit_array(name: str, values: Any) -> NDArray[np.uint8]:
    """The bits in an argument: integers or truth values, 0 or 1, in one dimension.

    They are copied only if their type is not uint8. Raises ``ConfigError``.
    """
    try:
        found = np.asarray(values)
        if found.ndim == 1 and found.dtype.kind in "bui":
            in_bytes = found.astype(np.uint8, copy=False)
            if not len(found) or (found.min() >= 0 and found.max() <= 1):
                return in_bytes
    except ValueError:  # lists of other lengths
        pass
    raise ConfigError(f"{name} takes an array of bits, each 0 or 1")


def listed(name: str, values: Any) -> tuple[Any, ...]:
    """The values of an argument that takes several. Raises ``ConfigError`` for a single one."""
    if type(values) is tuple:
        return values
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Iterable):
        raise ConfigError(f"{name} takes a list of values, not {type(values).__name__}")
    try:
        return tuple(values)
    except TypeError:  # an array without dimensions
        raise ConfigError(f"{name} takes a list of values, not a single one") from None


def records(name: str, values: Any) -> list[Mapping[str, Any]]:
    """The rows of a table, each with names and values. Raises ``ConfigError``."""
    try:
        rows = listed(name, values)
    except ConfigError:
        rows = (None,)
    if not all(hasattr(one, "keys") for one in rows):
        raise ConfigError(
            f"{name} takes a list of dictionaries, one for each row; from a table they come by "
            'to_dict("records") in pandas, to_dicts() in polars and to_pylist() in pyarrow'
        )
    return [dict(one) for one in rows]


def one_of(name: str, value: Any, known: Iterable[str]) -> str:
    """The name in a setting, which must be one of these. Raises ``ConfigError``."""
    known = tuple(known)
    if not isinstance(value, str) or value not in known:
        raise ConfigError(f"{name} must be one of {', '.join(known)}")
    return value


def file_kind(path: Path, what: str, known: Iterable[str]) -> str:
    """The extension of a file name in lower case, one of ``known``.

    ``what``: the content of the file, for the message. Raises ``ConfigError``, also if the
    package for such a file is missing, so that the error comes before a long computation.
    """
    *others, last = known
    ending = path.suffix.lower()
    if ending not in (*others, last):
        raise ConfigError(
            f"{path}: the name of a file with {what} must end in {', '.join(others)} or {last}"
        )
    if ending == ".parquet" and find_spec("pyarrow") is None:
        raise ConfigError("Parquet files need pyarrow: pip install 'hybridkex[parquet]'")
    return ending


def instance(name: str, value: Any, kind: type[T], *others: type[Any]) -> T:
    """The object in an argument. Raises ``ConfigError`` for one of another class."""
    if not isinstance(value, (kind, *others)):
        wanted = " or ".join(one.__name__ for one in (kind, *others))
        raise ConfigError(f"{name} takes a {wanted}, not {type(value).__name__}")
    return cast(T, value)


def plain(value: Any) -> Any:
    """A number or an array of numpy or pyarrow as Python's own, a decimal number or a fraction as a
    float; other values as they are."""
    for name in ("tolist", "as_py"):
        if hasattr(value, name):
            value = getattr(value, name)()
    if isinstance(value, Decimal | Fraction):
        with suppress(ValueError, OverflowError):  # a signalling NaN, more than 308 digits
            return float(value)
    return value
