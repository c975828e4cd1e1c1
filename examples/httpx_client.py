"""``httpx`` over hybridkex: https requests with hybrid keys; ALPN selects HTTP/1.1 or HTTP/2.

    python examples/httpx_client.py https://localhost:8443/ keys/ca.pem

httpcore, the transport of httpx, opens TCP connections with a network backend and then starts TLS
on each. The connections of this backend start TLS as a ``SecureStream``.
"""

import sys
from collections.abc import Iterable
from typing import Any

import httpcore
import httpx
import trio

from hybridkex import ClientConfig, HybridkexError, SecureStream, TrustStore

__all__ = ["SecureBackend", "secure_transport"]


class SecureBackend(httpcore.AsyncNetworkBackend):
    """Connections whose TLS is a :class:`~hybridkex.SecureStream`.

    Args:
        config: the configuration of every connection, with ``alpn``.
    """

    def __init__(self, config: ClientConfig) -> None:
        self._config = config
        self._tcp = httpcore.TrioBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109  # httpcore's signature
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """Open a TCP connection; httpcore then calls ``start_tls`` on it."""
        with _errors(httpcore.ConnectTimeout, httpcore.ConnectError), _within(timeout):
            tcp = await trio.open_tcp_stream(host, port, local_address=local_address)
        for option in socket_options or ():
            tcp.setsockopt(*option)
        return _Connection(tcp, self._config)

    async def sleep(self, seconds: float) -> None:
        """Wait before the next attempt."""
        await trio.sleep(seconds)


class _Connection(httpcore.AsyncNetworkStream):
    def __init__(self, stream: trio.abc.Stream, config: ClientConfig) -> None:
        self._stream = stream
        self._config = config

    async def start_tls(
        self,
        ssl_context: object,
        server_hostname: str | None = None,
        timeout: float | None = None,  # noqa: ASYNC109
    ) -> httpcore.AsyncNetworkStream:
        """Start hybridkex on the connection; the standard library's ``ssl_context`` is ignored."""
        secure = SecureStream(
            self._stream, self._config, server_hostname=server_hostname, https_compatible=True
        )
        try:
            with _errors(httpcore.ConnectTimeout, httpcore.ConnectError), _within(timeout):
                await secure.do_handshake()
        except BaseException:
            await trio.aclose_forcefully(secure)
            raise
        return _Connection(secure, self._config)

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:  # noqa: ASYNC109
        """Read at most ``max_bytes`` bytes."""
        with _errors(httpcore.ReadTimeout, httpcore.ReadError), _within(timeout):
            return bytes(await self._stream.receive_some(max_bytes))

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:  # noqa: ASYNC109
        """Send all of ``buffer``."""
        with _errors(httpcore.WriteTimeout, httpcore.WriteError), _within(timeout):
            await self._stream.send_all(buffer)

    async def aclose(self) -> None:
        """Close the connection."""
        await self._stream.aclose()

    def get_extra_info(self, info: str) -> Any:
        """Return ``ssl_object``, which httpcore asks for the ALPN protocol, or our ``session``."""
        if not isinstance(self._stream, SecureStream):
            return None
        if info == "session":
            return self._stream.session
        return self if info == "ssl_object" else None

    def selected_alpn_protocol(self) -> str | None:
        """Return ``h2`` or ``http/1.1``, or ``None`` without ALPN."""
        assert isinstance(self._stream, SecureStream)
        return self._stream.session.alpn


class _errors:
    """Context manager that translates errors into those of httpcore."""

    def __init__(self, late: type[Exception], broken: type[Exception]) -> None:
        self._late, self._broken = late, broken

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, trio.TooSlowError):
            raise self._late("the server did not answer in time") from error
        if isinstance(error, OSError | trio.BrokenResourceError | trio.ClosedResourceError):
            raise self._broken(str(error.__cause__ or error)) from error


def _within(seconds: float | None) -> Any:
    return trio.fail_after(float("inf") if seconds is None else seconds)


def secure_transport(config: ClientConfig) -> httpx.AsyncHTTPTransport:
    """Make the transport for ``httpx.AsyncClient(transport=...)``."""
    transport = httpx.AsyncHTTPTransport()
    # httpx has no argument for the network backend of httpcore's pool.
    transport._pool = httpcore.AsyncConnectionPool(
        network_backend=SecureBackend(config),
        http2="h2" in config.alpn,
        max_connections=100,
        max_keepalive_connections=20,
        keepalive_expiry=5.0,
    )
    return transport


async def main() -> None:
    """Send one request and print the answer."""
    try:
        url, ca = sys.argv[1:]
    except ValueError:
        sys.exit("usage: httpx_client.py URL AUTHORITIES")
    config = ClientConfig(verifier=TrustStore.from_file(ca), alpn=("h2", "http/1.1"))
    async with httpx.AsyncClient(transport=secure_transport(config)) as client:
        answer = await client.get(url)
        print(answer.extensions["network_stream"].get_extra_info("session"))
        print(answer.http_version, answer.status_code)
        print(answer.text)


if __name__ == "__main__":
    try:
        trio.run(main)
    except (HybridkexError, httpx.HTTPError, httpx.InvalidURL) as error:
        sys.exit(str(error))
