"""The tunnel: sockets of programs that know nothing of it, forwarded through secure channels.

:mod:`~hybridkex.apps.tunnel.config` says what a tunnel is, :mod:`~hybridkex.apps.tunnel.server`
runs any number of them and takes new configurations while they run,
:mod:`~hybridkex.apps.tunnel.forward` carries the bytes of one connection.
"""

from hybridkex.apps.tunnel.config import TunnelConfig
from hybridkex.apps.tunnel.metrics import TunnelMetrics
from hybridkex.apps.tunnel.server import TunnelServer

__all__ = ["TunnelConfig", "TunnelMetrics", "TunnelServer"]
