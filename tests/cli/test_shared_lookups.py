"""A name whose DNS server does not answer delays nobody who asks for another."""

import socket
import threading
from typing import Any

import pytest
import trio

from hybridkex.cli import names
from hybridkex.cli.running import run_trio

DEAD = 60
"""More than trio has threads for."""


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A DNS that answers at once, but for ``dead``; ``failing`` does not exist."""
    asked: list[str] = []
    again = threading.Event()

    def getaddrinfo(host: Any, port: Any, *rest: Any) -> Any:
        name = host if isinstance(host, str) else host.decode()
        asked.append(name)
        if name == "dead":
            again.wait(30)
        if name == "failing":
            raise socket.gaierror(socket.EAI_NONAME, "unknown")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]

    def resolve(*question: Any) -> Any:
        if question[5:] and question[5] & socket.AI_NUMERICHOST:
            raise socket.gaierror(socket.EAI_NONAME, "not a number")
        return getaddrinfo(*question)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    yield asked, again
    again.set()


async def ask(name: str, found: list[Any]) -> None:
    found += await trio.socket.getaddrinfo(name, 80)


def test_another_name_is_found_at_once(answers: Any) -> None:
    asked, again = answers

    async def main() -> None:
        dead: list[Any] = []
        async with trio.open_nursery() as nursery:
            for _ in range(DEAD):
                nursery.start_soon(ask, "dead", dead)
            await trio.testing.wait_all_tasks_blocked(0.05)
            with trio.fail_after(2):
                await ask("good", good := [])
            assert (len(good), dead) == (1, [])
            with trio.move_on_after(0.05) as scope:  # who gives up leaves it to the others
                await ask("dead", [])
            assert scope.cancelled_caught
            again.set()
        assert len(dead) == DEAD

    run_trio(main)
    assert asked.count("dead") == 1, "those who ask at the same time share one look-up"


def test_an_answer_is_used_for_a_second(answers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a failure is not: the name may be there now."""
    asked, _ = answers
    monkeypatch.setattr(names, "KEEP_SECONDS", 0.2)

    async def main() -> None:
        found: list[Any] = []
        for _ in range(3):
            await ask("good", found)
            with pytest.raises(socket.gaierror):
                await ask("failing", [])
        found.clear()  # The next answer is a list of its own.
        await ask("other", [])
        assert asked.count("good") == 1
        await trio.sleep(0.25)
        await ask("good", found)
        assert len(found) == 1

    run_trio(main)
    assert asked.count("good") == 2
    assert asked.count("failing") == 3


def test_everybody_learns_of_the_failure(answers: Any) -> None:
    async def main() -> None:
        errors: list[BaseException] = []

        async def fail() -> None:
            with pytest.raises(socket.gaierror) as raised:
                await ask("failing", [])
            errors.append(raised.value)

        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(fail)
        assert len({id(error) for error in errors}) == 5

    run_trio(main)
