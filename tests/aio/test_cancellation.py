"""Cancellation at each await: every coroutine of the asyncio shell and of ``hybridkex.anyio`` is
cancelled at its first point of suspension, then at its second, and so on to its end.

Nothing may hang, no task, transport or descriptor may be left, and the server must go on.
"""

import asyncio
import contextlib
import gc
import os
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import anyio.abc
import pytest
from aio_glue import Run, echo, loop_factory, plain_server, serving
from suspensions import cancelled_at

from hybridkex import ClientConfig, QkdPskSource, ServerConfig, TicketIssuer
from hybridkex.aio import (
    SecureTransport,
    create_connection,
    create_server,
    open_connection,
    start_server,
    start_tls,
    upgrade,
)
from hybridkex.anyio import SecureByteStream, SecureConnectable, SecureListener
from hybridkex.qkd.in_process import in_process_pair
from hybridkex.shell.ticket_file import FileTicketStore

Cancel = Callable[[], object]


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


async def settled() -> None:
    """Return when what was closed is gone."""
    async with asyncio.timeout(10):
        while len(asyncio.all_tasks()) > 1 or any(
            isinstance(one, SecureTransport) for one in gc.get_objects()
        ):
            await asyncio.sleep(0.01)
            gc.collect()


def waiting_configs(
    client: ClientConfig, server: ServerConfig, folder: Path
) -> tuple[ClientConfig, ServerConfig]:
    """Configurations whose handshakes wait for key sources, and for a file at the client."""
    alice, bob = in_process_pair("alice", "bob")
    return (
        replace(
            client,
            psk_source=QkdPskSource(alice),
            ticket_store=FileTicketStore(folder / "tickets"),
        ),
        replace(server, psk_source=QkdPskSource(bob), tickets=TicketIssuer()),
    )


