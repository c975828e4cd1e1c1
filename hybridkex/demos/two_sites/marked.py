"""A random marker all through what is sent, so that every record of it can be searched.

The stream is a marker, then up to 1,008 bytes of the file, and so on, and a marker at the end: even
an empty file has something to look for, and a record that is as long as a block has a whole marker.
"""

import secrets
from pathlib import Path
from typing import Final

from hybridkex.errors import RecordingError
from hybridkex.files import open_private

__all__ = ["MARKER_BYTES", "mark", "new_marker", "unmark"]

MARKER_BYTES: Final = 16
"""Bytes of a marker: by chance none is anywhere else."""
_BLOCK: Final = 1024
_CHUNK: Final = _BLOCK - MARKER_BYTES


def new_marker() -> bytes:
    """A random marker, for one run."""
    return secrets.token_bytes(MARKER_BYTES)


def mark(source: Path, target: Path, marker: bytes) -> int:
    """Write a file with markers into another one; returns the bytes written."""
    written = 0
    with source.open("rb") as file, open_private(target) as sink:
        while chunk := file.read(_CHUNK * 64):
            blocks = (chunk[at : at + _CHUNK] for at in range(0, len(chunk), _CHUNK))
            data = b"".join(marker + block for block in blocks)
            sink.write(data)
            written += len(data)
        sink.write(marker)
    return written + len(marker)


def unmark(source: Path, target: Path, marker: bytes) -> None:
    """Take the markers out again.

    Raises:
        RecordingError: the file does not have them where they belong.
    """
    with source.open("rb") as file, open_private(target) as sink:
        left = source.stat().st_size - MARKER_BYTES
        while left > 0:
            block = file.read(min(_BLOCK, left))
            if not block.startswith(marker):
                raise RecordingError("what arrived is not what was sent")
            sink.write(block[MARKER_BYTES:])
            left -= len(block)
        if left < 0 or file.read() != marker:
            raise RecordingError("what arrived is not all that was sent")
