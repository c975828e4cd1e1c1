"""Secrets that cannot leak by accident.

Python cannot guarantee that memory is erased: ``bytes`` are immutable and copied freely (see
``docs/security.md``). This class keeps a secret out of the usual leaks: a ``repr`` in a log line, a
dataclass printed in a traceback, a pickle.
"""

import hmac
from typing import NoReturn, final


@final
class Secret:
    """Bytes that appear in no ``repr``, ``str``, ``format``, pickle or copy.

    Comparison takes constant time. Only :meth:`reveal`, which is easy to search for, returns the
    bytes.

    Args:
        value: the bytes, which are copied.
    """

    __slots__ = ("_value",)

    def __init__(self, value: bytes | bytearray | memoryview) -> None:
        """Raises ``TypeError`` for anything else, such as a length."""
        if not isinstance(value, bytes | bytearray | memoryview):  # bytes(32) is 32 zeros
            raise TypeError(f"a Secret is made of bytes, not of {type(value).__name__}")
        self._value = bytes(value)

    def reveal(self) -> bytes:
        """The bytes themselves."""
        return self._value

    def __len__(self) -> int:
        return len(self._value)

    def __repr__(self) -> str:
        return f"Secret({len(self._value)} bytes)"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Secret):
            return NotImplemented
        return hmac.compare_digest(self._value, other._value)

    # A hash would be a fingerprint of the secret; nothing needs one.
    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Secret is not pickled or copied")
