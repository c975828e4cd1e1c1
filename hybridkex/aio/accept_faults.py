"""One log line when the servers of an asyncio loop lack descriptors or memory.

asyncio's accept loop continues through its whole backlog after EMFILE (accept(2)), and gives the
loop's exception handler one traceback for each connection that it could not accept, again at every
retry. It waits a second between two retries and recovers by itself. uvloop closes the connections
that it has no descriptor for, without a log line.
"""

import asyncio
import logging
import weakref
from collections.abc import Callable
from typing import Any, Final

from hybridkex.net.log import BoundedLog
from hybridkex.text import get_logger

_MESSAGE: Final = "socket.accept() out of system resource"

Handler = Callable[[asyncio.AbstractEventLoop, dict[str, Any]], object]


class _Handler:
    """An exception handler in front of the application's, for the sockets of our servers."""

    def __init__(self, before: Handler | None) -> None:
        self._before = before
        self.servers = weakref.WeakSet[asyncio.Server]()
        # The state lasts, and one line describes it.
        self._lines = BoundedLog(get_logger("hybridkex.aio"), rate=1 / 60, burst=1)

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        listening = context.get("socket")
        # A server that was closed has no sockets.
        ours = listening is not None and any(
            listening.fileno() == one.fileno() for server in self.servers for one in server.sockets
        )
        if ours and context.get("message") == _MESSAGE:
            reason = getattr(context.get("exception"), "strerror", None) or "out of memory"
            self._lines.log(
                logging.ERROR,
                "cannot accept connections now: %s; new ones wait in the queue",
                reason,
            )
        elif self._before is not None:
            self._before(loop, context)
        else:
            loop.default_exception_handler(context)


def report_accept_faults(server: asyncio.Server) -> None:
    """Report at a bounded rate that a server cannot accept connections.

    The loop's exception handler is replaced by one that passes everything else on to it. An
    application that sets its own afterwards gets these faults as asyncio reports them.
    """
    loop = server.get_loop()
    handler = loop.get_exception_handler()
    if not isinstance(handler, _Handler):
        handler = _Handler(handler)
        loop.set_exception_handler(handler)
    handler.servers.add(server)
