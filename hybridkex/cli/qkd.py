"""``hybridkex qkd``: run a simulated QKD link, distil measured detections, scan settings, plot.

``docs/qkd-link.md`` explains the numbers.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from typing import Any, Final

from rich.box import SIMPLE
from rich.console import Console
from rich.live import Live
from rich.table import Table

from hybridkex.cli import qkd_data, qkd_scan
from hybridkex.cli.manual import describe
from hybridkex.cli.running import run_trio
from hybridkex.errors import BlockAborted, ConfigError, LinkError
from hybridkex.link.finite_key import FINITE_KEY
from hybridkex.link.optimise import tuned
from hybridkex.link.party import Block
from hybridkex.link.presets import PRESETS, preset
from hybridkex.link.satellite import SatellitePass
from hybridkex.link.settings import LEAKS, LinkSettings
from hybridkex.link.simulated import BOOTSTRAPS, SimulatedLink
from hybridkex.text import json_line, terminal

__all__ = ["configure", "run"]

WIDTH: Final = 80
"""Columns, where the output is no terminal."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the sub-commands."""
    describe(
        parser,
        "A simulated QKD link: decoy-state BB84 or BBM92 with finite keys, error correction, "
        "privacy amplification and authentication, with an optional eavesdropper.",
        examples=[
            "qkd run --distance 50",
            "qkd distil alice.npz bob.npz",
            "qkd scan --vary distance_km=0:150:5 -o rates.csv",
            "qkd plot --scan rates.csv -o rates.svg",
        ],
        notes="See docs/qkd-link.md.",
    )
    commands = parser.add_subparsers(metavar="command", required=True)

    run_ = commands.add_parser(
        "run",
        help="make blocks of key over a simulated link",
    )
    describe(
        run_,
        "Run Alice and Bob over a simulated fibre. Each block reports what was detected, "
        "corrected, leaked and kept.",
        examples=[
            "qkd run --distance 80 --blocks 5",
            "qkd run --eve intercept:1.0",
            "qkd run --preset rusca2018 --json",
        ],
        status="0 if every block made keys, 1 if one was aborted or the link stopped",
        notes="See docs/qkd-link.md.",
    )
    run_.add_argument(
        "--distance", type=float, default=50.0, metavar="KM", help="of fibre (default: %(default)g)"
    )
    run_.add_argument(
        "--preset",
        metavar="NAME",
        default="lim2014",
        help=f"one of {', '.join(PRESETS)} (default: %(default)s)",
    )
    run_.add_argument(
        "--as-published",
        action="store_true",
        help="use the preset's own intensities, not the best ones for the distance",
    )
    run_.add_argument(
        "--blocks", type=int, default=3, metavar="N", help="how many (default: %(default)s)"
    )
    run_.add_argument(
        "--block-bits",
        type=int,
        default=1_000_000,
        metavar="N",
        help="sifted bits in each (default: %(default)s)",
    )
    run_.add_argument(
        "--key-bits",
        type=int,
        default=256,
        metavar="N",
        help="length of a key (default: %(default)s)",
    )
    run_.add_argument(
        "--eve",
        metavar="WHAT",
        help="an eavesdropper: intercept:SHARE, split:SHARE, pns, mitm, or tamper:BYTE of what "
        "Alice hears",
    )
    run_.add_argument(
        "--bootstrap",
        default="psk",
        choices=BOOTSTRAPS,
        help="of the authentication (default: %(default)s)",
    )
    run_.add_argument(
        "--finite-key",
        default=FINITE_KEY[0],
        choices=FINITE_KEY,
        help="kind of bound (default: %(default)s)",
    )
    run_.add_argument(
        "--leak",
        default=LEAKS[0],
        choices=LEAKS,
        help="whose parities count as leaked (default: %(default)s)",
    )
    run_.add_argument(
        "--satellite",
        type=float,
        metavar="DEG",
        help="a pass of a satellite up to this elevation, in place of a fibre",
    )
    run_.add_argument(
        "--real-time", action="store_true", help="run at the speed of the laser's clock"
    )
    run_.add_argument(
        "--seed", type=int, metavar="N", help="repeat a run exactly; its keys are worth nothing"
    )
    run_.add_argument("--json", action="store_true", help="one JSON line for each block")
    run_.set_defaults(action=_run)

    qkd_data.configure(commands)
    qkd_scan.configure(commands)


def run(args: argparse.Namespace) -> int:
    """Run the sub-command that was chosen."""
    action: Callable[[argparse.Namespace], int] = args.action
    return action(args)


