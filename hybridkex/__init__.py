"""Secure channels whose keys are derived from ECDH, ML-KEM and QKD together: TLS 1.3 on the wire.

To connect with trio::

    config = ClientConfig(verifier=TrustStore.from_file("ca.pem"))
    stream = await open_secure_tcp_stream("server.example", 4433, config)

To serve::

    identity = Identity.from_files("cert.pem", "key.pem")
    await serve_secure_tcp(handler, 4433, ServerConfig(identities=(identity,)))

- :class:`SecureStream` and :class:`SecureListener` wrap any trio stream or listener;
  :mod:`hybridkex.aio` and :mod:`hybridkex.anyio` are for other event loops, and
  :class:`ClientConnection` and :class:`ServerConnection` are the engine without input or output.
- :class:`ClientConfig` and :class:`ServerConfig` explain every option; :class:`Policy` has the
  requirements for a connection; ``stream.session`` shows what was negotiated.
- :class:`QkdPskSource` puts QKD keys into the key schedule, from a key source of
  :mod:`hybridkex.qkd`.
- Errors are in :mod:`hybridkex.errors`.
"""

import importlib
import logging
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from hybridkex.auth import DevCa as DevCa
    from hybridkex.auth import Identity as Identity
    from hybridkex.auth import InsecureNoVerification as InsecureNoVerification
    from hybridkex.auth import KnownPeers as KnownPeers
    from hybridkex.auth import Pins as Pins
    from hybridkex.auth import RawIdentity as RawIdentity
    from hybridkex.auth import TrustStore as TrustStore
    from hybridkex.auth import WebOfTrust as WebOfTrust
    from hybridkex.auth import canonical_peer_name as canonical_peer_name
    from hybridkex.combiner import Leg as Leg
    from hybridkex.combiner import combine as combine
    from hybridkex.crypto.kex import ALL_GROUPS as ALL_GROUPS
    from hybridkex.crypto.kex import MLKEM768 as MLKEM768
    from hybridkex.crypto.kex import MLKEM1024 as MLKEM1024
    from hybridkex.crypto.kex import SECP256R1 as SECP256R1
    from hybridkex.crypto.kex import SECP256R1MLKEM768 as SECP256R1MLKEM768
    from hybridkex.crypto.kex import SECP384R1 as SECP384R1
    from hybridkex.crypto.kex import SECP384R1MLKEM1024 as SECP384R1MLKEM1024
    from hybridkex.crypto.kex import X25519 as X25519
    from hybridkex.crypto.kex import X25519MLKEM768 as X25519MLKEM768
    from hybridkex.crypto.kex import Concat as Concat
    from hybridkex.crypto.kex import Group as Group
    from hybridkex.crypto.kex import Property as Property
    from hybridkex.crypto.psk import ExternalPsk as ExternalPsk
    from hybridkex.crypto.signatures import ALL_SCHEMES as ALL_SCHEMES
    from hybridkex.crypto.suites import ALL_SUITES as ALL_SUITES
    from hybridkex.crypto.suites import SHA256 as SHA256
    from hybridkex.crypto.suites import SHA384 as SHA384
    from hybridkex.crypto.suites import TLS_AES_128_GCM_SHA256 as TLS_AES_128_GCM_SHA256
    from hybridkex.crypto.suites import TLS_AES_256_GCM_SHA384 as TLS_AES_256_GCM_SHA384
    from hybridkex.crypto.suites import TLS_CHACHA20_POLY1305_SHA256 as TLS_CHACHA20_POLY1305_SHA256
    from hybridkex.errors import HybridkexError as HybridkexError
    from hybridkex.secret import Secret as Secret
    from hybridkex.shell.qkd_keys import QkdLimits as QkdLimits
    from hybridkex.shell.qkd_keys import QkdPeer as QkdPeer
    from hybridkex.shell.qkd_keys import QkdPskSource as QkdPskSource
    from hybridkex.streams import SecureListener as SecureListener
    from hybridkex.streams import SecureStream as SecureStream
    from hybridkex.streams import open_secure_tcp_listeners as open_secure_tcp_listeners
    from hybridkex.streams import open_secure_tcp_stream as open_secure_tcp_stream
    from hybridkex.streams import serve_secure_tcp as serve_secure_tcp
    from hybridkex.tls.config import ClientConfig as ClientConfig
    from hybridkex.tls.config import Limits as Limits
    from hybridkex.tls.config import PadToMultiple as PadToMultiple
    from hybridkex.tls.config import PskSource as PskSource
    from hybridkex.tls.config import ServerConfig as ServerConfig
    from hybridkex.tls.connection import ClientConnection as ClientConnection
    from hybridkex.tls.connection import ServerConnection as ServerConnection
    from hybridkex.tls.epochs import Epoch as Epoch
    from hybridkex.tls.epochs import KeyUpdates as KeyUpdates
    from hybridkex.tls.epochs import UpdateKey as UpdateKey
    from hybridkex.tls.fresh_keys import FreshKeys as FreshKeys
    from hybridkex.tls.fresh_keys import UpdateKeySource as UpdateKeySource
    from hybridkex.tls.one_time_pad import OneTimePad as OneTimePad
    from hybridkex.tls.one_time_pad import PadBudget as PadBudget
    from hybridkex.tls.one_time_pad import PadSource as PadSource
    from hybridkex.tls.policy import Authentication as Authentication
    from hybridkex.tls.policy import Policy as Policy
    from hybridkex.tls.policy import Requirement as Requirement
    from hybridkex.tls.session import AuthenticatedBy as AuthenticatedBy
    from hybridkex.tls.session import MemoryTicketStore as MemoryTicketStore
    from hybridkex.tls.session import Session as Session
    from hybridkex.tls.tickets import CookieProtector as CookieProtector
    from hybridkex.tls.tickets import TicketIssuer as TicketIssuer
    from hybridkex.wire.extensions import ApplicationExtension as ApplicationExtension

