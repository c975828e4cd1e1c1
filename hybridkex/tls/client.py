"""The client's handshake (RFC 9846 appendix A.1), one class per state, in their order.

A state is frozen and holds only the data that is valid in it; ``handle`` checks one message and
returns the next state. :func:`start` sends the ClientHello and returns the first. :data:`STEPS`, at
the end, lists all states with the messages between them.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import Final

from hybridkex.auth import DnsName, IpAddress, VerifiedPeer
from hybridkex.constants import (
    FIRST_VERSION,
    LEGACY_VERSION,
    TLS13,
    CipherSuiteCode,
    HandshakeType,
    Label,
    PskKeyExchangeMode,
)
from hybridkex.crypto.kex import Group, Started
from hybridkex.crypto.psk import ExternalPsk
from hybridkex.crypto.signatures import CERTIFICATE_ONLY_SCHEMES, choose_scheme
from hybridkex.crypto.suites import CipherSuite
from hybridkex.errors import (
    CertificateRejected,
    DecodeError,
    EncodeError,
    IllegalParameter,
    MissingExtension,
    PolicyRefused,
    ProtocolVersionError,
    UnexpectedMessage,
    UnsupportedExtension,
)
from hybridkex.reasons import Reason
from hybridkex.tls import fresh_negotiation, negotiation
from hybridkex.tls.admission import check_session, resumable
from hybridkex.tls.certificate_types import (
    ONLY_X509,
    AnyServerVerifier,
    accept_server,
    accepted_types,
    check_choice,
    check_entries,
)
from hybridkex.tls.config import ClientConfig
from hybridkex.tls.events import PskWanted, SessionProposed
from hybridkex.tls.policy import Authentication, Requirement
from hybridkex.tls.record_layer import RecordLayer
from hybridkex.tls.session import AuthenticatedBy, Session, SessionTicket
from hybridkex.tls.steps import Step
from hybridkex.tls.traffic import ClientTraffic, Connected, store_key
from hybridkex.tls.transcript import Transcript
from hybridkex.values import value
from hybridkex.wire import extensions as ext
from hybridkex.wire import messages as wire
from hybridkex.wire.codec import vector8, vector16
from hybridkex.wire.layout import Message

PeerName = DnsName | IpAddress

_ALONE: Final = (Authentication.PSK, Authentication.EITHER)
"""The kinds of authentication for which a PSK suffices."""


class ClientState:
    """The interface of a state."""

    def handle(
        self, message: Message, raw: bytes, records: RecordLayer
    ) -> "ClientState | ClientTraffic":
        """Check one message, of a type that :data:`STEPS` has for this state."""
        raise NotImplementedError


@value
class _Resumption:
    """The session that a ClientHello offers to resume."""

    ticket: SessionTicket
    peer: VerifiedPeer | None
    """The server, verified again for this handshake; ``None`` where a PSK authenticated it."""


@value
class _Offer:
    """The offer of the ClientHello; after a retry, both hellos offer the same."""

    config: ClientConfig
    constant: "_Constant"
    name: PeerName | None
    random: bytes
    session_id: bytes
    psks: tuple[negotiation.Psk, ...]
    resumption: _Resumption | None
    started: dict[int, Started]
    """The key exchanges that were offered with a share, by the group's code."""

    @property
    def store_key(self) -> str:
        return store_key(str(self.name) if self.name is not None else None)

    def hello(self, cookie: bytes | None, prefix: Transcript | None) -> bytes:
        """The ClientHello, encoded; ``prefix`` is the transcript before it, after a retry."""
        first = () if cookie is None else (ext.Cookie(cookie),)
        message = wire.ClientHello(
            random=self.random,
            session_id=self.session_id,
            cipher_suites=self.constant.cipher_suites,
            extensions=ext.EncodedExtensions(
                ext.encoded(first) + self.constant.encoded + ext.encoded(self._last_extensions)
            ),
        )
        raw = wire.encode(message)
        return self._with_binders(raw, prefix) if self.psks else raw

    @cached_property
    def classes(self) -> tuple[type[ext.Extension], ...]:
        """Return those of the extensions that are sent."""
        return (*self.constant.classes, *map(type, self._last_extensions))

    @cached_property
    def _last_extensions(self) -> list[ext.Extension]:
        """The extensions of this handshake, after those of the configuration."""
        extensions: list[ext.Extension] = []
        if isinstance(self.name, DnsName):
            extensions.append(ext.ServerName(self.name.a_label))
        if self.psks or self.config.ticket_store is not None:
            extensions.append(ext.PskKeyExchangeModes((PskKeyExchangeMode.PSK_DHE_KE,)))
        entries = tuple(ext.KeyShareEntry(code, one.share) for code, one in self.started.items())
        extensions.append(ext.KeyShareOffer(entries))
        if self.wants_certificate_with_psk:
            extensions.append(ext.TlsCertWithExternPsk())
        if self.psks:
            extensions.append(self._psk_offer())  # the last one (section 4.3.11)
        return extensions

    @property
    def wants_certificate_with_psk(self) -> bool:
        """RFC 9973 section 4: every PSK offered must be an external one."""
        alone = self.config.authentication in _ALONE
        return bool(self.psks) and self.resumption is None and not alone

    def _psk_offer(self) -> ext.PreSharedKeyOffer:
        age = 0
        if self.resumption is not None:
            age = self.resumption.ticket.obfuscated_age(self.config.clock())
        identities = tuple(
            ext.OfferedPskIdentity(psk.identity, age if psk.resumption else 0) for psk in self.psks
        )
        return ext.PreSharedKeyOffer(identities, tuple(bytes(psk.hash.size) for psk in self.psks))

    def _with_binders(self, raw: bytes, prefix: Transcript | None) -> bytes:
        """Fill in the binders: they cover everything before their own list (section 4.3.11.2)."""
        length = 2 + sum(1 + psk.hash.size for psk in self.psks)
        truncated = raw[:-length]
        binders = b""
        for psk in self.psks:
            if prefix is not None and prefix.function == psk.hash:
                digest = prefix.add(truncated).digest()
            else:
                digest = psk.hash.digest(truncated)
            binder = psk.early_secret.binder(psk.binder_label, digest)
            binders += vector8(binder)
        return truncated + vector16(binders)