async def end_writer(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()


async def end_transport(transport: asyncio.Transport) -> None:
    transport.abort()
    await asyncio.sleep(0)


async def end_server(server: asyncio.Server) -> None:
    server.close()
    await server.wait_closed()


Case = tuple[Callable[[], Coroutine[Any, Any, Any]], Callable[[Any], Awaitable[None]]]


def asyncio_cases(
    client: ClientConfig, server: ServerConfig, port: int, plain_port: int
) -> dict[str, Case]:
    """A coroutine function for each name, and what ends what it returns."""
    name = {"server_hostname": "localhost"}

    async def connect_and_start_tls() -> Any:
        transport, _ = await asyncio.get_running_loop().create_connection(
            asyncio.Protocol, "127.0.0.1", plain_port
        )
        try:
            return await start_tls(transport, asyncio.Protocol(), client, **name)
        finally:
            del transport

    async def connect_and_upgrade() -> Any:
        reader, writer = await asyncio.open_connection("127.0.0.1", plain_port)
        try:
            return await upgrade(reader, writer, client, **name)
        except BaseException:
            writer.close()
            raise

    async def talk() -> None:
        reader, writer = await open_connection("127.0.0.1", port, client, **name)
        try:
            writer.write(bytes(3 << 20))
            await writer.drain()
            await reader.readexactly(3 << 20)
            writer.write_eof()
            assert await reader.read() == b""
        finally:
            writer.close()
        await writer.wait_closed()

    async def nothing(_: object) -> None: ...

    return {
        "open_connection": (
            lambda: open_connection("127.0.0.1", port, client, **name),
            lambda made: end_writer(made[1]),
        ),
        "create_connection": (
            lambda: create_connection(asyncio.Protocol, "127.0.0.1", port, client, **name),
            lambda made: end_transport(made[0]),
        ),
        "start_tls": (connect_and_start_tls, end_transport),
        "upgrade": (connect_and_upgrade, lambda made: end_writer(made[1])),
        "start_server": (lambda: start_server(echo, "127.0.0.1", 0, server), end_server),
        "create_server": (
            lambda: create_server(asyncio.Protocol, "127.0.0.1", 0, server),
            end_server,
        ),
        "talk": (talk, nothing),
    }


ASYNCIO_CASES = (
    "open_connection",
    "create_connection",
    "start_tls",
    "upgrade",
    "start_server",
    "create_server",
    "talk",
)
HANDSHAKES = {*ASYNCIO_CASES, "connect", "wrap"} - {"start_server", "create_server"}


def with_and_without_key_sources(*cases: str) -> Any:
    """Each coroutine, and those that run a handshake once more, with one that waits."""
    params = [pytest.param(case, False, id=case) for case in cases]
    waiting = [one for one in cases if one in HANDSHAKES]
    params += [pytest.param(case, True, id=f"{case}, with key sources") for case in waiting]
    return pytest.mark.parametrize(("case", "waiting"), params)


@with_and_without_key_sources(*ASYNCIO_CASES)
def test_a_coroutine_of_the_asyncio_shell(
    run: Run,
    client_config: ClientConfig,
    server_config: ServerConfig,
    tmp_path: Path,
    no_log: None,
    case: str,
    waiting: bool,
) -> None:
    client, server = client_config, server_config
    if waiting:
        client, server = waiting_configs(client, server, tmp_path)

    async def upgraded(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await echo(*await upgrade(reader, writer, server))
        except ConnectionError:
            writer.close()

    async def one(step: int, start: Any, end: Any) -> bool:
        task, reached = asyncio.current_task(), list[bool]()
        assert task is not None
        with contextlib.suppress(asyncio.CancelledError):
            await end(await cancelled_at(step, start(), task.cancel, reached))
        return bool(reached)

    async def main() -> None:
        async with serving(server) as port, plain_server(upgraded) as plain_port:
            start, end = asyncio_cases(client, server, port, plain_port)[case]
            await end(await start())
            await settled()
            before, step = descriptors(), 0
            while await asyncio.create_task(one(step, start, end)):
                step += 1
            assert step or case.endswith("server")
            await end(await start())  # the server goes on
            await settled()
            assert descriptors() == before

    run(main())


BACKENDS = ("asyncio", "uvloop", "trio")


def run_anyio(backend: str, main: Callable[[], Awaitable[None]]) -> None:
    if backend == "trio":
        anyio.run(main, backend="trio")
    else:
        anyio.run(main, backend="asyncio", backend_options={"loop_factory": loop_factory(backend)})


@with_and_without_key_sources(
    "connect", "wrap", "send", "receive", "send_eof", "update_keys", "aclose", "abort"
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_coroutine_of_anyio(
    backend: str,
    client_config: ClientConfig,
    server_config: ServerConfig,
    tmp_path: Path,
    no_log: None,
    case: str,
    waiting: bool,
) -> None:
    client, server = client_config, server_config
    if waiting:
        client, server = waiting_configs(client, server, tmp_path)

    async def serve_one(stream: SecureByteStream) -> None:
        with contextlib.suppress(
            anyio.EndOfStream, anyio.BrokenResourceError, anyio.ClosedResourceError
        ):
            async with stream:
                while True:
                    await stream.send(await stream.receive())

    async def work(connectable: SecureConnectable, step: int) -> bool:
        """One connection; the named coroutine is cancelled at ``step``."""
        reached: list[bool] = []

        async def cancelling(coroutine: Coroutine[Any, Any, Any]) -> Any:
            with anyio.CancelScope() as scope:
                return await cancelled_at(step, coroutine, scope.cancel, reached)

        async def wrap() -> SecureByteStream:
            tcp = await connectable.connectable.connect()
            return await SecureByteStream.wrap(tcp, client, server_hostname="localhost")

        stream: Any = None
        if case in ("connect", "wrap"):
            stream = await cancelling(connectable.connect() if case == "connect" else wrap())
            if stream is not None:
                await stream.aclose()
            return bool(reached)
        stream = await connectable.connect()
        if case == "receive":
            await stream.send(b"answer this")
        arguments = {"send": (bytes(1 << 20),)}.get(case, ())
        await cancelling(getattr(stream, case)(*arguments))
        await anyio.aclose_forcefully(stream)
        return bool(reached)

    async def main() -> None:
        with anyio.fail_after(50):
            plain = await anyio.create_tcp_listener(local_host="127.0.0.1")
            tcp = anyio.TCPConnectable(
                "127.0.0.1", plain.extra(anyio.abc.SocketAttribute.local_port)
            )
            connectable = SecureConnectable(tcp, client, server_hostname="localhost")
            async with (
                SecureListener(plain, server) as listener,
                anyio.create_task_group() as group,
            ):
                group.start_soon(listener.serve, serve_one)
                await work(connectable, 1000)
                await anyio.sleep(0.05)
                before, step = descriptors(), 0
                while await work(connectable, step):
                    step += 1
                await work(connectable, 1000)  # the server goes on
                with anyio.fail_after(5):
                    while descriptors() > before:
                        gc.collect()
                        await anyio.sleep(0.01)
                assert step
                group.cancel_scope.cancel()

    run_anyio(backend, main)


def test_the_instrument_cancels_at_each_point(run: Run) -> None:
    """``cancelled_at`` reaches every suspension, and no more."""

    async def three_points(passed: list[int]) -> None:
        for point in range(3):
            await asyncio.sleep(0)
            passed.append(point)

    async def one(step: int) -> tuple[list[int], bool]:
        task, passed, reached = asyncio.current_task(), list[int](), list[bool]()
        assert task is not None
        with contextlib.suppress(asyncio.CancelledError):
            await cancelled_at(step, three_points(passed), task.cancel, reached)
        return passed, bool(reached)

    async def main() -> None:
        found = [await asyncio.create_task(one(step)) for step in range(4)]
        assert found == [([], True), ([0], True), ([0, 1], True), ([0, 1, 2], False)]

    run(main())
