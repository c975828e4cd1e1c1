"""Settings of links are optimised once: many tests ask for the same."""

from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest

from hybridkex.link import optimise


@pytest.fixture(scope="session", autouse=True)
def _each_optimum_once() -> Iterator[None]:
    search = optimise.optimise
    known = cache(search)

    def optimum(*positional: Any, **named: Any) -> optimise.Optimum | None:
        try:
            hash((*positional, *named.values()))
        except TypeError:  # wrong arguments
            return search(*positional, **named)
        return known(*positional, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optimise, "optimise", optimum)
        yield
