"""Extensions (RFC 9846 section 4.3): one class each, and one list of them.

A class declares its type, the messages that may carry it, whether it may come without an offer,
whether it may change after a HelloRetryRequest, and how its body is read and written. All rules are
applied from these declarations: :func:`parse` refuses duplicates, a known extension in the wrong
message, and anything after ``pre_shared_key``; :func:`answerable` returns the types that a server
may answer; :data:`MAY_CHANGE` has the types that a second ClientHello may change.

To add an extension that the engine acts on, write its class and add it to ``_CLASSES``. An
extension that only the application acts on is a :class:`ApplicationExtension`, which goes into the
configuration and changes nothing here.
"""

from collections.abc import Callable, Iterable, Iterator
from enum import IntEnum, auto
from functools import lru_cache
from typing import ClassVar, Final, Self, TypeVar

from hybridkex.constants import CertificateType, ExtensionType
from hybridkex.errors import DecodeError, EncodeError, IllegalParameter, UnrecognizedName
from hybridkex.fields import check_result
from hybridkex.reasons import Reason
from hybridkex.values import value
from hybridkex.wire.codec import Reader, ascii_text, entry, u8, vector8, vector16
from hybridkex.wire.layout import (
    BYTE_LIST,
    U8,
    U16,
    U32,
    Laid,
    Layout,
    codes,
    listed,
    opaque,
    pair,
)

MAX_HOST_NAME: Final = 255
"""The maximum length of a DNS name in bytes (RFC 1035 section 2.3.4)."""


class MessageKind(IntEnum):
    """The messages that carry extensions."""

    CLIENT_HELLO = auto()
    SERVER_HELLO = auto()
    HELLO_RETRY_REQUEST = auto()
    ENCRYPTED_EXTENSIONS = auto()
    CERTIFICATE = auto()
    CERTIFICATE_REQUEST = auto()
    NEW_SESSION_TICKET = auto()


CH, SH, HRR = MessageKind.CLIENT_HELLO, MessageKind.SERVER_HELLO, MessageKind.HELLO_RETRY_REQUEST
EE, CR = MessageKind.ENCRYPTED_EXTENSIONS, MessageKind.CERTIFICATE_REQUEST
NST = MessageKind.NEW_SESSION_TICKET


class Extension(Laid):
    """The base class of extensions."""

    type: ClassVar[int]
    messages: ClassVar[tuple[MessageKind, ...]]
    """The messages that may carry it: the table of section 4.3."""
    needs_offer: ClassVar[bool] = True
    """Whether a server may send it only if the ClientHello has the same type."""
    may_change: ClassVar[bool] = False
    """Whether it may differ in the second ClientHello, or be missing (section 4.2.2)."""


class ApplicationExtension(Extension):
    """An extension that the application adds through ``extensions`` of its configuration.

    The client's object is sent in the ClientHello. A server that has an object of the same type
    calls its :meth:`answer` and sends the result in EncryptedExtensions. Both sides find what the
    peer sent in :attr:`~hybridkex.Session.extensions`.
    """

    messages = (CH, EE)

    @classmethod
    def read_answer(cls, reader: Reader) -> Extension:
        """Parse the body of the server's answer from ``reader``; the same form as the offer's by
        default."""
        return cls.read(reader)

    def answer(self, offered: Self) -> Extension | None:
        """At a server: the answer to ``offered``, a client's offer, or ``None`` to leave it
        unanswered.

        Raises:
            PeerError: the offer is not acceptable; the handshake ends with the error's alert.
        """
        raise NotImplementedError


def check_own(known: ApplicationExtension, result: object, method: str) -> None:
    """Raise ``TypeError`` if a method has not returned an extension of its object's type."""
    if check_result(result, Extension, known, method).type != known.type:
        raise TypeError(f"{method} of {type(known).__name__} returned an extension of another type")


@value
class UnknownExtension:
    """An extension that we do not know, such as GREASE (RFC 8701)."""

    type: int
    data: bytes

    def body(self) -> bytes:
        return self.data


