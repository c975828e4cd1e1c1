"""The tunnel: sockets of unmodified programs, forwarded through secure channels.

:mod:`~hybridkex.apps.tunnel.config` describes one tunnel, :mod:`~hybridkex.apps.tunnel.server` runs
any number of them and applies configuration changes,
:mod:`~hybridkex.apps.tunnel.workers` has several processes do that,
:mod:`~hybridkex.apps.tunnel.service` connects them to signals and systemd, and
:mod:`~hybridkex.apps.tunnel.forward` carries the bytes of one connection.
"""

from hybridkex.apps.tunnel.config import TunnelConfig, TunnelSettings
from hybridkex.apps.tunnel.metrics import TunnelMetrics
from hybridkex.apps.tunnel.server import TunnelServer
from hybridkex.apps.tunnel.service import TunnelService
from hybridkex.apps.tunnel.workers import WorkerPool

__all__ = [
    "TunnelConfig",
    "TunnelMetrics",
    "TunnelServer",
    "TunnelService",
    "TunnelSettings",
    "WorkerPool",
]
