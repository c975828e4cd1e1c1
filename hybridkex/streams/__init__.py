"""The trio shell around the engine: secure streams, listeners, and what opens them."""

from hybridkex.streams.listener import SecureListener
from hybridkex.streams.stream import SecureStream
from hybridkex.streams.tcp import (
    open_secure_tcp_listeners,
    open_secure_tcp_stream,
    serve_secure_tcp,
)

__all__ = [
    "SecureListener",
    "SecureStream",
    "open_secure_tcp_listeners",
    "open_secure_tcp_stream",
    "serve_secure_tcp",
]
