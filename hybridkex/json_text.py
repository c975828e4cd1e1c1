"""JSON from outside: from a peer, a server or a file."""

import json
from typing import Any

__all__ = ["load_json"]


def load_json(text: bytes | str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is not JSON, or is nested too deeply. Nothing else is raised, whatever the
            text: ``json.loads`` alone also raises ``RecursionError``.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("the nesting is too deep") from None
