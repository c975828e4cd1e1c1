"""Pictures of scans, and those of ``docs/qkd-link.md``."""

import io
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np

from hybridkex.errors import ConfigError
from hybridkex.extras import needs
from hybridkex.files import PUBLIC, write_file
from hybridkex.link import asymptotic
from hybridkex.link.finite_key import expected_counts
from hybridkex.link.optimise import BLOCK_BITS, CURVE_KM, expected_length, rates
from hybridkex.link.presets import Preset, preset
from hybridkex.link.quantum import sample
from hybridkex.link.randomness import Randomness
from hybridkex.link.ranges import (
    PICTURES,
    file_kind,
    instance,
    listed,
    one_of,
    plain,
    records,
    within,
)
from hybridkex.link.scan import COLUMNS, ERROR, SETTINGS, failed, nothing
from hybridkex.text import printable

with needs("plot"):
    import matplotlib as mpl
    from matplotlib.figure import Figure

GYS_F: Final = 1.22
PUBLISHED_MAXIMA: Final = (140.6, 142.0)
"""km at which Ma et al. 2005 end, with vacuum and weak decoy, and with infinitely many."""
PUBLISHED_RATES: Final = (
    (10.0, 115.8e6, "Li 2023", 0),
    (10.0, 64e6, "Grünenfelder 2023", -11),
    (102.4, 3.0e6, "Grünenfelder 2023", 4),
    (405.0, 6.5, "Boaron 2018", 4),
)
"""km, bit/s: results of experiments, with different equipment; and how much higher the label is, in
points."""
UNITS: Final = {
    "distance_km": "fibre (km)",
    "loss_db": "loss (dB)",
    "block_bits": "block (bit)",
    "rate": "secret bits per pulse",
    "bit_per_s": "secret key rate (bit/s)",
    "secret_bits": "secret bits of a block",
    "qber": "QBER",
    "phase_error": "bound on the phase error rate",
    "leak_bits": "leak (bit)",
    "seconds": "time of a block (s)",
}
MOST_NUMBER: Final = 1e300
LEAST_NUMBER: Final = 1e-300
"""On a logarithmic axis."""
LOGARITHMIC: Final = ("rate", "bit_per_s", "secret_bits", "block_bits", "seconds", "leak_bits")
MOST_DISTANCE: Final = 1e4
"""km, of a picture."""
INDEX: Final = ("", "index", "Unnamed: 0", "__index_level_0__")
"""Columns in which pandas, polars and R number the rows."""
STYLES: Final = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)))
MOST_SIZES: Final = 10
MOST_CURVES: Final = MOST_SIZES * len(STYLES)
"""More cannot be told apart by colours and styles."""


def _figure() -> tuple[Figure, Any]:
    # Large letters on a small figure: still readable when it is shown 400 pixels wide.
    figure = Figure(figsize=(6.0, 4.2), layout="constrained")
    return figure, figure.subplots()


def _finish(figure: Figure, axes: Any) -> tuple[Figure, Any]:
    axes.grid(visible=True, alpha=0.3)
    axes.tick_params(labelsize=11)
    axes.xaxis.label.set_size(12)
    axes.yaxis.label.set_size(12)
    _, labels = axes.get_legend_handles_labels()
    if labels:
        # Below the axes, where it hides nothing and is whole. More than 6 rows need more room.
        columns = 2 if max(map(len, labels)) <= 36 else 1
        figure.legend(loc="outside lower center", ncols=columns, fontsize=10, frameon=False)
        figure.set_figheight(4.2 + 0.22 * max(0.0, len(labels) / columns - 6))
    return figure, axes


def save(figure: Figure, path: Path | str) -> None:
    """Write a ``.png`` or an ``.svg``. Raises ``ConfigError`` and ``OSError``."""
    path = Path(path)
    instance("figure", figure, Figure)
    kind = file_kind(path, "a picture", PICTURES)
    # Without the date, so that the same picture is the same file.
    metadata = {"Date": None} if kind == ".svg" else {}
    with mpl.rc_context({"svg.hashsalt": "hybridkex", "svg.fonttype": "path"}):
        picture = io.BytesIO()
        figure.savefig(picture, format=kind[1:], dpi=100, metadata=metadata)
    write_file(path, picture.getvalue(), mode=PUBLIC)


