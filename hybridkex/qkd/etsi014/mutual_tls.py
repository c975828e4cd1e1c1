"""Mutual TLS between an SAE and its KME, and between KMEs.

A :data:`TlsHandshake` takes a connected stream, secures it, and returns the peer's certificate. The
rest of this package needs nothing else from TLS, so one argument selects the standard library's TLS
or this library's own, which is post-quantum. Clients use a :class:`ClientTls`, which also secures
asyncio streams; servers run on trio.
"""

import contextlib
import gc
import re
import ssl
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias, cast

import trio

from hybridkex.crypto.private_keys import load_private_key
from hybridkex.crypto.x509_failure import parse_failure
from hybridkex.crypto.x509_parsing import UNREADABLE, certificates_from_pem
from hybridkex.errors import (
    AlertReceived,
    ConfigError,
    HybridkexError,
    KeySourceUnavailable,
    KeyUnauthorized,
)
from hybridkex.files import read_file
from hybridkex.machine import causes
from hybridkex.reasons import Reason

TlsHandshake: TypeAlias = Callable[[trio.abc.Stream, str], Awaitable[tuple[trio.abc.Stream, bytes]]]
"""``await handshake(stream, host)`` returns the secure stream and the peer's certificate in DER.
``host`` is the name that the peer's certificate must have; a server passes an empty string."""

AsyncioHandshake: TypeAlias = Callable[[Any, Any, str], Awaitable[tuple[Any, Any, bytes]]]
"""``await secure(reader, writer, host)`` gives a secure reader and writer and the certificate."""

TLS_KINDS: Final = ("stdlib", "hybridkex")


@dataclass(frozen=True)
class ClientTls:
    """A client's handshake, on either event loop."""

    on_trio: TlsHandshake
    on_asyncio: AsyncioHandshake

    async def __call__(self, stream: trio.abc.Stream, host: str) -> tuple[trio.abc.Stream, bytes]:
        return await self.on_trio(stream, host)


def client_tls(kind: str, *, ca: Path, certificate: Path, key: Path) -> ClientTls:
    """TLS for a client: files are PEM; the server's certificate must chain to ``ca``.

    Raises ``ConfigError`` for files that cannot be used.
    """
    if kind == "stdlib":
        context = _context(ssl.Purpose.SERVER_AUTH, ca, certificate, key)
        return ClientTls(_stdlib(context, server_side=False), _stdlib_on_asyncio(context))
    if kind == "hybridkex":
        return _own_client(ca, certificate, key)
    raise _unknown(kind)


def server_tls(kind: str, *, ca: Path, certificate: Path, key: Path) -> TlsHandshake:
    """TLS for a server; requires a client certificate that chains to ``ca``."""
    if kind == "stdlib":
        context = _context(ssl.Purpose.CLIENT_AUTH, ca, certificate, key)
        context.verify_mode = ssl.CERT_REQUIRED
        return _in_words(_stdlib(context, server_side=True))
    if kind == "hybridkex":
        return _in_words(_own_server(ca, certificate, key))
    raise _unknown(kind)


def _in_words(handshake: TlsHandshake) -> TlsHandshake:
    """A server's handshake with readable errors, since they go to a log."""

    async def in_words(stream: trio.abc.Stream, host: str) -> tuple[trio.abc.Stream, bytes]:
        try:
            return await handshake(stream, host)
        except (trio.BrokenResourceError, ssl.SSLError, HybridkexError) as error:
            why = tls_failure(error)
            if why is None:
                raise
            raise KeySourceUnavailable(f"a TLS handshake failed: {why}") from None

    return in_words


def _verify_reason(error: ssl.SSLCertVerificationError) -> str:
    """OpenSSL's reason, with the next step if a wrong authority is the likely cause."""
    text = str(error.verify_message)
    if error.verify_code in _UNKNOWN_ISSUER:
        text += "; check that our file of authorities has its authority"
    return text


_UNKNOWN_ISSUER: Final = {18, 19, 20, 21}
"""X509_V_ERR_...: DEPTH_ZERO_SELF_SIGNED_CERT, SELF_SIGNED_CERT_IN_CHAIN,
UNABLE_TO_GET_ISSUER_CERT_LOCALLY, UNABLE_TO_VERIFY_LEAF_SIGNATURE (x509_vfy.h)."""


