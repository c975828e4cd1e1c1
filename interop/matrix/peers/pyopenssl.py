"""OpenSSL 4 in the `cryptography` wheel."""

from functools import partial
from typing import Final

from interop.matrix.peer import Peer
from interop.matrix.peers.python import python_agent
from interop.matrix.peers.reasons import IMPORT

__all__ = ["PEER"]

PEER: Final = Peer(
    name="pyOpenSSL",
    open=partial(python_agent, "pyopenssl", needs="OpenSSL", package="pyOpenSSL>=26"),
    note="over memory BIOs, more of it in tests/tls/test_pyopenssl.py",
    lacks={"* KeyUpdate request": "its binding has no SSL_key_update"} | IMPORT,
)
