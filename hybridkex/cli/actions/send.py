"""``hybridkex send``: files and folders to a ``hybridkex receive``."""

import math
import sys
import time
from functools import partial
from itertools import chain
from typing import Any

import trio

from hybridkex.apps.handshakes import handshake_failed
from hybridkex.apps.tcp import CountingStream
from hybridkex.apps.transfer import Outcome, collect, send_items, total_size
from hybridkex.cli.channel import client_config
from hybridkex.cli.pipe import ChannelFailed, report
from hybridkex.cli.progress import rate, showing
from hybridkex.cli.running import run_trio
from hybridkex.cli.send import DEFAULT_PORT, SendOptions
from hybridkex.cli.tcp import NO_TCP, cannot_connect
from hybridkex.errors import ConfigError
from hybridkex.net.address import TcpAddress, parse_tcp_address
from hybridkex.net.sockets import keep_alive
from hybridkex.streams import SecureStream
from hybridkex.tls.config import ClientConfig


def run(options: SendOptions) -> int:
    """Send; 0 if the receiver has everything."""
    if options.retries < 0:
        raise ConfigError("--retries must not be negative")
    if not 0 < options.patience < math.inf:
        raise ConfigError("--patience must be a positive number of seconds")
    wire = _Wire(options, parse_tcp_address(options.host, default_port=DEFAULT_PORT))
    started = time.monotonic()
    left_out = 0
    with showing("sent", wire.sent, partial(total_size, options.files)) as progress:

        def leave_out(text: str) -> None:
            nonlocal left_out
            left_out += 1
            progress.note(f"not sent: {text}")

        found = collect(options.files, leave_out)
        first = next(found, None)
        if first is None:
            return 1
        items = chain((first,), found)

        async def work() -> Outcome:
            async with client_config(options.channel) as config:
                return await send_items(
                    items,
                    partial(wire.connect, config),
                    progress,
                    retries=options.retries,
                    patience=options.patience,
                    checksum=options.checksum,
                )

        outcome = run_trio(work)
    _summarise(outcome, wire.sent(), time.monotonic() - started)
    return 1 if outcome.failed or outcome.incomplete or left_out else 0


def _summarise(outcome: Outcome, on_wire: int, seconds: float) -> None:
    parts = [f"{outcome.stored:,} stored"]
    if outcome.already:
        by_date = f" ({outcome.unchanged:,} by size and date)" if outcome.unchanged else ""
        parts.append(f"{outcome.already:,} already there{by_date}")
    if outcome.failed:
        parts.append(f"{len(outcome.failed):,} FAILED")
    if outcome.incomplete:
        parts.append(f"{len(outcome.incomplete):,} INCOMPLETE")
    if outcome.connections > 1:
        parts.append(f"{outcome.connections} connections")
    print(
        f"{', '.join(parts)}; {outcome.payload:,} bytes of files in {seconds:.2f} s: "
        f"{rate(outcome.payload, seconds)}, on the wire {rate(on_wire, seconds)}",
        file=sys.stderr,
    )


class _Wire:
    """Opens the connections and counts the bytes on all of them."""

    def __init__(self, options: SendOptions, address: TcpAddress) -> None:
        self._options = options
        self._address = address
        self._streams: list[CountingStream] = []
        self._reported = False

    def sent(self) -> int:
        return sum(stream.sent for stream in self._streams)

    async def connect(self, config: ClientConfig) -> SecureStream[Any]:
        """Open one connection, including its handshake."""
        host = self._address.host
        try:
            tcp = await trio.open_tcp_stream(
                host, self._address.port, local_address=self._options.channel.bind
            )
        except NO_TCP as error:
            if self._streams:
                raise
            raise cannot_connect(self._address, error) from None
        keep_alive(tcp)
        counting = CountingStream(tcp)
        stream = SecureStream(counting, config, server_hostname=self._options.server_name or host)
        try:
            await stream.do_handshake()
        except trio.BrokenResourceError as error:
            await trio.aclose_forcefully(stream)
            if self._streams:
                raise
            raise ChannelFailed(handshake_failed(error, config)) from None
        self._streams.append(counting)
        report(stream.session, as_json=self._options.channel.json)
        return stream