@value
class _Constant:
    """The extensions that a configuration puts into each of its ClientHellos."""

    cipher_suites: tuple[int, ...]
    encoded: bytes
    """The extensions."""
    classes: tuple[type[ext.Extension], ...]
    server_types: tuple[int, ...]
    """The kinds of certificate that we can check (RFC 7250)."""
    client_types: tuple[int, ...]
    """The kinds of certificate that we can show."""


def _constant(config: ClientConfig) -> _Constant:
    verifier, identity = config.verifier, config.identity
    by_psk = config.authentication is Authentication.PSK
    server_types = ONLY_X509 if verifier is None or by_psk else accepted_types(verifier)
    client_types = ONLY_X509 if identity is None else (identity.certificate_type,)
    extensions: list[ext.Extension] = [
        ext.SupportedGroups(tuple(group.code for group in config.group_list))
    ]
    if not by_psk:  # sections 4.3.3 and 4.5.1
        schemes = tuple(scheme.code for scheme in config.signature_schemes)
        extensions.append(ext.SignatureAlgorithms(schemes))
        extensions.append(ext.SignatureAlgorithmsCert(schemes + CERTIFICATE_ONLY_SCHEMES))
    if server_types != ONLY_X509:
        extensions.append(ext.ServerCertificateTypeOffer(server_types))
    if client_types != ONLY_X509:
        extensions.append(ext.ClientCertificateTypeOffer(client_types))
    if config.alpn:
        extensions.append(ext.AlpnOffer(tuple(name.encode("utf-8") for name in config.alpn)))
    extensions.append(ext.SupportedVersionsOffer((TLS13,)))
    if config.record_size_limit is not None:
        extensions.append(ext.RecordSizeLimit(config.inner_limit))
    extensions += fresh_negotiation.offer(config)
    extensions += config.extensions
    return _Constant(
        cipher_suites=tuple(suite.code for suite in config.suites),
        encoded=ext.encoded(extensions),
        classes=tuple(map(type, extensions)),
        server_types=server_types,
        client_types=client_types,
    )


