"""Secure channels whose keys rest on ECDH, ML-KEM and QKD at once: TLS 1.3 on the wire.

To connect with trio::

    config = ClientConfig(verifier=TrustStore.from_file("ca.pem"))
    stream = await open_secure_tcp_stream("server.example", 4433, config)

To serve::

    identity = Identity.from_files("cert.pem", "key.pem")
    await serve_secure_tcp(handler, 4433, ServerConfig(identities=(identity,)))

- :class:`SecureStream` and :class:`SecureListener` wrap any trio stream or listener;
  :mod:`hybridkex.aio` and :mod:`hybridkex.anyio` are for other event loops, and
  :class:`ClientConnection` and :class:`ServerConnection` are the engine without input or output.
- :class:`ClientConfig` and :class:`ServerConfig` explain every option; :class:`Policy` says what a
  connection must rest on; ``stream.session`` says what it rests on.
- :class:`QkdPskSource` puts QKD keys into the key schedule, from a key source of
  :mod:`hybridkex.qkd`.
- Errors are in :mod:`hybridkex.errors`.
"""

import importlib
import logging
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from hybridkex.auth import (
        DevCa,
        Identity,
        InsecureNoVerification,
        KnownPeers,
        Pins,
        RawIdentity,
        TrustStore,
        WebOfTrust,
        canonical_peer_name,
    )
    from hybridkex.combiner import Leg, combine
    from hybridkex.crypto.kex import (
        ALL_GROUPS,
        MLKEM768,
        MLKEM1024,
        SECP256R1,
        SECP256R1MLKEM768,
        SECP384R1,
        SECP384R1MLKEM1024,
        X25519,
        X25519MLKEM768,
        Concat,
        Group,
        Property,
    )
    from hybridkex.crypto.psk import ExternalPsk
    from hybridkex.crypto.signatures import ALL_SCHEMES
    from hybridkex.crypto.suites import (
        ALL_SUITES,
        SHA256,
        SHA384,
        TLS_AES_128_GCM_SHA256,
        TLS_AES_256_GCM_SHA384,
        TLS_CHACHA20_POLY1305_SHA256,
    )
    from hybridkex.errors import HybridkexError
    from hybridkex.secret import Secret
    from hybridkex.shell.qkd_keys import QkdLimits, QkdPeer, QkdPskSource
    from hybridkex.streams import (
        SecureListener,
        SecureStream,
        open_secure_tcp_listeners,
        open_secure_tcp_stream,
        serve_secure_tcp,
    )
    from hybridkex.tls.config import ClientConfig, Limits, PadToMultiple, PskSource, ServerConfig
    from hybridkex.tls.connection import ClientConnection, ServerConnection
    from hybridkex.tls.epochs import Epoch, KeyUpdates, UpdateKey
    from hybridkex.tls.fresh_keys import FreshKeys, UpdateKeySource
    from hybridkex.tls.one_time_pad import OneTimePad, PadBudget, PadSource
    from hybridkex.tls.policy import Authentication, Policy, Requirement
    from hybridkex.tls.session import AuthenticatedBy, MemoryTicketStore, Session
    from hybridkex.tls.tickets import CookieProtector, TicketIssuer
    from hybridkex.wire.extensions import ApplicationExtension

__all__ = [
    "ALL_GROUPS",
    "ALL_SCHEMES",
    "ALL_SUITES",
    "MLKEM768",
    "MLKEM1024",
    "SECP256R1",
    "SECP256R1MLKEM768",
    "SECP384R1",
    "SECP384R1MLKEM1024",
    "SHA256",
    "SHA384",
    "TLS_AES_128_GCM_SHA256",
    "TLS_AES_256_GCM_SHA384",
    "TLS_CHACHA20_POLY1305_SHA256",
    "X25519",
    "X25519MLKEM768",
    "ApplicationExtension",
    "AuthenticatedBy",
    "Authentication",
    "ClientConfig",
    "ClientConnection",
    "Concat",
    "CookieProtector",
    "DevCa",
    "Epoch",
    "ExternalPsk",
    "FreshKeys",
    "Group",
    "HybridkexError",
    "Identity",
    "InsecureNoVerification",
    "KeyUpdates",
    "KnownPeers",
    "Leg",
    "Limits",
    "MemoryTicketStore",
    "OneTimePad",
    "PadBudget",
    "PadSource",
    "PadToMultiple",
    "Pins",
    "Policy",
    "Property",
    "PskSource",
    "QkdLimits",
    "QkdPeer",
    "QkdPskSource",
    "RawIdentity",
    "Requirement",
    "Secret",
    "SecureListener",
    "SecureStream",
    "ServerConfig",
    "ServerConnection",
    "Session",
    "TicketIssuer",
    "TrustStore",
    "UpdateKey",
    "UpdateKeySource",
    "WebOfTrust",
    "canonical_peer_name",
    "combine",
    "open_secure_tcp_listeners",
    "open_secure_tcp_stream",
    "serve_secure_tcp",
]

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
"""The modules that the names come from. Each is imported when a name of it is first used, so that
``import hybridkex`` costs next to nothing."""


def __getattr__(name: str) -> Any:
    """A public name, from its module (PEP 562)."""
    for module, names in _HOMES.items():
        if name in names:
            value = globals()[name] = getattr(importlib.import_module(module), name)
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# A library says nothing on standard error unless the program asks for it.
logging.getLogger("hybridkex").addHandler(logging.NullHandler())