def plot_scan(
    rows: Iterable[Mapping[str, Any]],
    *,
    x: str = "distance_km",
    y: str = "rate",
    by: Sequence[str] = (),
) -> tuple[Figure, Any]:
    """Draw one column of a scan over another: one curve for each combination of the columns ``by``
    and of all settings that vary. Returns the figure and its axes, to change or to save.

    If ``x`` is a result, such as ``qber``, a curve follows the setting with the most values. It has
    a gap where a rate is zero or a value is not known, and no line if it has several points at one
    place. Rows with an error are left out. Raises ``ConfigError`` for a column that is not there or
    has anything but finite numbers, for more than :data:`MOST_CURVES`, and if no point is left.
    """
    rows, by = records("rows", rows), listed("by", by)
    known = list(dict.fromkeys(str(name) for row in rows for name in row))
    for name in (x, y, *by):
        if str(name) not in known:
            raise ConfigError(
                f"the scan has no column {name!r}: it has {', '.join(known) or 'none'}"
            )
    wrong = [row[ERROR] for row in rows if failed(row)]
    rows = [row for row in rows if not failed(row)]
    values = {name: {_plain(row.get(name)) for row in rows} for name in known if name in SETTINGS}
    varied = [name for name, found in values.items() if len(found) > 1 and name not in by]
    along = next((name for name in (x, y) if name not in COLUMNS), "") or max(
        (name for name in varied if all(type(value) in (int, float) for value in values[name])),
        key=lambda name: (
            x == "loss_db" and name in ("distance_km", "attenuation_db_per_km"),
            len(values[name]),
        ),
        default=x,
    )
    places = [tuple(_coordinate(row, name) for name in (along, x, y)) for row in rows]
    drawn = [(row, place[0]) for row, place in zip(rows, places, strict=True) if None not in place]
    varied += [
        name
        for name in known
        if name not in (*SETTINGS, *COLUMNS, ERROR, *INDEX, *by)
        and _tells_apart((_plain(row.get(name)), at) for row, at in drawn)
    ]
    apart = [*by, *(name for name in varied if name not in (x, y, along))]
    curves: dict[tuple[Any, ...], list[tuple[Any, ...]]] = {}
    for row, place in zip(rows, places, strict=True):
        curve = curves.setdefault(tuple(_plain(row.get(name)) for name in apart), [])
        if place[0] is not None:
            curve.append(place)
    if not any(None not in place for curve in curves.values() for place in curve):
        failures = f"{len(wrong)} have an error, the first {wrong[0]!r}; " if wrong else ""
        raise ConfigError(
            f"the scan has no row that can be drawn: {failures}{x} and {y} must have values, above "
            "0 where the axis is logarithmic"
        )
    if len(curves) > MOST_CURVES:
        raise ConfigError(
            f"the scan has {len(curves)} curves, one for each combination of {', '.join(apart)}; "
            f"at most {MOST_CURVES} are drawn: leave some of these values or columns out"
        )
    figure, axes = _figure()
    for number, (key, curve) in enumerate(curves.items()):
        _draw_curve(axes, curve, number, ", ".join(map(_label, apart, key)))
    for name, axis in ((x, "x"), (y, "y")):
        getattr(axes, f"set_{axis}label")(UNITS.get(name, _text(name)))
        if name in LOGARITHMIC:
            getattr(axes, f"set_{axis}scale")("log")
    return _finish(figure, axes)


def _tells_apart(found: Iterable[tuple[Any, Any]]) -> bool:
    """Whether the values of a column that is neither a setting nor a result tell series apart.

    ``found``: each with its place along the curves. Words do; numbers may be other results, or
    numbers of the rows: theirs do if they have two places each, on average.
    """
    pairs = set(found)
    values = {value for value, _ in pairs}
    words = any(isinstance(value, str | bool) for value in values)
    return len(values) > 1 and (words or len(pairs) >= 2 * len(values))


