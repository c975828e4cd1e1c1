"""Shared by the agents in Python: tasks, sockets and the conversation."""

import json
import select
import socket
import sys
import threading
from collections.abc import Callable
from typing import Any, Final, Protocol, TypeVar

from interop.matrix.task import Material, Psk, Task, digest, text

__all__ = ["Blocked", "Engine", "serve"]

_SILENCE: Final = 30.0
"""Seconds to wait for a silent other end."""

T = TypeVar("T")


class Blocked(Exception):
    """The engine needs more bytes from the other end."""


class Engine(Protocol):
    """A TLS library that reads and writes memory.

    A method that would have to wait raises :exc:`Blocked`.
    """

    def feed(self, data: bytes) -> None:
        """Take bytes from the transport; empty at its end."""
        ...

    def take(self) -> bytes:
        """The bytes to send over the transport."""
        ...

    def handshake(self) -> None: ...

    def read(self) -> bytes:
        """Read application data; empty after the other end's close_notify."""
        ...

    def write(self, data: bytes) -> None: ...

    def update_keys(self) -> None: ...

    def close(self) -> None:
        """Send close_notify."""
        ...

    def report(self) -> dict[str, Any]:
        """The fields of :class:`~interop.matrix.task.Report` that the library knows."""
        ...


class _Conversation:
    def __init__(self, engine: Engine, transport: socket.socket, task: Task) -> None:
        self._engine = engine
        self._transport = transport
        self._task = task
        self._out = bytearray()
        self._ended = False

    def run(self) -> dict[str, Any]:
        try:
            return self._run()
        except Exception:
            # The other end wants to know: an alert may be there.
            self._carry()
            raise

    def _run(self) -> dict[str, Any]:
        task, engine = self._task, self._engine
        self._until(engine.handshake)
        if task.first in (None, task.role):
            self._speak()
        received = self._listen()
        if task.first not in (None, task.role):
            self._speak()
        report = engine.report()
        engine.close()
        if more := self._rest():
            raise ValueError(f"{len(more)} bytes too many")
        while self._carry():
            pass
        return report | {"received": digest(received)}

    def _speak(self) -> None:
        task, engine = self._task, self._engine
        data = text(task.role, task.size)
        half = len(data) // 2
        engine.write(data[:half])
        if task.update:
            engine.update_keys()
        engine.write(data[half:])
        if task.half_close and task.first == task.role:
            engine.close()

    def _listen(self) -> bytes:
        received = bytearray()
        while len(received) < self._task.size:
            data = self._until(self._engine.read)
            if not data:
                raise ValueError(f"the end after {len(received)} bytes")
            received += data
        if self._task.half_close and self._task.first != self._task.role:
            received += self._rest()
        return bytes(received)

    def _rest(self) -> bytes:
        rest = bytearray()
        while data := self._until(self._engine.read):
            rest += data
        return bytes(rest)

    def _until(self, action: Callable[[], T]) -> T:
        while True:
            try:
                return action()
            except Blocked:
                if self._ended:
                    raise EOFError("the transport ended without close_notify") from None
            self._carry(wait_for_input=True)

    def _carry(self, *, wait_for_input: bool = False) -> bool:
        """Move bytes in both directions once; returns whether there is more to send."""
        self._out += self._engine.take()
        if not wait_for_input and not self._out:
            return False
        readers = [self._transport] if wait_for_input else []
        writers = [self._transport] if self._out else []
        readable, writable, _ = select.select(readers, writers, [], _SILENCE)
        if not readable and not writable:
            raise TimeoutError(f"nothing for {_SILENCE:g} seconds")
        if writable:
            sent = self._transport.send(self._out[: 1 << 16])
            del self._out[:sent]
        if readable:
            data = self._transport.recv(1 << 16)
            self._ended = not data
            self._engine.feed(data)
        return bool(self._out)


def _talk(engine: Engine, transport: socket.socket, task: Task) -> dict[str, Any]:
    with transport:
        transport.setblocking(False)
        transport.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
        return _Conversation(engine, transport, task).run()


def _run(task: Task, configure: Callable[[Task], Callable[[], Engine]]) -> list[dict[str, Any]]:
    connect = configure(task)
    if task.role == "client":
        address = ("127.0.0.1", task.port)
        return [
            _talk(connect(), socket.create_connection(address, _SILENCE), task)
            for _ in range(task.connections)
        ]
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(_SILENCE)
        _say(id=task.id, listening=listener.getsockname()[1])
        return [_talk(connect(), listener.accept()[0], task) for _ in range(task.connections)]


_saying = threading.Lock()


def _say(**answer: Any) -> None:
    with _saying:
        print(json.dumps(answer), flush=True)


def _parse(line: str) -> Task:
    values = json.loads(line)
    for name, kind in (*((name, Material) for name in ("own", "expected", "other")), ("psk", Psk)):
        values[name] = values[name] and kind(**values[name])
    for name in ("groups", "suites", "alpn"):
        values[name] = tuple(values[name])
    return Task(**values)


def _answer(task: Task, configure: Callable[[Task], Callable[[], Engine]]) -> None:
    try:
        _say(id=task.id, reports=_run(task, configure))
    except Exception as error:
        _say(id=task.id, error=f"{type(error).__name__}: {error}")


def serve(version: str, configure: Callable[[Task], Callable[[], Engine]]) -> None:
    """Run an agent.

    Args:
        version: of the library.
        configure: makes of a task what makes an engine for each of its connections in turn.
    """
    _say(version=version)
    for line in sys.stdin:
        threading.Thread(target=_answer, args=(_parse(line), configure), daemon=True).start()
