"""Workers of a tunnel service: several processes that serve the same listening sockets.

The service opens the listening sockets and gives them to its workers, so that whichever worker is
free takes the next connection, and none is lost when a worker ends. New workers are started for
each configuration: when all of them are ready, the old workers accept no more connections, and end
with their last connection. A worker that ends by itself is replaced. All workers end with the
service, however it ends, because their control sockets are closed.
"""

import contextlib
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from typing import Any, Final, TypeAlias

import trio
from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric

from hybridkex.apps.tunnel.config import TunnelSettings, check_together
from hybridkex.apps.tunnel.sockets import Listening, LostNames, listen_for, write_ports
from hybridkex.apps.tunnel.worker import Orders, messages
from hybridkex.errors import ConfigError, HybridkexError
from hybridkex.machine import refusal
from hybridkex.net.address import Address
from hybridkex.text import get_logger

LOG: Final = get_logger("hybridkex.tunnel")

READY_SECONDS: Final = 60.0
"""Seconds for a worker to start, with its key sources."""
AGAIN_SECONDS: Final = 1.0
"""Seconds before a worker that ended is replaced."""
MOST_AGAIN_SECONDS: Final = 30.0
"""The maximum of these seconds, if workers keep ending."""
SURE_SECONDS: Final = 5.0
"""Seconds after the grace period until a worker that has not ended is killed."""
CLOSE_SECONDS: Final = 5.0
"""Seconds for a worker to accept no more connections when a new configuration is in force."""
SCRAPE_SECONDS: Final = 2.0
"""Seconds for a worker to send its metrics."""
CHECK_EVERY: Final = 1.0
"""Seconds between two checks of the names of Unix sockets."""

_Key: TypeAlias = tuple[Address, str]
_Sample: TypeAlias = tuple[str, tuple[tuple[str, str], ...]]


class _Worker:
    """A worker process, as the service sees it."""

    def __init__(
        self, process: trio.Process, stream: trio.SocketStream, life: socket.socket
    ) -> None:
        self.process: Final = process
        self.life: Final = life
        """Open while the worker and this process run."""
        self.pid: Final = process.pid
        self._stream = stream
        self._sending = trio.Lock()
        self._answered = trio.Event()
        """Set when the last request for its metrics was answered."""
        self._answered.set()
        self.ready = trio.Event()
        """Set when the worker is ready, or has failed to start."""
        self.closed = trio.Event()
        """Set when it accepts no more connections."""
        self.error: str | None = "a worker ended before it was ready"
        """Why it is not ready."""
        self.retired = False
        """Whether it was asked to end."""
        self.stopped = False
        """Whether it has been killed."""
        self.metrics: list[Any] = []
        """The metrics of its last answer."""

    async def listen(self) -> None:
        async with self._stream:
            async for message in messages(self._stream):
                if "ready" in message:
                    self.error = None
                    self.ready.set()
                elif "error" in message:
                    self.error = message["error"]
                elif "metrics" in message:
                    self.metrics = message["metrics"]
                    self._answered.set()
                elif "closed" in message:
                    self.closed.set()
            self._answered.set()
            self.closed.set()
            await self.process.wait()
            self.ready.set()

    async def send(self, **fields: object) -> None:
        """Send a message; the worker may be gone."""
        gone = (trio.BrokenResourceError, trio.ClosedResourceError)
        with contextlib.suppress(*gone):
            async with self._sending:
                await self._stream.send_all(json.dumps(fields).encode() + b"\n")

    def stop(self) -> None:
        self.retired = self.stopped = True
        self.process.kill()

    async def update_metrics(self) -> None:
        """Bring :attr:`metrics` up to date."""
        if self._answered.is_set():
            self._answered = trio.Event()
            # One request at a time: requests would fill the control socket of a worker that hangs,
            # and the next message to it would wait forever.
            with trio.CancelScope(shield=True):
                await self.send(metrics=True)
        with trio.move_on_after(SCRAPE_SECONDS):
            await self._answered.wait()


