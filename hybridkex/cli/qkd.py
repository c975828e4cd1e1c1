"""``hybridkex qkd``: run a simulated QKD link, draw what it gives over distance.

``docs/qkd-link.md`` explains the numbers.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.live import Live
from rich.table import Table

from hybridkex.cli.manual import describe
from hybridkex.cli.running import run_trio
from hybridkex.errors import BlockAborted, ConfigError, LinkError
from hybridkex.link.optimise import tuned
from hybridkex.link.party import Block
from hybridkex.link.presets import PRESETS, preset
from hybridkex.link.settings import LinkSettings
from hybridkex.link.simulated import BOOTSTRAPS, SimulatedLink
from hybridkex.text import json_line, terminal

__all__ = ["configure", "run"]

KINDS: Final = ("rate-vs-distance", "qber", "finite-key")


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the sub-commands."""
    describe(
        parser,
        "A simulated QKD link: decoy-state BB84 with finite keys, error correction, privacy "
        "amplification and authentication, with an eavesdropper if you like.",
        examples=["qkd run --distance 50", "qkd plot --kind rate-vs-distance -o rate.svg"],
        notes="See docs/qkd-link.md.",
    )
    commands = parser.add_subparsers(metavar="command", required=True)

    run_ = commands.add_parser(
        "run",
        help="make blocks of key over a simulated link",
    )
    describe(
        run_,
        "Run Alice and Bob over a simulated fibre, and tell of each block what was detected, "
        "corrected, leaked and kept.",
        examples=[
            "qkd run --distance 80 --blocks 5",
            "qkd run --eve intercept:1.0",
            "qkd run --preset rusca2018 --json",
        ],
        status="0 when every block made keys, 1 when one was given up or the link stopped",
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
    run_.add_argument("--real-time", action="store_true", help="as slow as the laser's clock")
    run_.add_argument(
        "--seed", type=int, metavar="N", help="repeat a run exactly; its keys are worth nothing"
    )
    run_.add_argument("--json", action="store_true", help="one JSON line for each block")
    run_.set_defaults(action=_run)

    plot = commands.add_parser("plot", help="draw a picture (needs matplotlib)")
    describe(
        plot,
        "Draw the rates or error rates of the presets, from formulas and from simulated blocks.",
        examples=["qkd plot --kind rate-vs-distance -o rate.svg", "qkd plot --kind qber -o q.png"],
        notes="See docs/qkd-link.md, which has the pictures.",
    )
    plot.add_argument("--kind", required=True, choices=KINDS, help="what to draw")
    plot.add_argument(
        "-o",
        "--output",
        required=True,
        type=Path,
        metavar="FILE.png|.svg",
        help="where to; the name's end says the format",
    )
    plot.set_defaults(action=_plot)


def run(args: argparse.Namespace) -> int:
    """Run the sub-command that was chosen."""
    action: Callable[[argparse.Namespace], int] = args.action
    return action(args)


def _plot(args: argparse.Namespace) -> int:
    if args.output.suffix not in (".png", ".svg"):
        raise ConfigError("the picture is a .png or an .svg")
    try:
        from hybridkex.link.plots import draw  # noqa: PLC0415  # matplotlib is an extra
    except ModuleNotFoundError as missing:
        if missing.name != "matplotlib":
            raise
        raise ConfigError("this needs matplotlib: pip install 'hybridkex[plot]'") from None
    try:
        draw(args.kind, args.output)
    except OSError as error:
        raise ConfigError(f"cannot write {args.output}: {error.strerror}") from None
    print(args.output)
    return 0


def _run(args: argparse.Namespace) -> int:
    if args.blocks < 1:
        raise ConfigError("--blocks must be positive")
    if args.block_bits < 1:
        raise ConfigError("--block-bits must be positive")
    chosen = preset(args.preset).at(args.distance)
    if not args.as_published:
        chosen = tuned(chosen, args.block_bits)
    settings = LinkSettings(preset=chosen, block_bits=args.block_bits, key_bits=args.key_bits)
    link = SimulatedLink(
        settings,
        eve=args.eve,
        bootstrap=args.bootstrap,
        seed=args.seed,
        real_time=args.real_time,
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
    """A table that grows; live on a terminal."""
    channel = settings.preset.channel
    table = Table(
        title=f"{settings.preset.name}, {channel.distance_km:g} km, "
        f"blocks of {settings.block_bits:,} bits",
        caption="rates are by the laser's clock",
    )
    for name in ("block", "sifted", "QBER", "leak", "f", "secret bits", "rate", "keys", "ledger"):
        table.add_column(name, justify="right")
    table.add_column("outcome")

    def report(number: int, outcome: Block | LinkError, seconds: float) -> None:
        if isinstance(outcome, Block):
            table.add_row(
                str(number),
                f"{outcome.sifted:,}",
                "-" if outcome.qber is None else f"{outcome.qber:.2%}",
                f"{outcome.leak:,}",
                "-" if outcome.efficiency is None else f"{outcome.efficiency:.3f}",
                f"{outcome.secret_bits:,}",
                f"{outcome.rate:,.0f} bit/s",
                str(len(outcome.keys)),
                f"{outcome.ledger_bits} bit",
                f"{outcome.authentication}, computed in {seconds:.2f} s",
            )
        else:
            table.add_row(str(number), *["-"] * 7, "-", f"NO KEY: {outcome}")

    console = Console(file=terminal(sys.stdout))
    if not console.is_terminal:
        console = Console(file=terminal(sys.stdout), width=160)
        yield report
        console.print(table)
        return
    with Live(table, console=console, refresh_per_second=4):
        yield report
