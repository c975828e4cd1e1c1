"""Every exception that hybridkex raises on purpose.

There is a branch for each cause: the caller (:class:`ConfigError`, :class:`LocalStateError`), the
peer (:class:`PeerError`, which has the alert that was sent to it), the end of the connection by the
peer (:class:`AlertReceived`, :class:`TruncationError`) and a key source (:class:`KeySourceError`).
Any other exception is a bug.
"""

from typing import Final

from hybridkex.constants import Alert
from hybridkex.reasons import Reason
from hybridkex.text import printable


class HybridkexError(Exception):
    """The base class. The text of an error is safe to display; quoted text is escaped."""

    def __str__(self) -> str:
        return printable(super().__str__() or type(self).__name__)


class ConfigError(HybridkexError, ValueError):
    """An invalid configuration, detected when it is created."""


class ProviderMissing(ConfigError):
    """A library that the configuration needs is missing; the text says how to get it."""


class LocalStateError(HybridkexError, RuntimeError):
    """The caller requested something that is impossible in the present state."""


class PeerError(HybridkexError):
    """The peer broke the protocol or was refused.

    :attr:`reason` says why, as a value; :attr:`alert` is the alert sent to the peer. Each class has
    defaults for both.
    """

    reason: Reason = Reason.HANDSHAKE_FAILURE
    alert: Alert = reason.alert

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.alert = cls.reason.alert

    def __init__(self, message: str, reason: Reason | None = None) -> None:
        super().__init__(message)
        if reason is not None:
            self.reason = reason
            self.alert = reason.alert


class UnexpectedMessage(PeerError):
    """A message that is not allowed in the present state."""

    reason = Reason.UNEXPECTED_MESSAGE


class BadRecordMac(PeerError):
    """A record that does not decrypt under the present key."""

    reason = Reason.RECORD_NOT_AUTHENTIC


class RecordOverflow(PeerError):
    """A record longer than RFC 9846 section 5 or our own ``record_size_limit`` allows."""

    reason = Reason.RECORD_TOO_LONG


class HandshakeFailure(PeerError):
    """The two sides have no acceptable parameters in common."""

    reason = Reason.HANDSHAKE_FAILURE


class IllegalParameter(PeerError):
    """A field that parses but violates the protocol or contradicts another field."""

    reason = Reason.ILLEGAL_PARAMETER


class DecodeError(PeerError):
    """Bytes that do not parse."""

    reason = Reason.MALFORMED


class DecryptError(PeerError):
    """A signature, a Finished or a PSK binder that does not verify."""

    reason = Reason.NOT_VERIFIED


class ProtocolVersionError(PeerError):
    """The peer does not speak TLS 1.3."""

    reason = Reason.VERSION


class InternalError(PeerError):
    """The handshake cannot continue for a reason on our side; the peer learns no details."""

    reason = Reason.INTERNAL_ERROR


class EncodeError(InternalError):
    """A value that a message cannot carry.

    Values from the caller are checked when a configuration is created, and values from the peer
    when they are parsed, so this is a last check: it ends one connection with internal_error.
    """


class MissingExtension(PeerError):
    """A mandatory extension is missing (RFC 9846 section 9.2)."""

    reason = Reason.MISSING_EXTENSION


class UnsupportedCertificateType(PeerError):
    """One side can only present certificates, the other can only verify raw keys, or the
    reverse."""

    reason = Reason.CERTIFICATE_TYPES


class UnsupportedExtension(PeerError):
    """A response to an extension that was not offered."""

    reason = Reason.UNSOLICITED_EXTENSION


class UnrecognizedName(PeerError):
    """The server has no identity for the name that the client asked for."""

    reason = Reason.SERVER_NAME_UNKNOWN


class UnknownPskIdentity(PeerError):
    """The client must use a PSK and offered none that is known.

    The alert of this name is optional (RFC 9846 section 6.2): a stream sends it if a key source was
    asked and does not have the key, so that two sites that are out of step learn of it. If the two
    sides had no PSK in common from the start, the reason is ``PSK_NONE_IN_COMMON`` and the alert
    handshake_failure (section 4.2.1).
    """

    reason = Reason.PSK_UNKNOWN


class NoApplicationProtocol(PeerError):
    """ALPN found no protocol in common (RFC 7301 section 3.2)."""

    reason = Reason.NO_COMMON_PROTOCOL


class PolicyRefused(PeerError):
    """The peer's choice or offer is valid TLS but does not satisfy our policy."""

    reason = Reason.POLICY


class PadExhausted(InternalError):
    """Our one-time pad is too short for the data to be sent, and no QKD key arrived in time."""

    reason = Reason.PAD_EXHAUSTED


class CertificateRejected(PeerError):
    """The peer's certificate was not accepted.

    :attr:`alert` gives the kind of reason, :attr:`subject` the certificate.
    """

    reason = Reason.CERTIFICATE

    def __init__(
        self,
        message: str,
        reason: Reason | None = None,
        *,
        alert: Alert | None = None,
        subject: str | None = None,
    ) -> None:
        super().__init__(message, reason)
        if alert is not None:
            self.alert = alert
        self.subject = subject


