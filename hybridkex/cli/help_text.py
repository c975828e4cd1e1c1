"""The parts of ``--help`` other than the options, in one form for every command."""

import argparse
import re
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from typing import Final

_WIDEST: Final = 100
"""Columns; longer lines are hard to read, however wide the terminal is."""
_NARROWEST: Final = 20
"""Columns; shorter lines are hard to read, too, and a terminal may say that it has 1."""


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of descriptions and examples, and wraps those that are too long.

    A command line is continued behind a backslash, before an option, so that it can be copied.
    """

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        lines = (part for line in text.splitlines() for part in _wrapped(line, width - len(indent)))
        return "\n".join(indent + line if line else "" for line in lines)


def _wrapped(line: str, width: int) -> Iterator[str]:
    if len(line) <= width:
        yield line
    elif line.startswith("  hybridkex "):
        yield from _continued(line, width)
    else:
        indent = line[: len(line) - len(line.lstrip())]
        hanging = re.match(r" +\S+ {2,}", line)  # a name, and what it means beside it
        yield from textwrap.wrap(
            line, width, subsequent_indent=" " * hanging.end() if hanging else indent
        )


def _continued(line: str, width: int) -> Iterator[str]:
    current = ""
    # An option with its value, a redirection, or whatever else has no space in it.
    for word in re.findall(r"(?:--?[\w-]+|[<>])(?: [^\s<>-]\S*)?|\S+", line):
        if current and len(current) + len(word) + 3 > width:
            yield f"{current} \\"
            current = f"      {word}"
        else:
            current = f"{current} {word}" if current else f"  {word}"
    yield current


def describe(
    parser: argparse.ArgumentParser,
    text: str,
    *,
    examples: Sequence[str],
    status: str = "0 on success, 1 after an error, with one line on standard error",
    notes: str = "",
) -> None:
    """Set a parser's description and the text below its options.

    Args:
        parser: of a command, or of a command's command.
        text: what the command does; paragraphs are held apart by an empty line.
        examples: command lines, without the name of the program.
        status: the meaning of the exit status.
        notes: where to read more, or further remarks.
    """
    parser.formatter_class = HelpFormatter
    parser.description = _paragraphs(text)
    below = ["examples:\n" + "\n".join(f"  hybridkex {_joined(one)}" for one in examples)]
    below.append(_paragraphs(f"exit status: {status}"))
    if notes:
        below.append(_paragraphs(notes))
    parser.epilog = "\n\n".join(below)


def _joined(example: str) -> str:
    return re.sub(r"\s*\\\n\s*", " ", example)


def _paragraphs(text: str) -> str:
    width = max(min(shutil.get_terminal_size().columns, _WIDEST) - 2, _NARROWEST)
    return "\n\n".join(textwrap.fill(part, width) for part in text.split("\n\n"))
