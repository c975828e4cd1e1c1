"""Starts commands as processes that are forked from one which has imported everything.

Python and its imports take 0.4 s of processor time for each command, this takes 0.05 s. What runs
is ``hybridkex.cli.main`` in a process of its own, with its own files, folder, environment and
signals.
"""

import contextlib
import gc
import importlib
import json
import os
import pkgutil
import resource
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn

from waiting import until

from interop.forks import serve

NOBODY = 65534
LIMIT = 60.0


# --- in the server --------------------------------------------------------------------------------


def become(request: dict[str, Any]) -> NoReturn:
    """Be the command."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in request["ignored"]:
        signal.signal(number, signal.SIG_IGN)
    os.chdir(request["folder"])
    os.environ.update(request["environment"])
    if request["without"]:
        anew = {"hybridkex", *request["without"]}
        for name in [name for name in sys.modules if name.partition(".")[0] in anew]:
            del sys.modules[name]
        for name in request["without"]:
            sys.modules[name] = None  # type: ignore[assignment]  # "not there" (import system, 5.3.1)
    for name, value in request["limits"].items():
        limit = value + _in_use(name)
        resource.setrlimit(getattr(resource, name), (limit, limit))
    if request["unprivileged"] and os.getuid() == 0:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    for name, constant in request["constants"].items():
        module, _, attribute = name.rpartition(".")
        vars(importlib.import_module(module))[attribute] = constant
    sys.argv = ["hybridkex", *request["words"]]
    program = request["program"]
    try:
        if program.endswith(".py"):
            runpy.run_path(program, run_name="__main__")
            status = None
        else:
            status = importlib.import_module(program).main()
    except SystemExit as end:
        status = end.code
    if request["to_the_end"] or not isinstance(status, int | None):
        sys.exit(status)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status or 0)


def _in_use(limit: str) -> int:
    """Bytes of address space that a process has already; of the other limits nothing counts."""
    if limit != "RLIMIT_AS":
        return 0
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def import_all() -> None:
    """What the commands would import."""
    package = importlib.import_module("hybridkex.cli")
    for module in pkgutil.walk_packages(package.__path__, "hybridkex.cli."):
        importlib.import_module(module.name)
    importlib.import_module("examples.chat.__main__")
    importlib.import_module("encodings.idna")  # which nobody may not be able to read


# --- in the tests ---------------------------------------------------------------------------------


@dataclass
class Running:
    """A process as :class:`subprocess.Popen` would show it."""

    pid: int
    stdin: IO[bytes] | None
    _files: tuple[IO[bytes] | None, IO[bytes] | None]
    _status: IO[bytes]
    returncode: int | None = None
    _output: tuple[bytes, bytes] = (b"", b"")

    def poll(self, timeout: float = 0.0) -> int | None:
        """The exit status, once there is one."""
        if self.returncode is None and select.select([self._status], [], [], timeout)[0]:
            self._output = self.said(), self.told()
            self.returncode = int(self._status.readline())
            for file in (self.stdin, *self._files, self._status):
                if file is not None:
                    file.close()
        return self.returncode

    def wait(self, timeout: float = LIMIT) -> int:
        """The exit status."""
        status = self.poll(timeout)
        if status is None:
            self.kill()
            self.poll(timeout)
            raise subprocess.TimeoutExpired(str(self.pid), timeout, *self._output)
        return status

    def said(self) -> bytes:
        """All that it has written to standard output, unless that is a file of the caller's."""
        return self._written(0)

    def told(self) -> bytes:
        """All that it has written to standard error, unless that is a file of the caller's."""
        return self._written(1)

    def lines(self) -> list[str]:
        """The whole lines that it has written so far: a long one is written in parts."""
        return self.told().decode().rpartition("\n")[0].splitlines()

    def _written(self, index: int) -> bytes:
        file = self._files[index]
        if self.returncode is not None or file is None:
            return self._output[index]
        return os.pread(file.fileno(), 1 << 28, 0)

    def communicate(self, data: bytes = b"", timeout: float = LIMIT) -> tuple[bytes, bytes]:
        """Write, close, wait."""
        if self.stdin is not None and not self.stdin.closed:
            with contextlib.suppress(BrokenPipeError):  # it does not want to hear
                self.stdin.write(data)
            self.stdin.close()
        self.wait(timeout)
        return self.said(), self.told()

    def send_signal(self, number: int) -> None:
        """To a process that has not ended; it may end before its status is known here."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        """At once."""
        self.send_signal(signal.SIGKILL)


class Forkserver:
    """The process that forks."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                # Whoever runs the tests may want no buffer; users have one.
                env={
                    **os.environ,
                    "PYTHONUNBUFFERED": "",
                    "PYTHONPATH": os.pathsep.join(str(Path(__file__).parents[n]) for n in (2, 1)),
                },
            )
        self._control = ours
        self._started: list[Running] = []

    def close(self) -> None:
        """End it, and what it has started."""
        self.end()
        self._control.close()
        self._process.wait(LIMIT)

    def end(self) -> None:
        """End what it has started."""
        for process in self._started:
            process.kill()
            process.wait()
        self._started.clear()

    def start(
        self,
        *words: Any,
        folder: Path | str = "/",
        environment: Mapping[str, str] | None = None,
        stdin: IO[bytes] | None = None,
        stdout: IO[bytes] | None = None,
        stderr: IO[bytes] | None = None,
        unprivileged: bool = False,
        limits: Mapping[str, int] | None = None,
        constants: Mapping[str, float] | None = None,
        without: Sequence[str] = (),
        ignored: Sequence[int] = (),
        to_the_end: bool = False,
        program: str = "hybridkex.cli",
    ) -> Running:
        """Start ``hybridkex`` with these words.

        Args:
            words: what stands behind ``hybridkex``.
            folder: where it runs.
            environment: what is added to ours.
            stdin: a file; otherwise it is a pipe that the caller writes into and closes.
            stdout: a file; otherwise one that the tests can read.
            stderr: likewise.
            unprivileged: run as nobody, if the tests run as root, who may read every file.
            limits: of the process (getrlimit(2)); of RLIMIT_AS what it may have beside what it has
                at its beginning.
            constants: other values of modules' constants, by ``module.NAME``: intervals that a
                test would wait for.
            without: packages that are not there.
            ignored: signals that it ignores at its beginning.
            to_the_end: take the interpreter apart as always, which writes once more what it could
                not write before; 0.1 s.
            program: the module whose ``main`` runs, or the path of a script.
        """
        request = {
            "words": [str(word) for word in words],
            "folder": str(folder),
            "environment": dict(environment or {}),
            "unprivileged": unprivileged,
            "limits": dict(limits or {}),
            "constants": dict(constants or {}),
            "without": list(without),
            "ignored": list(ignored),
            "to_the_end": to_the_end,
            "program": program,
        }
        pipe: IO[bytes] | None = None
        if stdin is None:
            reading, writing = os.pipe()
            stdin, pipe = os.fdopen(reading, "rb"), os.fdopen(writing, "wb", buffering=0)
        # Files, so that nobody has to read for the command to go on.
        ours = tempfile.TemporaryFile() if stdout is None else None  # noqa: SIM115
        errors = tempfile.TemporaryFile() if stderr is None else None  # noqa: SIM115
        told, tells = os.pipe()
        standard = [stdin, ours or stdout, errors or stderr]
        files = [*(file.fileno() for file in standard if file is not None), tells]
        socket.send_fds(self._control, [json.dumps(request).encode()], files)
        os.close(tells)
        if pipe is not None:
            stdin.close()
        status = os.fdopen(told, "rb", buffering=0)
        process = Running(int(status.readline()), pipe, (ours, errors), status)
        self._started.append(process)
        return process

    @contextlib.contextmanager
    def listening(self, folder: Path, *words: Any, **options: Any) -> Iterator[tuple[str, Running]]:
        """``listen`` in a folder, on a free port of 127.0.0.1; gives the port, once it is open."""
        port_file = folder / f"port-{time.monotonic_ns()}"
        where = ("0", "--port-file", port_file)
        if "--bind" not in words:
            where += ("--bind", "127.0.0.1")
        process = self.start("listen", *where, *words, folder=folder, **options)
        try:
            until(port_file.exists, process)
            yield port_file.read_text().strip(), process
        finally:
            process.kill()
            process.wait()

    @contextlib.contextmanager
    def telling(self, *words: Any, **options: Any) -> Iterator[tuple[IO[str], Running]]:
        """A command and what it writes to standard output, as it comes. It ends with the block,
        which may last longer than a test."""
        reading, writing = os.pipe()
        with os.fdopen(reading) as said:
            with os.fdopen(writing, "wb") as out:
                process = self.start(*words, stdout=out, **options)
            self._started.remove(process)
            try:
                yield said, process
            finally:
                process.kill()
                process.wait()

    def run(
        self, *words: Any, data: bytes = b"", timeout: float = LIMIT, **options: Any
    ) -> "subprocess.CompletedProcess[bytes]":
        """Start, write to standard input, wait."""
        process = self.start(*words, **options)
        try:
            stdout, stderr = process.communicate(data, timeout)
        finally:
            process.kill()
        return subprocess.CompletedProcess(words, process.wait(), stdout, stderr)


def one_line(stderr: bytes, *, beside: Sequence[str] = ()) -> str:
    """The one line that a command may say when it fails."""
    lines = [line for line in stderr.decode().splitlines() if not line.startswith(tuple(beside))]
    assert len(lines) == 1, stderr.decode()
    return lines[0]


if __name__ == "__main__":
    del sys.path[0]
    import_all()
    gc.collect()
    gc.freeze()
    become(serve(socket.socket(fileno=int(sys.argv[1]))))
