"""A key exchange over any trio stream, for protocols that have their own record layer.

The messages, each preceded by its length in 32 bits::

    initiator -> responder   offer:   header, nonce, shares; proof
    responder -> initiator   answer:  header, nonce, shares; proof; confirmation
    initiator -> responder   finish:  confirmation

If both sides use a QKD key, the finish carries more and one message follows::

    initiator -> responder   finish:  name of the QKD key; confirmation; confirmation with QKD key
    responder -> initiator   end:     confirmation with QKD key

A *proof* authenticates a message: an HMAC under the PSK, or a signature with its public key. It
covers all messages so far, including the other side's proof, and the names, roles and settings that
both sides configured: a message that is reflected to its sender, or replayed from an exchange with
another party, fails. A replayed offer verifies, because nothing in it is fresh to the responder,
but an attacker who replays it cannot send the confirmation.

A *confirmation* shows that its sender has the combined key. The initiator's answers the responder's
fresh shares and nonce, so it is the first message that shows the responder a live peer. Only then
does the responder ask its key source, once: replayed or copied offers cause no look-up and use up
no key. The initiator, too, asks for a QKD key only once it has authenticated the responder.

The key is :func:`~hybridkex.combiner.kdf.combine` over every key exchange, the QKD key if there is
one, and the PSK if there is one; its context is the hash of all messages and proofs up to there, so
that two sides with the same key agree on who the peers are. The design is SIGMA (sign and MAC)
without identity protection: the names are configured, and raw public keys travel in the clear.
"""

import hmac
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Final, Literal, Protocol

import trio

from hybridkex.auth import (
    ClientKeyVerifier,
    RawIdentity,
    Refreshable,
    ServerKeyVerifier,
    VerifiedPeer,
)
from hybridkex.auth.names import canonical_peer_name, parse_peer_name
from hybridkex.combiner.kdf import NO_SECRET, Leg, Method, combine, require
from hybridkex.crypto.kex import MLKEM768, X25519, KeyExchange
from hybridkex.crypto.schedule import hkdf_expand_label
from hybridkex.crypto.signatures import ALL_SCHEMES, SignatureScheme, choose_scheme
from hybridkex.crypto.suites import SHA256
from hybridkex.errors import (
    CertificateRejected,
    ConfigError,
    DecodeError,
    DecryptError,
    HandshakeTimeout,
    IllegalParameter,
    TruncationError,
)
from hybridkex.fields import check_fields, check_optional
from hybridkex.machine import broken
from hybridkex.net.event_loop import ask, in_thread
from hybridkex.net.reading import EndOfStream, read_exactly
from hybridkex.qkd.psk import identity_of, name_of
from hybridkex.qkd.source import KeySource, QkdKey, draw_key, is_known, look_up_key
from hybridkex.secret import Secret
from hybridkex.wire.codec import Reader, u16, u32, vector16, vector24, vector32

Role = Literal["initiator", "responder"]
_Message = Literal["offer", "answer"]

_HEADER: Final = b"hybridkex combiner v2 "
_NONCE: Final = 32
_CONFIRMATION: Final = 32
_MAX_PROOF: Final = (1 << 16) + (1 << 18)
"""The maximum length of a message in bytes, without its shares: a signature and a public key."""
_MAX_KEY_NAME: Final = 1 << 13
"""Bytes of the name of a QKD key: at most eight parts of 768 bytes."""

MAX_LENGTH: Final = 254 * SHA256.size - 2 * _CONFIRMATION
"""The maximum length of a key in bytes: the output of either method with SHA-256, less the two
confirmations."""


class Authentication(Protocol):
    """Authenticates the messages of an exchange."""

    @property
    def psk(self) -> Secret:
        """A secret that enters the key as well; empty if there is none."""

    def prove(self, role: Role, digest: bytes) -> bytes:
        """Our proof over ``digest``, sent in ``role``."""

    def check(self, role: Role, digest: bytes, proof: bytes, peer: str) -> VerifiedPeer | None:
        """Verify the proof that ``peer`` sent in ``role``.

        Raises:
            PeerError: the proof does not verify, or the peer is not ``peer``.
        """


