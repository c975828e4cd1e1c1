"""The error of an import whose extra is not installed."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def needs(extra: str) -> Iterator[None]:
    """Import packages of an extra in this context.

    Raises:
        ModuleNotFoundError: a package is missing; the message says how to install the extra.
    """
    try:
        yield
    except ModuleNotFoundError as missing:
        if missing.name is None or missing.name.startswith("hybridkex"):
            raise
        package = missing.name.partition(".")[0]
        raise ModuleNotFoundError(
            f"the package {package} is not installed: pip install 'hybridkex[{extra}]'",
            name=missing.name,
        ) from None
