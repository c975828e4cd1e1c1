"""The server's handshake (RFC 9846 appendix A.2), one class per state, in their order.

Anybody can send a ClientHello, so it is checked in the order of cost: first its content, then our
tickets, then the key exchange, and last an outside key source (:class:`WaitPsk`). :data:`STEPS`, at
the end, lists all states with the messages between them.
"""

import hashlib
import hmac
from collections.abc import Mapping
from itertools import islice
from typing import Final

from hybridkex.auth import Identity, PeerName, RawIdentity, VerifiedPeer, parse_peer_name
from hybridkex.constants import (
    HELLO_RETRY_RANDOM,
    LEGACY_VERSION,
    TLS13,
    HandshakeType,
    Label,
    PskKeyExchangeMode,
)
from hybridkex.crypto.kex import Group
from hybridkex.crypto.one_time_pad import Pad
from hybridkex.crypto.psk import ExternalPsk
from hybridkex.crypto.schedule import (
    EarlySecret,
    ExporterSecret,
    HandshakeSecret,
    MainSecret,
    TrafficSecret,
)
from hybridkex.crypto.signatures import CERTIFICATE_ONLY_SCHEMES, SignatureScheme
from hybridkex.crypto.suites import SHA256, SHA384, CipherSuite, HashFunction
from hybridkex.crypto.update_schedule import Generation
from hybridkex.errors import (
    CertificateRejected,
    ConfigError,
    DecryptError,
    HandshakeFailure,
    IllegalParameter,
    LocalStateError,
    MissingExtension,
    NoApplicationProtocol,
    PeerError,
    ProtocolVersionError,
    UnknownPskIdentity,
    UnrecognizedName,
    UnsupportedCertificateType,
    UnsupportedExtension,
)
from hybridkex.reasons import Reason
from hybridkex.secret import Secret
from hybridkex.tls import fresh_negotiation, negotiation
from hybridkex.tls.admission import check_session, resumable
from hybridkex.tls.certificate_types import (
    ONLY_X509,
    AnyClientVerifier,
    accept_client,
    accepted_types,
    check_entries,
)
from hybridkex.tls.config import ServerConfig
from hybridkex.tls.epochs import KeyUpdates
from hybridkex.tls.events import HandshakeCompleted, PskWanted, SessionProposed
from hybridkex.tls.extended_key_update import Updates
from hybridkex.tls.policy import Authentication, Requirement
from hybridkex.tls.record_layer import RecordLayer
from hybridkex.tls.session import Session
from hybridkex.tls.steps import Step
from hybridkex.tls.tickets import CookieState, TicketIssuer, TicketState
from hybridkex.tls.traffic import Connected, ServerTraffic
from hybridkex.tls.transcript import Transcript
from hybridkex.values import value
from hybridkex.wire import extensions as ext
from hybridkex.wire import messages as wire
from hybridkex.wire.codec import u16, vector8, vector16
from hybridkex.wire.message import Message


class ServerState:
    """The interface of a state."""

    def handle(
        self, message: Message, raw: bytes, records: RecordLayer
    ) -> "ServerState | ServerTraffic":
        """Check one message, of a type that :data:`STEPS` has for this state."""
        raise NotImplementedError


def start(config: ServerConfig, records: RecordLayer) -> ServerState:
    """Wait for the client to speak first."""
    return WaitClientHello(config)