@dataclass(frozen=True)
class PskAuthentication:
    """Both sides hold a pre-shared key; it authenticates the messages, and enters the key.

    Args:
        key: at least 16 bytes of full entropy, used only by this pair of names and only here.

    Raises:
        ConfigError: the key is not a :class:`~hybridkex.Secret`, or is shorter than 16 bytes.
    """

    key: Secret

    def __post_init__(self) -> None:
        require(self.key, Secret, "the pre-shared key")
        if len(self.key) < 16:
            raise ConfigError("a pre-shared key must have at least 16 bytes")

    @property
    def psk(self) -> Secret:
        """The PSK that enters the key."""
        return self.key

    def prove(self, role: Role, digest: bytes) -> bytes:
        """An HMAC over ``digest``, under a key that the PSK and ``role`` give."""
        extracted = Secret(hmac.digest(_HEADER, self.key.reveal(), "sha256"))
        mac_key = hkdf_expand_label(SHA256, extracted, role.encode("ascii"), b"", 32)
        return hmac.digest(mac_key, digest, "sha256")

    def check(self, role: Role, digest: bytes, proof: bytes, peer: str) -> None:
        """Verify ``proof``, the HMAC over ``digest`` that the peer sent in ``role``. Raises
        ``DecryptError``."""
        if not hmac.compare_digest(self.prove(role, digest), proof):
            raise DecryptError(
                "the peer's message does not verify: it has another pre-shared key, or is "
                "configured differently (names, label, context, exchanges, QKD, method, length)"
            )


@dataclass(frozen=True)
class SignatureAuthentication:
    """Each side signs with its own key.

    Args:
        identity: our key pair.
        verifier: decides whether to trust the peer's raw public key: the pins of this one peer,
            known peers, or a web of trust. The responder is verified as the server of its name, the
            initiator as a client that must be known or endorsed under its name.
        schemes: signature schemes, in order of preference.

    Raises:
        ConfigError: no scheme fits our key.
    """

    identity: RawIdentity
    verifier: ServerKeyVerifier | ClientKeyVerifier
    schemes: tuple[SignatureScheme, ...] = ALL_SCHEMES

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def psk(self) -> Secret:
        """Empty: signatures add nothing to the key."""
        return NO_SECRET

    def prove(self, role: Role, digest: bytes) -> bytes:
        """Our signature over ``role`` and ``digest``, with the key that verifies it.

        Raises:
            ConfigError: none of the schemes fits our key.
        """
        key = self.identity.signing_key
        scheme = choose_scheme(key, self.schemes, (one.code for one in self.schemes))
        if scheme is None:
            raise ConfigError("none of the signature schemes fits our key")
        spki = self.identity.chain[0]
        signature = scheme.sign(key, self._content(role, digest, spki))
        return u16(scheme.code) + vector24(spki) + vector16(signature)

    def check(self, role: Role, digest: bytes, proof: bytes, peer: str) -> VerifiedPeer:
        """Verify ``proof``: the peer's raw public key, and its signature over ``role`` and
        ``digest``.

        Raises:
            PeerError: it does not verify, or the key is not accepted.
        """
        reader = Reader(proof)
        code, spki, signature = reader.u16(), reader.opaque(3, least=1), reader.opaque(2)
        reader.finish()
        scheme = next((one for one in self.schemes if one.code == code), None)
        if scheme is None:
            raise IllegalParameter(f"the peer signed with scheme {code:#06x}, which is not enabled")
        if role == "responder" and isinstance(self.verifier, ServerKeyVerifier):
            verified = self.verifier.verify_server_key(spki, parse_peer_name(peer))
        elif role == "initiator" and isinstance(self.verifier, ClientKeyVerifier):
            verified = self.verifier.verify_client_key(spki)
            _require_name(verified, peer)
        else:
            raise ConfigError(f"the verifier cannot verify the key of the {role}")
        content = self._content(role, digest, spki)
        scheme.verify(verified.certificate.public_key, signature, content)
        return verified

    @staticmethod
    def _content(role: Role, digest: bytes, spki: bytes) -> bytes:
        """The signed content, in the form of RFC 9846 section 4.5.2, with our context string."""
        label = _HEADER + role.encode("ascii")
        return b" " * 64 + label + b"\0" + digest + SHA256.digest(spki)


def _require_name(verified: VerifiedPeer, peer: str) -> None:
    """Refuse a key that is known under other names only. Pins vouch for a key, not for a name."""
    vouched = verified.vouched_names
    if vouched and not verified.is_one_of({canonical_peer_name(peer)}):
        raise CertificateRejected(
            f"the key of the initiator belongs to {', '.join(vouched)}, not to {peer}",
            subject=verified.subject,
        )


