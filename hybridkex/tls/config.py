"""The configurations of clients and servers: frozen, and checked when they are made.

There is no global registry and no process-wide default: groups, suites and schemes are objects in
order of preference. A configuration is created once and used for many connections.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, Final, Protocol, Self, TypeVar, runtime_checkable

from hybridkex.auth import (
    Identity,
    RawIdentity,
    Refreshable,
    TrustStore,
)
from hybridkex.constants import MAX_PLAINTEXT
from hybridkex.crypto.kex import CLASSICAL_GROUPS, HYBRID_GROUPS, Group
from hybridkex.crypto.psk import ExternalPsk
from hybridkex.crypto.signatures import ALL_SCHEMES, SignatureScheme
from hybridkex.crypto.suites import ALL_SUITES, CipherSuite
from hybridkex.errors import ConfigError
from hybridkex.fields import (
    check_fields,
    check_members,
    check_optional,
    checked_clock,
    described,
)
from hybridkex.tls.certificate_types import AnyClientVerifier, AnyServerVerifier
from hybridkex.tls.fresh_keys import FreshKeys, UpdateKeySource
from hybridkex.tls.one_time_pad import OneTimePad, PadSource
from hybridkex.tls.policy import Authentication, Policy, Requirement
from hybridkex.tls.protection import Padding
from hybridkex.tls.session import FlushableTicketStore, Session, TicketStore
from hybridkex.tls.tickets import CookieProtector, TicketIssuer
from hybridkex.wire.codec import vector24
from hybridkex.wire.extensions import KNOWN_TYPES, ApplicationExtension

KeyLog = Callable[[str], None]
"""Called with one line of the NSS key log format, without the newline."""


@runtime_checkable
class PskSource(Protocol):
    """A source of external PSKs, which is asked when a handshake needs one.

    The engine never calls it: it emits ``PskWanted``, and the shell asks the source.
    """

    async def offer(self) -> ExternalPsk:
        """A PSK for a client to offer; it is used in one handshake only.

        Raises :class:`~hybridkex.errors.KeySourceError`.
        """

    async def look_up(self, identities: tuple[bytes, ...]) -> ExternalPsk:
        """The PSK behind one of the identities that a client offered, as they were on the wire.

        Raises :class:`~hybridkex.errors.KeySourceError`.
        """

    def authorize(self, session: Session, missing: str | None) -> Session:
        """Decide about a proposed session; return it with the details of the PSK that the source
        knows.

        Called for every handshake, resumptions included, before it completes.

        Args:
            session: proposed by the engine; ``psk_origin`` is the origin of the PSK that was
                provided.
            missing: why it has no PSK, if the request for one failed.

        Raises :class:`~hybridkex.errors.PolicyRefused` when this peer must use a PSK and did not.
        """


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits on the memory and computation that a peer can cause; ``docs/limits.md`` has the
    reasons.

    Args:
        certificate_message: the maximum length of a Certificate message in bytes; the default holds
            eight ML-DSA-87 certificates.
        key_updates: consecutive key updates without data between them, in addition to one per
            second; each costs a step of the key schedule or a key exchange.
        empty_records: consecutive records without content.
        tickets: session tickets that a client accepts on one connection.
        psk_identities: the number of PSK identities of a ClientHello that a server examines; it
            ignores the rest.

    Raises:
        ConfigError: a limit is lower than ordinary peers need.
    """

    certificate_message: int = 1 << 17
    key_updates: int = 32
    empty_records: int = 32
    tickets: int = 32
    psk_identities: int = 16

    def __post_init__(self) -> None:
        check_fields(self)
        if self.certificate_message < 1 << 10:
            raise ConfigError("certificate_message must be at least 1 KiB, or no certificate fits")
        if min(self.key_updates, self.empty_records, self.tickets, self.psk_identities) < 1:
            raise ConfigError("every limit of Limits must be 1 or more")


MAX_OFFER: Final = 60 << 10
"""Bytes of key shares, PSK identities, ALPN names and the application's extensions in one
ClientHello: all its extensions have 65,535 bytes together (RFC 9846 section 4.2.2), and the others
need some."""


_PSK_OVERHEAD: Final = 8 + 2 + 4 + 1 + 48
"""Bytes of an offered PSK beside its identity: the fields of ImportedIdentity, the length, the age
and a binder of SHA-384."""


