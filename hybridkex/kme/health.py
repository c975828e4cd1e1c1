"""The pages of the metrics port: ``/metrics``, ``/healthz`` and ``/readyz``."""

from collections.abc import Callable, Mapping
from typing import Final

import trio

from hybridkex.kme.entity import KeyManagementEntity
from hybridkex.kme.metrics import KmeMetrics
from hybridkex.net.http import Request, Response, Route, find_route

GOOD_FOR: Final = 1.0
"""Seconds for which a finding is given to others who ask: they must not load store and peers."""

_METRICS: Final = Route(name="metrics", path=("metrics",), methods=("GET", "HEAD"))
_HEALTH: Final = Route(name="health", path=("healthz",), methods=("GET", "HEAD"))
_READINESS: Final = Route(name="readiness", path=("readyz",), methods=("GET", "HEAD"))


class Pages:
    """The pages that a monitor or a load balancer requests from a KME process.

    ``/healthz`` answers 200 while the process answers at all. ``/readyz`` answers 200 if each KME
    of the process can serve a request on one of its links at least: the key store works, the peer
    KME answers, and enough keys are stored; otherwise 503. Its body says for each link what is
    missing.

    Args:
        kmes: the KMEs of the process.
        metrics: their metrics.
        is_closing: whether the process is about to end, and takes no more work.
    """

    def __init__(
        self,
        kmes: Mapping[str, KeyManagementEntity],
        metrics: KmeMetrics,
        is_closing: Callable[[], bool],
    ) -> None:
        self._kmes = kmes
        self._metrics = metrics
        self._is_closing = is_closing
        self._turn = trio.Lock()
        self._found: dict[str, dict[str, str | None]] = {}
        self._found_at = float("-inf")

    async def handle(self, request: Request) -> Response:
        """Answer a request. Raises ``HttpError``: 404 and 405."""
        route = find_route((_METRICS, _HEALTH, _READINESS), request)
        if isinstance(route, Response):
            return route
        if route is _METRICS:
            return await self._metrics.handle(request)
        if route is _HEALTH:
            return Response.json(200, {"alive": True})
        return await self._readiness()

    async def _readiness(self) -> Response:
        async with self._turn:
            if trio.current_time() > self._found_at + GOOD_FOR:
                async with trio.open_nursery() as nursery:
                    for name, kme in self._kmes.items():
                        nursery.start_soon(self._find, name, kme)
                self._found_at = trio.current_time()
        ready = not self._is_closing() and all(
            any(hindrance is None for hindrance in links.values()) for links in self._found.values()
        )
        return Response.json(
            200 if ready else 503,
            {
                "ready": ready,
                "kmes": {
                    kme: {link: hindrance or "ready" for link, hindrance in links.items()}
                    for kme, links in self._found.items()
                },
            },
        )

    async def _find(self, name: str, kme: KeyManagementEntity) -> None:
        self._found[name] = await kme.readiness()