def tls_failure(error: BaseException) -> str | None:
    """Why TLS failed, from an error or its causes; ``None`` if TLS is not the cause."""
    for cause in causes(error):
        if isinstance(cause, ssl.SSLCertVerificationError):
            return f"its certificate is not accepted: {_verify_reason(cause)}"
        alert = _alert(cause)
        if alert is not None:
            return f"it ended the TLS handshake: {alert}"
        if isinstance(cause, ssl.SSLError):
            name = _ssl_reason(cause)
            return _SSL_WORDS.get(name, f"TLS failed: {name}")
        if isinstance(cause, HybridkexError):
            reason = getattr(cause, "reason", None)
            return f"{cause}{_NO_GROUP if reason is Reason.NO_COMMON_GROUP else ''}"
    return None


_NO_GROUP: Final = (
    ": the client offers no ML-KEM group, as OpenSSL before 3.5 has none (curl, aiohttp and others "
    'that use it); update it, or set tls = "stdlib" here'
)


def alert_received(error: BaseException) -> str | None:
    """The alert by which the peer ended TLS, from an error or its causes, as RFC 9846 section 6
    calls it, with spaces; ``None`` if there was none."""
    return next(filter(None, map(_alert, causes(error))), None)


def _alert(error: BaseException) -> str | None:
    if isinstance(error, AlertReceived):
        return error.name.replace("_", " ")
    if isinstance(error, ssl.SSLError):
        return _ssl_reason(error).partition("alert ")[2] or None
    return None


def _ssl_reason(error: ssl.SSLError) -> str:
    """OpenSSL's reason in words. Python lacks the name of some; these are in the text alone, as
    ``[SSL] tlsv1 alert unknown psk identity (_ssl.c:1006)``."""
    text = error.reason or re.sub(r"^\[[^]]*\] | \(_ssl\.c:\d+\)$", "", str(error))
    return text.replace("_", " ").lower()


_SSL_WORDS: Final = {
    "wrong version number": "it does not speak TLS",
    "http request": "it sent plain HTTP, not TLS",
    "peer did not return a certificate": "it presented no certificate",
    "unexpected eof while reading": "it closed the connection during the TLS handshake",
    "no shared cipher": "it has no TLS cipher suite in common with us",
    "unsupported protocol": "it does not speak TLS 1.2 or later",
}


def _unknown(kind: str) -> ConfigError:
    return ConfigError(f"tls must be one of {', '.join(TLS_KINDS)}, not {kind!r}")


def _context(purpose: ssl.Purpose, ca: Path, certificate: Path, key: Path) -> ssl.SSLContext:
    from hybridkex.auth.certificates import (  # noqa: PLC0415
        key_bytes,
        not_valid_today,
        subject_of,
    )

    # OpenSSL would say neither which file is wrong nor why, and would block on a pipe.
    for path in (ca, certificate):
        content = read_file(path, pipe=False)
        try:
            first, *_ = certificates_from_pem(content)
            public = key_bytes(first.public_key()) if path == certificate else b""
        except UNREADABLE as error:
            raise ConfigError(
                f"cannot use the certificates of {path}: {parse_failure(error)}"
            ) from None
    dates = not_valid_today(first)  # of our own, read last
    if dates is not None:
        raise ConfigError(f"our own certificate {subject_of(first)} {dates} ({certificate})")
    no_pair = (
        f"the private key is not that of the certificate {subject_of(first)} ({certificate}, {key})"
    )
    own: Any = load_private_key(read_file(key, pipe=False), None, str(key))
    if key_bytes(own.public_key()) != public:
        raise ConfigError(no_pair)
    try:
        context = ssl.create_default_context(purpose, cafile=str(ca))
        context.minimum_version = ssl.TLSVersion.TLSv1_2  # clause 5.1
        # One rule on all versions of Python: 3.13 refuses authorities without keyUsage, which
        # earlier ones and our own TLS accept, and trusts certificates that are not self-signed.
        context.verify_flags &= ~ssl.VERIFY_X509_STRICT
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        context.hostname_checks_common_name = False  # RFC 9525 section 2
        context.load_cert_chain(str(certificate), str(key), password=_no_password)
    except (OSError, ssl.SSLError) as error:
        if getattr(error, "reason", None) == "KEY_VALUES_MISMATCH":  # renewed since we looked
            raise ConfigError(no_pair) from None
        raise ConfigError(f"cannot use {ca}, {certificate} and {key} for TLS: {error}") from error
    return context