@dataclass(frozen=True, kw_only=True)
class PadToMultiple:
    """Pads the content of every record to a multiple of ``size`` bytes (RFC 9846 section 5.4).

    Args:
        size: 1 to 16,384 bytes.

    Raises:
        ConfigError: ``size`` is no integer in this range.
    """

    size: int

    def __post_init__(self) -> None:
        check_fields(self)
        if not 1 <= self.size <= MAX_PLAINTEXT:
            raise ConfigError(f"size of PadToMultiple must be 1 to 16384, not {self.size}")

    def __call__(self, length: int, limit: int, /) -> int:
        """The number of zeros to append; never more than the record limit allows."""
        return min(-length % self.size, limit - length)


_ALLOWED_GROUPS: Final[Mapping[Requirement, tuple[Group, ...]]] = {
    Requirement.REQUIRE: HYBRID_GROUPS,
    Requirement.PREFER: HYBRID_GROUPS + CLASSICAL_GROUPS,
    Requirement.OFF: CLASSICAL_GROUPS,
}
R = TypeVar("R")

_FOR_SHELLS: Final[Mapping[str, type]] = {
    "verifier": Refreshable,
    "client_verifier": Refreshable,
    "ticket_store": FlushableTicketStore,
}
"""The protocols that a shell uses where a field's object has them; the engine does not."""
_EXAMPLES: Final[Mapping[str, str]] = {
    "groups": "groups=(X25519MLKEM768,)",
    "suites": "suites=(TLS_AES_256_GCM_SHA384,)",
    "alpn": 'alpn=("h2", "http/1.1")',
    "psks": 'psks=(ExternalPsk(identity=b"site", key=Secret(key)),)',
    "psk_source": "psk_source=QkdPskSource(key_source)",
    "on_epoch": "on_epoch=print",
    "record_size_limit": "record_size_limit=4096",
    "padding": "padding=PadToMultiple(size=256)",
    "key_log": "key_log=print",
    "clock": "clock=time.time",
    "entropy": "entropy=os.urandom",
    "verifier": 'verifier=TrustStore.from_file("ca.pem")',
    "identity": 'identity=Identity.from_files("cert.pem", "key.pem")',
    "key_shares": "key_shares=2",
    "ticket_store": "ticket_store=MemoryTicketStore()",
    "identities": 'identities=(Identity.from_files("cert.pem", "key.pem"),)',
    "client_verifier": 'client_verifier=TrustStore.from_file("ca.pem")',
    "tickets_per_connection": "tickets_per_connection=2",
}


