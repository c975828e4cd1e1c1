"""Authentication: certificates, names, pins and raw public keys. It holds no TLS state."""

from typing import TYPE_CHECKING, Final

from hybridkex.lazy_names import lazy_names

if TYPE_CHECKING:
    from hybridkex.auth.certificates import PeerCertificate as PeerCertificate
    from hybridkex.auth.certificates import spki_sha256 as spki_sha256
    from hybridkex.auth.dev_ca import DevCa as DevCa
    from hybridkex.auth.identity import Identity as Identity
    from hybridkex.auth.known_peers import KnownPeers as KnownPeers
    from hybridkex.auth.names import DnsName as DnsName
    from hybridkex.auth.names import IpAddress as IpAddress
    from hybridkex.auth.names import PeerName as PeerName
    from hybridkex.auth.names import canonical_peer_name as canonical_peer_name
    from hybridkex.auth.names import parse_peer_name as parse_peer_name
    from hybridkex.auth.raw_keys import PeerRawKey as PeerRawKey
    from hybridkex.auth.raw_keys import RawIdentity as RawIdentity
    from hybridkex.auth.verified import ClientKeyVerifier as ClientKeyVerifier
    from hybridkex.auth.verified import ClientVerifier as ClientVerifier
    from hybridkex.auth.verified import Presented as Presented
    from hybridkex.auth.verified import Refreshable as Refreshable
    from hybridkex.auth.verified import ServerKeyVerifier as ServerKeyVerifier
    from hybridkex.auth.verified import ServerVerifier as ServerVerifier
    from hybridkex.auth.verified import VerifiedPeer as VerifiedPeer
    from hybridkex.auth.verify import InsecureNoVerification as InsecureNoVerification
    from hybridkex.auth.verify import Pins as Pins
    from hybridkex.auth.verify import TrustStore as TrustStore
    from hybridkex.auth.web_of_trust import WebOfTrust as WebOfTrust
    from hybridkex.auth.web_of_trust import endorsement as endorsement

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
__all__ = [name for names in _HOMES.values() for name in names]

if not TYPE_CHECKING:  # or a type checker would take any name for one of this package
    __getattr__ = lazy_names(__name__, _HOMES)
