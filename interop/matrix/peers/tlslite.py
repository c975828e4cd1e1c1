"""tlslite-ng."""

from functools import partial
from typing import Final

from interop.matrix.peer import Peer
from interop.matrix.peers.python import python_agent
from interop.matrix.peers.reasons import IMPORT

__all__ = ["PEER"]

PEER: Final = Peer(
    name="tlslite-ng",
    open=partial(python_agent, "tlslite_ng", needs="tlslite", package="tlslite-ng>=0.9.0b1"),
    note="verifies no chain, the certificate is compared; no exporter under mutual TLS, where "
    "0.9.0b2 takes the client's messages into its secret, against RFC 9846 section 7.1",
    lacks={
        "* group MLKEM*": "no ML-KEM without ECDH",
        "* half-close": "its close ends both directions",
        "* speaking after our close_notify": "its close ends both directions",
        "* large transfer": "its ciphers are in Python: minutes for 4 MiB",
        "server SNI": "it picks among certificates by signature scheme alone",
        "* key_log": "no key log",
    }
    | IMPORT,
)
