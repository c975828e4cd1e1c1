"""The values that the fields of a link's source, channel and security accept."""

import numbers
from typing import Any

from hybridkex.errors import ConfigError

__all__ = ["check_ranges"]


def check_ranges(owner: object, **limits: tuple[float, float]) -> None:
    """Raise ``ConfigError`` unless each of these fields is a number between its two limits.

    The limits themselves are accepted. A tuple must have such numbers in it.
    """
    for name, (least, most) in limits.items():
        value = getattr(owner, name)
        for one in value if isinstance(value, tuple) else (value,):
            if not (_is_number(one) and least <= one <= most):
                raise ConfigError(f"{name} must be a number from {least:g} to {most:g}")


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)