class WorkerPool:
    """Runs tunnels in several processes until closed, as :class:`TunnelServer` does in one.

    Args:
        command: starts a worker, with the number of its control socket as one more argument.
    """

    def __init__(self, command: Sequence[str]) -> None:
        self._command = tuple(command)
        self._settings: TunnelSettings
        self._listening: dict[_Key, Listening] = {}
        self._workers: set[_Worker] = set()
        self._current: set[_Worker] = set()
        self._gone: dict[_Sample, float] = {}
        """The final counters of workers that have ended."""
        self._changing = trio.Lock()
        self._closing = trio.Event()
        self._grace = 0.0
        self._running: trio.Nursery
        self._replacing: trio.Nursery

    async def serve(
        self,
        settings: TunnelSettings,
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Serve until :meth:`close`; reports as started once all workers are ready.

        Raises:
            ConfigError: the configuration cannot be used.
        """
        try:
            async with trio.open_nursery() as self._running:
                async with trio.open_nursery() as self._replacing:
                    await self.apply_settings(settings)
                    self._replacing.start_soon(self._keep_names)
                    task_status.started()
                    await self._closing.wait()
                    self._replacing.cancel_scope.cancel()
                for listening in self._listening.values():
                    await listening.aclose()
                await self._end()
        finally:
            for listening in self._listening.values():
                with trio.CancelScope(shield=True):
                    await listening.aclose()

    async def _end(self) -> None:
        """Wait for all workers, and kill those that do not end in time."""
        while self._workers:
            grace, self._closing = self._grace, trio.Event()
            there = list(self._workers)
            for worker in there:
                worker.retired = True
            for worker in there:
                await worker.send(close=grace)
            with trio.move_on_after(grace + SURE_SECONDS) as scope:
                while self._workers and not self._closing.is_set():  # noqa: ASYNC110
                    await trio.sleep(0.02)
            if scope.cancelled_caught:
                for worker in self._workers:
                    worker.stop()

    def close(self, grace: float) -> None:
        """Begin an orderly shutdown: no new connections, and ``grace`` seconds for open ones.
        Another call can shorten this."""
        self._grace = grace
        self._closing.set()

    def where(self, name: str) -> Address:
        """The address of a tunnel, with its actual port."""
        config = next(one for one in self._settings.tunnels if one.name == name)
        return self._listening[config.endpoint].bound

    async def apply_settings(self, settings: TunnelSettings) -> None:
        """Apply a new configuration, completely or not at all.

        Raises:
            ConfigError: it cannot be used; nothing has changed.
        """
        check_together(settings.tunnels)
        for tunnel in settings.tunnels:
            if tunnel.sole:  # even with one new worker: the old ones last as long as connections
                raise ConfigError(
                    f"{tunnel.name}: {tunnel.sole} is used by one process only, and this service "
                    "has workers until it is restarted"
                )
        async with self._changing:
            await self._apply(settings)

    async def _apply(self, settings: TunnelSettings) -> None:
        async with contextlib.AsyncExitStack() as undo:
            listening: dict[_Key, Listening] = {}
            opened = set()
            for config in settings.tunnels:
                found = self._listening.get(config.endpoint)
                if found is not None and found.reachable:
                    mode = found.set_mode(config.socket_mode)
                    if mode is not None:
                        undo.callback(_set_mode_again, found, mode)
                else:
                    found = await listen_for(config)
                    undo.push_async_callback(_close, found)
                    opened.add(config.endpoint)
                listening[config.endpoint] = found
            fresh = await self._start_ready(settings.workers, settings, listening)
            for worker in fresh:
                undo.callback(worker.stop)
            write_ports((one, listening[one.endpoint]) for one in settings.tunnels)
            undo.pop_all()
        # Nothing below can fail.
        with trio.CancelScope(shield=True):
            before, self._current = self._current, fresh & self._workers
            closed = [
                one for key, one in self._listening.items() if key not in listening or key in opened
            ]
            self._listening, self._settings = listening, settings
            for worker in before:
                worker.retired = True
            for _ in fresh - self._current:  # those that have ended already
                self._replacing.start_soon(self._replace, 0.0)
            for worker in fresh:
                await worker.send(go=True)
            for worker in before:
                await worker.send(close=None)
            with trio.move_on_after(CLOSE_SECONDS):  # a worker that hangs delays this no longer
                for worker in before:
                    await worker.closed.wait()
            for one in closed:
                await one.aclose()

    async def _start_ready(
        self, number: int, settings: TunnelSettings, listening: dict[_Key, Listening]
    ) -> set[_Worker]:
        """Start ``number`` workers, and wait until all are ready.

        Raises:
            ConfigError: a worker is not ready; all of these workers have been stopped.
        """
        found: set[_Worker] = set()
        try:
            for _ in range(number):
                found.add(await self._start(settings, listening))
            with trio.move_on_after(READY_SECONDS):
                for worker in found:
                    await worker.ready.wait()
            _check_ready(found)
        except BaseException:
            for worker in found:
                worker.stop()
            raise
        return found

    async def _start(self, settings: TunnelSettings, listening: dict[_Key, Listening]) -> _Worker:
        """Start a worker, without waiting until it is ready."""
        descriptors = {
            config.name: tuple(one.socket.fileno() for one in listening[config.endpoint].listeners)
            for config in settings.tunnels
        }
        assert settings.recipe is not None
        orders = Orders(settings.recipe, descriptors, settings.workers)
        try:
            control, process, life = await self._open(descriptors)
        except Exception as error:
            reason = refusal(error)
            if reason is None:
                raise
            raise ConfigError(f"cannot start a worker: {reason}") from error
        stream = trio.SocketStream(trio.socket.from_stdlib_socket(control))
        worker = _Worker(process, stream, life)
        self._workers.add(worker)
        self._running.start_soon(self._watch, worker)
        with contextlib.suppress(trio.BrokenResourceError):
            await stream.send_all(orders.encoded())
        return worker

    async def _open(
        self, descriptors: dict[str, tuple[int, ...]]
    ) -> tuple[socket.socket, trio.Process, socket.socket]:
        """Start a process. Returns the control socket, the process, and a socket to keep open until
        the process has ended.

        Raises:
            OSError, RuntimeError, MemoryError: there is no descriptor, process, thread or memory.
        """
        with contextlib.ExitStack() as undo:
            control, theirs = map(undo.enter_context, socket.socketpair())
            life, watched = map(undo.enter_context, socket.socketpair())
            with theirs, watched:
                process = await trio.lowlevel.open_process(
                    [*self._command, str(theirs.fileno())],
                    stdin=subprocess.DEVNULL,
                    process_group=0,  # so that the signals of a terminal reach the service alone
                    pass_fds=(
                        theirs.fileno(),
                        watched.fileno(),
                        *(one for each in descriptors.values() for one in each),
                    ),
                )
                _continue_at_end(watched, process.pid)
            undo.pop_all()
        return control, process, life

    async def _watch(self, worker: _Worker) -> None:
        """Wait until a worker has ended, and replace it if it is still needed."""
        began = trio.current_time()
        try:
            await worker.listen()
        finally:
            with trio.CancelScope(shield=True):  # cancelled: the service is over
                worker.process.kill()
                await worker.process.wait()
            worker.life.close()
            self._workers.discard(worker)
            self._keep_counters(worker)
        if worker not in self._current or worker.retired or self._closing.is_set():
            if worker.retired and not worker.stopped and worker.process.returncode:
                LOG.error("worker %d ended (%s)", worker.pid, _how(worker.process.returncode))
            return
        self._current.discard(worker)
        LOG.error(
            "worker %d ended (%s): its connections are cut; another one starts",
            *(worker.pid, _how(worker.process.returncode)),
        )
        self._replacing.start_soon(self._replace, trio.current_time() - began)

    async def _replace(self, lived: float) -> None:
        wait = AGAIN_SECONDS if lived > MOST_AGAIN_SECONDS else 2 * AGAIN_SECONDS
        while True:
            await trio.sleep(wait)
            async with self._changing:
                if len(self._current) >= self._settings.workers:
                    return  # There is a new configuration, with all its workers.
                try:
                    fresh = await self._start_ready(1, self._settings, self._listening)
                except HybridkexError as error:
                    LOG.error("no worker could be started: %s; retrying", error)  # noqa: TRY400
                else:
                    fresh &= self._workers  # or it has ended already
                    self._current |= fresh
                    for worker in fresh:
                        await worker.send(go=True)
                    if fresh:
                        return
            wait = min(2 * wait, MOST_AGAIN_SECONDS)

    async def _keep_names(self) -> None:
        """Listen again whenever the name of a Unix socket is removed or replaced."""
        lost = LostNames()
        while True:
            await trio.sleep(CHECK_EVERY)
            gone = []
            for config in self._settings.tunnels:
                if self._listening[config.endpoint].reachable:
                    lost.found(config)
                else:
                    gone.append(config)
            if not gone:
                continue
            try:
                await self.apply_settings(self._settings)
            except HybridkexError as error:
                lost.failed(gone[0], error)
                continue
            for config in gone:
                lost.opened(config)

    # -- metrics

    async def metrics(self) -> CollectorRegistry:
        """The sums of all workers' metrics, as they are now."""
        async with trio.open_nursery() as nursery:
            for worker in self._workers:
                nursery.start_soon(worker.update_metrics)
        registry = CollectorRegistry()
        registry.register(_Sums([worker.metrics for worker in self._workers], self._gone))
        return registry

    def _keep_counters(self, worker: _Worker) -> None:
        for _, _, kind, found in worker.metrics:
            for name, labels, value in found:
                if kind == "counter":
                    key = name, tuple(sorted(labels.items()))
                    self._gone[key] = _joined(name, self._gone.get(key), value)


class _Sums:
    """A collector of prometheus_client: the same metrics of several processes, added up."""

    def __init__(self, found: list[list[Any]], gone: dict[_Sample, float]) -> None:
        self._found = found
        self._gone = gone

    def collect(self) -> list[Metric]:
        families: dict[str, Metric] = {}
        sums: dict[str, dict[_Sample, float]] = {}
        for name, text, kind, there in (family for worker in self._found for family in worker):
            families.setdefault(name, Metric(name, text, kind))
            values = sums.setdefault(name, {})
            if not values and kind == "counter":
                mine = (f"{name}_total", f"{name}_created")
                values.update({key: one for key, one in self._gone.items() if key[0] in mine})
            for sample, labels, value in there:
                key = sample, tuple(sorted(labels.items()))
                values[key] = _joined(sample, values.get(key), value)
        for name, family in families.items():
            for (sample, labels), value in sums[name].items():
                family.add_sample(sample, dict(labels), value)
        return list(families.values())


def _joined(name: str, one: float | None, other: float) -> float:
    """Add the values of a sample of two processes; of two creation times, take the earlier one."""
    if one is None:
        return other
    return min(one, other) if name.endswith("_created") else one + other


def _check_ready(workers: set[_Worker]) -> None:
    for worker in workers:
        if not worker.ready.is_set():
            raise ConfigError(f"a worker was not ready within {READY_SECONDS:g} s")
        if worker.error is not None:
            raise ConfigError(worker.error)


def _continue_at_end(watched: socket.socket, pid: int) -> None:
    """Send SIGCONT to a worker when the other end of a socket is closed (fcntl(2)).

    A worker that a signal has stopped does not read its control socket, and would keep the
    listening sockets of a service that has ended.
    """
    if sys.platform == "linux":
        fcntl.fcntl(watched, fcntl.F_SETOWN, pid)
        fcntl.fcntl(watched, fcntl.F_SETSIG, signal.SIGCONT)
        fcntl.fcntl(watched, fcntl.F_SETFL, fcntl.fcntl(watched, fcntl.F_GETFL) | os.O_ASYNC)


def _set_mode_again(listening: Listening, mode: int) -> None:
    with contextlib.suppress(HybridkexError):
        listening.set_mode(mode)


async def _close(listening: Listening) -> None:
    with trio.CancelScope(shield=True):
        await listening.aclose()


def _how(status: int | None) -> str:
    if status is not None and status < 0:
        try:
            return signal.Signals(-status).name
        except ValueError:
            return f"signal {-status}"
    return f"exit status {status}"