@dataclass(frozen=True, kw_only=True)
class _Config:
    """The settings that clients and servers share.

    Args:
        groups: key exchanges in order of preference; ``None`` takes all that the policy allows,
            hybrids first.
        suites: cipher suites in order of preference.
        signature_schemes: for CertificateVerify, in order of preference.
        alpn: application protocols in order of preference (RFC 7301).
        extensions: TLS extensions that the application handles; the engine only sends and receives
            them.
        psks: external pre-shared keys; a server selects the first of them that the client offers
            too.
        psk_source: a source of further PSKs, asked once in each handshake.
        policy: the requirements that each connection must meet.
        fresh_keys: when a session renews its keys (experimental); with ``None``, only the peer's
            schedule and the limits of the cipher suite decide.
        one_time_pad: how much pad is kept ready to protect application data by a one-time pad of
            QKD keys (experimental); ``None`` requests none unless the policy does.
        on_epoch: called with the session after each key update, for example to count it; it must
            not block.
        record_size_limit: the maximum number of content bytes in a record from the peer (RFC 8449,
            64 to 16,384); ``None`` sends no limit, which means 16,384.
        padding: hides the length of the data that is sent.
        key_log: called with the secrets of each session, for a debugger. They decrypt the session.
        limits: limits on the memory and computation that a peer can cause.
        clock: seconds since the epoch, for certificates and the age of sessions.
        entropy: returns the given number of random bytes. Key pairs are an exception: the
            cryptographic library uses its own generator for them.
    """

    groups: tuple[Group, ...] | None = None
    suites: tuple[CipherSuite, ...] = ALL_SUITES
    signature_schemes: tuple[SignatureScheme, ...] = ALL_SCHEMES
    alpn: tuple[str, ...] = ()
    extensions: tuple[ApplicationExtension, ...] = ()
    psks: tuple[ExternalPsk, ...] = ()
    psk_source: PskSource | None = None
    policy: Policy = field(default_factory=Policy)
    fresh_keys: FreshKeys | None = None
    one_time_pad: OneTimePad | None = None
    on_epoch: Callable[[Session], None] | None = field(default=None, repr=False)
    record_size_limit: int | None = None
    padding: Padding | None = None
    key_log: KeyLog | None = field(default=None, repr=False)
    limits: Limits = Limits()
    clock: Callable[[], float] = field(default=time.time, repr=False)
    entropy: Callable[[int], bytes] = field(default=os.urandom, repr=False)
    _made_once: dict[object, Any] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    _extension_members: ClassVar[tuple[str, ...]] = ("type",)

    def __post_init__(self) -> None:
        check_fields(self, _EXAMPLES)
        for name, kind in _FOR_SHELLS.items():
            check_optional(name, getattr(self, name, None), kind)
        object.__setattr__(self, "clock", checked_clock(self.clock))
        self._check_groups()
        _check_list("cipher suite", self.suites)
        _check_list("signature scheme", self.signature_schemes)
        for name in self.alpn:
            if not 1 <= len(name.encode("utf-8")) <= 255:
                raise ConfigError(f"the ALPN protocol {name!r} must have 1 to 255 bytes")
        if len(set(self.alpn)) != len(self.alpn):
            raise ConfigError("an ALPN protocol is listed twice")
        self._check_extensions()
        identities = [(psk.identity, psk.context) for psk in self.psks]
        if len(set(identities)) != len(identities):
            raise ConfigError("two PSKs have the same identity")
        if self.policy.psk is Requirement.REQUIRE and not self.has_psk:
            raise ConfigError(
                "the policy requires a PSK, and none is configured: give psks=(ExternalPsk(...),) "
                "or psk_source=QkdPskSource(source)"
            )
        for psk in self.psks:
            if not psk.imported and all(suite.hash != psk.hash for suite in self.suites):
                raise ConfigError(
                    f"no configured cipher suite has the hash of a PSK, {psk.hash.name}"
                )
        self._check_fresh_keys()
        self._check_one_time_pad()
        limit = self.record_size_limit
        if limit is not None and not 64 <= limit <= MAX_PLAINTEXT:
            raise ConfigError(f"record_size_limit must be 64 to {MAX_PLAINTEXT}, not {limit}")

    def _check_extensions(self) -> None:
        for one in self.extensions:
            codec = () if len(vars(one)) == len(one.layout) else ("read", "body")
            needed = (*self._extension_members, *codec)
            check_members("extensions", one, ApplicationExtension, needed)
            if type(one.type) is bool or one.type not in range(1 << 16):
                raise ConfigError(f"{type(one).__name__}: the type of an extension is 0 to 65535")
            if one.messages != ApplicationExtension.messages:
                raise ConfigError(
                    f"{type(one).__name__}: an extension of the application is sent in ClientHello "
                    "and EncryptedExtensions only; leave messages as they are"
                )
        types = [one.type for one in self.extensions]
        if len(set(types)) != len(types):
            raise ConfigError("two extensions have the same type")
        if taken := KNOWN_TYPES.intersection(types):
            raise ConfigError(
                f"extension type {min(taken)} is implemented by the engine; choose another type"
            )

    def _check_groups(self) -> None:
        wanted = self.policy.post_quantum
        _check_list("group", self.group_list)
        for group in self.groups or ():
            if wanted is Requirement.REQUIRE and not group.post_quantum:
                raise ConfigError(
                    f"{group} has no post-quantum part and the policy requires one; "
                    "Policy(post_quantum=Requirement.PREFER) allows it"
                )
            if wanted is Requirement.OFF and group.post_quantum:
                raise ConfigError(f"{group} has a post-quantum part, and the policy excludes these")

    @cached_property
    def group_list(self) -> tuple[Group, ...]:
        """The groups in order of preference: those configured, or all that the policy allows."""
        return _ALLOWED_GROUPS[self.policy.post_quantum] if self.groups is None else self.groups

    @cached_property
    def authentication(self) -> Authentication:
        """The server's required authentication, from the policy or its default."""
        if self.policy.authentication is not None:
            return self.policy.authentication
        if not self.has_psk:
            return Authentication.CERTIFICATE
        return Authentication.BOTH if self._has_certificates else Authentication.PSK

    @property
    def _has_certificates(self) -> bool:
        """Whether the server can authenticate with a certificate."""
        raise NotImplementedError

    def _check_authentication(self, proof: str) -> None:
        """``proof``: what certificate authentication needs here, for the message."""
        authentication = self.authentication
        if authentication is not Authentication.CERTIFICATE and not self.has_psk:
            raise ConfigError(f"authentication by {authentication.value} needs a PSK")
        if authentication is not Authentication.PSK and not self._has_certificates:
            raise ConfigError(f"authentication by {authentication.value} needs {proof}")

    def _check_not_resumed(self, tickets: str) -> None:
        if self.wants_fresh_keys:
            raise ConfigError(
                "a session that renews its keys is not resumed, since a stolen ticket would undo "
                f"what the new keys give: leave out {tickets} or fresh_keys"
            )

    @cached_property
    def policy_in_force(self) -> Policy:
        """The policy with its open fields filled in from the rest of the configuration."""
        policy = self.policy
        psk = (policy.psk or Requirement.REQUIRE) if self.has_psk else Requirement.OFF
        fresh_keys, fresh_qkd, pad = policy.fresh_keys, policy.fresh_qkd, policy.one_time_pad
        if pad is None:
            pad = Requirement.REQUIRE if self.one_time_pad is not None else Requirement.OFF
        if fresh_keys is None:
            fresh_keys = Requirement.REQUIRE if self.fresh_keys is not None else pad
        if fresh_qkd is None or fresh_keys is Requirement.OFF:
            follows = isinstance(self.psk_source, UpdateKeySource) and self.has_psk
            used = follows and fresh_keys is not Requirement.OFF
            fresh_qkd = psk if used else Requirement.OFF
        return replace(
            policy,
            psk=psk,
            authentication=self.authentication,
            fresh_keys=fresh_keys,
            fresh_qkd=fresh_qkd,
            one_time_pad=pad,
        )

    @property
    def wants_fresh_keys(self) -> bool:
        """Whether Extended Key Update is offered or accepted; it excludes session tickets."""
        wanted = self.policy.fresh_keys
        if wanted is None:
            return self.fresh_keys is not None or self.wants_one_time_pad
        return wanted is not Requirement.OFF

    @property
    def wants_one_time_pad(self) -> bool:
        """Whether a one-time pad is offered or accepted."""
        wanted = self.policy.one_time_pad
        if wanted is None:
            return self.one_time_pad is not None
        return wanted is not Requirement.OFF

    def _check_one_time_pad(self) -> None:
        if not self.wants_one_time_pad:
            if self.one_time_pad is not None:
                raise ConfigError(
                    "one_time_pad is given, but the policy turns it off: remove one of the two"
                )
            return
        if not self.wants_fresh_keys:
            raise ConfigError("one_time_pad requires fresh_keys, which the policy turns off")
        _check_source("a one-time pad needs", self.psk_source, PadSource)

    def _check_fresh_keys(self) -> None:
        if self.fresh_keys is not None and not self.wants_fresh_keys:
            raise ConfigError(
                "fresh_keys is given, but the policy turns fresh keys off: remove one of the two"
            )
        qkd = self.policy.fresh_qkd
        if qkd in (None, Requirement.OFF):
            return
        if not self.wants_fresh_keys:
            raise ConfigError(
                "fresh_qkd applies to key updates: give fresh_keys=FreshKeys(...) too"
            )
        _check_source("QKD keys in key updates need", self.psk_source, UpdateKeySource)

    def binding(self, identity: Identity | RawIdentity | None) -> bytes:
        """The binding of tickets: SHA-256 over the policy in force, the PSKs and our identity.

        Args:
            identity: ours in this handshake, if we have one.
        """
        leaf = identity.chain[0] if identity is not None else b""
        if leaf not in self._bindings:
            own = hashlib.sha256(leaf).digest() if leaf else b""
            self._bindings[leaf] = hashlib.sha256(self._bound + own).digest()
        return self._bindings[leaf]

    @cached_property
    def _bindings(self) -> dict[bytes, bytes]:
        """The results of :meth:`binding` by our certificate; a configuration has few."""
        return {}

    @cached_property
    def _bound(self) -> bytes:
        return hashlib.sha256(b"".join(map(vector24, self._bound_to()))).digest()

    def _bound_to(self) -> list[bytes]:
        parts = [json.dumps(self.policy_in_force.as_json(), sort_keys=True).encode()]
        for psk in self.psks:
            context = b"" if psk.context is None else b"\1" + psk.context
            parts += [psk.identity, context, psk.hash.name.encode(), psk.key.reveal()]
        return parts

    def once(self, make: Callable[[Self], R]) -> R:
        """The result of ``make`` for this frozen configuration; it is called only once."""
        if make not in self._made_once:
            self._made_once[make] = make(self)
        made: R = self._made_once[make]
        return made

    @cached_property
    def has_psk(self) -> bool:
        """Whether an external PSK is or may be available and the policy allows it."""
        configured = bool(self.psks) or self.psk_source is not None
        return configured and self.policy.psk is not Requirement.OFF

    @property
    def inner_limit(self) -> int:
        """Bytes of content and type that we accept in a protected record."""
        return (self.record_size_limit or MAX_PLAINTEXT) + 1


