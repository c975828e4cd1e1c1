"""``hybridkex send``: files and folders to a ``hybridkex receive``."""

import argparse
import sys
import time
from functools import partial
from typing import Any

import trio

from hybridkex.apps.tcp import CountingStream, keep_alive
from hybridkex.apps.transfer import PROTOCOL, Outcome, collect, send_items
from hybridkex.cli.manual import describe
from hybridkex.cli.options import add_channel_options, client_config
from hybridkex.cli.pipe import handshake_failed, report
from hybridkex.cli.progress import rate, showing
from hybridkex.cli.running import run_trio
from hybridkex.cli.tcp import NO_TCP, cannot_connect
from hybridkex.cli.values import file_path
from hybridkex.errors import ConfigError
from hybridkex.net.address import TcpAddress, parse_tcp_address
from hybridkex.streams import SecureStream
from hybridkex.tls.config import ClientConfig

__all__ = ["DEFAULT_PORT", "configure", "run"]

DEFAULT_PORT = 4434


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    describe(
        parser,
        "Send files and folders to 'hybridkex receive'. What is there already is not sent again; "
        "after a break the transfer goes on where it was.",
        examples=[
            "send report.pdf data/ backup.example.org --ca ca.pem --cert me.pem --key me.key",
            "send disk.img [2001:db8::1]:4434 --pin HEX --key me.pem",
        ],
        status="0 when everything is there and verified, 1 otherwise",
        notes="See docs/file-transfer.md.",
    )
    parser.add_argument(
        "files", metavar="FILE", nargs="+", type=file_path, help="a file or a folder"
    )
    parser.add_argument(
        "host", metavar="HOST[:PORT]", help=f"the receiver (port {DEFAULT_PORT} if none is given)"
    )
    parser.add_argument(
        "--server-name", metavar="NAME", help="the name in the certificate, if it is not HOST"
    )
    parser.add_argument(
        "--retries",
        metavar="N",
        type=int,
        default=8,
        help="connections in a row that may bring nothing before it is given up (default: 8)",
    )
    add_channel_options(parser, alpn=PROTOCOL)


def run(args: argparse.Namespace) -> int:
    """Send; 0 when everything is there."""
    if args.retries < 0:
        raise ConfigError("--retries is not negative")
    left_out: list[str] = []
    items = collect(args.files, left_out.append)
    for text in left_out:
        print(f"hybridkex: not sent: {text}", file=sys.stderr)
    if not items:
        return 1
    wire = _Wire(args, parse_tcp_address(args.host, default_port=DEFAULT_PORT))
    started = time.monotonic()
    with showing("sent", wire.sent, sum(item.size for item in items)) as progress:

        async def work() -> Outcome:
            async with client_config(args) as config:
                connect = partial(wire.connect, config)
                return await send_items(items, connect, progress, retries=args.retries)

        outcome = run_trio(work)
    _summarise(outcome, wire.sent(), time.monotonic() - started)
    return 1 if outcome.failed or outcome.incomplete or left_out else 0


def _summarise(outcome: Outcome, on_wire: int, seconds: float) -> None:
    parts = [f"{outcome.stored:,} stored"]
    if outcome.already:
        parts.append(f"{outcome.already:,} were there")
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
    """Opens the connections and counts what goes over all of them."""

    def __init__(self, args: argparse.Namespace, address: TcpAddress) -> None:
        self._args = args
        self._address = address
        self._streams: list[CountingStream] = []
        self._reported = False

    def sent(self) -> int:
        """Bytes so far."""
        return sum(stream.sent for stream in self._streams)

    async def connect(self, config: ClientConfig) -> SecureStream[Any]:
        """One connection, handshake and all."""
        host = self._address.host
        try:
            tcp = await trio.open_tcp_stream(
                host, self._address.port, local_address=self._args.bind
            )
        except NO_TCP as error:
            if self._streams:
                raise
            raise cannot_connect(self._address, error) from None
        keep_alive(tcp)
        counting = CountingStream(tcp)
        stream = SecureStream(counting, config, server_hostname=self._args.server_name or host)
        try:
            await stream.do_handshake()
        except trio.BrokenResourceError as error:
            await trio.aclose_forcefully(stream)
            if self._streams:
                raise
            raise handshake_failed(error, config) from None
        self._streams.append(counting)
        report(stream.session, as_json=self._args.json)
        return stream
