"""Cancellation at a chosen step of a task."""

import trio


class CancelAt(trio.abc.Instrument):
    """Cancels a scope when the present task is stepped for the n-th time."""

    def __init__(self, scope: trio.CancelScope, steps: int) -> None:
        self.task = trio.lowlevel.current_task()
        self.scope = scope
        self.left = steps

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        if task is self.task:
            self.left -= 1
            if self.left == 0:
                self.scope.cancel()