@value
class _OfferedPsk:
    """An identity that a client offers, read as far as it can be without any key."""

    index: int
    identity: bytes
    binder: bytes
    imported: wire.ImportedIdentity | None
    """The content of an imported identity; ``None`` for any other (RFC 9258)."""
    ticket: TicketState | None
    """The session in it, if it is a ticket of ours."""

    @classmethod
    def read(
        cls, index: int, identity: bytes, binder: bytes, tickets: TicketIssuer | None
    ) -> "_OfferedPsk":
        """``tickets``: whose tickets are ours, if any may be used."""
        ticket = tickets.open(identity) if tickets is not None else None
        imported = wire.ImportedIdentity.decode(identity) if ticket is None else None
        return cls(index, identity, binder, imported, ticket)

    @property
    def hash(self) -> HashFunction | None:
        """The hash that it goes with, where it says so and it is for this protocol.

        A plain external PSK does not say; its default is SHA-256 (section 4.3.11).
        """
        if self.imported is None:
            return SHA256
        if self.imported.target_protocol != TLS13:
            return None
        return SHA256 if self.imported.target_kdf == SHA256.kdf else SHA384

    def names(self, psk: ExternalPsk) -> bool:
        """Whether this names the PSK; whether the client has its key is for the binder to show."""
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
    """Sections 4.3.9, 4.3.11 and 9.2, RFC 9973 section 4: the PSKs that may be used, and whether
    the client can do psk_dhe_ke."""
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
class _Hello:
    """A ClientHello that passed the checks that need nothing but itself."""

    message: wire.ClientHello
    raw: bytes
    groups: tuple[int, ...]
    shares: dict[int, bytes]
    schemes: tuple[int, ...]
    truncated: bytes
    """The part of the ClientHello that the binders cover (section 4.3.11.2)."""
    offered_psks: tuple[_OfferedPsk, ...]
    """The identities that we look at: to list one costs nothing, to try one does."""
    psk_dhe: bool
    """Whether the client can do psk_dhe_ke, in this handshake or to resume it."""
    certificate_with_psk: bool
    server_name: str | None
    """The requested name, in lower case."""

    @classmethod
    def check(cls, message: wire.ClientHello, raw: bytes, config: ServerConfig) -> "_Hello":
        """Sections 4.2.2, 4.3 and 9.2, and section 4 of RFC 9973."""
        extensions = message.extensions
        _check_version(message)
        groups, shares = _key_shares(extensions)
        psks, psk_dhe = _psk_offer(extensions)
        schemes, name = extensions.get(ext.SignatureAlgorithms), extensions.get(ext.ServerName)
        certificate_with_psk = ext.TlsCertWithExternPsk in extensions
        offered = zip(psks.identities, psks.binders, strict=True) if psks is not None else ()
        # RFC 9973 section 4: a ticket does not go together with a certificate.
        tickets = None if certificate_with_psk else config.tickets
        return cls(
            message=message,
            raw=raw,
            groups=groups,
            shares=shares,
            schemes=schemes.codes if schemes is not None else (),
            truncated=raw if psks is None else raw[: -psks.binders_length],
            offered_psks=tuple(
                _OfferedPsk.read(index, one.identity, binder, tickets)
                for index, (one, binder) in enumerate(islice(offered, config.limits.psk_identities))
            ),
            psk_dhe=psk_dhe,
            certificate_with_psk=certificate_with_psk,
            server_name=name.host_name.lower() if name is not None else None,
        )

    @property
    def peer_name(self) -> PeerName | None:
        """The same, if it is a name at all: a client may ask for any bytes."""
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
        """The kinds of certificate that the client can show."""
        offer = self.message.extensions.get(ext.ClientCertificateTypeOffer)
        return offer.types if offer is not None else ONLY_X509

    def invariants(self) -> bytes:
        """A digest of what a second ClientHello must repeat (section 4.2.2)."""
        message = self.message
        # Sorted: some clients shuffle their extensions anew in each hello.
        kept = sorted((one.type, one.body()) for one in message.extensions)
        return hashlib.sha256(
            message.random
            + vector8(message.session_id)
            + vector16(b"".join(map(u16, message.cipher_suites)))
            + b"".join(
                u16(type_) + vector16(body) for type_, body in kept if type_ not in ext.MAY_CHANGE
            )
        ).digest()


@value
class WaitClientHello(ServerState):
    """The state before the first ClientHello."""

    config: ServerConfig

    def handle(
        self, message: Message, raw: bytes, records: RecordLayer
    ) -> ServerState | ServerTraffic:
        assert isinstance(message, wire.ClientHello)
        records.reader.check_message_boundary()
        records.client_random = message.random
        records.reader.change_cipher_spec_allowed = True
        hello = _Hello.check(message, raw, self.config)
        config = self.config
        group = _choose_group(config, hello)
        suite = _choose_suite(config, hello)
        if group.code not in hello.shares:
            return self._retry(hello, suite, group, records)
        if ext.EarlyDataIndication in message.extensions:
            records.reader.skip_early_data(after_retry=False)
        return _negotiate(config, hello, suite, group, None, records)

    def _retry(
        self, hello: _Hello, suite: CipherSuite, group: Group, records: RecordLayer
    ) -> ServerState:
        """Ask for another share, and forget this hello: the cookie remembers it (section 4.3.2)."""
        state = CookieState(
            suite=suite.code,
            group=group.code,
            hello_digest=suite.hash.digest(hello.raw),
            invariants=hello.invariants(),
            psk=_first_usable(self.config, hello, suite),
            session_id=hello.message.session_id,
        )
        cookie = self.config.cookies.seal(state)
        records.writer.send_raw(_retry_request(state, cookie))
        records.writer.flush()
        records.writer.send_change_cipher_spec()
        if ext.EarlyDataIndication in hello.message.extensions:
            records.reader.skip_early_data(after_retry=True)
        return WaitSecondClientHello(self.config)


