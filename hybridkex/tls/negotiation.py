"""Code that client and server share in a handshake: offered PSKs, keys, signed content,
authentication."""

import hmac
from collections.abc import Iterable, Sequence
from functools import cached_property, lru_cache
from typing import Final

from hybridkex.auth import Identity, RawIdentity, VerifiedPeer
from hybridkex.constants import TLS13, Label
from hybridkex.crypto.kex import Group
from hybridkex.crypto.psk import ExternalPsk, import_key
from hybridkex.crypto.schedule import (
    EarlySecret,
    ExporterSecret,
    HandshakeSecret,
    MainSecret,
    TrafficSecret,
)
from hybridkex.crypto.signatures import SignatureScheme
from hybridkex.crypto.suites import CipherSuite, HashFunction
from hybridkex.errors import DecryptError, IllegalParameter
from hybridkex.reasons import Reason
from hybridkex.secret import Secret
from hybridkex.text import printable
from hybridkex.tls.fresh_negotiation import Agreed
from hybridkex.tls.policy import Policy
from hybridkex.tls.record_layer import RecordLayer
from hybridkex.tls.session import AuthenticatedBy, Session, SessionTicket
from hybridkex.tls.tickets import TicketState
from hybridkex.tls.transcript import Transcript
from hybridkex.values import value
from hybridkex.wire import extensions as ext
from hybridkex.wire.messages import (
    Certificate,
    CertificateVerify,
    Finished,
    ImportedIdentity,
    encode,
)


@value
class Psk:
    """A PSK as the key schedule sees it."""

    identity: bytes
    key: Secret
    hash: HashFunction
    binder_label: bytes
    resumption: bool
    external_identity: bytes | None
    """The external PSK itself, or the one in the key schedule of the resumed session."""
    external_context: bytes | None = None
    """The context of its import (RFC 9258); ``None`` for a plain PSK."""
    origin: object = None
    """The origin of the :class:`ExternalPsk`; a resumption has none."""

    @cached_property
    def early_secret(self) -> EarlySecret:
        """The first stage of the key schedule, for the binder and for the handshake."""
        return EarlySecret.start(self.hash, self.key)


def external_psks(psk: ExternalPsk, suites: Iterable[CipherSuite]) -> list[Psk]:
    """The offers for one external PSK: the PSK itself, or an import for each hash (RFC 9258)."""

    def offer(identity: bytes, key: Secret, target: HashFunction, binder_label: bytes) -> Psk:
        return Psk(
            identity=identity,
            key=key,
            hash=target,
            binder_label=binder_label,
            resumption=False,
            external_identity=psk.identity,
            external_context=psk.context,
            origin=psk.origin,
        )

    if psk.context is None:
        return [offer(psk.identity, psk.key, psk.hash, Label.EXTERNAL_BINDER)]
    offers = []
    for target in dict.fromkeys(suite.hash for suite in suites):
        imported = ImportedIdentity(psk.identity, psk.context, TLS13, target.kdf).encode()
        key = import_key(psk, imported, target)
        offers.append(offer(imported, key, target, Label.IMPORTED_BINDER))
    return offers


@value
class PeerProof:
    """The evidence of who the peer is; only verified signatures and PSKs produce it."""

    certificate: VerifiedPeer | None
    scheme: SignatureScheme | None


@value
class HandshakeKeys:
    """The keys of the encrypted part of the handshake."""

    suite: CipherSuite
    secret: HandshakeSecret
    client: TrafficSecret
    server: TrafficSecret

    @classmethod
    def derive(
        cls,
        suite: CipherSuite,
        psk: Psk | None,
        shared: Secret,
        transcript: Transcript,
        records: RecordLayer,
    ) -> "HandshakeKeys":
        """``shared`` is the secret of the key exchange; ``transcript``: ClientHello...ServerHello.

        The record layer logs them for a key log.
        """
        early = psk.early_secret if psk is not None else EarlySecret.start(suite.hash)
        secret = early.handshake_secret(shared)
        digest = transcript.digest()
        server = secret.server_handshake_traffic(suite, digest)
        client = secret.client_handshake_traffic(suite, digest)
        records.log_secret("SERVER_HANDSHAKE_TRAFFIC_SECRET", server.secret)
        records.log_secret("CLIENT_HANDSHAKE_TRAFFIC_SECRET", client.secret)
        return cls(suite, secret, client, server)

    def application_keys(self, transcript: Transcript, records: RecordLayer) -> "ApplicationKeys":
        """The keys of application data; ``transcript``: ClientHello...server Finished."""
        digest = transcript.digest()
        main = self.secret.main_secret()
        server = main.server_application_traffic(self.suite, digest)
        client = main.client_application_traffic(self.suite, digest)
        exporter = main.exporter_secret(digest)
        records.log_secret("SERVER_TRAFFIC_SECRET_0", server.secret)
        records.log_secret("CLIENT_TRAFFIC_SECRET_0", client.secret)
        records.log_secret("EXPORTER_SECRET", exporter.secret)
        return ApplicationKeys(main, client, server, exporter, digest)


