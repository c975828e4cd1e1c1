"""Authentication: certificates, names, pins and raw public keys. It holds no TLS state."""

from typing import TYPE_CHECKING, Final

from hybridkex.lazy_names import lazy_names

if TYPE_CHECKING:
    from hybridkex.auth.certificates import PeerCertificate, spki_sha256
    from hybridkex.auth.dev_ca import DevCa
    from hybridkex.auth.identity import Identity
    from hybridkex.auth.known_peers import KnownPeers
    from hybridkex.auth.names import (
        DnsName,
        IpAddress,
        PeerName,
        canonical_peer_name,
        parse_peer_name,
    )
    from hybridkex.auth.raw_keys import PeerRawKey, RawIdentity
    from hybridkex.auth.verified import (
        ClientKeyVerifier,
        ClientVerifier,
        Presented,
        Refreshable,
        ServerKeyVerifier,
        ServerVerifier,
        VerifiedPeer,
    )
    from hybridkex.auth.verify import InsecureNoVerification, Pins, TrustStore
    from hybridkex.auth.web_of_trust import WebOfTrust, endorsement

__all__ = [
    "ClientKeyVerifier",
    "ClientVerifier",
    "DevCa",
    "DnsName",
    "Identity",
    "InsecureNoVerification",
    "IpAddress",
    "KnownPeers",
    "PeerCertificate",
    "PeerName",
    "PeerRawKey",
    "Pins",
    "Presented",
    "RawIdentity",
    "Refreshable",
    "ServerKeyVerifier",
    "ServerVerifier",
    "TrustStore",
    "VerifiedPeer",
    "WebOfTrust",
    "canonical_peer_name",
    "endorsement",
    "parse_peer_name",
    "spki_sha256",
]

_HOMES: Final = {
    "hybridkex.auth.certificates": ("PeerCertificate", "spki_sha256"),
    "hybridkex.auth.dev_ca": ("DevCa",),
    "hybridkex.auth.identity": ("Identity",),
    "hybridkex.auth.known_peers": ("KnownPeers",),
    "hybridkex.auth.names": (
        "DnsName",
        "IpAddress",
        "PeerName",
        "canonical_peer_name",
        "parse_peer_name",
    ),
    "hybridkex.auth.raw_keys": ("PeerRawKey", "RawIdentity"),
    "hybridkex.auth.verified": (
        "ClientKeyVerifier",
        "ClientVerifier",
        "Presented",
        "Refreshable",
        "ServerKeyVerifier",
        "ServerVerifier",
        "VerifiedPeer",
    ),
    "hybridkex.auth.verify": ("InsecureNoVerification", "Pins", "TrustStore"),
    "hybridkex.auth.web_of_trust": ("WebOfTrust", "endorsement"),
}

if not TYPE_CHECKING:  # or a type checker would take any name for one of this package
    __getattr__ = lazy_names(__name__, _HOMES)