@value
class ServerName(Extension):
    """The host name that the client asks for (RFC 6066 section 3)."""

    type = ExtensionType.SERVER_NAME
    messages = (CH,)
    host_name: str

    @classmethod
    def read(cls, reader: Reader) -> Self:
        names = reader.vector(2, least=1)
        if names.u8() != 0:
            raise DecodeError("server_name of a type other than host_name")
        name = names.opaque(2, least=1)
        if len(name) > MAX_HOST_NAME:
            raise UnrecognizedName(
                f"server_name of {len(name)} bytes; a host name has at most 255",
                Reason.SERVER_NAME_UNKNOWN,
            )
        try:
            host_name = name.decode("ascii")
        except UnicodeDecodeError:
            raise IllegalParameter(
                "server_name is not ASCII", Reason.SERVER_NAME_MALFORMED
            ) from None
        if "\0" in host_name:
            raise IllegalParameter("server_name contains a zero byte", Reason.SERVER_NAME_MALFORMED)
        names.finish()  # RFC 6066 allows one name per type, and there is only one type.
        return cls(host_name)

    def body(self) -> bytes:
        return vector16(u8(0) + vector16(ascii_text(self.host_name)))


@value
class ServerNameAck(Extension):
    """The server used the name."""

    type = ExtensionType.SERVER_NAME
    messages = (EE,)


@value
class SupportedGroups(Extension):
    """Section 4.3.7."""

    type = ExtensionType.SUPPORTED_GROUPS
    messages = (CH, EE)
    layout = (codes(2),)
    codes: tuple[int, ...]


@value
class SignatureAlgorithms(Extension):
    """Section 4.3.3: for CertificateVerify."""

    type = ExtensionType.SIGNATURE_ALGORITHMS
    messages = (CH, CR)
    layout = (codes(2),)
    codes: tuple[int, ...]


@value
class SignatureAlgorithmsCert(Extension):
    """Section 4.3.3: for the certificates of the chain."""

    type = ExtensionType.SIGNATURE_ALGORITHMS_CERT
    messages = (CH, CR)
    layout = (codes(2),)
    codes: tuple[int, ...]


@value
class AlpnOffer(Extension):
    """RFC 7301 section 3.1."""

    type = ExtensionType.ALPN
    messages = (CH,)
    layout = (listed(opaque(1, least=1), least=2),)
    protocols: tuple[bytes, ...]


@value
class AlpnChoice(Extension):
    """RFC 7301 section 3.1: exactly one name."""

    type = ExtensionType.ALPN
    messages = (EE,)
    protocol: bytes

    @classmethod
    def read(cls, reader: Reader) -> Self:
        names = reader.vector(2, least=2)
        protocol = names.opaque(1, least=1)
        names.finish()
        return cls(protocol)

    def body(self) -> bytes:
        return vector16(vector8(self.protocol))


class _CertificateTypeOffer(Extension):
    layout = (BYTE_LIST,)
    types: tuple[int, ...]

    @classmethod
    def read(cls, reader: Reader) -> Self:
        found = super().read(reader)
        if found.types == (CertificateType.X509,):
            # RFC 7250 section 4.1: the default alone must not be sent.
            raise IllegalParameter(
                "certificate types with nothing but the default", Reason.CERTIFICATE_TYPE_DEFAULT
            )
        return found


@value
class ClientCertificateTypeOffer(_CertificateTypeOffer):
    """RFC 7250 section 3."""

    type = ExtensionType.CLIENT_CERTIFICATE_TYPE
    messages = (CH,)
    types: tuple[int, ...]


@value
class ClientCertificateTypeChoice(Extension):
    """RFC 7250 section 3."""

    type = ExtensionType.CLIENT_CERTIFICATE_TYPE
    messages = (EE,)
    layout = (U8,)
    chosen: int


@value
class ServerCertificateTypeOffer(_CertificateTypeOffer):
    """RFC 7250 section 3."""

    type = ExtensionType.SERVER_CERTIFICATE_TYPE
    messages = (CH,)
    types: tuple[int, ...]


@value
class ServerCertificateTypeChoice(Extension):
    """RFC 7250 section 3."""

    type = ExtensionType.SERVER_CERTIFICATE_TYPE
    messages = (EE,)
    layout = (U8,)
    chosen: int


@value
class Padding(Extension):
    """RFC 7685: zeros, which are ignored."""

    type = ExtensionType.PADDING
    may_change = True
    messages = (CH,)
    length: int

    @classmethod
    def read(cls, reader: Reader) -> Self:
        return cls(len(reader.rest()))

    def body(self) -> bytes:
        if not 0 <= self.length <= 0xFFFF:
            raise EncodeError(f"{self.length} bytes of padding")
        return bytes(self.length)


@value
class RecordSizeLimit(Extension):
    """RFC 8449 section 4: counts the content type and the padding too."""

    type = ExtensionType.RECORD_SIZE_LIMIT
    messages = (CH, EE)
    layout = (U16,)
    limit: int

    @classmethod
    def read(cls, reader: Reader) -> Self:
        found = super().read(reader)
        if found.limit < 64:
            raise IllegalParameter(
                f"a record_size_limit of {found.limit}, below 64", Reason.RECORD_SIZE_LIMIT
            )
        return found


