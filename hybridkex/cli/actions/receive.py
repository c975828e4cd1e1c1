"""``hybridkex receive``: files and folders from ``hybridkex send``."""

import signal
import sys
from functools import partial
from typing import Any, Final

import trio

from hybridkex.apps.port_file import write_port
from hybridkex.apps.tcp import CountingStream
from hybridkex.apps.transfer import Folder, Receiver
from hybridkex.cli.channel import server_config
from hybridkex.cli.logs import set_up_logging
from hybridkex.cli.pipe import report, shake_hands
from hybridkex.cli.progress import showing
from hybridkex.cli.receive import ReceiveOptions
from hybridkex.cli.running import EndRequest, run_service
from hybridkex.cli.tcp import checked_port, opening
from hybridkex.errors import ConfigError
from hybridkex.net.address import TcpAddress
from hybridkex.net.budget import Budget, Connection, TooManyConnections
from hybridkex.net.descriptors import raise_soft_limit
from hybridkex.net.listening import open_tcp_listeners
from hybridkex.net.sockets import watch_peer
from hybridkex.net.supervisor import Supervisor
from hybridkex.streams import SecureStream
from hybridkex.text import get_logger
from hybridkex.tls.config import ServerConfig
from hybridkex.tls.policy import Requirement

LOG: Final = get_logger("hybridkex.receive")


def run(options: ReceiveOptions) -> int:
    if options.max_connections < 1:
        raise ConfigError("--max-connections must be at least 1")
    set_up_logging(options.log_level)
    raise_soft_limit()
    run_service(partial(_run, options))
    return 0


async def _run(options: ReceiveOptions, request: EndRequest) -> None:
    asks = options.channel.names_trust
    wanted = asks and not options.anyone
    async with server_config(options.channel, require_client_certificate=wanted) as config:
        by_psk = config.policy_in_force.psk is Requirement.REQUIRE
        if not (options.anyone or asks or by_psk):
            raise ConfigError(
                "anyone who connects could write files here: name the senders' authority with "
                "--ca, use a PSK or QKD keys, or give --anyone"
            )
        folder = Folder(options.folder, overwrite=options.overwrite)
        try:
            await _Server(options, config, folder, request).run()
        finally:
            folder.close()


class _Server:
    def __init__(
        self,
        options: ReceiveOptions,
        config: ServerConfig,
        folder: Folder,
        request: EndRequest,
    ) -> None:
        self._request = request
        self._options = options
        self._config = config
        self._folder = folder
        self._wire = 0
        self._live: set[CountingStream] = set()
        self._budget = Budget(options.max_connections, even_shares=True)
        self._done = trio.Event()

    async def run(self) -> None:
        wanted = checked_port(self._options.port)
        with opening(TcpAddress(self._options.channel.bind or "*", wanted)):
            listeners = await open_tcp_listeners(wanted, host=self._options.channel.bind)
        port = listeners[0].socket.getsockname()[1]
        write_port(self._options.port_file, port)
        print(f"receiving into {self._options.folder} on port {port}", file=sys.stderr, flush=True)
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
        """SIGTERM shuts down cleanly: an incomplete file is kept, so that its sender can resume."""
        with trio.open_signal_receiver(signal.SIGTERM) as signals:
            async for number in signals:
                self._request.note(number)
                self._done.set()

    async def _converse(
        self, receiver: Receiver, tcp: trio.SocketStream, connection: Connection
    ) -> None:
        watch_peer(tcp)
        counting = CountingStream(tcp)
        stream: SecureStream[Any] = SecureStream(counting, self._config)
        self._live.add(counting)
        try:
            await shake_hands(stream)
            if known := stream.session.peer_is_known:
                connection.recognize()
            try:
                connection.admit(self._budget, is_used=lambda: stream.has_carried_data)
            except TooManyConnections:
                # Within what is left of its handshake deadline.
                await receiver.turn_away(stream)
                raise
            if known or connection.served.allows():
                report(stream.session, as_json=self._options.channel.json)
            if await receiver.serve(stream) and self._options.once:
                self._request.finish()
                self._done.set()
        finally:
            self._live.remove(counting)
            self._wire += counting.received