def _no_password() -> str:
    # Otherwise OpenSSL would prompt on the terminal and block.
    return ""


def _stdlib(context: ssl.SSLContext, *, server_side: bool) -> TlsHandshake:
    async def handshake(stream: trio.abc.Stream, host: str) -> tuple[trio.abc.Stream, bytes]:
        kept = _KeptBytes(context)
        secure = trio.SSLStream(
            stream,
            cast("ssl.SSLContext", kept),  # trio calls only its wrap_bio
            server_hostname=None if server_side else host,
            server_side=server_side,
            https_compatible=True,  # HTTP has its own end of message; many peers just hang up
        )
        try:
            await secure.do_handshake()
        except trio.BrokenResourceError:
            # trio leaves the alert unsent, and the peer would not learn why (RFC 9846 section 6.2).
            if alert := kept.unsent():
                with trio.move_on_after(1), contextlib.suppress(trio.BrokenResourceError):
                    await stream.send_all(alert)
            raise
        return secure, secure.getpeercert(binary_form=True)

    return handshake


_ROOM: Final = 1 << 18
"""Bytes: more than OpenSSL needs for a new connection, and something for the others."""


def _find_room() -> None:
    """Raise ``MemoryError`` where there is no room for a new connection: the process would crash if
    OpenSSL found none (CPython issue 144833, fixed in 2026)."""
    try:
        bytearray(_ROOM)
    except MemoryError:
        gc.collect()  # what refused connections have left
        bytearray(_ROOM)


class _KeptBytes:
    """A context for one connection that keeps hold of the bytes that are to be sent."""

    def __init__(self, context: ssl.SSLContext) -> None:
        self._context = context
        self._outgoing = ssl.MemoryBIO()

    def wrap_bio(
        self, incoming: ssl.MemoryBIO, outgoing: ssl.MemoryBIO, **options: Any
    ) -> ssl.SSLObject:
        self._outgoing = outgoing
        _find_room()
        return self._context.wrap_bio(incoming, outgoing, **options)

    def unsent(self) -> bytes:
        return self._outgoing.read()


def _stdlib_on_asyncio(context: ssl.SSLContext) -> AsyncioHandshake:
    async def secure(reader: Any, writer: Any, host: str) -> tuple[Any, Any, bytes]:
        _find_room()
        await writer.start_tls(context, server_hostname=host)
        return reader, writer, writer.get_extra_info("ssl_object").getpeercert(binary_form=True)

    return secure


# This library's own TLS is imported on demand: key sources do not depend on the engine, whose keys
# may come from a key source.


def _own_server(ca: Path, certificate: Path, key: Path) -> TlsHandshake:
    from hybridkex.auth import Identity, TrustStore  # noqa: PLC0415
    from hybridkex.tls.config import ServerConfig  # noqa: PLC0415

    return _own_on_trio(
        ServerConfig(
            identities=(Identity.from_files(certificate, key),),
            client_verifier=TrustStore.from_file(ca),
            require_client_certificate=True,
        )
    )


def _own_client(ca: Path, certificate: Path, key: Path) -> ClientTls:
    from hybridkex.auth import Identity, TrustStore  # noqa: PLC0415
    from hybridkex.tls.config import ClientConfig  # noqa: PLC0415

    config = ClientConfig(
        verifier=TrustStore.from_file(ca), identity=Identity.from_files(certificate, key)
    )

    async def secure(reader: Any, writer: Any, host: str) -> tuple[Any, Any, bytes]:
        from hybridkex.aio import upgrade  # noqa: PLC0415

        reader, writer = await upgrade(reader, writer, config, server_hostname=host)
        return reader, writer, _leaf(writer.get_extra_info("hybridkex_session").peer_credential)

    return ClientTls(_own_on_trio(config), secure)


def _own_on_trio(config: Any) -> TlsHandshake:
    from hybridkex.streams import SecureStream  # noqa: PLC0415

    async def handshake(stream: trio.abc.Stream, host: str) -> tuple[trio.abc.Stream, bytes]:
        secure = SecureStream(stream, config, server_hostname=host or None, https_compatible=True)
        await secure.do_handshake()
        return secure, _leaf(secure.session.peer_credential)

    return handshake


def _leaf(peer: Any) -> bytes:
    if peer is None:
        raise KeyUnauthorized("the other end has presented no certificate")
    leaf: bytes = peer.chain[0]
    return leaf
