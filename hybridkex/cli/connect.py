"""``hybridkex connect``: a secure channel to a server, in the manner of ``s_client -quiet``."""

import argparse
from functools import partial

import trio

from hybridkex.cli.manual import describe
from hybridkex.cli.options import add_channel_options, client_config
from hybridkex.cli.pipe import handshake_failed, pipe, report
from hybridkex.cli.running import run_trio
from hybridkex.cli.sessions import FileTicketStore
from hybridkex.cli.tcp import NO_TCP, cannot_connect, checked_port
from hybridkex.cli.values import file_path
from hybridkex.net.address import TcpAddress
from hybridkex.streams import SecureStream
from hybridkex.tls.config import ClientConfig

__all__ = ["configure", "run"]


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    describe(
        parser,
        "Open a TLS 1.3 channel to a server. Standard input goes to it, what it sends goes to "
        "standard output; the end of the input closes our direction, and the command ends when the "
        "server has closed its own.\n\nThe peer's certificate is checked against the system's "
        "authorities if nothing else is said. A peer without a post-quantum group is refused "
        "unless --groups names a classical one.",
        examples=[
            "connect localhost 4433 --ca keys/ca.pem --json < file",
            "connect example.org 443 --alpn http/1.1 --groups X25519MLKEM768,x25519",
            'connect localhost 4433 --psk "site-a:$(cat psk.hex)" --psk-import 00',
        ],
        status="0 after a clean close by the peer, 1 otherwise, with one line on standard error",
        notes="'hybridkex listen' is the other end; so is 'openssl s_server' (3.5 or newer, or an "
        "older one with --groups x25519).",
    )
    parser.add_argument("host", metavar="HOST", help="the server's name or IP address")
    parser.add_argument("port", metavar="PORT", type=int, help="the server's TCP port")
    parser.add_argument(
        "--server-name", metavar="NAME", help="the name in the certificate, if it is not HOST"
    )
    parser.add_argument(
        "--resume",
        type=file_path,
        metavar="FILE",
        help="keep session tickets in FILE and resume with them",
    )
    add_channel_options(parser)


def run(args: argparse.Namespace) -> int:
    """Connect; 0 after a clean close."""
    run_trio(partial(_run, args))
    return 0


async def _run(args: argparse.Namespace) -> None:
    tickets = FileTicketStore(args.resume) if args.resume is not None else None
    async with client_config(args, ticket_store=tickets) as config:
        await _connect(args, config)


async def _connect(args: argparse.Namespace, config: ClientConfig) -> None:
    port = checked_port(args.port)
    try:
        tcp = await trio.open_tcp_stream(args.host, port, local_address=args.bind)
    except NO_TCP as error:
        raise cannot_connect(TcpAddress(args.host, port), error) from None
    stream = SecureStream(tcp, config, server_hostname=args.server_name or args.host)
    async with stream:
        try:
            await stream.do_handshake()
        except trio.BrokenResourceError as error:
            raise handshake_failed(error, config) from None
        report(stream.session, as_json=args.json)
        await pipe(stream)
