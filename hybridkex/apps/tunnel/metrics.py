"""Prometheus metrics of the tunnels of a process (needs ``prometheus_client``)."""

from prometheus_client import CollectorRegistry, Counter, Gauge

from hybridkex import Session
from hybridkex.errors import AlertReceived, PeerError

__all__ = ["TunnelCounters", "TunnelMetrics"]


class TunnelMetrics:
    """The metrics of the tunnels of one process, told apart by the label ``tunnel``."""

    def __init__(self) -> None:
        registry = CollectorRegistry()
        self.registry = registry
        self.open = Gauge(
            "hybridkex_tunnel_connections_open",
            "Open connections.",
            ("tunnel",),
            registry=registry,
        )
        self.total = Counter(
            "hybridkex_tunnel_connections",
            "Connections accepted.",
            ("tunnel",),
            registry=registry,
        )
        self.failed = Counter(
            "hybridkex_tunnel_connections_refused",
            "Connections refused before they carried data: limit, handshake, name or upstream.",
            ("tunnel", "reason"),
            registry=registry,
        )
        self.cut = Counter(
            "hybridkex_tunnel_connections_cut",
            "Connections that did not end in an orderly way.",
            ("tunnel",),
            registry=registry,
        )
        self.bytes = Counter(
            "hybridkex_tunnel_bytes",
            "Bytes forwarded, outwards from the listening side or back.",
            ("tunnel", "direction"),
            registry=registry,
        )
        self.handshakes = Counter(
            "hybridkex_tunnel_handshakes",
            "Successful handshakes.",
            ("tunnel", "group", "auth"),
            registry=registry,
        )
        self.handshake_failures = Counter(
            "hybridkex_tunnel_handshake_failures",
            "Failed handshakes, with the alert, its sender, and our reason if we sent it.",
            ("tunnel", "alert", "by", "reason"),
            registry=registry,
        )
        self.qkd_keys = Counter(
            "hybridkex_tunnel_qkd_keys",
            "QKD keys used in handshakes.",
            ("tunnel",),
            registry=registry,
        )
        self.qkd_fallbacks = Counter(
            "hybridkex_tunnel_qkd_fallbacks",
            "Handshakes without a QKD key under a policy that prefers one.",
            ("tunnel",),
            registry=registry,
        )

        self.key_updates = Counter(
            "hybridkex_tunnel_key_updates",
            "Key updates with a new key exchange, in connections that were open.",
            ("tunnel", "qkd"),
            registry=registry,
        )

    def of(self, tunnel: str) -> "TunnelCounters":
        """The counters of one tunnel, exported from now on."""
        return TunnelCounters(self, tunnel)


class TunnelCounters:
    """The metrics of one tunnel, looked up once and not for each chunk."""

    def __init__(self, metrics: TunnelMetrics, tunnel: str) -> None:
        self._metrics = metrics
        self._tunnel = tunnel
        self.open = metrics.open.labels(tunnel)
        self.total = metrics.total.labels(tunnel)
        self.cut = metrics.cut.labels(tunnel)
        self.out = metrics.bytes.labels(tunnel, "out")
        self.back = metrics.bytes.labels(tunnel, "back")
        self._qkd_keys = metrics.qkd_keys.labels(tunnel)
        self._qkd_fallbacks = metrics.qkd_fallbacks.labels(tunnel)

    def refused(self, reason: str) -> None:
        """A connection was refused."""
        self._metrics.failed.labels(self._tunnel, reason).inc()

    def handshake(self, session: Session) -> None:
        """A handshake succeeded."""
        auth = session.authenticated_by.value
        self._metrics.handshakes.labels(self._tunnel, session.group, auth).inc()
        self._qkd_keys.inc(len(session.qkd_key_ids))
        if session.qkd_fallback is not None:
            self._qkd_fallbacks.inc()

    def epoch(self, session: Session) -> None:
        """A connection has renewed its keys."""
        qkd = "yes" if session.epochs[-1].qkd_key_ids else "no"
        self._metrics.key_updates.labels(self._tunnel, qkd).inc()

    def handshake_failed(self, cause: BaseException | None) -> None:
        """A handshake failed."""
        alert, by, reason = "none", "nobody", ""
        if isinstance(cause, PeerError):
            alert, by, reason = cause.alert.name.lower(), "us", str(cause.reason)
        elif isinstance(cause, AlertReceived):
            alert, by = cause.name, "peer"
        self._metrics.handshake_failures.labels(self._tunnel, alert, by, reason).inc()
