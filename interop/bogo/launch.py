"""Starts shims without the second that Python needs for imports: a parent forks one per test.

The runner starts a process for each of its thousands of tests. This process is :data:`LAUNCHER`,
which passes its arguments and its standard streams to the parent over a Unix socket and gets the
exit code back; the parent has imported everything once.
"""

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

UNSUPPORTED = "unsupported"
LAUNCHER = """#!{python} -IS
import socket, sys
with socket.socket(socket.AF_UNIX) as parent:
    parent.connect({path!r})
    socket.send_fds(parent, [b"\\0"], [0, 1, 2])
    parent.sendall("\\0".join(sys.argv[1:]).encode("utf-8", "surrogateescape"))
    parent.shutdown(socket.SHUT_WR)
    code = parent.recv(1)
sys.exit(code[0] if code else 70)
"""


@contextmanager
def launcher(folder: Path) -> Iterator[Path]:
    """An executable in ``folder`` that is a shim for as long as the context lasts.

    What its tests ask for in vain stands in the file :data:`UNSUPPORTED` there, a line each.
    """
    path = folder / "socket"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(64)
        parent = os.fork()
        if parent == 0:
            with suppress(KeyboardInterrupt):
                _serve(listener, folder / UNSUPPORTED)
            os._exit(0)
        try:
            executable = folder / "shim"
            executable.write_text(LAUNCHER.format(python=sys.executable, path=str(path)))
            executable.chmod(0o755)
            yield executable
        finally:
            os.kill(parent, 15)
            os.waitpid(parent, 0)


def _serve(listener: socket.socket, unsupported: Path) -> None:
    import signal  # noqa: PLC0415  # in the forked parent only

    from interop.bogo.shim import main  # noqa: PLC0415

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # What a test runner put in their place would swallow what the shim says to BoGo's.
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
    while True:
        connection, _ = listener.accept()
        if os.fork():
            connection.close()
            continue
        listener.close()
        code = 70
        try:
            _, streams, _, _ = socket.recv_fds(connection, 1, 3)
            for number, stream in enumerate(streams):
                os.dup2(stream, number)
            received = bytearray()
            while piece := connection.recv(1 << 16):
                received += piece
            arguments = received.decode("utf-8", "surrogateescape").split("\0")
            code = main(arguments if received else [], unsupported)
        except BaseException:
            import traceback  # noqa: PLC0415

            traceback.print_exc()
        finally:
            for output in (sys.stdout, sys.stderr):
                if output is not None:
                    output.flush()
            with suppress(OSError):
                connection.sendall(bytes((code,)))
            os._exit(0)
