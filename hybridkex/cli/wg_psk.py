"""``hybridkex wg-psk``: rotates the pre-shared key of a WireGuard tunnel."""

import argparse
import shlex
from functools import partial
from pathlib import Path
from typing import Final, Literal

import trio

from hybridkex.apps.port_file import write_port
from hybridkex.apps.tcp import watch_peer
from hybridkex.apps.wireguard import LABEL, REKEY_AFTER, RotationPolicy, Rotator, Tunnel
from hybridkex.auth import Pins, RawIdentity
from hybridkex.cli.key_sources import add_exchange_qkd_options, key_sources
from hybridkex.cli.logs import add_log_options, set_up_logging
from hybridkex.cli.manual import describe
from hybridkex.cli.running import run_trio
from hybridkex.cli.tcp import NO_TCP, cannot_connect, cannot_listen
from hybridkex.cli.values import file_path
from hybridkex.combiner import (
    ExchangeConfig,
    Exchanged,
    PskAuthentication,
    SignatureAuthentication,
)
from hybridkex.errors import ConfigError, HybridkexError, LocalStateError
from hybridkex.net.address import TcpAddress, parse_tcp_address
from hybridkex.net.supervisor import Budget, Connection, Supervisor
from hybridkex.qkd.source import KeySource
from hybridkex.qkd.store import read_key_file
from hybridkex.text import get_logger, json_line
from hybridkex.tls.policy import Requirement

__all__ = ["configure", "run"]

DEFAULT_PORT: Final = 4436
_CONNECT_WITHIN: Final = 10.0
_ROTATIONS: Final = 4
"""Authenticated connections at once: the peer needs one."""

Authentication = PskAuthentication | SignatureAuthentication

log = get_logger(__name__)


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    describe(
        parser,
        "Agree on a fresh pre-shared key with the other end of a WireGuard tunnel, and install it "
        "on both sides with 'wg set'. One side listens, the other connects every --interval "
        "seconds. The tunnel carries traffic only under a fresh key: a random key blocks it until "
        "the first rotation, and again once the agreed key is older than --max-age. A rotation "
        "that fails is logged with its reason and the key that stays in force, and is repeated.",
        examples=[
            "wg-psk --listen 4436 --interface wg0 --peer-key KEY --local b --peer a \\\n"
            "      --key b.pem --pin PIN_OF_A",
            "wg-psk --connect b.example.org --interface wg0 --peer-key KEY --local a --peer b \\\n"
            "      --key a.pem --pin PIN_OF_B --key-pool a.pool",
        ],
        status="0 after --once, 1 if that failed or the options cannot work",
        notes="See docs/combiner.md.",
    )
    role = parser.add_mutually_exclusive_group(required=True)
    role.add_argument(
        "--connect",
        metavar="HOST[:PORT]",
        help=f"where the other end listens (default port: {DEFAULT_PORT})",
    )
    role.add_argument(
        "--listen", metavar="[ADDR:]PORT", help="wait for the other end; port 0 picks a free one"
    )
    tunnel = parser.add_argument_group("the tunnel")
    tunnel.add_argument(
        "--interface",
        required=True,
        metavar="NAME",
        help="the WireGuard interface, for example wg0",
    )
    tunnel.add_argument(
        "--peer-key", required=True, metavar="BASE64", help="the peer's WireGuard public key"
    )
    tunnel.add_argument(
        "--wg",
        default="wg",
        metavar="COMMAND",
        help="how to call wg, for example 'sudo wg' (default: %(default)s)",
    )
    names = parser.add_argument_group("the two ends")
    names.add_argument("--local", required=True, metavar="NAME", help="our name")
    names.add_argument("--peer", required=True, metavar="NAME", help="the other end's --local")
    names.add_argument("--key", type=file_path, metavar="FILE", help="our private key (PEM)")
    names.add_argument(
        "--pin",
        action="append",
        default=[],
        metavar="HEX",
        help="SHA-256 of the peer's public key (SPKI); requires --key",
    )
    names.add_argument(
        "--psk-file",
        type=Path,
        metavar="FILE",
        help="instead of --key and --pin: a file with 32 bytes in hex that both ends share "
        "(mode 600)",
    )
    when = parser.add_argument_group("when")
    when.add_argument(
        "--interval",
        type=float,
        default=REKEY_AFTER,
        metavar="SECONDS",
        help=f"between rotations (default {REKEY_AFTER:g}, as often as WireGuard re-keys); "
        "the side that connects decides",
    )
    when.add_argument(
        "--max-age",
        type=float,
        metavar="SECONDS",
        help="age at which a key is no longer fresh (default: three intervals)",
    )
    when.add_argument(
        "--fresh-psk",
        choices=[Requirement.REQUIRE.value, Requirement.PREFER.value],
        default=Requirement.REQUIRE.value,
        help="without a fresh key, stop the tunnel with a random one (require, the default), or "
        "log a warning and go on (prefer)",
    )
    when.add_argument(
        "--initial-psk",
        choices=["random", "keep"],
        help="before the first rotation: block the tunnel with a random key (default with "
        "--fresh-psk require), or keep the key that is installed, if any (default with prefer "
        "and with --once)",
    )
    when.add_argument("--once", action="store_true", help="rotate once, then exit")
    when.add_argument(
        "--port-file",
        type=file_path,
        metavar="FILE",
        help="write the port that is listened on here",
    )
    when.add_argument(
        "--json", action="store_true", help="one JSON line on standard output for each rotation"
    )
    add_exchange_qkd_options(parser)
    add_log_options(parser)


