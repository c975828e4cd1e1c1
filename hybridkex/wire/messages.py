"""Handshake messages (RFC 9846 section 4) as frozen values.

:func:`encode` writes a message with its header, :func:`decode` reads one. The transcript hashes the
received bytes, never a message that was encoded again.
"""

from functools import lru_cache, partial
from typing import Final, Self

from hybridkex.constants import HELLO_RETRY_RANDOM, LEGACY_VERSION, HandshakeType, KdfCode
from hybridkex.errors import DecodeError, EncodeError, IllegalParameter, UnexpectedMessage
from hybridkex.reasons import Reason
from hybridkex.values import value
from hybridkex.wire.codec import Reader, fixed, u8, u16, u16_list, vector8, vector16, vector24
from hybridkex.wire.extensions import Extensions, MessageKind, parse
from hybridkex.wire.layout import REST, U16, U32, Laid, Layout, Message, opaque
from hybridkex.wire.update_messages import ExtendedKeyUpdate

HEADER_LENGTH: Final = 4
"""The length of a handshake header in bytes: type and 24-bit length."""
_LONGEST_BODY: Final = 0xFFFFFF


def _extensions_of(kind: MessageKind) -> Layout:
    return Layout(partial(parse, kind), Extensions.encode)


@value
class ClientHello(Message):
    """Section 4.2.2."""

    type = HandshakeType.CLIENT_HELLO
    random: bytes
    session_id: bytes
    cipher_suites: tuple[int, ...]
    extensions: Extensions
    legacy_version: int = LEGACY_VERSION
    compression_methods: bytes = b"\0"

    @classmethod
    def read(cls, reader: Reader) -> Self:
        legacy_version = reader.u16()
        random = reader.take(32)
        session_id = reader.opaque(1, most=32)
        cipher_suites = reader.u16_list(2)
        compression_methods = reader.opaque(1, least=1)
        # A ClientHello before TLS 1.3 may end here; it is refused for its version, not its form.
        extensions = parse(MessageKind.CLIENT_HELLO, reader) if reader.remaining else Extensions()
        return cls(
            random, session_id, cipher_suites, extensions, legacy_version, compression_methods
        )

    def body(self) -> bytes:
        return (
            u16(self.legacy_version)
            + fixed(self.random, 32)
            + vector8(self.session_id, most=32)
            + vector16(u16_list(self.cipher_suites))
            + vector8(self.compression_methods)
            + self.extensions.encode()
        )


@value
class _ServerHelloForm(Message):
    """The form that ServerHello and HelloRetryRequest share (section 4.2.3 and 4.2.4)."""

    type = HandshakeType.SERVER_HELLO
    random: bytes
    session_id: bytes
    cipher_suite: int
    extensions: Extensions
    legacy_version: int = LEGACY_VERSION
    compression_method: int = 0

    def body(self) -> bytes:
        return (
            u16(self.legacy_version)
            + fixed(self.random, 32)
            + vector8(self.session_id, most=32)
            + u16(self.cipher_suite)
            + u8(self.compression_method)
            + self.extensions.encode()
        )


@value
class ServerHello(_ServerHelloForm):
    """Section 4.2.3."""

    @classmethod
    def read(cls, reader: Reader) -> Message:  # type: ignore[override]
        """A ServerHello or, if its random has the special value, a HelloRetryRequest."""
        legacy_version = reader.u16()
        random = reader.take(32)
        form, kind = (
            (HelloRetryRequest, MessageKind.HELLO_RETRY_REQUEST)
            if random == HELLO_RETRY_RANDOM
            else (ServerHello, MessageKind.SERVER_HELLO)
        )
        session_id = reader.opaque(1, most=32)
        cipher_suite = reader.u16()
        compression_method = reader.u8()
        extensions = parse(kind, reader) if reader.remaining else Extensions()
        return form(
            random, session_id, cipher_suite, extensions, legacy_version, compression_method
        )


@value
class HelloRetryRequest(_ServerHelloForm):
    """Section 4.2.4: a ServerHello with ``HELLO_RETRY_RANDOM``."""


@value
class EncryptedExtensions(Message):
    """Section 4.4.1."""

    type = HandshakeType.ENCRYPTED_EXTENSIONS
    layout = (_extensions_of(MessageKind.ENCRYPTED_EXTENSIONS),)
    extensions: Extensions


@value
class CertificateRequest(Message):
    """Section 4.4.2."""

    type = HandshakeType.CERTIFICATE_REQUEST
    layout = (opaque(1), _extensions_of(MessageKind.CERTIFICATE_REQUEST))
    context: bytes
    extensions: Extensions


