"""A key exchange of one round trip over any trio stream, for those with a record layer already.

Three messages, each behind its length in 32 bits::

    initiator -> responder   offer:   header, nonce, QKD key name, shares; proof
    responder -> initiator   answer:  header, nonce, shares; proof; confirmation
    initiator -> responder   confirmation

A *proof* shows who made the message: an HMAC under the PSK, or a signature with the key behind it.
It covers all that was said so far, the other side's proof included, and the names, roles and key
exchanges that both sides have configured, so that a message reflected to its sender, or taken from
an exchange with somebody else, fails. A replayed offer passes, and is worth nothing: the replayer
cannot confirm. A *confirmation* shows that its sender has the combined key; the initiator has the
key after one round trip, the responder with the confirmation, for which nobody waits.

The key is :func:`~hybridkex.combiner.kdf.combine` over every key exchange, the QKD key if there is
one, and the PSK if there is one; its context is the hash of both messages and both proofs, so that
two sides with one key have seen the same peers. The design is that of SIGMA (sign and MAC) without
its identity protection: the names of both sides are configured, and raw public keys travel in the
clear.
"""

import hmac
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, Protocol, get_args

import trio

from hybridkex.auth import (
    ClientKeyVerifier,
    RawIdentity,
    ServerKeyVerifier,
    VerifiedPeer,
)
from hybridkex.auth.names import canonical_peer_name, parse_peer_name
from hybridkex.combiner.kdf import NO_SECRET, Leg, Method, combine
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
from hybridkex.qkd.psk import identity_of, name_of
from hybridkex.qkd.source import KeySource, QkdKey
from hybridkex.secret import Secret
from hybridkex.wire.codec import Reader, u16, u32, vector16, vector24

__all__ = ["Exchanged", "PskAuthentication", "SignatureAuthentication", "exchange"]

Role = Literal["initiator", "responder"]

_HEADER: Final = b"hybridkex combiner v1 "
_NONCE: Final = 32
_CONFIRMATION: Final = 32
_PROOF_ROOM: Final = (1 << 16) + (1 << 18)
"""Bytes of a message beside its shares that we are ready to hold: a signature and a public key."""

MAX_LENGTH: Final = 255 * SHA256.size - 2 * _CONFIRMATION
"""Bytes of a key: what HKDF gives (RFC 5869 section 2.3), less the two confirmations."""


class Authentication(Protocol):
    """How a message is tied to who made it."""

    @property
    def psk(self) -> Secret:
        """What goes into the key as well; empty where nothing does."""
        ...

    def prove(self, role: Role, digest: bytes) -> bytes:
        """Our proof for a message of ours in this role."""
        ...

    def check(self, role: Role, digest: bytes, proof: bytes, peer: str) -> VerifiedPeer | None:
        """Return if the peer's proof for its message in ``role`` is good, else raise PeerError."""
        ...


@dataclass(frozen=True)
class PskAuthentication:
    """Both sides know a key; it authenticates the messages, and goes into the result.

    Args:
        key: 16 bytes or more of full entropy, for this pair of names and nothing else.
    """

    key: Secret

    def __post_init__(self) -> None:
        if len(self.key) < 16:
            raise ConfigError("a pre-shared key has at least 16 bytes")

    @property
    def psk(self) -> Secret:
        return self.key

    def prove(self, role: Role, digest: bytes) -> bytes:
        mac_key = hkdf_expand_label(SHA256, self._extracted, role.encode("ascii"), b"", 32)
        return hmac.digest(mac_key, digest, "sha256")

    def check(self, role: Role, digest: bytes, proof: bytes, peer: str) -> None:
        if not hmac.compare_digest(self.prove(role, digest), proof):
            raise DecryptError("the peer does not have the pre-shared key, or means something else")

    @property
    def _extracted(self) -> Secret:
        return Secret(hmac.digest(_HEADER, self.key.reveal(), "sha256"))


