"""Cells of the matrix: a case, a peer, and the role of hybridkex."""

from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, replace
from enum import Enum
from fnmatch import fnmatchcase
from functools import partial
from typing import Final

import trio

from interop.matrix import ours
from interop.matrix.cases import Case, other_end
from interop.matrix.material import Materials
from interop.matrix.peer import Missing, Peer, PeerFailed, Running
from interop.matrix.task import Report, Role, Task, digest, text

__all__ = ["DEADLINE", "Cell", "Outcome", "Result", "cells", "missing_from", "run", "run_all"]

DEADLINE: Final = 60.0
"""Seconds for one cell, on a machine that may be loaded."""

_TRAFFIC: Final = frozenset(
    {
        "CLIENT_HANDSHAKE_TRAFFIC_SECRET",
        "SERVER_HANDSHAKE_TRAFFIC_SECRET",
        "CLIENT_TRAFFIC_SECRET_0",
        "SERVER_TRAFFIC_SECRET_0",
    }
)
# Not everybody logs this one.
_SECRETS: Final = _TRAFFIC | {"EXPORTER_SECRET"}


SHELLS: Final = ("trio", "asyncio")
"""The shells of hybridkex that every case is run on."""


class Outcome(Enum):
    """The outcome of a cell."""

    PASSED = "passed"
    FAILED = "failed"
    NOT_SUPPORTED = "not supported"
    """The peer lacks a feature that the case needs."""
    MISSING = "peer missing"


@dataclass(frozen=True)
class Cell:
    """One cell: a case, a peer and a role."""

    peer: Peer
    case: Case
    ours: Role
    shell: str

    def __str__(self) -> str:
        us = f"hybridkex on {self.shell} as {self.ours}"
        return f"{self.peer.name}, {us}: {self.case.area}, {self.case.name}"


@dataclass(frozen=True)
class Result:
    """The outcome, and the reason unless it passed."""

    cell: Cell
    outcome: Outcome
    reason: str = ""


def cells(
    peers: Iterable[Peer], cases: Iterable[Case], shells: Iterable[str] = SHELLS
) -> list[Cell]:
    """All cells, peer by peer."""
    cases, shells = tuple(cases), tuple(shells)
    return [
        Cell(peer, case, role, shell)
        for peer in peers
        for case in cases
        for role in case.ours
        for shell in shells
    ]


def missing_from(cell: Cell) -> str | None:
    """Return why the peer cannot run the case; ``None`` if it can."""
    role = other_end(cell.ours)
    for need in cell.case.needs:
        for pattern, reason in cell.peer.lacks.items():
            if fnmatchcase(f"{role} {need}", pattern):
                return reason
    return None


async def run(cell: Cell, running: Running, materials: Materials) -> Result:
    """Run one cell. A failure of either end is an outcome, not an exception."""
    reason = missing_from(cell)
    if reason is not None:
        return Result(cell, Outcome.NOT_SUPPORTED, reason)
    try:
        with trio.fail_after(DEADLINE):
            complaints = await _try(cell, running, materials)
    except trio.TooSlowError:
        complaints = [f"no end within {DEADLINE:g} seconds"]
    except Exception as error:
        complaints = list(_reasons(error))
    outcome = Outcome.FAILED if complaints else Outcome.PASSED
    return Result(cell, outcome, "; ".join(complaints))


def _reasons(error: BaseException) -> Iterable[str]:
    if isinstance(error, BaseExceptionGroup):
        for one in error.exceptions:
            yield from _reasons(one)
    elif isinstance(error, PeerFailed):
        yield f"the peer: {error}"
    else:
        cause = error.__cause__ or error
        yield f"hybridkex: {type(cause).__name__}: {cause}"


async def _try(cell: Cell, running: Running, materials: Materials) -> list[str]:
    """Return what is wrong with the cell; empty if it passed."""
    # RSA and ML-DSA keys take a while to make.
    our_task, peer_task = await trio.to_thread.run_sync(cell.case.tasks, cell.ours, materials)
    converse: ours.Conversation
    if not cell.peer.http:
        converse = ours.stream
    elif cell.ours == "client":
        converse = ours.http_client
    else:
        converse = partial(ours.http_server, cell.peer.page)
    here: list[Report] = []
    there: list[Report] = []

    async def server(*, task_status: trio.TaskStatus[int] = trio.TASK_STATUS_IGNORED) -> None:
        if cell.ours == "server":
            serving = ours.serve(our_task, converse, shell=cell.shell, task_status=task_status)
            here.extend(await serving)
        else:
            there.extend(await running.serve(peer_task, task_status=task_status))

    errors: list[Exception] = []
    async with trio.open_nursery() as nursery:
        port: int = await nursery.start(_collecting, errors, server)
        try:
            if cell.ours == "client":
                here.extend(await ours.connect(our_task, port, converse, shell=cell.shell))
            else:
                there.extend(await running.connect(replace(peer_task, port=port)))
        except Exception as error:
            errors.append(error)
            # The other side's reason often says more: let it come.
            nursery.cancel_scope.deadline = trio.current_time() + 2
    if errors:
        return [reason for error in errors for reason in _reasons(error)]
    return list(_judge(cell.case, our_task, peer_task, here, there))