def _retry_request(state: CookieState, cookie: bytes) -> bytes:
    """The HelloRetryRequest for a cookie; the same bytes whenever it is made."""
    return wire.encode(
        wire.HelloRetryRequest(
            random=HELLO_RETRY_RANDOM,
            session_id=state.session_id,
            cipher_suite=state.suite,
            extensions=ext.Extensions(
                (
                    ext.SupportedVersionsChoice(TLS13),
                    ext.KeyShareRetry(state.group),
                    ext.Cookie(cookie),
                )
            ),
        )
    )


@value
class WaitSecondClientHello(ServerState):
    """The state after HelloRetryRequest; only the cookie has data of the first hello."""

    config: ServerConfig

    def handle(
        self, message: Message, raw: bytes, records: RecordLayer
    ) -> ServerState | ServerTraffic:
        assert isinstance(message, wire.ClientHello)
        records.reader.check_message_boundary()
        records.reader.stop_skipping_early_data()
        hello = _Hello.check(message, raw, self.config)
        cookie = message.extensions.get(ext.Cookie)
        if cookie is None:
            raise MissingExtension("the second ClientHello has no cookie")
        state = self.config.cookies.open(cookie.cookie)
        if state is None:
            raise IllegalParameter("the cookie is not ours, or too old", Reason.COOKIE_NOT_OURS)
        if not hmac.compare_digest(state.invariants, hello.invariants()):
            raise IllegalParameter(
                "the second ClientHello differs from the first", Reason.RETRY_HELLO_CHANGED
            )
        _check_psk_is_kept(state, hello)
        if ext.EarlyDataIndication in message.extensions:
            raise IllegalParameter("early data after HelloRetryRequest", Reason.RETRY_EARLY_DATA)
        if list(hello.shares) != [state.group]:
            raise IllegalParameter(
                "the second ClientHello lacks the requested key share", Reason.RETRY_HELLO_CHANGED
            )
        suite = next((one for one in self.config.suites if one.code == state.suite), None)
        group = next((one for one in self.config.group_list if one.code == state.group), None)
        if suite is None or group is None:
            raise IllegalParameter(
                "the cookie was made under another configuration", Reason.COOKIE_NOT_OURS
            )
        retry = _retry_request(state, cookie.cookie)
        transcript = Transcript.after_retry(suite.hash, state.hello_digest, retry)
        return _negotiate(self.config, hello, suite, group, transcript, records)


def _first_usable(config: ServerConfig, hello: _Hello, suite: CipherSuite) -> bytes:
    """For the cookie: a digest of the first identity that we may take with this suite, if any."""
    for offered in hello.offered_psks:
        if _usable_with(config, hello, offered) is suite.hash:
            return hashlib.sha256(offered.identity).digest()
    return b""


def _check_psk_is_kept(state: CookieState, hello: _Hello) -> None:
    """A client may remove PSKs that do not go with the suite, and no others (section 4.2.2)."""
    if not state.psk:
        return
    if not hello.offered_psks:
        raise MissingExtension(
            "the second ClientHello lacks pre_shared_key, which the first one has",
            Reason.MISSING_EXTENSION,
        )
    if all(hashlib.sha256(one.identity).digest() != state.psk for one in hello.offered_psks):
        raise IllegalParameter(
            "the second ClientHello lacks a PSK with the hash of the suite",
            Reason.RETRY_HELLO_CHANGED,
        )


def _choose_group(config: ServerConfig, hello: _Hello) -> Group:
    """Our first group that the client has; one with a share goes before an equal without."""
    common = [group for group in config.group_list if group.code in hello.groups]
    if not common:
        raise HandshakeFailure("no group in common", Reason.NO_COMMON_GROUP)
    best = common[0]
    for group in common:
        if group.code in hello.shares and group.properties == best.properties:
            return group
    return best


def _choose_suite(config: ServerConfig, hello: _Hello) -> CipherSuite:
    """Our first suite that the client has; where it offers PSKs, one whose hash fits them."""
    offered = set(hello.message.cipher_suites)
    common = [suite for suite in config.suites if suite.code in offered]
    if not common:
        raise HandshakeFailure("no cipher suite in common", Reason.NO_COMMON_SUITE)
    hashes = {_usable_with(config, hello, offered) for offered in hello.offered_psks}
    return next((suite for suite in common if suite.hash in hashes), common[0])


def _usable_with(config: ServerConfig, hello: _Hello, offered: _OfferedPsk) -> HashFunction | None:
    """The hash of a suite with which we may be able to use a PSK, if there is one."""
    external = _find_external(config, offered)
    if external is not None:
        return offered.hash if external.imported else external.hash
    if offered.ticket is not None:
        return _hash_of(config, offered.ticket.suite)
    return offered.hash if _worth_asking(config) else None


