"""The types of option values: an option's ``type`` says how its value is parsed.

Configuration files (:mod:`~hybridkex.cli.option_tables`) and shell completion use the type, never
the help text.
"""

import argparse
import math
from pathlib import Path
from typing import Final

from hybridkex.errors import ConfigError
from hybridkex.net.address import TcpAddress, parse_tcp_address

EXACT: Final = 1 << 53
"""Greater whole numbers are not exact as floating-point numbers."""
MOST_KM: Final = 1_000_000
_UNITS: Final = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def file_path(text: str) -> Path:
    """The path of a file; in a configuration file, relative to that file's folder."""
    return _path(text)


def folder_path(text: str) -> Path:
    """The path of a folder, relative like that of a file."""
    return _path(text)


def _path(text: str) -> Path:
    # pathlib takes an empty string for the current folder.
    if not text:
        raise argparse.ArgumentTypeError("the path is empty; is a shell variable unset?")
    if "\0" in text:
        raise argparse.ArgumentTypeError("the path has invalid characters")
    return Path(text)


def whole_number(text: str) -> int:
    """An integer in decimal digits, or with an exponent, such as ``1e6``."""
    try:
        return int(text)
    except ValueError:  # a word, an exponent, a fraction, or thousands of digits
        pass
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not value.is_integer() or abs(value) > EXACT:
        raise argparse.ArgumentTypeError(f"a whole number is needed, not {_shortened(text)}")
    return int(value)


def number(text: str) -> float:
    """A decimal number, such as ``2.5`` or ``1e6``."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if math.isnan(value):
        raise argparse.ArgumentTypeError(f"a number is needed, not {_shortened(text)}")
    return value


def kilometres(text: str) -> float:
    """The length of a fibre, such as ``80`` or ``2.5``."""
    value = number(text)
    if not 0 <= value <= MOST_KM:
        raise argparse.ArgumentTypeError(
            f"0 to {MOST_KM:,} km are possible, not {_shortened(text)}"
        )
    return value


def _shortened(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:37]}...")


def address(text: str) -> str:
    """``HOST:PORT`` or ``unix:PATH``, with the path relative like that of a file."""
    return text


def tcp_address(text: str) -> TcpAddress:
    """``HOST:PORT``, parsed."""
    try:
        return parse_tcp_address(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def comma_list(text: str) -> list[str]:
    """Several values, separated by commas or colons; in a configuration file, an array."""
    return [item for item in text.replace(":", ",").split(",") if item]


def renewal(text: str) -> float:
    """How often keys are renewed, in seconds: ``90``, ``90s``, ``5m``, ``2h`` or ``1d``; 0 for
    ``peer``: whenever the peer does."""
    if text == "peer":
        return 0.0
    number, unit = (text[:-1], _UNITS[text[-1:]]) if text[-1:] in _UNITS else (text, 1.0)
    try:
        seconds = float(number) * unit
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither a time such as 60s, 5m or 2h nor 'peer'"
        )
    return seconds