@dataclass(frozen=True, kw_only=True)
class ExchangeConfig:
    """One side of an exchange.

    Both sides configure the same ``exchanges``, ``label``, ``context``, ``length`` and ``method``,
    each other's names, and opposite roles. Nothing is negotiated: a difference is an error.

    Raises:
        ConfigError: a field has the wrong type, or the fields cannot work together.
    """

    role: Role
    """``initiator`` sends first, and draws the QKD key that the ``responder`` looks up."""
    local: str
    """Our name."""
    peer: str
    """The peer's name; with signatures, the responder's is a host name or an IP address."""
    authentication: Authentication
    """:class:`PskAuthentication` or :class:`SignatureAuthentication`."""
    label: bytes
    """The purpose of the key; not empty."""
    exchanges: tuple[KeyExchange, ...] = (X25519.exchange, MLKEM768.exchange)
    """An attacker must break every one of them to learn the key."""
    key_source: KeySource | None = None
    """The source of a QKD key; both sides have one, or neither has."""
    context: bytes = b""
    """Anything else that both sides must agree on."""
    length: int = 32
    """Length of the key in bytes, 1 to 8064."""
    method: Method = Method.CONCATENATE
    """The method that combines the secrets."""
    time_limit: float = 10.0
    """Time for the whole exchange, in seconds."""
    agreed: bytes = field(init=False, repr=False)
    """The hash of the settings that must be the same on both sides."""

    def __post_init__(self) -> None:
        if isinstance(self.exchanges, list):
            object.__setattr__(self, "exchanges", tuple(self.exchanges))
        check_fields(self)
        verifier = getattr(self.authentication, "verifier", None)
        check_optional("verifier", verifier, Refreshable)
        if not self.exchanges:
            raise ConfigError("at least one key exchange is required")
        if not self.local or not self.peer or self.local == self.peer:
            raise ConfigError("local and peer must be two different names")
        if not self.label:
            raise ConfigError("the label must not be empty: it separates the uses of a key")
        if not 1 <= self.length <= MAX_LENGTH:
            raise ConfigError(f"length must be 1 to {MAX_LENGTH} bytes, not {self.length}")
        if not self.time_limit > 0:
            raise ConfigError("time_limit of ExchangeConfig must be positive")
        if self.role == "initiator" and isinstance(self.authentication, SignatureAuthentication):
            parse_peer_name(self.peer)
        object.__setattr__(self, "agreed", self._digest())

    def _digest(self) -> bytes:
        names = (self.local, self.peer)
        try:
            initiator, responder = (
                name.encode("utf-8")
                for name in (names if self.role == "initiator" else names[::-1])
            )
        except UnicodeEncodeError:
            raise ConfigError("local and peer must be valid Unicode text") from None
        settings = (
            initiator,
            responder,
            b"".join(vector16(one.name.encode("utf-8")) for one in self.exchanges),
            b"qkd" if self.key_source is not None else b"",
            self.method.value.encode("ascii"),
            self.label,
            self.context,
            u32(self.length),
        )
        return SHA256.digest(_HEADER + b"".join(map(vector32, settings)))


@dataclass(frozen=True)
class Exchanged:
    """The result of an exchange."""

    key: Secret
    """The shared key, of the length that the configuration asks for."""
    peer: VerifiedPeer | None
    """The peer, if it was authenticated by a signature."""
    parts: tuple[str, ...]
    """The names of the key exchanges in the key."""
    qkd_key_ids: tuple[str, ...]
    """The IDs of the QKD keys in the key."""


async def exchange(
    stream: trio.abc.Stream,
    config: ExchangeConfig,
    *,
    on_authenticated: Callable[[], None] | None = None,
) -> Exchanged:
    """Agree on a key with the peer.

    The stream stays open; no byte beyond the exchange has been read from it.

    Args:
        stream: any trio stream.
        config: our side.
        on_authenticated: called as soon as the peer is authenticated and known to be live. Until
            then a server counts the connection against its budget for unauthenticated peers.

    Raises:
        PeerError: the peer is not the configured one, is configured differently, or broke the
            protocol.
        HandshakeTimeout: the exchange took longer than ``config.time_limit``.
        TruncationError: the stream ended.
        KeySourceError: the key source returned no QKD key.
    """
    with trio.move_on_after(config.time_limit):
        verifier = getattr(config.authentication, "verifier", None)
        if isinstance(verifier, Refreshable):
            await in_thread(verifier.refresh, abandon=True)
        run = _Run(stream, config, on_authenticated or (lambda: None))
        result = await (run.initiate() if config.role == "initiator" else run.respond())
        if result.peer is not None and result.peer.remember is not None:
            await in_thread(result.peer.remember, abandon=True)
        return result
    raise HandshakeTimeout(f"the exchange did not end within {config.time_limit:g} s")


