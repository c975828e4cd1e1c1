"""The command line: ``python -m examples.chat server|client|pair``."""

import argparse
import logging
import signal
import socket
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import trio

from hybridkex import (
    HybridkexError,
    PadBudget,
    SecureStream,
    ServerConfig,
    Session,
    serve_secure_tcp,
)
from hybridkex.apps import no_connection, parse_tcp_address, watch_peer
from hybridkex.cli.channel import client_config, server_config
from hybridkex.cli.options import ChannelOptions, add_options, from_namespace

from .client import Client
from .hub import Hub
from .keys import made_at, network_of, owner_of, rests_on, spent_of
from .protocol import PROTOCOL, ChatError, check_name
from .store import Store
from .terminal import Terminal

_log = logging.getLogger("examples.chat")
_PORT = 4435
_CONNECTIONS = 2000
"""The maximum number of open connections, including those of clients that reconnect."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    args = _parser().parse_args(argv)
    told = logging.StreamHandler()
    told.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    for name in ("examples.chat", "hybridkex"):
        logging.getLogger(name).addHandler(told)
        logging.getLogger(name).setLevel(args.log_level.upper())
    try:
        _check(args)
        trio.run({"server": _serve, "client": _take_part, "pair": _pair}[args.mode], args)
    except BaseException as error:
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        if isinstance(error, KeyboardInterrupt):
            return 130
        if not isinstance(error, HybridkexError | OSError | trio.BrokenResourceError):
            raise
        if isinstance(error, OSError):
            text = no_connection(error)
        elif isinstance(error, trio.BrokenResourceError):
            text = str(error.__cause__ or error)
        else:
            text = str(error)
        print(f"chat: {text}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m examples.chat", description="Chat over hybridkex channels."
    )
    modes = parser.add_subparsers(dest="mode", required=True, metavar="MODE")
    server = modes.add_parser("server", help="serve chat rooms")
    client = modes.add_parser("client", help="join a room of a server")
    pair = modes.add_parser("pair", help="two parties, no server: one listens, one connects")
    client.add_argument("address", metavar="HOST[:PORT]", help=f"port {_PORT} if none is given")
    client.add_argument("--room", default="lobby", help="the first room (default: lobby)")
    pair.add_argument(
        "address",
        metavar="HOST[:PORT]",
        nargs="?",
        help="the peer to connect to; without it, listen",
    )
    for one in (client, pair):
        one.add_argument("--nick", required=True, metavar="NAME", help="our nickname")
        one.add_argument("--server-name", metavar="NAME", help="the name in the certificate")
    for one in (server, pair):
        one.add_argument(
            "--port",
            type=int,
            help=f"where we listen; 0 picks a free one (default: {_PORT})",
        )
        one.add_argument(
            "--store",
            type=Path,
            metavar="FILE",
            help="store messages in this SQLite file, encrypted (default: in memory)",
        )
        one.add_argument(
            "--store-key",
            type=Path,
            metavar="FILE",
            help="the key file of the store, created with it (default: STORE.key)",
        )
    server.add_argument(
        "--queue",
        type=int,
        default=1000,
        metavar="N",
        help="maximum queued messages for one client (default: 1000)",
    )
    server.add_argument(
        "--most", type=int, default=1000, metavar="N", help="maximum participants (default: 1000)"
    )
    server.add_argument(
        "--away",
        type=float,
        default=3600.0,
        metavar="SECONDS",
        help="time until a disconnected client loses its slot (default: 3600)",
    )
    for one in (server, client, pair):
        one.add_argument(
            "--log-level",
            default="warning",
            choices=("debug", "info", "warning"),
            help="messages on standard error (default: warning)",
        )
        add_options(one, ChannelOptions, alpn=[PROTOCOL], json=False)
    return parser


def _check(args: argparse.Namespace) -> None:
    """Require that both ends are authenticated."""
    if args.mode != "server":
        check_name("nickname", args.nick)
    elif args.queue < 1 or args.most < 1 or args.away <= 0:
        raise ChatError("--queue, --most and --away must be positive")
    if args.mode == "client":
        check_name("room", args.room)
    if args.mode != "client" and args.store_key is not None and args.store is None:
        raise ChatError("--store-key requires --store")
    if args.mode == "pair":
        listener, connector = ("port", "store", "store_key"), ("server_name",)
        for name in listener if args.address else connector:
            if getattr(args, name) is not None:
                side = "listens; to connect, write HOST:PORT" if args.address else "connects"
                raise ChatError(f"--{name.replace('_', '-')} is for the side that {side}")
    by_certificate = args.key and (args.ca or args.pin or args.known_peers)
    by_psk = (args.psk or args.kme or args.key_pool) and args.requirement not in ("prefer", "off")
    if not (by_certificate or by_psk):
        raise ChatError(
            "both ends prove who they are: give --ca, --cert and --key, or QKD keys, or a PSK"
        )


# --- the listening side ----------------------------------------------------------------------


def _server_options(args: argparse.Namespace) -> dict[str, Any]:
    def renewed(session: Session) -> None:
        _log.info("%s: %s", session.peer_subject or "a client", rests_on(session))

    return {
        "require_client_certificate": bool(args.ca or args.pin or args.known_peers),
        "on_epoch": renewed,
    }


async def _serve(args: argparse.Namespace) -> None:
    store = Store(args.store, args.store_key)
    try:
        hub = Hub(store, queue=args.queue, most=args.most, away=args.away)
        async with (
            server_config(from_namespace(ChannelOptions, args), **_server_options(args)) as config,
            trio.open_nursery() as nursery,
        ):
            nursery.start_soon(hub.run)
            nursery.start_soon(_listen, args, config, hub, [])
            with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
                async for _ in signals:
                    break
            await hub.close("the server is shutting down")
            nursery.cancel_scope.cancel()
    finally:
        store.close()


async def _listen(
    args: argparse.Namespace, config: ServerConfig, hub: Hub, streams: list[SecureStream[Any]]
) -> None:
    async def handle(stream: SecureStream[trio.SocketStream]) -> None:
        watch_peer(stream.transport_stream)
        session = stream.session
        _log.info("%s: %s", session.peer_subject or "a client", rests_on(session))
        streams.append(stream)
        try:
            where = network_of(stream.transport_stream)
            await hub.serve(stream, owner_of(session), where)
        finally:
            streams.remove(stream)

    serve = partial(
        serve_secure_tcp,
        handle,
        _PORT if args.port is None else args.port,
        config,
        host=args.bind,
        max_connections=_CONNECTIONS,
    )
    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(serve)
        inner = listeners[0].transport_listener
        assert isinstance(inner, trio.SocketListener)
        print(f"listening on port {inner.socket.getsockname()[1]}", file=sys.stderr, flush=True)


# --- the connecting side ---------------------------------------------------------------------


async def _take_part(args: argparse.Namespace) -> None:
    address = parse_tcp_address(args.address, default_port=_PORT)
    streams: list[SecureStream[Any]] = []
    async with client_config(from_namespace(ChannelOptions, args)) as config:

        async def connect() -> trio.abc.Stream:
            tcp = await trio.open_tcp_stream(address.host, address.port, local_address=args.bind)
            watch_peer(tcp)
            stream = SecureStream(tcp, config, server_hostname=args.server_name or address.host)
            try:
                await stream.do_handshake()
            except BaseException:
                await trio.aclose_forcefully(stream)
                raise
            streams[:] = [stream]
            return stream

        room = args.room if args.mode == "client" else "pair"
        client = Client(connect, args.nick, room)
        await _converse(client, streams)


async def _converse(client: Client, streams: list[SecureStream[Any]]) -> None:
    def basis() -> str:
        return rests_on(streams[-1].session) if streams else "the peer has not connected yet"

    def details() -> str:
        if not streams:
            return "the peer has not connected yet"
        pad, session = streams[-1].pad, str(streams[-1].session)
        return session if pad is None else f"{session}\n  left:          {spent_of(pad)}"

    def since() -> float:
        return made_at(streams[-1].session) if streams else time.time()

    def pad() -> PadBudget | None:
        return streams[-1].pad if streams else None

    async with trio.open_nursery() as nursery:

        async def talk() -> None:
            await Terminal(client, basis, details, since, pad).run()
            nursery.cancel_scope.cancel()

        nursery.start_soon(talk)
        await client.run()


async def _pair(args: argparse.Namespace) -> None:
    if args.address is not None:
        await _take_part(args)
        return
    # The listening side hosts the room and joins it over a socket pair inside the process.
    store = Store(args.store, args.store_key)
    hub = Hub(store, most=2)
    streams: list[SecureStream[Any]] = []
    try:
        async with (
            server_config(from_namespace(ChannelOptions, args), **_server_options(args)) as config,
            trio.open_nursery() as nursery,
        ):
            nursery.start_soon(hub.run)

            async def connect() -> trio.abc.Stream:
                ours, theirs = socket.socketpair()
                inner = trio.SocketStream(trio.socket.from_stdlib_socket(theirs))
                nursery.start_soon(hub.serve, inner, "")
                return trio.SocketStream(trio.socket.from_stdlib_socket(ours))

            nursery.start_soon(_listen, args, config, hub, streams)
            await _converse(Client(connect, args.nick, "pair"), streams)
            await hub.close("the other party has left")
            nursery.cancel_scope.cancel()
    finally:
        store.close()


if __name__ == "__main__":
    sys.exit(main())
