"""The Prometheus metrics of KMEs. No registry is shared: each process makes its own."""

from collections.abc import Iterable
from enum import Enum
from typing import TYPE_CHECKING, Final

from hybridkex.errors import BlockAborted
from hybridkex.extras import needs

with needs("kme"):
    from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

    from hybridkex.net.http import Request, Response, Route, find_route

if TYPE_CHECKING:  # imports numpy, which is an extra
    from hybridkex.link.ledger import Ledger
    from hybridkex.link.party import Block


class KmeMetrics:
    """The metrics of the KMEs of one process, told apart by the label ``kme``."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            names = ("kme", *labels)
            return Counter(f"hybridkex_{name}", text, names, registry=registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            names = ("kme", *labels)
            return Gauge(f"hybridkex_{name}", text, names, registry=registry)

        self.requests = counter("kme_requests", "Requests answered.", "call", "status")
        self.seconds = Histogram(
            "hybridkex_kme_request_seconds",
            "Time from a complete request to its response.",
            ("kme", "call"),
            registry=registry,
            buckets=(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5),
        )
        self.delivered = counter("kme_keys_delivered", "Keys given to SAEs.", "role", "sae")
        self.stored = gauge("kme_keys_stored", "Unreserved keys of a link.", "link")
        self.produced = counter("kme_keys_produced", "Keys received from a producer.", "link")
        self.refused = counter(
            "kme_blocks_refused",
            "Keys that the peer KME refused to reserve.",
            *("link", "reason"),
        )
        self.lost = counter(
            "kme_keys_lost",
            "Keys of a link that were erased without having been delivered.",
            *("link", "reason"),
        )
        self.excess = counter(
            "kme_peer_excess",
            "Requests, keys and IDs of a peer KME above its limits.",
            *("link", "reason"),
        )
        self.shortages = counter("kme_shortages", "Requests for more keys than were free.", "link")
        self.store_failures = counter("kme_store_failures", "Calls to the key store that failed.")
        self.expired = counter("kme_keys_expired", "Keys erased because of their age.")
        self.link_blocks = counter(
            "qkd_link_blocks", "Blocks of a QKD link, completed or aborted.", "link", "outcome"
        )
        self.link_sifted = counter(
            "qkd_link_sifted_bits",
            "Sifted bits of the key basis, of blocks that made keys.",
            "link",
        )
        self.link_secret = counter("qkd_link_secret_bits", "Secret bits made.", "link")
        self.link_qber = gauge(
            "qkd_link_qber_ratio", "Share of wrong bits in the last block that made keys.", "link"
        )
        self.link_rate = gauge(
            "qkd_link_secret_bits_per_second",
            "Secret bits per second of the link's time, in the last block that made keys.",
            "link",
        )
        self.link_ledger = gauge(
            "qkd_link_ledger_bits", "Authentication key of a QKD link in stock.", "link"
        )
        self.rejected = counter(
            "kme_connections_rejected", "Connections that ended before a request.", "reason"
        )

    def begin_link(
        self,
        kme: str,
        link: str,
        *,
        lost: Iterable[str],
        refused: Iterable[Enum],
        excess: Iterable[str],
    ) -> None:
        """Set the counters of a link to zero: Prometheus sees no increase before the first value.

        The reasons are those for which keys are lost, blocks refused, and calls of a peer limited.
        """
        self.produced.labels(kme, link)
        self.shortages.labels(kme, link)
        self.expired.labels(kme)
        for counter, reasons in (
            (self.lost, lost),
            (self.refused, (one.value for one in refused)),
            (self.excess, excess),
        ):
            for reason in reasons:
                counter.labels(kme, link, reason)

    def begin_qkd_link(self, kme: str, link: str) -> None:
        """Set the counters of a QKD link to zero, as :meth:`begin_link` does."""
        for outcome in ("made", "aborted"):
            self.link_blocks.labels(kme, link, outcome)
        self.link_sifted.labels(kme, link)
        self.link_secret.labels(kme, link)

    def note_block(self, kme: str, link: str, block: "Block | BlockAborted") -> None:
        if isinstance(block, BlockAborted):
            self.link_blocks.labels(kme, link, "aborted").inc()
            return
        self.link_blocks.labels(kme, link, "made").inc()
        self.link_sifted.labels(kme, link).inc(block.sifted)
        self.link_secret.labels(kme, link).inc(block.secret_bits)
        # Alice learns the QBER of the key basis only where the proof needs it.
        qber = block.test_qber if block.qber is None else block.qber
        self.link_qber.labels(kme, link).set(qber)
        if block.rate is not None:
            self.link_rate.labels(kme, link).set(block.rate)
        self.link_ledger.labels(kme, link).set(block.ledger_bits)

    def follow_ledger(self, kme: str, link: str, ledger: "Ledger") -> None:
        """Show the balance of this ledger, also while no blocks are made."""
        self.link_ledger.labels(kme, link).set_function(lambda: 8 * ledger.balance)

    def text(self) -> bytes:
        return generate_latest(self._registry)

    async def handle(self, request: Request) -> Response:
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