@dataclass(frozen=True)
class SignatureAuthentication:
    """Both sides sign with a key of their own.

    Args:
        identity: our key.
        verifier: decides about the peer's raw public key: the pins of this one peer, known peers, a
            web of trust. The responder is checked as a server of its name, the initiator as a
            client that must be known or endorsed under its name.
        schemes: signature schemes, in order of preference.
    """

    identity: RawIdentity
    verifier: ServerKeyVerifier | ClientKeyVerifier
    schemes: tuple[SignatureScheme, ...] = ALL_SCHEMES

    @property
    def psk(self) -> Secret:
        return NO_SECRET

    def prove(self, role: Role, digest: bytes) -> bytes:
        key = self.identity.private_key
        scheme = choose_scheme(key, self.schemes, (one.code for one in self.schemes))
        if scheme is None:
            raise ConfigError("none of the signature schemes goes with our key")
        spki = self.identity.chain[0]
        signature = scheme.sign(key, self._content(role, digest, spki))
        return u16(scheme.code) + vector24(spki) + vector16(signature)

    def check(self, role: Role, digest: bytes, proof: bytes, peer: str) -> VerifiedPeer:
        reader = Reader(proof)
        code, spki, signature = reader.u16(), reader.opaque(3, least=1), reader.opaque(2)
        reader.finish()
        scheme = next((one for one in self.schemes if one.code == code), None)
        if scheme is None:
            raise IllegalParameter(f"a signature of scheme {code:#06x}, which we do not use")
        if role == "responder" and isinstance(self.verifier, ServerKeyVerifier):
            verified = self.verifier.verify_server_key(spki, parse_peer_name(peer))
        elif role == "initiator" and isinstance(self.verifier, ClientKeyVerifier):
            verified = self.verifier.verify_client_key(spki)
            _require_name(verified, peer)
        else:
            raise ConfigError(f"the verifier cannot decide about the key of a {role}")
        content = self._content(role, digest, spki)
        scheme.verify(verified.certificate.public_key, signature, content)
        return verified

    @staticmethod
    def _content(role: Role, digest: bytes, spki: bytes) -> bytes:
        """In the form of RFC 8446 section 4.4.3, under labels of our own."""
        label = _HEADER + role.encode("ascii")
        return b" " * 64 + label + b"\0" + digest + SHA256.digest(spki)


def _require_name(verified: VerifiedPeer, peer: str) -> None:
    """Who is known by other names is somebody else. Pins know keys, and no names."""
    vouched = verified.vouched_names
    if vouched and not verified.is_one_of({canonical_peer_name(peer)}):
        raise CertificateRejected(
            f"the key of the initiator belongs to {', '.join(vouched)}, not to {peer}",
            subject=verified.subject,
        )


@dataclass(frozen=True)
class Exchanged:
    """What an exchange came to."""

    key: Secret
    peer: VerifiedPeer | None
    """Who the peer is, where it signed."""
    parts: tuple[str, ...]
    """The key exchanges that it rests on, by name."""
    qkd_key_ids: tuple[str, ...]
    """The QKD keys in it (UUIDs)."""


async def exchange(
    stream: trio.abc.Stream,
    *,
    role: Role,
    local: str,
    peer: str,
    authentication: Authentication,
    label: bytes,
    exchanges: Sequence[KeyExchange] = (X25519.exchange, MLKEM768.exchange),
    key_source: KeySource | None = None,
    context: bytes = b"",
    length: int = 32,
    method: Method = Method.CONCATENATE,
    time_limit: float = 10.0,
) -> Exchanged:
    """Agree on a key with the peer.

    Both sides give the same ``exchanges``, ``label``, ``context``, ``length`` and ``method``, each
    other's names, and opposite roles; there is no negotiation that could be attacked. The stream
    stays open and holds nothing of ours afterwards.

    Args:
        role: ``initiator`` speaks first; with a QKD key it draws, the ``responder`` looks it up.
        local: our name.
        peer: the other's name; with signatures the responder's is a host name or an address.
        authentication: :class:`PskAuthentication` or :class:`SignatureAuthentication`.
        label: what the key is for.
        exchanges: every one of them must be broken to learn the key.
        key_source: where a QKD key comes from; given on one side, it must be on the other.
        context: whatever else both must agree on.
        length: bytes of the key, 1 to 8096.
        time_limit: seconds for the whole exchange.

    Raises:
        PeerError: the peer is not who it should be, means something else, or breaks the protocol.
        HandshakeTimeout: it took too long.
        TruncationError: the stream ended.
        KeySourceError: there is no QKD key.
        ConfigError: the arguments cannot work.
    """
    if role not in get_args(Role):
        raise ConfigError(f"a side is the initiator or the responder, not {role!r}")
    if not exchanges or not local or not peer or local == peer:
        raise ConfigError("an exchange needs key exchanges, and two sides with different names")
    if not label:
        raise ConfigError("a label is needed: it keeps the key's uses apart")
    if not 1 <= length <= MAX_LENGTH:
        raise ConfigError(f"a key of {length} bytes; 1 to {MAX_LENGTH} can be had")
    if not time_limit > 0:
        raise ConfigError("the time limit of an exchange is positive")
    if role == "initiator" and isinstance(authentication, SignatureAuthentication):
        parse_peer_name(peer)
    names = (local, peer) if role == "initiator" else (peer, local)
    agreed = b"".join(
        u32(len(item)) + item
        for item in (
            *(name.encode("utf-8") for name in names),
            b"".join(vector16(one.name.encode("utf-8")) for one in exchanges),
            b"qkd" if key_source is not None else b"",
            method.value.encode("ascii"),
            label,
            context,
            u32(length),
        )
    )
    run = _Run(
        stream=stream,
        agreed=SHA256.digest(_HEADER + agreed),
        exchanges=tuple(exchanges),
        authentication=authentication,
        key_source=key_source,
        peer=peer,
        label=label,
        length=length,
        method=method,
    )
    with trio.move_on_after(time_limit):
        result = await (run.initiate() if role == "initiator" else run.respond())
        if result.peer is not None and result.peer.remember is not None:
            result.peer.remember()
        return result
    raise HandshakeTimeout(f"no key within {time_limit:g} s")


