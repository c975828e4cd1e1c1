"""The types of option values: an option's ``type`` says how its value is parsed.

Configuration files (:mod:`~hybridkex.cli.option_tables`) and shell completion use the type, never
the help text.
"""

import argparse
from pathlib import Path

__all__ = ["address", "comma_list", "file_path", "folder_path"]


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
    return Path(text)


def address(text: str) -> str:
    """``HOST:PORT`` or ``unix:PATH``, with the path relative like that of a file."""
    return text


def comma_list(text: str) -> list[str]:
    """Several values, separated by commas or colons; in a configuration file, an array."""
    return [item for item in text.replace(":", ",").split(",") if item]