def start(config: ClientConfig, name: PeerName | None, records: RecordLayer) -> ClientState:
    """Send the first ClientHello, or ask for the PSK that it offers."""
    resumption = _take_ticket(config, name)
    if resumption is None and config.psk_source and config.has_psk:
        records.emit(PskWanted(()))
        return WaitPsk(config, name)
    return _send_hello(config, name, resumption, config.psks, records)


@value
class WaitPsk(ClientState):
    """Our caller fetches a PSK. Nothing has been sent, so nothing is received."""

    config: ClientConfig
    name: PeerName | None

    def provide(self, external: ExternalPsk | None, records: RecordLayer) -> ClientState:
        """Go on with the PSK, or without one where the policy allows that."""
        config = self.config
        if external is not None:
            return _send_hello(config, self.name, None, (external, *config.psks), records)
        if not config.psks:
            _verifier_without_psk(config, "there is none to offer")
        return _send_hello(config, self.name, None, config.psks, records)


def _send_hello(
    config: ClientConfig,
    name: PeerName | None,
    resumption: _Resumption | None,
    externals: tuple[ExternalPsk, ...],
    records: RecordLayer,
) -> ClientState:
    psks: list[negotiation.Psk] = []
    if resumption is not None:
        ticket = resumption.ticket
        psks.append(
            negotiation.Psk(
                identity=ticket.ticket,
                key=ticket.psk,
                hash=ticket.suite.hash,
                binder_label=Label.RESUMPTION_BINDER,
                resumption=True,
                external_identity=ticket.psk_identity,
                external_context=ticket.psk_context,
            )
        )
    # RFC 9973 section 4 forbids a ticket beside an external PSK with certificates.
    if config.has_psk and (resumption is None or config.authentication in _ALONE):
        for external in externals:
            psks.extend(negotiation.external_psks(external, config.suites))
    offer = _Offer(
        config=config,
        constant=config.once(_constant),
        name=name,
        random=config.entropy(32),
        session_id=config.entropy(32) if config.compatibility_mode else b"",
        psks=tuple(psks),
        resumption=resumption,
        started={group.code: group.exchange.start() for group in config.shared_groups},
    )
    records.client_random = offer.random
    hello = offer.hello(None, None)
    records.writer.send_raw(hello)
    records.writer.flush(FIRST_VERSION)
    records.reader.change_cipher_spec_allowed = True
    return WaitServerHello(offer, hello)


def _take_ticket(config: ClientConfig, name: PeerName | None) -> _Resumption | None:
    """A ticket whose session satisfies the present configuration and whose server is still
    trusted."""
    if config.ticket_store is None:
        return None
    key = store_key(str(name) if name is not None else None)
    ticket = config.ticket_store.take(key, config.binding(config.identity))
    if ticket is None or all(suite.hash != ticket.suite.hash for suite in config.suites):
        return None
    if len(ticket.ticket) > config.ticket_room or not resumable(config, ticket, config.identity):
        return None
    if ticket.authenticated_by is AuthenticatedBy.PSK:
        return _Resumption(ticket, None)
    if config.verifier is None:
        return None
    try:
        kind, now = ticket.certificate_type, config.clock()
        return _Resumption(ticket, accept_server(config.verifier, kind, ticket.chain, name, now))
    except CertificateRejected:
        return None


def forget_tickets(offer: _Offer) -> None:
    """The server declined our ticket: discard those of the same connection, which it would decline
    too."""
    config = offer.config
    if offer.resumption is None or config.ticket_store is None:
        return
    binding = config.binding(config.identity)
    # One connection gives no more than ``Limits.tickets``. An application's store that wrongly
    # returns a ticket at every call must not make this loop endless.
    for _ in range(config.limits.tickets):
        if config.ticket_store.take(offer.store_key, binding) is None:
            return


