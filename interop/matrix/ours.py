"""The hybridkex end of a case."""

import contextlib
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final

import trio
from cryptography import x509
from cryptography.hazmat.primitives import hashes

from hybridkex import (
    ALL_GROUPS,
    ALL_SUITES,
    ClientConfig,
    ExternalPsk,
    Group,
    Identity,
    MemoryTicketStore,
    Policy,
    Requirement,
    Secret,
    SecureStream,
    ServerConfig,
    TrustStore,
)
from hybridkex.constants import HELLO_RETRY_RANDOM
from hybridkex.crypto.kex import CLASSICAL_GROUPS, HYBRID_GROUPS
from interop.matrix.on_asyncio import AsyncioStream
from interop.matrix.task import Material, Report, Task, digest, text

__all__ = ["Conversation", "connect", "http_client", "http_server", "serve", "stream"]

_GROUPS: Final = {group.name: group for group in ALL_GROUPS}
_SUITES: Final = {suite.name: suite for suite in ALL_SUITES}
_HANDSHAKE_TIMEOUT: Final = 40.0
"""Seconds for a handshake: some peers compute ML-DSA in Python, for many cases at once."""
_ANY: Final = Policy(post_quantum=Requirement.PREFER)
_FRESH: Final = Policy(post_quantum=Requirement.PREFER, fresh_keys=Requirement.PREFER)

Conversation = Callable[["Ours", Task], Awaitable[bytes]]
"""A conversation over a connection; returns what the other end sent."""


class _Tap(trio.abc.HalfCloseableStream):
    """A transport that keeps the first bytes of both directions."""

    def __init__(self, transport: trio.SocketStream) -> None:
        self._transport = transport
        self.beginning = bytearray()

    def _note(self, data: bytes | bytearray | memoryview) -> None:
        if len(self.beginning) < 1 << 14:
            self.beginning += data

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        self._note(data)
        await self._transport.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self._transport.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        data = await self._transport.receive_some(max_bytes)
        self._note(data)
        return data

    async def send_eof(self) -> None:
        await self._transport.send_eof()

    async def aclose(self) -> None:
        await self._transport.aclose()


Ours = SecureStream[_Tap] | AsyncioStream
_SHELLS: Final = {"trio": SecureStream, "asyncio": AsyncioStream}


@dataclass
class _Log:
    lines: list[str] = field(default_factory=list)


def _client_config(task: Task, log: _Log) -> ClientConfig:
    groups = _groups(task)
    return ClientConfig(
        verifier=_trust(task.ca),
        identity=_identity(task.own),
        groups=groups,
        key_shares=task.shares,
        suites=tuple(_SUITES[name] for name in task.suites) or ALL_SUITES,
        alpn=task.alpn,
        psks=_psks(task),
        policy=_FRESH if task.fresh_keys else _ANY,
        ticket_store=MemoryTicketStore() if task.connections > 1 else None,
        key_log=log.lines.append,
    )


def _server_config(task: Task, log: _Log) -> ServerConfig:
    identities = (_identity(task.own), _identity(task.other))
    return ServerConfig(
        identities=tuple(one for one in identities if one is not None),
        client_verifier=_trust(task.ca),
        require_client_certificate=task.ca is not None,
        groups=_groups(task),
        suites=tuple(_SUITES[name] for name in task.suites) or ALL_SUITES,
        alpn=task.alpn,
        psks=_psks(task),
        policy=_FRESH if task.fresh_keys else _ANY,
        key_log=log.lines.append,
    )


def _groups(task: Task) -> tuple[Group, ...]:
    return tuple(_GROUPS[name] for name in task.groups) or HYBRID_GROUPS + CLASSICAL_GROUPS


def _trust(ca: str | None) -> TrustStore | None:
    if ca is None:
        return None
    return TrustStore(tuple(x509.load_pem_x509_certificates(Path(ca).read_bytes())))


def _identity(material: Material | None) -> Identity | None:
    return None if material is None else Identity.from_files(material.chain, material.key)


def _psks(task: Task) -> tuple[ExternalPsk, ...]:
    if task.psk is None:
        return ()
    return (
        ExternalPsk(
            identity=task.psk.identity.encode(),
            key=Secret(bytes.fromhex(task.psk.key)),
            context=None if task.context is None else bytes.fromhex(task.context),
        ),
    )


async def connect(task: Task, port: int, converse: Conversation, *, shell: str) -> list[Report]:
    """Run the client of ``task.connections`` connections in turn."""
    log = _Log()
    config = _client_config(task, log)
    reports = []
    for _ in range(task.connections):
        tcp = _Tap(await trio.open_tcp_stream("127.0.0.1", port))
        stream = _SHELLS[shell](
            tcp,
            config,
            server_hostname=task.server_name,
            handshake_timeout=_HANDSHAKE_TIMEOUT,
        )
        reports.append(await _run(stream, task, log, converse))
    return reports


async def serve(
    task: Task,
    converse: Conversation,
    *,
    shell: str,
    task_status: trio.TaskStatus[int] = trio.TASK_STATUS_IGNORED,
) -> list[Report]:
    """Run the server of ``task.connections`` connections in turn; reports its port at the start."""
    log = _Log()
    config = _server_config(task, log)
    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with listener:
        task_status.started(listener.socket.getsockname()[1])
        reports = []
        for _ in range(task.connections):
            stream = _SHELLS[shell](
                _Tap(await listener.accept()), config, handshake_timeout=_HANDSHAKE_TIMEOUT
            )
            reports.append(await _run(stream, task, log, converse))
        return reports


