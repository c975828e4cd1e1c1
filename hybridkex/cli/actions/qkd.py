"""``hybridkex qkd``: run a simulated QKD link, distil measured detections, scan settings, plot.

``docs/qkd-link.md`` explains the numbers.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from textwrap import fill
from typing import Final

from rich.box import SIMPLE
from rich.console import Console
from rich.live import Live
from rich.table import Table

from hybridkex.cli.qkd import RunOptions
from hybridkex.cli.running import run_trio
from hybridkex.errors import BlockAborted, ConfigError, LinkError
from hybridkex.link.optimise import tuned
from hybridkex.link.party import Block
from hybridkex.link.presets import preset
from hybridkex.link.satellite import SatellitePass
from hybridkex.link.settings import LinkSettings
from hybridkex.link.simulated import SimulatedLink
from hybridkex.text import json_line, terminal

WIDTH: Final = 80
"""Columns, if the output is not a terminal."""


def run(options: RunOptions) -> int:
    if options.blocks < 1:
        raise ConfigError("--blocks must be positive")
    if options.block_bits < 1:
        raise ConfigError("--block-bits must be positive")
    fading, through, where = None, None, f"{options.distance:g} km"
    chosen = typical = preset(options.preset).at(options.distance)
    if options.satellite is not None:
        fading = SatellitePass(top_elevation_deg=options.satellite)
        through = where = f"a pass up to {options.satellite:g} degrees"
        chosen = chosen.at(0.0)
        typical = replace(chosen, channel=chosen.channel.with_loss(fading.mean_loss_db))
    if not options.as_published:
        best = tuned(typical, options.block_bits, finite_key=options.finite_key, where=through)
        chosen = replace(chosen, transmitter=best.transmitter)
    settings = LinkSettings(
        preset=chosen,
        block_bits=options.block_bits,
        key_bits=options.key_bits,
        finite_key=options.finite_key,
        leak=options.leak,
        decoy_check="full" if fading is None else "off",
        real_time=options.real_time,
    )
    link = SimulatedLink(
        settings,
        eve=options.eve,
        bootstrap=options.bootstrap,
        seed=options.seed,
        fading=fading,
    )
    show = _json_lines() if options.json else _table(settings, where)
    with show as report:
        return run_trio(partial(_make_blocks, link, options.blocks, report))


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
                if alice.keys != bob.keys:  # error verification passed, so this cannot fail
                    raise LinkError("Alice and Bob have different keys")
                report(number, bob, time.monotonic() - began)
                if not bob.keys:
                    status = 1
    if link.untouched is not None:
        raise ConfigError(link.untouched)
    return status


@contextmanager
def _json_lines() -> Iterator[Report]:
    def report(number: int, outcome: Block | LinkError, seconds: float) -> None:
        if isinstance(outcome, Block):
            ids = [str(one.key_id) for one in outcome.keys]
            line = {**outcome.numbers, "key_ids": ids, "bits_per_second": outcome.rate}
        else:
            line = {"number": number, "keys": 0, "aborted": str(outcome)}
            line["link_over"] = not isinstance(outcome, BlockAborted)
        print(json_line({**line, "computed_in": round(seconds, 3)}), flush=True)

    yield report


@contextmanager
def _table(settings: LinkSettings, where: str) -> Iterator[Report]:
    """A table of blocks, updated live on a terminal; the reasons for aborts are printed below
    it."""
    table = Table(
        title=f"{settings.preset.name}, {where}, blocks of {settings.block_bits:,} bits",
        caption="Rates are per second of the laser's clock.",
        box=SIMPLE,
        padding=(0, 1, 0, 0),
    )
    for name in ("block", "sifted", "QBER", "f", "leak", "secret bits", "bit/s", "keys", "s"):
        table.add_column(name, justify="right")
    lines: list[str] = []

    def report(number: int, outcome: Block | LinkError, seconds: float) -> None:
        if isinstance(outcome, Block):
            table.add_row(
                str(number),
                f"{outcome.sifted:,}",
                _shown(outcome.qber, ".2%"),
                _shown(outcome.efficiency, ".3f"),
                f"{outcome.leak:,}",
                f"{outcome.secret_bits:,}",
                _shown(outcome.rate, ",.0f"),
                str(len(outcome.keys)),
                f"{seconds:.2f}",
            )
            if not lines:
                lines.append(_epsilon(outcome))
            if outcome.too_short is not None:
                lines.append(f"block {number}: NO KEY: {outcome.too_short}")
        else:
            table.add_row(str(number), *["-"] * 7, f"{seconds:.2f}")
            lines.append(f"block {number}: NO KEY: {terminal(outcome)}")

    console = Console(file=sys.stdout)
    if not console.is_terminal:
        console = Console(file=sys.stdout, width=WIDTH)
        yield report
        console.print(table)
    else:
        with Live(table, console=console, refresh_per_second=4):
            yield report
    for line in lines:
        print(line)


def _shown(value: float | None, form: str) -> str:
    """A number of a block; a dash where it is not known."""
    return "-" if value is None else format(value, form)


def _epsilon(block: Block) -> str:
    part = block.epsilon
    base = " if no signature was forged" if part.conditional else ""
    text = (
        f"epsilon of block {block.number}: {part.total:.2g}{base} "
        f"({part.secrecy:.2g} secrecy, {part.correctness:.2g} correctness, "
        f"{part.authentication:.2g} authentication, {part.inherited:.2g} of earlier blocks)"
    )
    return fill(text, WIDTH)
