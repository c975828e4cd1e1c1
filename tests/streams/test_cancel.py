"""Cancelled at the n-th step, for every n: usable or broken, never wrong, never stuck."""

from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import trio
import trio.testing

from tests.streams.cancelling import CancelAt

MakePair = Callable[..., Any]

PAYLOAD = bytes(range(256)) * 2000  # two pieces of 256 KiB


async def cancelled_at(step: int, call: Callable[[], Awaitable[object]]) -> bool:
    """Run ``call`` and cancel it at its n-th step; whether it came to that."""
    with trio.CancelScope() as scope:
        if step == 0:
            scope.cancel()
        instrument = CancelAt(scope, step)
        trio.lowlevel.add_instrument(instrument)
        try:
            await call()
        finally:
            trio.lowlevel.remove_instrument(instrument)
    return scope.cancelled_caught


CALLS = {
    "do_handshake": lambda stream: stream.do_handshake(),
    "send_all": lambda stream: stream.send_all(PAYLOAD),
    "receive_some": lambda stream: stream.receive_some(),
    "send_eof": lambda stream: stream.send_eof(),
    "update_keys": lambda stream: stream.update_keys(request_peer=True),
    "aclose": lambda stream: stream.aclose(),
}


class Peer:
    """Sends a little, reads all there is."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.received = bytearray()
        self.end = "waits"

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.send)
            try:
                async for data in self.stream:
                    self.received += data
                self.end = "clean"
            except trio.BrokenResourceError:
                self.end = "broken"
        await self.stream.aclose()

    async def send(self) -> None:
        try:
            for part in (b"one ", b"two ", b"three"):
                await self.stream.send_all(part)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass


@pytest.mark.parametrize("transport", ["memory", "lockstep"])
@pytest.mark.parametrize("shaken", [False, True], ids=["lazy", "shaken"])
@pytest.mark.parametrize("victim", ["client", "server"])
@pytest.mark.parametrize("name", sorted(CALLS))
async def test_cancelled_at_every_step(
    make_pair: MakePair,
    name: str,
    victim: str,
    shaken: bool,
    transport: str,
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Afterwards each direction of the stream goes on where it was, or raises; and the peer, when
    the stream is closed, has seen a prefix of what was sent: all of it where its end is clean and
    the call was not cut short."""
    step, cancelled = 0, True
    while cancelled:
        assert step < 200
        client, server = make_pair(getattr(trio.testing, f"{transport}_stream_pair"))
        subject, other = (client, server) if victim == "client" else (server, client)
        if shaken:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(client.do_handshake)
                nursery.start_soon(server.do_handshake)
        peer = Peer(other)
        sent, received, can_send = b"", bytearray(), False

        async def call(subject: Any = subject, received: bytearray = received) -> None:
            received += await CALLS[name](subject) or b""

        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(peer.run)
                cancelled = await cancelled_at(step, call)
                if name == "send_all" and not cancelled:
                    sent += PAYLOAD
                try:
                    await subject.send_all(b"after")
                    sent, can_send = sent + b"after", True
                except (trio.BrokenResourceError, trio.ClosedResourceError):
                    pass
                try:
                    while len(received) < len(b"one two three"):
                        received += await subject.receive_some()
                    complete = True
                except (trio.BrokenResourceError, trio.ClosedResourceError):
                    complete = False
                await subject.aclose()
        assert b"one two three".startswith(received)
        if can_send:
            assert complete
            assert (peer.received, peer.end) == (sent, "clean")
        else:
            assert cancelled or name in ("send_eof", "aclose")
            assert (PAYLOAD if name == "send_all" else b"").startswith(peer.received)
        if not cancelled and name != "aclose":
            assert complete
            assert peer.end == "clean"
        if step == 0 and name != "aclose":
            assert cancelled
            assert can_send, "a caller that was cancelled before it began has broken the stream"
        step += 1
    assert step > 1
