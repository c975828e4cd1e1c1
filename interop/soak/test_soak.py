"""Each load for a few seconds; the long runs are commands (``python -m interop.soak``)."""

from interop.soak import load


async def test_idle_connections_are_small() -> None:
    found = await load.idle(400)
    assert found["connections"] == 400
    assert found["kilobytes per connection"] < 40
    assert found["sampled and alive"] == 50
    assert found["connections afterwards"] == 0
    assert found["files afterwards, more than before"] == 0


async def test_a_storm_leaves_nothing_behind() -> None:
    found = await load.storm(3)
    assert found["connections"] > 50
    assert found["growth in megabytes"] < 4
    assert found["files more"] <= 0
    # A task or two may be under way at either count; a leak would be one for every connection.
    assert found["tasks more"] < found["connections"] / 10


async def test_slow_handshakes_hold_up_nobody() -> None:
    found = await load.slowloris(100, deadline=2)
    assert found["ended by the server"] == 100
    assert found["left"] == 0
    assert found["milliseconds that others waited, at most"] < 2000


async def test_key_updates_without_end() -> None:
    found = await load.updates(200)
    assert found["what the peer heard"] != "nothing"
    assert found["left"] == 0
