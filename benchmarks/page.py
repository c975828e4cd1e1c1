"""The figures, tables and charts of docs/performance.md."""

import dataclasses
import json
import os
import platform
import ssl
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.chart import draw
from benchmarks.results import (
    Curve,
    Row,
    Shares,
    number,
    replaced,
    shares,
    side_by_side,
    table,
    with_peers,
)

__all__ = [
    "DOCS",
    "FIGURES",
    "PAGE",
    "as_json",
    "charts",
    "curve_table",
    "from_json",
    "keep",
    "tables",
    "text",
]

DOCS = Path(__file__).parents[1] / "docs"
FIGURES = DOCS / "data/performance.json"
LINK_FIGURES = DOCS / "data/qkd-speed.json"
PAGE = DOCS / "performance.md"
Result = Row | Curve | Shares
Found = Mapping[str, Iterable[Result]]
KINDS: dict[str, type[Result]] = {"rows": Row, "curves": Curve, "shares": Shares}


def as_json(found: Found) -> dict[str, Any]:
    """The figures of benchmarks, with four digits that count."""
    return {
        name: {
            "machine": machine(),
            **{
                kind: [_plain(one) for one in results if isinstance(one, made)]
                for kind, made in KINDS.items()
            },
        }
        for name, results in ((name, list(results)) for name, results in found.items())
    }


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {one.name: _plain(getattr(value, one.name)) for one in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_plain(one) for one in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def from_json(kept: Mapping[str, Any]) -> dict[str, list[Result]]:
    """What :func:`as_json` was given."""
    return {
        name: [made(**one) for kind, made in KINDS.items() for one in results.get(kind, ())]
        for name, results in kept.items()
    }


def machine() -> str:
    """What the figures were taken on."""
    models = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return (
        f"{os.cpu_count()} cores ({models[0] if models else platform.machine()}), "
        f"Python {platform.python_version()}, {' '.join(ssl.OPENSSL_VERSION.split()[:2])}, "
        f"load {os.getloadavg()[1]:.1f}, {datetime.now(UTC):%Y-%m-%d}"
    )


def keep(found: Found) -> None:
    """Write figures, and the page and charts of all that are there."""
    before = json.loads(FIGURES.read_text()) if FIGURES.exists() else {}
    kept = before | as_json(found)
    FIGURES.write_text(json.dumps(kept, indent=1) + "\n")
    PAGE.write_text(text(PAGE.read_text(), kept))
    for path, picture in charts(kept).items():
        path.write_text(picture)


def text(page: str, kept: Mapping[str, Any]) -> str:
    """The page with the tables and charts of these figures."""
    blocks = {}
    for name, results in from_json(kept).items():
        blocks[name] = "\n\n".join(
            [tables(results), *_shown(results), f"*{kept[name]['machine']}*"]
        )
    return replaced(page, blocks | {"blocks": "\n\n".join(_shown(_blocks()))})


def tables(results: Iterable[Result]) -> str:
    """The tables of figures and of shares."""
    found = list(results)
    rows = [one for one in found if isinstance(one, Row) and one.compared]
    ways = [one for one in found if isinstance(one, Row) and not one.compared]
    parts = [one for one in found if isinstance(one, Shares)]
    written = [with_peers(rows)] * bool(rows) + [side_by_side(ways)] * bool(ways)
    return "\n\n".join(written + [shares(parts)] * bool(parts))


def _shown(results: Iterable[Result]) -> list[str]:
    return [
        f"![{one.name} ({one.unit}) by {one.across}](pictures/{_file(one)})"
        for one in results
        if isinstance(one, Curve)
    ]


def _file(curve: Curve) -> str:
    return f"growth-{curve.name.lower().replace(' ', '-')}.svg"


def charts(kept: Mapping[str, Any]) -> dict[Path, str]:
    """The pictures by their files."""
    found = [one for results in from_json(kept).values() for one in results]
    curves = [one for one in [*found, *_blocks()] if isinstance(one, Curve)]
    return {DOCS / "pictures" / _file(one): draw(one) for one in curves}


def _blocks() -> list[Result]:
    """How the blocks of the QKD link grow; :mod:`benchmarks.qkd_link` takes these figures."""
    blocks = json.loads(LINK_FIGURES.read_text())["whole_blocks"]["alone"]
    return [
        Curve(
            name,
            "sifted bits in a block",
            unit,
            {"hybridkex": {str(one["input_bits"]): [one[key]] for one in blocks}},
        )
        for name, key, unit in (
            ("CPU of a block", "cpu_s", "s"),
            ("Memory for a block", "peak_mib", "MiB"),
        )
    ]


def curve_table(curve: Curve) -> str:
    """A curve in figures."""
    places = sorted({int(place) for line in curve.lines.values() for place in line})
    rows = []
    for tool, line in curve.lines.items():
        found = [line.get(str(place)) for place in places]
        rows.append((tool, *(number(sorted(one)[len(one) // 2]) if one else "" for one in found)))
    return table(curve.across, *(f"{place:,}" for place in places), rows=rows)
