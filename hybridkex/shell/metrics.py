"""The counters of QKD keys as Prometheus metrics (needs ``prometheus_client``, extra ``kme``)."""

from collections.abc import Iterator
from dataclasses import fields

from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector, CollectorRegistry

from hybridkex.shell.qkd_keys import QkdCounters, QkdPskSource

_HELP = {
    "drawn": "QKD keys drawn to be offered.",
    "looked_up": "QKD keys looked up for clients.",
    "failed": "Draws and look-ups that gave no key.",
    "repeated": "Key names that were offered again.",
    "limited": "Look-ups that were not made because the peer asked too often.",
    "sessions": "Handshakes with a QKD key in them.",
    "fallbacks": "Handshakes without a QKD key, where the policy only prefers one.",
    "update_keys": "QKD keys drawn and looked up for key updates.",
    "pad_keys": "QKD keys drawn and looked up for one-time pads.",
}


class _QkdCollector(Collector):
    def __init__(self, name: str, keys: QkdPskSource) -> None:
        self._name = name
        self._keys = keys

    def collect(self) -> Iterator[CounterMetricFamily]:
        for field in fields(QkdCounters):
            family = CounterMetricFamily(
                f"hybridkex_qkd_{field.name}", _HELP[field.name], labels=("channel",)
            )
            family.add_metric((self._name,), getattr(self._keys.counters, field.name))
            yield family

    def describe(self) -> Iterator[CounterMetricFamily]:
        # Several channels share the names of their metrics and differ in the label.
        return iter(())


def register_qkd_metrics(registry: CollectorRegistry, name: str, keys: QkdPskSource) -> None:
    """Add the counters of ``keys`` to a registry, under the label ``channel="name"``."""
    registry.register(_QkdCollector(name, keys))
