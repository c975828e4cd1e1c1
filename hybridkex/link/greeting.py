"""The greeting: the party that connects authenticates itself to the party that listens.

A connection does not belong to a link before its greeting, so other programs that connect use up
nothing and end nothing::

    connects  kind (C: classical channel, Q: quantum channel), number of the session (16 bytes)
    listens   challenge (32 random bytes)
    connects  length (2 bytes, big-endian), signature over all of the above
    listens   1 if the signature verifies, or 0, and closes the connection
"""

import secrets
from contextlib import suppress
from typing import Final

import trio

from hybridkex.errors import LinkError
from hybridkex.link.authentication import Signatures
from hybridkex.link.ledger import Direction
from hybridkex.link.wire import NOT_OURS, SessionEnded
from hybridkex.net.reading import read_exactly

CLASSICAL: Final = b"C"
QUANTUM: Final = b"Q"
KINDS: Final = (CLASSICAL, QUANTUM)
NUMBER: Final = 16
"""Bytes of a session's number."""
CHALLENGE: Final = 32
GREETING: Final = b"hybridkex QKD link greeting v2"
ACCEPTED: Final = b"\x01"
REFUSED: Final = b"\x00"


async def greet(
    stream: trio.abc.Stream, signatures: Signatures, kind: bytes, number: bytes, *, sends: Direction
) -> None:
    """Prove who we are to the party that listens.

    ``sends``: the direction of our messages. Raises ``LinkError`` if it refuses us, ``EndOfStream``
    and ``trio.BrokenResourceError``.
    """
    await stream.send_all(kind + number)
    challenge = await read_exactly(stream, CHALLENGE)
    signature = signatures.tag(sends, [GREETING, kind, number, challenge])
    await stream.send_all(len(signature).to_bytes(2) + signature)
    if await read_exactly(stream, len(ACCEPTED)) != ACCEPTED:
        raise SessionEnded(f"the other party refuses us: {NOT_OURS}")


async def greeted(
    stream: trio.abc.Stream, signatures: Signatures, *, receives: Direction
) -> tuple[bytes, bytes]:
    """Authenticate the other party's connection; returns the kind of channel, and the session's
    number.

    ``receives``: the direction of the other party's messages.

    Raises:
        LinkError: the connection is somebody else's.
        EndOfStream: it ended early.
        trio.BrokenResourceError: it broke.
    """
    kind = await read_exactly(stream, 1)
    if kind not in KINDS:
        raise LinkError("the connection is not for a QKD link")
    number = await read_exactly(stream, NUMBER)
    challenge = secrets.token_bytes(CHALLENGE)
    await stream.send_all(challenge)
    length = int.from_bytes(await read_exactly(stream, 2))
    signature = await read_exactly(stream, length)
    try:
        signatures.check(receives, [GREETING, kind, number, challenge], signature)
    except LinkError:
        with suppress(trio.BrokenResourceError):
            await stream.send_all(REFUSED)
        raise
    await stream.send_all(ACCEPTED)
    return kind, number
