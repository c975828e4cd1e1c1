"""Standard input and output as the two ends of a secure stream."""

import os
import sys
from typing import Any, Final

import trio

from hybridkex.cli.running import first_of
from hybridkex.errors import HybridkexError
from hybridkex.streams import SecureStream
from hybridkex.text import json_line
from hybridkex.tls.session import Session

__all__ = ["ChannelFailed", "pipe", "reason", "report"]

_CHUNK: Final = 256 * 1024


class ChannelFailed(HybridkexError):
    """The channel did not end cleanly."""


def reason(error: BaseException) -> str:
    """Why a stream broke, in one line."""
    cause = error.__cause__ or error
    return str(cause) or type(cause).__name__


def report(session: Session, *, as_json: bool) -> None:
    """Say on standard error what the keys rest on."""
    text = json_line(session.as_json()) if as_json else str(session)
    print(text, file=sys.stderr, flush=True)


async def pipe(stream: SecureStream[Any]) -> None:
    """Carry standard input to the peer and the peer's data to standard output.

    Ends when both sides have ended, or when the peer ended and closed the connection.

    Raises:
        ChannelFailed: the connection broke, or was cut.
    """
    try:
        async with trio.open_nursery() as nursery:
            sent = trio.Event()
            nursery.start_soon(_send_input, stream, sent)
            await _write_output(stream)
            # The peer's end is the end of one direction only: ours goes on, unless the peer has
            # left for good.
            nursery.start_soon(_cancel_when_gone, stream, nursery.cancel_scope)
            await sent.wait()
            nursery.cancel_scope.cancel()
    except* trio.BrokenResourceError as group:
        # Both directions see the same end; one of them is enough to tell it.
        raise ChannelFailed(reason(first_of(group))) from None


async def _send_input(stream: SecureStream[Any], sent: trio.Event) -> None:
    while data := await _read_input():
        await stream.send_all(data)
    await stream.send_eof()
    sent.set()


async def _cancel_when_gone(stream: SecureStream[Any], scope: trio.CancelScope) -> None:
    await stream.wait_peer_gone()
    scope.cancel()


async def _read_input() -> bytes:
    # A thread, since standard input may be a file, which cannot be waited for otherwise; it is
    # abandoned in its read when the peer ends first.
    return await trio.to_thread.run_sync(os.read, 0, _CHUNK, abandon_on_cancel=True)


async def _write_output(stream: SecureStream[Any]) -> None:
    while data := await stream.receive_some():
        await trio.to_thread.run_sync(_write, data)


def _write(data: bytes | bytearray) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(1, view) :]
