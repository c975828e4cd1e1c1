"""Standard input and output as the two ends of a secure stream."""

import fcntl
import os
import stat
import sys
import termios
from array import array
from typing import Any, Final

import trio

from hybridkex.errors import HybridkexError
from hybridkex.machine import broken, leaves
from hybridkex.net.event_loop import in_thread
from hybridkex.streams import SecureStream
from hybridkex.text import json_line
from hybridkex.tls.session import Session

_CHUNK: Final = 256 * 1024


class ChannelFailed(HybridkexError):
    """The channel did not end cleanly."""


async def shake_hands(stream: SecureStream[Any]) -> None:
    """Run the handshake. Raises ``ChannelFailed``."""
    try:
        await stream.do_handshake()
    except trio.BrokenResourceError as error:
        raise ChannelFailed(f"handshake failed: {broken(error)}") from None


def report(session: Session, *, as_json: bool) -> None:
    """Print on standard error the session: where its keys come from, and who the peer is."""
    text = json_line(session.as_json()) if as_json else str(session)
    print(text, file=sys.stderr, flush=True)


def report_epochs(session: Session, *, as_json: bool) -> None:
    """At the end of a session that has renewed its keys, print its last epoch."""
    if session.epochs:
        report(session, as_json=as_json)


async def pipe(stream: SecureStream[Any]) -> None:
    """Carry standard input to the peer and the peer's data to standard output.

    Ends when both directions have ended, or when the peer has closed the connection.

    Raises:
        ChannelFailed: the connection broke or was cut, the input could not be read or could not be
            sent completely, or the output could not be written.
    """
    sender = _Input()
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(sender.send, stream)
            while data := await stream.receive_some():
                await in_thread(_write, data)
            # The peer's close_notify ends one direction only: ours continues, unless the peer has
            # closed the connection.
            nursery.start_soon(_cancel_when_gone, stream, nursery.cancel_scope)
            await sender.sent.wait()
            nursery.cancel_scope.cancel()
    except* trio.BrokenResourceError as group:
        # Both directions see the same failure; it is reported once.
        raise ChannelFailed(broken(next(leaves(group)))) from None
    if sender.is_left_over():
        raise ChannelFailed(
            f"the peer closed the connection after {sender.count:,} bytes of standard input; the "
            "rest was not sent"
        )


class _Input:
    def __init__(self) -> None:
        self.count = 0
        self.sent = trio.Event()
        self._sending = False

    async def send(self, stream: SecureStream[Any]) -> None:
        """Send all of it, and close our direction."""
        while data := await self._read():
            self._sending = True
            await stream.send_all(data)
            self._sending = False
            self.count += len(data)
        await stream.send_eof()
        self.sent.set()

    def is_left_over(self) -> bool:
        """Whether input remains unsent: already read, or ready to be read.

        A terminal or a pipe without data does not count: the peer may end first.
        """
        return not self.sent.is_set() and (self._sending or _unread(0) > 0)

    async def _read(self) -> bytes:
        # In a thread, since standard input may be a regular file, which cannot be polled; the
        # thread is abandoned if the peer ends first.
        try:
            return await in_thread(os.read, 0, _CHUNK, abandon=True)
        except OSError as error:
            raise ChannelFailed(f"cannot read standard input: {error.strerror}") from None


def _unread(file: int) -> int:
    """Bytes that can be read from a file, a pipe or a socket without waiting."""
    try:
        status = os.fstat(file)
        if stat.S_ISREG(status.st_mode):
            return status.st_size - os.lseek(file, 0, os.SEEK_CUR)
        if stat.S_ISCHR(status.st_mode):  # /dev/zero has no end
            return 0
        count = array("i", [0])
        fcntl.ioctl(file, termios.FIONREAD, count)
    except OSError:
        return 0
    return count[0]


async def _cancel_when_gone(stream: SecureStream[Any], scope: trio.CancelScope) -> None:
    await stream.wait_peer_gone()
    scope.cancel()


def _write(data: bytes | bytearray) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(1, view) :]
