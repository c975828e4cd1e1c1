"""One key out of several: the combiner of this library for channels that are not TLS.

:func:`combine` mixes secrets that are there already, :func:`exchange` makes them, in one round trip
over any trio stream. ``wireguard`` keeps the pre-shared key of a WireGuard tunnel fresh with it.
"""

from hybridkex.combiner.exchange import (
    Exchanged,
    PskAuthentication,
    SignatureAuthentication,
    exchange,
)
from hybridkex.combiner.kdf import Leg, Method, cas_kdf, cat_kdf, combine

__all__ = [
    "Exchanged",
    "Leg",
    "Method",
    "PskAuthentication",
    "SignatureAuthentication",
    "cas_kdf",
    "cat_kdf",
    "combine",
    "exchange",
]