def _check_source(need: str, source: PskSource | None, kind: type) -> None:
    if source is None:
        raise ConfigError(f"{need} a source of QKD keys: psk_source=QkdPskSource(source)")
    check_members(f"{need} QKD keys: psk_source", source, kind)


def _check_list(what: str, items: Iterable[Group | CipherSuite | SignatureScheme]) -> None:
    codes = [item.code for item in items]
    if not codes:
        raise ConfigError(f"at least one {what} is required")
    if len(set(codes)) != len(codes):
        raise ConfigError(f"a {what} is listed twice")


@dataclass(frozen=True, kw_only=True)
class ClientConfig(_Config):
    """The configuration of a client.

    Args:
        verifier: verifies the server's certificate or raw public key; the client offers the kinds
            that it supports (RFC 7250). ``None``: the system's trust store or, if PSKs are
            configured, no certificate at all.
        identity: our certificate or raw public key, with its private key, for servers that request
            one.
        key_shares: the number of groups, from the first on, for which the first flight has a key
            share, or these groups themselves.
        ticket_store: stores tickets; ``None`` offers no resumption.
        compatibility_mode: look like TLS 1.2 to middleboxes (RFC 9846 appendix E.4).

    Raises:
        ConfigError: a field has the wrong type, or fields contradict each other.
    """

    verifier: AnyServerVerifier | None = None
    identity: Identity | RawIdentity | None = None
    key_shares: int | tuple[Group, ...] = 1
    ticket_store: TicketStore | None = None
    compatibility_mode: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        shares = self.key_shares
        if isinstance(shares, int) and not 0 <= shares <= len(self.group_list):
            raise ConfigError(f"key_shares must be 0 to {len(self.group_list)} with these groups")
        if [group for group in self.group_list if group in self.shared_groups] != [
            *self.shared_groups
        ]:
            raise ConfigError("key_shares must be a selection of the groups, in the same order")
        self._check_room()
        if isinstance(self.identity, Identity):
            self.identity.require_role(server=False)
        if self.verifier is None and not self.has_psk:
            object.__setattr__(self, "verifier", TrustStore.system())
        if self.ticket_store is not None:
            self._check_not_resumed("ticket_store")
        self._check_authentication("a verifier")
        if self.authentication is Authentication.PSK and self.verifier is not None:
            raise ConfigError(
                "authentication by psk never asks the verifier: leave out the verifier, or have "
                "the server show a certificate with Policy(authentication=Authentication.BOTH)"
            )

    def _check_room(self) -> None:
        if self.ticket_room < 0:
            raise ConfigError(
                "key shares, PSK identities, ALPN names and extensions take "
                f"{MAX_OFFER - self.ticket_room} bytes; a ClientHello has room for {MAX_OFFER}; "
                "lower key_shares, choose smaller groups, or list fewer PSKs"
            )

    @cached_property
    def ticket_room(self) -> int:
        """The number of bytes that every ClientHello has free for a session ticket."""
        # The first ClientHello has these shares; after a retry, the second has one other share.
        shares = sum(group.exchange.offer_length for group in self.shared_groups)
        largest = max(group.exchange.offer_length for group in self.group_list)
        hashes = {suite.hash for suite in self.suites}
        psks = sum(
            (len(psk.identity) + len(psk.context or b"") + _PSK_OVERHEAD)
            * (len(hashes) if psk.imported else 1)
            for psk in self.psks
        )
        names = sum(1 + len(name.encode("utf-8")) for name in self.alpn)
        for one in self.extensions:
            if not isinstance(body := one.body(), bytes):
                raise ConfigError(
                    f"{type(one).__name__}: body returns {described(body)}, not bytes"
                )
            names += 4 + len(body)
        return MAX_OFFER - max(shares, largest) - psks - names

    @cached_property
    def shared_groups(self) -> tuple[Group, ...]:
        """The groups for which the first flight has a key share."""
        shares = self.key_shares
        return self.group_list[:shares] if isinstance(shares, int) else shares

    @property
    def _has_certificates(self) -> bool:
        return self.verifier is not None