def _draw_curve(axes: Any, curve: list[tuple[Any, ...]], number: int, label: str) -> None:
    """``curve``: where a point is along it, and its coordinates, of which ``None`` makes a gap."""
    points = sorted(dict.fromkeys(curve), key=lambda place: place[0])
    scattered = len({place[0] for place in points}) < len(points)
    there = [place for place, point in enumerate(points) if None not in point]
    points = points[min(there, default=0) : max(there, default=-1) + 1]  # gaps are inside a curve
    _, across, up = np.array(points, dtype=np.float64).reshape(-1, 3).T  # None is not a number
    seen = np.concatenate(([False], np.isfinite(across + up), [False]))
    # A point without a neighbour is on no line.
    dots = np.flatnonzero(seen[1:-1] & (scattered | ~(seen[:-2] | seen[2:]))).tolist()
    axes.plot(
        across,
        up,
        linestyle="" if scattered else STYLES[number // MOST_SIZES % len(STYLES)],
        marker="." if dots else None,
        markevery=dots or None,
        label=label or None,
    )


def _label(name: str, value: Any) -> str:
    """The name of a column's value in the legend."""
    if value is None:  # of Eve there is none, and of another setting no value was given
        return f"{_text(name)} not set" if SETTINGS.get(name) is not None else f"no {_text(name)}"
    if value is False:
        return f"not {_text(name)}"
    if value is True:
        return _text(name)
    if isinstance(value, int | float):
        return f"{_text(name)} {_short(value)}"
    # A check is "off", which says nothing alone; matplotlib leaves out what begins with "_".
    named = name.endswith("_check") or value.startswith("_")
    return f"{_text(name)} {_text(value)}" if named else _text(value)


def _short(value: float, form: str = "g") -> str:
    """A number in this form, unless that makes it another."""
    text = format(value, form)
    return text if float(text) == value else f"{value:.15g}"


def _text(value: Any) -> str:
    """Words of a scan as they are, not as formulas, and without characters that end an SVG."""
    return printable(str(value)).replace("$", r"\$")


def _plain(value: Any) -> Any:
    value = None if nothing(value) else plain(value)
    if isinstance(value, int) and value.bit_length() > sys.float_info.max_exp:
        raise ConfigError("a whole number in the scan has more than 308 digits")
    return value if isinstance(value, int | float | None) else str(value)


def _coordinate(row: Mapping[str, Any], name: str) -> float | None:
    """The value of a column; ``None`` if it is missing, or if its axis has no place for it."""
    value = _plain(row.get(name))
    if value is None:
        return None
    if not isinstance(value, int | float) or not abs(value) <= MOST_NUMBER:
        what = "the text " if isinstance(value, str) else ""
        raise ConfigError(
            f"the column {name!r} of the scan has {what}{value!r}: only finite numbers can be drawn"
        )
    return None if name in LOGARITHMIC and value < LEAST_NUMBER else float(value)


def draw(
    kind: str,
    *,
    presets: Sequence[str] | None = None,
    distance_km: float = 200.0,
    block_bits: Sequence[float] | None = None,
) -> tuple[Figure, Any]:
    """Draw one of :data:`KINDS`; returns the figure and its axes.

    Args:
        kind: ``rate-vs-distance``, ``qber`` or ``finite-key``.
        presets: names; ``None``: those of the documentation's picture.
        distance_km: how far ``qber`` goes; the others end where the rates do.
        block_bits: sizes of blocks; ``qber`` and ``rate-vs-distance`` use the first.

    Raises:
        ConfigError: an unknown kind or preset, or a number that cannot be drawn.
    """
    one_of("kind", kind, KINDS)
    presets = None if presets is None else listed("presets", presets)
    within("distance_km", distance_km, 1.0, MOST_DISTANCE)
    block_bits = None if block_bits is None else listed("block_bits", block_bits)
    if len(block_bits or ()) > MOST_SIZES:
        raise ConfigError(f"a picture has at most {MOST_SIZES} sizes of blocks, one in each colour")
    for bits in block_bits or ():
        within("block_bits", bits, *BLOCK_BITS)
    figure, axes = _figure()
    KINDS[kind](axes, presets, distance_km, block_bits)
    if not any(len(line.get_xdata()) for line in axes.lines):
        raise ConfigError("these presets make no key at any distance in blocks of these sizes")
    axes.set_xlabel(UNITS["distance_km"])
    return _finish(figure, axes)


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [one for one, _ in points], [one for _, one in points]


def _rates(
    axes: Any, presets: Sequence[str] | None, _: float, blocks: Sequence[float] | None
) -> None:
    """Asymptotic rates at GYS, and finite ones of the other presets in bit/s."""
    block = blocks[0] if blocks else 1e7
    names = presets or ("lim2014", "rusca2018", "boaron2018")
    for name, style in zip(names, STYLES * len(names), strict=False):
        chosen = preset(name)
        clock = chosen.channel.repetition_rate_hz
        points = [(distance, rate * clock) for distance, rate in rates(chosen, block)]
        axes.plot(*_columns(points), linestyle=style, label=name)
    if presets is None:
        gys = preset("gys2005").channel
        distances = np.arange(0.0, 143.0, 0.5)
        for label, rate in (
            ("asymptotic", partial(asymptotic.infinite_decoy_rate, signal=0.48)),
            ("vacuum + weak", partial(asymptotic.vacuum_weak_rate, signal=0.48, decoy=0.05)),
        ):
            values = np.array([rate(gys.at(float(one)), f=GYS_F) for one in distances])
            values, seen = values * gys.repetition_rate_hz, values > 0
            axes.plot(distances[seen], values[seen], label=f"gys2005, {label}")
        axes.plot(PUBLISHED_MAXIMA, [0.1, 0.1], "k|", markersize=12, label="end in Ma 2005")
        places = _columns([one[:2] for one in PUBLISHED_RATES])
        axes.plot(*places, "k^", markersize=5, label="experiments")
        for distance, rate_, label, up in PUBLISHED_RATES:
            axes.annotate(
                label, (distance, rate_), fontsize=9, xytext=(5, up), textcoords="offset points"
            )
    axes.set_yscale("log")
    axes.set_ylim(bottom=5e-2)
    axes.set_ylabel(UNITS["bit_per_s"])


def _qber(
    axes: Any, presets: Sequence[str] | None, farthest: float, blocks: Sequence[float] | None
) -> None:
    """QBER of the key basis: closed forms, sampled blocks, and where the key ends."""
    block = blocks[0] if blocks else 1e6
    for number, name in enumerate(presets or ("gys2005", "lim2014", "rusca2018")):
        chosen = preset(name)
        distances = np.linspace(0.0, farthest, max(11, round(farthest / CURVE_KM) + 1))
        curve = [
            expected_counts(chosen.channel.at(float(one)), chosen.transmitter, 1.0).key_error_rate
            for one in distances
        ]
        axes.plot(distances, np.array(curve) * 100, f"C{number}", label=name)
        points = np.linspace(0.0, farthest, 11)
        sampled = [_sampled_qber(chosen.at(float(one)), number) * 100 for one in points]
        axes.plot(points, sampled, f"C{number}o", markersize=4)
        limit = _last_key(chosen, block, farthest)
        if limit is not None:
            qber = expected_counts(chosen.channel.at(limit), chosen.transmitter, 1.0).key_error_rate
            axes.plot([limit], [qber * 100], f"C{number}x", markersize=10, markeredgewidth=2)
    axes.plot([], [], "ko", markersize=4, label="sampled")
    axes.plot([], [], "kx", markersize=8, label=f"last key, {_short(block, '.0e')} bit")
    axes.set_ylim(0, 30)
    axes.set_ylabel("QBER (%)")


def _last_key(chosen: Preset, block: float, farthest: float) -> float | None:
    """The greatest distance at which the preset's own settings give a key."""

    def gives(distance: float) -> bool:
        found, _ = expected_length(
            chosen.channel.at(distance),
            chosen.transmitter,
            key_detections=block,
            f=chosen.efficiency,
            security=chosen.security,
        )
        return found.bits > 0

    if not gives(0.0):
        return None
    low, high = 0.0, farthest
    if gives(high):
        return None
    while high - low > 0.5:
        middle = (low + high) / 2.0
        low, high = (middle, high) if gives(middle) else (low, middle)
    return low


def _sampled_qber(chosen: Preset, seed: int) -> float:
    sent, seen = sample(
        chosen.channel,
        chosen.transmitter,
        chosen.channel,
        200_000,
        first=0,
        randomness=Randomness.seeded(seed, "plot"),
    )
    key = (sent.basis == 0) & (seen.basis == 0)
    return float((sent.bit != seen.bit)[key].mean())


def _finite(
    axes: Any, presets: Sequence[str] | None, _: float, blocks: Sequence[float] | None
) -> None:
    """Rates for several block sizes; a style of line for each preset."""
    names = presets or ("lim2014", "rusca2018")
    for number, block in enumerate(blocks or (1e4, 1e5, 1e6, 1e7, 1e9)):
        for name, style in zip(names, STYLES * len(names), strict=False):
            axes.plot(
                *_columns(rates(preset(name), block)),
                color=f"C{number}",
                linestyle=style,
                label=f"{name}, {_short(block, '.0e')} bit",
            )
    axes.set_yscale("log")
    axes.set_ylim(1e-8, 1e-1)
    axes.set_ylabel(UNITS["rate"])


KINDS: Final[dict[str, Callable[..., None]]] = {
    "rate-vs-distance": _rates,
    "qber": _qber,
    "finite-key": _finite,
}
"""The pictures of the documentation."""
