"""``hybridkex receive``: files and folders from ``hybridkex send``."""

import argparse
import signal
import sys
from functools import partial
from typing import Any, Final

import trio

from hybridkex.apps.port_file import write_port
from hybridkex.apps.tcp import CountingStream, watch_peer
from hybridkex.apps.transfer import PROTOCOL, Folder, Receiver
from hybridkex.cli.logs import add_log_options, set_up_logging
from hybridkex.cli.manual import describe
from hybridkex.cli.options import add_channel_options, server_config
from hybridkex.cli.pipe import ChannelFailed, reason, report
from hybridkex.cli.progress import showing
from hybridkex.cli.running import run_trio
from hybridkex.cli.send import DEFAULT_PORT
from hybridkex.cli.tcp import NO_TCP, cannot_listen, checked_port
from hybridkex.cli.values import file_path, folder_path
from hybridkex.errors import ConfigError
from hybridkex.net.address import TcpAddress
from hybridkex.net.supervisor import Budget, Connection, Supervisor, TooManyConnections
from hybridkex.streams import SecureStream
from hybridkex.text import get_logger
from hybridkex.tls.config import Requirement, ServerConfig

__all__ = ["configure", "run"]

LOG: Final = get_logger("hybridkex.receive")


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    describe(
        parser,
        "Take in files and folders from 'hybridkex send'. Nothing appears under its name before "
        "it is complete, verified by SHA-256 and on the disk; nothing leaves the folder; nothing "
        "is overwritten unless --overwrite is given.",
        examples=[
            "receive incoming --ca ca.pem --cert cert.pem --key key.pem",
            "receive incoming --once --port 0 --port-file port --pin HEX --key key.pem",
        ],
        status="0 after --once or a signal to end, 1 after an error",
        notes="See docs/file-transfer.md.",
    )
    parser.add_argument(
        "folder", type=folder_path, metavar="DIR", help="where to; made if it is not there"
    )
    parser.add_argument(
        "--port",
        metavar="PORT",
        type=int,
        default=DEFAULT_PORT,
        help="where to listen; 0 picks a free one (default: %(default)s)",
    )
    parser.add_argument(
        "--port-file", type=file_path, metavar="FILE", help="write the port here once it is open"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace files that are there")
    parser.add_argument(
        "--anyone", action="store_true", help="take files from senders that prove no identity"
    )
    parser.add_argument("--once", action="store_true", help="end when a sender has come to its end")
    parser.add_argument(
        "--max-connections",
        metavar="N",
        type=int,
        default=64,
        help="senders at once; others are told to try again later (default: %(default)s)",
    )
    add_log_options(parser, default="warning")
    add_channel_options(parser, alpn=PROTOCOL)


def run(args: argparse.Namespace) -> int:
    """Receive until stopped."""
    if args.max_connections < 1:
        raise ConfigError("--max-connections is at least 1")
    set_up_logging(args.log_level)
    run_trio(partial(_run, args))
    return 0


async def _run(args: argparse.Namespace) -> None:
    asks = bool(args.ca or args.pin or args.known_peers or args.insecure)
    wanted = asks and not args.anyone
    async with server_config(args, require_client_certificate=wanted) as config:
        by_psk = config.policy_in_force.psk is Requirement.REQUIRE
        if not (args.anyone or asks or by_psk):
            raise ConfigError(
                "whoever connects could write here: name the senders' authority with --ca, use a "
                "PSK or QKD keys, or say --anyone"
            )
        folder = Folder(args.folder, overwrite=args.overwrite)
        try:
            await _Server(args, config, folder).run()
        finally:
            folder.close()


class _Server:
    """The listening socket and its connections."""

    def __init__(self, args: argparse.Namespace, config: ServerConfig, folder: Folder) -> None:
        self._args = args
        self._config = config
        self._folder = folder
        self._wire = 0
        self._live: set[CountingStream] = set()
        self._budget = Budget(args.max_connections)
        self._done = trio.Event()

    async def run(self) -> None:
        wanted = checked_port(self._args.port)
        try:
            listeners = await trio.open_tcp_listeners(wanted, host=self._args.bind)
        except NO_TCP as error:
            raise cannot_listen(TcpAddress(self._args.bind or "*", wanted), error) from None
        write_port(self._args.port_file, listeners[0].socket.getsockname()[1])
        port = listeners[0].socket.getsockname()[1]
        print(f"receiving into {self._args.folder} on port {port}", file=sys.stderr, flush=True)
        with showing("received", self._received) as progress:
            receiver = Receiver(self._folder, progress)

            supervisor = Supervisor(partial(self._converse, receiver), name="receive", logger=LOG)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(supervisor.serve, listeners)
                nursery.start_soon(self._wait_for_signal)
                await self._done.wait()
                nursery.cancel_scope.cancel()

    def _received(self) -> int:
        return self._wire + sum(stream.received for stream in self._live)

    async def _wait_for_signal(self) -> None:
        """SIGTERM ends it in an orderly way: what was written of a file stays for its next try."""
        with trio.open_signal_receiver(signal.SIGTERM) as signals:
            async for _ in signals:
                self._done.set()

    async def _converse(
        self, receiver: Receiver, tcp: trio.SocketStream, connection: Connection
    ) -> None:
        watch_peer(tcp)
        counting = CountingStream(tcp)
        stream: SecureStream[Any] = SecureStream(counting, self._config)
        self._live.add(counting)
        try:
            try:
                await stream.do_handshake()
            except trio.BrokenResourceError as error:
                raise ChannelFailed(f"handshake failed: {reason(error)}") from None
            try:
                connection.admit(self._budget)
            except TooManyConnections:
                # For the rest of the time that it had for its handshake.
                await receiver.turn_away(stream)
                raise
            report(stream.session, as_json=self._args.json)
            if await receiver.serve(stream) and self._args.once:
                self._done.set()
        finally:
            self._live.remove(counting)
            self._wire += counting.received
