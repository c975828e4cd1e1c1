"""Crowds at the port of a server, in short form; the long form is
``python -m interop.soak crowd``."""

import pytest

from interop.faults.services import Listen
from interop.soak.crowd import crowd


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "addresses"), [("whole", 1), ("half", 1), ("whole", 400)])
def test_a_crowd_delays_nobody(kind: str, addresses: int) -> None:
    """``tests/net/test_supervisor.py`` has the crowds whose order decides; here they meet TLS."""
    found = crowd(Listen, kind, 2500, addresses=addresses, stays=1)
    assert found["failed"] == 0
    assert found["slowest"] < 4.0  # 1.5 s on a machine that does nothing else
