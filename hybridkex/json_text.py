"""JSON from outside: from a peer, a server or a file."""

import json
from typing import Any, Final

__all__ = ["load_json", "unique_members"]


MOST_LEVELS: Final = 64
"""Most levels of nesting, so that code which goes through a value level by level cannot reach
Python's recursion limit. ``json.loads`` alone allows as many as that limit does."""


def load_json(text: bytes | str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is not JSON, is nested more than :data:`MOST_LEVELS` deep, or has an object
            with two members of one name. Nothing else is raised, whatever the text: ``json.loads``
            alone also raises ``RecursionError``.
    """
    try:
        value = json.loads(text, object_pairs_hook=unique_members)
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


def unique_members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object from its members, for ``object_pairs_hook``.

    Receivers disagree about which of two members of one name counts (RFC 8259, section 4).

    Raises:
        ValueError: two members have the same name.
    """
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("an object has two members of the same name")
    return found
