"""Hostile peers in short form, at every door of every command; the long form is
``python -m interop.soak hostile``."""

import pytest

from interop.faults.services import SERVICES, Service
from interop.soak.hostile import attack

DOORS = {"tunnel run": 2, "kme serve": 3}


@pytest.mark.parametrize("kind", SERVICES, ids=lambda kind: kind.name)
def test_strangers_harm_nobody(kind: type[Service]) -> None:
    found = attack(kind, seed=14, rounds=1, tell=lambda _: None)
    assert found["doors"] == DOORS.get(kind.name, 1)
