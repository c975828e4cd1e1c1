"""Who the peer is, and who we are: certificates, names, pins. No TLS state lives here."""

from hybridkex.auth.certificates import PeerCertificate, spki_sha256
from hybridkex.auth.dev_ca import DevCa
from hybridkex.auth.identity import Identity
from hybridkex.auth.names import DnsName, IpAddress, PeerName, parse_peer_name
from hybridkex.auth.verify import (
    ClientVerifier,
    InsecureNoVerification,
    Pins,
    ServerVerifier,
    TrustStore,
    VerifiedPeer,
)

__all__ = [
    "ClientVerifier",
    "DevCa",
    "DnsName",
    "Identity",
    "InsecureNoVerification",
    "IpAddress",
    "PeerCertificate",
    "PeerName",
    "Pins",
    "ServerVerifier",
    "TrustStore",
    "VerifiedPeer",
    "parse_peer_name",
    "spki_sha256",
]