@value
class Certificate(Message):
    """Section 4.5.1: DER, the end entity's first, each with its extensions."""

    type = HandshakeType.CERTIFICATE
    context: bytes
    entries: tuple[tuple[bytes, Extensions], ...]

    @classmethod
    def read(cls, reader: Reader) -> Self:
        context = reader.opaque(1)
        certificates = reader.vector(3)
        entries = []
        while certificates.remaining:
            data = certificates.opaque(3, least=1)
            entries.append((data, parse(MessageKind.CERTIFICATE, certificates)))
        return cls(context, tuple(entries))

    @property
    def chain(self) -> tuple[bytes, ...]:
        return tuple(data for data, _ in self.entries)

    def body(self) -> bytes:
        return vector8(self.context) + vector24(
            b"".join(vector24(data) + extensions.encode() for data, extensions in self.entries)
        )


@value
class CertificateVerify(Message):
    """Section 4.5.2."""

    type = HandshakeType.CERTIFICATE_VERIFY
    layout = (U16, opaque(2))
    scheme: int
    signature: bytes


@value
class Finished(Message):
    """Section 4.5.3; its length is checked together with its value."""

    type = HandshakeType.FINISHED
    layout = (REST,)
    verify_data: bytes


@value
class NewSessionTicket(Message):
    """Section 4.7.1."""

    type = HandshakeType.NEW_SESSION_TICKET
    layout = (
        *(U32, U32, opaque(1), opaque(2, least=1)),
        _extensions_of(MessageKind.NEW_SESSION_TICKET),
    )
    lifetime: int
    age_add: int
    nonce: bytes
    ticket: bytes
    extensions: Extensions


@value
class KeyUpdate(Message):
    """Section 4.7.3."""

    type = HandshakeType.KEY_UPDATE
    update_requested: bool

    @classmethod
    def read(cls, reader: Reader) -> Self:
        request = reader.u8()
        if request > 1:
            raise IllegalParameter(
                f"KeyUpdate with request_update {request}", Reason.KEY_UPDATE_MALFORMED
            )
        return cls(bool(request))

    def body(self) -> bytes:
        return u8(self.update_requested)


@value
class EndOfEarlyData(Message):
    """Section 4.6; we accept no early data, so it is never allowed."""

    type = HandshakeType.END_OF_EARLY_DATA


_CLASSES: Final[dict[int, type[Message]]] = {
    cls.type: cls
    for cls in (
        ClientHello,
        ServerHello,
        EncryptedExtensions,
        CertificateRequest,
        Certificate,
        CertificateVerify,
        Finished,
        NewSessionTicket,
        KeyUpdate,
        ExtendedKeyUpdate,
        EndOfEarlyData,
    )
}


def encode(message: Message) -> bytes:
    """The message with its header."""
    body = message.body()
    if len(body) > _LONGEST_BODY:
        raise EncodeError(f"{len(body)} bytes in a handshake message of at most {_LONGEST_BODY}")
    return (message.type << 24 | len(body)).to_bytes(HEADER_LENGTH, "big") + body


def decode(raw: bytes) -> Message:
    """Read one whole message, header included.

    Raises:
        UnexpectedMessage: TLS 1.3 has no message of this type.
        DecodeError: it does not parse, or bytes are left over.
        IllegalParameter: a field has a forbidden value.
    """
    return _decode_alike(raw) if raw[0] in _ALIKE and len(raw) <= _KEPT else _decode(raw)


def _decode(raw: bytes) -> Message:
    cls = _CLASSES.get(raw[0])
    if cls is None:
        raise UnexpectedMessage(f"handshake message of unknown type {raw[0]}", Reason.MESSAGE_TYPE)
    reader = Reader(raw, HEADER_LENGTH)
    try:
        message = cls.read(reader)
        reader.finish()
    except DecodeError as error:
        raise DecodeError(f"{cls.type.name.lower()}: {error}") from None
    return message


_ALIKE: Final = (EncryptedExtensions.type, CertificateRequest.type, Certificate.type)
"""The types of messages that a peer sends unchanged in each handshake; parsed ones are cached."""
_KEPT: Final = 4096
"""The maximum length in bytes of a message in this cache."""
_decode_alike: Final = lru_cache(maxsize=64)(_decode)

_KDFS: Final = frozenset(int(code) for code in KdfCode)


@value
class ImportedIdentity(Laid):
    """The identity of an imported PSK on the wire (RFC 9258 section 5.1)."""

    layout = (opaque(2, least=1), opaque(2), U16, U16)
    external_identity: bytes
    context: bytes
    target_protocol: int
    target_kdf: int

    @classmethod
    def decode(cls, data: bytes) -> "ImportedIdentity | None":
        """Parse one; ``None`` if the bytes are another kind of identity."""
        reader = Reader(data)
        try:
            identity = cls.read(reader)
            reader.finish()
        except DecodeError:
            return None
        return identity if identity.target_kdf in _KDFS else None

    def encode(self) -> bytes:
        """The bytes that go into PskIdentity.identity and into the derivation."""
        return self.body()
