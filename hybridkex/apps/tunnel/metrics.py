"""Prometheus metrics of the tunnels of a process (needs ``prometheus_client``)."""

from hybridkex import Session
from hybridkex.errors import AlertReceived, PeerError
from hybridkex.extras import needs

with needs("apps"):
    from prometheus_client import CollectorRegistry, Counter, Gauge


class TunnelMetrics:
    """The metrics of the tunnels of one process, told apart by the label ``tunnel``."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            names = ("tunnel", *labels)
            return Counter(f"hybridkex_tunnel_{name}", text, names, registry=registry)

        self.open = Gauge(
            "hybridkex_tunnel_connections_open", "Open connections.", ("tunnel",), registry=registry
        )
        self.total = counter("connections", "Connections accepted.")
        self.failed = counter(
            "connections_refused",
            "Connections refused before they carried data: limit, handshake, name or upstream.",
            "reason",
        )
        self.cut = counter("connections_cut", "Connections that did not end in an orderly way.")
        self.bytes = counter(
            "bytes", "Bytes forwarded, outwards from the listening side or back.", "direction"
        )
        self.handshakes = counter("handshakes", "Successful handshakes.", "group", "auth")
        self.handshake_failures = counter(
            "handshake_failures",
            "Failed handshakes, with the alert, its sender, and our reason if we sent it.",
            *("alert", "by", "reason"),
        )
        self.qkd_keys = counter("qkd_keys", "QKD keys used in handshakes.")
        self.qkd_fallbacks = counter(
            "qkd_fallbacks", "Handshakes without a QKD key under a policy that prefers one."
        )
        self.key_updates = counter(
            "key_updates",
            "Key updates with a new key exchange, in connections that were open.",
            "qkd",
        )

    def of(self, tunnel: str) -> "TunnelCounters":
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
        self._metrics.failed.labels(self._tunnel, reason).inc()

    def handshake(self, session: Session) -> None:
        auth = session.authenticated_by.value
        self._metrics.handshakes.labels(self._tunnel, session.group, auth).inc()
        self._qkd_keys.inc(len(session.qkd_key_ids))
        if session.qkd_fallback is not None:
            self._qkd_fallbacks.inc()

    def epoch(self, session: Session) -> None:
        qkd = "yes" if session.epochs[-1].qkd_key_ids else "no"
        self._metrics.key_updates.labels(self._tunnel, qkd).inc()

    def handshake_failed(self, cause: BaseException | None) -> None:
        alert, by, reason = "none", "nobody", ""
        if isinstance(cause, PeerError):
            alert, by, reason = cause.alert.name.lower(), "us", str(cause.reason)
        elif isinstance(cause, AlertReceived):
            alert, by = cause.name, "peer"
        self._metrics.handshake_failures.labels(self._tunnel, alert, by, reason).inc()
