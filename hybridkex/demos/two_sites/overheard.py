"""Eve's recording: every record is searched for the data sent."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from hybridkex.constants import ContentType
from hybridkex.crypto.kex import ALL_GROUPS
from hybridkex.demos.rndl.later.reading import Connection, read_capture
from hybridkex.errors import RecordingError
from hybridkex.qkd.psk import name_of
from hybridkex.wire import extensions as ext
from hybridkex.wire.messages import ImportedIdentity

_SAMPLES: Final = 64
"""Number of pieces of the file to search for besides the marker."""
_PIECE: Final = 32
"""Bytes of such a piece."""
_OVERHEAD: Final = 17
"""Bytes of a record that are not data: the content type and the tag (RFC 9846 section 5.2)."""


@dataclass(frozen=True)
class Overheard:
    """One recorded connection, searched completely without a match."""

    connection: Connection
    needles: int
    """The number of byte strings that each record was searched for."""

    @property
    def records(self) -> int:
        """The number of records in both directions; each was searched."""
        return len(self.connection.records)

    @property
    def size(self) -> int:
        return sum(record.size for record in self.connection.records)

    @property
    def server_name(self) -> str:
        name = self.connection.client_hello.extensions.get(ext.ServerName)
        return name.host_name if name is not None else "none"

    @property
    def group(self) -> str:
        names = {group.code: group.name for group in ALL_GROUPS}
        return names[self.connection.group]

    @property
    def key_ids(self) -> list[str]:
        """The IDs of the QKD keys that the client offered."""
        offer = self.connection.client_hello.extensions.get(ext.PreSharedKeyOffer)
        found: dict[str, None] = {}
        for one in offer.identities if offer is not None else ():
            imported = ImportedIdentity.decode(one.identity)
            name = name_of(imported.external_identity) if imported is not None else None
            found |= dict.fromkeys(str(part.key_id) for part in name or ())
        return list(found)


def overhear(capture: Path, sent: Path, marker: bytes) -> Overheard:
    """Search every record of a recording for the data sent.

    Args:
        capture: the recording of one connection.
        sent: the file that the client sent through it, with markers in it.
        marker: the marker.

    Raises:
        RecordingError: the recording is not of one connection, holds less than was sent, or shows
            part of it; or the search is useless, because it does not find the marker in the data
            sent.
    """
    needles = [marker, *_pieces(sent)]
    with sent.open("rb") as file:
        if not _search([marker], file.read(4096)):
            raise RecordingError("the search cannot find the marker even in what was sent")
    connections, others = read_capture(capture)
    if len(connections) != 1 or others:
        count = len(connections) + len(others)
        raise RecordingError(f"expected 1 connection in Eve's recording, found {count}")
    [connection] = connections
    size, carried = sent.stat().st_size, 0
    for record in connection.records:
        if _search(needles, record.fragment):
            raise RecordingError(f"record {record.number} of Eve's recording shows what was sent")
        if record.from_client and record.type == ContentType.APPLICATION_DATA:
            carried += max(0, len(record.fragment) - _OVERHEAD)
    if carried < size:
        raise RecordingError(
            f"Eve's recording is truncated ({carried:,} of {size:,} bytes): the search is "
            "incomplete"
        )
    for from_client in (True, False):
        # Across record boundaries, too.
        if _search(needles, connection.flow.stream(from_client=from_client)):
            raise RecordingError("Eve's recording shows what was sent")
    return Overheard(connection, len(needles))


def _search(needles: Sequence[bytes], haystack: bytes) -> bool:
    return any(needle in haystack for needle in needles)


def _pieces(path: Path) -> list[bytes]:
    """Pieces from the whole file, without those that could match by chance."""
    size = path.stat().st_size
    found = []
    with path.open("rb") as file:
        for index in range(_SAMPLES):
            file.seek(size * index // _SAMPLES)
            piece = file.read(_PIECE)
            if len(piece) == _PIECE and len(set(piece)) > 8:
                found.append(piece)
    return found
