"""The kinds of values that options have: an option's ``type`` says how its value is to be read.

A configuration file (:mod:`~hybridkex.cli.option_tables`) and the completion of a shell go by it,
and never by the words of a help text.
"""

import argparse
from pathlib import Path

__all__ = ["address", "comma_list", "file_path", "folder_path"]


def file_path(text: str) -> Path:
    """The path of a file; in a configuration file, relative to that file's folder."""
    return _path(text)


def folder_path(text: str) -> Path:
    """The path of a folder; relative as that of a file."""
    return _path(text)


def _path(text: str) -> Path:
    # To pathlib an empty text is the current folder.
    if not text:
        raise argparse.ArgumentTypeError("an empty path; is a variable of the shell not set?")
    return Path(text)


def address(text: str) -> str:
    """``HOST:PORT`` or ``unix:PATH``, whose path is relative as that of a file."""
    return text


def comma_list(text: str) -> list[str]:
    """Several values, with commas or colons between them; in a configuration file, an array."""
    return [item for item in text.replace(":", ",").split(",") if item]
