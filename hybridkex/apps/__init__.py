"""Applications over the channel: file transfer and tunnel.

They use only the public names of :mod:`hybridkex`, which shows that these suffice. The commands in
:mod:`hybridkex.cli` add options and output. The helpers that they share are here for other
applications, too.
"""

from hybridkex.apps.backoff import Backoff
from hybridkex.apps.tcp import no_connection
from hybridkex.net.address import TcpAddress, parse_tcp_address
from hybridkex.net.sockets import keep_alive, watch_peer

__all__ = [
    "Backoff",
    "TcpAddress",
    "keep_alive",
    "no_connection",
    "parse_tcp_address",
    "watch_peer",
]
