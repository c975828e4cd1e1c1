"""One worker of a tunnel service: serves the listening sockets that the service has opened.

It takes orders only from the service, over the control socket with which it was started, and ends
with the service.
"""

import json
import math
import pickle
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Final

import trio

from hybridkex.apps.tunnel.config import TunnelConfig, TunnelSettings
from hybridkex.apps.tunnel.metrics import TunnelMetrics
from hybridkex.apps.tunnel.server import TunnelServer
from hybridkex.apps.tunnel.sockets import Listening
from hybridkex.errors import HybridkexError
from hybridkex.json_text import load_json
from hybridkex.machine import leaves, refusal

MOST_LINE: Final = 1 << 24
"""The maximum length of a message in bytes."""


@dataclass(frozen=True)
class Orders:
    """The start parameters of a worker.

    Args:
        recipe: makes the settings of the service.
        listening: the descriptors of the listening sockets, by the names of the tunnels.
        workers: how many workers share the limits.
    """

    recipe: Callable[[], TunnelSettings]
    listening: Mapping[str, tuple[int, ...]]
    workers: int

    def encoded(self) -> bytes:
        """Encode for the control socket."""
        data = pickle.dumps(self)
        return len(data).to_bytes(4, "big") + data


def read_orders(control: socket.socket) -> Orders:
    """Read the orders from a blocking control socket.

    They can be unpickled because only the process that started this one can send them.

    Raises:
        EOFError: the service has ended.
    """
    size = int.from_bytes(_exactly(control, 4), "big")
    found = pickle.loads(_exactly(control, size))
    assert isinstance(found, Orders)
    return found


def _exactly(control: socket.socket, size: int) -> bytes:
    data = control.recv(size, socket.MSG_WAITALL)
    if len(data) < size:
        raise EOFError
    return data


async def run_worker(control: socket.socket, orders: Orders, settings: TunnelSettings) -> None:
    """Serve until the service closes this worker, or ends."""
    stream = trio.SocketStream(trio.socket.from_stdlib_socket(control))
    await _Worker(stream, orders).run(settings)


class _Worker:
    def __init__(self, stream: trio.SocketStream, orders: Orders) -> None:
        self._stream = stream
        self._orders = orders
        self._saying = trio.Lock()
        self._metrics = TunnelMetrics()
        self._go = trio.Event()
        self._server = TunnelServer(self._metrics, self._adopt, self._go)

    async def run(self, settings: TunnelSettings) -> None:
        share = [
            replace(
                one, max_connections=one.max_connections // self._orders.workers, port_file=None
            )
            for one in settings.tunnels
        ]
        try:
            async with trio.open_nursery() as nursery:
                await nursery.start(self._serve, share, nursery.cancel_scope)
                nursery.start_soon(self._obey)
                await self._send(ready=True)
        except Exception as error:
            reason = next(leaves(error))
            said = str(reason) if isinstance(reason, HybridkexError) else refusal(reason)
            await self._send(error=said or repr(reason))
            if said is None:
                raise
        await self._send(metrics=samples(self._metrics))

    async def _serve(
        self,
        tunnels: list[TunnelConfig],
        scope: trio.CancelScope,
        *,
        task_status: trio.TaskStatus[None],
    ) -> None:
        await self._server.run(tunnels, task_status=task_status)
        scope.cancel()

    async def _adopt(self, config: TunnelConfig) -> Listening:
        listeners = [
            trio.SocketListener(trio.socket.from_stdlib_socket(socket.socket(fileno=descriptor)))
            for descriptor in self._orders.listening[config.name]
        ]
        return Listening(config.local, listeners, owned=False)

    async def _send(self, **fields: object) -> None:
        with suppress(trio.BrokenResourceError):
            async with self._saying:
                await self._stream.send_all(json.dumps(fields).encode() + b"\n")

    async def _obey(self) -> None:
        async for message in messages(self._stream):
            if "go" in message:
                self._go.set()
            if "close" in message:
                grace = message["close"]
                self._server.close(math.inf if grace is None else grace)
                self._go.set()
                await self._server.closed.wait()
                await self._send(closed=True)
            if "metrics" in message:
                await self._send(metrics=samples(self._metrics))
        self._server.close(0)  # The service is gone.
        self._go.set()


async def messages(stream: trio.SocketStream) -> Any:
    """The messages from a control socket, until it ends."""
    held = bytearray()
    while True:
        try:
            data = await stream.receive_some(1 << 16)
        except trio.BrokenResourceError:
            return
        if not data or len(held) > MOST_LINE:
            return
        held += data
        *lines, rest = held.split(b"\n")
        held = bytearray(rest)
        for line in lines:
            yield load_json(bytes(line))


def samples(metrics: TunnelMetrics) -> list[Any]:
    """All metrics as name, help, type, and samples of name, labels and value."""
    return [
        [
            family.name,
            family.documentation,
            family.type,
            [[one.name, one.labels, one.value] for one in family.samples],
        ]
        for family in metrics.registry.collect()
    ]
