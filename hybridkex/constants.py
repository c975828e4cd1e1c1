"""Code points and labels, in one place.

The names are those of the IANA registries. Code points from a peer remain plain integers: an
unknown one is not an error (RFC 8701), and the enums below only name those that we know.
"""

from enum import IntEnum
from typing import Final

TLS13: Final = 0x0304
LEGACY_VERSION: Final = 0x0303
FIRST_VERSION: Final = 0x0301
"""The record version of the first ClientHello, for old middleboxes (RFC 9846 section 5.1)."""

MAX_PLAINTEXT: Final = 1 << 14
"""Bytes of content in one record (RFC 9846 section 5.1)."""

MAX_CIPHERTEXT_EXPANSION: Final = 256
"""Bytes by which a protected record may exceed its content (RFC 9846 section 5.2)."""

HELLO_RETRY_RANDOM: Final = bytes.fromhex(
    "cf21ad74e59a6111be1d8c021e65b891c2a211167abb8c5e079e09e2c8a8339c"
)
"""ServerHello.random of a HelloRetryRequest (RFC 9846 section 4.2.3)."""


class ContentType(IntEnum):
    """RFC 9846 section 5.1."""

    CHANGE_CIPHER_SPEC = 20
    ALERT = 21
    HANDSHAKE = 22
    APPLICATION_DATA = 23


PAD_RECORD: Final = 224
"""The content type, inside a protected record, of content under the one-time pad
(``docs/one-time-pad.md``)."""

PAD_SUITE: Final = 0xFF01
"""One-time pad with Poly1305 tags; a code point for private use."""


class HandshakeType(IntEnum):
    """RFC 9846 section 4."""

    CLIENT_HELLO = 1
    SERVER_HELLO = 2
    NEW_SESSION_TICKET = 4
    END_OF_EARLY_DATA = 5
    ENCRYPTED_EXTENSIONS = 8
    CERTIFICATE = 11
    CERTIFICATE_REQUEST = 13
    CERTIFICATE_VERIFY = 15
    FINISHED = 20
    KEY_UPDATE = 24
    EXTENDED_KEY_UPDATE = 240  # draft-ietf-tls-extended-key-update-13; ours, for private use


class UpdateType(IntEnum):
    """The subtypes of ``extended_key_update``: draft-ietf-tls-extended-key-update-13 section 4, and
    ours (``docs/fresh-keys.md``)."""

    REQUEST = 0
    RESPONSE = 1
    FINISH = 2
    FRESH_REQUEST = 224
    FRESH_RESPONSE = 225
    FRESH_DECLINE = 226
    FRESH_CONFIRM = 227
    PAD_KEY = 228  # docs/one-time-pad.md


class TlsFlag(IntEnum):
    """Bits of the extension ``tls_flags``."""

    EXTENDED_KEY_UPDATE = 64  # not yet assigned


MESSAGE_HASH: Final = 254
"""The synthetic handshake type that stands for ClientHello1 after a retry (section 4.1)."""


class ExtensionType(IntEnum):
    """RFC 9846 section 4.3 and the RFCs named."""

    SERVER_NAME = 0
    SUPPORTED_GROUPS = 10
    SIGNATURE_ALGORITHMS = 13
    ALPN = 16
    CLIENT_CERTIFICATE_TYPE = 19  # RFC 7250
    SERVER_CERTIFICATE_TYPE = 20  # RFC 7250
    PADDING = 21  # RFC 7685
    RECORD_SIZE_LIMIT = 28  # RFC 8449
    TLS_CERT_WITH_EXTERN_PSK = 33  # RFC 9973
    PRE_SHARED_KEY = 41
    EARLY_DATA = 42
    SUPPORTED_VERSIONS = 43
    COOKIE = 44
    PSK_KEY_EXCHANGE_MODES = 45
    CERTIFICATE_AUTHORITIES = 47
    OID_FILTERS = 48
    POST_HANDSHAKE_AUTH = 49
    SIGNATURE_ALGORITHMS_CERT = 50
    KEY_SHARE = 51
    TLS_FLAGS = 0xFF3E  # draft-ietf-tls-tlsflags; a number for private use
    FRESH_QKD_KEYS = 0xFF3F  # ours: docs/fresh-keys.md
    ONE_TIME_PAD = 0xFF40  # ours: docs/one-time-pad.md


class CipherSuiteCode(IntEnum):
    """RFC 9846 appendix B.4."""

    TLS_AES_128_GCM_SHA256 = 0x1301
    TLS_AES_256_GCM_SHA384 = 0x1302
    TLS_CHACHA20_POLY1305_SHA256 = 0x1303


class GroupCode(IntEnum):
    """The TLS Supported Groups registry; hybrids from RFC 10024."""

    SECP256R1 = 0x0017
    SECP384R1 = 0x0018
    X25519 = 0x001D
    MLKEM512 = 0x0200  # by liboqs alone
    MLKEM768 = 0x0201
    MLKEM1024 = 0x0202
    SECP256R1MLKEM768 = 0x11EB
    X25519MLKEM768 = 0x11EC
    SECP384R1MLKEM1024 = 0x11ED