@value
class ApplicationKeys:
    """The last stage of the key schedule."""

    main: MainSecret
    client: TrafficSecret
    server: TrafficSecret
    exporter: ExporterSecret
    digest: bytes
    """The hash of ClientHello...server Finished."""


@value
class Negotiated:
    """The parameters negotiated in ServerHello and EncryptedExtensions."""

    suite: CipherSuite
    group: Group
    psk: Psk | None
    alpn: bytes | None
    extensions: tuple[ext.Extension, ...]
    """The application's extensions: at a client the server's answers, at a server the client's
    offers."""
    server_name: str | None
    policy: Policy
    agreed: Agreed


_PREFIX: Final = b" " * 64


def _signed_content(label: bytes, transcript: Transcript) -> bytes:
    """The content that CertificateVerify signs (RFC 9846 section 4.5.2)."""
    return _PREFIX + label + b"\0" + transcript.digest()


def sign_transcript(
    identity: Identity | RawIdentity, scheme: SignatureScheme, label: bytes, transcript: Transcript
) -> CertificateVerify:
    """Our signature over the transcript so far."""
    content = _signed_content(label, transcript)
    return CertificateVerify(scheme.code, scheme.sign(identity.signing_key, content))


def verify_signature(
    message: CertificateVerify,
    peer: VerifiedPeer,
    offered: Sequence[SignatureScheme],
    label: bytes,
    transcript: Transcript,
) -> SignatureScheme:
    """Check the peer's signature; returns its scheme.

    Raises:
        IllegalParameter: the scheme was not offered, or does not match the key.
        DecryptError: the signature is invalid.
    """
    for scheme in offered:
        if scheme.code == message.scheme:
            content = _signed_content(label, transcript)
            scheme.verify(peer.certificate.public_key, message.signature, content)
            return scheme
    raise IllegalParameter(
        f"a signature of scheme {message.scheme:#06x}, which was not offered",
        Reason.SIGNATURE_SCHEME,
    )


@lru_cache(maxsize=64)
def certificate_message(chain: tuple[bytes, ...]) -> bytes:
    """An encoded Certificate message with our chain or raw public key; without a chain, an empty
    one."""
    return encode(Certificate(b"", tuple((data, ext.Extensions()) for data in chain)))


def check_finished(message: Finished, traffic: TrafficSecret, transcript: Transcript) -> None:
    """Compare the peer's Finished with ours, in constant time (section 4.5.3)."""
    if not hmac.compare_digest(message.verify_data, traffic.finished(transcript.digest())):
        raise DecryptError(
            "Finished does not verify: the handshake was modified in transit", Reason.FINISHED
        )


def session_of(
    negotiated: Negotiated,
    *,
    ticket: SessionTicket | TicketState | None,
    scheme: SignatureScheme | None,
    peer: VerifiedPeer | None,
    checked: bool,
    now: float,
) -> Session:
    """The session that the handshake negotiated.

    Args:
        negotiated: what was agreed with the peer.
        ticket: the ticket of the resumed session.
        scheme: the scheme of the server's signature, if it signed.
        peer: the peer, if it presented a credential.
        checked: whether the server's certificate was verified, if it presented one.
        now: seconds since the epoch.
    """
    suite, group, psk = negotiated.suite, negotiated.group, negotiated.psk
    alpn, server_name = negotiated.alpn, negotiated.server_name
    if ticket is not None:
        by = ticket.authenticated_by
    elif psk is not None:
        by = AuthenticatedBy.BOTH if scheme is not None else AuthenticatedBy.PSK
    else:
        by = AuthenticatedBy.CERTIFICATE if checked else AuthenticatedBy.NOTHING
    return Session(
        cipher_suite=suite.name,
        group=group.name,
        parts=group.part_names,
        post_quantum=group.post_quantum,
        authenticated_by=by,
        signature_scheme=scheme.name if scheme is not None else None,
        psk_identity=psk.external_identity if psk is not None else None,
        psk_context=psk.external_context if psk is not None else None,
        psk_origin=psk.origin if psk is not None else None,
        resumed=psk is not None and psk.resumption,
        alpn=printable(alpn.decode("utf-8", "backslashreplace")) if alpn is not None else None,
        extensions=negotiated.extensions,
        server_name=printable(server_name) if server_name is not None else None,
        peer_credential=peer.certificate if peer is not None else None,
        verified_by=peer.verified_by if peer is not None else None,
        vouched_names=peer.vouched_names if peer is not None else (),
        policy=negotiated.policy,
        began_at=float(ticket.began_at) if ticket is not None else now,
        key_updates=negotiated.agreed.key_updates,
        one_time_pad=negotiated.agreed.one_time_pad,
    )
