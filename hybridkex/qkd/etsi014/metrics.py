"""What a KME counts, in Prometheus form. No registry is shared: each process makes its own."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from hybridkex.qkd.etsi014.http import Request, Response

__all__ = ["KmeMetrics"]


class KmeMetrics:
    """The metrics of the KMEs of one process, told apart by the label ``kme``."""

    def __init__(self) -> None:
        registry = CollectorRegistry()
        self._registry = registry
        self.requests = Counter(
            "hybridkex_kme_requests",
            "Requests answered.",
            ("kme", "call", "status"),
            registry=registry,
        )
        self.seconds = Histogram(
            "hybridkex_kme_request_seconds",
            "Time from a complete request to its response.",
            ("kme", "call"),
            registry=registry,
            buckets=(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5),
        )
        self.delivered = Counter(
            "hybridkex_kme_keys_delivered",
            "Keys given to SAEs.",
            ("kme", "role"),
            registry=registry,
        )
        self.stored = Gauge(
            "hybridkex_kme_keys_stored",
            "Keys of a link that nobody was promised.",
            ("kme", "link"),
            registry=registry,
        )
        self.produced = Counter(
            "hybridkex_kme_keys_produced",
            "Keys taken in from a producer.",
            ("kme", "link"),
            registry=registry,
        )
        self.refused = Counter(
            "hybridkex_kme_blocks_refused",
            "Keys that the KME at the other end would not allot.",
            ("kme", "link", "reason"),
            registry=registry,
        )
        self.expired = Counter(
            "hybridkex_kme_keys_expired",
            "Keys erased because of their age.",
            ("kme",),
            registry=registry,
        )
        self.rejected = Counter(
            "hybridkex_kme_connections_rejected",
            "Connections that ended before a request.",
            ("kme", "reason"),
            registry=registry,
        )

    def text(self) -> bytes:
        """The metrics in the Prometheus text format."""
        return generate_latest(self._registry)

    async def handle(self, request: Request) -> Response:
        """Answer ``GET /metrics``."""
        if request.path != ("metrics",) or request.method != "GET":
            return Response.json(404, {"message": "the metrics are at /metrics"})
        return Response(body=self.text(), content_type="text/plain; version=0.0.4; charset=utf-8")
