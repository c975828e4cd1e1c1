"""The interface of a peer of the matrix, and the peers that are agents."""

import json
import subprocess
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol

import trio

from interop.matrix.task import Report, Task

__all__ = ["Missing", "Peer", "PeerFailed", "Running", "agent"]


_ROOT: Final = Path(__file__).parents[2]
"""The package of the agents in Python."""


class Missing(Exception):
    """The peer is not on this machine; the text says how to get it."""


class PeerFailed(Exception):
    """The peer's error about a connection that it could not establish or keep."""


class Running(Protocol):
    """A peer that is available."""

    @property
    def version(self) -> str:
        """The versions of the peer and of its TLS library."""
        ...

    async def connect(self, task: Task) -> list[Report]:
        """Run the client of a task.

        Raises:
            PeerFailed: with the peer's reason.
        """
        ...

    async def serve(
        self, task: Task, *, task_status: trio.TaskStatus[int] = trio.TASK_STATUS_IGNORED
    ) -> list[Report]:
        """Run the server of a task; reports its port when it starts.

        Raises:
            PeerFailed: with the peer's reason.
        """
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class Peer:
    """One implementation.

    Args:
        name: for people.
        open: finds it, and starts it where it is one process for all tasks; raises
            :exc:`Missing`.
        lacks: why it cannot do what it cannot do. A key is a pattern (``fnmatch``) for the peer's
            role and one of a case's needs, for example ``server group MLKEM*`` or ``* exporter``.
        http: whether it speaks HTTP/1.1 instead of a stream of bytes.
        page: what our HTTP server gives to a GET.
        note: what a reader of the results should know.
    """

    name: str
    open: Callable[[], AbstractAsyncContextManager[Running]]
    lacks: Mapping[str, str]
    http: bool = False
    page: bytes = b""
    note: str = ""


@dataclass
class _RunningAgent:
    """An agent's process, and the tasks that wait for its answers."""

    version: str
    _input: trio.abc.SendStream
    _waiting: dict[int, trio.MemorySendChannel[dict[str, Any]]] = field(default_factory=dict)
    _sending: trio.Lock = field(default_factory=trio.Lock)

    async def connect(self, task: Task) -> list[Report]:
        return await self._run(task, trio.TASK_STATUS_IGNORED)

    async def serve(
        self, task: Task, *, task_status: trio.TaskStatus[int] = trio.TASK_STATUS_IGNORED
    ) -> list[Report]:
        return await self._run(task, task_status)

    async def _run(self, task: Task, task_status: trio.TaskStatus[int]) -> list[Report]:
        send, receive = trio.open_memory_channel[dict[str, Any]](4)
        self._waiting[task.id] = send
        async with self._sending:
            await self._input.send_all(json.dumps(asdict(task)).encode() + b"\n")
        async for answer in receive:
            if "listening" in answer:
                task_status.started(answer["listening"])
            elif "error" in answer:
                raise PeerFailed(answer["error"])
            else:
                return [_report(values) for values in answer["reports"]]
        raise PeerFailed("the agent ended")

    async def read(self, lines: AsyncIterator[dict[str, Any]]) -> None:
        """Pass on the answers until the agent ends."""
        async for answer in lines:
            if waiting := self._waiting.get(answer["id"]):
                await waiting.send(answer)
        for waiting in self._waiting.values():
            waiting.close()


def _report(values: dict[str, Any]) -> Report:
    if values.get("key_log") is not None:
        values["key_log"] = tuple(values["key_log"])
    return Report(**values)


async def _lines(stream: trio.abc.ReceiveStream) -> AsyncIterator[dict[str, Any]]:
    buffer = b""
    async for data in stream:
        *lines, buffer = (buffer + data).split(b"\n")
        for line in lines:
            yield json.loads(line)


@asynccontextmanager
async def agent(*command: str) -> AsyncIterator[Running]:
    """Run an agent for the duration of the context."""
    process = await trio.lowlevel.open_process(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=_ROOT
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        lines = _lines(process.stdout)
        with trio.fail_after(60):
            hello = await anext(lines, None)
        if hello is None:
            raise PeerFailed(f"{command[0]} ended at its start")
        running = _RunningAgent(hello["version"], process.stdin)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(running.read, lines)
            yield running
            nursery.cancel_scope.cancel()
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()
            await trio.aclose_forcefully(process.stdin)
            await trio.aclose_forcefully(process.stdout)
