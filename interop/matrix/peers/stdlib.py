"""The standard library's ``ssl``, with the OpenSSL that this Python is linked to."""

import ssl
import sys
from functools import partial
from typing import Final

from interop.matrix.peer import Peer
from interop.matrix.peers.python import python_agent
from interop.matrix.peers.reasons import IMPORT, NO_HYBRIDS, NO_MLDSA

__all__ = ["PEER"]

_OLD: Final = NO_HYBRIDS | NO_MLDSA if ssl.OPENSSL_VERSION_INFO < (3, 5) else {}
_NO_PSK: Final = (
    {} if sys.version_info >= (3, 13) else {"* plain PSK": "its PSK callbacks came with 3.13"}
)

PEER: Final = Peer(
    name="Python's ssl",
    open=partial(python_agent, "ssl_module", "ssl", needs="ssl", package="python"),
    lacks=_OLD
    | _NO_PSK
    | {
        "* retry from x25519 to X25519MLKEM768": "no choice of groups but one of NIST's curves",
        "* KeyUpdate request": "no call for it",
        "* exporter": "no call for it",
    }
    | IMPORT,
)
