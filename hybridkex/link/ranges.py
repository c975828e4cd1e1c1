"""The values that the fields of a link's source, channel and security accept."""

import numbers
from dataclasses import fields
from typing import TYPE_CHECKING, Any, get_origin

from hybridkex.errors import ConfigError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

__all__ = ["check_ranges"]


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


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)
