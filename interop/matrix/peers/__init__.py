"""The peers, a module each."""

from typing import Final

from interop.matrix.peer import Peer
from interop.matrix.peers import (
    caddy,
    chromium,
    curl,
    go,
    node,
    openssl,
    pyopenssl,
    rustls,
    stdlib,
    tlslite,
)

__all__ = ["PEERS"]

PEERS: Final[tuple[Peer, ...]] = (
    pyopenssl.PEER,
    node.PEER,
    go.PEER,
    rustls.PEER,
    caddy.PEER,
    tlslite.PEER,
    openssl.PEER,
    stdlib.PEER,
    curl.PEER,
    chromium.PEER,
)
