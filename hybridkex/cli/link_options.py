"""The options that the commands of a simulated link share."""

from typing import Any

from hybridkex.cli.arguments import Exclusive, option
from hybridkex.cli.choices import FINITE_KEY, LEAKS, LINK_PRESETS


def preset() -> Any:
    """The field of ``--preset``."""
    names = ", ".join(LINK_PRESETS)
    return option(f"one of {names} (default: %(default)s)", metavar="NAME", default="lim2014")


def distance(group: Exclusive | None = None) -> Any:
    """The field of ``--distance``; ``group``: the options that it cannot be given with."""
    text = "length of the fibre (default: %(default)g)"
    return option(text, metavar="KM", default=50.0, group=group)


def as_published() -> Any:
    """The field of ``--as-published``."""
    return option("use the preset's own intensities, not the best ones for the distance")


def key_bits() -> Any:
    """The field of ``--key-bits``."""
    return option("bits in each key (default: %(default)s)", default=256)


def finite_key() -> Any:
    """The field of ``--finite-key``."""
    text = "the finite-key bound to use (default: %(default)s)"
    return option(text, choices=FINITE_KEY, default=FINITE_KEY[0])


def leak() -> Any:
    """The field of ``--leak``."""
    text = "whose parities count as leaked (default: %(default)s)"
    return option(text, choices=LEAKS, default=LEAKS[0])
