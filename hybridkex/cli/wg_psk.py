"""``hybridkex wg-psk``: rotates the pre-shared key of a WireGuard tunnel, on a timer."""

import argparse
import json
import logging
import shlex
import sys
from pathlib import Path
from typing import Any, Final

import trio

from hybridkex.apps.backoff import Backoff
from hybridkex.apps.tcp import watch_peer
from hybridkex.auth import Pins, RawIdentity
from hybridkex.cli.key_sources import add_qkd_options, key_sources, qkd_requirement
from hybridkex.cli.logs import add_log_options, set_up_logging
from hybridkex.cli.manual import describe
from hybridkex.cli.port_file import write_port
from hybridkex.cli.running import run_trio
from hybridkex.cli.tcp import NO_TCP, cannot_connect, cannot_listen
from hybridkex.combiner import Exchanged, PskAuthentication, SignatureAuthentication
from hybridkex.combiner.wireguard import REKEY_AFTER, Tunnel, rotate
from hybridkex.errors import ConfigError, HybridkexError, LocalStateError
from hybridkex.net.address import TcpAddress, parse_tcp_address
from hybridkex.net.supervisor import Connection, Supervisor
from hybridkex.qkd.source import KeySource
from hybridkex.qkd.store import read_key_file
from hybridkex.tls.policy import Requirement

__all__ = ["configure", "run"]

DEFAULT_PORT: Final = 4436
STRANGERS: Final = 64
"""Exchanges at once at the responder: more than one peer needs, few enough to bear."""

