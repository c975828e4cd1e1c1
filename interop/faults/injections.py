"""The faults. Each lasts some seconds."""

import contextlib
import random
import resource
import signal
import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Final

from interop.faults.services import Service
from interop.faults.world import Broken
from interop.immutable import can_be_immutable, immutable

__all__ = ["FAULTS", "Fault"]

Fault = Callable[[Service, random.Random, float], AbstractContextManager[None]]
"""A fault that is injected into a service and removed at the end of the context."""


def _use(service: Service, seconds: float) -> None:
    """Use the service during the fault; this may fail."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        with contextlib.suppress(Exception):
            service.ask()
        for process in service.processes:
            process.lines_allowed += service.lines_each
        time.sleep(0.05)


def _with_limit(kind: int, soft: Callable[[Service], int], service: Service) -> Iterator[None]:
    value = soft(service)
    for process in service.processes:
        process.limit(kind, value)
    try:
        yield
    finally:
        for process in service.processes:
            if process.alive():
                process.limit(kind, None)


@contextmanager
def disk_full(service: Service, choice: random.Random, seconds: float) -> Iterator[None]:
    """No file can grow beyond a random size (EFBIG, in place of ENOSPC): data, stores, the log."""
    size = choice.choice([0, 1, 100, 4096, 40_000])
    with contextmanager(_with_limit)(resource.RLIMIT_FSIZE, lambda _: size, service):
        _use(service, seconds)
        yield


@contextmanager
def no_descriptors(service: Service, choice: random.Random, seconds: float) -> Iterator[None]:
    """No file descriptor is left, or only a few (EMFILE)."""
    spare = choice.choice([0, 1, 2, 5])
    for process in service.processes:
        process.limit(resource.RLIMIT_NOFILE, process.descriptors() + spare)
    try:
        _use(service, seconds)
        yield
    finally:
        for process in service.processes:
            if process.alive():
                process.limit(resource.RLIMIT_NOFILE, None)


@contextmanager
def read_only(service: Service, choice: random.Random, seconds: float) -> Iterator[None]:
    """Its files and their folders are read-only, those that are open, too.

    Nothing happens where the machine cannot do it (:func:`interop.immutable.can_be_immutable`).
    """
    folder = service.data
    with immutable((folder, *folder.rglob("*")) if can_be_immutable(folder) else ()):
        _use(service, seconds)
        yield


@contextmanager
def clock(service: Service, choice: random.Random, seconds: float) -> Iterator[None]:
    """The clock is moved, by an hour up to a year, forwards or back, and then right again."""
    service.world.set_clock(
        choice.choice([-1, 1]) * choice.choice([3600.0, 86_400.0, 31_536_000.0])
    )
    try:
        _use(service, seconds)
        yield
    finally:
        service.world.set_clock(0)


@contextmanager
def no_threads(service: Service, choice: random.Random, seconds: float) -> Iterator[None]:
    """No new thread can be started, because the limit of tasks is reached (EAGAIN)."""
    service.world.no_threads.touch()
    try:
        _use(service, seconds)
        yield
    finally:
        service.world.no_threads.unlink()


@contextmanager
def no_memory(service: Service, choice: random.Random, seconds: float) -> Iterator[None]:
    """No more memory can be allocated, or only little (ENOMEM). The service may end, in order.

    (It may be ended by CPython's ``_ssl``, too, which follows a null pointer then.)
    """
    spare = choice.choice([0, 100_000, 200_000, 300_000, 2_000_000, 9_000_000])
    for process in service.processes:
        process.limit(resource.RLIMIT_AS, process.memory() + spare)
    try:
        _use(service, seconds)
        yield
    finally:
        for process in service.processes:
            if process.alive():
                process.limit(resource.RLIMIT_AS, None)
    ended = [process for process in service.processes if not process.alive()]
    for process in ended:
        process.check_log()
        if process.running.returncode not in (1, -signal.SIGSEGV):
            raise Broken(f"{process.name} ended with {process.running.returncode}")
    if ended:
        service.restart()


@contextmanager
def stopped(service: Service, choice: random.Random, seconds: float) -> Iterator[None]:
    """One of its processes is stopped (SIGSTOP)."""
    process = choice.choice(service.processes)
    process.signal(signal.SIGSTOP)
    try:
        time.sleep(seconds)
        yield
    finally:
        process.signal(signal.SIGCONT)


@contextmanager
def peers_stop(service: Service, choice: random.Random, seconds: float) -> Iterator[None]:
    """Connections that are silent, send random bytes, or are reset."""
    ports = [value for name in ("port", "metrics") if (value := getattr(service, name, None))]
    open_now = []
    until = time.monotonic() + seconds
    try:
        while ports and time.monotonic() < until and len(open_now) < 60:
            with contextlib.suppress(OSError):
                one = socket.create_connection(("127.0.0.1", choice.choice(ports)), 1)
                open_now.append(one)
                kind = choice.randrange(4)
                if kind == 0:
                    one.sendall(choice.randbytes(choice.randrange(300)))
                elif kind == 1:
                    one.sendall(b"\x16\x03\x01\x02\x00\x01")
                elif kind == 2:
                    one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    one.close()
            time.sleep(0.02)
        yield
    finally:
        for one in open_now:
            one.close()


@contextmanager
def signals(service: Service, choice: random.Random, seconds: float) -> Iterator[None]:
    """Many signals: SIGHUP, which reloads the configuration, and signals without an effect."""
    numbers = [signal.SIGWINCH, signal.SIGCHLD, signal.SIGURG, signal.SIGCONT]
    if service.reloads is not None:
        numbers += [signal.SIGHUP] * 4
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        for process in service.processes:
            process.signal(choice.choice(numbers))
        time.sleep(choice.uniform(0, 0.02))
    yield


@contextmanager
def bad_reloads(service: Service, choice: random.Random, seconds: float) -> Iterator[None]:
    """Invalid configurations, derived from the valid one, which is restored at the end."""
    if service.reloads is None:
        yield
        return
    good = service.reloads.read_bytes()
    until = time.monotonic() + seconds
    try:
        while time.monotonic() < until:
            _break(service, good, choice)
            for process in service.processes:
                process.signal(signal.SIGHUP)
            time.sleep(choice.uniform(0, 0.1))
        yield
    finally:
        service.reloads.write_bytes(good)
        for process in service.processes:
            process.signal(signal.SIGHUP)


_ODD_VALUES: Final = (
    '""', "0", "-1", "true", "[]", "{}", '"\\u0000"', '"x\\u0000y"', '"/dev/zero"', '"/dev/null"',
    '"/dev/full"', '"/"', '"."', "1e400", "nan", "inf", "-inf", "99999999999999999999", '"unix:"',
    '"127.0.0.1:99999"', '"[::1"', '"unix:/nonexistent/x"', '"::"', '"*"', "1979-05-27",
    '["a", 1]', '"' + "a" * 5000 + '"', '"127.0.0.1:1"', '"203.0.113.1:80"', '"a.invalid:1"',
)  # fmt: skip


def _break(service: Service, good: bytes, choice: random.Random) -> None:
    path = service.reloads
    assert path is not None
    kind = choice.randrange(9)
    if kind == 0:  # a cut
        path.write_bytes(good[: choice.randrange(len(good))])
    elif kind == 1:  # a byte
        data = bytearray(good)
        data[choice.randrange(len(data))] = choice.randrange(256)
        path.write_bytes(data)
    elif kind == 2:  # a line less
        lines = good.splitlines(keepends=True)
        del lines[choice.randrange(len(lines))]
        path.write_bytes(b"".join(lines))
    elif kind == 3:  # a line more
        lines = good.splitlines(keepends=True)
        lines.insert(choice.randrange(len(lines)), choice.choice(lines))
        path.write_bytes(b"".join(lines))
    elif kind == 4:
        path.write_bytes(choice.randbytes(choice.randrange(2000)))
    elif kind == 5:
        path.unlink(missing_ok=True)
    else:  # an odd value
        lines = good.splitlines()
        places = [index for index, line in enumerate(lines) if b" = " in line]
        index = choice.choice(places)
        name, _, _ = lines[index].partition(b" = ")
        lines[index] = name + b" = " + choice.choice(_ODD_VALUES).encode()
        path.write_bytes(b"\n".join(lines) + b"\n")


@contextmanager
def files_removed(service: Service, choice: random.Random, seconds: float) -> Iterator[None]:
    """The Unix socket that it listens on is removed or replaced."""
    sockets = [path for path in service.watched if path.is_socket()]
    if sockets:
        path = choice.choice(sockets)
        path.unlink()
        if choice.random() < 0.5:
            with socket.socket(socket.AF_UNIX) as other:
                other.bind(str(path))  # what a process that has died leaves behind
    _use(service, seconds)
    yield


@contextmanager
def killed(service: Service, choice: random.Random, seconds: float) -> Iterator[None]:
    """It is killed at a random moment under load (SIGKILL)."""
    _use(service, choice.uniform(0, seconds))
    for process in service.processes:
        process.signal(signal.SIGKILL)
        process.running.wait()
    yield
    service.restart()


FAULTS: Final[tuple[Fault, ...]] = (
    disk_full,
    read_only,
    clock,
    no_descriptors,
    no_threads,
    no_memory,
    stopped,
    peers_stop,
    signals,
    bad_reloads,
    files_removed,
    killed,
)
"""The faults that need no privilege."""