@value
class WaitServerHello(ClientState):
    offer: _Offer
    hello: bytes

    def handle(self, message: Message, raw: bytes, records: RecordLayer) -> ClientState:
        if isinstance(message, wire.HelloRetryRequest):
            return self._retry(message, raw, records)
        assert isinstance(message, wire.ServerHello)
        suite = _check_hello(self.offer, message)
        transcript = Transcript(suite.hash, self.hello, raw)
        return _accept(self.offer, suite, message, transcript, records)

    def _retry(
        self, message: wire.HelloRetryRequest, raw: bytes, records: RecordLayer
    ) -> ClientState:
        """Section 4.2.4: another ClientHello, changed only where the server asked."""
        offer = self.offer
        suite = _check_hello(offer, message)
        cookie = message.extensions.get(ext.Cookie)
        wanted = message.extensions.get(ext.KeyShareRetry)
        if cookie is None and wanted is None:
            raise IllegalParameter(
                "HelloRetryRequest would change nothing in the ClientHello",
                Reason.RETRY_WITHOUT_CHANGE,
            )
        started = offer.started
        if wanted is not None:
            if wanted.group in started:
                raise IllegalParameter(
                    "HelloRetryRequest asks for a key share that the ClientHello already has",
                    Reason.RETRY_WITHOUT_CHANGE,
                )
            group = _find_group(offer.config, wanted.group)
            started = {group.code: group.exchange.start()}
        records.reader.check_message_boundary()
        psks = tuple(psk for psk in offer.psks if psk.hash == suite.hash)
        resumption = offer.resumption if any(psk.resumption for psk in psks) else None
        again = replace(offer, psks=psks, resumption=resumption, started=started)
        transcript = Transcript.after_retry(suite.hash, suite.hash.digest(self.hello), raw)
        records.writer.change_cipher_spec_due = offer.config.compatibility_mode
        try:
            hello = again.hello(cookie.cookie if cookie is not None else None, transcript)
        except EncodeError:
            # RFC 9846 section 4.3.2: the cookie must be returned unchanged, and there is no room
            # for it.
            raise IllegalParameter(
                "the server's cookie does not fit into a ClientHello", Reason.COOKIE_TOO_LONG
            ) from None
        records.writer.send_raw(hello)
        return WaitSecondServerHello(again, suite, transcript.add(hello))


@value
class WaitSecondServerHello(ClientState):
    offer: _Offer
    suite: CipherSuite
    transcript: Transcript

    def handle(self, message: Message, raw: bytes, records: RecordLayer) -> ClientState:
        if isinstance(message, wire.HelloRetryRequest):
            raise UnexpectedMessage("a second HelloRetryRequest", Reason.RETRY_TWICE)
        assert isinstance(message, wire.ServerHello)
        if _check_hello(self.offer, message) is not self.suite:
            raise IllegalParameter(
                "the cipher suite changed after HelloRetryRequest", Reason.RETRY_SUITE_CHANGED
            )
        return _accept(self.offer, self.suite, message, self.transcript.add(raw), records)


def _find_group(config: ClientConfig, code: int) -> Group:
    for group in config.group_list:
        if group.code == code:
            return group
    raise IllegalParameter(f"group {code:#06x} was not offered", Reason.GROUP_NOT_OFFERED)


def _check_hello(offer: _Offer, message: wire.ServerHello | wire.HelloRetryRequest) -> CipherSuite:
    """Checks for ServerHello and HelloRetryRequest (section 4.2.3); returns the suite."""
    version = message.extensions.get(ext.SupportedVersionsChoice)
    if version is None:
        raise ProtocolVersionError("the server does not speak TLS 1.3", Reason.VERSION)
    if version.version != TLS13:
        raise IllegalParameter(
            f"the server chose version {version.version:#06x}", Reason.VERSION_CHOICE
        )
    if message.legacy_version != LEGACY_VERSION:
        # Section 4.2.3: "A client which receives a TLS 1.3 Server Hello with a legacy_version value
        # not equal to 0x0303 MUST abort the handshake with a 'protocol_version' alert."
        raise ProtocolVersionError(
            f"ServerHello.legacy_version is {message.legacy_version:#06x}", Reason.LEGACY_VERSION
        )
    if message.session_id != offer.session_id:
        raise IllegalParameter("the server did not echo the session ID", Reason.SESSION_ID_ECHO)
    if message.compression_method != 0:
        raise IllegalParameter("the server chose a compression method", Reason.COMPRESSION)
    retry = isinstance(message, wire.HelloRetryRequest)
    kind = ext.MessageKind.HELLO_RETRY_REQUEST if retry else ext.MessageKind.SERVER_HELLO
    _check_answers(offer, kind, message.extensions)
    for suite in offer.config.suites:
        if suite.code == message.cipher_suite:
            return suite
    raise IllegalParameter(
        f"cipher suite {_suite_name(message.cipher_suite)} was not offered",
        Reason.SUITE_NOT_OFFERED,
    )