@value
class TlsCertWithExternPsk(Extension):
    """RFC 9973 section 4: certificates together with an external PSK."""

    type = ExtensionType.TLS_CERT_WITH_EXTERN_PSK
    messages = (CH, SH)


@value
class OfferedPskIdentity(Laid):
    """PskIdentity of section 4.3.11."""

    layout = (opaque(2, least=1), U32)
    identity: bytes
    obfuscated_ticket_age: int


@value
class PreSharedKeyOffer(Extension):
    """Section 4.3.11."""

    type = ExtensionType.PRE_SHARED_KEY
    messages = (CH,)
    may_change = True
    layout = (
        listed(Layout(OfferedPskIdentity.read, OfferedPskIdentity.body), least=7),
        listed(opaque(1, least=32), least=33),
    )
    identities: tuple[OfferedPskIdentity, ...]
    binders: tuple[bytes, ...]

    @classmethod
    def read(cls, reader: Reader) -> Self:
        found = super().read(reader)
        if len(found.identities) != len(found.binders):
            raise IllegalParameter(
                f"{len(found.identities)} PSK identities and {len(found.binders)} binders",
                Reason.PSK_BINDERS_COUNT,
            )
        return found

    @property
    def binders_length(self) -> int:
        """Bytes of the binders list on the wire, which the binders do not cover."""
        return 2 + sum(1 + len(binder) for binder in self.binders)


@value
class PreSharedKeyChoice(Extension):
    """Section 4.3.11: the index of the identity that was selected."""

    type = ExtensionType.PRE_SHARED_KEY
    messages = (SH,)
    layout = (U16,)
    selected: int


@value
class EarlyDataIndication(Extension):
    """Section 4.3.10."""

    type = ExtensionType.EARLY_DATA
    messages = (CH, EE)
    may_change = True


@value
class EarlyDataLimit(Extension):
    """Section 4.7.1: how much early data a ticket allows."""

    type = ExtensionType.EARLY_DATA
    messages = (NST,)
    layout = (U32,)
    max_early_data_size: int


@value
class SupportedVersionsOffer(Extension):
    """Section 4.3.1."""

    type = ExtensionType.SUPPORTED_VERSIONS
    messages = (CH,)
    layout = (codes(1),)
    versions: tuple[int, ...]


@value
class SupportedVersionsChoice(Extension):
    """Section 4.3.1."""

    type = ExtensionType.SUPPORTED_VERSIONS
    messages = (SH, HRR)
    layout = (U16,)
    version: int


@value
class Cookie(Extension):
    """Section 4.3.2."""

    type = ExtensionType.COOKIE
    messages = (CH, HRR)
    needs_offer = False
    may_change = True
    layout = (opaque(2, least=1),)
    cookie: bytes


@value
class PskKeyExchangeModes(Extension):
    """Section 4.3.9."""

    type = ExtensionType.PSK_KEY_EXCHANGE_MODES
    messages = (CH,)
    layout = (BYTE_LIST,)
    modes: tuple[int, ...]


@value
class CertificateAuthorities(Extension):
    """Section 4.3.4: DER-encoded distinguished names."""

    type = ExtensionType.CERTIFICATE_AUTHORITIES
    messages = (CH, CR)
    layout = (listed(opaque(2, least=1), least=3),)
    names: tuple[bytes, ...]


@value
class OidFilters(Extension):
    """Section 4.3.5; a hint that may be ignored."""

    type = ExtensionType.OID_FILTERS
    messages = (CR,)
    layout = (listed(pair(opaque(1, least=1), opaque(2))),)
    filters: tuple[tuple[bytes, bytes], ...]


@value
class PostHandshakeAuth(Extension):
    """Section 4.3.6; we never offer it."""

    type = ExtensionType.POST_HANDSHAKE_AUTH
    messages = (CH,)


@value
class KeyShareEntry(Laid):
    """Section 4.3.8."""

    layout = (U16, opaque(2, least=1))
    group: int
    share: bytes


KEY_SHARE: Final = Layout(KeyShareEntry.read, KeyShareEntry.body)


@value
class KeyShareOffer(Extension):
    """Section 4.3.8; an empty list asks for a HelloRetryRequest."""

    type = ExtensionType.KEY_SHARE
    messages = (CH,)
    may_change = True
    layout = (listed(KEY_SHARE),)
    entries: tuple[KeyShareEntry, ...]