class HandshakeTimeout(PeerError):
    """The handshake did not complete within its time limit."""

    reason = Reason.TIMEOUT


_REFUSED: Final = "it refuses our certificate"
_SEE_PEER: Final = "the peer's error message or log says why"
ALERT_MEANINGS: Final[dict[int, str]] = {
    Alert.HANDSHAKE_FAILURE: "it has no group, cipher suite, signature algorithm or PSK in "
    "common with us",
    Alert.PROTOCOL_VERSION: "it does not speak TLS 1.3",
    Alert.INSUFFICIENT_SECURITY: (
        "its policy requires more than we negotiated: a PSK, a post-quantum group, fresh keys, a "
        "one-time pad, or further QKD keys; its policy must match ours"
    ),
    Alert.NO_APPLICATION_PROTOCOL: (
        "it supports none of the application protocols (ALPN) that we offer"
    ),
    Alert.UNRECOGNIZED_NAME: "it does not serve the name that we asked for",
    Alert.DECODE_ERROR: (
        "it could not parse our message; is this the right port, and does a proxy on the path "
        "modify the stream (PROXY protocol)?"
    ),
    Alert.CERTIFICATE_REQUIRED: (
        "it requires a certificate, and got none from us that it can use; give a certificate and "
        "its key"
    ),
    Alert.UNKNOWN_CA: "it does not trust the authority of our certificate",
    Alert.CERTIFICATE_EXPIRED: f"{_REFUSED} for its validity dates; check them and both clocks",
    Alert.CERTIFICATE_REVOKED: f"{_REFUSED} as revoked",
    Alert.BAD_CERTIFICATE: f"{_REFUSED}; {_SEE_PEER}",
    Alert.UNSUPPORTED_CERTIFICATE: f"{_REFUSED} for its type or its key usage",
    Alert.CERTIFICATE_UNKNOWN: f"{_REFUSED}; {_SEE_PEER}",
    Alert.ACCESS_DENIED: "it knows our identity and denies us access",
    Alert.UNKNOWN_PSK_IDENTITY: "it does not have, or cannot get, our pre-shared key or QKD key",
    Alert.DECRYPT_ERROR: (
        "a signature or a pre-shared key did not verify at its end; the two ends may have "
        "different keys"
    ),
    Alert.INTERNAL_ERROR: f"the fault is on the peer's side; {_SEE_PEER}",
}
"""Explanations of a peer's alert for the reader of the error (RFC 9846 section 6.2). Alerts that
are not listed mean that a message was malformed."""


class AlertReceived(HybridkexError):
    """The peer ended the connection with an error alert; :attr:`alert` is its code point and
    :attr:`name` what RFC 9846 section 6 calls it."""

    def __init__(self, alert: int) -> None:
        try:
            name = Alert(alert).name.lower()
        except ValueError:
            name = f"alert {alert}"
        meaning = ALERT_MEANINGS.get(alert)
        super().__init__(f"the peer sent {name}" + (f": {meaning}" if meaning else ""))
        self.alert = alert
        self.name = name


class TruncationError(HybridkexError):
    """The transport ended without close_notify: the data received may be incomplete."""

    def __init__(
        self,
        text: str = (
            "the other end closed the connection without close_notify, so data may be missing: its "
            "program ended, or a proxy on the path cut it after a time-out; see their logs"
        ),
    ) -> None:
        super().__init__(text)


class KeySourceError(HybridkexError):
    """No QKD key could be obtained; the subclass says why.

    :attr:`retry_after` is the number of seconds that the source asked us to wait, or ``None``.
    """

    retry_after: float | None = None


class KeySourceExhausted(KeySourceError):
    """No key for this peer is available now; the link may produce more."""


class KeyUnknown(KeySourceError):
    """No key has this ID."""


class KeyNotYetAvailable(KeySourceError):
    """The key is not available yet: the two KMEs are out of step. Retry after a moment."""


class KeyConsumed(KeySourceError):
    """The key was delivered before; each key is delivered only once."""


class KeyExpired(KeySourceError):
    """The key was too old to be delivered."""


class KeyUnauthorized(KeySourceError):
    """The key source refuses to give us this key, or any key."""


class KeySourceUnavailable(KeySourceError):
    """The key source did not answer, or answered incorrectly."""


class LinkError(KeySourceError):
    """A QKD link cannot continue; its unfinished key material is erased."""


class BlockAborted(LinkError):
    """A block of a QKD link was aborted and erased; the link may try the next one."""


class LinkAuthenticationError(LinkError):
    """A message on a QKD link's classical channel is not authentic."""


class NotRandom(LinkError):
    """The bits of a QKD link's Alice fail a test of randomness, without which no bound holds."""


class LedgerDry(LinkError):
    """A QKD link has used up its authentication key and has stopped."""


class LedgerLost(LinkError):
    """The parties of a QKD link share no stored authentication key, because one has lost its state.
    If the settings of the link allow it, signatures restart it.
    """


class RecordingError(HybridkexError):
    """A capture file, or another file of an adversary, cannot be read."""


__all__ = [
    name
    for name, one in list(vars().items())
    if isinstance(one, type) and issubclass(one, HybridkexError)
]
