"""The values that the settings of a link accept, and the types in which a caller may give them."""

import math
import numbers
from collections.abc import Iterable
from dataclasses import fields
from typing import TYPE_CHECKING, Any, get_origin

from hybridkex.errors import ConfigError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def check_ranges(owner: "DataclassInstance", **limits: tuple[float, float]) -> None:
    """Raise ``ConfigError`` unless each of these fields is a number between its two limits.

    The limits themselves are accepted. A field whose type is a tuple must have such numbers in it.
    """
    several = {one.name for one in fields(owner) if get_origin(one.type) is tuple}
    for name, (least, most) in limits.items():
        value = getattr(owner, name)
        for one in value if name in several else (value,):
            if not (_is_number(one) and least <= one <= most):
                raise ConfigError(f"{name} must be a number from {least:g} to {most:g}")


def within(name: str, value: Any, least: float, most: float) -> float:
    """The number in a setting, between these limits. Raises ``ConfigError``."""
    if not (_is_number(value) and least <= value <= most):
        raise ConfigError(f"{name} must be a number from {least:g} to {most:g}")
    return float(value)


def whole(name: str, value: Any) -> int:
    """The integer in a setting: ``1e6`` is one, and so is numpy's. Raises ``ConfigError``."""
    if not (_is_number(value) and math.isfinite(value) and value == int(value)):
        raise ConfigError(f"{name} takes a whole number, not {value!r}")
    return int(value)


def listed(name: str, values: Any) -> tuple[Any, ...]:
    """The values of an argument that takes several. Raises ``ConfigError`` for a single one."""
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise ConfigError(f"{name} takes a list of values, not {values!r}")
    return tuple(values)


def plain(value: Any) -> Any:
    """A number or an array of numpy as Python's own; other values as they are."""
    return value.tolist() if hasattr(value, "tolist") else value


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)
