"""``hybridkex wg-psk``: rotates the pre-shared key of a WireGuard tunnel."""

import errno
import logging
import shlex
import signal
import sys
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from functools import partial
from typing import Final

import trio

from hybridkex.apps.port_file import write_port
from hybridkex.apps.wireguard import LABEL, RotationPolicy, Rotator, Tunnel
from hybridkex.auth import Pins, RawIdentity
from hybridkex.cli.key_sources import key_sources
from hybridkex.cli.logs import set_up_logging
from hybridkex.cli.running import EndRequest, run_service
from hybridkex.cli.standard_streams import discard_standard_output, takes_output
from hybridkex.cli.tcp import NO_TCP, cannot_connect, opening
from hybridkex.cli.wg_psk import DEFAULT_PORT, WgPskOptions
from hybridkex.combiner import (
    ExchangeConfig,
    Exchanged,
    PskAuthentication,
    SignatureAuthentication,
)
from hybridkex.errors import ConfigError, HybridkexError, LocalStateError
from hybridkex.net.address import TcpAddress, parse_tcp_address
from hybridkex.net.budget import Budget, Connection
from hybridkex.net.descriptors import raise_soft_limit
from hybridkex.net.listening import open_tcp_listeners
from hybridkex.net.sockets import watch_peer
from hybridkex.net.supervisor import Supervisor
from hybridkex.qkd.source import KeySource
from hybridkex.qkd.store import read_key_file
from hybridkex.text import get_logger, json_line
from hybridkex.tls.policy import Requirement

_CONNECT_WITHIN: Final = 10.0
_ROTATIONS: Final = 4
"""Simultaneous authenticated connections: the peer needs one."""

Authentication = PskAuthentication | SignatureAuthentication

log = get_logger("hybridkex.cli.wg_psk")


def run(options: WgPskOptions) -> int:
    """Rotate until a signal arrives; with ``--once``, once."""
    try:
        command = tuple(shlex.split(options.wg))
    except ValueError as error:
        raise ConfigError(f"--wg is not a command: {error}") from None
    tunnel = Tunnel(interface=options.interface, peer_key=options.peer_key, command=command)
    initial = options.initial_psk or ("keep" if options.once else None)
    policy = RotationPolicy(
        interval=options.interval,
        max_age=options.max_age,
        fresh_psk=Requirement(options.fresh_psk),
        initial=initial,
    )
    authentication = _authentication(options)
    set_up_logging(options.log_level)
    raise_soft_limit()
    work = partial(_rotate, options, tunnel, policy, authentication)
    run_service(partial(_until_signal, work, options.once))
    return 0


async def _until_signal(
    work: Callable[[], Awaitable[None]], once: bool, request: EndRequest
) -> None:
    """Work until SIGTERM or SIGHUP; a ``wg`` that is running then ends with us, and does not
    outlive us with a key in its input.

    Raises:
        LocalStateError: with ``once``, a signal came before the rotation.
    """
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGHUP) as received:
        async with trio.open_nursery() as nursery:

            async def wait() -> None:
                request.note(await anext(received))
                nursery.cancel_scope.cancel()

            nursery.start_soon(wait)
            await work()
            nursery.cancel_scope.cancel()
    if once and request.signal is not None:
        raise LocalStateError(f"ended by {request.signal.name} before the rotation")
    if once:
        request.finish()


def _authentication(options: WgPskOptions) -> Authentication:
    if options.psk_file is not None:
        if options.key is not None or options.pin:
            raise ConfigError("--psk-file cannot be combined with --key and --pin")
        return PskAuthentication(read_key_file(options.psk_file))
    if options.key is None or not options.pin:
        raise ConfigError("to authenticate the peer, give --key and --pin, or --psk-file")
    return SignatureAuthentication(RawIdentity.from_file(options.key), Pins(frozenset(options.pin)))


