"""Crowds at the port of a server, in short form; the long form is
``python -m interop.soak crowd``."""

import pytest

from interop.faults.services import Listen
from interop.soak import loops
from interop.soak.crowd import crowd


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "addresses"), [("whole", 1), ("half", 1), ("whole", 400)])
def test_a_crowd_delays_nobody(kind: str, addresses: int) -> None:
    """``tests/net/test_supervisor.py`` has the crowds whose order decides; here they meet TLS."""
    found = crowd(Listen, kind, 2500, addresses=addresses, stays=1)
    assert found["failed"] == 0
    assert found["slowest"] < 4.0  # 1.5 s on a machine that does nothing else


@pytest.mark.slow
@pytest.mark.parametrize("loop", loops.LOOPS)
def test_a_crowd_at_an_event_loop_delays_nobody(loop: str) -> None:
    found = loops.measure(loop, "whole", 2500)
    assert found["seconds of the server's processor"] < 0.7  # 0.2 s; 1.5 s without turns
