"""The one-time pad of one direction, and the protection of records with it.

``docs/one-time-pad.md`` specifies it. The pad is a queue of key bytes that both ends have in the
same order. A record takes these from its front::

    point   16 bytes, once, for the first record: r of Poly1305
    mask    as many bytes as content and content type have together
    s       16 bytes

    sealed = (content || type) XOR mask || Poly1305(r, s; number || (content || type) XOR mask)

So the ciphertext is information-theoretically secret (Shannon), and the tag is that of Wegman and
Carter: a forger, whatever its computing power, succeeds for a record of ``L`` bytes with a
probability of at most ``8 ⌈(L + 9)/16⌉ / 2^106`` (D. J. Bernstein, "The Poly1305-AES
message-authentication code", FSE 2005, theorem 3.3), and the first failure ends the session.
"""

import os
from collections import deque
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.poly1305 import Poly1305

from hybridkex.errors import BadRecordMac, LocalStateError
from hybridkex.secret import Secret

POINT: Final = 16
"""Bytes of pad that the first record takes in addition."""
TAG: Final = 16
OVERHEAD: Final = 1 + TAG
"""Bytes of pad that a record takes in addition to its content: content type and tag. A protected
record is longer than its content by the same number."""


_forks = 0
"""How many forks this process is away from the first one. In its own PID namespace a child may have
the process ID of its parent."""


def _forked() -> None:
    global _forks  # noqa: PLW0603
    _forks += 1


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


def _this_process() -> tuple[int, int]:
    return os.getpid(), _forks


class Pad:
    """The unused pad of one direction. Each byte is used once and then overwritten.

    A forked child must not use its copy: the first record there is refused.
    """

    __slots__ = ("_keys", "_number", "_point", "_process", "left", "used")

    def __init__(self) -> None:
        self._keys = deque[bytearray]()
        self._point = b""
        self._number = 0
        self._process = _this_process()
        self.left = 0
        """The number of bytes of unused pad."""
        self.used = 0
        """The number of bytes that records have used."""

    def __repr__(self) -> str:
        return f"Pad({self.left} bytes left)"

    @property
    def begun(self) -> bool:
        """Whether a record has been protected."""
        return bool(self._number)

    @property
    def keys(self) -> int:
        """The number of keys that have unused bytes."""
        return len(self._keys)

    @property
    def first(self) -> int:
        """Bytes of pad that the next record takes in addition: :data:`POINT` for the first one."""
        return 0 if self.begun else POINT

    def extend(self, key: Secret) -> None:
        """Append a key, which must be used for nothing else."""
        if len(key):
            self._keys.append(bytearray(key.reveal()))
            self.left += len(key)

    def covers(self, sealed: int) -> bool:
        """Whether the pad is long enough for a sealed record of so many bytes."""
        return self.left >= sealed + self.first

    def seal(self, type_: int, content: bytes | memoryview) -> bytes:
        """Protect one record.

        Raises:
            LocalStateError: the pad is too short; nothing has been taken.
        """
        if not self.covers(len(content) + OVERHEAD):
            raise LocalStateError("the one-time pad is too short for this record")
        key = self._begin()
        inner = b"".join((content, bytes((type_,))))
        hidden = _xor(inner, self._take(len(inner)))
        return hidden + self._mac(key, hidden).finalize()

    def open(self, sealed: bytes) -> tuple[int, bytes]:
        """The content type and the content of a record. The caller ensures :meth:`covers`.

        Raises:
            BadRecordMac: the record is forged, damaged, out of order, or under another key.
        """
        hidden, tag = sealed[:-TAG], sealed[-TAG:]
        if not hidden:
            raise BadRecordMac(
                "a record under the one-time pad is shorter than its tag and content type"
            )
        key = self._begin()
        mask = self._take(len(hidden))
        try:
            self._mac(key, hidden).verify(tag)
        except InvalidSignature:
            raise BadRecordMac(
                "a record under the one-time pad is not authentic: it was modified in transit, or "
                "the two ends have different QKD keys"
            ) from None
        inner = _xor(hidden, mask)
        return inner[-1], inner[:-1]

    def erase(self) -> None:
        """Overwrite and discard the unused pad: the direction is closed."""
        for key in self._keys:
            key[:] = bytes(len(key))
        self._keys.clear()
        self._point = b""
        self.left = 0

    def _begin(self) -> bytes:
        """Take the evaluation point of the polynomial."""
        if self._process != _this_process():
            raise LocalStateError(
                "the one-time pad belongs to the process that this one was forked from: it would "
                "be used twice"
            )
        if not self.begun:
            self._point = self._take(POINT)
        return self._point

    def _mac(self, point: bytes, hidden: bytes) -> Poly1305:
        mac = Poly1305(point + self._take(TAG))
        mac.update(self._number.to_bytes(8, "big") + hidden)
        self._number += 1
        return mac

    def _take(self, size: int) -> bytes:
        """Take the next bytes; they are never returned again."""
        taken = b""
        while len(taken) < size:
            key = self._keys[0]
            piece = bytes(key[: size - len(taken)])
            key[: len(piece)] = bytes(len(piece))
            del key[: len(piece)]
            if not key:
                self._keys.popleft()
            taken += piece
        self.left -= size
        self.used += size
        return taken


def _xor(one: bytes, other: bytes) -> bytes:
    value = int.from_bytes(one, "big") ^ int.from_bytes(other, "big")
    return value.to_bytes(len(one), "big")
