"""Worker threads for blocking calls, for a process that may run out of threads and memory.

Workers stay once they have started, and take further calls. A server that has made one call can
therefore make the next one even while the system allows no new thread (pthread_create(3): EAGAIN)
and no new memory: the call waits until a worker is free.

Starting a worker never blocks indefinitely, unlike ``threading.Thread.start``, which waits for the
new thread to report; a thread that finds no memory for its first frame never does. Here the call
waits in a queue that all workers share, and :meth:`Call.withdraw` takes it back.
"""

import _thread
import contextlib
import os
import time
from collections.abc import Callable
from contextvars import copy_context
from queue import SimpleQueue
from typing import Any, Final

from hybridkex.errors import HybridkexError
from hybridkex.machine import NO_THREAD

MOST: Final = 40
"""Workers at once, as many as trio allows by default."""
MOST_SLOW: Final = 400
"""Workers at once for calls that may block for minutes, such as look-ups of names."""
START_SECONDS: Final = 1.0
"""Seconds to wait for a new worker to report that it runs."""
RETRY_SECONDS: Final = 0.05
RETRIES: Final = 100
"""Attempts to report a result while memory is short; after the last one, the process is
interrupted as by Ctrl-C."""


class NoThread(HybridkexError):
    """No thread was free for a blocking call, and none could be started."""

    def __init__(self) -> None:
        super().__init__(NO_THREAD)


class Call:
    """A blocking call, to be run by a worker.

    Args:
        function: the function; it sees the context variables of the caller.
        report: called in the worker when the function has ended.
    """

    def __init__(self, function: Callable[[], Any], report: Callable[[], object]) -> None:
        self._function: Callable[[], Any] | None = function
        self._report = report
        self._context = copy_context()
        self._taken = _thread.allocate_lock()
        self._withdrawn = False
        self.has_ended = False
        """Whether the function has ended; :meth:`result` says how."""
        self._value: Any = None
        self._error: BaseException | None = None

    def withdraw(self) -> bool:
        """Take the call back; false if a worker has begun with it."""
        if not self._withdrawn:
            self._withdrawn = self._taken.acquire(blocking=False)
        return self._withdrawn

    def result(self) -> Any:
        """The return value of the function; raises its exception."""
        if self._error is not None:
            error, self._error = self._error, None
            try:
                raise error
            finally:
                del error
        return self._value

    def _run(self) -> None:
        if not self._taken.acquire(blocking=False):
            return
        function, self._function = self._function, None
        assert function is not None
        try:
            self._value = self._context.run(function)
        except MemoryError:
            self._error = MemoryError()  # without the frames that hold memory
        except BaseException as error:  # the caller handles it
            self._error = error
        self.has_ended = True
        del function
        for _ in range(RETRIES):
            try:
                self._report()
            except (MemoryError, OSError):  # OSError: no memory for the loop's wake-up, a send(2)
                time.sleep(RETRY_SECONDS)
            except Exception:  # the loop that asked has ended
                return
            else:
                return
        # The loop sleeps, and only a signal can wake it: interrupt the process, as by Ctrl-C.
        global _interrupted  # noqa: PLW0603
        _interrupted = True
        _thread.interrupt_main()


_interrupted = False


def has_interrupted() -> bool:
    """Whether the process was interrupted from here, for lack of memory, and not by Ctrl-C."""
    return _interrupted


class _Workers:
    def __init__(self, most: int) -> None:
        self._most = most
        self._calls: SimpleQueue[Call] = SimpleQueue()
        self._lock = _thread.allocate_lock()
        self._alive = 0
        self._free = 0
        """The number of idle workers, minus the number of queued calls."""

    def run(self, call: Call) -> bool:
        with self._lock:
            start = self._free < 1 and self._alive < self._most
            self._free -= 1
        sure = not start or self._start()
        if not sure:
            with self._lock:
                alone = self._alive == 0
                self._free += alone
            if alone:
                raise NoThread
        self._calls.put(call)
        return sure

    def _start(self) -> bool:
        """Start a worker; false if it did not report that it runs."""
        begun = _thread.allocate_lock()
        begun.acquire()
        try:
            _thread.start_new_thread(self._work, (begun,))
        except (RuntimeError, MemoryError):
            return False
        return begun.acquire(timeout=START_SECONDS)

    def _work(self, begun: Any) -> None:
        with self._lock:
            self._alive += 1
            self._free += 1
        begun.release()
        while True:
            # No call ends its worker, and no reference to a call remains here.
            with contextlib.suppress(BaseException):
                self._calls.get()._run()
            with self._lock:
                self._free += 1


_workers, _slow = _Workers(MOST), _Workers(MOST_SLOW)


def run(call: Call, *, slow: bool = False) -> bool:
    """Hand a call to a worker. The call waits while no worker is free and none can be started.

    Args:
        call: the call.
        slow: it may block for minutes, and holds no worker of the other calls.

    Returns:
        True if the call is certain to run once earlier calls have ended; false if it depends on a
        new worker that did not report.

    Raises:
        NoThread: there is no worker at all.
    """
    return (_slow if slow else _workers).run(call)


def _forget() -> None:
    """Make new workers in the child of a fork, which has none of its parent's threads."""
    global _workers, _slow
    _workers, _slow = _Workers(MOST), _Workers(MOST_SLOW)


os.register_at_fork(after_in_child=_forget)
