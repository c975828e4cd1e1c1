"""Which connection is closed at the limit, and what that costs."""

import random
import socket
from typing import Any, cast

import pytest

from hybridkex.net.budget import Connection
from hybridkex.net.pending import PendingConnections


class Speaking:
    """A connection that has sent something."""

    is_silent = False

    def __init__(self, address: str) -> None:
        self.address = address


def speaking(address: str) -> Connection:
    return cast(Connection, Speaking(address))


@pytest.mark.parametrize("seed", range(8))
def test_the_largest_crowd_leaves_first(seed: int) -> None:
    """Whatever was added, taken and removed before."""
    chosen = random.Random(seed)
    pending = PendingConnections[Any](lambda _: 0, 30)
    here: dict[str, list[Connection]] = {}
    for _ in range(2000):
        connection = speaking(str(int(chosen.expovariate(0.2))))
        pending.add(connection, None)
        here.setdefault(connection.address, []).append(connection)
        if chosen.random() < 0.3:
            address = chosen.choice([one for one, waiting in here.items() if waiting])
            assert pending.take(address)[0] is here[address].pop()
        leaving = pending.crowded_out()
        assert (leaving is not None) == (sum(map(len, here.values())) > 30)
        if leaving is not None:
            most = max(map(len, here.values()))
            assert len(here[leaving[0].address]) == most
            assert here[leaving[0].address].pop(0) is leaving[0]
        assert len(pending) == sum(map(len, here.values()))
    while (leaving := pending.remove()) is not None:
        here[leaving[0].address].remove(leaving[0])
    assert not any(here.values())


def test_a_crowd_of_many_addresses_costs_no_more_than_of_one() -> None:
    """A new connection at the limit does not make the server look at all pending ones."""
    looks = 0

    def held(_: str) -> int:
        nonlocal looks
        looks += 1
        return 0

    pending = PendingConnections[Any](held, 2000)
    for number in range(4000):
        pending.add(speaking(str(number)), None)
        leaving = pending.crowded_out()
        if leaving is not None:
            assert leaving[0].address == str(number - 2000)  # the oldest
    assert looks < 5 * 4000


def test_the_silent_leave_before_those_who_have_spoken() -> None:
    """Of two addresses with as many connections."""
    pairs = [socket.socketpair() for _ in range(8)]

    class Silent(Speaking):
        is_silent = True

        def __init__(self, number: int) -> None:
            super().__init__(f"silent {number}")
            self.fileno = pairs[number][0].fileno

    pending = PendingConnections[Any](lambda _: 0, 4)
    pending.add(speaking("early"), None)
    for number in range(8):
        pending.add(cast(Connection, Silent(number)), None)
        leaving = pending.crowded_out()
        assert leaving is None or leaving[0].address == f"silent {number - 3}"
        assert (leaving is None) == (number < 3)
    left = [one[0].address for one in iter(pending.remove, None)]
    assert left == [*(f"silent {number}" for number in range(5, 8)), "early"]
    for pair in pairs:
        for one in pair:
            one.close()