async def _collecting(
    errors: list[Exception],
    server: Callable[..., Awaitable[None]],
    *,
    task_status: trio.TaskStatus[int] = trio.TASK_STATUS_IGNORED,
) -> None:
    try:
        await server(task_status=task_status)
    except Exception as error:
        errors.append(error)


def _judge(
    case: Case, our_task: Task, peer_task: Task, here: list[Report], there: list[Report]
) -> Iterable[str]:
    """Return what is wrong with the reports of the two ends."""
    if len(here) != our_task.connections or len(there) != peer_task.connections:
        yield f"{len(here)} and {len(there)} reports of {our_task.connections} connections"
        return
    for number, (we, they) in enumerate(zip(here, there, strict=True)):
        yield from _judge_ours(case, our_task, we, number)
        yield from _compare(case, peer_task, we, they)


def _judge_ours(case: Case, task: Task, we: Report, number: int) -> Iterable[str]:
    for what, value, expected in (
        ("group", we.group, case.group or we.group),
        ("cipher suite", we.suite, case.suite or we.suite),
        ("ALPN", we.alpn, "http/1.1" if case.alpn else we.alpn),
        ("resumed", we.resumed, number > 0),
        ("HelloRetryRequest", we.retried, case.retry_from is not None or case.no_share or None),
        ("peer's certificate", we.peer, task.expected and task.expected.fingerprint),
        ("what we heard", we.received, digest(text(other_end(task.role), task.size))),
        # Ours is asked for, so one comes back; or it is the peer's own.
        ("KeyUpdates", we.updates, 1 if case.update else None),
    ):
        if expected is not None and value != expected:
            yield f"{what}: {value} instead of {expected}"


def _compare(case: Case, task: Task, we: Report, they: Report) -> Iterable[str]:
    for what, value, expected in (
        ("group", they.group, we.group),
        ("cipher suite", they.suite, we.suite),
        ("ALPN", they.alpn, we.alpn),
        ("resumed", they.resumed, we.resumed),
        ("exporter", they.exporter, we.exporter),
        ("our certificate", they.peer, task.expected and task.expected.fingerprint),
        ("what it heard", they.received, digest(text(other_end(task.role), task.size))),
    ):
        if value is not None and expected is not None and value != expected:
            yield f"the peer says {what}: {value} instead of {expected}"
    for what in case.must_tell:
        if getattr(they, what) is None:
            yield f"the peer does not tell its {what}"
    if they.key_log is not None:
        mine, theirs = _by_label(we.key_log or ()), _by_label(they.key_log)
        for label in sorted(_TRAFFIC | theirs.keys()):
            if mine.get(label) != theirs.get(label):
                yield f"key log: {label} differs"


def _by_label(lines: Iterable[str]) -> dict[str, str]:
    return {line.split()[0]: line.lower() for line in lines if line.split()[0] in _SECRETS}


async def run_all(
    todo: Iterable[Cell], materials: Materials, *, at_once: int = 4
) -> tuple[dict[str, str], list[Result]]:
    """Versions of the peers by name, and the results in the order of the cells."""
    todo = list(todo)
    results: dict[int, Result] = {}
    versions: dict[str, str] = {}
    limit = trio.CapacityLimiter(at_once)

    async def one(number: int, running: Running) -> None:
        async with limit:
            results[number] = await run(todo[number], running, materials)

    async def of_peer(peer: Peer) -> None:
        mine = [number for number, cell in enumerate(todo) if cell.peer is peer]
        try:
            async with peer.open() as running:
                versions[peer.name] = running.version
                async with trio.open_nursery() as nursery:
                    for number in mine:
                        nursery.start_soon(one, number, running)
        except Missing as missing:
            for number in mine:
                results[number] = Result(todo[number], Outcome.MISSING, str(missing))

    async with trio.open_nursery() as nursery:
        for peer in dict.fromkeys(cell.peer for cell in todo):
            nursery.start_soon(of_peer, peer)
    return versions, [results[number] for number in range(len(todo))]
