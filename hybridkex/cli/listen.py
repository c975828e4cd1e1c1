"""``hybridkex listen``: accept secure channels, in the manner of ``s_server``."""

import argparse
from contextlib import nullcontext
from functools import partial
from typing import Final

import trio

from hybridkex.apps.port_file import write_port
from hybridkex.cli.logs import add_log_options, set_up_logging
from hybridkex.cli.manual import describe
from hybridkex.cli.options import add_channel_options, server_config
from hybridkex.cli.pipe import ChannelFailed, pipe, reason, report
from hybridkex.cli.running import run_trio
from hybridkex.cli.tcp import NO_TCP, cannot_listen, checked_port
from hybridkex.cli.values import file_path
from hybridkex.net.address import TcpAddress
from hybridkex.net.supervisor import Budget, Connection, Supervisor
from hybridkex.streams import SecureListener, SecureStream, open_secure_tcp_listeners
from hybridkex.text import get_logger
from hybridkex.tls.config import ServerConfig

__all__ = ["configure", "run"]

LOG: Final = get_logger("hybridkex.listen")

MAX_CONNECTIONS: Final = 256
"""At once, after their handshakes."""

Stream = SecureStream[trio.SocketStream]


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    describe(
        parser,
        "Accept TLS 1.3 channels, one after the other. What a client sends goes to standard "
        "output, standard input goes to the client; with --echo each client gets its own data "
        "back, and many are served at once.",
        examples=[
            "listen 4433 --cert keys/cert.pem --key keys/key.pem > received",
            "listen 4433 --cert cert.pem --key key.pem --ca clients.pem --require-client-cert",
            'listen 0 --echo --port-file port --psk "site-a:$(cat psk.hex)"',
        ],
        status="0 after a clean close (with --once: of the one connection), 1 otherwise",
        notes="A client that fails its handshake never ends the command, except with --once.",
    )
    parser.add_argument("port", metavar="PORT", type=int, help="0 picks a free one")
    parser.add_argument(
        "--require-client-cert", action="store_true", help="refuse clients without a certificate"
    )
    parser.add_argument("--echo", action="store_true", help="send back what comes, to many at once")
    parser.add_argument("--once", action="store_true", help="end after the first connection")
    parser.add_argument(
        "--port-file", type=file_path, metavar="FILE", help="write the port here once it is open"
    )
    add_log_options(parser, default="warning")
    add_channel_options(parser)


def run(args: argparse.Namespace) -> int:
    """Serve; with ``--once`` 0 after a clean close."""
    set_up_logging(args.log_level)
    run_trio(partial(_run, args))
    return 0


async def _run(args: argparse.Namespace) -> None:
    wanted = args.require_client_cert
    async with server_config(args, require_client_certificate=wanted) as config:
        await _listen(args, config)


async def _listen(args: argparse.Namespace, config: ServerConfig) -> None:
    port = checked_port(args.port)
    try:
        listeners = await open_secure_tcp_listeners(port, config, host=args.bind)
    except NO_TCP as error:
        raise cannot_listen(TcpAddress(args.bind or "*", port), error) from None
    inner = listeners[0].transport_listener
    assert isinstance(inner, trio.SocketListener)
    write_port(args.port_file, inner.socket.getsockname()[1])
    if args.once:
        await _serve_once(args, listeners)
        return
    # Standard input and output can serve one peer at a time; the others wait.
    turn = nullcontext() if args.echo else trio.Lock()
    budget = Budget(MAX_CONNECTIONS)

    async def handle(stream: Stream, connection: Connection) -> None:
        async with stream:
            await _shake_hands(stream)
            connection.admit(budget)
            async with turn:
                await _serve(args, stream)

    await Supervisor(handle, name="listen", logger=LOG).serve(listeners)


async def _serve_once(
    args: argparse.Namespace, listeners: list[SecureListener[trio.SocketStream]]
) -> None:
    accepted: list[Stream] = []
    async with trio.open_nursery() as nursery:

        async def accept(listener: SecureListener[trio.SocketStream]) -> None:
            stream = await listener.accept()
            # Two addresses may accept in the same instant: the first one is served.
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
        await _shake_hands(stream)
        await _serve(args, stream)


async def _shake_hands(stream: Stream) -> None:
    try:
        await stream.do_handshake()
    except trio.BrokenResourceError as error:
        raise ChannelFailed(f"handshake failed: {reason(error)}") from None


async def _serve(args: argparse.Namespace, stream: Stream) -> None:
    report(stream.session, as_json=args.json)
    if not args.echo:
        await pipe(stream)
        return
    try:
        while data := await stream.receive_some():
            await stream.send_all(data)
        await stream.send_eof()
    except trio.BrokenResourceError as error:
        raise ChannelFailed(reason(error)) from None