async def _rotate(
    options: WgPskOptions,
    tunnel: Tunnel,
    policy: RotationPolicy,
    authentication: Authentication,
) -> None:
    async with key_sources(options.qkd) as sources:
        if len(sources) > 1:
            raise ConfigError("give --peer-sae once: a tunnel has one peer")
        source: KeySource | None = sources[0] if sources else None
        config = ExchangeConfig(
            role="initiator" if options.connect is not None else "responder",
            local=options.local,
            peer=options.peer,
            authentication=authentication,
            label=LABEL,
            key_source=source,
        )
        rotator = Rotator(
            tunnel,
            config,
            policy,
            on_rotated=partial(_report_rotation, options),
            on_overdue=partial(_report_overdue, options),
        )
        if options.connect is not None:
            address = parse_tcp_address(options.connect, default_port=DEFAULT_PORT)
            await _connect(address, rotator, once=options.once)
        else:
            await _listen(options, rotator)


async def _connect(address: TcpAddress, rotator: Rotator, *, once: bool) -> None:
    connect = partial(_open_stream, address)
    await rotator.start()
    if once:
        await rotator.initiate(connect)
        return
    async with trio.open_nursery() as nursery:
        nursery.start_soon(rotator.watch)
        nursery.start_soon(rotator.run_initiator, connect)


async def _open_stream(address: TcpAddress) -> trio.SocketStream:
    try:
        with trio.fail_after(_CONNECT_WITHIN):
            stream = await trio.open_tcp_stream(address.host, address.port)
    except trio.TooSlowError:
        raise LocalStateError(
            f"cannot connect to {address}: no answer within {_CONNECT_WITHIN:g} s"
        ) from None
    except NO_TCP as error:
        raise cannot_connect(address, error) from None
    watch_peer(stream)
    return stream


async def _listen(options: WgPskOptions, rotator: Rotator) -> None:
    """The responder: anyone may connect; the exchange authenticates the peer."""
    where = options.listen or ""  # --connect and --listen exclude each other
    address = parse_tcp_address(where if ":" in where else f"0.0.0.0:{where}")
    with opening(address):
        listeners = await open_tcp_listeners(address.port, host=address.host)
    budget = Budget(_ROTATIONS, what="rotations")
    interface = rotator.tunnel.interface

    async with AsyncExitStack() as stack, trio.open_nursery() as nursery:
        for listener in listeners:
            stack.push_async_callback(listener.aclose)

        async def serve(stream: trio.SocketStream, connection: Connection) -> None:
            watch_peer(stream)
            authenticated = False

            def admit() -> None:
                nonlocal authenticated
                connection.recognize()
                connection.admit(budget)
                authenticated = True

            try:
                await rotator.respond(stream, on_authenticated=admit)
            except HybridkexError as error:
                if not authenticated:
                    raise  # Not our peer: the supervisor logs it at a bounded rate.
                text = "%s: rotation failed: %s; %s"
                connection.log.log(logging.WARNING, text, interface, error, rotator.standing)
                return
            if options.once:
                nursery.cancel_scope.cancel()

        # First what can fail and changes nothing.
        write_port(options.port_file, listeners[0].socket.getsockname()[1])
        await rotator.start()
        nursery.start_soon(rotator.watch)
        await Supervisor(serve, name=f"wg-psk {interface}", logger=log).serve(listeners)


def _report_rotation(options: WgPskOptions, result: Exchanged) -> None:
    legs = [*result.parts, *(["QKD"] if result.qkd_key_ids else [])]
    _report(options, "rotated", rests_on=legs, qkd_key_ids=list(result.qkd_key_ids))


def _report_overdue(options: WgPskOptions, policy: Requirement) -> None:
    _report(options, "stopped" if policy is Requirement.REQUIRE else "overdue")


def _report(options: WgPskOptions, event: str, **details: object) -> None:
    if not options.json:
        return
    line = {"event": event, "interface": options.interface, "peer": options.peer, **details}
    try:
        if not takes_output(sys.stdout.fileno(), 0.0):
            raise BlockingIOError(errno.EAGAIN, "the reader of standard output does not read")
        print(json_line(line), flush=True)
    except BrokenPipeError:
        # Rotations continue without a reader of the output.
        discard_standard_output()
        log.warning(
            "the reader of standard output has closed it: no more JSON lines; rotations continue"
        )
    except OSError as error:
        log.warning("cannot write a JSON line: %s; rotations continue", error.strerror)
