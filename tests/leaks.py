"""Finds secrets in texts. Tests that look for a secret use this, not a search of their own."""

import base64
from collections.abc import Iterator
from typing import TypeVar

T = TypeVar("T", str, bytes)


def notations(text: str | bytes, secret: bytes) -> Iterator[str]:
    """The notations in which a secret, or eight bytes of it, stand in a text.

    Which quotes ``repr`` escapes depends on all that is written around the secret, and a ``repr``
    of a ``repr`` doubles the backslashes. So the search ignores backslashes.
    """
    if isinstance(text, bytes):
        text = text.decode("latin-1")
    plain, lower = text.replace("\\", ""), text.lower()
    for part in _parts(secret, 8):
        if part.hex() in lower or part.hex(" ") in lower:
            yield "hex"
        if repr(part)[2:-1].replace("\\", "") in plain:
            yield "repr"
        if part.decode("latin-1") in text:
            yield "bytes"
        if str(list(part))[1:-1] in text:
            yield "list"
    if any(part in text for part in _parts(base64.b64encode(secret).decode().rstrip("="), 11)):
        yield "base64"


def leaks(text: str | bytes, *secrets: bytes) -> bool:
    """Whether one of the secrets, or eight bytes of it, stand in a text."""
    return any(True for secret in secrets for _ in notations(text, secret))


def _parts(whole: T, size: int) -> list[T]:
    """Of ``size`` each. The last one overlaps its neighbour."""
    last = max(0, len(whole) - size)
    return [whole[begin : begin + size] for begin in [*range(0, last, size), last]]
