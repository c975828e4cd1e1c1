"""An ASGI application over hybridkex: hypercorn serves HTTP/1.1 or HTTP/2, as ALPN selects.

    python examples/asgi_server.py 8443 keys/cert.pem keys/key.pem

hypercorn's own listeners use the standard library's TLS. Its trio worker, however, accepts any
stream that reports the ALPN protocol, and this example passes it such streams.
"""

import sys
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import trio
from hypercorn.config import Config
from hypercorn.trio.lifespan import Lifespan
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import ASGIFramework, ConnectionState
from hypercorn.utils import wrap_app

from hybridkex import (
    HybridkexError,
    Identity,
    Policy,
    Requirement,
    SecureStream,
    ServerConfig,
    serve_secure_tcp,
)

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]


class _HttpStream:
    """A secure stream with the additional methods that hypercorn needs."""

    def __init__(self, stream: SecureStream[trio.SocketStream]) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def selected_alpn_protocol(self) -> str:
        """Return ``h2`` or ``http/1.1``."""
        return self._stream.session.alpn or "http/1.1"


async def serve_asgi(
    app: ASGIFramework,
    port: int,
    config: ServerConfig,
    *,
    host: str | None = None,
    task_status: trio.TaskStatus[int] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve ``app`` until cancelled, with the HTTP versions in ``config.alpn``.

    ``task_status`` gets the port number.
    """
    settings, state = Config(), ConnectionState({})
    wrapped = wrap_app(app, settings.wsgi_max_body_size, None)
    lifespan, context = Lifespan(wrapped, settings, state), WorkerContext(None)

    async def handle(stream: SecureStream[trio.SocketStream]) -> None:
        state_of_one = ConnectionState(state.copy())
        await TCPServer(wrapped, settings, context, state_of_one, _HttpStream(stream))

    async with trio.open_nursery() as nursery:
        await nursery.start(lifespan.handle_lifespan)
        await lifespan.wait_for_startup()
        serve = partial(serve_secure_tcp, handle, port, config, host=host, https_compatible=True)
        async with trio.open_nursery() as connections:
            try:
                listeners = await connections.start(serve)
                task_status.started(listeners[0].transport_listener.socket.getsockname()[1])
                await trio.sleep_forever()
            finally:
                with trio.move_on_after(5, shield=True):
                    await lifespan.wait_for_shutdown()
                nursery.cancel_scope.cancel()


async def hello(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer with the method, the path, the HTTP version and the length of the body."""
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.close"})  # closing before the accept answers 403
        return
    if scope["type"] != "http":
        raise NotImplementedError(scope["type"])  # tells hypercorn that there is no lifespan
    length, more = 0, True
    while more:
        message = await receive()
        length += len(message.get("body", b""))
        more = message.get("more_body", False)
    body = f"{scope['method']} {scope['path']} HTTP/{scope['http_version']} {length}\n".encode()
    headers = [(b"content-type", b"text/plain"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def main() -> None:
    """Serve ``hello``."""
    try:
        port, certificate, key = sys.argv[1:]
        number = int(port)
    except ValueError:
        sys.exit("usage: asgi_server.py PORT CERTIFICATE KEY")
    config = ServerConfig(
        identities=(Identity.from_files(certificate, key),),
        alpn=("h2", "http/1.1"),
        # Browsers and curl may not support ML-KEM yet.
        policy=Policy(post_quantum=Requirement.PREFER),
    )
    trio.run(serve_asgi, hello, number, config)


if __name__ == "__main__":
    try:
        main()
    except* (HybridkexError, OSError) as group:
        sys.exit(str(group.exceptions[0]))
