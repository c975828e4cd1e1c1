"""Look-ups of host names that do not wait for one another.

trio resolves names in threads, of which it uses 40 at most: 40 connections to one name whose DNS
server does not answer would delay every connection to another name. Here all callers with the same
query share one look-up in a thread of :mod:`hybridkex.net.threads`, which reports its result even
when memory is short. The result is reused for a second: a thread for each connection costs more
than the rest of connecting.
"""

import copy
import errno
import math
import os
import socket
from typing import Any, Final

import trio
from trio.abc import HostnameResolver

from hybridkex.net.event_loop import in_thread
from hybridkex.net.threads import NoThread

KEEP_SECONDS: Final = 1.0
"""Seconds for which an answer is used again."""


class _Lookup:
    """A look-up in progress, and its result."""

    def __init__(self) -> None:
        self.ended: Final = trio.Event()
        self.found: list[Any] = []
        self.error: Exception | None = None
        self.until = math.inf
        """When the result is discarded."""


class SharedLookups(HostnameResolver):
    """A resolver for one run of trio; see :func:`trio.socket.set_custom_hostname_resolver`."""

    def __init__(self) -> None:
        self._lookups: dict[tuple[Any, ...], _Lookup] = {}

    async def getaddrinfo(self, *question: Any) -> Any:
        """Like :func:`socket.getaddrinfo`. If a caller is cancelled, others get the result."""
        lookup = self._lookups.get(question)
        if lookup is None or lookup.until <= trio.current_time():
            self._forget()
            lookup = self._lookups[question] = _Lookup()
            trio.lowlevel.spawn_system_task(self._look_up, question, lookup)
        await lookup.ended.wait()
        if lookup.error is not None:
            raise copy.copy(lookup.error)  # each caller gets a traceback of its own
        return list(lookup.found)

    async def _look_up(self, question: tuple[Any, ...], lookup: _Lookup) -> None:
        try:
            lookup.found = await in_thread(socket.getaddrinfo, *question, abandon=True, slow=True)
        except NoThread:
            lookup.error = OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        except Exception as error:
            lookup.error = error  # the callers' to handle
        finally:
            if lookup.found:
                lookup.until = trio.current_time() + KEEP_SECONDS
            else:
                del self._lookups[question]
            lookup.ended.set()

    def _forget(self) -> None:
        """Drop the answers that are too old."""
        now = trio.current_time()
        for question in [one for one, lookup in self._lookups.items() if lookup.until <= now]:
            del self._lookups[question]

    async def getnameinfo(self, sockaddr: Any, flags: int) -> tuple[str, str]:
        """Like :func:`socket.getnameinfo`."""
        return await in_thread(socket.getnameinfo, sockaddr, flags, abandon=True, slow=True)
