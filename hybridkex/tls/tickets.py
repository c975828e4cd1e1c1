"""Session tickets and HelloRetryRequest cookies: server state that the clients store.

Both are sealed with AES-256-GCM under keys that only the server has. A ticket holds the whole state
of a session (RFC 9846 section 4.7.1); its keys are rotated, since an attacker who obtains one can
impersonate the server in resumptions under it (but cannot decrypt them: every resumption has a new
key exchange). A cookie holds what the server needs from the first ClientHello (section 4.3.2).
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from hybridkex.constants import TLS13, CertificateType
from hybridkex.errors import ConfigError, DecodeError
from hybridkex.fields import check_fields, checked, checked_clock
from hybridkex.secret import Secret
from hybridkex.tls.session import MAX_TICKET_LIFETIME, AuthenticatedBy
from hybridkex.values import value
from hybridkex.wire.codec import Reader, ascii_text, u8, u16, u64, vector8, vector16, vector24

MAX_TICKET: Final = 1 << 15
"""The maximum length of a ticket in bytes: half of the room for extensions in a ClientHello, which
leaves the other half for key shares and names."""

Entropy = Callable[[int], bytes]

_NONCE_LENGTH: Final = 12
_NAME_LENGTH: Final = 8
_SEAL_OVERHEAD: Final = _NAME_LENGTH + _NONCE_LENGTH + 16


@value(kw_only=True)
class TicketState:
    """A session as stored in a ticket."""

    suite: int
    psk: Secret
    issued_at: int
    """Seconds since the epoch."""
    server_name: str | None
    authenticated_by: AuthenticatedBy
    psk_identity: bytes | None
    psk_context: bytes | None
    began_at: int
    """When the full handshake was made, in seconds since the epoch."""
    binding: bytes
    """The binding of the session: the policy, the PSKs and the identity that made it."""
    client_chain: tuple[bytes, ...]
    """The client's certificates, verified in the full handshake; leaf first."""
    client_certificate_type: int = CertificateType.X509
    """The type of :attr:`client_chain`: certificates, or one raw public key."""

    def encode(self) -> bytes:
        return (
            u16(TLS13)
            + u16(self.suite)
            + vector8(self.psk.reveal())
            + u64(self.issued_at)
            + vector16(ascii_text(self.server_name or ""))
            + vector8(self.authenticated_by.value.encode("ascii"))
            + vector16(self.psk_identity or b"")
            + u8(self.psk_context is not None)
            + vector16(self.psk_context or b"")
            + u64(self.began_at)
            + vector8(self.binding)
            + u8(self.client_certificate_type)
            + vector24(b"".join(map(vector24, self.client_chain)))
        )

    @classmethod
    def decode(cls, data: bytes) -> "TicketState":
        reader = Reader(data)
        if reader.u16() != TLS13:
            raise DecodeError("a ticket of another version")
        suite = reader.u16()
        psk = Secret(reader.opaque(1))
        issued_at = reader.u64()
        server_name = reader.opaque(2).decode("ascii") or None
        authenticated_by = AuthenticatedBy(reader.opaque(1).decode("ascii"))
        psk_identity = reader.opaque(2) or None
        imported, context = reader.u8(), reader.opaque(2)
        began_at = reader.u64()
        binding = reader.opaque(1)
        certificate_type = reader.u8()
        certificates = reader.vector(3)
        chain = []
        while certificates.remaining:
            chain.append(certificates.opaque(3))
        reader.finish()
        return cls(
            suite=suite,
            psk=psk,
            issued_at=issued_at,
            server_name=server_name,
            authenticated_by=authenticated_by,
            psk_identity=psk_identity,
            psk_context=context if imported else None,
            began_at=began_at,
            binding=binding,
            client_chain=tuple(chain),
            client_certificate_type=certificate_type,
        )


class _SealingKey:
    """One AES-256-GCM key with a public name that identifies it to the server."""

    __slots__ = ("_aead", "_entropy", "made_at", "name")

    def __init__(self, key: bytes, name: bytes, made_at: float, entropy: Entropy) -> None:
        self._aead = AESGCM(key)
        self._entropy = entropy
        self.name = name
        self.made_at = made_at

    @classmethod
    def generate(cls, made_at: float, entropy: Entropy) -> "_SealingKey":
        return cls(entropy(32), entropy(_NAME_LENGTH), made_at, entropy)

    def seal(self, plaintext: bytes) -> bytes:
        nonce = self._entropy(_NONCE_LENGTH)
        return self.name + nonce + self._aead.encrypt(nonce, plaintext, self.name)

    def open(self, sealed: bytes) -> bytes | None:
        start = _NAME_LENGTH + _NONCE_LENGTH
        nonce = sealed[_NAME_LENGTH:start]
        if len(nonce) != _NONCE_LENGTH or sealed[:_NAME_LENGTH] != self.name:
            return None
        try:
            return self._aead.decrypt(nonce, sealed[start:], self.name)
        except InvalidTag:
            return None