def _find_external(config: ServerConfig, offered: _OfferedPsk) -> ExternalPsk | None:
    """The configured PSK behind an identity."""
    if not config.has_psk:
        return None
    return next((psk for psk in config.psks if offered.names(psk)), None)


def _preference(config: ServerConfig, offered: _OfferedPsk) -> int:
    """The position among the configured PSKs; other identities, such as tickets, come first."""
    external = _find_external(config, offered)
    return config.psks.index(external) if external is not None else -1


def _worth_asking(config: ServerConfig) -> bool:
    """Whether there is an outside source that may know the PSK."""
    return config.psk_source is not None and config.has_psk


def _hash_of(config: ServerConfig, code: int) -> HashFunction | None:
    return next((suite.hash for suite in config.suites if suite.code == code), None)


@value
class _Credential:
    """Our credential, and the scheme for signing with its key."""

    identity: Identity | RawIdentity
    scheme: SignatureScheme
    named: bool
    """Whether it is for the name that the client asked for."""


@value
class _ClientCredential:
    """The credential that a client is asked for, and the verifier that decides about it."""

    type: int
    verifier: AnyClientVerifier


@value
class _Choice:
    """All that is chosen from the ClientHello, except the PSK."""

    config: ServerConfig
    hello: _Hello
    suite: CipherSuite
    group: Group
    transcript: Transcript
    """The transcript before this ClientHello: empty, or after a retry."""
    credential: _Credential | None
    """Our credential for this client, if there is one."""
    alpn: bytes | None
    application: tuple[tuple[ext.Extension, ext.Extension], ...]
    """The client's offers that only the application understands, each with our answer."""
    client_credential: _ClientCredential | None
    """The credential that the client is asked for; ``None`` if it is not asked."""
    agreed: fresh_negotiation.Agreed


def _negotiate(
    config: ServerConfig,
    hello: _Hello,
    suite: CipherSuite,
    group: Group,
    transcript: Transcript | None,
    records: RecordLayer,
) -> ServerState | ServerTraffic:
    """Settle everything; ask for a PSK where only an outside source can know it."""
    if suite.code not in hello.message.cipher_suites:
        raise IllegalParameter(
            "the cipher suite of HelloRetryRequest is not offered any more",
            Reason.RETRY_HELLO_CHANGED,
        )
    choice = _Choice(
        config=config,
        hello=hello,
        suite=suite,
        group=group,
        transcript=transcript if transcript is not None else Transcript(suite.hash),
        credential=_choose_credential(config, hello),
        alpn=_choose_alpn(config, hello),
        application=_answer_application(config, hello),
        client_credential=_choose_client_credential(config, hello),
        agreed=fresh_negotiation.agree(config, hello.message.extensions),
    )
    share, shared = group.exchange.respond(hello.shares[group.code])
    wanted = []
    for offered in sorted(hello.offered_psks, key=lambda one: _preference(config, one)):
        selected = _resolve(choice, offered)
        if selected is not None:
            return _respond(choice, share, shared, selected, records)
        if _worth_asking(config) and offered.hash is suite.hash and _external_allowed(choice):
            wanted.append(offered)
    if wanted:
        records.emit(PskWanted(tuple(offered.identity for offered in wanted)))
        return WaitPsk(choice, share, shared, tuple(wanted))
    return _respond(choice, share, shared, None, records)


def _choose_credential(config: ServerConfig, hello: _Hello) -> _Credential | None:
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
                        return _Credential(signer.identity, scheme, fits)
    return None


@value
class _Signer:
    """An identity of ours."""

    identity: Identity | RawIdentity
    schemes: tuple[SignatureScheme, ...]
    """Those of the configuration that suit its key."""


def _signers(config: ServerConfig) -> tuple[_Signer, ...]:
    schemes = config.signature_schemes
    return tuple(
        _Signer(one, tuple(scheme for scheme in schemes if scheme.suits(one.signing_key)))
        for one in config.identities
    )


def _choose_client_credential(config: ServerConfig, hello: _Hello) -> _ClientCredential | None:
    """The first kind that the client can show and that we can check (RFC 7250 section 4.2)."""
    verifier = config.client_verifier
    if verifier is None:
        return None
    ours = accepted_types(verifier)
    kind = next((kind for kind in hello.client_types if kind in ours), None)
    return None if kind is None else _ClientCredential(kind, verifier)


def _choose_alpn(config: ServerConfig, hello: _Hello) -> bytes | None:
    offer = hello.message.extensions.get(ext.AlpnOffer)
    if offer is None or not config.alpn:
        return None
    for name in config.alpn:
        if name.encode() in offer.protocols:
            return name.encode()
    raise NoApplicationProtocol("no application protocol in common")


