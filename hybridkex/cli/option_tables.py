"""A table of a TOML file as the options of a command: ``max_connections = 9`` is
``--max-connections 9``.

The command's parser alone defines what an option means and which values it takes.
"""

import argparse
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NoReturn

from hybridkex.cli.values import address, comma_list, file_path, folder_path
from hybridkex.errors import ConfigError

_OPTION: Final = re.compile(r"--([a-z][a-z0-9-]*)")


class OptionTable(argparse.ArgumentParser):
    """A parser that raises ``ConfigError``."""

    def error(self, message: str) -> NoReturn:
        # In the terms of a configuration file.
        text = _OPTION.sub(lambda found: found[1].replace("-", "_"), message)
        raise ConfigError(text.removeprefix("argument "))


def read_options(
    table: Mapping[str, Any], options: "argparse.ArgumentParser", base: Path
) -> argparse.Namespace:
    """Parse a table as the options of a command; files in it are relative to ``base``.

    Args:
        table: names of options, with underscores for their hyphens, and values: ``true`` for an
            option that takes none, an array for one that is given several times or takes a list.
        options: an :class:`OptionTable`.
        base: the folder of the file.

    Raises:
        ConfigError: an unknown option, or an invalid value.
    """
    # argparse has no public way to look an option up.
    known = {text: action for action in options._actions for text in action.option_strings}
    words: list[str] = []
    for name, value in table.items():
        option = name.replace("_", "-")
        action = known.get(f"--{option}")
        if action is None or action.dest == "help":
            raise ConfigError(f"unknown setting {name}")
        if "-" in name:
            raise ConfigError(f"write {name} as {name.replace('-', '_')} in a file")
        words += [f"--{option}{rest}" for rest in _values(name, value, action, base)]
    return options.parse_args(words)


def _values(name: str, value: Any, action: argparse.Action, base: Path) -> list[str]:
    """The arguments of the option, for each time that it is given."""
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise ConfigError(f"{name} must be true or false")
        return [""] if value else []
    items = value if isinstance(value, list) else [value]
    if not all(
        isinstance(item, str | int | float) and not isinstance(item, bool) for item in items
    ):
        raise ConfigError(f"{name} has the wrong type: it must be a string or a number")
    if action.type in (file_path, folder_path, address) and not all(
        isinstance(item, str) for item in items
    ):
        raise ConfigError(f"{name} has the wrong type: it must be a string")
    texts = [_located(str(item), action, base) for item in items]
    if isinstance(action, argparse._AppendAction):
        return [f"={text}" for text in texts]
    if isinstance(value, list) and action.type is not comma_list:
        raise ConfigError(f"{name} takes one value")
    return [f"={','.join(texts)}"]


def _located(text: str, action: argparse.Action, base: Path) -> str:
    """A file path or a Unix socket's path, relative to the folder of the configuration."""
    if action.type in (file_path, folder_path):
        return str(base / text) if text else text  # an empty one is refused
    if action.type is address and text.startswith("unix:"):
        return f"unix:{base / text.removeprefix('unix:')}"
    return text
