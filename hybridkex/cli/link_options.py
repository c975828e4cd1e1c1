"""The options that the commands of a simulated link share: a function makes a field of each."""

from typing import Any

from hybridkex.cli.arguments import Exclusive, option
from hybridkex.cli.choices import FINITE_KEY, LEAKS, LINK_PRESETS
from hybridkex.cli.values import kilometres


def preset() -> Any:
    names = ", ".join(LINK_PRESETS)
    return option(f"one of {names} (default: %(default)s)", metavar="NAME", default="lim2014")


def distance(group: Exclusive | None = None) -> Any:
    """``group``: the options that it cannot be given with."""
    text = "length of the fibre (default: %(default)g)"
    return option(text, type=kilometres, metavar="KM", default=50.0, group=group)


def as_published() -> Any:
    return option("use the preset's own intensities, not the best ones for the distance")


def key_bits() -> Any:
    return option("bits in each key (default: %(default)s)", default=256)


def finite_key() -> Any:
    text = "the finite-key bound to use (default: %(default)s)"
    return option(text, choices=FINITE_KEY, default=FINITE_KEY[0])


def leak() -> Any:
    text = "whose parities count as leaked (default: %(default)s)"
    return option(text, choices=LEAKS, default=LEAKS[0])