log = logging.getLogger(__name__)


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    describe(
        parser,
        "Agree on a fresh pre-shared key with the other end of a WireGuard tunnel, and install it "
        "on both sides with 'wg set'. One side listens, the other connects every --interval "
        "seconds. A rotation that fails leaves the old key in force, says why, and is tried again.",
        examples=[
            "wg-psk --listen 4436 --interface wg0 --peer-key KEY --local b --peer a \\\n"
            "      --key b.pem --pin PIN_OF_A",
            "wg-psk --connect b.example.org --interface wg0 --peer-key KEY --local a --peer b \\\n"
            "      --key a.pem --pin PIN_OF_B --key-pool a.pool",
        ],
        status="0 after --once, 1 when it failed or the options make no sense",
        notes="See docs/combiner.md.",
    )
    role = parser.add_mutually_exclusive_group(required=True)
    role.add_argument(
        "--connect",
        metavar="HOST[:PORT]",
        help=f"the other end listens there (port {DEFAULT_PORT} if none is given)",
    )
    role.add_argument("--listen", metavar="[ADDR:]PORT", help="wait for the other end; 0 picks")
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
    names = parser.add_argument_group("who we are, and who the peer is")
    names.add_argument("--local", required=True, metavar="NAME", help="our name")
    names.add_argument("--peer", required=True, metavar="NAME", help="the other end's --local")
    names.add_argument("--key", type=Path, metavar="FILE", help="our private key (PEM)")
    names.add_argument(
        "--pin",
        action="append",
        default=[],
        metavar="HEX",
        help="SHA-256 of the peer's public key (SPKI); it goes with --key",
    )
    names.add_argument(
        "--psk-file",
        type=Path,
        metavar="FILE",
        help="in place of --key and --pin: 32 bytes in hex that both ends have (mode 600)",
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
    when.add_argument("--once", action="store_true", help="one rotation, then end")
    when.add_argument("--port-file", metavar="FILE", help="write the port that we listen on here")
    when.add_argument(
        "--json", action="store_true", help="one JSON line on standard output for each rotation"
    )
    add_qkd_options(parser)
    add_log_options(parser)


def run(args: argparse.Namespace) -> int:
    """Rotate until told to stop; with ``--once``, once."""
    if not args.interval > 0:
        raise ConfigError("--interval must be positive")
    if qkd_requirement(args) is Requirement.PREFER:
        raise ConfigError("--qkd prefer: both ends agree beforehand on whether a QKD key goes in")
    try:
        command = tuple(shlex.split(args.wg))
    except ValueError as error:
        raise ConfigError(f"--wg is not a command: {error}") from None
    tunnel = Tunnel(interface=args.interface, peer_key=args.peer_key, command=command)
    rotator = _Rotator(args, tunnel)
    set_up_logging(args)

    async def main() -> None:
        async with key_sources(args) as sources:
            if len(sources) > 1:
                raise ConfigError("one --peer-sae: a tunnel has one other end")
            rotator.source = sources[0] if sources else None
            if args.connect is not None:
                address = parse_tcp_address(args.connect, default_port=DEFAULT_PORT)
                await rotator.connect(address)
            else:
                await rotator.listen(args.listen)

    run_trio(main)
    return 0


def _authentication(args: argparse.Namespace) -> PskAuthentication | SignatureAuthentication:
    if args.psk_file is not None:
        if args.key is not None or args.pin:
            raise ConfigError("--psk-file takes the place of --key and --pin")
        return PskAuthentication(read_key_file(args.psk_file))
    if args.key is None or not args.pin:
        raise ConfigError("how to know the peer: --key FILE and --pin HEX, or --psk-file FILE")
    return SignatureAuthentication(RawIdentity.from_file(args.key), Pins(frozenset(args.pin)))


class _Rotator:
    """One end of one tunnel."""

    def __init__(self, args: argparse.Namespace, tunnel: Tunnel) -> None:
        self._args = args
        self._tunnel = tunnel
        self._options: dict[str, Any] = {
            "local": args.local,
            "peer": args.peer,
            "authentication": _authentication(args),
        }
        self.source: KeySource | None = None

    async def connect(self, address: TcpAddress) -> None:
        """The initiator: rotate, wait, again; after a failure sooner."""
        backoff = Backoff(first=min(1.0, self._args.interval), most=self._args.interval)
        while True:
            try:
                await self._initiate(address)
            except HybridkexError as error:
                if self._args.once:
                    raise
                wait = backoff.next()
                log.warning("the old key stays: %s; again in %.0f s", error, wait)
                await trio.sleep(wait)
                continue
            if self._args.once:
                return
            backoff.reset()
            await trio.sleep(self._args.interval)

    async def _initiate(self, address: TcpAddress) -> None:
        try:
            with trio.fail_after(10):
                stream = await trio.open_tcp_stream(address.host, address.port)
        except trio.TooSlowError:
            raise LocalStateError(f"cannot connect to {address}: no answer in 10 s") from None
        except NO_TCP as error:
            raise cannot_connect(address, error) from None
        async with stream:
            await self._rotate(stream, "initiator")

    async def listen(self, where: str) -> None:
        """The responder: serve whoever connects, and let the exchange tell the peer apart."""
        address = parse_tcp_address(where if ":" in where else f"0.0.0.0:{where}")
        try:
            listeners = await trio.open_tcp_listeners(address.port, host=address.host)
        except NO_TCP as error:
            raise cannot_listen(address, error) from None
        write_port(self._args.port_file, listeners[0])
        async with trio.open_nursery() as nursery:

            async def serve(stream: trio.SocketStream, _: Connection) -> None:
                watch_peer(stream)
                await self._rotate(stream, "responder")
                if self._args.once:
                    nursery.cancel_scope.cancel()

            # Nobody is admitted: an exchange is all that a connection is for, and the supervisor
            # ends those that take too long, or whose place a newcomer needs.
            supervisor = Supervisor(serve, name="wg-psk", logger=log, handshakes=STRANGERS)
            nursery.start_soon(supervisor.serve, listeners)

    async def _rotate(self, stream: trio.SocketStream, role: Any) -> None:
        result = await rotate(
            stream, self._tunnel, role=role, key_source=self.source, **self._options
        )
        self._report(result)

    def _report(self, result: Exchanged) -> None:
        interface = self._tunnel.interface
        legs = [*result.parts, *(["QKD"] if result.qkd_key_ids else [])]
        if self._args.json:
            line = {
                "interface": interface,
                "peer": self._args.peer,
                "rests_on": legs,
                "qkd_key_ids": list(result.qkd_key_ids),
            }
            print(json.dumps(line), flush=True)
        rests = ", ".join(legs)
        log.info("%s: a new pre-shared key with %s, from %s", interface, self._args.peer, rests)
        sys.stdout.flush()
