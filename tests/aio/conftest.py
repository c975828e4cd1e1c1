"""Runs a coroutine on asyncio or uvloop, in asyncio's debug mode unless a test asks otherwise."""

import asyncio
import gc
import warnings
from collections.abc import Coroutine
from typing import Any

import pytest
from aio_glue import Run, loop_factory, without_stacks

from hybridkex import ClientConfig, DevCa, ServerConfig, TrustStore


@pytest.fixture(scope="session")
def ca() -> DevCa:
    return DevCa.create()


@pytest.fixture(scope="session")
def client_config(ca: DevCa) -> ClientConfig:
    return ClientConfig(verifier=TrustStore((ca.certificate,)))


@pytest.fixture(scope="session")
def server_config(ca: DevCa) -> ServerConfig:
    return ServerConfig(identities=(ca.issue("localhost"),))


@pytest.fixture(params=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Run:
    """``run(coroutine)``: its result, from a loop that has no task, error or socket left."""
    factory = loop_factory(request.param)

    def run_it(
        coroutine: Coroutine[Any, Any, Any], seconds: float = 60, *, debug: bool = True
    ) -> Any:
        problems: list[dict[str, Any]] = []

        async def watched() -> Any:
            asyncio.get_running_loop().set_exception_handler(
                lambda _loop, context: problems.append(context)
            )
            async with asyncio.timeout(seconds):
                result = await coroutine
            for _ in range(100):  # what was closed goes within a few turns
                left = asyncio.all_tasks() - {asyncio.current_task()}
                if not left:
                    break
                await asyncio.sleep(0.01)
            assert not left
            return result

        with (
            warnings.catch_warnings(),
            without_stacks(),
            asyncio.Runner(loop_factory=factory, debug=debug) as runner,
        ):
            warnings.simplefilter("error")
            try:
                result = runner.run(watched())
            except BaseException:
                # uvloop's close() waits for ever for a connection whose ResourceWarning is raised.
                warnings.simplefilter("ignore")
                raise
        gc.collect()
        assert problems == []
        return result

    return run_it
