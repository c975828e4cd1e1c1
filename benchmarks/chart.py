"""A chart of a curve as SVG: both axes logarithmic, a line for each tool."""

import math
import statistics
from html import escape

from benchmarks.results import Curve, number

__all__ = ["draw"]

WIDTH, HEIGHT = 560, 350
LEFT, RIGHT, TOP, BOTTOM = 70, 30, 44, 96
IN_A_ROW = 3
"""Tools in the legend."""
COLOURS = ("#1f5fa8", "#c4541c", "#3a7d34", "#7a4fa0", "#777777")


def draw(curve: Curve) -> str:
    """The picture; the points are medians."""
    points = {
        tool: sorted((int(x), statistics.median(values)) for x, values in line.items())
        for tool, line in curve.lines.items()
    }
    xs = [x for line in points.values() for x, _ in line]
    ys = [y for line in points.values() for _, y in line]
    low, high = math.floor(math.log10(min(ys))), math.ceil(math.log10(max(ys)))
    left, right = math.log10(min(xs)), math.log10(max(xs))
    high, right = max(high, low + 1), max(right, left + 1)

    def across(x: float) -> float:
        return LEFT + (math.log10(x) - left) / (right - left) * (WIDTH - LEFT - RIGHT)

    def up(y: float) -> float:
        return HEIGHT - BOTTOM - (math.log10(y) - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="13">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        _words(LEFT, 24, f"{curve.name[:1].upper()}{curve.name[1:]} ({curve.unit})", size=15),
    ]
    for power in range(low, high + 1):
        y = up(10.0**power)
        out.append(_line(LEFT, y, WIDTH - RIGHT, y))
        out.append(_words(LEFT - 8, y + 4, number(10.0**power), "end"))
    for power in range(math.ceil(left), math.floor(right) + 1):
        x = across(10.0**power)
        out.append(_line(x, TOP, x, HEIGHT - BOTTOM))
        out.append(
            _words(
                x, HEIGHT - BOTTOM + 18, f"1e{power}" if power > 5 else f"{10**power:,}", "middle"
            )
        )
    out.append(_words((LEFT + WIDTH - RIGHT) / 2, HEIGHT - BOTTOM + 38, curve.across, "middle"))
    for place, (tool, line) in enumerate(points.items()):
        colour = COLOURS[place % len(COLOURS)]
        x, y = LEFT + place % IN_A_ROW * 160, HEIGHT - 30 + place // IN_A_ROW * 20
        path = " ".join(f"{across(a):.1f},{up(b):.1f}" for a, b in line)
        out.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        out += [
            f'<circle cx="{across(a):.1f}" cy="{up(b):.1f}" r="3.5" fill="{colour}"/>'
            for a, b in line
        ]
        out.append(f'<rect x="{x}" y="{y - 11}" width="12" height="12" fill="{colour}"/>')
        out.append(_words(x + 18, y, tool))
    return "\n".join([*out, "</svg>", ""])


def _line(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="#dddddd"/>'


def _words(x: float, y: float, text: str, anchor: str = "start", size: int = 13) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}">'
        f"{escape(text)}</text>"
    )
