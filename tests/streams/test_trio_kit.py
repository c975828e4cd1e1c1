"""Trio's own test kit for streams."""

from collections.abc import Callable

import pytest
import trio
import trio.testing


async def both(one: object, other: object) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(one)
        nursery.start_soon(other)


@pytest.mark.parametrize("shaken", [False, True], ids=["lazy", "shaken"])
@pytest.mark.parametrize(
    "transports", [trio.testing.memory_stream_pair, trio.testing.lockstep_stream_pair]
)
async def test_half_closeable_stream(
    make_pair: Callable[..., object],
    transports: Callable[[], object],
    shaken: bool,
    autojump_clock: trio.testing.MockClock,
) -> None:
    async def maker() -> object:
        pair = make_pair(transports)
        if shaken:
            await both(pair[0].do_handshake, pair[1].do_handshake)
        return pair

    async def clogged_maker() -> object:
        # As in trio's own tests: without the handshake, the receiver that is to unclog the sender
        # would have to send first, and be stuck itself.
        pair = make_pair(trio.testing.lockstep_stream_pair)
        await both(pair[0].do_handshake, pair[1].do_handshake)
        return pair

    with trio.fail_after(300):
        await trio.testing.check_half_closeable_stream(maker, clogged_maker)