async def _run(stream: Ours, task: Task, log: _Log, converse: Conversation) -> Report:
    log.lines.clear()
    try:
        async with trio.open_nursery() as nursery:
            if isinstance(stream, AsyncioStream):
                nursery.start_soon(stream.carry)
            await stream.do_handshake()
            # A transport of asyncio discards its keys as soon as both ends have closed.
            traffic = stream._connection._state
            exporter = stream.export(task.exporter.encode(), b"", 32).reveal().hex()
            received = await converse(stream, task)
            # The stream swallows the events of updates; the count is the state's own.
            updates = traffic._read_generation  # type: ignore[union-attr]
            report = _report(stream, log, received, exporter, updates)
            if isinstance(stream, AsyncioStream):
                # What was written last is on its way through the socket pair.
                await trio.sleep(0.05)
            nursery.cancel_scope.cancel()
        return report
    finally:
        with trio.move_on_after(5):
            await trio.aclose_forcefully(stream)


def _report(stream: Ours, log: _Log, received: bytes, exporter: str, updates: int) -> Report:
    session = stream.session
    shown = session.peer_credential
    leaf = None if shown is None else x509.load_der_x509_certificate(shown.chain[0])
    return Report(
        group=session.group,
        suite=session.cipher_suite,
        alpn=session.alpn or "",
        resumed=session.resumed,
        server_name=session.server_name,
        peer=None if leaf is None else leaf.fingerprint(hashes.SHA256()).hex(),
        exporter=exporter,
        key_log=tuple(log.lines),
        received=digest(received),
        retried=HELLO_RETRY_RANDOM in stream.transport_stream.beginning,
        updates=updates,
    )


# --- conversations ------------------------------------------------------------------------------


async def stream(stream: Ours, task: Task) -> bytes:
    """Send bytes both ways and close; ``task.py`` gives the order."""
    received = b""

    async def listen() -> None:
        nonlocal received
        received = await _listen(stream, task)

    speak = partial(_speak, stream, task)
    if task.first is None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(speak)
            nursery.start_soon(listen)
    else:
        for turn in (speak, listen) if task.first == task.role else (listen, speak):
            await turn()
    await stream.send_eof()
    return received + await _rest(stream)


async def _speak(stream: Ours, task: Task) -> None:
    said = text(task.role, task.size)
    half = len(said) // 2
    await stream.send_all(said[:half])
    if task.update:
        await stream.update_keys(request_peer=True)
    await stream.send_all(said[half:])
    if task.half_close and task.first == task.role:
        await stream.send_eof()


async def _listen(stream: Ours, task: Task) -> bytes:
    heard = bytearray()
    while len(heard) < task.size and (data := await stream.receive_some()):
        heard += data
    if task.half_close and task.first != task.role:
        heard += await _rest(stream)
    return bytes(heard)


async def _rest(stream: Ours) -> bytes:
    return b"".join([bytes(data) async for data in stream])


async def http_client(stream: Ours, task: Task) -> bytes:
    """Send the text in a POST and read the other text from the response.

    The end of the response closes the connection (HTTP/1.0, RFC 1945).
    """
    head = f"POST / HTTP/1.0\r\nHost: {task.server_name}\r\nContent-Length: {task.size}\r\n\r\n"
    await stream.send_all(head.encode())
    await _speak(stream, task)
    status, _, rest = (await _rest(stream)).partition(b"\r\n")
    if not status.endswith(b" 200 OK"):
        raise ValueError(f"the response {status!r}")
    return rest.partition(b"\r\n\r\n")[2]


async def http_server(page: bytes, stream: Ours, task: Task) -> bytes:
    """Hear it in a POST and say it in the response, which ends the connection; whoever gets the
    root before that is given ``page``."""
    buffer = bytearray()

    def headed() -> bool:
        return b"\r\n\r\n" in buffer

    async def until(complete: Callable[[], bool]) -> None:
        while not complete():
            data = await stream.receive_some()
            if not data:
                raise EOFError("the client ended before its POST")
            buffer.extend(data)

    while True:
        await until(headed)
        head, _, rest = bytes(buffer).partition(b"\r\n\r\n")
        buffer[:] = rest
        if head.startswith(b"POST "):
            break
        found = head.startswith((b"GET / ", b"GET /?"))
        await stream.send_all(_response("200 OK" if found else "404 Not Found", page * found))
    length = re.search(rb"\r\ncontent-length: *(\d+)", head, re.IGNORECASE)
    if length is None:
        raise ValueError("a POST without Content-Length")
    await until(lambda: len(buffer) >= int(length[1]))
    await stream.send_all(_response("200 OK", text(task.role, task.size), "Connection: close\r\n"))
    # A browser may end without close_notify, as soon as it has the response.
    with contextlib.suppress(trio.BrokenResourceError, ConnectionError):
        await stream.send_eof()
        await _rest(stream)
    return bytes(buffer)


def _response(status: str, body: bytes, more: str = "") -> bytes:
    fields = f"Content-Length: {len(body)}\r\nContent-Type: text/html\r\n{more}"
    return f"HTTP/1.1 {status}\r\n{fields}\r\n".encode() + body