def _suite_name(code: int) -> str:
    try:
        return CipherSuiteCode(code).name
    except ValueError:
        return f"{code:#06x}"


def _check_answers(offer: _Offer, kind: ext.MessageKind, extensions: ext.Extensions) -> None:
    """Refuse an extension that answers none of our ClientHello."""
    types = extensions.types
    if not types:
        return
    allowed = ext.answerable(kind, offer.classes)
    for type_ in types:
        if type_ not in allowed:
            raise UnsupportedExtension(f"extension {type_} responds to none that we offered")


def _accept(
    offer: _Offer,
    suite: CipherSuite,
    message: wire.ServerHello,
    transcript: Transcript,
    records: RecordLayer,
) -> ClientState:
    """The key exchange is complete with ServerHello, where the transcript ends; what follows is
    encrypted."""
    share = message.extensions.get(ext.KeyShareChoice)
    if share is None:
        # Without a key exchange there is no forward secrecy; psk_ke was not offered.
        raise MissingExtension("ServerHello without a key share")
    started = offer.started.get(share.entry.group)
    if started is None:
        raise IllegalParameter(
            f"the server chose group {share.entry.group:#06x}, for which we sent no share",
            Reason.GROUP_NOT_OFFERED,
        )
    psk = _chosen_psk(offer.psks, suite, message)
    if psk is None or not psk.resumption:
        forget_tickets(offer)
    with_certificate = ext.TlsCertWithExternPsk in message.extensions
    verifier: AnyServerVerifier | None = None
    if psk is None:
        verifier = _verifier_without_psk(offer.config, "the server did not select one")
    elif with_certificate:
        verifier = offer.config.verifier  # we offered this, so there is one
    elif not psk.resumption and offer.wants_certificate_with_psk:
        raise PolicyRefused(
            "the server selected a PSK without a certificate, which the policy requires",
            Reason.PSK_WITHOUT_CERTIFICATE,
        )

    records.reader.check_message_boundary()
    shared = started.finish(share.entry.share)
    keys = negotiation.HandshakeKeys.derive(suite, psk, shared, transcript, records)
    records.reader.change_key(keys.server)
    records.writer.change_key(keys.client)
    records.writer.change_cipher_spec_due = offer.config.compatibility_mode
    group = _find_group(offer.config, share.entry.group)
    return WaitEncryptedExtensions(offer, group, psk, verifier, keys, transcript)


def _chosen_psk(
    psks: tuple[negotiation.Psk, ...], suite: CipherSuite, message: wire.ServerHello
) -> negotiation.Psk | None:
    choice = message.extensions.get(ext.PreSharedKeyChoice)
    if choice is None:
        if ext.TlsCertWithExternPsk in message.extensions:
            raise IllegalParameter(
                "tls_cert_with_extern_psk without a PSK", Reason.PSK_CERTIFICATE_WITHOUT_PSK
            )  # RFC 9973 section 4
        return None
    if choice.selected >= len(psks):
        raise IllegalParameter(
            f"PSK {choice.selected} of {len(psks)} was selected", Reason.PSK_CHOICE
        )
    psk = psks[choice.selected]
    if psk.hash != suite.hash:
        raise IllegalParameter("the PSK's hash is not the cipher suite's", Reason.PSK_CHOICE)
    return psk


