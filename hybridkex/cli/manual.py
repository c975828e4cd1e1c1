"""What ``--help`` says beside the options, in one form for every command."""

import argparse
import shutil
import textwrap
from collections.abc import Sequence
from typing import Final

__all__ = ["describe"]

_WIDEST: Final = 100
"""Columns; longer lines are hard to read, however wide the terminal is."""


def describe(
    parser: argparse.ArgumentParser,
    text: str,
    *,
    examples: Sequence[str],
    status: str = "0 when all went well, 1 after an error, which one line on standard error names",
    notes: str = "",
) -> None:
    """Set a parser's description and what stands below its options.

    Args:
        parser: of a command, or of a command's command.
        text: what the command does; paragraphs are held apart by an empty line.
        examples: command lines, without the name of the program.
        status: the meaning of the exit status.
        notes: where to read more, or what else there is to know.
    """
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = _paragraphs(text)
    below = ["examples:\n" + "\n".join(f"  hybridkex {line}" for line in examples)]
    below.append(_paragraphs(f"exit status: {status}"))
    if notes:
        below.append(_paragraphs(notes))
    parser.epilog = "\n\n".join(below)


def _paragraphs(text: str) -> str:
    width = min(shutil.get_terminal_size().columns, _WIDEST) - 2
    return "\n\n".join(textwrap.fill(part, width) for part in text.split("\n\n"))
