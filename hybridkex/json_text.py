"""JSON from outside: from a peer, a server or a file."""

import json
from typing import Any, Final

__all__ = ["load_json"]


MOST_LEVELS: Final = 64
"""Most levels of nesting, so that code which goes through a value level by level cannot reach
Python's recursion limit. ``json.loads`` alone allows as many as that limit does."""


def load_json(text: bytes | str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is not JSON, or is nested more than :data:`MOST_LEVELS` deep. Nothing else
            is raised, whatever the text: ``json.loads`` alone also raises ``RecursionError``.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("the nesting is too deep") from None
    level = [value]
    for _ in range(MOST_LEVELS):
        level = [
            inner
            for outer in level
            if isinstance(outer, list | dict)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return value
    raise ValueError("the nesting is too deep")
