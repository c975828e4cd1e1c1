"""Parsing of untrusted JSON: from a peer, a server or a file."""

import json
from collections.abc import Callable
from typing import Any, Final

MOST_LEVELS: Final = 64
"""The maximum nesting depth, so that recursive code cannot reach Python's recursion limit, which is
the only limit of ``json.loads``."""

MOST_VALUES: Final = 1 << 17
"""The maximum number of values in a text from a peer or a server. The time to parse a text grows
with its values rather than with its bytes: 8 MB parse in 10 ms as one string, and in seconds as
empty lists. The longest message of a KME (8192 keys, each of one block) has less than half."""


def load_json(
    text: bytes | str,
    *,
    most_values: int | None = MOST_VALUES,
    parse_constant: Callable[[str], Any] | None = None,
    parse_float: Callable[[str], Any] | None = None,
) -> Any:
    """The value of a JSON text.

    Args:
        most_values: ``None`` for a file of the user, which may be as long as its reader allows.
        parse_constant: as for ``json.loads``.
        parse_float: likewise.

    Raises:
        ValueError: it is not JSON, is nested more than :data:`MOST_LEVELS` deep, has more than
            ``most_values`` values, or has an object with two members of one name. Nothing else is
            raised, whatever the text: ``json.loads`` alone also raises ``RecursionError``.
    """
    if most_values is not None:
        # Each value but the outermost, and each name of a member, follows one of these.
        content = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
        if sum(map(content.count, (b",", b"[", b"{"))) > most_values:
            raise ValueError(f"it has more than {most_values} values")
    try:
        value = json.loads(
            text,
            object_pairs_hook=_unique_members,
            parse_constant=parse_constant,
            parse_float=parse_float,
        )
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


def _unique_members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object from its members, for ``object_pairs_hook``.

    Receivers disagree about which of two members of one name counts (RFC 8259, section 4).

    Raises:
        ValueError: two members have the same name.
    """
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("an object has two members of the same name")
    return found
