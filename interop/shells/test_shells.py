"""Random programs behave over the asyncio shell as over asyncio's own TLS; ``python -m
interop.shells`` runs thousands of them."""

import pytest

from interop.shells.programs import loops, program, verdict

PARTS = 4
"""Tests for each loop; each runs every fourth seed."""
SEEDS = 24


@pytest.mark.parametrize("loop", loops())
@pytest.mark.parametrize("part", range(PARTS))
def test_programs(loop: str, part: int) -> None:
    for seed in range(part, SEEDS, PARTS):
        made = program(seed)
        outcome = verdict(made, loops()[loop])
        assert not outcome.startswith("FAULT"), made
