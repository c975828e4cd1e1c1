"""Certificate types: X.509 certificates or a raw public key (RFC 7250).

RFC 9846 section 4.5.1 puts the server's choice into EncryptedExtensions; without an extension it is
X.509. A verifier accepts the kinds for which it has methods; an identity is of one kind.
"""

from collections.abc import Sequence
from datetime import UTC, datetime
from functools import cache
from typing import Final, cast

from hybridkex.auth import (
    ClientKeyVerifier,
    ClientVerifier,
    PeerName,
    ServerKeyVerifier,
    ServerVerifier,
    VerifiedPeer,
)
from hybridkex.constants import Alert, CertificateType
from hybridkex.errors import CertificateRejected, IllegalParameter
from hybridkex.reasons import Reason
from hybridkex.wire.messages import Certificate

AnyServerVerifier = ServerVerifier | ServerKeyVerifier
AnyClientVerifier = ClientVerifier | ClientKeyVerifier

X509: Final = CertificateType.X509
RAW: Final = CertificateType.RAW_PUBLIC_KEY
ONLY_X509: Final[tuple[int, ...]] = (X509,)
"""The types that apply without an extension."""


def accepted_types(verifier: AnyServerVerifier | AnyClientVerifier) -> tuple[int, ...]:
    """The kinds that a verifier can decide about, certificates first."""
    return _accepted_by(type(verifier))


@cache
def _accepted_by(kind: type) -> tuple[int, ...]:
    # Cached by class: isinstance with a protocol takes longer than the rest of a message.
    certificates = issubclass(kind, ServerVerifier | ClientVerifier)
    keys = issubclass(kind, ServerKeyVerifier | ClientKeyVerifier)
    return ((X509,) if certificates else ()) + ((RAW,) if keys else ())


def check_choice(chosen: int | None, offered: tuple[int, ...]) -> int:
    """The kind that the server chose, from its extension if it sent one."""
    if chosen is None:
        return X509
    if chosen not in offered:
        raise IllegalParameter(
            f"certificate type {chosen} was not offered", Reason.CERTIFICATE_TYPE_NOT_OFFERED
        )
    return chosen


def check_entries(kind: int, message: Certificate) -> None:
    """RFC 9846 section 4.5.1: a raw public key is the only entry."""
    if kind == RAW and len(message.entries) > 1:
        raise IllegalParameter(
            f"{len(message.entries)} raw public keys, where one is allowed",
            Reason.CERTIFICATE_ENTRIES,
        )


def accept_server(
    verifier: AnyServerVerifier,
    kind: int,
    chain: Sequence[bytes],
    name: PeerName | None,
    now: float,
) -> VerifiedPeer:
    """Have the verifier decide about a server's credential, at ``now`` (seconds since the
    epoch)."""
    if kind not in accepted_types(verifier):
        raise _unwanted(kind)
    if kind == RAW:
        return cast(ServerKeyVerifier, verifier).verify_server_key(chain[0], name, at=_moment(now))
    return cast(ServerVerifier, verifier).verify_server(chain, name, at=_moment(now))


def accept_client(
    verifier: AnyClientVerifier, kind: int, chain: Sequence[bytes], now: float
) -> VerifiedPeer:
    """Have the verifier decide about a client's credential, at ``now`` (seconds since the
    epoch)."""
    if kind not in accepted_types(verifier):
        raise _unwanted(kind)
    if kind == RAW:
        return cast(ClientKeyVerifier, verifier).verify_client_key(chain[0], at=_moment(now))
    return cast(ClientVerifier, verifier).verify_client(chain, at=_moment(now))


def _moment(now: float) -> datetime:
    return datetime.fromtimestamp(now, UTC)


def _unwanted(kind: int) -> CertificateRejected:
    shown, wanted = "a certificate", "a raw public key"
    if kind == RAW:
        shown, wanted = wanted, shown
    return CertificateRejected(
        f"the peer presented {shown}, and we can only verify {wanted}",
        alert=Alert.UNSUPPORTED_CERTIFICATE,
    )
