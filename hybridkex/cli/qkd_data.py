"""``hybridkex qkd record`` and ``distil``: detections in files."""

import argparse
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import trio
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from hybridkex.cli.manual import describe
from hybridkex.cli.running import run_trio
from hybridkex.cli.tcp import NO_TCP, cannot_connect, cannot_listen
from hybridkex.errors import ConfigError, LinkError
from hybridkex.files import read_file, write_file
from hybridkex.link.authentication import Signatures
from hybridkex.link.finite_key import FINITE_KEY
from hybridkex.link.measured import (
    Measured,
    alice_of,
    bob_of,
    distil,
    read_measured,
    write_measured,
)
from hybridkex.link.optimise import tuned
from hybridkex.link.party import Block
from hybridkex.link.presets import PRESETS, preset
from hybridkex.link.quantum import OpticalLink
from hybridkex.link.settings import DECOY_CHECKS, LEAKS, LinkSettings
from hybridkex.net.address import parse_tcp_address
from hybridkex.text import json_line

__all__ = ["configure"]

WAIT: Final = 60.0
"""Seconds that one end waits for the other."""


def configure(commands: Any) -> None:
    """Add the two commands."""
    record = commands.add_parser("record", help="simulate detections and write them to files")
    describe(
        record,
        "Simulate the light of a link and write what Alice and what Bob know of the detections, "
        "in the format that 'qkd distil' reads.",
        examples=["qkd record --detections 200000 -o data", "qkd distil data/*.npz"],
        notes="See docs/qkd-link.md for the format.",
    )
    record.add_argument(
        "--preset",
        metavar="NAME",
        default="lim2014",
        help=f"one of {', '.join(PRESETS)} (default: %(default)s)",
    )
    record.add_argument(
        "--distance", type=float, default=50.0, metavar="KM", help="of fibre (default: %(default)g)"
    )
    record.add_argument(
        "--detections", type=int, default=1_000_000, metavar="N", help="default: %(default)s"
    )
    record.add_argument(
        "--as-published",
        action="store_true",
        help="use the preset's own intensities, not the best ones for the distance",
    )
    record.add_argument("--seed", type=int, metavar="N", help="repeat a run exactly")
    record.add_argument("--parquet", action="store_true", help="write Parquet (needs pyarrow)")
    record.add_argument(
        "-o", "--output", required=True, type=Path, metavar="FOLDER", help="for alice and bob"
    )
    record.set_defaults(action=_record)

    command = commands.add_parser("distil", help="make keys of measured detections")
    describe(
        command,
        "Make keys of measured detections: sifting, error correction, privacy amplification. With "
        "the files of both parties, both run here. With one file, this end runs Alice or Bob (the "
        "file says which) and reaches the other over TCP, authenticated by signatures.",
        examples=[
            "qkd distil alice.npz bob.npz",
            "qkd distil alice.npz --listen 0.0.0.0:7000 --key a.key --peer b.pem",
            "qkd distil bob.npz --connect alice:7000 --key b.key --peer a.pem",
        ],
        status="0 if keys were made, 1 if not",
        notes="See docs/qkd-link.md for the file format.",
    )
    command.add_argument("files", nargs="+", type=Path, metavar="FILE", help=".npz or .parquet")
    where = command.add_mutually_exclusive_group()
    where.add_argument("--listen", metavar="HOST:PORT", help="wait for the other end here")
    where.add_argument("--connect", metavar="HOST:PORT", help="reach the other end there")
    command.add_argument("--key", type=Path, metavar="FILE", help="our private key, PEM")
    command.add_argument("--peer", type=Path, metavar="FILE", help="the other end's certificate")
    command.add_argument(
        "--keys", type=Path, metavar="FILE", help="write keys: ID and hex, a line each"
    )
    command.add_argument(
        "--key-bits", type=int, default=256, metavar="N", help="of a key (default: %(default)s)"
    )
    command.add_argument(
        "--decoy-check",
        choices=DECOY_CHECKS,
        default="shares",
        help="compare with the file's channel (default: %(default)s)",
    )
    command.add_argument(
        "--finite-key", choices=FINITE_KEY, default=FINITE_KEY[0], help="default: %(default)s"
    )
    command.add_argument(
        "--leak",
        choices=LEAKS,
        default=LEAKS[0],
        help="whose parities count as leaked (default: %(default)s)",
    )
    command.set_defaults(action=_distil)


