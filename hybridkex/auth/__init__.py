"""Authentication: certificates, names, pins and raw public keys. It holds no TLS state."""

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