def _answer_application(
    config: ServerConfig, hello: _Hello
) -> tuple[tuple[ext.Extension, ext.Extension], ...]:
    """Answer the offers for which the configuration has an extension."""
    answered = []
    for ours in config.extensions:
        offered = hello.message.extensions.decoded(ours.type, ours.read)
        answer = ours.answer(offered) if offered is not None else None
        if offered is not None and answer is not None:
            answered.append((offered, answer))
    return tuple(answered)


def _external_allowed(choice: _Choice) -> bool:
    """Whether an external PSK can be used with what authenticates us (RFC 9973 or plain)."""
    if choice.config.authentication in (Authentication.PSK, Authentication.EITHER):
        return True
    return choice.hello.certificate_with_psk and choice.credential is not None


@value
class _Resumption:
    """The session that is resumed."""

    ticket: TicketState
    peer: VerifiedPeer | None
    """The client, verified again for this handshake, if it showed who it is."""


@value
class _Selected:
    """The PSK that we select from the client's offer."""

    offered: _OfferedPsk
    psk: negotiation.Psk
    resumption: _Resumption | None


def _resolve(choice: _Choice, offered: _OfferedPsk) -> _Selected | None:
    """The PSK behind an identity, from our configuration or from a ticket of ours."""
    config, function = choice.config, choice.suite.hash
    external = _find_external(config, offered)
    if external is not None:
        return _selected(choice, offered, external) if _external_allowed(choice) else None
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
    return _Selected(offered, psk, resumption)


def _selected(choice: _Choice, offered: _OfferedPsk, external: ExternalPsk) -> _Selected | None:
    """An external PSK that was named, if it goes with our suite: its key is derived here."""
    for psk in negotiation.external_psks(external, (choice.suite,)):
        if psk.identity == offered.identity and psk.hash == choice.suite.hash:
            return _Selected(offered, psk, None)
    return None


def _resume(choice: _Choice, state: TicketState) -> _Resumption | None:
    """The session in a ticket, if it satisfies today's configuration and its client is still
    trusted."""
    config, credential = choice.config, choice.credential
    if (
        _hash_of(config, state.suite) != choice.suite.hash
        or state.server_name != choice.hello.server_name
        or not resumable(config, state, credential.identity if credential is not None else None)
    ):
        return None
    if config.client_verifier is None:
        return _Resumption(state, None)
    if not state.client_chain:
        return None if config.require_client_certificate else _Resumption(state, None)
    try:
        kind, now = state.client_certificate_type, config.clock()
        return _Resumption(
            state, accept_client(config.client_verifier, kind, state.client_chain, now)
        )
    except CertificateRejected:
        return None


@value
class WaitPsk(ServerState):
    """Our caller looks up the client's PSK; nothing is read from the client meanwhile."""

    choice: _Choice
    share: bytes
    shared: Secret
    wanted: tuple[_OfferedPsk, ...]

    def provide(
        self, external: ExternalPsk | None, records: RecordLayer
    ) -> ServerState | ServerTraffic:
        """Go on with the PSK that was found, or with none."""
        if external is None:
            return _respond(self.choice, self.share, self.shared, None, records)
        for offered in self.wanted:
            selected = (
                _selected(self.choice, offered, external) if offered.names(external) else None
            )
            if selected is not None:
                return _respond(self.choice, self.share, self.shared, selected, records)
        raise LocalStateError("the PSK that was provided is not one of those that were wanted")


def _respond(
    choice: _Choice,
    share: bytes,
    shared: Secret,
    selected: _Selected | None,
    records: RecordLayer,
) -> ServerState:
    """ServerHello to Finished."""
    config, hello, suite = choice.config, choice.hello, choice.suite
    credential = _credential_to_send(choice, selected)
    psk = selected.psk if selected is not None else None
    if selected is not None:
        _check_binder(choice, selected)

    extensions: list[ext.Extension] = [
        ext.SupportedVersionsChoice(TLS13),
        ext.KeyShareChoice(ext.KeyShareEntry(choice.group.code, share)),
    ]
    if selected is not None:
        extensions.append(ext.PreSharedKeyChoice(selected.offered.index))
        if credential is not None:
            extensions.append(ext.TlsCertWithExternPsk())
    message = wire.ServerHello(
        random=config.entropy(32),
        session_id=hello.message.session_id,
        cipher_suite=suite.code,
        extensions=ext.Extensions(extensions),
    )
    transcript = choice.transcript.add(hello.raw, records.writer.send(message))
    records.writer.send_change_cipher_spec()
    early = psk.early_secret if psk is not None else EarlySecret.start(suite.hash)
    secret = early.handshake_secret(shared)
    digest = transcript.digest()
    client = secret.client_handshake_traffic(suite, digest)
    server = secret.server_handshake_traffic(suite, digest)
    records.log_secret("SERVER_HANDSHAKE_TRAFFIC_SECRET", server.secret)
    records.log_secret("CLIENT_HANDSHAKE_TRAFFIC_SECRET", client.secret)
    records.writer.change_key(server)
    records.reader.change_key(client)

    # A client is asked only by a server that shows a certificate itself (section 4.4.2).
    asked = choice.client_credential if credential is not None else None
    encrypted = wire.EncryptedExtensions(_encrypted_extensions(choice, credential, asked, records))
    sent = records.writer.send(encrypted)
    if credential is None:
        transcript = transcript.add(sent)
    else:
        transcript = _authenticate(choice, credential, asked, transcript, sent, records)
    finished = wire.Finished(server.finished(transcript.digest()))
    transcript = transcript.add(records.writer.send(finished))
    main = _start_writing(secret, suite, transcript, records)
    flight = _ServerFlight(choice, selected, credential, client, main)
    if asked is not None:
        return WaitClientCertificate(flight, asked, transcript)
    return WaitClientFinished(flight, None, transcript)