@dataclass(frozen=True)
class _Run:
    """One exchange in progress."""

    stream: trio.abc.Stream
    config: ExchangeConfig
    on_authenticated: Callable[[], None]

    async def initiate(self) -> Exchanged:
        config = self.config
        started = [one.start() for one in config.exchanges]
        offers = [one.share for one in started]
        offer = _HEADER + b"offer" + os.urandom(_NONCE) + b"".join(offers)
        digest = SHA256.digest(config.agreed + offer)
        ours = config.authentication.prove("initiator", digest)
        await self._send(vector32(offer) + vector32(ours))

        answer, theirs, confirmation = await self._receive_answer()
        digest = SHA256.digest(digest + SHA256.digest(ours) + answer)
        verified = config.authentication.check("responder", digest, theirs, config.peer)
        digest = SHA256.digest(digest + theirs)
        answers = self._shares(answer, "answer")
        secrets = [one.finish(share) for one, share in zip(started, answers, strict=True)]
        legs = self._legs(secrets, offers, answers)
        keys = self._keys(digest, legs)
        if not hmac.compare_digest(keys.responder, confirmation):
            raise DecryptError("the responder has a different key")
        self.on_authenticated()
        if config.key_source is None:
            await self._send(keys.initiator)
            return self._result(keys, verified)

        qkd = await ask(partial(draw_key, config.key_source))
        name = identity_of(qkd.name)
        with_qkd = self._keys(
            SHA256.digest(digest + name), [*legs, Leg(name="QKD", secret=qkd.key, offer=name)]
        )
        named = vector32(name) + vector32(_bound(keys.initiator, name))
        await self._send(named + vector32(with_qkd.initiator))
        if not hmac.compare_digest(with_qkd.responder, await self._receive(_CONFIRMATION)):
            raise DecryptError("the responder got a different QKD key from its KME")
        return self._result(with_qkd, verified, qkd)

    async def respond(self) -> Exchanged:
        config = self.config
        offer, theirs = await self._receive_offer()
        digest = SHA256.digest(config.agreed + offer)
        verified = config.authentication.check("initiator", digest, theirs, config.peer)
        offers = self._shares(offer, "offer")
        results = [one.respond(share) for one, share in zip(config.exchanges, offers, strict=True)]
        answers = [share for share, _ in results]
        answer = _HEADER + b"answer" + os.urandom(_NONCE) + b"".join(answers)
        digest = SHA256.digest(digest + SHA256.digest(theirs) + answer)
        ours = config.authentication.prove("responder", digest)
        digest = SHA256.digest(digest + ours)
        legs = self._legs([secret for _, secret in results], offers, answers)
        keys = self._keys(digest, legs)
        await self._send(vector32(answer) + vector32(ours) + vector32(keys.responder))
        if config.key_source is None:
            if not hmac.compare_digest(keys.initiator, await self._receive(_CONFIRMATION)):
                raise DecryptError("the initiator has a different key")
            self.on_authenticated()
            return self._result(keys, verified)

        identity, bound, confirmation = await self._receive_finish()
        if not hmac.compare_digest(_bound(keys.initiator, identity), bound):
            raise DecryptError("the initiator has a different key")
        # The initiator is live: now a key may be consumed.
        self.on_authenticated()
        name = name_of(identity)
        if name is None or not is_known(config.key_source, name):
            raise IllegalParameter("the peer named a QKD key of other KMEs than ours")
        qkd = await ask(partial(look_up_key, config.key_source, name))
        with_qkd = self._keys(
            SHA256.digest(digest + identity),
            [*legs, Leg(name="QKD", secret=qkd.key, offer=identity)],
        )
        if not hmac.compare_digest(with_qkd.initiator, confirmation):
            raise DecryptError("the initiator got a different QKD key from its KME")
        await self._send(with_qkd.responder)
        return self._result(with_qkd, verified, qkd)

    def _result(
        self, keys: "_Keys", verified: VerifiedPeer | None, qkd: QkdKey | None = None
    ) -> Exchanged:
        return Exchanged(
            keys.key,
            verified,
            tuple(part.name for one in self.config.exchanges for part in one.parts),
            tuple(map(str, qkd.key_ids if qkd else ())),
        )

    def _legs(
        self, secrets: Sequence[Secret], offers: Sequence[bytes], answers: Sequence[bytes]
    ) -> list[Leg]:
        return [
            Leg(name=one.name, secret=secret, offer=offer, answer=answer)
            for one, secret, offer, answer in zip(
                self.config.exchanges, secrets, offers, answers, strict=True
            )
        ]

    def _keys(self, digest: bytes, legs: Sequence[Leg]) -> "_Keys":
        config = self.config
        combined = combine(
            legs,
            label=config.label,
            context=config.agreed + digest,
            length=2 * _CONFIRMATION + config.length,
            psk=config.authentication.psk,
            method=config.method,
        ).reveal()
        return _Keys(
            combined[:_CONFIRMATION],
            combined[_CONFIRMATION : 2 * _CONFIRMATION],
            Secret(combined[2 * _CONFIRMATION :]),
        )

    def _lengths(self, which: _Message) -> list[int]:
        return [
            one.offer_length if which == "offer" else one.answer_length
            for one in self.config.exchanges
        ]

    def _shares(self, message: bytes, which: _Message) -> list[bytes]:
        """Split a message that :meth:`_require_form` accepted."""
        reader = Reader(message, len(_HEADER) + len(which) + _NONCE)
        return [reader.take(length) for length in self._lengths(which)]

    def _require_form(self, message: bytes, which: _Message) -> None:
        header = _HEADER + which.encode("ascii")
        if not message.startswith(header):
            raise DecodeError(f"the peer's message is not an {which} of this protocol")
        if len(message) != len(header) + _NONCE + sum(self._lengths(which)):
            raise IllegalParameter(
                f"the shares in the peer's {which} do not have the lengths of our key exchanges"
            )

    async def _receive_offer(self) -> tuple[bytes, bytes]:
        offer, proof = _parts(await self._receive(sum(self._lengths("offer")) + _MAX_PROOF), 2)
        self._require_form(offer, "offer")
        return offer, proof

    async def _receive_answer(self) -> tuple[bytes, bytes, bytes]:
        message = await self._receive(sum(self._lengths("answer")) + _MAX_PROOF)
        answer, proof, confirmation = _parts(message, 3)
        self._require_form(answer, "answer")
        return answer, proof, confirmation

    async def _receive_finish(self) -> tuple[bytes, bytes, bytes]:
        message = await self._receive(_MAX_KEY_NAME + 2 * _CONFIRMATION + 12)
        name, bound, confirmation = _parts(message, 3)
        return name, bound, confirmation

    async def _send(self, message: bytes) -> None:
        try:
            await self.stream.send_all(vector32(message))
        except trio.BrokenResourceError as error:
            raise TruncationError(broken(error)) from None

    async def _receive(self, most: int) -> bytes:
        length = int.from_bytes(await self._exactly(4), "big")
        if length > most:
            head = length.to_bytes(4, "big")
            text = f", or the text {head.decode()!r}" if head.isascii() else ""
            raise IllegalParameter(
                f"the peer sent no message of this exchange: a length of {length} bytes{text}, "
                f"where {most} are allowed; check the address and the port"
            )
        return await self._exactly(length)

    async def _exactly(self, count: int) -> bytes:
        """Read exactly ``count`` bytes: what follows belongs to the caller."""
        try:
            return await read_exactly(self.stream, count)
        except EndOfStream:
            raise TruncationError(
                "the peer closed the stream during the exchange: it may have another key, or be "
                "configured differently; see its log"
            ) from None
        except trio.BrokenResourceError as error:
            raise TruncationError(broken(error)) from None


def _parts(message: bytes, count: int) -> list[bytes]:
    reader = Reader(message)
    try:
        parts = [reader.opaque(4) for _ in range(count)]
        reader.finish()
    except DecodeError as error:
        raise DecodeError(
            f"the peer sent no message of this exchange ({error}); check the address and the port"
        ) from None
    return parts


def _bound(confirmation: bytes, key_name: bytes) -> bytes:
    """The initiator's confirmation without the QKD key, over the name of the key."""
    return hmac.digest(confirmation, key_name, "sha256")


@dataclass(frozen=True)
class _Keys:
    """The output of the combiner: two confirmations and the key."""

    initiator: bytes
    responder: bytes
    key: Secret

    def __repr__(self) -> str:
        return "_Keys()"
