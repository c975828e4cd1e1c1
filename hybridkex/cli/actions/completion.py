"""``hybridkex completion``: a script that completes commands, options and file names in a shell."""

import argparse
from pathlib import Path
from typing import Final

import shtab

from hybridkex.cli.commands import COMMANDS, command_parser
from hybridkex.cli.completion import CompletionOptions
from hybridkex.cli.values import file_path, folder_path
from hybridkex.errors import ConfigError

_COMPLETED: Final = {Path: shtab.FILE, file_path: shtab.FILE, folder_path: shtab.DIRECTORY}
"""The completions of a value, by the option's type."""


def run(options: CompletionOptions) -> int:
    if options.shell not in shtab.SUPPORTED_SHELLS:
        raise ConfigError(
            f"the installed shtab does not support {options.shell}: pip install --upgrade shtab"
        )
    print(shtab.complete(_whole_parser(), shell=options.shell))
    return 0


def _whole_parser() -> argparse.ArgumentParser:
    """All commands in one parser; otherwise they are loaded one at a time."""
    whole = argparse.ArgumentParser(prog="hybridkex", description="secure channels")
    whole.add_argument("--version", action="version", version="", help="print the version")
    commands = whole.add_subparsers(dest="command", metavar="command")
    for name, summary in COMMANDS.items():
        added = commands.add_parser(
            name, help=summary, parents=[command_parser(name)], add_help=False
        )
        added.description = summary
    _complete_files(whole)
    return whole


def _complete_files(parser: argparse.ArgumentParser) -> None:
    # Neither argparse nor shtab has a public way to walk a parser.
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                _complete_files(inner)
        elif action.type in _COMPLETED:
            action.complete = _COMPLETED[action.type]  # type: ignore[attr-defined]