class SignatureSchemeCode(IntEnum):
    """RFC 9846 section 4.3.3; ML-DSA from draft-ietf-tls-mldsa."""

    RSA_PKCS1_SHA256 = 0x0401
    RSA_PKCS1_SHA384 = 0x0501
    RSA_PKCS1_SHA512 = 0x0601
    ECDSA_SECP256R1_SHA256 = 0x0403
    ECDSA_SECP384R1_SHA384 = 0x0503
    ECDSA_SECP521R1_SHA512 = 0x0603
    RSA_PSS_RSAE_SHA256 = 0x0804
    RSA_PSS_RSAE_SHA384 = 0x0805
    RSA_PSS_RSAE_SHA512 = 0x0806
    ED25519 = 0x0807
    RSA_PSS_PSS_SHA256 = 0x0809
    RSA_PSS_PSS_SHA384 = 0x080A
    RSA_PSS_PSS_SHA512 = 0x080B
    MLDSA44 = 0x0904
    MLDSA65 = 0x0905
    MLDSA87 = 0x0906


class PskKeyExchangeMode(IntEnum):
    """RFC 9846 section 4.3.9."""

    PSK_KE = 0
    PSK_DHE_KE = 1


class CertificateType(IntEnum):
    """RFC 7250 section 3 and the IANA registry."""

    X509 = 0
    RAW_PUBLIC_KEY = 2


class KdfCode(IntEnum):
    """TLS KDF Identifiers (RFC 9258 section 10)."""

    HKDF_SHA256 = 0x0001
    HKDF_SHA384 = 0x0002


class Alert(IntEnum):
    """RFC 9846 section 6 and appendix B.2."""

    CLOSE_NOTIFY = 0
    UNEXPECTED_MESSAGE = 10
    BAD_RECORD_MAC = 20
    RECORD_OVERFLOW = 22
    HANDSHAKE_FAILURE = 40
    BAD_CERTIFICATE = 42
    UNSUPPORTED_CERTIFICATE = 43
    CERTIFICATE_REVOKED = 44
    CERTIFICATE_EXPIRED = 45
    CERTIFICATE_UNKNOWN = 46
    ILLEGAL_PARAMETER = 47
    UNKNOWN_CA = 48
    ACCESS_DENIED = 49
    DECODE_ERROR = 50
    DECRYPT_ERROR = 51
    PROTOCOL_VERSION = 70
    INSUFFICIENT_SECURITY = 71
    INTERNAL_ERROR = 80
    INAPPROPRIATE_FALLBACK = 86
    USER_CANCELED = 90
    MISSING_EXTENSION = 109
    UNSUPPORTED_EXTENSION = 110
    UNRECOGNIZED_NAME = 112
    BAD_CERTIFICATE_STATUS_RESPONSE = 113
    UNKNOWN_PSK_IDENTITY = 115
    CERTIFICATE_REQUIRED = 116
    GENERAL_ERROR = 117
    NO_APPLICATION_PROTOCOL = 120


class Label:
    """The labels of HKDF-Expand-Label (RFC 9846 section 7, RFC 9258 section 4)."""

    PREFIX: Final = b"tls13 "
    EXTERNAL_BINDER: Final = b"ext binder"
    RESUMPTION_BINDER: Final = b"res binder"
    IMPORTED_BINDER: Final = b"imp binder"
    DERIVED_PSK: Final = b"derived psk"
    DERIVED: Final = b"derived"
    CLIENT_HANDSHAKE_TRAFFIC: Final = b"c hs traffic"
    SERVER_HANDSHAKE_TRAFFIC: Final = b"s hs traffic"
    CLIENT_APPLICATION_TRAFFIC: Final = b"c ap traffic"
    SERVER_APPLICATION_TRAFFIC: Final = b"s ap traffic"
    EXPORTER_MAIN: Final = b"exp master"
    EXPORTER_UPDATED: Final = b"exporter eku"  # draft-ietf-tls-extended-key-update-13
    RESUMPTION_MAIN: Final = b"res master"
    EXPORTER: Final = b"exporter"
    RESUMPTION: Final = b"resumption"
    FINISHED: Final = b"finished"
    KEY: Final = b"key"
    IV: Final = b"iv"
    TRAFFIC_UPDATE: Final = b"traffic upd"
    SERVER_CERTIFICATE_VERIFY: Final = b"TLS 1.3, server CertificateVerify"
    CLIENT_CERTIFICATE_VERIFY: Final = b"TLS 1.3, client CertificateVerify"
    COMBINED_QKD_KEYS: Final = b"hybridkex combined QKD keys v1"  # ours, SP 800-56C FixedInfo
