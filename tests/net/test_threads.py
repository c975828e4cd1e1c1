"""Blocking calls where the system allows no thread or has no memory for one."""

import _thread
import asyncio
import contextlib
import errno
import os
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import trio
from trio._core._wakeup_socketpair import WakeupSocketpair

from hybridkex.cli import main
from hybridkex.net import event_loop, threads
from hybridkex.net.event_loop import in_thread
from hybridkex.net.threads import NoThread

Run = Callable[[Callable[[], Awaitable[Any]]], Any]


@pytest.fixture(params=["trio", "asyncio"])
def run(request: pytest.FixtureRequest) -> Run:
    if request.param == "trio":
        return trio.run
    return lambda function: asyncio.run(function())  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def fresh_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "_workers", threads._Workers(threads.MOST))
    monkeypatch.setattr(threads, "_slow", threads._Workers(threads.MOST_SLOW))


def refuse(*_: Any) -> Any:
    raise RuntimeError("can't start new thread")


def test_a_worker_stays_when_no_thread_can_be_started(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def calls() -> None:
        first = await in_thread(threading.get_ident)
        monkeypatch.setattr(_thread, "start_new_thread", refuse)
        assert await in_thread(threading.get_ident) == first
        assert await in_thread(lambda: 7) == 7

    run(calls)


def test_no_thread_at_all(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_thread, "start_new_thread", refuse)

    async def call() -> None:
        with pytest.raises(NoThread, match="no more threads"):
            await in_thread(time.sleep, 0)
        monkeypatch.undo()
        monkeypatch.setattr(threads, "_workers", threads._workers)
        assert await in_thread(lambda: 7) == 7

    run(call)


def test_all_workers_are_busy(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call waits for a worker; then it says why it was not made, and is not made later."""
    monkeypatch.setattr(event_loop, "THREAD_SECONDS", 0.2)
    go, made = threading.Event(), list[int]()

    async def calls() -> None:
        with pytest.raises(TimeoutError):
            async with event_loop.time_limit(0.05):
                await in_thread(go.wait, 20, abandon=True)
        monkeypatch.setattr(_thread, "start_new_thread", refuse)
        with pytest.raises(NoThread):
            await in_thread(made.append, 1)
        go.set()
        assert await in_thread(lambda: 7) == 7
        assert not made

    run(calls)


def test_a_thread_that_dies_before_its_first_line(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``threading.Thread.start`` waits for ever for a thread that had no memory to begin."""
    monkeypatch.setattr(threads, "START_SECONDS", 0.05)

    async def call() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(_thread, "start_new_thread", lambda *_: 1)
            with pytest.raises(NoThread):
                await in_thread(time.sleep, 0)
        assert await in_thread(lambda: 7) == 7

    run(call)


def test_a_worker_outlives_what_it_runs(run: Run) -> None:
    def fails(error: BaseException) -> None:
        raise error

    async def calls() -> None:
        await in_thread(threading.get_ident)
        alive = threads._workers._alive
        for error in (MemoryError(), ValueError("x"), SystemExit(3), KeyboardInterrupt()):
            with pytest.raises(type(error)):
                await in_thread(fails, error)
        assert threads._workers._alive >= alive
        assert await in_thread(lambda: 7) == 7

    run(calls)


def test_slow_calls_hold_no_worker_of_the_others(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many look-ups of names as there are workers, whose DNS server does not answer."""
    go, begun = threading.Event(), threading.Semaphore(0)

    def look_up() -> None:
        begun.release()
        go.wait(20)

    async def hang() -> None:
        with contextlib.suppress(TimeoutError):
            async with event_loop.time_limit(0.2):
                await in_thread(look_up, abandon=True, slow=True)

    async def calls() -> None:
        if event_loop.on_trio():
            async with trio.open_nursery() as nursery:
                for _ in range(threads.MOST):
                    nursery.start_soon(hang)
        else:
            await asyncio.gather(*(hang() for _ in range(threads.MOST)))
        try:
            assert all(begun.acquire(timeout=20) for _ in range(threads.MOST))
            assert await in_thread(lambda: 7) == 7
            assert await in_thread(lambda: 8, slow=True) == 8
        finally:
            go.set()

    run(calls)


def test_the_number_of_workers_is_bounded(run: Run) -> None:
    seen: set[int] = set()

    def work() -> None:
        seen.add(threading.get_ident())
        time.sleep(0.001)

    async def calls() -> None:
        if event_loop.on_trio():
            async with trio.open_nursery() as nursery:
                for _ in range(300):
                    nursery.start_soon(in_thread, work)
        else:
            await asyncio.gather(*(in_thread(work) for _ in range(300)))

    run(calls)
    assert 1 < len(seen) <= threads.MOST


def test_the_child_of_a_fork_has_workers_of_its_own() -> None:
    code = (
        "import os, trio; from hybridkex.net.event_loop import in_thread\n"
        "trio.run(in_thread, os.getpid)\n"
        "if child := os.fork(): raise SystemExit(os.waitpid(child, 0)[1])\n"
        "os._exit(trio.run(in_thread, os.getpid) != os.getpid())"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=30, check=False).returncode == 0


def test_a_trio_that_has_failed_does_not_wait_for_ever() -> None:
    """With no memory for its own tasks trio runs nothing more for other threads, and cancels."""

    def slow() -> None:
        time.sleep(0.3)

    async def call() -> None:
        token = trio.lowlevel.current_trio_token()

        def fail() -> None:
            raise MemoryError

        async with trio.open_nursery() as nursery:
            nursery.start_soon(in_thread, slow)
            await trio.sleep(0.05)
            token.run_sync_soon(fail)
            await trio.sleep(60)

    began = time.monotonic()
    with pytest.raises(trio.TrioInternalError):
        trio.run(call)
    assert time.monotonic() - began < 20


def _internal() -> BaseException:
    error = trio.TrioInternalError("internal error in Trio")
    error.__cause__ = ExceptionGroup("", [AssertionError(), ExceptionGroup("", [MemoryError()])])
    return error


@pytest.mark.parametrize("code", ["ENOBUFS", "ENOMEM", "EPERM"])
def test_a_loop_that_could_not_be_woken(code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its wake-up is a send(2), which the system may refuse for a moment; it is tried again."""
    monkeypatch.setattr(threads, "RETRY_SECONDS", 0.001)
    wake = WakeupSocketpair.wakeup_thread_and_signal_safe
    refusals = iter(range(3))

    def refused(self: WakeupSocketpair) -> None:
        if threading.current_thread() is not threading.main_thread():
            for _ in refusals:
                number = getattr(errno, code)
                raise OSError(number, os.strerror(number))
        wake(self)

    monkeypatch.setattr(WakeupSocketpair, "wakeup_thread_and_signal_safe", refused)

    async def call() -> None:
        with trio.fail_after(5):
            await in_thread(time.sleep, 0.01)

    trio.run(call)
    assert next(refusals, None) is None


def test_a_result_that_cannot_be_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop sleeps for good; what is left is to interrupt the process."""
    monkeypatch.setattr(threads, "RETRY_SECONDS", 0.001)
    monkeypatch.setattr(threads, "_interrupted", False)

    async def call() -> None:
        token = trio.lowlevel.current_trio_token()

        def fail(_: object) -> None:
            raise MemoryError

        monkeypatch.setattr(type(token), "run_sync_soon", lambda _, call: fail(call))
        await in_thread(time.sleep, 0.01)

    with pytest.raises(KeyboardInterrupt):
        trio.run(call)
    assert threads.has_interrupted()


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MemoryError(), "no more memory"),
        (RuntimeError("can't start new thread"), "no more threads"),
        (_internal(), "no more memory"),
        (NoThread(), "no more threads"),
    ],
    ids=repr,
)
def test_a_command_says_it_in_one_line(
    error: BaseException,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(_: object) -> int:
        raise error

    monkeypatch.setattr("hybridkex.cli._run", fail)
    assert main(["doctor"]) == 1
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("error", [KeyError("x"), RuntimeError("a bug of ours")], ids=repr)
def test_a_fault_of_ours_is_not_hidden(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> int:
        raise error

    monkeypatch.setattr("hybridkex.cli._run", fail)
    with pytest.raises(type(error)):
        main(["doctor"])


def test_nobody_asks_trio_for_threads() -> None:
    """Its threads end when they are idle, and a new one may not be there when it is needed or not
    report when memory is short."""
    found = subprocess.run(
        ["grep", "-rnE", r"to_thread|threading\.Thread\(", "hybridkex", "--include=*.py"],
        cwd=os.path.dirname(os.path.dirname(os.path.dirname(__file__))),
        capture_output=True,
        text=True,
        check=False,
    )
    assert {line.split(":")[0] for line in found.stdout.splitlines()} == {
        "hybridkex/cli/progress.py",  # goes on without one
    }