def _credential_to_send(choice: _Choice, selected: _Selected | None) -> _Credential | None:
    """Our credential in this handshake; ``None`` if the PSK alone authenticates us.

    Raises:
        PeerError: the client offers too little.
    """
    if selected is not None and not _certificate_beside(choice, selected):
        return None
    if selected is None:
        _check_psk_not_required(choice.config)
    if choice.credential is None:
        raise _why_no_credential(choice)
    _check_client_can_answer(choice)
    return choice.credential


def _certificate_beside(choice: _Choice, selected: _Selected) -> bool:
    """Whether a certificate goes with this PSK: never with a ticket, with an external PSK where
    both sides want it (RFC 9973 section 4)."""
    return (
        not selected.psk.resumption
        and choice.hello.certificate_with_psk
        and choice.config.authentication is not Authentication.PSK
        and choice.credential is not None
    )


def _check_psk_not_required(config: ServerConfig) -> None:
    by_psk_alone = config.authentication is Authentication.PSK
    if by_psk_alone or config.policy_in_force.psk is Requirement.REQUIRE:
        raise UnknownPskIdentity(
            "our policy requires a PSK, and the client offers none that we know",
            Reason.PSK_NONE_IN_COMMON,
        )


def _why_no_credential(choice: _Choice) -> PeerError:
    """Sections 9.2 and 4.5.1, and RFC 7250 section 4.2."""
    if ext.SignatureAlgorithms not in choice.hello.message.extensions:
        return MissingExtension("ClientHello without signature_algorithms")
    types = choice.hello.server_types
    if all(one.certificate_type not in types for one in choice.config.identities):
        return UnsupportedCertificateType("the client can check nothing that we can show")
    return HandshakeFailure(
        "the client can verify none of our certificates", Reason.NO_COMMON_SCHEME
    )


def _check_client_can_answer(choice: _Choice) -> None:
    """RFC 7250 section 4.2: a kind of certificate that we can check, where we ask for one."""
    config = choice.config
    if config.client_verifier is None or choice.client_credential is not None:
        return
    # The RFC has the offer refused also where a client may stay unknown.
    offered = ext.ClientCertificateTypeOffer in choice.hello.message.extensions
    if offered or config.require_client_certificate:
        raise UnsupportedCertificateType("the client can show nothing of itself that we can check")


def _check_binder(choice: _Choice, selected: _Selected) -> None:
    """Verify that the client has the PSK and that the offer is unchanged (section 4.3.11.2)."""
    psk, digest = selected.psk, choice.transcript.add(choice.hello.truncated).digest()
    expected = psk.early_secret.binder(psk.binder_label, digest)
    if not hmac.compare_digest(expected, selected.offered.binder):
        raise DecryptError(
            "the PSK binder does not verify: the client may have another key under this identity",
            Reason.PSK_BINDER,
        )


def _encrypted_extensions(
    choice: _Choice,
    credential: _Credential | None,
    asked: _ClientCredential | None,
    records: RecordLayer,
) -> ext.Extensions:
    config, offered = choice.config, choice.hello.message.extensions
    extensions: list[ext.Extension] = []
    if credential is not None and credential.named:  # RFC 6066 section 3: only if it was used
        extensions.append(ext.ServerNameAck())
    if choice.alpn is not None:
        extensions.append(ext.AlpnChoice(choice.alpn))
    limit = offered.get(ext.RecordSizeLimit)
    if limit is not None:
        records.writer.record_limit = min(records.writer.record_limit, limit.limit - 1)
        records.reader.limit_records(config.inner_limit)
        extensions.append(ext.RecordSizeLimit(config.inner_limit))
    extensions += [answer for _, answer in choice.application]
    extensions += fresh_negotiation.answer(choice.agreed)
    if choice.credential is not None and ext.ServerCertificateTypeOffer in offered:
        kind = choice.credential.identity.certificate_type
        extensions.append(ext.ServerCertificateTypeChoice(kind))
    if asked is not None and ext.ClientCertificateTypeOffer in offered:
        extensions.append(ext.ClientCertificateTypeChoice(asked.type))
    return ext.Extensions(extensions)


