"""What a benchmark measures: rows of figures by tool, curves of rows, and their tables."""

import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = [
    "OURS",
    "Curve",
    "Options",
    "Row",
    "Shares",
    "in_turns",
    "number",
    "replaced",
    "shares",
    "side_by_side",
    "table",
    "with_peers",
]

OURS = "hybridkex"
TIMES = ("s", "ms", "us", "bytes", "MiB")
"""Units of which less is better; of all others, more is."""


@dataclass(frozen=True)
class Options:
    """How much is measured.

    Args:
        rounds: figures of each tool; a comparison that takes long takes fewer.
        quick: a smoke test: one round of as little work as possible.
        against: another copy of the project, which takes turns with this one where a benchmark can.
    """

    rounds: int = 7
    quick: bool = False
    against: Path | None = None

    def few(self, most: int = 3) -> int:
        """Rounds of a comparison that takes long."""
        return min(self.rounds, most)

    def size(self, usual: int, quick: int) -> int:
        """How much work, usually and in a smoke test."""
        return quick if self.quick else usual


@dataclass(frozen=True)
class Row:
    """One kind of work.

    Args:
        name: the work.
        unit: of the figures.
        figures: by tool, one a round; the first tool is ours.
        goal: how many times as fast as the first peer ours is to be.
        bound: the figure that ours is to reach.
        compared: ``False``: all of them are ours, in several ways, each in a column of its own.
    """

    name: str
    unit: str
    figures: dict[str, list[float]]
    goal: float | None = None
    bound: float | None = None
    compared: bool = True

    def median(self, tool: str) -> float:
        """The figure of a tool."""
        return statistics.median(self.figures[tool])

    def ratio(self, peer: str, ours: str | None = None) -> tuple[float, float, float]:
        """How many times as fast as the peer ours is within a round: median, least and most."""
        pairs = zip(self.figures[ours or next(iter(self.figures))], self.figures[peer], strict=True)
        ratios = [b / a if self.unit in TIMES else a / b for a, b in pairs]
        return statistics.median(ratios), min(ratios), max(ratios)

    def verdict(self) -> str:
        """Whether ours is as fast as it is to be."""
        ours, *peers = self.figures
        if self.bound is not None:
            got, wanted = self.median(ours), self.bound
            met = got <= wanted if self.unit in TIMES else got >= wanted
            named = f"{number(wanted)} {self.unit}"
        elif self.goal is not None and peers:
            got, wanted = self.ratio(peers[0])[0], self.goal
            met, named = got >= wanted, f"{wanted:g}"
        else:
            return ""
        return f"{named}: met" if met else f"{named}: missed by {number(abs(wanted - got))}"


@dataclass(frozen=True)
class Curve:
    """How the figures of one kind of work grow.

    Args:
        name: the work.
        across: what grows.
        unit: of the figures.
        lines: by tool, the figures of all rounds by what grows.
    """

    name: str
    across: str
    unit: str
    lines: dict[str, dict[str, list[float]]]


@dataclass(frozen=True)
class Shares:
    """What the time of one kind of work is made of.

    Args:
        table: which table it is a line of.
        name: the work.
        parts: in per cent.
    """

    table: str
    name: str
    parts: dict[str, float]


def in_turns(rounds: int, tools: Mapping[str, Callable[[], float]]) -> dict[str, list[float]]:
    """The figures of all tools, which take turns; another one begins in each round."""
    found: dict[str, list[float]] = {tool: [] for tool in tools}
    names = list(tools)
    for turn in range(rounds):
        for place in range(len(names)):
            name = names[(turn + place) % len(names)]
            found[name].append(tools[name]())
    return found


def number(value: float) -> str:
    """Three digits that count, or all of those before the point."""
    if value >= 100:
        return f"{value:,.0f}"
    digits = 1 if value >= 10 else 2
    return f"{value:.{digits}f}" if value >= 0.1 else f"{value:.2g}"


def table(*columns: str, rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [columns, ("---",) * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def shares(given: Iterable[Shares]) -> str:
    """The tables of some shares, the largest parts first; those below 1 % are left out."""
    tables: dict[str, list[Shares]] = {}
    for one in given:
        tables.setdefault(one.table, []).append(one)
    texts = []
    for lines in tables.values():
        parts = {part for line in lines for part, share in line.parts.items() if share >= 1}
        order = sorted(
            parts, key=lambda part: (-sum(one.parts.get(part, 0) for one in lines), part)
        )
        rows = [
            (line.name, *(f"{line.parts[one]:.0f} %" if one in line.parts else "" for one in order))
            for line in lines
        ]
        texts.append(table("work", *order, rows=rows))
    return "\n\n".join(texts)


def with_peers(rows: Iterable[Row]) -> str:
    """The table of some rows, with a line for each peer."""
    lines = []
    for row in rows:
        ours, *peers = row.figures
        figure = f"{number(row.median(ours))} {row.unit}"
        for place, peer in enumerate(peers):
            middle, least, most = row.ratio(peer)
            theirs = f"{number(row.median(peer))} {row.unit}"
            spread = f"**{number(middle)}** ({number(least)} to {number(most)})"
            goal = "" if place else row.verdict()
            lines.append((row.name, figure, peer, theirs, spread, goal))
        if not peers:
            lines.append((row.name, figure, "", "", "", row.verdict()))
    return table("work", OURS, "peer", "its figure", "times as fast (range)", "goal", rows=lines)


def side_by_side(rows: Iterable[Row]) -> str:
    """The table of some rows, with a column for each way."""
    given = list(rows)
    ways = list(dict.fromkeys(way for row in given for way in row.figures))
    lines = []
    for row in given:
        figures = {way: f"{number(row.median(way))} {row.unit}" for way in row.figures}
        lines.append((row.name, *(figures.get(way, "") for way in ways)))
    return table("work", *ways, rows=lines)


def replaced(page: str, texts: Mapping[str, str], kind: str = "table") -> str:
    """The page with new texts between ``<!-- table: NAME -->`` and ``<!-- end of table -->``.

    Raises:
        RuntimeError: the page does not have exactly one place of a name.
    """
    for name, text in texts.items():
        begin, end = f"<!-- {kind}: {name} -->", f"<!-- end of {kind} -->"
        whole = f"{begin}\n{text}\n{end}"
        found = re.escape(begin) + ".*?" + re.escape(end)
        page, count = re.subn(found, lambda _, whole=whole: whole, page, flags=re.DOTALL)
        if count != 1:
            raise RuntimeError(f"the page must have one {kind} {name}")
    return page
