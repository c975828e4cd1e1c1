"""The start of our commands beside that of Python and of ``openssl s_client``.

The processor time of whole processes; of ``connect`` also the time by the clock, from its start to
the first byte that comes back.
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from benchmarks.processes import (
    COMMAND,
    ENVIRONMENT,
    certificates,
    cpu_of_children,
    program,
    running,
    until,
    wait_for,
)
from benchmarks.results import OURS, Options, Row, in_turns
from interop.ports import free_port

__all__ = ["run"]

PYTHON = "an empty Python"


def processor(command: Sequence[str]) -> float:
    """Milliseconds of processor time of a process."""
    before = cpu_of_children()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=ENVIRONMENT)
    return (cpu_of_children() - before) * 1e3


def first_byte(command: Sequence[str]) -> float:
    """Seconds from the start of a client to the first byte of its echo."""
    began = time.perf_counter()
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        bufsize=0,
        env=ENVIRONMENT,
    ) as client:
        assert client.stdin is not None
        assert client.stdout is not None
        client.stdin.write(b"x\n")
        assert client.stdout.read(1) == b"x"
        took = time.perf_counter() - began
        client.stdin.close()
        client.terminate()
    return took


def run(options: Options) -> Iterator[Row]:
    """Measure."""
    empty = partial(processor, [sys.executable, "-c", ""])
    for name, command in (
        ("import hybridkex", [sys.executable, "-c", "import hybridkex"]),
        ("hybridkex --help", [*COMMAND, "--help"]),
        ("hybridkex connect --help", [*COMMAND, "connect", "--help"]),
    ):
        figures = in_turns(options.rounds, {OURS: partial(processor, command), PYTHON: empty})
        bound = 120 if name.endswith("hybridkex --help") else None
        yield Row(f"{name}: CPU", "ms", figures, bound=bound)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        trust, port_file, port = certificates(folder / "keys"), folder / "port", free_port()
        listen = ("listen", "0", "--bind", "127.0.0.1", "--port-file", port_file, *trust[1:])
        openssl, keys = program("openssl"), folder / "keys"
        with running(*COMMAND, *listen, "--echo") as server:
            until(port_file.exists, server)
            ours = [*COMMAND, "connect", "localhost", port_file.read_text().strip(), trust[0]]
            tools: dict[str, Callable[[], float]] = {OURS: partial(first_byte, ours)}
            with ExitStack() as stack:
                if openssl is not None:
                    serve = ["s_server", "-accept", port, "-rev", "-quiet"]
                    serve += ["-cert", keys / "cert.pem", "-key", keys / "key.pem"]
                    wait_for(port, stack.enter_context(running(openssl, *serve)))
                    client = [openssl, "s_client", "-connect", f"localhost:{port}", "-quiet"]
                    client += ["-CAfile", str(keys / "ca.pem"), "-verify_return_error"]
                    tools["openssl s_client"] = partial(first_byte, client)
                figures = in_turns(options.rounds, tools)
            yield Row("connect, to the first echoed byte", "s", figures, bound=0.2)
