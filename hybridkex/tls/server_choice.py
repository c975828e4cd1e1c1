"""The server's checks of a ClientHello, and its choices from it, except the PSK.

Nothing is sent and no state is kept: each function depends only on the configuration and the
ClientHello.
"""

import hashlib
from itertools import islice

from hybridkex.auth import Identity, PeerName, RawIdentity, VerifiedPeer, parse_peer_name
from hybridkex.constants import LEGACY_VERSION, TLS13, Label, PskKeyExchangeMode
from hybridkex.crypto.kex import Group
from hybridkex.crypto.psk import ExternalPsk
from hybridkex.crypto.signatures import SignatureScheme
from hybridkex.crypto.suites import SHA256, SHA384, CipherSuite, HashFunction
from hybridkex.errors import (
    CertificateRejected,
    ConfigError,
    HandshakeFailure,
    IllegalParameter,
    MissingExtension,
    NoApplicationProtocol,
    ProtocolVersionError,
    UnrecognizedName,
)
from hybridkex.reasons import Reason
from hybridkex.tls import fresh_negotiation, negotiation
from hybridkex.tls.admission import resumable
from hybridkex.tls.certificate_types import (
    ONLY_X509,
    AnyClientVerifier,
    accept_client,
    accepted_types,
)
from hybridkex.tls.config import ServerConfig
from hybridkex.tls.policy import Authentication
from hybridkex.tls.tickets import TicketIssuer, TicketState
from hybridkex.tls.transcript import Transcript
from hybridkex.values import value
from hybridkex.wire import extensions as ext
from hybridkex.wire import messages as wire
from hybridkex.wire.codec import u16, vector8, vector16


@value
class OfferedPsk:
    """A PSK identity that a client offers, parsed as far as is possible without a key."""

    index: int
    identity: bytes
    binder: bytes
    imported: wire.ImportedIdentity | None
    """The content of an imported identity; ``None`` for any other (RFC 9258)."""
    ticket: TicketState | None
    """The session in an identity, if that is one of our tickets."""

    @classmethod
    def read(
        cls, index: int, identity: bytes, binder: bytes, tickets: TicketIssuer | None
    ) -> "OfferedPsk":
        """``tickets``: the issuer of our tickets, if tickets may be used."""
        ticket = tickets.open(identity) if tickets is not None else None
        imported = wire.ImportedIdentity.decode(identity) if ticket is None else None
        return cls(index, identity, binder, imported, ticket)

    @property
    def hash(self) -> HashFunction | None:
        """The hash of the PSK, if the identity states it and is for this protocol.

        A plain external PSK does not state it; the default is SHA-256 (section 4.3.11).
        """
        if self.imported is None:
            return SHA256
        if self.imported.target_protocol != TLS13:
            return None
        return SHA256 if self.imported.target_kdf == SHA256.kdf else SHA384

    def names(self, psk: ExternalPsk) -> bool:
        """Whether this identity names the PSK; the binder will show whether the client has the
        key."""
        if psk.context is None:
            return self.identity == psk.identity
        imported = self.imported
        return (
            imported is not None
            and imported.target_protocol == TLS13
            and imported.external_identity == psk.identity
            and imported.context == psk.context
        )


def _check_version(message: wire.ClientHello) -> None:
    """Sections 4.2.2 and 4.3.1."""
    versions = message.extensions.get(ext.SupportedVersionsOffer)
    if versions is None or TLS13 not in versions.versions:
        raise ProtocolVersionError("the client does not speak TLS 1.3", Reason.VERSION)
    if message.legacy_version != LEGACY_VERSION:
        # Section 4.2.2: "A server which receives a legacy_version value not equal to 0x0303
        # MUST abort the handshake with a 'protocol_version' alert."
        raise ProtocolVersionError(
            f"ClientHello.legacy_version is {message.legacy_version:#06x}", Reason.LEGACY_VERSION
        )
    if message.compression_methods != b"\0":
        raise IllegalParameter("the client offers compression", Reason.COMPRESSION)


def _key_shares(extensions: ext.Extensions) -> tuple[tuple[int, ...], dict[int, bytes]]:
    """Sections 4.3.7 and 4.3.8: the groups, and the shares by group."""
    groups, shares = extensions.get(ext.SupportedGroups), extensions.get(ext.KeyShareOffer)
    if groups is None or shares is None:
        missing = "supported_groups" if groups is None else "key_share"
        raise MissingExtension(f"ClientHello without {missing}")
    by_group = {entry.group: entry.share for entry in shares.entries}
    if len(by_group) != len(shares.entries):
        raise IllegalParameter("two key shares for one group", Reason.KEY_SHARES_INCONSISTENT)
    if not by_group.keys() <= set(groups.codes):
        raise IllegalParameter(
            "a key share for a group that is not in supported_groups",
            Reason.KEY_SHARES_INCONSISTENT,
        )
    return groups.codes, by_group


