"""A random marker throughout the data, so that every record can be searched for it.

The stream alternates a marker and up to 1,008 bytes of the file, and ends with a marker: even an
empty file has something to search for, and a record as long as a block contains a whole marker.
"""

import secrets
from pathlib import Path
from typing import Final

from hybridkex.errors import RecordingError
from hybridkex.files import open_private

MARKER_BYTES: Final = 16
"""Length of a marker in bytes: long enough not to occur by chance."""
_BLOCK: Final = 1024
_CHUNK: Final = _BLOCK - MARKER_BYTES


def new_marker() -> bytes:
    return secrets.token_bytes(MARKER_BYTES)


def mark(source: Path, target: Path, marker: bytes) -> int:
    """Copy a file, inserting markers; returns the number of bytes written."""
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
    """Copy a file, removing the markers.

    Raises:
        RecordingError: a marker is missing.
    """
    with source.open("rb") as file, open_private(target) as sink:
        left = source.stat().st_size - MARKER_BYTES
        while left > 0:
            block = file.read(min(_BLOCK, left))
            if not block.startswith(marker):
                raise RecordingError("the received data differ from what was sent")
            sink.write(block[MARKER_BYTES:])
            left -= len(block)
        if left < 0 or file.read() != marker:
            raise RecordingError("the received data are incomplete")
