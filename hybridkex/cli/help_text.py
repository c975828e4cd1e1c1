"""The parts of ``--help`` other than the options, in one form for every command."""

import argparse
import re
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Final

_WIDEST: Final = 100
"""Columns; longer lines are hard to read, however wide the terminal is."""
_NARROWEST: Final = 20
"""Columns; shorter lines are hard to read, too, and a terminal may say that it has 1."""


_wrap: Final = partial(textwrap.wrap, break_on_hyphens=False)  # file names have hyphens


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of descriptions and examples, and wraps those that are too long.

    A command line is continued behind a backslash, before an option, so that it can be copied.
    """

    def _split_lines(self, text: str, width: int) -> list[str]:
        return _wrap(" ".join(text.split()), width)

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
        yield from _wrap(line, width, subsequent_indent=" " * hanging.end() if hanging else indent)


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


def below_options(examples: Sequence[str], status: str, notes: str) -> str:
    """The text below the options: examples, exit status and notes."""
    parts = ["examples:\n" + "\n".join(f"  hybridkex {_joined(one)}" for one in examples)]
    return "\n\n".join([*parts, *map(paragraphs, filter(None, (f"exit status: {status}", notes)))])


def _joined(example: str) -> str:
    return re.sub(r"\s*\\\n\s*", " ", example)


def paragraphs(text: str) -> str:
    """Wrap the lines of paragraphs that an empty line holds apart."""
    width = max(min(shutil.get_terminal_size().columns, _WIDEST) - 2, _NARROWEST)
    return "\n\n".join("\n".join(_wrap(part, width)) for part in text.split("\n\n"))
