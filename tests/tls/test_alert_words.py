"""What an alert of the peer, or bytes that are not TLS, say to whoever reads the error."""

import pytest

from hybridkex.constants import Alert
from hybridkex.errors import AlertReceived, DecodeError
from hybridkex.wire.records import RecordBuffer

# These say that a message of ours is malformed, or have nothing to add to their name.
BARE = {
    Alert.CLOSE_NOTIFY,
    Alert.UNEXPECTED_MESSAGE,
    Alert.BAD_RECORD_MAC,
    Alert.RECORD_OVERFLOW,
    Alert.ILLEGAL_PARAMETER,
    Alert.INAPPROPRIATE_FALLBACK,
    Alert.USER_CANCELED,
    Alert.MISSING_EXTENSION,
    Alert.UNSUPPORTED_EXTENSION,
    Alert.BAD_CERTIFICATE_STATUS_RESPONSE,
    Alert.GENERAL_ERROR,
}


@pytest.mark.parametrize("alert", Alert)
def test_a_refusal_is_explained(alert: Alert) -> None:
    error = AlertReceived(alert)
    name = alert.name.lower()
    assert error.name == name
    if alert in BARE:
        assert str(error) == f"the peer sent {name}"
    else:
        assert str(error).startswith(f"the peer sent {name}: ")


def test_an_unknown_alert() -> None:
    assert str(AlertReceived(200)) == "the peer sent alert 200"


@pytest.mark.parametrize(
    ("start", "words"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n", "plain HTTP"),
        (b"GET / HTTP/1.1\r\n", "plain HTTP"),
        (b"POST /x HTTP/1.1\r\n", "plain HTTP"),
        (b"HEAD / HTTP/1.0\r\n", "plain HTTP"),
        (b"OPTIONS * HTTP/1.0\r\n", "plain HTTP"),
        (b"CONNECT x:443 HTTP/1.1\r\n", "plain HTTP"),
        (b"PROXY TCP4 127.0.0.1 127.0.0.1 1 2\r\n", "PROXY protocol"),
        (b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c", "PROXY protocol"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "SSH"),
        (b"220 mail.example ESMTP\r\n", "STARTTLS"),
        (b"* OK IMAP4rev1\r\n", "STARTTLS"),
        (b"+OK POP3\r\n", "STLS"),
        (b"\x80\x2e\x01\0\2", ""),
        (b"hello", ""),
    ],
)
def test_bytes_that_are_not_tls(start: bytes, words: str) -> None:
    reader = RecordBuffer()
    reader.feed(start)
    with pytest.raises(DecodeError, match="these bytes are not TLS") as caught:
        reader.take()
    assert words in str(caught.value)
    assert words or str(caught.value).endswith("not TLS")
