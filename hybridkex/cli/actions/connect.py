"""``hybridkex connect``: a secure channel to a server, in the manner of ``s_client -quiet``."""

from functools import partial

import trio

from hybridkex.apps.handshakes import handshake_failed
from hybridkex.cli.channel import client_config
from hybridkex.cli.connect import ConnectOptions
from hybridkex.cli.pipe import ChannelFailed, pipe, report, report_epochs
from hybridkex.cli.running import run_trio
from hybridkex.cli.tcp import NO_TCP, cannot_connect, checked_port
from hybridkex.errors import ConfigError
from hybridkex.net.address import TcpAddress
from hybridkex.shell.ticket_file import FileTicketStore
from hybridkex.streams import SecureStream
from hybridkex.tls.config import ClientConfig


def run(options: ConnectOptions) -> int:
    """Connect; 0 after a clean close."""
    run_trio(partial(_run, options))
    return 0


async def _run(options: ConnectOptions) -> None:
    channel = options.channel
    if options.resume is not None and (channel.fresh_keys is not None or channel.one_time_pad):
        other = "--fresh-keys" if channel.fresh_keys is not None else "--one-time-pad"
        raise ConfigError(
            f"--resume and {other} exclude each other: a stolen ticket would undo what new keys "
            "give"
        )
    tickets = FileTicketStore(options.resume) if options.resume is not None else None
    async with client_config(options.channel, ticket_store=tickets) as config:
        await _connect(options, config)


async def _connect(options: ConnectOptions, config: ClientConfig) -> None:
    port = checked_port(options.port)
    try:
        tcp = await trio.open_tcp_stream(options.host, port, local_address=options.channel.bind)
    except NO_TCP as error:
        raise cannot_connect(TcpAddress(options.host, port), error) from None
    stream = SecureStream(tcp, config, server_hostname=options.server_name or options.host)
    async with stream:
        try:
            await stream.do_handshake()
        except trio.BrokenResourceError as error:
            raise ChannelFailed(handshake_failed(error, config)) from None
        report(stream.session, as_json=options.channel.json)
        try:
            await pipe(stream)
        finally:
            report_epochs(stream.session, as_json=options.channel.json)
