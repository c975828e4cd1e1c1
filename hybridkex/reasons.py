"""Why a peer is refused, as values that tests and metrics can count.

Each reason has the alert sent to the peer and the section that requires it. The text of an error is
for people and may change; its :attr:`~hybridkex.errors.PeerError.reason` is for programs.
"""

from enum import Enum

from hybridkex.constants import Alert

_TLS = "RFC 9846 section "
_UPDATE = "draft-ietf-tls-extended-key-update-13 section "
_FLAGS = "draft-ietf-tls-tlsflags section "
_FRESH = "docs/fresh-keys.md"
_PAD = "docs/one-time-pad.md"


class Reason(Enum):
    """One reason; its value is its name in lower case."""

    alert: Alert
    """The alert sent to the peer."""
    source: str
    """The RFC section, or ``policy`` for a requirement of our own configuration."""

    def __new__(cls, alert: Alert, source: str) -> "Reason":
        member = object.__new__(cls)
        member._value_ = (len(cls.__members__), alert, source)
        member.alert = alert
        member.source = source
        return member

    def __str__(self) -> str:
        return self.name.lower()

    # --- one for each kind of error, where nothing more precise is said -----------------------
    HANDSHAKE_FAILURE = (Alert.HANDSHAKE_FAILURE, _TLS + "6.2")
    UNEXPECTED_MESSAGE = (Alert.UNEXPECTED_MESSAGE, _TLS + "4")
    ILLEGAL_PARAMETER = (Alert.ILLEGAL_PARAMETER, _TLS + "6.2")
    MALFORMED = (Alert.DECODE_ERROR, _TLS + "6.2")
    NOT_VERIFIED = (Alert.DECRYPT_ERROR, _TLS + "6.2")
    MISSING_EXTENSION = (Alert.MISSING_EXTENSION, _TLS + "9.2")
    UNSOLICITED_EXTENSION = (Alert.UNSUPPORTED_EXTENSION, _TLS + "4.3")
    CERTIFICATE = (Alert.BAD_CERTIFICATE, _TLS + "4.5.1")
    POLICY = (Alert.INSUFFICIENT_SECURITY, "policy")
    TIMEOUT = (Alert.USER_CANCELED, _TLS + "6.1")
    INTERNAL_ERROR = (Alert.INTERNAL_ERROR, _TLS + "6.2")

    # --- records ------------------------------------------------------------------------------
    RECORD_NOT_AUTHENTIC = (Alert.BAD_RECORD_MAC, _TLS + "5.2")
    RECORD_TOO_LONG = (Alert.RECORD_OVERFLOW, _TLS + "5.1")
    RECORD_TYPE = (Alert.UNEXPECTED_MESSAGE, _TLS + "5")
    RECORD_UNPROTECTED = (Alert.UNEXPECTED_MESSAGE, _TLS + "5")
    RECORD_EMPTY = (Alert.UNEXPECTED_MESSAGE, _TLS + "5.1")
    RECORDS_EMPTY_TOO_MANY = (Alert.UNEXPECTED_MESSAGE, _TLS + "5.4")
    RECORD_INTERLEAVED = (Alert.UNEXPECTED_MESSAGE, _TLS + "5.1")
    KEY_CHANGE_WITHIN_RECORD = (Alert.UNEXPECTED_MESSAGE, _TLS + "5.1")
    CHANGE_CIPHER_SPEC = (Alert.UNEXPECTED_MESSAGE, _TLS + "5")
    EARLY_DATA_TOO_MUCH = (Alert.UNEXPECTED_MESSAGE, _TLS + "4.3.10")
    DATA_TOO_EARLY = (Alert.UNEXPECTED_MESSAGE, _TLS + "5")
    ALERT_LEVEL = (Alert.ILLEGAL_PARAMETER, _TLS + "6")
    WARNINGS_TOO_MANY = (Alert.UNEXPECTED_MESSAGE, _TLS + "6.1")

    # --- messages and extensions --------------------------------------------------------------
    MESSAGE_TOO_LONG = (Alert.ILLEGAL_PARAMETER, _TLS + "4")
    MESSAGE_TYPE = (Alert.UNEXPECTED_MESSAGE, _TLS + "4")
    EXTENSION_TWICE = (Alert.ILLEGAL_PARAMETER, _TLS + "4.3")
    EXTENSION_MISPLACED = (Alert.ILLEGAL_PARAMETER, _TLS + "4.3")
    PSK_NOT_LAST = (Alert.ILLEGAL_PARAMETER, _TLS + "4.3.11")
    PSK_BINDERS_COUNT = (Alert.ILLEGAL_PARAMETER, _TLS + "4.3.11")
    SERVER_NAME_MALFORMED = (Alert.ILLEGAL_PARAMETER, "RFC 6066 section 3")
    SERVER_NAME_UNKNOWN = (Alert.UNRECOGNIZED_NAME, "RFC 6066 section 3")
    RECORD_SIZE_LIMIT = (Alert.ILLEGAL_PARAMETER, "RFC 8449 section 4")
    CERTIFICATE_TYPE_DEFAULT = (Alert.ILLEGAL_PARAMETER, "RFC 7250 section 4.1")

    # --- versions, suites, groups -------------------------------------------------------------
    VERSION = (Alert.PROTOCOL_VERSION, _TLS + "4.3.1")
    VERSION_CHOICE = (Alert.ILLEGAL_PARAMETER, _TLS + "4.3.1")
    LEGACY_VERSION = (Alert.PROTOCOL_VERSION, _TLS + "4.2.2")
    COMPRESSION = (Alert.ILLEGAL_PARAMETER, _TLS + "4.2.2")
    SESSION_ID_ECHO = (Alert.ILLEGAL_PARAMETER, _TLS + "4.2.3")
    NO_COMMON_SUITE = (Alert.HANDSHAKE_FAILURE, _TLS + "4.2.1")
    SUITE_NOT_OFFERED = (Alert.ILLEGAL_PARAMETER, _TLS + "4.2.3")
    NO_COMMON_GROUP = (Alert.HANDSHAKE_FAILURE, _TLS + "4.2.1")
    GROUP_NOT_OFFERED = (Alert.ILLEGAL_PARAMETER, _TLS + "4.3.8")
    KEY_SHARES_INCONSISTENT = (Alert.ILLEGAL_PARAMETER, _TLS + "4.3.8")
    KEY_SHARE_MALFORMED = (Alert.ILLEGAL_PARAMETER, _TLS + "4.3.8")

    # --- HelloRetryRequest --------------------------------------------------------------------
    RETRY_WITHOUT_CHANGE = (Alert.ILLEGAL_PARAMETER, _TLS + "4.2.4")
    RETRY_TWICE = (Alert.UNEXPECTED_MESSAGE, _TLS + "4.2.4")
    RETRY_SUITE_CHANGED = (Alert.ILLEGAL_PARAMETER, _TLS + "4.2.4")
    RETRY_HELLO_CHANGED = (Alert.ILLEGAL_PARAMETER, _TLS + "4.2.2")
    RETRY_EARLY_DATA = (Alert.ILLEGAL_PARAMETER, _TLS + "4.3.10")
    COOKIE_NOT_OURS = (Alert.ILLEGAL_PARAMETER, _TLS + "4.3.2")
    COOKIE_TOO_LONG = (Alert.ILLEGAL_PARAMETER, _TLS + "4.3.2")

    # --- PSKs ---------------------------------------------------------------------------------
    PSK_UNKNOWN = (Alert.UNKNOWN_PSK_IDENTITY, _TLS + "6.2")
    PSK_NONE_IN_COMMON = (Alert.HANDSHAKE_FAILURE, _TLS + "4.2.1")
    PSK_CHOICE = (Alert.ILLEGAL_PARAMETER, _TLS + "4.3.11")
    PSK_BINDER = (Alert.DECRYPT_ERROR, _TLS + "4.3.11.2")
    PSK_REQUIRED = (Alert.INSUFFICIENT_SECURITY, "policy")
    PSK_WITH_EARLY_DATA = (Alert.ILLEGAL_PARAMETER, "RFC 9973 section 4")
    PSK_CERTIFICATE_WITHOUT_PSK = (Alert.ILLEGAL_PARAMETER, "RFC 9973 section 4")
    PSK_WITHOUT_CERTIFICATE = (Alert.INSUFFICIENT_SECURITY, "policy")
    QKD_KEY_REQUIRED = (Alert.INSUFFICIENT_SECURITY, "policy")

    # --- authentication -----------------------------------------------------------------------
    NO_COMMON_SCHEME = (Alert.HANDSHAKE_FAILURE, _TLS + "4.3.3")
    CERTIFICATE_TYPES = (Alert.UNSUPPORTED_CERTIFICATE, "RFC 7250 section 4.2")
    CERTIFICATE_TYPE_NOT_OFFERED = (Alert.ILLEGAL_PARAMETER, "RFC 7250 section 4.2")
    CERTIFICATE_CONTEXT = (Alert.ILLEGAL_PARAMETER, _TLS + "4.5.1")
    CERTIFICATE_ENTRIES = (Alert.ILLEGAL_PARAMETER, _TLS + "4.5.1")
    CERTIFICATE_MISSING = (Alert.DECODE_ERROR, _TLS + "4.5.1.3")
    CERTIFICATE_REQUIRED = (Alert.CERTIFICATE_REQUIRED, _TLS + "4.5.1.3")
    SIGNATURE_SCHEME = (Alert.ILLEGAL_PARAMETER, _TLS + "4.5.2")
    SIGNATURE = (Alert.DECRYPT_ERROR, _TLS + "4.5.2")
    FINISHED = (Alert.DECRYPT_ERROR, _TLS + "4.5.3")
    NO_COMMON_PROTOCOL = (Alert.NO_APPLICATION_PROTOCOL, "RFC 7301 section 3.2")
    PROTOCOL_NOT_OFFERED = (Alert.ILLEGAL_PARAMETER, "RFC 7301 section 3.2")

    # --- what our policy demands --------------------------------------------------------------
    POST_QUANTUM = (Alert.INSUFFICIENT_SECURITY, "policy")
    SESSION_TOO_OLD = (Alert.INSUFFICIENT_SECURITY, "policy")
    AUTHENTICATION = (Alert.INSUFFICIENT_SECURITY, "policy")

    # --- after the handshake ------------------------------------------------------------------
    KEY_UPDATE_MALFORMED = (Alert.ILLEGAL_PARAMETER, _TLS + "4.7.3")
    KEY_UPDATES_TOO_MANY = (Alert.UNEXPECTED_MESSAGE, _TLS + "4.7.3")
    TICKETS_TOO_MANY = (Alert.UNEXPECTED_MESSAGE, _TLS + "4.7.1")
    TICKET_LIFETIME = (Alert.ILLEGAL_PARAMETER, _TLS + "4.7.1")

    # --- extended key update, with and without a QKD key --------------------------------------
    FLAGS_MALFORMED = (Alert.ILLEGAL_PARAMETER, _FLAGS + "2")
    FLAG_NOT_OFFERED = (Alert.ILLEGAL_PARAMETER, _FLAGS + "3")
    FRESH_KEYS_ANSWER = (Alert.ILLEGAL_PARAMETER, _FRESH)
    FRESH_KEYS_REQUIRED = (Alert.INSUFFICIENT_SECURITY, "policy")
    FRESH_KEYS_LATE = (Alert.INSUFFICIENT_SECURITY, "policy")
    STANDARD_KEY_UPDATE = (Alert.UNEXPECTED_MESSAGE, _UPDATE + "4")
    UPDATE_SUBTYPE = (Alert.UNEXPECTED_MESSAGE, _UPDATE + "4")
    UPDATE_OUT_OF_ORDER = (Alert.UNEXPECTED_MESSAGE, _UPDATE + "4")
    UPDATE_GROUP = (Alert.ILLEGAL_PARAMETER, _UPDATE + "4")
    UPDATES_IDENTICAL = (Alert.UNEXPECTED_MESSAGE, _UPDATE + "5")
    UPDATES_TOO_MANY = (Alert.UNEXPECTED_MESSAGE, _UPDATE + "12.3")
    UPDATE_MALFORMED = (Alert.ILLEGAL_PARAMETER, _FRESH)
    UPDATE_ANSWER = (Alert.ILLEGAL_PARAMETER, _FRESH)
    UPDATE_NOT_CONFIRMED = (Alert.UNEXPECTED_MESSAGE, _FRESH)
    UPDATE_CONFIRMATION = (Alert.DECRYPT_ERROR, _FRESH)

    # --- one-time pad -------------------------------------------------------------------------
    PAD_ANSWER = (Alert.ILLEGAL_PARAMETER, _PAD)
    PAD_REQUIRED = (Alert.INSUFFICIENT_SECURITY, "policy")
    PAD_MISSING = (Alert.UNEXPECTED_MESSAGE, _PAD)
    PAD_KEYS_TOO_MANY = (Alert.UNEXPECTED_MESSAGE, _PAD)
    PAD_KEY_MISSING = (Alert.UNKNOWN_PSK_IDENTITY, _PAD)
    PAD_EXHAUSTED = (Alert.INSUFFICIENT_SECURITY, _PAD)
