"""Settings of links are optimised once: many tests ask for the same. Steps without threads."""

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest

from hybridkex.link import optimise, party
from hybridkex.net.event_loop import checkpoint_if_cancelled


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


@pytest.fixture
def steps_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step of a block runs where it is called. The hundreds of changes of threads in a small
    block take half of its time; test_link_port.py, test_measured.py and test_link_processes.py
    have them."""

    async def in_place(function: Callable[..., Any], *arguments: Any) -> Any:
        await checkpoint_if_cancelled()
        return function(*arguments)

    monkeypatch.setattr(party, "in_thread", in_place)
