"""How parsed options become the argument of a command's function.

The parser of a command names a dataclass and the function that takes it. Only this module connects
the two: the function's module is imported when the command runs, so that ``--help`` and wrong
options need neither heavy imports nor an extra.
"""

import argparse
import dataclasses
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, get_type_hints

from hybridkex.errors import ConfigError

__all__ = ["Action", "from_namespace"]

T = TypeVar("T")


def from_namespace(options: type[T], namespace: argparse.Namespace) -> T:
    """Build a dataclass whose fields have the names of the parsed options.

    A field that is a dataclass itself is a group of options and is filled from the same namespace.
    """
    kinds = get_type_hints(options)
    return options(
        **{
            name: from_namespace(kind, namespace)
            if isinstance(kind, type) and dataclasses.is_dataclass(kind)
            else getattr(namespace, name)
            for name, kind in kinds.items()
        }
    )


@dataclass(frozen=True)
class Action:
    """What a command does, for ``parser.set_defaults(action=...)``.

    Args:
        module: its module in :mod:`hybridkex.cli.actions`.
        options: a dataclass, see :func:`from_namespace`.
        extra: what to install in brackets if a package is missing, such as ``kme,link``.
        function: takes the dataclass and returns the exit status.
    """

    module: str
    options: type
    extra: str | None = None
    function: str = "run"

    def __call__(self, namespace: argparse.Namespace) -> int:
        """Run it.

        Raises:
            ConfigError: a package of an extra is missing; the message names the extra.
        """
        options: object = from_namespace(self.options, namespace)
        run = self._load()
        try:
            return run(options)
        except ModuleNotFoundError as missing:
            raise self._explained(missing) from None

    def _load(self) -> Callable[[Any], int]:
        try:
            module = importlib.import_module(f"hybridkex.cli.actions.{self.module}")
        except ModuleNotFoundError as missing:
            raise self._explained(missing) from None
        run: Callable[[Any], int] = getattr(module, self.function)
        return run

    def _explained(self, missing: ModuleNotFoundError) -> Exception:
        if self.extra is None or missing.name is None or missing.name.startswith("hybridkex"):
            return missing
        return ConfigError(
            f"this command needs the package {missing.name.partition('.')[0]}, which is not "
            f"installed: pip install 'hybridkex[{self.extra}]'"
        )