def _psk_offer(extensions: ext.Extensions) -> tuple[ext.PreSharedKeyOffer | None, bool]:
    """Sections 4.3.9, 4.3.11 and 9.2, RFC 9973 section 4: the usable PSKs, and whether the client
    supports psk_dhe_ke."""
    psks, modes = extensions.get(ext.PreSharedKeyOffer), extensions.get(ext.PskKeyExchangeModes)
    if psks is not None and modes is None:
        raise MissingExtension("pre_shared_key without psk_key_exchange_modes")
    if psks is None and ext.SignatureAlgorithms not in extensions:
        raise MissingExtension("ClientHello without pre_shared_key and signature_algorithms")
    psk_dhe = modes is not None and PskKeyExchangeMode.PSK_DHE_KE in modes.modes
    if ext.TlsCertWithExternPsk in extensions:
        if psks is None or not psk_dhe:
            raise MissingExtension("tls_cert_with_extern_psk without a PSK for psk_dhe_ke")
        if ext.EarlyDataIndication in extensions:
            raise IllegalParameter(
                "tls_cert_with_extern_psk with early data", Reason.PSK_WITH_EARLY_DATA
            )
    return psks if psk_dhe else None, psk_dhe


@value
class Hello:
    """A ClientHello that has passed all checks that depend on nothing else."""

    message: wire.ClientHello
    raw: bytes
    groups: tuple[int, ...]
    shares: dict[int, bytes]
    schemes: tuple[int, ...]
    truncated: bytes
    """The part of the ClientHello that the binders cover (section 4.3.11.2)."""
    offered_psks: tuple[OfferedPsk, ...]
    """The identities that we examine: listing one costs the client nothing, and trying one costs
    us."""
    psk_dhe: bool
    """Whether the client supports psk_dhe_ke, in this handshake or to resume it."""
    certificate_with_psk: bool
    server_name: str | None
    """The requested name, in lower case."""

    @classmethod
    def check(cls, message: wire.ClientHello, raw: bytes, config: ServerConfig) -> "Hello":
        """Sections 4.2.2, 4.3 and 9.2, and section 4 of RFC 9973."""
        extensions = message.extensions
        _check_version(message)
        groups, shares = _key_shares(extensions)
        psks, psk_dhe = _psk_offer(extensions)
        schemes, name = extensions.get(ext.SignatureAlgorithms), extensions.get(ext.ServerName)
        certificate_with_psk = ext.TlsCertWithExternPsk in extensions
        offered = zip(psks.identities, psks.binders, strict=True) if psks is not None else ()
        # RFC 9973 section 4: a ticket cannot be combined with a certificate.
        tickets = None if certificate_with_psk else config.tickets
        return cls(
            message=message,
            raw=raw,
            groups=groups,
            shares=shares,
            schemes=schemes.codes if schemes is not None else (),
            truncated=raw if psks is None else raw[: -psks.binders_length],
            offered_psks=tuple(
                OfferedPsk.read(index, one.identity, binder, tickets)
                for index, (one, binder) in enumerate(islice(offered, config.limits.psk_identities))
            ),
            psk_dhe=psk_dhe,
            certificate_with_psk=certificate_with_psk,
            server_name=name.host_name.lower() if name is not None else None,
        )

    @property
    def peer_name(self) -> PeerName | None:
        """The requested name; ``None`` if it is not valid: a client may send any bytes."""
        name = self.server_name
        try:
            return parse_peer_name(name) if name is not None else None
        except ConfigError:
            return None

    @property
    def server_types(self) -> tuple[int, ...]:
        """The kinds of certificate that the client can check (RFC 7250)."""
        offer = self.message.extensions.get(ext.ServerCertificateTypeOffer)
        return offer.types if offer is not None else ONLY_X509

    @property
    def client_types(self) -> tuple[int, ...]:
        offer = self.message.extensions.get(ext.ClientCertificateTypeOffer)
        return offer.types if offer is not None else ONLY_X509

    def invariants(self) -> bytes:
        """A digest of what a second ClientHello must repeat (section 4.2.2)."""
        message = self.message
        # Sorted: some clients shuffle their extensions in each ClientHello.
        kept = sorted((one.type, one.body()) for one in message.extensions)
        return hashlib.sha256(
            message.random
            + vector8(message.session_id)
            + vector16(b"".join(map(u16, message.cipher_suites)))
            + b"".join(
                u16(type_) + vector16(body) for type_, body in kept if type_ not in ext.MAY_CHANGE
            )
        ).digest()


