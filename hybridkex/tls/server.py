"""The server's handshake (RFC 9846 appendix A.2), one class per state, in their order.

Anyone can send a ClientHello, so the checks run in order of cost: first its content, then our
tickets, then the key exchange, and last an outside key source (:class:`WaitPsk`). :data:`STEPS`, at
the end, lists all states with the messages between them.
"""

import hashlib
import hmac
from collections.abc import Mapping
from typing import Final

from hybridkex.auth import VerifiedPeer
from hybridkex.constants import HELLO_RETRY_RANDOM, TLS13, HandshakeType, Label
from hybridkex.crypto.kex import Group
from hybridkex.crypto.psk import ExternalPsk
from hybridkex.crypto.schedule import TrafficSecret
from hybridkex.crypto.signatures import CERTIFICATE_ONLY_SCHEMES
from hybridkex.crypto.suites import CipherSuite
from hybridkex.errors import (
    CertificateRejected,
    DecryptError,
    HandshakeFailure,
    IllegalParameter,
    LocalStateError,
    MissingExtension,
    PeerError,
    UnknownPskIdentity,
    UnsupportedCertificateType,
    UnsupportedExtension,
)
from hybridkex.reasons import Reason
from hybridkex.secret import Secret
from hybridkex.tls import fresh_negotiation, negotiation
from hybridkex.tls import server_choice as chosen
from hybridkex.tls.admission import check_session
from hybridkex.tls.certificate_types import accept_client, check_entries
from hybridkex.tls.config import ServerConfig
from hybridkex.tls.events import PskWanted, SessionProposed
from hybridkex.tls.policy import Authentication, Requirement
from hybridkex.tls.record_layer import RecordLayer
from hybridkex.tls.session import Session
from hybridkex.tls.steps import Step
from hybridkex.tls.tickets import CookieState
from hybridkex.tls.traffic import Connected, ServerTraffic
from hybridkex.tls.transcript import Transcript
from hybridkex.values import value
from hybridkex.wire import extensions as ext
from hybridkex.wire import messages as wire
from hybridkex.wire.layout import Message


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
class WaitClientHello(ServerState):
    config: ServerConfig

    def handle(
        self, message: Message, raw: bytes, records: RecordLayer
    ) -> ServerState | ServerTraffic:
        assert isinstance(message, wire.ClientHello)
        records.reader.check_message_boundary()
        records.client_random = message.random
        records.reader.change_cipher_spec_allowed = True
        hello = chosen.Hello.check(message, raw, self.config)
        config = self.config
        group = chosen.choose_group(config, hello)
        suite = chosen.choose_suite(config, hello)
        if group.code not in hello.shares:
            return self._retry(hello, suite, group, records)
        if ext.EarlyDataIndication in message.extensions:
            records.reader.skip_early_data(after_retry=False)
        return _negotiate(config, hello, suite, group, None, records)

    def _retry(
        self, hello: chosen.Hello, suite: CipherSuite, group: Group, records: RecordLayer
    ) -> ServerState:
        """Ask for another share and discard this ClientHello: the cookie holds what is needed of it
        (section 4.3.2)."""
        state = CookieState(
            suite=suite.code,
            group=group.code,
            hello_digest=suite.hash.digest(hello.raw),
            invariants=hello.invariants(),
            psk=chosen.first_usable(self.config, hello, suite),
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
    """The HelloRetryRequest for a cookie; always the same bytes."""
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
        hello = chosen.Hello.check(message, raw, self.config)
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


def _check_psk_is_kept(state: CookieState, hello: chosen.Hello) -> None:
    """A client may remove only PSKs that are incompatible with the suite (section 4.2.2)."""
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


def _negotiate(
    config: ServerConfig,
    hello: chosen.Hello,
    suite: CipherSuite,
    group: Group,
    transcript: Transcript | None,
    records: RecordLayer,
) -> ServerState | ServerTraffic:
    """Negotiate all parameters; ask for a PSK where only an outside source can have it."""
    if suite.code not in hello.message.cipher_suites:
        raise IllegalParameter(
            "the second ClientHello no longer offers the cipher suite of our HelloRetryRequest",
            Reason.RETRY_HELLO_CHANGED,
        )
    transcript = transcript if transcript is not None else Transcript(suite.hash)
    choice = chosen.Choice.of(config, hello, suite, group, transcript)
    share, shared = group.exchange.respond(hello.shares[group.code])
    wanted = []
    for offered in sorted(hello.offered_psks, key=lambda one: chosen.preference(config, one)):
        selected = chosen.resolve(choice, offered)
        if selected is not None:
            return _respond(choice, share, shared, selected, records)
        if (
            chosen.worth_asking(config)
            and offered.hash is suite.hash
            and chosen.external_allowed(choice)
        ):
            wanted.append(offered)
    if wanted:
        records.emit(PskWanted(tuple(offered.identity for offered in wanted)))
        return WaitPsk(choice, share, shared, tuple(wanted))
    return _respond(choice, share, shared, None, records)


@value
class WaitPsk(ServerState):
    """Our caller looks up the client's PSK; nothing is read from the client meanwhile."""

    choice: chosen.Choice
    share: bytes
    shared: Secret
    wanted: tuple[chosen.OfferedPsk, ...]

    def provide(
        self, external: ExternalPsk | None, records: RecordLayer
    ) -> ServerState | ServerTraffic:
        """Continue with the PSK that was found, or without one."""
        if external is None:
            return _respond(self.choice, self.share, self.shared, None, records)
        for offered in self.wanted:
            if offered.names(external):
                selected = chosen.select_external(self.choice, offered, external)
                if selected is not None:
                    return _respond(self.choice, self.share, self.shared, selected, records)
        raise LocalStateError("the PSK that was provided is not one that the client offers")


def _respond(
    choice: chosen.Choice,
    share: bytes,
    shared: Secret,
    selected: chosen.Selected | None,
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
    keys = negotiation.HandshakeKeys.derive(suite, psk, shared, transcript, records)
    records.writer.change_key(keys.server)
    records.reader.change_key(keys.client)

    # A client is asked only by a server that shows a certificate itself (section 4.4.2).
    asked = choice.client_credential if credential is not None else None
    encrypted = wire.EncryptedExtensions(_encrypted_extensions(choice, credential, asked, records))
    sent = records.writer.send(encrypted)
    if credential is None:
        transcript = transcript.add(sent)
    else:
        transcript = _authenticate(choice, credential, asked, transcript, sent, records)
    finished = wire.Finished(keys.server.finished(transcript.digest()))
    transcript = transcript.add(records.writer.send(finished))
    main = keys.application_keys(transcript, records)
    records.writer.change_key(main.server)
    flight = _ServerFlight(choice, selected, credential, keys.client, main)
    if asked is not None:
        return WaitClientCertificate(flight, asked, transcript)
    return WaitClientFinished(flight, None, transcript)


def _credential_to_send(
    choice: chosen.Choice, selected: chosen.Selected | None
) -> chosen.Credential | None:
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


def _certificate_beside(choice: chosen.Choice, selected: chosen.Selected) -> bool:
    """Whether we send a certificate with this PSK: never with a ticket; with an external PSK if
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


def _why_no_credential(choice: chosen.Choice) -> PeerError:
    """Sections 9.2 and 4.5.1, and RFC 7250 section 4.2."""
    if ext.SignatureAlgorithms not in choice.hello.message.extensions:
        return MissingExtension("ClientHello without signature_algorithms")
    types = choice.hello.server_types
    if all(one.certificate_type not in types for one in choice.config.identities):
        return UnsupportedCertificateType("the client accepts no certificate type that we have")
    return HandshakeFailure(
        "the client can verify none of our certificates", Reason.NO_COMMON_SCHEME
    )


def _check_client_can_answer(choice: chosen.Choice) -> None:
    """RFC 7250 section 4.2: a kind of certificate that we can check, where we ask for one."""
    config = choice.config
    if config.client_verifier is None or choice.client_credential is not None:
        return
    # The RFC requires this even if client authentication is optional.
    offered = ext.ClientCertificateTypeOffer in choice.hello.message.extensions
    if offered or config.require_client_certificate:
        raise UnsupportedCertificateType("the client offers no certificate type that we can verify")


def _check_binder(choice: chosen.Choice, selected: chosen.Selected) -> None:
    """Verify that the client has the PSK and that the offer is unchanged (section 4.3.11.2)."""
    psk, digest = selected.psk, choice.transcript.add(choice.hello.truncated).digest()
    expected = psk.early_secret.binder(psk.binder_label, digest)
    if not hmac.compare_digest(expected, selected.offered.binder):
        raise DecryptError(
            "the PSK binder does not verify: the client may have another key under this identity",
            Reason.PSK_BINDER,
        )


def _encrypted_extensions(
    choice: chosen.Choice,
    credential: chosen.Credential | None,
    asked: chosen.ClientCredential | None,
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
    choice: chosen.Choice,
    credential: chosen.Credential,
    asked: chosen.ClientCredential | None,
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
class _ServerFlight:
    """The server's flight, ServerHello to Finished, once it is queued."""

    choice: chosen.Choice
    selected: chosen.Selected | None
    credential: chosen.Credential | None
    """Our credential; ``None`` if the PSK alone authenticates us."""
    client_handshake: TrafficSecret
    main: negotiation.ApplicationKeys


@value
class WaitClientCertificate(ServerState):
    """The client was asked for a certificate."""

    flight: _ServerFlight
    asked: chosen.ClientCredential
    transcript: Transcript

    def handle(self, message: Message, raw: bytes, records: RecordLayer) -> ServerState:
        assert isinstance(message, wire.Certificate)
        choice, asked = self.flight.choice, self.asked
        if message.context:
            raise IllegalParameter(
                "the client's certificate_request_context differs from the one that we sent",
                Reason.CERTIFICATE_CONTEXT,
            )
        if any(extensions.types for _, extensions in message.entries):
            raise UnsupportedExtension(
                "the client's Certificate has an extension that we did not request"
            )
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
        peer = resumption.peer if resumption is not None else self.peer
        negotiated = negotiation.Negotiated(
            suite=choice.suite,
            group=choice.group,
            psk=selected.psk if selected is not None else None,
            alpn=choice.alpn,
            extensions=tuple(offered for offered, _ in choice.application),
            server_name=choice.hello.server_name,
            policy=choice.config.policy_in_force,
            agreed=choice.agreed,
        )
        session = negotiation.session_of(
            negotiated,
            ticket=resumption.ticket if resumption is not None else None,
            scheme=flight.credential.scheme if flight.credential is not None else None,
            peer=peer,
            checked=True,
            now=choice.config.clock(),
        )
        check_session(choice.config, session)
        records.emit(SessionProposed(session, peer))
        return Proposed(flight, negotiated, peer, session, transcript)


@value
class Proposed(ServerState):
    """The client's Finished is verified; our caller decides before we read anything else."""

    flight: _ServerFlight
    negotiated: negotiation.Negotiated
    peer: VerifiedPeer | None
    session: Session
    transcript: Transcript

    def accept(self, session: Session, records: RecordLayer) -> ServerTraffic:
        """The handshake is complete."""
        choice, main = self.flight.choice, self.flight.main
        records.reader.change_key(main.client)
        records.reader.data_allowed = True
        # A client can use tickets if it offered psk_dhe_ke (section 4.3.9).
        tickets = choice.config.tickets is not None and choice.hello.psk_dhe
        connected = Connected.complete(
            session, self.negotiated, main, self.transcript, choice.config, records, tickets=tickets
        )
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
"""All steps of the handshake. The engine refuses any other message and any other transition."""
