"""liboqs, found before it is imported.

``liboqs-python`` is a wrapper around a native library. When its import finds none, it prints a
countdown, clones and builds liboqs, and ends the process if that fails. This module, the only one
that imports it, first looks for the library in the same places. Where there is none, it says how to
install it. Nothing is imported until an algorithm is used.
"""

import ctypes
import importlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

from hybridkex.errors import ProviderMissing

HOW_TO_GET_IT: Final = (
    "install hybridkex[oqs], and the shared library liboqs from your distribution or into "
    "OQS_INSTALL_PATH (docs/plug-ins.md)"
)

_SUFFIX: Final = {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")
_FOLDERS: Final = ("bin",) if sys.platform == "win32" else ("lib", "lib64")


def _candidates() -> Iterator[str]:
    """The places where liboqs-python looks, in its order."""
    import ctypes.util  # noqa: PLC0415  # for this alone: most programs use no liboqs

    for name in ("liboqs", "oqs"):
        found = ctypes.util.find_library(name)
        if found:
            yield found
    try:
        # Set but empty means the working directory to liboqs-python. With another rule here,
        # liboqs-python would start a build.
        named = os.environ.get("OQS_INSTALL_PATH")
        root = Path.home() / "_oqs" if named is None else Path(named)
    except RuntimeError:
        return  # A user without a home directory.
    for folder in _FOLDERS:
        yield str(root.absolute() / folder / f"liboqs{_SUFFIX}")


def _find_library() -> str | None:
    for path in _candidates():
        try:
            ctypes.CDLL(path)
        except OSError:
            continue
        return path
    return None


def _import(library: str) -> Any:
    """The module ``oqs``; ``library`` is known to load."""
    # On import it logs to standard output with its own handler.
    logging.getLogger("oqs.oqs").disabled = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # It warns about the two versions, which oqs_status reports.
            return importlib.import_module("oqs")
    except ModuleNotFoundError as missing:
        if missing.name != "oqs":
            raise
        raise ProviderMissing(
            f"the package liboqs-python is not installed: {HOW_TO_GET_IT}"
        ) from None
    except (SystemExit, RuntimeError, AttributeError, OSError) as error:
        # AttributeError: a library of this name that lacks functions of liboqs.
        raise ProviderMissing(
            f"{library} is not a liboqs that liboqs-python can use ({error}): {HOW_TO_GET_IT}"
        ) from None


@cache
def load() -> Any:
    """The module ``oqs`` of liboqs-python.

    Raises:
        ProviderMissing: the native library or the package is missing; the message says how to get
            it.
    """
    library = _find_library()
    if library is None:
        raise ProviderMissing(f"the native library liboqs was not found: {HOW_TO_GET_IT}")
    return _import(library)


@dataclass(frozen=True, kw_only=True)
class OqsStatus:
    location: str | None
    """The native library that was found: a path, or a name that the linker knows."""
    library_version: str | None
    package_version: str | None
    """The version of ``liboqs-python``."""
    kems: tuple[str, ...]
    """The enabled key encapsulation mechanisms, by liboqs's names."""
    signatures: tuple[str, ...]
    """The enabled signature algorithms, by liboqs's names."""
    problem: str | None
    """Why it cannot be used, and how to get it; ``None`` where it can."""

    @property
    def available(self) -> bool:
        """Whether liboqs can be used."""
        return self.problem is None


def oqs_status() -> OqsStatus:
    """The installation of liboqs. This function raises nothing, prints nothing and builds
    nothing."""
    import importlib.metadata  # noqa: PLC0415  # as above

    try:
        package = importlib.metadata.version("liboqs-python")
    except importlib.metadata.PackageNotFoundError:
        package = None
    version, kems, signatures, problem = None, (), (), None
    try:
        oqs = load()
    except ProviderMissing as missing:
        problem = str(missing)
    else:
        version = oqs.oqs_version()
        kems = oqs.get_enabled_kem_mechanisms()
        signatures = oqs.get_enabled_sig_mechanisms()
    return OqsStatus(
        location=_find_library(),
        library_version=version,
        package_version=package,
        kems=tuple(kems),
        signatures=tuple(signatures),
        problem=problem,
    )