def first_usable(config: ServerConfig, hello: Hello, suite: CipherSuite) -> bytes:
    """Return, for the cookie, a digest of the first identity that may be used with this suite, if
    any."""
    for offered in hello.offered_psks:
        if _usable_with(config, hello, offered) is suite.hash:
            return hashlib.sha256(offered.identity).digest()
    return b""


def choose_group(config: ServerConfig, hello: Hello) -> Group:
    """Our first group that the client supports; between equals, one with a key share is
    preferred."""
    common = [group for group in config.group_list if group.code in hello.groups]
    if not common:
        raise HandshakeFailure("no group in common", Reason.NO_COMMON_GROUP)
    best = common[0]
    for group in common:
        if group.code in hello.shares and group.properties == best.properties:
            return group
    return best


def choose_suite(config: ServerConfig, hello: Hello) -> CipherSuite:
    """Our first suite that the client supports; if it offers PSKs, one with their hash."""
    offered = set(hello.message.cipher_suites)
    common = [suite for suite in config.suites if suite.code in offered]
    if not common:
        raise HandshakeFailure("no cipher suite in common", Reason.NO_COMMON_SUITE)
    hashes = {_usable_with(config, hello, offered) for offered in hello.offered_psks}
    return next((suite for suite in common if suite.hash in hashes), common[0])


def _usable_with(config: ServerConfig, hello: Hello, offered: OfferedPsk) -> HashFunction | None:
    """The hash of a suite with which a PSK may be usable, if there is one."""
    external = _find_external(config, offered)
    if external is not None:
        return offered.hash if external.imported else external.hash
    if offered.ticket is not None:
        return _hash_of(config, offered.ticket.suite)
    return offered.hash if worth_asking(config) else None


def _find_external(config: ServerConfig, offered: OfferedPsk) -> ExternalPsk | None:
    """The configured PSK behind an identity."""
    if not config.has_psk:
        return None
    return next((psk for psk in config.psks if offered.names(psk)), None)


def preference(config: ServerConfig, offered: OfferedPsk) -> int:
    """The position among the configured PSKs; other identities, such as tickets, come first."""
    external = _find_external(config, offered)
    return config.psks.index(external) if external is not None else -1


def worth_asking(config: ServerConfig) -> bool:
    """Whether an outside source may have the PSK."""
    return config.psk_source is not None and config.has_psk


def _hash_of(config: ServerConfig, code: int) -> HashFunction | None:
    return next((suite.hash for suite in config.suites if suite.code == code), None)


@value
class Credential:
    """Our credential, and the scheme for signing with its key."""

    identity: Identity | RawIdentity
    scheme: SignatureScheme
    named: bool
    """Whether it is for the name that the client asked for."""


@value
class ClientCredential:
    """The credential that a client is asked for, and the verifier that decides about it."""

    type: int
    verifier: AnyClientVerifier


@value
class Choice:
    """Everything chosen from the ClientHello except the PSK."""

    config: ServerConfig
    hello: Hello
    suite: CipherSuite
    group: Group
    transcript: Transcript
    """The transcript before this ClientHello: empty, or after a retry."""
    credential: Credential | None
    """Our credential for this client, if there is one."""
    alpn: bytes | None
    application: tuple[tuple[ext.Extension, ext.Extension], ...]
    """The client's offers of application extensions, each with our answer."""
    client_credential: ClientCredential | None
    """The credential that the client is asked for; ``None`` if it is not asked."""
    agreed: fresh_negotiation.Agreed

    @classmethod
    def of(
        cls,
        config: ServerConfig,
        hello: Hello,
        suite: CipherSuite,
        group: Group,
        transcript: Transcript,
    ) -> "Choice":
        """Choose the rest. Raises ``PeerError`` if nothing is in common."""
        return cls(
            config=config,
            hello=hello,
            suite=suite,
            group=group,
            transcript=transcript,
            credential=_choose_credential(config, hello),
            alpn=_choose_alpn(config, hello),
            application=_answer_application(config, hello),
            client_credential=_choose_client_credential(config, hello),
            agreed=fresh_negotiation.agree(config, hello.message.extensions),
        )