def run(args: argparse.Namespace) -> int:
    """Rotate until told to stop; with ``--once``, once."""
    try:
        command = tuple(shlex.split(args.wg))
    except ValueError as error:
        raise ConfigError(f"--wg is not a command: {error}") from None
    tunnel = Tunnel(interface=args.interface, peer_key=args.peer_key, command=command)
    initial: Literal["random", "keep"] | None = args.initial_psk or ("keep" if args.once else None)
    policy = RotationPolicy(
        interval=args.interval,
        max_age=args.max_age,
        fresh_psk=Requirement(args.fresh_psk),
        initial=initial,
    )
    authentication = _authentication(args)
    set_up_logging(args.log_level)
    run_trio(partial(_rotate, args, tunnel, policy, authentication))
    return 0


def _authentication(args: argparse.Namespace) -> Authentication:
    if args.psk_file is not None:
        if args.key is not None or args.pin:
            raise ConfigError("--psk-file cannot be combined with --key and --pin")
        return PskAuthentication(read_key_file(args.psk_file))
    if args.key is None or not args.pin:
        raise ConfigError("to authenticate the peer, give --key and --pin, or --psk-file")
    return SignatureAuthentication(RawIdentity.from_file(args.key), Pins(frozenset(args.pin)))


async def _rotate(
    args: argparse.Namespace,
    tunnel: Tunnel,
    policy: RotationPolicy,
    authentication: Authentication,
) -> None:
    async with key_sources(args) as sources:
        if len(sources) > 1:
            raise ConfigError("give one --peer-sae: a tunnel has one other end")
        source: KeySource | None = sources[0] if sources else None
        config = ExchangeConfig(
            role="initiator" if args.connect is not None else "responder",
            local=args.local,
            peer=args.peer,
            authentication=authentication,
            label=LABEL,
            key_source=source,
        )
        rotator = Rotator(
            tunnel,
            config,
            policy,
            on_rotated=partial(_report_rotation, args),
            on_overdue=partial(_report_overdue, args),
        )
        if args.connect is not None:
            await _connect(args, rotator)
        else:
            await _listen(args, rotator)


async def _connect(args: argparse.Namespace, rotator: Rotator) -> None:
    """The initiator."""
    address = parse_tcp_address(args.connect, default_port=DEFAULT_PORT)

    async def connect() -> trio.SocketStream:
        return await _open_stream(address)

    await rotator.start()
    if args.once:
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


async def _listen(args: argparse.Namespace, rotator: Rotator) -> None:
    """The responder: anybody may connect; the exchange authenticates the peer."""
    address = parse_tcp_address(args.listen if ":" in args.listen else f"0.0.0.0:{args.listen}")
    try:
        listeners = await trio.open_tcp_listeners(address.port, host=address.host)
    except NO_TCP as error:
        raise cannot_listen(address, error) from None
    budget = Budget(_ROTATIONS, what="rotations")
    interface = rotator.tunnel.interface

    async with trio.open_nursery() as nursery:

        async def serve(stream: trio.SocketStream, connection: Connection) -> None:
            watch_peer(stream)
            authenticated = False

            def admit() -> None:
                nonlocal authenticated
                connection.admit(budget)
                authenticated = True

            try:
                await rotator.respond(stream, on_authenticated=admit)
            except HybridkexError as error:
                if not authenticated:
                    raise  # A stranger, for the supervisor to log at a bounded rate.
                log.warning("%s: rotation failed: %s; %s", interface, error, rotator.standing)
                return
            if args.once:
                nursery.cancel_scope.cancel()

        await rotator.start()
        write_port(args.port_file, listeners[0].socket.getsockname()[1])
        nursery.start_soon(rotator.watch)
        await Supervisor(serve, name=f"wg-psk {interface}", logger=log).serve(listeners)


def _report_rotation(args: argparse.Namespace, result: Exchanged) -> None:
    legs = [*result.parts, *(["QKD"] if result.qkd_key_ids else [])]
    _report(args, "rotated", rests_on=legs, qkd_key_ids=list(result.qkd_key_ids))


def _report_overdue(args: argparse.Namespace, policy: Requirement) -> None:
    _report(args, "stopped" if policy is Requirement.REQUIRE else "overdue")


def _report(args: argparse.Namespace, event: str, **details: object) -> None:
    if args.json:
        line = {"event": event, "interface": args.interface, "peer": args.peer, **details}
        print(json_line(line), flush=True)
