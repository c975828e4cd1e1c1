"""Files through ``send`` and ``receive`` beside rsync and scp.

Every tool sends the same files over the loopback into an empty folder on the same disk, in turns.
rsync and scp go through an OpenSSH server of this program's own, with keys in a temporary folder
and AES-128-GCM. Times are those of the sending command with its start; processor times are those of
both ends. hybridkex flushes every file to the disk before it calls it stored, rsync and scp flush
nothing.
"""

import os
import random
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.processes import (
    COMMAND,
    ENVIRONMENT,
    certificates,
    cpu,
    cpu_of_children,
    program,
    running,
    until,
    wait_for,
)
from benchmarks.results import OURS, Curve, Options, Row, in_turns
from interop.ports import free_port

__all__ = ["run"]

CHECKSUM = f"{OURS} --checksum"


@dataclass(frozen=True)
class Tool:
    """A way to send a folder or a file."""

    server: int
    """The process that serves the receiving end."""
    command: Callable[[Path, Path], list[str]]
    into: Path
    """The folder to send into."""

    def run(self, source: Path) -> tuple[float, float]:
        """Send once; seconds by the clock, and of CPU at both ends."""
        before, served = cpu_of_children(), cpu(self.server, children=True)
        began = time.monotonic()
        command = self.command(source, self.into)
        done = subprocess.run(command, check=False, capture_output=True, env=ENVIRONMENT)
        wall = time.monotonic() - began
        if done.returncode:
            said = done.stderr.decode(errors="replace").strip()
            raise RuntimeError(f"{command!r} ended with status {done.returncode}: {said}")
        children = Path(f"/proc/{self.server}/task/{self.server}/children")
        until(lambda: not children.read_text())  # their CPU time is known when they have ended
        return wall, cpu_of_children() - before + cpu(self.server, children=True) - served


@contextmanager
def ours(work: Path) -> Iterator[dict[str, Tool]]:
    """Our receiver."""
    into, port_file = work / "in", work / "port"
    identity = certificates(work / "keys")
    address = ("--bind", "127.0.0.1", "--port", "0", "--port-file", port_file)
    with running(*COMMAND, "receive", into, *address, *identity) as process:
        until(port_file.exists, process)
        to = f"localhost:{port_file.read_text().strip()}"

        def command(source: Path, target: Path) -> list[str]:
            return [*COMMAND, "send", str(source), to, *identity]

        yield {
            OURS: Tool(process.pid, command, into),
            CHECKSUM: Tool(process.pid, lambda *w: [*command(*w), "--checksum"], into),
        }


@contextmanager
def ssh(work: Path) -> Iterator[dict[str, Tool]]:
    """rsync and scp through an OpenSSH server on a port of its own."""
    sshd = program("sshd")
    if sshd is None:
        yield {}
        return
    for name in ("host", "user"):
        key = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(work / name)]
        subprocess.run(key, check=True)
    port, into, config = free_port(), work / "peers", str(work / "ssh.conf")
    into.mkdir()
    shutil.copy(work / "user.pub", work / "authorized")
    (work / "known").write_text(f"[127.0.0.1]:{port} {(work / 'host.pub').read_text()}")
    (work / "sshd.conf").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {work}/host\nPidFile none\n"
        f"AuthorizedKeysFile {work}/authorized\nStrictModes no\nUsePAM no\n"
        "PasswordAuthentication no\nSubsystem sftp internal-sftp\n"
    )
    Path(config).write_text(
        f"Host peer\nHostName 127.0.0.1\nPort {port}\nIdentityFile {work}/user\n"
        f"IdentitiesOnly yes\nUserKnownHostsFile {work}/known\nBatchMode yes\n"
        "Ciphers aes128-gcm@openssh.com\n"
    )
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # sshd demands it
    with running(sshd, "-D", "-f", work / "sshd.conf") as process:
        wait_for(port, process)

        def rsync(*options: str) -> Tool:
            words = ("rsync", "-a", *options, "-e", f"ssh -F {config}")
            return Tool(process.pid, lambda one, to: [*words, str(one), f"peer:{to}/"], into)

        def scp(source: Path, target: Path) -> list[str]:
            return ["scp", "-F", config, "-q", "-r", "-p", str(source), f"peer:{target}/"]

        found = {"scp": Tool(process.pid, scp, into)} if program("scp") else {}
        if program("rsync"):
            found |= {"rsync": rsync(), "rsync --fsync": rsync("--fsync"), "rsync -c": rsync("-c")}
        yield found


