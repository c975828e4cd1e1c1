"""Clocks that a caller gives: whatever they say, a connection goes on or ends with an error."""

import math
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest

from benchmarks.engines import Pair
from hybridkex import ClientConfig, DevCa, ServerConfig, TrustStore
from hybridkex.errors import HybridkexError, InternalError
from hybridkex.tls.session import MemoryTicketStore
from hybridkex.tls.tickets import CookieProtector, TicketIssuer

CA = DevCa.create(algorithm="ed25519")
TRUST, IDENTITY = TrustStore((CA.certificate,)), CA.issue("localhost", algorithm="ed25519")

IMPOSSIBLE: list[Any] = [
    *(math.nan, math.inf, -math.inf, 1e12, -1e12, 1e300, -1.0, -1e-9, 2.0**63, 253_402_300_800),
    *(10**400, -(2**40), 2**64, None, "now", b"1", True, 1j, (), datetime.now(UTC)),
    *(Decimal(1), Fraction(1)),
]


def raising() -> float:
    raise OSError("the clock is gone")


def clocks() -> list[Callable[[], Any]]:
    return [raising, *(lambda value=value: value for value in IMPOSSIBLE)]


def configs(ours: Any, theirs: Any) -> tuple[ClientConfig, ServerConfig]:
    client = ClientConfig(
        verifier=TRUST,
        identity=IDENTITY,
        ticket_store=MemoryTicketStore(clock=ours),
        clock=ours,
    )
    server = ServerConfig(
        identities=(IDENTITY,),
        client_verifier=TRUST,
        tickets=TicketIssuer(clock=theirs),
        cookies=CookieProtector(clock=theirs),
        clock=theirs,
    )
    return client, server


@pytest.mark.parametrize("side", ["client", "server"])
@pytest.mark.parametrize("clock", clocks())
def test_a_clock_that_does_not_say_what_time_it_is(clock: Any, side: str) -> None:
    pair = Pair(*configs(*((clock, time.time) if side == "client" else (time.time, clock))))
    with pytest.raises(InternalError, match="the clock of our configuration") as caught:
        pair.handshake()
    assert "{" not in str(caught.value)


@pytest.mark.parametrize("side", ["client", "server"])
def test_a_clock_that_fails_later(side: str) -> None:
    """At each reading in turn, of two connections with tickets."""
    failed = 0
    for turn in range(40):
        readings = iter(range(1000))

        def clock(turn: int = turn, readings: Any = readings) -> float:
            return math.nan if next(readings) == turn else time.time()

        both = configs(*((clock, time.time) if side == "client" else (time.time, clock)))
        told = ""
        try:
            for _ in range(2):
                pair = Pair(*both).handshake()
                pair.server.send_data(b"data")
                pair.carry()
        except HybridkexError as error:
            failed, told = failed + 1, str(error)
        reached = next(readings) > turn
        assert ("the clock of our configuration" in told) is reached
    assert failed >= 4


def test_the_years_that_a_clock_may_say() -> None:
    client, _ = configs(lambda: 0, time.time)
    assert client.clock() == 0
    client, _ = configs(lambda: 253_402_300_799.5, time.time)
    assert client.clock() == 253_402_300_799.5
    assert ClientConfig(verifier=TRUST).clock is time.time


def test_a_clock_stays_what_it_is() -> None:
    """Copies of a configuration are equal, however often they are made."""
    client, server = configs(time.monotonic, time.monotonic)
    assert replace(client) == client
    assert replace(server, tickets=server.tickets) == server