def _verifier_without_psk(config: ClientConfig, why: str) -> AnyServerVerifier:
    """The verifier that authenticates the server in a handshake without a PSK.

    Raises:
        PolicyRefused: our policy requires a PSK, or nothing else is configured.
    """
    if config.policy_in_force.psk is Requirement.REQUIRE:
        raise PolicyRefused(f"our policy requires a PSK, and {why}", Reason.PSK_REQUIRED)

    if config.verifier is None:
        raise PolicyRefused(
            f"nothing but a PSK can authenticate the server, and {why}", Reason.PSK_REQUIRED
        )
    return config.verifier


@value
class WaitEncryptedExtensions(ClientState):
    """The state after ServerHello."""

    offer: _Offer
    group: Group
    psk: negotiation.Psk | None
    verifier: AnyServerVerifier | None
    """Decides about the server's certificate; ``None`` where the PSK alone authenticates it."""
    keys: negotiation.HandshakeKeys
    transcript: Transcript

    def handle(self, message: Message, raw: bytes, records: RecordLayer) -> ClientState:
        assert isinstance(message, wire.EncryptedExtensions)
        answers = message.extensions
        _check_answers(self.offer, ext.MessageKind.ENCRYPTED_EXTENSIONS, answers)
        self._limit_records(answers.get(ext.RecordSizeLimit), records)
        server_type = answers.get(ext.ServerCertificateTypeChoice)
        client_type = answers.get(ext.ClientCertificateTypeChoice)
        transcript = self.transcript.add(raw)
        config, name = self.offer.config, self.offer.name
        negotiated = negotiation.Negotiated(
            suite=self.keys.suite,
            group=self.group,
            psk=self.psk,
            alpn=self._protocol(answers.get(ext.AlpnChoice)),
            extensions=self._application_answers(answers),
            server_name=str(name) if name is not None else None,
            policy=config.policy_in_force,
            agreed=fresh_negotiation.read_answer(config, answers),
        )
        handshake = _Handshake(
            offer=self.offer,
            keys=self.keys,
            negotiated=negotiated,
            server_type=check_choice(
                server_type.chosen if server_type else None, self.offer.constant.server_types
            ),
            client_type=check_choice(
                client_type.chosen if client_type else None, self.offer.constant.client_types
            ),
        )
        if self.verifier is None:
            proof = negotiation.PeerProof(self._resumed_peer(), None)
            return WaitFinished(handshake, proof, None, transcript)
        return WaitCertificateOrRequest(handshake, self.verifier, transcript)

    def _protocol(self, choice: ext.AlpnChoice | None) -> bytes | None:
        """RFC 7301 section 3.2."""
        if choice is None:
            return None
        if choice.protocol not in (name.encode() for name in self.offer.config.alpn):
            raise IllegalParameter(
                "the server chose an ALPN protocol that was not offered",
                Reason.PROTOCOL_NOT_OFFERED,
            )
        return choice.protocol

    def _application_answers(self, answers: ext.Extensions) -> tuple[ext.Extension, ...]:
        found = (answers.decoded(one, one.read_answer) for one in self.offer.config.extensions)
        return tuple(one for one in found if one is not None)

    def _limit_records(self, limit: ext.RecordSizeLimit | None, records: RecordLayer) -> None:
        """RFC 8449 section 4."""
        if limit is None:
            return
        if limit.limit > records.writer.record_limit + 1:
            raise IllegalParameter(
                f"a record_size_limit of {limit.limit}", Reason.RECORD_SIZE_LIMIT
            )
        records.writer.record_limit = limit.limit - 1
        records.reader.limit_records(self.offer.config.inner_limit)

    def _resumed_peer(self) -> VerifiedPeer | None:
        """The server of the resumed session, if it presented a credential."""
        if self.psk is None or not self.psk.resumption or self.offer.resumption is None:
            return None
        return self.offer.resumption.peer