def _record(args: argparse.Namespace) -> int:
    if not 1 <= args.detections <= 100_000_000:
        raise ConfigError("--detections lies between 1 and 100000000")
    chosen = preset(args.preset).at(args.distance)
    if not args.as_published:
        chosen = tuned(chosen, max(1000, args.detections // 2))
    light = OpticalLink(chosen.channel, chosen.transmitter, seed=args.seed)
    seen = run_trio(partial(light.detect, args.detections))
    sent = light.record.recall(seen.pulse)
    ending = ".parquet" if args.parquet else ".npz"
    try:
        args.output.mkdir(exist_ok=True)
        for name, measured in (
            (
                "alice",
                Measured(
                    pulse=seen.pulse, basis=sent.basis, bit=sent.bit, intensity=sent.intensity
                ),
            ),
            ("bob", Measured(pulse=seen.pulse, basis=seen.basis, bit=seen.bit)),
        ):
            path = args.output / f"{name}{ending}"
            write_measured(path, measured, chosen)
            print(path)
    except OSError as error:
        raise ConfigError(f"cannot write to {args.output}: {error.strerror}") from None
    return 0


def _distil(args: argparse.Namespace) -> int:
    if len(args.files) > 2:
        raise ConfigError("give the file of one party, or those of both")
    read = [read_measured(path) for path in args.files]
    settings = LinkSettings(
        preset=read[0][1],
        key_bits=args.key_bits,
        decoy_check=args.decoy_check,
        finite_key=args.finite_key,
        leak=args.leak,
    )
    measured = [one for one, _ in read]
    try:
        block = (
            _both(measured, settings)
            if len(measured) == 2
            else run_trio(partial(_one, measured[0], settings, args))
        )
    except LinkError as error:
        print(json_line({"keys": 0, "aborted": str(error)}))
        return 1
    if args.keys is not None:
        lines = "".join(f"{one.key_id} {one.key.reveal().hex()}\n" for one in block.keys)
        try:
            write_file(args.keys, lines.encode())
        except OSError as error:
            raise ConfigError(f"cannot write {args.keys}: {error.strerror}") from None
    line = {**asdict(replace(block, keys=())), "keys": len(block.keys)}
    line["epsilon"]["total"] = block.epsilon.total
    print(json_line(line))
    return 0


def _both(measured: list[Measured], settings: LinkSettings) -> Block:
    measured.sort(key=lambda one: one.intensity is None)
    if measured[0].intensity is None or measured[1].intensity is not None:
        raise ConfigError("one of the two files must be Alice's and one Bob's")
    return distil(measured[0], measured[1], settings)[1]


async def _one(measured: Measured, settings: LinkSettings, args: argparse.Namespace) -> Block:
    if args.key is None or args.peer is None or not (args.listen or args.connect):
        raise ConfigError("with one file, give --listen or --connect, --key and --peer")
    signatures = _signatures(args.key, args.peer)
    stream = await _stream(args)
    async with stream:
        make = bob_of if measured.intensity is None else alice_of
        return await make(measured, settings, stream, signatures).block()


async def _stream(args: argparse.Namespace) -> trio.SocketStream:
    if args.connect:
        there = parse_tcp_address(args.connect)
        patience = trio.current_time() + WAIT
        while True:
            try:
                return await trio.open_tcp_stream(there.host, there.port)
            except NO_TCP as error:
                if trio.current_time() > patience or isinstance(error, UnicodeError):
                    raise cannot_connect(there, error) from None
            await trio.sleep(1.0)
    here = parse_tcp_address(args.listen)
    try:
        listeners = await trio.open_tcp_listeners(here.port, host=here.host)
    except NO_TCP as error:
        raise cannot_listen(here, error) from None
    try:
        with trio.fail_after(WAIT):
            return await listeners[0].accept()
    except trio.TooSlowError:
        raise LinkError(f"the other end did not connect within {WAIT:.0f} seconds") from None
    finally:
        for listener in listeners:
            await listener.aclose()


def _signatures(key: Path, peer: Path) -> Signatures:
    try:
        own = load_pem_private_key(read_file(key, what="private key"), None)
        other = x509.load_pem_x509_certificate(read_file(peer, what="certificate"))
        return Signatures(own, other.public_key())
    except (ValueError, TypeError):
        raise ConfigError(f"{key} or {peer} cannot authenticate a link") from None
