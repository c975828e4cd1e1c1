"""``hybridkex listen``: accept secure channels, in the manner of ``s_server``."""

from contextlib import nullcontext
from functools import partial
from typing import Final

import trio

from hybridkex.apps.port_file import write_port
from hybridkex.cli.channel import server_config
from hybridkex.cli.listen import ListenOptions
from hybridkex.cli.logs import set_up_logging
from hybridkex.cli.pipe import ChannelFailed, pipe, report, report_epochs, shake_hands
from hybridkex.cli.running import EndRequest, run_service
from hybridkex.cli.tcp import checked_port, opening
from hybridkex.machine import broken
from hybridkex.net.address import TcpAddress
from hybridkex.net.budget import Budget, Connection
from hybridkex.net.descriptors import raise_soft_limit
from hybridkex.net.supervisor import Supervisor
from hybridkex.streams import SecureListener, SecureStream, open_secure_tcp_listeners
from hybridkex.text import get_logger
from hybridkex.tls.config import ServerConfig

LOG: Final = get_logger("hybridkex.listen")

MAX_CONNECTIONS: Final = 256
"""The maximum number of simultaneous connections after their handshakes."""

Stream = SecureStream[trio.SocketStream]


def run(options: ListenOptions) -> int:
    """Serve; with ``--once``, 0 after a clean close."""
    set_up_logging(options.log_level)
    raise_soft_limit()
    run_service(partial(_run, options))
    return 0


async def _run(options: ListenOptions, request: EndRequest) -> None:
    wanted = options.require_client_cert
    async with server_config(options.channel, require_client_certificate=wanted) as config:
        await _listen(options, config)
        if options.once:
            request.finish()


async def _listen(options: ListenOptions, config: ServerConfig) -> None:
    port = checked_port(options.port)
    with opening(TcpAddress(options.channel.bind or "*", port)):
        listeners = await open_secure_tcp_listeners(port, config, host=options.channel.bind)
    inner = listeners[0].transport_listener
    assert isinstance(inner, trio.SocketListener)
    write_port(options.port_file, inner.socket.getsockname()[1])
    if options.once:
        await _serve_once(options, listeners)
        return
    # Standard input and output can serve one peer at a time; the others wait.
    turn = nullcontext() if options.echo else trio.Lock()
    budget = Budget(MAX_CONNECTIONS, even_shares=True)

    async def handle(stream: Stream, connection: Connection) -> None:
        async with stream:
            await shake_hands(stream)
            if known := stream.session.peer_is_known:
                connection.recognize()
            connection.admit(budget, is_used=lambda: stream.has_carried_data)
            async with turn:
                await _serve(options, stream, shown=known or connection.served.allows())

    await Supervisor(handle, name="listen", logger=LOG).serve(listeners)


async def _serve_once(
    options: ListenOptions, listeners: list[SecureListener[trio.SocketStream]]
) -> None:
    accepted: list[Stream] = []
    async with trio.open_nursery() as nursery:

        async def accept(listener: SecureListener[trio.SocketStream]) -> None:
            stream = await listener.accept()
            # Two listeners may accept at the same instant: the first connection is served.
            if accepted:
                await trio.aclose_forcefully(stream)
                return
            accepted.append(stream)
            nursery.cancel_scope.cancel()

        for listener in listeners:
            nursery.start_soon(accept, listener)
    for listener in listeners:
        await listener.aclose()
    async with accepted[0] as stream:
        await shake_hands(stream)
        await _serve(options, stream)


async def _serve(options: ListenOptions, stream: Stream, *, shown: bool = True) -> None:
    """``shown``: whether the session is printed."""
    if shown:
        report(stream.session, as_json=options.channel.json)
    try:
        await (_echo(stream) if options.echo else pipe(stream))
    finally:
        if shown:
            report_epochs(stream.session, as_json=options.channel.json)


async def _echo(stream: Stream) -> None:
    try:
        while data := await stream.receive_some():
            await stream.send_all(data)
        await stream.send_eof()
    except trio.BrokenResourceError as error:
        raise ChannelFailed(broken(error)) from None