def _authenticate(
    choice: _Choice,
    credential: _Credential,
    asked: _ClientCredential | None,
    transcript: Transcript,
    encrypted: bytes,
    records: RecordLayer,
) -> Transcript:
    """Send [CertificateRequest,] Certificate, CertificateVerify. Returns the transcript with
    EncryptedExtensions and with what was sent."""
    sent = [encrypted]
    if asked is not None:
        schemes = tuple(scheme.code for scheme in choice.config.signature_schemes)
        request = ext.Extensions(
            (
                ext.SignatureAlgorithms(schemes),
                ext.SignatureAlgorithmsCert(schemes + CERTIFICATE_ONLY_SCHEMES),
            )
        )
        sent.append(records.writer.send(wire.CertificateRequest(b"", request)))
    identity, label = credential.identity, Label.SERVER_CERTIFICATE_VERIFY
    certificate = negotiation.certificate_message(identity.chain)
    records.writer.send_raw(certificate)
    transcript = transcript.add(*sent, certificate)
    verify = negotiation.sign_transcript(identity, credential.scheme, label, transcript)
    return transcript.add(records.writer.send(verify))


@value
class _MainKeys:
    """The last stage of the key schedule, and what waits for the client's Finished."""

    secret: MainSecret
    client: TrafficSecret
    exporter: ExporterSecret
    digest: bytes
    """The hash of ClientHello...server Finished."""


def _start_writing(
    secret: HandshakeSecret, suite: CipherSuite, transcript: Transcript, records: RecordLayer
) -> _MainKeys:
    """Derive the keys of application data and write under ours."""
    digest = transcript.digest()
    main = secret.main_secret()
    server = main.server_application_traffic(suite, digest)
    client = main.client_application_traffic(suite, digest)
    exporter = main.exporter_secret(digest)
    records.log_secret("SERVER_TRAFFIC_SECRET_0", server.secret)
    records.log_secret("CLIENT_TRAFFIC_SECRET_0", client.secret)
    records.log_secret("EXPORTER_SECRET", exporter.secret)
    records.writer.change_key(server)
    return _MainKeys(main, client, exporter, digest)


@value
class _ServerFlight:
    """The server's flight, ServerHello to Finished, once it is queued."""

    choice: _Choice
    selected: _Selected | None
    credential: _Credential | None
    """Our credential; ``None`` if the PSK alone authenticates us."""
    client_handshake: TrafficSecret
    main: _MainKeys


@value
class WaitClientCertificate(ServerState):
    """The client was asked for a certificate."""

    flight: _ServerFlight
    asked: _ClientCredential
    transcript: Transcript

    def handle(self, message: Message, raw: bytes, records: RecordLayer) -> ServerState:
        assert isinstance(message, wire.Certificate)
        choice, asked = self.flight.choice, self.asked
        if message.context:
            raise IllegalParameter(
                "the client's Certificate has a context that was not asked for",
                Reason.CERTIFICATE_CONTEXT,
            )
        if any(extensions.types for _, extensions in message.entries):
            raise UnsupportedExtension("a certificate extension answers nothing that was asked for")
        transcript = self.transcript.add(raw)
        if not message.entries:
            if choice.config.require_client_certificate:
                raise CertificateRejected(
                    "the client sent no certificate", Reason.CERTIFICATE_REQUIRED
                )
            return WaitClientFinished(self.flight, None, transcript)
        check_entries(asked.type, message)
        peer = accept_client(asked.verifier, asked.type, message.chain, choice.config.clock())
        return WaitClientCertificateVerify(self.flight, peer, transcript)


@value
class WaitClientCertificateVerify(ServerState):
    """The certificate is accepted; the client must prove that it has the private key."""

    flight: _ServerFlight
    peer: VerifiedPeer
    transcript: Transcript

    def handle(self, message: Message, raw: bytes, records: RecordLayer) -> ServerState:
        assert isinstance(message, wire.CertificateVerify)
        negotiation.verify_signature(
            message,
            self.peer,
            self.flight.choice.config.signature_schemes,
            Label.CLIENT_CERTIFICATE_VERIFY,
            self.transcript,
        )
        return WaitClientFinished(self.flight, self.peer, self.transcript.add(raw))