class _Unsaid(TicketIssuer):
    """The default of ``tickets``: the policy decides. This object never issues a ticket."""

    def __init__(self) -> None:
        """Make no ticket key."""


@dataclass(frozen=True, kw_only=True)
class ServerConfig(_Config):
    """The configuration of a server.

    Args:
        identities: our certificates or raw public keys, with their private keys. One is chosen by
            the client's server name, then by the certificate types (RFC 7250) and signature schemes
            that the client supports; if no name matches, the first one that the client can verify.
        client_verifier: if given, the server requests a certificate or a raw public key from
            clients, and this verifier verifies it.
        require_client_certificate: refuse clients without one.
        tickets: issues session tickets; ``None`` allows no resumption. By default, tickets are
            issued unless the policy or a schedule requires fresh keys, which exclude them.
        tickets_per_connection: how many tickets a client gets, with our first application data.
        cookies: protects the cookie of HelloRetryRequest; servers that share its key can continue
            each other's handshakes.
        require_known_name: refuse a client whose server name matches no identity.

    Raises:
        ConfigError: a field has the wrong type, or fields contradict each other.
    """

    identities: tuple[Identity | RawIdentity, ...] = ()
    client_verifier: AnyClientVerifier | None = None
    require_client_certificate: bool = False
    tickets: TicketIssuer | None = field(default_factory=_Unsaid)
    tickets_per_connection: int = 2
    cookies: CookieProtector = field(default_factory=CookieProtector)
    require_known_name: bool = False
    _extension_members: ClassVar[tuple[str, ...]] = ("type", "answer")

    def __post_init__(self) -> None:
        super().__post_init__()
        for identity in self.identities:
            if isinstance(identity, Identity):
                identity.require_role(server=True)
        if isinstance(self.tickets, _Unsaid):
            tickets = None if self.wants_fresh_keys else TicketIssuer()
            object.__setattr__(self, "tickets", tickets)
        elif self.tickets is not None:
            self._check_not_resumed("tickets")
        if not self.identities and not self.has_psk:
            raise ConfigError("a server needs an identity (certificate and key) or a PSK")
        authentication = self.authentication
        self._check_authentication("an identity")
        if self.require_client_certificate and self.client_verifier is None:
            raise ConfigError("require_client_certificate needs a client_verifier")
        if authentication is Authentication.PSK and self.client_verifier is not None:
            # RFC 9846 section 4.4.2: no CertificateRequest; RFC 9973 needs our certificate.
            raise ConfigError(
                "a server without a certificate cannot request one from clients: in addition to "
                "the PSK, give identities (certificate and key), or leave out client_verifier"
            )
        if authentication is Authentication.EITHER and self.require_client_certificate:
            raise ConfigError(
                "with Authentication.EITHER a PSK is enough, and such a client is not asked for a "
                "certificate: require_client_certificate needs Authentication.BOTH or CERTIFICATE"
            )
        if self.require_known_name and not self.identities:
            raise ConfigError("require_known_name needs identities, which have the known names")
        if not 0 <= self.tickets_per_connection <= 16:
            raise ConfigError("tickets_per_connection must be 0 to 16")

    def _bound_to(self) -> list[bytes]:
        return [bytes((self.require_client_certificate,)), *super()._bound_to()]

    @property
    def _has_certificates(self) -> bool:
        return bool(self.identities)


def check_config(config: object, *kinds: type["ClientConfig | ServerConfig"]) -> None:
    """Check that a connection has a configuration for its role.

    Raises:
        ConfigError: it is something else, for example an ``ssl.SSLContext``.
    """
    if not isinstance(config, kinds):
        raise ConfigError(
            f"a connection takes a {' or a '.join(kind.__name__ for kind in kinds)}, not "
            f"{described(config)}"
        )
