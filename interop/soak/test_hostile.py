"""A short run of hostile peers, at every port of every command; the long form is
``python -m interop.soak hostile``."""

import pytest

from interop.faults.services import SERVICES, KmeLink, Service
from interop.soak.hostile import LINK_MEMBERS, MEMBERS, attack

SLOW = pytest.mark.slow
"""Of two processes; tests/link/test_link_port.py attacks its port in short form."""
PORTS = {"tunnel run": 2, "kme serve": 3, "kme link": 4}


@pytest.mark.parametrize(
    "kind",
    [pytest.param(one, marks=SLOW) if one is KmeLink else one for one in SERVICES],
    ids=lambda kind: kind.name,
)
def test_strangers_harm_nobody(kind: type[Service]) -> None:
    members = LINK_MEMBERS if kind is KmeLink else MEMBERS
    found = attack(kind, seed=14, rounds=1, tell=lambda _: None, members=members)
    assert found["ports"] == PORTS.get(kind.name, 1)
