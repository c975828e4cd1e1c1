"""rustls, in ``rtls``."""

from functools import partial
from typing import Final

from interop.matrix.peer import Peer
from interop.matrix.peers.python import python_agent
from interop.matrix.peers.reasons import IMPORT

__all__ = ["PEER"]

PEER: Final = Peer(
    name="rustls",
    open=partial(python_agent, "ssl_module", "rtls", needs="rtls", package="rtls>=2026.9"),
    note="through rtls, which has the interface of Python's ssl",
    lacks={
        "* group SecP*": "not among its default groups, and rtls has no choice of groups",
        "* group MLKEM*": "not among its default groups, and rtls has no choice of groups",
        "server retry from *": "rtls has no choice of groups",
        "client retry from x25519 to X25519MLKEM768": "rtls has no choice of groups",
        "server SNI": "rtls does not call its sni_callback",
        "* resumption": "seen: rtls resumes no session",
        "* half-close": "rtls ends both directions at once",
        "* speaking after our close_notify": "rtls ends both directions at once",
        "* KeyUpdate request": "rtls has no call for it",
        "* exporter": "rtls has no call for it",
        "* plain PSK": "rustls has no external PSKs",
    }
    | IMPORT,
)
