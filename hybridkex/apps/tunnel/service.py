"""Tunnels as a service: signals reload or drain them, and systemd is notified."""

from collections.abc import Callable
from typing import Final

import trio

from hybridkex import HybridkexError
from hybridkex.apps.systemd import notify, notify_reloading, obey, open_signals
from hybridkex.apps.tunnel.config import TunnelSettings
from hybridkex.apps.tunnel.server import TunnelServer
from hybridkex.apps.tunnel.workers import WorkerPool
from hybridkex.machine import leaves
from hybridkex.net.event_loop import in_thread
from hybridkex.text import get_logger

LOG: Final = get_logger("hybridkex.tunnel")


class TunnelService:
    """Runs tunnels until a signal.

    SIGHUP reloads the settings, completely or not at all. SIGTERM and SIGINT stop accepting and
    give open connections :attr:`TunnelSettings.grace` seconds; a second signal ends them at once.

    Args:
        load: reads the settings; called again for each SIGHUP, in a thread.
        settings: the initial settings.
        server: runs the tunnels, in this process or in workers.
        on_end: called with the number of a signal that ends it.
    """

    def __init__(
        self,
        load: Callable[[], TunnelSettings],
        settings: TunnelSettings,
        server: TunnelServer | WorkerPool,
        *,
        on_end: Callable[[int], object] = lambda _: None,
    ) -> None:
        self._on_end = on_end
        self._load = load
        self._settings = settings
        self._server = server
        self._starting = trio.CancelScope()
        self._started = trio.Event()
        self._ending = False

    async def run(self) -> None:
        """Serve until a signal.

        Raises:
            ConfigError: the first settings cannot be used.
        """
        with open_signals() as received:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(obey, received, self._reload, self._end)
                with self._starting:
                    await nursery.start(self._serve, nursery.cancel_scope)
                if self._starting.cancel_called:
                    nursery.cancel_scope.cancel()
                    return
                self._say_ready()
                self._started.set()

    async def _serve(self, scope: trio.CancelScope, *, task_status: trio.TaskStatus[None]) -> None:
        await self._server.serve(self._settings, task_status=task_status)
        scope.cancel()

    def _end(self, number: int) -> None:
        self._on_end(number)
        if not self._started.is_set():
            self._starting.cancel()
            return
        notify("STOPPING=1", "STATUS=no new connections")
        # A second signal asks for an immediate end.
        self._server.close(0.0 if self._ending else self._settings.grace)
        self._ending = True

    async def _reload(self) -> None:
        await self._started.wait()
        notify_reloading()
        try:
            settings = await in_thread(self._load, abandon=True)
            await self._server.apply_settings(settings)
        except Exception as error:
            # No fault of a file may end a running service.
            reason = next(leaves(error))
            said = str(reason) if isinstance(reason, HybridkexError) else repr(reason)
            LOG.error("not reloaded, the old configuration stays: %s", said)  # noqa: TRY400
        else:
            if settings.metrics != self._settings.metrics:
                LOG.warning("a new metrics address needs a restart")
            if (settings.workers > 1) != (self._settings.workers > 1):
                LOG.warning("the change between one and several workers needs a restart")
            LOG.setLevel(settings.log_level.upper())
            self._settings = settings
            LOG.info("reloaded")
        if not self._ending:  # the listening sockets are closed then
            self._say_ready()

    def _say_ready(self) -> None:
        for tunnel in self._settings.tunnels:
            where = str(self._server.where(tunnel.name))
            at = "" if where == tunnel.name else f" on {where}"
            LOG.info("tunnel %s: listening%s, forwarding to %s", tunnel.name, at, tunnel.forward)
        notify("READY=1", f"STATUS={len(self._settings.tunnels)} tunnels")