@value
class _Handshake:
    """The handshake after EncryptedExtensions."""

    offer: _Offer
    keys: negotiation.HandshakeKeys
    negotiated: negotiation.Negotiated
    server_type: int
    """The type of the server's credential: a code of ``CertificateType``."""
    client_type: int
    """The type of our credential, if the server asks for one."""


@value
class WaitCertificateOrRequest(ClientState):
    """The state after EncryptedExtensions, if the server authenticates with a certificate."""

    handshake: _Handshake
    verifier: AnyServerVerifier
    transcript: Transcript

    def handle(self, message: Message, raw: bytes, records: RecordLayer) -> ClientState:
        if isinstance(message, wire.Certificate):
            state = WaitCertificate(self.handshake, self.verifier, None, self.transcript)
            return state.handle(message, raw, records)
        assert isinstance(message, wire.CertificateRequest)
        if message.context:
            raise IllegalParameter(
                "CertificateRequest with a context during the handshake", Reason.CERTIFICATE_CONTEXT
            )
        schemes = message.extensions.get(ext.SignatureAlgorithms)
        if schemes is None:
            raise MissingExtension("CertificateRequest without signature_algorithms")
        transcript = self.transcript.add(raw)
        return WaitCertificate(self.handshake, self.verifier, schemes.codes, transcript)


@value
class WaitCertificate(ClientState):
    handshake: _Handshake
    verifier: AnyServerVerifier
    requested: tuple[int, ...] | None
    """The schemes of the server's CertificateRequest, if it sent one."""
    transcript: Transcript

    def handle(self, message: Message, raw: bytes, records: RecordLayer) -> ClientState:
        assert isinstance(message, wire.Certificate)
        if message.context:
            raise IllegalParameter(
                "the server's Certificate has a certificate_request_context, which must be empty",
                Reason.CERTIFICATE_CONTEXT,
            )
        if not message.entries:
            raise DecodeError(
                "the server sent no certificate", Reason.CERTIFICATE_MISSING
            )  # section 4.5.1.3
        for _, extensions in message.entries:
            _check_answers(self.handshake.offer, ext.MessageKind.CERTIFICATE, extensions)
        kind, name = self.handshake.server_type, self.handshake.offer.name
        check_entries(kind, message)
        now = self.handshake.offer.config.clock()
        peer = accept_server(self.verifier, kind, message.chain, name, now)
        transcript = self.transcript.add(raw)
        return WaitCertificateVerify(self.handshake, peer, self.requested, transcript)


@value
class WaitCertificateVerify(ClientState):
    """The certificate is accepted; the server must prove that it has the private key."""

    handshake: _Handshake
    peer: VerifiedPeer
    requested: tuple[int, ...] | None
    transcript: Transcript

    def handle(self, message: Message, raw: bytes, records: RecordLayer) -> ClientState:
        assert isinstance(message, wire.CertificateVerify)
        scheme = negotiation.verify_signature(
            message,
            self.peer,
            self.handshake.offer.config.signature_schemes,
            Label.SERVER_CERTIFICATE_VERIFY,
            self.transcript,
        )
        proof = negotiation.PeerProof(self.peer, scheme)
        return WaitFinished(self.handshake, proof, self.requested, self.transcript.add(raw))


@value
class WaitFinished(ClientState):
    """The server is authenticated; its Finished confirms the whole handshake."""

    handshake: _Handshake
    proof: negotiation.PeerProof
    requested: tuple[int, ...] | None
    transcript: Transcript

    def handle(self, message: Message, raw: bytes, records: RecordLayer) -> ClientState:
        assert isinstance(message, wire.Finished)
        negotiation.check_finished(message, self.handshake.keys.server, self.transcript)
        records.reader.check_message_boundary()
        records.reader.change_cipher_spec_allowed = False
        transcript = self.transcript.add(raw)
        proof, offer, negotiated = self.proof, self.handshake.offer, self.handshake.negotiated
        resumption = offer.resumption if negotiated.psk and negotiated.psk.resumption else None
        session = negotiation.session_of(
            negotiated,
            ticket=resumption.ticket if resumption is not None else None,
            scheme=proof.scheme,
            peer=proof.certificate,
            checked=proof.certificate is None or proof.certificate.verified_by != "insecure",
            now=offer.config.clock(),
        )
        check_session(offer.config, session)
        records.emit(SessionProposed(session, proof.certificate))
        return Proposed(self.handshake, proof, self.requested, session, transcript)


