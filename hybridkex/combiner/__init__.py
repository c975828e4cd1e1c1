"""Hybrid keys for protocols other than TLS.

:func:`combine` derives one key from secrets that both sides already share. :func:`exchange`
establishes the secrets as well, over any trio stream. ``wireguard`` uses it to rotate the
pre-shared key of a WireGuard tunnel.
"""

from hybridkex.combiner.exchange import (
    ExchangeConfig,
    Exchanged,
    PskAuthentication,
    SignatureAuthentication,
    exchange,
)
from hybridkex.combiner.kdf import Leg, Method, cas_kdf, cat_kdf, combine

__all__ = [
    "ExchangeConfig",
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