@value
class WaitClientFinished(ServerState):
    """The last message of the handshake."""

    flight: _ServerFlight
    peer: VerifiedPeer | None
    transcript: Transcript

    def handle(self, message: Message, raw: bytes, records: RecordLayer) -> ServerState:
        assert isinstance(message, wire.Finished)
        flight, choice, selected = self.flight, self.flight.choice, self.flight.selected
        negotiation.check_finished(message, flight.client_handshake, self.transcript)
        records.reader.check_message_boundary()
        records.reader.change_cipher_spec_allowed = False
        transcript = self.transcript.add(raw)
        resumption = selected.resumption if selected is not None else None
        psk = selected.psk if selected is not None else None
        if resumption is not None:
            peer, began_at = resumption.peer, float(resumption.ticket.began_at)
            by = resumption.ticket.authenticated_by
        else:
            peer, began_at = self.peer, choice.config.clock()
            by = negotiation.authenticated_by(
                None, psk, has_certificate=flight.credential is not None
            )
        session = negotiation.describe(
            suite=choice.suite,
            group=choice.group,
            psk=psk,
            authenticated=by,
            scheme=flight.credential.scheme if flight.credential is not None else None,
            alpn=choice.alpn,
            extensions=tuple(offered for offered, _ in choice.application),
            server_name=choice.hello.server_name,
            peer=peer,
            policy=choice.config.policy_in_force,
            began_at=began_at,
            agreed=choice.agreed,
        )
        check_session(choice.config, session)
        records.emit(SessionProposed(session, peer))
        return Proposed(flight, peer, session, transcript)


@value
class Proposed(ServerState):
    """The client's Finished is verified; our caller decides before anything else is read."""

    flight: _ServerFlight
    peer: VerifiedPeer | None
    session: Session
    transcript: Transcript

    def accept(self, session: Session, records: RecordLayer) -> ServerTraffic:
        """The handshake is complete."""
        choice, main = self.flight.choice, self.flight.main
        records.reader.change_key(main.client)
        records.reader.data_allowed = True
        complete = self.transcript.digest()
        # A client can use tickets if it offered psk_dhe_ke (section 4.3.9).
        tickets = choice.config.tickets is not None and choice.hello.psk_dhe
        resumption = main.secret.resumption_secret(complete) if tickets else None
        updates = None
        if choice.agreed.key_updates is not KeyUpdates.STANDARD:
            first = Generation.first(choice.suite, main.secret, main.digest, complete)
            kind, config = choice.agreed.key_updates, choice.config
            updates = Updates(records, config, kind, choice.group, first)
        if choice.agreed.one_time_pad:
            records.reader.pad, records.writer.pad = Pad(), Pad()
        connected = Connected(session, choice.suite, main.exporter, resumption, updates)
        records.emit(HandshakeCompleted(session))
        presented = self.peer.certificate if self.peer is not None else None
        own = choice.credential.identity if choice.credential is not None else None
        return ServerTraffic(connected, choice.config, presented, own)


_M = HandshakeType
_FLIGHT: Final = (
    _M.SERVER_HELLO,
    _M.ENCRYPTED_EXTENSIONS,
    _M.CERTIFICATE_REQUEST,
    _M.CERTIFICATE,
    _M.CERTIFICATE_VERIFY,
    _M.FINISHED,
)
_AFTER_FLIGHT: Final = (WaitClientCertificate, WaitClientFinished)
START: Final = (WaitClientHello,)
"""The state that :func:`start` returns."""
STEPS: Final[Mapping[type, Step]] = {
    # ServerHello is also the type of HelloRetryRequest (section 4.2.4).
    WaitClientHello: Step(
        (_M.CLIENT_HELLO,), _FLIGHT, (WaitSecondClientHello, WaitPsk, *_AFTER_FLIGHT)
    ),
    WaitSecondClientHello: Step((_M.CLIENT_HELLO,), _FLIGHT, (WaitPsk, *_AFTER_FLIGHT)),
    WaitPsk: Step((), _FLIGHT, _AFTER_FLIGHT),
    WaitClientCertificate: Step(
        (_M.CERTIFICATE,), (), (WaitClientCertificateVerify, WaitClientFinished)
    ),
    WaitClientCertificateVerify: Step((_M.CERTIFICATE_VERIFY,), (), (WaitClientFinished,)),
    WaitClientFinished: Step((_M.FINISHED,), (), (Proposed,)),
    Proposed: Step((), (), (ServerTraffic,)),
    ServerTraffic: Step((_M.KEY_UPDATE, _M.EXTENDED_KEY_UPDATE), (), (ServerTraffic,)),
}
"""The handshake on one screen. The engine refuses any other message and any other transition."""