@value
class Proposed(ClientState):
    """The server's Finished is verified; our caller decides before we send ours."""

    handshake: _Handshake
    proof: negotiation.PeerProof
    requested: tuple[int, ...] | None
    session: Session
    transcript: Transcript

    def accept(self, session: Session, records: RecordLayer) -> ClientTraffic:
        """[Certificate, CertificateVerify,] Finished."""
        keys, transcript, config = self.handshake.keys, self.transcript, self.handshake.offer.config
        main = keys.application_keys(transcript, records)
        if self.requested is not None:
            transcript = self._authenticate(records, self.requested)
        finished = wire.Finished(keys.client.finished(transcript.digest()))
        transcript = transcript.add(records.writer.send(finished))
        records.reader.change_key(main.server)
        records.writer.change_key(main.client)
        records.reader.data_allowed = True
        negotiated, tickets = self.handshake.negotiated, config.ticket_store is not None
        connected = Connected.complete(
            session, negotiated, main, transcript, config, records, tickets=tickets
        )
        peer = self.proof.certificate
        presented = peer.certificate if peer is not None else None
        return ClientTraffic(connected, config, presented)

    def _authenticate(self, records: RecordLayer, requested: tuple[int, ...]) -> Transcript:
        """Send Certificate and CertificateVerify, or an empty Certificate if we have no suitable
        one. Returns the transcript with what was sent."""
        config, transcript = self.handshake.offer.config, self.transcript
        identity, scheme = config.identity, None
        if identity is not None and identity.certificate_type == self.handshake.client_type:
            scheme = choose_scheme(identity.signing_key, config.signature_schemes, requested)
        shown = () if identity is None or scheme is None else identity.chain
        certificate = negotiation.certificate_message(shown)
        records.writer.send_raw(certificate)
        transcript = transcript.add(certificate)
        if identity is None or scheme is None:
            return transcript
        verify = negotiation.sign_transcript(
            identity, scheme, Label.CLIENT_CERTIFICATE_VERIFY, transcript
        )
        return transcript.add(records.writer.send(verify))


_M = HandshakeType
START: Final = (WaitPsk, WaitServerHello)
"""The states that :func:`start` may return; it sends the ClientHello unless it waits for a PSK."""
STEPS: Final[Mapping[type, Step]] = {
    WaitPsk: Step((), (_M.CLIENT_HELLO,), (WaitServerHello,)),
    WaitServerHello: Step(
        (_M.SERVER_HELLO,), (_M.CLIENT_HELLO,), (WaitSecondServerHello, WaitEncryptedExtensions)
    ),
    WaitSecondServerHello: Step((_M.SERVER_HELLO,), (), (WaitEncryptedExtensions,)),
    WaitEncryptedExtensions: Step(
        (_M.ENCRYPTED_EXTENSIONS,), (), (WaitCertificateOrRequest, WaitFinished)
    ),
    WaitCertificateOrRequest: Step(
        (_M.CERTIFICATE_REQUEST, _M.CERTIFICATE), (), (WaitCertificate, WaitCertificateVerify)
    ),
    WaitCertificate: Step((_M.CERTIFICATE,), (), (WaitCertificateVerify,)),
    WaitCertificateVerify: Step((_M.CERTIFICATE_VERIFY,), (), (WaitFinished,)),
    WaitFinished: Step((_M.FINISHED,), (), (Proposed,)),
    Proposed: Step((), (_M.CERTIFICATE, _M.CERTIFICATE_VERIFY, _M.FINISHED), (ClientTraffic,)),
    ClientTraffic: Step(
        (_M.KEY_UPDATE, _M.EXTENDED_KEY_UPDATE, _M.NEW_SESSION_TICKET), (), (ClientTraffic,)
    ),
}
"""All steps of the handshake. The engine refuses any other message and any other transition."""
