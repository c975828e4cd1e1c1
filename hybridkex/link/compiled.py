"""Functions that numba compiles; only the modules whose names end in ``_loops`` import this."""

from collections.abc import Callable
from typing import Any, TypeVar, cast

from hybridkex.extras import needs

with needs("fast"):
    import numba

Function = TypeVar("Function", bound=Callable[..., Any])


def compiled(function: Function) -> Function:
    """Compile at the first call, keep the code on disk, and release the GIL while it runs."""
    try:
        return cast(Function, numba.njit(cache=True, nogil=True)(function))
    except RuntimeError:  # no folder where compiled code could be kept
        return cast(Function, numba.njit(nogil=True)(function))


def inlined(function: Function) -> Function:
    """Part of the compiled functions that call it."""
    return cast(Function, numba.njit(inline="always")(function))
