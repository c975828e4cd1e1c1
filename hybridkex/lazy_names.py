"""Names of a package that come from its modules when they are first used (PEP 562).

A client program needs neither the certificate authority for tests nor the listener of a server, and
importing them would take a large part of its start-up time.
"""

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any


def lazy_names(package: str, homes: Mapping[str, tuple[str, ...]]) -> Callable[[str], Any]:
    """The function ``__getattr__`` of a package.

    Args:
        package: its name.
        homes: the modules, with the names that come from them.
    """
    modules = {name: module for module, names in homes.items() for name in names}

    def of_module(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(modules[name]), name)
        setattr(sys.modules[package], name, value)  # the next time it is found without this
        return value

    return of_module
