"""A table of a TOML file as the options of a command: ``max-connections = 9`` is
``--max-connections 9``.

What an option means, what it may be and what it goes with is written once, in the command's parser.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from hybridkex.errors import ConfigError

__all__ = ["OptionTable", "read_options"]


class OptionTable(argparse.ArgumentParser):
    """A parser whose complaints are ``ConfigError``."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message.removeprefix("argument --"))


def read_options(
    table: Mapping[str, Any], options: "argparse.ArgumentParser", base: Path
) -> argparse.Namespace:
    """What the parser makes of a table; files in it are relative to ``base``.

    Args:
        table: names of options, without their hyphens, and values: ``true`` for an option that
            takes none, an array for one that is given several times or takes a list.
        options: an :class:`OptionTable`.
        base: the folder of the file.

    Raises:
        ConfigError: no such option, or a value that it does not take.
    """
    # argparse has no public way to look an option up.
    known = {text: action for action in options._actions for text in action.option_strings}
    words: list[str] = []
    for name, value in table.items():
        action = known.get(f"--{name}")
        if action is None or action.dest == "help":
            raise ConfigError(f"{name} is not a setting")
        words += _words(name, value, action, base)
    return options.parse_args(words)


def _words(name: str, value: Any, action: argparse.Action, base: Path) -> list[str]:
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise ConfigError(f"{name} is true or false")
        return [f"--{name}"] if value else []
    items = value if isinstance(value, list) else [value]
    if not all(isinstance(item, str | int | float) and item is not True for item in items):
        raise ConfigError(f"{name} is not of the right type")
    texts = [_located(str(item), action.metavar, base) for item in items]
    if isinstance(action, argparse._AppendAction):
        return [f"--{name}={text}" for text in texts]
    if isinstance(value, list) and action.metavar != "LIST":
        raise ConfigError(f"{name} takes one value")
    return [f"--{name}={','.join(texts)}"]


def _located(text: str, metavar: object, base: Path) -> str:
    """A file's name, or a Unix socket's, from the folder of the configuration."""
    if metavar == "FILE":
        return str(base / text)
    if metavar == "ADDRESS" and text.startswith("unix:"):
        return f"unix:{base / text.removeprefix('unix:')}"
    return text
