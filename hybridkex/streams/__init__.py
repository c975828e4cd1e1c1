"""The trio shell around the engine: secure streams and listeners, and functions to open them."""

from typing import TYPE_CHECKING, Final

from hybridkex.lazy_names import lazy_names

if TYPE_CHECKING:
    from hybridkex.streams.listener import SecureListener as SecureListener
    from hybridkex.streams.stream import SecureStream as SecureStream
    from hybridkex.streams.tcp import open_secure_tcp_listeners as open_secure_tcp_listeners
    from hybridkex.streams.tcp import open_secure_tcp_stream as open_secure_tcp_stream
    from hybridkex.streams.tcp import serve_secure_tcp as serve_secure_tcp

_HOMES: Final = {
    "hybridkex.streams.listener": ("SecureListener",),
    "hybridkex.streams.stream": ("SecureStream",),
    "hybridkex.streams.tcp": (
        "open_secure_tcp_listeners",
        "open_secure_tcp_stream",
        "serve_secure_tcp",
    ),
}
__all__ = [name for names in _HOMES.values() for name in names]

if not TYPE_CHECKING:  # or a type checker would take any name for one of this package
    __getattr__ = lazy_names(__name__, _HOMES)