@value
class KeyShareChoice(Extension):
    """Section 4.3.8: the server's share."""

    type = ExtensionType.KEY_SHARE
    messages = (SH,)
    layout = (KEY_SHARE,)
    entry: KeyShareEntry


@value
class KeyShareRetry(Extension):
    """Section 4.3.8: the group that the server wants a share of."""

    type = ExtensionType.KEY_SHARE
    messages = (HRR,)
    layout = (U16,)
    group: int


@value
class TlsFlags(Extension):
    """draft-ietf-tls-tlsflags section 2: flags in place of empty extensions.

    CertificateRequest and NewSessionTicket may carry it without an offer; we ignore it there.
    """

    type = ExtensionType.TLS_FLAGS
    messages = (CH, EE, CR, NST)
    flags: frozenset[int]
    """The numbers of the flags, 0 to 2039."""

    @classmethod
    def read(cls, reader: Reader) -> Self:
        data = reader.opaque(1)
        if not data or not data[-1]:
            raise IllegalParameter(
                "tls_flags is empty or not in its shortest form", Reason.FLAGS_MALFORMED
            )
        return cls(frozenset(n for n in range(8 * len(data)) if data[n // 8] >> n % 8 & 1))

    def body(self) -> bytes:
        if not self.flags or not 0 <= min(self.flags) <= max(self.flags) < 8 * 255:
            raise EncodeError("tls_flags needs one or more flags from 0 to 2039")
        data = bytearray(max(self.flags) // 8 + 1)
        for number in self.flags:
            data[number // 8] |= 1 << number % 8
        return vector8(bytes(data))


@value
class FreshQkdKeysOffer(Extension):
    """Ours (``docs/fresh-keys.md``): the versions of the QKD slot that the client knows."""

    type = ExtensionType.FRESH_QKD_KEYS
    messages = (CH,)
    layout = (BYTE_LIST,)
    versions: tuple[int, ...]


@value
class FreshQkdKeysAnswer(Extension):
    """Ours (``docs/fresh-keys.md``): the version in use."""

    type = ExtensionType.FRESH_QKD_KEYS
    messages = (EE,)
    layout = (U8,)
    version: int


@value
class OneTimePadOffer(Extension):
    """Ours (``docs/one-time-pad.md``): the suites for the one-time pad that the client knows."""

    type = ExtensionType.ONE_TIME_PAD
    messages = (CH,)
    layout = (codes(1),)
    suites: tuple[int, ...]


@value
class OneTimePadAnswer(Extension):
    """Ours (``docs/one-time-pad.md``): the suite in use."""

    type = ExtensionType.ONE_TIME_PAD
    messages = (EE,)
    layout = (U16,)
    suite: int


_CLASSES: Final[tuple[type[Extension], ...]] = (
    ServerName,
    ServerNameAck,
    SupportedGroups,
    SignatureAlgorithms,
    SignatureAlgorithmsCert,
    AlpnOffer,
    AlpnChoice,
    ClientCertificateTypeOffer,
    ClientCertificateTypeChoice,
    ServerCertificateTypeOffer,
    ServerCertificateTypeChoice,
    Padding,
    RecordSizeLimit,
    TlsCertWithExternPsk,
    PreSharedKeyOffer,
    PreSharedKeyChoice,
    EarlyDataIndication,
    EarlyDataLimit,
    SupportedVersionsOffer,
    SupportedVersionsChoice,
    Cookie,
    PskKeyExchangeModes,
    CertificateAuthorities,
    OidFilters,
    PostHandshakeAuth,
    KeyShareOffer,
    KeyShareChoice,
    KeyShareRetry,
    TlsFlags,
    FreshQkdKeysOffer,
    FreshQkdKeysAnswer,
    OneTimePadOffer,
    OneTimePadAnswer,
)
_PARSERS: Final = {
    kind: {int(cls.type): cls for cls in _CLASSES if kind in cls.messages} for kind in MessageKind
}
_UNASKED: Final = {
    kind: frozenset(type_ for type_, cls in table.items() if not cls.needs_offer)
    for kind, table in _PARSERS.items()
}
KNOWN_TYPES: Final = frozenset(int(cls.type) for cls in _CLASSES)
"""The types that the engine knows."""
MAY_CHANGE: Final = frozenset(int(cls.type) for cls in _CLASSES if cls.may_change)
"""The types that a second ClientHello may change, add or remove (section 4.2.2)."""
_LAST: Final = int(ExtensionType.PRE_SHARED_KEY)

AnyExtension = Extension | UnknownExtension
E = TypeVar("E", bound=Extension)


class Extensions:
    """The extensions of one message, in their order on the wire."""

    __slots__ = ("_by_type",)

    def __init__(self, extensions: Iterable[AnyExtension] = ()) -> None:
        self._by_type: dict[int, AnyExtension] = {one.type: one for one in extensions}

    @classmethod
    def by_type(cls, extensions: dict[int, AnyExtension]) -> "Extensions":
        """The extensions by type."""
        made = cls.__new__(cls)
        made._by_type = extensions
        return made

    def get(self, cls: type[E]) -> E | None:
        """The extension of this class, if the message has it."""
        found = self._by_type.get(cls.type)
        return found if isinstance(found, cls) else None

    def decoded(self, known: ApplicationExtension, read: Callable[[Reader], E]) -> E | None:
        """An extension that only the application knows, if the message has it.

        Raises:
            DecodeError: ``read``, a method of it, fails or does not consume all bytes.
            TypeError: ``read`` returns no extension of this type.
        """
        found = self._by_type.get(known.type)
        if not isinstance(found, UnknownExtension):
            return None
        reader = Reader(found.data)
        value = read(reader)
        reader.finish()
        check_own(known, value, "read")
        return value

    def __contains__(self, cls: type[Extension]) -> bool:
        return cls.type in self._by_type

    def __iter__(self) -> Iterator[AnyExtension]:
        return iter(self._by_type.values())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Extensions) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Extensions({list(self)!r})"

    @property
    def types(self) -> tuple[int, ...]:
        return tuple(self._by_type)

    def encode(self) -> bytes:
        """The vector of extensions, with its 16-bit length."""
        return vector16(encoded(self._by_type.values()))


class EncodedExtensions(Extensions):
    """Extensions that are already encoded, to be sent in a message."""

    __slots__ = ("_encoded",)

    def __init__(self, encoded: bytes) -> None:
        self._encoded = encoded

    def encode(self) -> bytes:
        """The vector of extensions, with its 16-bit length."""
        return vector16(self._encoded)


def encoded(extensions: Iterable[AnyExtension]) -> bytes:
    """Extensions one after the other, without the length of the vector."""
    return b"".join([entry(one.type, one.body()) for one in extensions])


def parse(kind: MessageKind, reader: Reader) -> Extensions:
    """Read a vector of extensions as it stands in a message of this kind.

    Raises:
        DecodeError: it does not parse.
        IllegalParameter: a duplicate, a known extension that is not allowed in this message
            (section 4.3), or an extension after ``pre_shared_key`` (section 4.3.11).
    """
    found: dict[int, AnyExtension] = {}
    parsers = _PARSERS[kind]
    for type_, body in reader.vector(2).entries():
        if type_ in found:
            raise IllegalParameter(
                f"extension {_name(type_)} appears twice", Reason.EXTENSION_TWICE
            )
        if kind is CH and _LAST in found:
            raise IllegalParameter("pre_shared_key is not the last extension", Reason.PSK_NOT_LAST)
        if type_ in parsers:
            read = _read_short if len(body) <= _SHORT else _read
            found[type_] = read(kind, type_, body)
        elif type_ in KNOWN_TYPES and kind is not MessageKind.CERTIFICATE:
            raise IllegalParameter(
                f"extension {_name(type_)} in {kind.name.lower()}", Reason.EXTENSION_MISPLACED
            )
        else:
            found[type_] = UnknownExtension(type_, body)
    return Extensions.by_type(found)


def _read(kind: MessageKind, type_: int, body: bytes) -> Extension:
    reader = Reader(body)
    found = _PARSERS[kind][type_].read(reader)
    reader.finish()
    return found


_SHORT: Final = 64
"""The maximum length of a body in the cache, in bytes. Most are lists of code points that peers of
one implementation send unchanged."""
_read_short: Final = lru_cache(maxsize=256)(_read)


@lru_cache(maxsize=64)
def answerable(kind: MessageKind, sent: tuple[type[Extension], ...]) -> frozenset[int]:
    """The types that a server may put into a message of this kind.

    Args:
        kind: the message.
        sent: the classes of the extensions in the ClientHello.
    """
    table = _PARSERS[kind]
    return _UNASKED[kind] | {
        int(one.type) for one in sent if one.type in table or kind in one.messages
    }


def _name(type_: int) -> str:
    try:
        return ExtensionType(type_).name.lower()
    except ValueError:
        return str(type_)
