"""``hybridkex completion``: a script that completes commands, options and file names in a shell."""

import argparse
from pathlib import Path
from typing import Final

import shtab

from hybridkex.cli.commands import COMMANDS, command_parser
from hybridkex.cli.manual import describe
from hybridkex.cli.values import file_path, folder_path
from hybridkex.errors import ConfigError

__all__ = ["configure", "run"]

_COMPLETED: Final = {Path: shtab.FILE, file_path: shtab.FILE, folder_path: shtab.DIRECTORY}
"""What the shell offers for a value, by the option's type."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    describe(
        parser,
        "Print a script for a shell, which then completes the names of commands and options, the "
        "values that an option can have, and file names. It knows the commands whose packages are "
        "installed; make it anew after an upgrade.",
        examples=[
            "completion bash > ~/.local/share/bash-completion/completions/hybridkex",
            "completion zsh > ~/.zfunc/_hybridkex   # a folder of $fpath",
            "completion fish > ~/.config/fish/completions/hybridkex.fish",
        ],
    )
    parser.add_argument(
        "shell", choices=shtab.SUPPORTED_SHELLS, help="the shell to generate the script for"
    )


def run(args: argparse.Namespace) -> int:
    """Print the script."""
    print(shtab.complete(_whole_parser(), shell=args.shell))
    return 0


def _whole_parser() -> argparse.ArgumentParser:
    """All commands in one parser, which otherwise are loaded one at a time."""
    whole = argparse.ArgumentParser(prog="hybridkex", description="secure channels")
    whole.add_argument("--version", action="version", version="", help="print the version")
    commands = whole.add_subparsers(dest="command", metavar="command")
    for name, summary in COMMANDS.items():
        try:
            parser = command_parser(name)
        except ConfigError:  # A package is missing; the command's name is completed all the same.
            parser = argparse.ArgumentParser(description=summary)
        added = commands.add_parser(name, help=summary, parents=[parser], add_help=False)
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
