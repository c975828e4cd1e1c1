"""Calls in groups: who is in a group, and what becomes of a caller that is cancelled."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
import trio
import trio.testing

from hybridkex.errors import KeySourceUnavailable
from hybridkex.qkd.call_queue import Call, CallQueue


class Desk:
    """Carries out groups, each when the test lets it."""

    def __init__(self, most: int = 100) -> None:
        self.groups: list[list[Call[Any]]] = []
        self.gate = trio.Event()
        self.failure: Exception | None = None
        self.queue = CallQueue(self.carry_out, most)

    async def carry_out(self, group: list[Call[Any]]) -> None:
        self.groups.append(group)
        for call in group:
            call.succeed(call.operation())
        await self.gate.wait()
        if self.failure is not None:
            for call in group:
                call.fail(self.failure)


def adding(to: list[int], number: int) -> Callable[[], int]:
    def operation() -> int:
        to.append(number)
        return number

    return operation


async def test_what_arrives_during_a_group_is_the_next_group() -> None:
    desk, done, answers = Desk(), list[int](), dict[int, int]()

    async def call(number: int) -> None:
        answers[number] = await desk.queue.run(adding(done, number))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(call, 0)
        await trio.testing.wait_all_tasks_blocked()
        for number in range(1, 8):
            nursery.start_soon(call, number)
            await trio.testing.wait_all_tasks_blocked()  # in this order
        assert answers == {}, "no answer before the group is through"
        desk.gate.set()
    assert [len(group) for group in desk.groups] == [1, 7]
    assert done == list(range(8))
    assert answers == {number: number for number in range(8)}
    await desk.queue.idle()


async def test_a_group_is_bounded_by_the_size_of_its_calls() -> None:
    desk, done = Desk(most=10), list[int]()
    desk.gate.set()
    sizes = (4, 6, 1, 50, 0, 9, 2)
    async with trio.open_nursery() as nursery:

        async def call(number: int) -> None:
            await desk.queue.run(adding(done, number), size=sizes[number])

        for number in range(len(sizes)):
            nursery.start_soon(call, number)
    assert sorted(done) == list(range(len(sizes)))
    for group in desk.groups:
        assert len(group) == 1 or sum(call.size for call in group) <= 10


@pytest.mark.parametrize("fails", [False, True])
async def test_a_cancelled_caller_withdraws_a_waiting_call_and_takes_back_a_begun_one(
    fails: bool,
) -> None:
    desk, done, undone = Desk(), list[int](), list[int]()
    if fails:
        desk.failure = KeySourceUnavailable("the disk is full")
    scopes = [trio.CancelScope() for _ in range(3)]
    answers = list[int]()

    async def call(number: int) -> None:
        with scopes[number]:
            try:
                answers.append(
                    await desk.queue.run(adding(done, number), undo=undone.append, writes=True)
                )
            except KeySourceUnavailable:
                answers.append(-number)

    async with trio.open_nursery() as nursery:
        for number in range(3):
            nursery.start_soon(call, number)
            await trio.testing.wait_all_tasks_blocked()
        scopes[0].cancel()  # is carried out
        scopes[1].cancel()  # waits
        await trio.testing.wait_all_tasks_blocked()
        desk.gate.set()
    assert done == [0, 2], "the waiting call was withdrawn"
    assert undone == ([0, 2] if fails else [0])
    assert answers == ([-2] if fails else [2])


@pytest.mark.parametrize("error", [MemoryError(), ValueError("a bug")], ids=repr)
async def test_an_unforeseen_error_ends_no_more_than_its_group(error: Exception) -> None:
    raised = [error]

    async def carry_out(group: list[Call[Any]]) -> None:
        await trio.lowlevel.checkpoint()
        if raised:
            raise raised.pop()
        for call in group:
            call.succeed(call.operation())

    queue = CallQueue(carry_out, 100)
    with pytest.raises(type(error)):
        await queue.run(lambda: 1)
    assert await queue.run(lambda: 2) == 2
    await queue.idle()


@pytest.mark.parametrize("turns", range(5))
def test_a_queue_whose_worker_somebody_cancels_goes_on(turns: int) -> None:
    """On asyncio, a program can cancel all tasks of its loop; no call is left without an end."""
    undone: list[int] = []

    async def carry_out(group: list[Call[Any]]) -> None:
        for call in group:
            call.succeed(call.operation())
        await asyncio.sleep(0)

    async def main() -> None:
        queue, spared = CallQueue(carry_out, 1), set[Any]()
        before = asyncio.all_tasks()
        for number in range(3):
            spared.add(asyncio.create_task(queue.run(lambda one=number: one, undo=undone.append)))
        await asyncio.sleep(0)
        for _ in range(turns):
            await asyncio.sleep(0)
        for task in asyncio.all_tasks() - before - spared:
            task.cancel()
        for found in await asyncio.gather(*spared, return_exceptions=True):
            assert isinstance(found, int | KeySourceUnavailable)
        await queue.idle()
        assert await queue.run(lambda: 7) == 7
        await queue.idle()

    asyncio.run(main(), debug=True)


def test_a_caller_that_is_cancelled_over_and_over_takes_its_call_back() -> None:
    async def main() -> None:
        begun, gate, undone = asyncio.Event(), asyncio.Event(), list[int]()

        async def carry_out(group: list[Call[Any]]) -> None:
            begun.set()
            await gate.wait()
            for call in group:
                call.succeed(call.operation())

        queue, before = CallQueue(carry_out, 1), asyncio.all_tasks()
        caller = asyncio.create_task(queue.run(lambda: 5, undo=undone.append))
        await begun.wait()
        kept = asyncio.all_tasks() - before - {caller}  # the worker
        for _ in range(4):
            for task in asyncio.all_tasks() - before - kept:
                task.cancel()
            await asyncio.sleep(0)
        gate.set()
        await asyncio.wait((caller,))
        assert caller.cancelled()
        assert undone == [5]

    asyncio.run(main(), debug=True)