@dataclass(kw_only=True)
class TicketIssuer:
    """Encrypts and decrypts session tickets under keys that it rotates itself.

    Args:
        lifetime: validity of a ticket in seconds, at most seven days.
        rotation: seconds after which a new key encrypts tickets; the previous key still decrypts
            for one lifetime.
        clock: seconds since the epoch.
        entropy: returns the given number of random bytes, for keys and nonces.
        first_key: the initial key of 32 bytes and its public name of 8 bytes, for servers that must
            accept each other's tickets; random by default.

    Raises:
        ConfigError: an argument has the wrong type or is out of range.
    """

    lifetime: int = 12 * 3600
    rotation: int = 4 * 3600
    clock: Callable[[], float] = field(default=time.time, repr=False)
    entropy: Entropy = field(default=os.urandom, repr=False)
    first_key: tuple[Secret, bytes] | None = field(default=None, repr=False)
    _keys: list[_SealingKey] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        check_fields(
            self, {"clock": "clock=time.time", "first_key": "first_key=(Secret(key), name)"}
        )
        self.clock = checked_clock(self.clock)
        if not 1 <= self.lifetime <= MAX_TICKET_LIFETIME:
            raise ConfigError(
                f"the lifetime of a ticket must be 1 to {MAX_TICKET_LIFETIME} seconds"
            )
        if self.rotation < 1:
            raise ConfigError("the rotation of ticket keys must be 1 second or more")
        if self.first_key is not None:
            key, name = self.first_key
            if len(key) != 32 or len(name) != _NAME_LENGTH:
                raise ConfigError(f"a ticket key must have 32 bytes, and its name {_NAME_LENGTH}")
            self._keys.append(_SealingKey(key.reveal(), name, self.clock(), self.entropy))

    def seal(self, state: TicketState) -> bytes | None:
        """The ticket for this state; ``None`` if it would be longer than :data:`MAX_TICKET`.

        A ticket holds the client's certificates and its PSK identity, which a client chooses.
        """
        plaintext = state.encode()
        if len(plaintext) + _SEAL_OVERHEAD > MAX_TICKET:
            return None
        return self._current().seal(plaintext)

    def open(self, ticket: bytes) -> TicketState | None:
        """The state, or ``None`` for a ticket that is forged, expired, or of another server."""
        name = ticket[:_NAME_LENGTH]
        for key in self._fresh():
            if key.name == name:
                plaintext = key.open(ticket)
                if plaintext is None:
                    return None
                state = TicketState.decode(plaintext)
                return state if 0 <= self.clock() - state.issued_at < self.lifetime else None
        return None

    def _current(self) -> _SealingKey:
        now, keys = self.clock(), self._fresh()
        if not keys or now - keys[0].made_at >= self.rotation:
            keys.insert(0, _SealingKey.generate(now, self.entropy))
        self._keys = keys
        return keys[0]

    def _fresh(self) -> list[_SealingKey]:
        """The keys that still decrypt tickets. A new list: other threads may use the present
        one."""
        oldest = self.clock() - self.rotation - self.lifetime
        return [key for key in self._keys if key.made_at > oldest]


@value(kw_only=True)
class CookieState:
    """The state against which the second ClientHello is checked."""

    suite: int
    group: int
    hello_digest: bytes
    """The suite's hash of ClientHello1, with which the transcript continues."""
    invariants: bytes
    """SHA-256 over the parts that must be equal in both ClientHellos (section 4.2.2)."""
    psk: bytes
    """SHA-256 of the first PSK identity that goes with the suite; empty where there was none."""
    session_id: bytes

    def encode(self) -> bytes:
        return (
            u16(self.suite)
            + u16(self.group)
            + vector8(self.hello_digest)
            + vector8(self.invariants)
            + vector8(self.psk)
            + vector8(self.session_id)
        )

    @classmethod
    def decode(cls, data: bytes) -> "CookieState":
        reader = Reader(data)
        state = cls(
            suite=reader.u16(),
            group=reader.u16(),
            hello_digest=reader.opaque(1),
            invariants=reader.opaque(1),
            psk=reader.opaque(1),
            session_id=reader.opaque(1),
        )
        reader.finish()
        return state


class CookieProtector:
    """Encrypts and decrypts HelloRetryRequest cookies.

    Args:
        key: 32 bytes that servers behind one address may share; a random one by default.
        lifetime: validity of a cookie in seconds.
        clock: seconds since the epoch.
        entropy: returns the given number of random bytes, for the key and nonces.

    Raises:
        ConfigError: an argument has the wrong type, or ``key`` another length.
    """

    @checked
    def __init__(
        self,
        key: Secret | None = None,
        *,
        lifetime: float = 30,
        clock: Callable[[], float] = time.time,
        entropy: Entropy = os.urandom,
    ) -> None:
        if lifetime < 0:
            raise ConfigError("the lifetime of a cookie must not be negative")
        if key is not None and len(key) != 32:
            raise ConfigError(f"a cookie key must have 32 bytes, not {len(key)}")
        raw = key.reveal() if key is not None else entropy(32)
        self._key = _SealingKey(raw, b"cookie 1", 0, entropy)
        self._lifetime = lifetime
        self._clock = checked_clock(clock)

    def seal(self, state: CookieState) -> bytes:
        """The cookie for this state."""
        return self._key.seal(u64(int(self._clock())) + state.encode())

    def open(self, cookie: bytes) -> CookieState | None:
        """The state, or ``None`` for a cookie that is forged, stale, or of another server."""
        plaintext = self._key.open(cookie)
        if plaintext is None:
            return None
        reader = Reader(plaintext)
        age = int(self._clock()) - reader.u64()
        return CookieState.decode(reader.rest()) if 0 <= age <= self._lifetime else None