__version__ = "0.1.0"

_HOMES: Final = {
    "hybridkex.auth": (
        "DevCa",
        "Identity",
        "InsecureNoVerification",
        "KnownPeers",
        "Pins",
        "RawIdentity",
        "TrustStore",
        "WebOfTrust",
        "canonical_peer_name",
    ),
    "hybridkex.combiner": ("Leg", "combine"),
    "hybridkex.crypto.kex": (
        "ALL_GROUPS",
        "MLKEM768",
        "MLKEM1024",
        "SECP256R1",
        "SECP256R1MLKEM768",
        "SECP384R1",
        "SECP384R1MLKEM1024",
        "X25519",
        "X25519MLKEM768",
        "Concat",
        "Group",
        "Property",
    ),
    "hybridkex.crypto.psk": ("ExternalPsk",),
    "hybridkex.crypto.signatures": ("ALL_SCHEMES",),
    "hybridkex.crypto.suites": (
        "ALL_SUITES",
        "SHA256",
        "SHA384",
        "TLS_AES_128_GCM_SHA256",
        "TLS_AES_256_GCM_SHA384",
        "TLS_CHACHA20_POLY1305_SHA256",
    ),
    "hybridkex.errors": ("HybridkexError",),
    "hybridkex.secret": ("Secret",),
    "hybridkex.shell.qkd_keys": ("QkdLimits", "QkdPeer", "QkdPskSource"),
    "hybridkex.streams": (
        "SecureListener",
        "SecureStream",
        "open_secure_tcp_listeners",
        "open_secure_tcp_stream",
        "serve_secure_tcp",
    ),
    "hybridkex.tls.config": (
        "ClientConfig",
        "Limits",
        "PadToMultiple",
        "PskSource",
        "ServerConfig",
    ),
    "hybridkex.tls.connection": ("ClientConnection", "ServerConnection"),
    "hybridkex.tls.epochs": ("Epoch", "KeyUpdates", "UpdateKey"),
    "hybridkex.tls.fresh_keys": ("FreshKeys", "UpdateKeySource"),
    "hybridkex.tls.one_time_pad": ("OneTimePad", "PadBudget", "PadSource"),
    "hybridkex.tls.policy": ("Authentication", "Policy", "Requirement"),
    "hybridkex.tls.session": ("AuthenticatedBy", "MemoryTicketStore", "Session"),
    "hybridkex.tls.tickets": ("CookieProtector", "TicketIssuer"),
    "hybridkex.wire.extensions": ("ApplicationExtension",),
}
"""The modules of the public names. Each is imported when one of its names is first used, which
keeps ``import hybridkex`` fast."""
__all__ = [name for names in _HOMES.values() for name in names]


def __getattr__(name: str) -> Any:
    """A public name, from its module (PEP 562)."""
    for module, names in _HOMES.items():
        if name in names:
            value = globals()[name] = getattr(importlib.import_module(module), name)
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# A library writes nothing to standard error unless the program asks for it.
logging.getLogger("hybridkex").addHandler(logging.NullHandler())
