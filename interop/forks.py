"""Processes that are forked from a process that has imported everything.

Python and its imports take 0.3 s of processor time for each command, a fork takes 0.05 s.
"""

import atexit
import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, Final

__all__ = ["Forked", "Forks", "serve"]

ROOT: Final = Path(__file__).parents[1]


def serve(control: socket.socket) -> dict[str, Any]:
    """Fork for each request; returns only in a child, with its request."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those in between
    while True:
        message, files, _, _ = socket.recv_fds(control, 1 << 20, 4)
        if not message:
            os._exit(0)
        if os.fork() == 0:
            control.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            *standard, status = files
            child = os.fork()
            if child == 0:
                os.close(status)
                for number, descriptor in enumerate(standard):
                    os.dup2(descriptor, number)
                    os.close(descriptor)
                request: dict[str, Any] = json.loads(message)
                return request
            for descriptor in standard:
                os.close(descriptor)
            os.write(status, f"{child}\n".encode())
            os.write(status, f"{os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}\n".encode())
            os._exit(0)
        for descriptor in files:
            os.close(descriptor)


class Forked:
    """A process as :class:`subprocess.Popen` shows it, from any thread."""

    def __init__(self, status: IO[bytes]) -> None:
        self._status = status
        self._lock = threading.Lock()
        self.pid: Final = int(status.readline())
        self.returncode: int | None = None

    def poll(self, timeout: float | None = 0.0) -> int | None:
        """The exit status, once there is one."""
        with self._lock:
            if self.returncode is None:
                ready = select.poll()
                ready.register(self._status)
                if ready.poll(None if timeout is None else timeout * 1e3):
                    self.returncode = int(self._status.readline())
                    self._status.close()
            return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The exit status; raises ``subprocess.TimeoutExpired``."""
        status = self.poll(timeout)
        if status is None:
            raise subprocess.TimeoutExpired(str(self.pid), timeout or 0.0)
        return status

    def send_signal(self, number: int) -> None:
        """To a process that may have ended."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)


class Forks:
    """Starts a module that calls :func:`serve` with the socket whose descriptor is its argument."""

    def __init__(self, module: str) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._server = subprocess.Popen(
                [sys.executable, "-m", module, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
            )
        atexit.register(self._close)

    def _close(self) -> None:
        self._control.close()
        self._server.wait()

    def start(self, request: Mapping[str, Any], errors: IO[bytes]) -> Forked:
        """Fork a process with this request, and with standard error into a file."""
        told, tells = os.pipe()
        with Path(os.devnull).open("r+b", buffering=0) as null:
            files = [null.fileno(), null.fileno(), errors.fileno(), tells]
            socket.send_fds(self._control, [json.dumps(request).encode()], files)
        os.close(tells)
        return Forked(os.fdopen(told, "rb", buffering=0))
