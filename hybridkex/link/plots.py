"""Pictures of what links give, with published points beside the curves."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from hybridkex.link import asymptotic
from hybridkex.link.finite_key import expected_counts
from hybridkex.link.optimise import optimise
from hybridkex.link.presets import PRESETS, Preset
from hybridkex.link.quantum import sample
from hybridkex.link.randomness import Randomness

__all__ = ["draw"]

GYS_F: Final = 1.22
PUBLISHED_MAXIMA: Final = (
    (140.6, "vacuum + weak", "right"),
    (142.0, "infinitely many decoys", "left"),
)
"""Distances at which Ma et al. 2005 end (km), marked on the axis, and the side of their labels."""
PUBLISHED_RATES: Final = (
    (10.0, 115.8e6, "Li 2023"),
    (10.0, 64e6, "Grünenfelder 2023"),
    (102.4, 3.0e6, "Grünenfelder 2023"),
    (405.0, 6.5, "Boaron 2018"),
)
"""km, bit/s: what experiments reached, with equipment of their own."""


def draw(kind: str, path: Path) -> None:
    """Draw one of ``rate-vs-distance``, ``qber``, ``finite-key``. Raises ``OSError``."""
    with mpl.rc_context({"svg.hashsalt": "hybridkex", "svg.fonttype": "path"}):
        figure = Figure(figsize=(7.0, 4.5), layout="constrained")
        axes = figure.subplots()
        _KINDS[kind](axes)
        axes.set_xlabel("fibre, km")
        axes.grid(visible=True, alpha=0.3)
        axes.legend(fontsize=8)
        # Without the date, so that the same picture is the same file.
        metadata = {"Date": None} if path.suffix == ".svg" else {}
        figure.savefig(path, dpi=100, metadata=metadata)


def _rates(axes: Any) -> None:
    """Asymptotic rates at GYS, and finite ones of the other presets in bit/s."""
    for name, style in (("lim2014", "-"), ("rusca2018", "--"), ("boaron2018", ":")):
        chosen = PRESETS[name]
        axes.plot(*_finite_curve(chosen, 1e7, per_second=True), style, label=f"{name}, 1e7 bits")
    gys = PRESETS["gys2005"].channel
    distances = np.arange(0.0, 143.0, 1.0)
    for label, rate in (
        ("gys2005, infinitely many decoys", _gys_infinite),
        ("gys2005, vacuum + weak", _gys_weak),
    ):
        values = np.array([rate(gys.at(float(one))) for one in distances])
        seen = values > 0
        axes.plot(distances[seen], values[seen] * gys.repetition_rate_hz, label=label, alpha=0.7)
    _published(axes)
    axes.set_yscale("log")
    axes.set_ylim(5e-3, 1e9)
    axes.set_ylabel("secret bit/s (▲ experiments)")


def _published(axes: Any) -> None:
    """What others computed and measured."""
    for maximum, label, side in PUBLISHED_MAXIMA:
        axes.plot([maximum], [1e-2], "k|", markersize=12)
        away = 6 if side == "left" else -6
        axes.annotate(
            f"{maximum:g} km\n{label}",
            (maximum, 1e-2),
            xytext=(away, 0),
            textcoords="offset points",
            fontsize=6,
            ha=side,
        )
    for distance, rate_, label in PUBLISHED_RATES:
        axes.plot([distance], [rate_], "k^", markersize=5)
        axes.annotate(
            label, (distance, rate_), fontsize=7, xytext=(4, 4), textcoords="offset points"
        )


def _gys_infinite(channel: Any) -> float:
    return asymptotic.infinite_decoy_rate(channel, 0.48, f=GYS_F)


def _gys_weak(channel: Any) -> float:
    return asymptotic.vacuum_weak_rate(channel, 0.48, 0.05, f=GYS_F)


def _finite_curve(
    chosen: Preset, block: float, *, per_second: bool
) -> tuple[list[float], list[float]]:
    """Distances and rates where there is a key, best settings at each distance."""
    distances: list[float] = []
    rates: list[float] = []
    distance, near = 0.0, None
    while True:
        best = optimise(
            chosen.channel.at(distance),
            key_detections=block,
            f=chosen.efficiency,
            intensities=len(chosen.transmitter.probabilities),
            near=near,
        )
        if best is None:
            return distances, rates
        near = best.transmitter
        distances.append(distance)
        rates.append(best.rate * (chosen.channel.repetition_rate_hz if per_second else 1.0))
        distance += 20.0


def _qber(axes: Any) -> None:
    """QBER of the key basis: closed forms, and blocks that were sampled."""
    for number, name in enumerate(("gys2005", "lim2014", "rusca2018")):
        chosen = PRESETS[name]
        distances = np.arange(0.0, 201.0, 2.0)
        curve = [
            expected_counts(chosen.channel.at(float(one)), chosen.transmitter, 1.0).key_error_rate
            for one in distances
        ]
        axes.plot(distances, np.array(curve) * 100, f"C{number}", label=name)
        points = np.arange(0.0, 201.0, 20.0)
        sampled = [_sampled_qber(chosen.at(float(one)), number) * 100 for one in points]
        axes.plot(points, sampled, f"C{number}o", markersize=4)
    axes.axhline(11.0, color="k", linestyle="--", label="11 %: Shor and Preskill 2000")
    axes.axhline(25.0, color="r", linestyle=":", label="25 %: every pulse intercepted")
    axes.set_ylim(0, 30)
    axes.set_ylabel("QBER, % (● 200,000 sampled detections)")


def _sampled_qber(chosen: Preset, seed: int) -> float:
    sent, clicks = sample(
        chosen.channel,
        chosen.transmitter,
        chosen.channel,
        200_000,
        first=0,
        randomness=Randomness.seeded(seed, "plot"),
    )
    key = (sent.basis == 0) & (clicks.basis == 0)
    return float((sent.bit != clicks.bit)[key].mean())


def _finite(axes: Any) -> None:
    """Rates of Lim 2014 for several block sizes; of Rusca 2018 dashed."""
    for number, exponent in enumerate((4, 5, 6, 7, 9)):
        for name, style in (("lim2014", "-"), ("rusca2018", "--")):
            distances, rates = _finite_curve(PRESETS[name], 10.0**exponent, per_second=False)
            label = f"1e{exponent} bits" if style == "-" else None
            axes.plot(distances, rates, f"C{number}{style}", label=label)
    axes.set_yscale("log")
    axes.set_ylim(1e-8, 1e-1)
    axes.set_ylabel("secret bits per pulse (— lim2014, - - rusca2018)")


_KINDS: Final[dict[str, Callable[[Any], None]]] = {
    "rate-vs-distance": _rates,
    "qber": _qber,
    "finite-key": _finite,
}
