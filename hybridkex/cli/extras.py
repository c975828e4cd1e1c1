"""The extras of the installed package."""

import re
from collections.abc import Mapping
from typing import Final

_OF_EXTRA: Final = re.compile(r"([\w.-]+).*extra == ['\"]([\w-]+)")
"""A line of Requires-Dist that is for an extra."""


def modules_of_extras() -> Mapping[str, list[str]]:
    """The modules that each extra brings; empty in a checkout that is not installed."""
    from importlib import metadata  # noqa: PLC0415  # 20 modules, which no --help needs

    try:
        required = metadata.requires("hybridkex") or ()
    except metadata.PackageNotFoundError:
        return {}
    found: dict[str, list[str]] = {}
    for package, extra in (one.groups() for one in map(_OF_EXTRA.match, required) if one):
        found.setdefault(extra, []).append(package.replace("-", "_"))
    return found