@dataclass(frozen=True, kw_only=True)
class _Run:
    """One exchange, with all that does not change in it."""

    stream: trio.abc.Stream
    agreed: bytes
    exchanges: tuple[KeyExchange, ...]
    authentication: Authentication
    key_source: KeySource | None
    peer: str
    label: bytes
    length: int
    method: Method

    async def initiate(self) -> Exchanged:
        qkd = await self.key_source.draw() if self.key_source is not None else None
        key_name = identity_of(qkd.name) if qkd is not None else b""
        started = [one.start() for one in self.exchanges]
        offer = _HEADER + b"offer" + os.urandom(_NONCE) + vector16(key_name)
        offer += b"".join(one.share for one in started)
        said = SHA256.digest(self.agreed + offer)
        ours = self.authentication.prove("initiator", said)
        await self._send(offer, ours)

        answer, proof, confirmation = await self._receive_answer()
        heard = SHA256.digest(said + SHA256.digest(ours) + answer)
        verified = self.authentication.check("responder", heard, proof, self.peer)
        heard = SHA256.digest(heard + proof)
        shares = self._split(answer[-sum(self._lengths("answer")) :], "answer")
        secrets = [one.finish(share) for one, share in zip(started, shares, strict=True)]
        offers = [one.share for one in started]
        keys = self._keys(heard, secrets, offers, shares, key_name, qkd.key if qkd else None)
        if not hmac.compare_digest(keys.responder, confirmation):
            raise DecryptError("the responder has another key")
        await self._send(keys.initiator)
        return self._result(keys, verified, qkd)

    async def respond(self) -> Exchanged:
        offer, proof = await self._receive_offer()
        said = SHA256.digest(self.agreed + offer)
        verified = self.authentication.check("initiator", said, proof, self.peer)
        key_name, offers = self._read_offer(offer)
        results = [one.respond(share) for one, share in zip(self.exchanges, offers, strict=True)]
        # What can fail without the key source has not failed: now a key may be used up.
        qkd = None
        if self.key_source is not None:
            name = name_of(key_name)
            if name is None or not self.key_source.knows(name):
                raise IllegalParameter("the QKD key that the peer names is of other KMEs")
            qkd = await self.key_source.get(name)
        shares = [share for share, _ in results]
        answer = _HEADER + b"answer" + os.urandom(_NONCE) + b"".join(shares)
        heard = SHA256.digest(said + SHA256.digest(proof) + answer)
        ours = self.authentication.prove("responder", heard)
        heard = SHA256.digest(heard + ours)
        secrets = [secret for _, secret in results]
        keys = self._keys(heard, secrets, offers, shares, key_name, qkd.key if qkd else None)
        await self._send(answer, ours, keys.responder)
        if not hmac.compare_digest(keys.initiator, await self._receive(_CONFIRMATION)):
            raise DecryptError("the initiator has another key")
        return self._result(keys, verified, qkd)

    def _result(
        self, keys: "_Keys", verified: VerifiedPeer | None, qkd: QkdKey | None
    ) -> Exchanged:
        return Exchanged(
            keys.key,
            verified,
            tuple(part.name for one in self.exchanges for part in one.parts),
            tuple(map(str, qkd.key_ids if qkd else ())),
        )

    def _keys(
        self,
        transcript: bytes,
        secrets: Sequence[Secret],
        offers: Sequence[bytes],
        answers: Sequence[bytes],
        key_name: bytes,
        qkd: Secret | None,
    ) -> "_Keys":
        legs = [
            Leg(name=one.name, secret=secret, offer=offer, answer=answer)
            for one, secret, offer, answer in zip(
                self.exchanges, secrets, offers, answers, strict=True
            )
        ]
        if qkd is not None:
            legs.append(Leg(name="QKD", secret=qkd, offer=key_name))
        combined = combine(
            legs,
            label=self.label,
            context=self.agreed + transcript,
            length=2 * _CONFIRMATION + self.length,
            psk=self.authentication.psk,
            method=self.method,
        ).reveal()
        return _Keys(
            combined[:_CONFIRMATION],
            combined[_CONFIRMATION : 2 * _CONFIRMATION],
            Secret(combined[2 * _CONFIRMATION :]),
        )

    def _lengths(self, which: Literal["offer", "answer"]) -> list[int]:
        return [
            one.offer_length if which == "offer" else one.answer_length for one in self.exchanges
        ]

    def _split(self, shares: bytes, which: Literal["offer", "answer"]) -> list[bytes]:
        pieces = []
        for length in self._lengths(which):
            pieces.append(shares[:length])
            shares = shares[length:]
        return pieces

    def _read_offer(self, offer: bytes) -> tuple[bytes, list[bytes]]:
        reader = Reader(offer, len(_HEADER + b"offer") + _NONCE)
        key_name = reader.opaque(2)
        if bool(key_name) != (self.key_source is not None):
            raise IllegalParameter("one side wants a QKD key and the other does not")
        return key_name, self._split(reader.rest(), "offer")

    async def _receive_offer(self) -> tuple[bytes, bytes]:
        most = sum(self._lengths("offer")) + _PROOF_ROOM
        reader = Reader(await self._receive(most))
        offer, proof = reader.opaque(4), reader.opaque(4)
        reader.finish()
        start = len(_HEADER + b"offer") + _NONCE
        if not offer.startswith(_HEADER + b"offer") or len(offer) < start + 2:
            raise DecodeError("that is no offer of this protocol")
        name_length = int.from_bytes(offer[start : start + 2], "big")
        if len(offer) != start + 2 + name_length + sum(self._lengths("offer")):
            raise IllegalParameter("the offered shares do not have the lengths of our exchanges")
        return offer, proof

    async def _receive_answer(self) -> tuple[bytes, bytes, bytes]:
        most = sum(self._lengths("answer")) + _PROOF_ROOM
        reader = Reader(await self._receive(most))
        answer, proof, confirmation = reader.opaque(4), reader.opaque(4), reader.opaque(4)
        reader.finish()
        if not answer.startswith(_HEADER + b"answer"):
            raise DecodeError("that is no answer of this protocol")
        if len(answer) != len(_HEADER + b"answer") + _NONCE + sum(self._lengths("answer")):
            raise IllegalParameter("the answered shares do not have the lengths of our exchanges")
        return answer, proof, confirmation

    async def _send(self, *parts: bytes) -> None:
        """One part is a message as it is; several each have their length before them."""
        body = parts[0]
        if len(parts) > 1:
            body = b"".join(u32(len(part)) + part for part in parts)
        try:
            await self.stream.send_all(u32(len(body)) + body)
        except trio.BrokenResourceError as error:
            raise TruncationError(f"the peer is gone: {error}") from None

    async def _receive(self, most: int) -> bytes:
        length = int.from_bytes(await self._exactly(4), "big")
        if length > most:
            raise IllegalParameter(f"a message of {length} bytes, where {most} may be")
        return await self._exactly(length)

    async def _exactly(self, count: int) -> bytes:
        """Not a byte more than is ours: what follows belongs to the caller."""
        data = bytearray()
        while len(data) < count:
            try:
                piece = await self.stream.receive_some(count - len(data))
            except trio.BrokenResourceError as error:
                raise TruncationError(f"the peer is gone: {error}") from None
            if not piece:
                raise TruncationError("the stream ended within the exchange")
            data += piece
        return bytes(data)


@dataclass(frozen=True)
class _Keys:
    """What the combiner gave: two confirmations and the key."""

    initiator: bytes
    responder: bytes
    key: Secret

    def __repr__(self) -> str:
        return "_Keys()"