def _choose_credential(config: ServerConfig, hello: Hello) -> Credential | None:
    """Our certificate or raw key: by name first, then by what the client can verify."""
    name, signers = hello.peer_name, config.once(_signers)
    named = [] if name is None else [one for one in signers if one.identity.matches(name)]
    if config.require_known_name and not named:
        raise UnrecognizedName(
            f"no identity for the name {hello.server_name}", Reason.SERVER_NAME_UNKNOWN
        )
    for fits, candidates in ((True, named), (False, signers)):
        for signer in candidates:
            if signer.identity.certificate_type in hello.server_types:
                for scheme in signer.schemes:
                    if scheme.code in hello.schemes:
                        return Credential(signer.identity, scheme, fits)
    return None


@value
class _Signer:
    """One of our identities."""

    identity: Identity | RawIdentity
    schemes: tuple[SignatureScheme, ...]
    """The schemes of the configuration that suit its key."""


def _signers(config: ServerConfig) -> tuple[_Signer, ...]:
    schemes = config.signature_schemes
    return tuple(
        _Signer(one, tuple(scheme for scheme in schemes if scheme.suits(one.signing_key)))
        for one in config.identities
    )


def _choose_client_credential(config: ServerConfig, hello: Hello) -> ClientCredential | None:
    """The first kind that the client can show and that we can check (RFC 7250 section 4.2)."""
    verifier = config.client_verifier
    if verifier is None:
        return None
    ours = accepted_types(verifier)
    kind = next((kind for kind in hello.client_types if kind in ours), None)
    return None if kind is None else ClientCredential(kind, verifier)


def _choose_alpn(config: ServerConfig, hello: Hello) -> bytes | None:
    offer = hello.message.extensions.get(ext.AlpnOffer)
    if offer is None or not config.alpn:
        return None
    for name in config.alpn:
        if name.encode() in offer.protocols:
            return name.encode()
    raise NoApplicationProtocol("no application protocol in common")


def _answer_application(
    config: ServerConfig, hello: Hello
) -> tuple[tuple[ext.Extension, ext.Extension], ...]:
    """The answers to the offers for which the configuration has an extension."""
    answered = []
    for ours in config.extensions:
        offered = hello.message.extensions.decoded(ours, ours.read)
        answer = ours.answer(offered) if offered is not None else None
        if offered is not None and answer is not None:
            ext.check_own(ours, answer, "answer")
            answered.append((offered, answer))
    return tuple(answered)


def external_allowed(choice: Choice) -> bool:
    """Whether an external PSK can be combined with our authentication (RFC 9973 or PSK alone)."""
    if choice.config.authentication in (Authentication.PSK, Authentication.EITHER):
        return True
    return choice.hello.certificate_with_psk and choice.credential is not None


@value
class Resumption:
    """The session that is resumed."""

    ticket: TicketState
    peer: VerifiedPeer | None
    """The client, verified again for this handshake, if it presented a credential."""


@value
class Selected:
    """The PSK that we select from the client's offer."""

    offered: OfferedPsk
    psk: negotiation.Psk
    resumption: Resumption | None


def resolve(choice: Choice, offered: OfferedPsk) -> Selected | None:
    """The PSK behind an identity, from our configuration or from a ticket of ours."""
    config, function = choice.config, choice.suite.hash
    external = _find_external(config, offered)
    if external is not None:
        return select_external(choice, offered, external) if external_allowed(choice) else None
    state = offered.ticket
    resumption = _resume(choice, state) if state is not None else None
    if state is None or resumption is None:
        return None
    psk = negotiation.Psk(
        identity=offered.identity,
        key=state.psk,
        hash=function,
        binder_label=Label.RESUMPTION_BINDER,
        resumption=True,
        external_identity=state.psk_identity,
        external_context=state.psk_context,
    )
    return Selected(offered, psk, resumption)


def select_external(choice: Choice, offered: OfferedPsk, external: ExternalPsk) -> Selected | None:
    """The external PSK that was named, if its hash is that of our suite; its key is derived
    here."""
    for psk in negotiation.external_psks(external, (choice.suite,)):
        if psk.identity == offered.identity and psk.hash == choice.suite.hash:
            return Selected(offered, psk, None)
    return None


def _resume(choice: Choice, state: TicketState) -> Resumption | None:
    """The session in a ticket, if it satisfies the present configuration and its client is still
    trusted."""
    config, credential = choice.config, choice.credential
    if (
        _hash_of(config, state.suite) != choice.suite.hash
        or state.server_name != choice.hello.server_name
        or not resumable(config, state, credential.identity if credential is not None else None)
    ):
        return None
    if config.client_verifier is None:
        return Resumption(state, None)
    if not state.client_chain:
        return None if config.require_client_certificate else Resumption(state, None)
    try:
        kind, now = state.client_certificate_type, config.clock()
        return Resumption(
            state, accept_client(config.client_verifier, kind, state.client_chain, now)
        )
    except CertificateRejected:
        return None