def small(folder: Path, count: int) -> Path:
    """Files of 1 to 4 KB, a hundred in a folder."""
    rng, top = random.Random(count), folder / f"small-{count}"
    for number in range(count):
        below = top / f"{number // 100:04}"
        if number % 100 == 0:
            below.mkdir(parents=True)
        (below / f"{number:06}.txt").write_bytes(rng.randbytes(rng.randrange(1000, 4001)))
    return top


def large(folder: Path, size: int) -> Path:
    """One file without holes."""
    path = folder / f"large-{size}"
    with path.open("wb") as file:
        for _ in range(0, size, 1 << 20):
            file.write(os.urandom(1 << 20))
    return path


def remove(path: Path) -> None:
    """A file or a folder."""
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def compare(
    source: Path, tools: dict[str, Tool], rounds: int, *, again: bool = False
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds by the clock and of CPU; ``again``: of a second time, where nothing has changed."""
    processor: dict[str, list[float]] = {name: [] for name in tools}

    def once(name: str) -> float:
        tool = tools[name]
        if again:
            tool.run(source)
        os.sync()
        wall, used = tool.run(source)
        processor[name].append(used)
        arrived = tool.into / source.name
        subprocess.run(["diff", "-rq", str(source), str(arrived)], check=True)
        remove(arrived)
        os.sync()
        return wall

    wall = in_turns(rounds, {name: lambda name=name: once(name) for name in tools})
    remove(source)
    return wall, processor


def run(options: Options) -> Iterator[Row | Curve]:
    """Measure."""
    some, many = options.size(4000, 20), options.size(20_000, 40)
    size = options.size(1 << 30, 1 << 20)
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        tools = stack.enter_context(ours(work)) | stack.enter_context(ssh(work))
        by_content, peers = (CHECKSUM, "rsync -c"), ("rsync", "rsync --fsync", "scp")
        works = [
            (f"{some:,} files of 1 to 4 KB", small, some, (OURS, *peers), False, 0.77),
            (f"{many:,} of them", small, many, (OURS, "rsync"), False, 0.5),
            (f"{many:,} unchanged", small, many, (OURS, "rsync"), True, 0.5),
            (f"{many:,} unchanged, contents", small, many, by_content, True, None),
            (f"{size >> 20:,} MiB", large, size, (OURS, "scp", "rsync"), False, 1),
            (f"{size >> 20:,} MiB unchanged, contents", large, size, by_content, True, 1),
        ]
        for name, make, number, names, again, goal in works[: options.size(len(works), 1)]:
            taken = {one: tools[one] for one in names if one in tools}
            source = make(work, number)
            rounds = options.few(2 if number == many else 3)
            wall, processor = compare(source, taken, rounds, again=again)
            yield Row(name, "s", wall, goal)
            yield Row(f"{name}: CPU of both ends", "s", processor, goal if goal == 1 else None)
        taken = {one: tools[one] for one in (OURS, "rsync") if one in tools}
        lines: dict[str, dict[str, list[float]]] = {one: {} for one in taken}
        for number in (10,) if options.quick else (10, 100, 1000, 10_000, 100_000):
            wall, _ = compare(small(work, number), taken, 1)
            for tool, figures in wall.items():
                lines[tool][str(number)] = figures
        yield Curve("Small files", "files", "s", lines)
