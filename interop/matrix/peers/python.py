"""Agents in Python, as a rule in the interpreter that runs the matrix."""

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.util import find_spec
from tempfile import TemporaryDirectory

from interop.matrix.peer import Missing, Running, agent

__all__ = ["python_agent"]


@asynccontextmanager
async def python_agent(
    module: str, *arguments: str, needs: str, package: str, interpreter: str = sys.executable
) -> AsyncIterator[Running]:
    """Run a module of ``agents``; ``needs`` is what it imports, from ``package``.

    Its last argument is a folder that it may write to.
    """
    if find_spec(needs) is None:
        raise Missing(f"pip install '{package}'")
    name = f"interop.matrix.agents.{module}"
    with TemporaryDirectory(prefix="interop-") as folder:
        command = [interpreter, "-W", "ignore", "-m", name, *arguments, folder]
        async with agent(*command) as running:
            yield running
