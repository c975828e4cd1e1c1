"""The proof that a certificate or key was accepted, and the protocols of verifiers."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import InitVar, dataclass, field
from datetime import datetime
from typing import Final, Literal, Protocol, TypeAlias, final, runtime_checkable

from hybridkex.auth.certificates import PeerCertificate
from hybridkex.auth.names import PIN, PeerName
from hybridkex.auth.raw_keys import PeerRawKey

PROOF: Final = object()
"""A token that only the verifiers in :mod:`hybridkex.auth` use."""

Presented: TypeAlias = PeerCertificate | PeerRawKey
"""A peer's credential: a chain of certificates, or a raw public key (RFC 7250)."""


@final
@dataclass(frozen=True)
class VerifiedPeer:
    """Proof that a chain or a key was accepted; only the verifiers of this package make one."""

    proof: InitVar[object]
    """Shows that a verifier of this package made it."""
    certificate: Presented
    """The peer's certificates or raw public key."""
    verified_by: Literal["ca", "pin", "known", "first use", "openpgp", "insecure"]
    """``ca`` if an authority vouched for it (and the pins, if any, matched too)."""
    remember: Callable[[], None] | None = field(default=None, repr=False, compare=False)
    """Writes the peer's key to a store; a shell calls it, in a worker thread, once the peer has
    proved that it holds the key and the session has been authorized. Raises ``CertificateRejected``
    if the store now has another key for the peer."""

    def __post_init__(self, proof: object) -> None:
        if proof is not PROOF:
            raise TypeError("only a verifier makes a VerifiedPeer")

    @property
    def subject(self) -> str:
        """The subject of the end entity's certificate; a raw key's is its pin."""
        return self.certificate.subject

    @property
    def vouched_names(self) -> tuple[str, ...]:
        """The canonical names that a trusted party vouches for. Base decisions only on these.

        For a certificate signed by an authority: the DNS names, IP addresses and URIs in its
        subjectAltName; for a raw key: the names for which the trust store has it. Empty if the key
        is pinned or nothing was verified, since such a peer chooses its own names.
        """
        return () if self.verified_by in ("pin", "insecure") else self.certificate.vouched

    def is_one_of(self, names: Collection[str]) -> bool:
        """Whether a list of names contains the peer.

        Args:
            names: canonical (:func:`~hybridkex.auth.names.canonical_peer_name`); ``sha256:`` and a
                pin means the peer's key, however it was accepted, since the peer has proved
                possession of it.
        """
        return PIN + self.certificate.pin in names or any(
            name in names for name in self.vouched_names
        )


@runtime_checkable
class ServerVerifier(Protocol):
    """Decides about a server's certificates."""

    def verify_server(
        self, chain: Sequence[bytes], name: PeerName | None, *, at: datetime | None = None
    ) -> VerifiedPeer:
        """Accept ``chain`` (DER, leaf first) for ``name``, or raise ``CertificateRejected``.

        ``at`` is the time of the check, aware; ``None`` is now.
        """


@runtime_checkable
class ClientVerifier(Protocol):
    """Decides about a client's certificates."""

    def verify_client(self, chain: Sequence[bytes], *, at: datetime | None = None) -> VerifiedPeer:
        """Accept ``chain`` (DER, leaf first), or raise ``CertificateRejected``.

        ``at`` is the time of the check, aware; ``None`` is now.
        """


@runtime_checkable
class ServerKeyVerifier(Protocol):
    """Decides about a server's raw public key."""

    def verify_server_key(
        self, spki: bytes, name: PeerName | None, *, at: datetime | None = None
    ) -> VerifiedPeer:
        """Accept a SubjectPublicKeyInfo ``spki`` (DER) for ``name``, or raise
        ``CertificateRejected``.

        ``at`` is the time of the check, aware; ``None`` is now.
        """


@runtime_checkable
class ClientKeyVerifier(Protocol):
    """Decides about a client's raw public key."""

    def verify_client_key(self, spki: bytes, *, at: datetime | None = None) -> VerifiedPeer:
        """Accept a SubjectPublicKeyInfo ``spki`` (DER), or raise ``CertificateRejected``.

        ``at`` is the time of the check, aware; ``None`` is now.
        """


@runtime_checkable
class Refreshable(Protocol):
    """A verifier that uses files which may change while it is in use."""

    def refresh(self) -> None:
        """Read the files again.

        A shell calls this, in a worker thread, before each handshake; the engine never does. Raises
        nothing. If a file cannot be read, the verifier accepts no peer.
        """