def _run(args: argparse.Namespace) -> int:
    if args.blocks < 1:
        raise ConfigError("--blocks must be positive")
    if args.block_bits < 1:
        raise ConfigError("--block-bits must be positive")
    fading = None if args.satellite is None else SatellitePass(top_elevation_deg=args.satellite)
    chosen = preset(args.preset).at(args.distance if fading is None else 0.0)
    if not args.as_published:
        typical = chosen
        if fading is not None:
            typical = replace(chosen, channel=chosen.channel.with_loss(fading(0.0)))
        best = tuned(typical, args.block_bits, finite_key=args.finite_key)
        chosen = replace(chosen, transmitter=best.transmitter)
    settings = LinkSettings(
        preset=chosen,
        block_bits=args.block_bits,
        key_bits=args.key_bits,
        finite_key=args.finite_key,
        leak=args.leak,
        decoy_check="full" if fading is None else "off",
    )
    link = SimulatedLink(
        settings,
        eve=args.eve,
        bootstrap=args.bootstrap,
        seed=args.seed,
        real_time=args.real_time,
        fading=fading,
    )
    show = _json_lines() if args.json else _table(settings)
    with show as report:
        return run_trio(partial(_make_blocks, link, args.blocks, report))


Report = Callable[[int, Block | LinkError, float], None]


async def _make_blocks(link: SimulatedLink, count: int, report: Report) -> int:
    status = 0
    async with link.open():
        for number in range(1, count + 1):
            began = time.monotonic()
            try:
                alice, bob = await link.block()
            except LinkError as error:
                report(number, error, time.monotonic() - began)
                status = 1
                if not isinstance(error, BlockAborted):
                    break
            else:
                if alice.keys != bob.keys:  # they were verified; this is the proof of it
                    raise LinkError("Alice and Bob have different keys")
                report(number, bob, time.monotonic() - began)
    return status


@contextmanager
def _json_lines() -> Iterator[Report]:
    def report(number: int, outcome: Block | LinkError, seconds: float) -> None:
        line: dict[str, Any]
        if isinstance(outcome, Block):
            line = {**asdict(_without_keys(outcome)), "keys": len(outcome.keys)}
            line["key_ids"] = [str(one.key_id) for one in outcome.keys]
            line["bits_per_second"] = outcome.rate
            line["epsilon"]["total"] = outcome.epsilon.total
        else:
            line = {"number": number, "keys": 0, "aborted": str(outcome)}
            line["link_over"] = not isinstance(outcome, BlockAborted)
        print(json_line({**line, "computed_in": round(seconds, 3)}), flush=True)

    yield report


def _without_keys(block: Block) -> Block:
    return replace(block, keys=())


@contextmanager
def _table(settings: LinkSettings) -> Iterator[Report]:
    """A table that grows; live on a terminal. Reasons of aborts are told below it."""
    channel = settings.preset.channel
    table = Table(
        title=f"{settings.preset.name}, {channel.distance_km:g} km, "
        f"blocks of {settings.block_bits:,} bits",
        caption="Rates are by the laser's clock.",
        box=SIMPLE,
        padding=(0, 1, 0, 0),
    )
    for name in ("block", "sifted", "QBER", "f", "leak", "secret bits", "bit/s", "keys", "s"):
        table.add_column(name, justify="right")
    told: list[str] = []

    def report(number: int, outcome: Block | LinkError, seconds: float) -> None:
        if isinstance(outcome, Block):
            table.add_row(
                str(number),
                f"{outcome.sifted:,}",
                "-" if outcome.qber is None else f"{outcome.qber:.2%}",
                "-" if outcome.efficiency is None else f"{outcome.efficiency:.3f}",
                f"{outcome.leak:,}",
                f"{outcome.secret_bits:,}",
                f"{outcome.rate:,.0f}",
                str(len(outcome.keys)),
                f"{seconds:.2f}",
            )
            if not told:
                told.append(_epsilon(outcome))
        else:
            table.add_row(str(number), *["-"] * 7, f"{seconds:.2f}")
            told.append(f"block {number}: NO KEY: {terminal(outcome)}")

    console = Console(file=sys.stdout)
    if not console.is_terminal:
        console = Console(file=sys.stdout, width=WIDTH)
        yield report
        console.print(table)
    else:
        with Live(table, console=console, refresh_per_second=4):
            yield report
    for line in told:
        print(line)


def _epsilon(block: Block) -> str:
    part = block.epsilon
    base = " if no signature was forged" if part.conditional else ""
    return (
        f"epsilon of block {block.number}: {part.total:.2g}{base} "
        f"({part.secrecy:.2g} secrecy, {part.correctness:.2g} correctness,\n"
        f"{part.authentication:.2g} authentication, {part.inherited:.2g} of earlier blocks)"
    )
