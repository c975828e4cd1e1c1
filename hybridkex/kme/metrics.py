"""The Prometheus metrics of KMEs. No registry is shared: each process makes its own."""

from typing import TYPE_CHECKING, Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from hybridkex.errors import BlockAborted
from hybridkex.net.http import Request, Response, Route, find_route

if TYPE_CHECKING:  # imports numpy, which is an extra
    from hybridkex.link.party import Block

__all__ = ["KmeMetrics", "metrics_page"]


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
            "Keys of a link that are not promised to any SAE.",
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
        self.lost = Counter(
            "hybridkex_kme_keys_lost",
            "Keys of a link that were erased without having been delivered.",
            ("kme", "link", "reason"),
            registry=registry,
        )
        self.excess = Counter(
            "hybridkex_kme_peer_excess",
            "Requests, keys and IDs of a peer KME above its limits.",
            ("kme", "link", "reason"),
            registry=registry,
        )
        self.shortages = Counter(
            "hybridkex_kme_shortages",
            "Requests for more keys than were free.",
            ("kme", "link"),
            registry=registry,
        )
        self.store_failures = Counter(
            "hybridkex_kme_store_failures",
            "Calls to the key store that failed.",
            ("kme",),
            registry=registry,
        )
        self.expired = Counter(
            "hybridkex_kme_keys_expired",
            "Keys erased because of their age.",
            ("kme",),
            registry=registry,
        )
        self.link_blocks = Counter(
            "hybridkex_qkd_link_blocks",
            "Blocks of a QKD link, completed or aborted.",
            ("kme", "link", "outcome"),
            registry=registry,
        )
        self.link_sifted = Counter(
            "hybridkex_qkd_link_sifted_bits",
            "Sifted bits of the key basis, of blocks that made keys.",
            ("kme", "link"),
            registry=registry,
        )
        self.link_secret = Counter(
            "hybridkex_qkd_link_secret_bits",
            "Secret bits made.",
            ("kme", "link"),
            registry=registry,
        )
        self.link_qber = Gauge(
            "hybridkex_qkd_link_qber_ratio",
            "Share of wrong bits in the last block that made keys.",
            ("kme", "link"),
            registry=registry,
        )
        self.link_rate = Gauge(
            "hybridkex_qkd_link_secret_bits_per_second",
            "Secret bits per second of the link's time, in the last block that made keys.",
            ("kme", "link"),
            registry=registry,
        )
        self.link_ledger = Gauge(
            "hybridkex_qkd_link_ledger_bits",
            "Authentication key of a QKD link in stock.",
            ("kme", "link"),
            registry=registry,
        )
        self.rejected = Counter(
            "hybridkex_kme_connections_rejected",
            "Connections that ended before a request.",
            ("kme", "reason"),
            registry=registry,
        )

    def note_block(self, kme: str, link: str, block: "Block | BlockAborted") -> None:
        """Count a block of a QKD link."""
        if isinstance(block, BlockAborted):
            self.link_blocks.labels(kme, link, "aborted").inc()
            return
        self.link_blocks.labels(kme, link, "made").inc()
        self.link_sifted.labels(kme, link).inc(block.sifted)
        self.link_secret.labels(kme, link).inc(block.secret_bits)
        # Alice learns the QBER of the key basis only where the proof needs it.
        qber = block.test_qber if block.qber is None else block.qber
        self.link_qber.labels(kme, link).set(qber)
        self.link_rate.labels(kme, link).set(block.rate)
        self.link_ledger.labels(kme, link).set(block.ledger_bits)

    def text(self) -> bytes:
        """The metrics in the Prometheus text format."""
        return generate_latest(self._registry)

    async def handle(self, request: Request) -> Response:
        """Answer ``GET /metrics``."""
        return metrics_page(self._registry, request)


_PAGE: Final = Route(name="metrics", path=("metrics",), methods=("GET", "HEAD"))


def metrics_page(registry: CollectorRegistry, request: Request) -> Response:
    """The metrics of a registry in the Prometheus text format, at ``/metrics``.

    Raises:
        HttpError: 404 and 405.
    """
    found = find_route([_PAGE], request)
    if isinstance(found, Response):
        return found
    return Response(
        body=generate_latest(registry), content_type="text/plain; version=0.0.4; charset=utf-8"
    )
