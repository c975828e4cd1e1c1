"""Files through ``send`` and ``receive`` beside rsync and scp: ``python benchmarks/files.py``.

Every tool sends the same files over the loopback into an empty folder on the same disk, in turns
within each round. rsync and scp go through an OpenSSH server of this program's own, with keys in a
temporary folder and AES-128-GCM. Each figure is the wall time of the sending command with its
start, and the CPU time of both ends. Ratios are taken within one round.

``--json FILE`` writes everything; the tables of docs/performance.md come from there. Debian has the
peers: ``apt install rsync openssh-server openssh-client``.
"""

import argparse
import json
import os
import random
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

COMMAND = [sys.executable, "-m", "hybridkex"]
TICK = os.sysconf("SC_CLK_TCK")
OURS = "hybridkex"
ENVIRONMENT = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
"""Compiled modules are kept, as in an installed package."""
SSHD = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin")


@dataclass(frozen=True)
class Figure:
    """One transfer: seconds of wall time, and of CPU time at both ends."""

    wall: float
    cpu: float


class Server:
    """A process that serves the receiving end."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    def cpu(self) -> float:
        """Seconds of CPU so far, with the children that have ended."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return sum(map(int, fields[11:15])) / TICK

    def children(self) -> int:
        """How many it has."""
        task = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")
        return len(task.read_text().split())


@dataclass(frozen=True)
class Tool:
    """A way to send a folder or a file."""

    name: str
    server: Server
    command: Callable[[Path, Path], list[str]]
    into: Path
    """The folder that the target folders are in."""

    def run(self, source: Path, target: Path) -> Figure:
        """Send once; the target is a folder that exists."""
        before, began = os.times(), time.monotonic()
        served = self.server.cpu()
        subprocess.run(
            self.command(source, target), check=True, capture_output=True, env=ENVIRONMENT
        )
        wall = time.monotonic() - began
        while self.server.children():  # their CPU time is known when they have ended
            time.sleep(0.01)
        after = os.times()
        ours = after.children_user + after.children_system
        ours -= before.children_user + before.children_system
        return Figure(wall, ours + self.server.cpu() - served)


@contextmanager
def running(*words: object) -> Iterator[subprocess.Popen[bytes]]:
    """A server, until the block ends."""
    process = subprocess.Popen(
        list(map(str, words)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ENVIRONMENT
    )
    try:
        yield process
    finally:
        process.terminate()
        process.wait(30)


@contextmanager
def hybridkex(folder: Path, work: Path) -> Iterator[list[Tool]]:
    """Our receiver, into ``folder``."""
    keys, port_file = work / "keys", work / "port"
    subprocess.run([*COMMAND, "dev-ca", keys], check=True, capture_output=True)
    identity = [
        word for part in ("ca", "cert", "key") for word in (f"--{part}", str(keys / f"{part}.pem"))
    ]
    address = ("--bind", "127.0.0.1", "--port", "0", "--port-file", port_file)
    with running(*COMMAND, "receive", folder, *address, *identity) as process:
        while not port_file.exists():
            assert process.poll() is None, "the receiver has ended"
            time.sleep(0.02)
        to = f"localhost:{port_file.read_text().strip()}"

        def command(source: Path, target: Path) -> list[str]:
            return [*COMMAND, "send", str(source), to, *identity]

        server = Server(process)
        yield [
            Tool(OURS, server, command, folder),
            Tool(f"{OURS} --checksum", server, lambda *w: [*command(*w), "--checksum"], folder),
        ]


@contextmanager
def ssh(work: Path, into: Path) -> Iterator[list[Tool]]:
    """rsync and scp through an OpenSSH server on a port of its own."""
    assert SSHD, "no sshd: apt install openssh-server"
    for name in ("host", "user"):
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(work / name)], check=True
        )
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    shutil.copy(work / "user.pub", work / "authorized")
    (work / "known").write_text(f"[127.0.0.1]:{port} {(work / 'host.pub').read_text()}")
    (work / "sshd.conf").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {work}/host\nPidFile none\n"
        f"AuthorizedKeysFile {work}/authorized\nStrictModes no\nUsePAM no\n"
        "PasswordAuthentication no\nSubsystem sftp internal-sftp\n"
    )
    (work / "ssh.conf").write_text(
        f"Host peer\nHostName 127.0.0.1\nPort {port}\nIdentityFile {work}/user\n"
        f"IdentitiesOnly yes\nUserKnownHostsFile {work}/known\nBatchMode yes\n"
        "Ciphers aes128-gcm@openssh.com\n"
    )
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # sshd demands it
    config = str(work / "ssh.conf")
    with running(SSHD, "-D", "-f", work / "sshd.conf") as process:
        for _ in range(200):
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except ConnectionRefusedError:
                assert process.poll() is None, "sshd has ended"
                time.sleep(0.02)
        server = Server(process)

        def rsync(*options: str) -> Callable[[Path, Path], list[str]]:
            shell = f"ssh -F {config}"
            return lambda source, target: [
                *("rsync", "-a", *options, "-e", shell, str(source), f"peer:{target}/")
            ]

        def scp(source: Path, target: Path) -> list[str]:
            return ["scp", "-F", config, "-q", "-r", "-p", str(source), f"peer:{target}/"]

        yield [
            Tool("rsync", server, rsync(), into),
            Tool("rsync --fsync", server, rsync("--fsync"), into),
            Tool("rsync -c", server, rsync("-c"), into),
            Tool("scp", server, scp, into),
        ]


def make_small(folder: Path, count: int) -> Path:
    """Files of 1 to 4 KB, a hundred in a folder."""
    rng = random.Random(count)
    for number in range(count):
        below = folder / f"{number // 100:04}"
        if number % 100 == 0:
            below.mkdir(parents=True)
        (below / f"{number:06}.txt").write_bytes(rng.randbytes(rng.randrange(1000, 4001)))
    return folder


def make_large(path: Path, size: int) -> Path:
    """One file without holes."""
    with path.open("wb") as file:
        for _ in range(0, size, 1 << 20):
            file.write(os.urandom(1 << 20))
    return path


@dataclass(frozen=True)
class Work:
    """What is sent, and by whom."""

    name: str
    make: Callable[[Path], Path]
    tools: tuple[str, ...]
    again: bool = False
    """Whether the target has it already."""
    count: int = 1
    size: int = 0


def small(count: int, **more: bool) -> Callable[[Path], Path]:
    """Make ``count`` small files."""
    return lambda folder: make_small(folder / f"small-{count}", count)


def works(size: int) -> list[Work]:
    """The comparisons; ``size`` is that of the large file."""
    many = (OURS, "rsync", "rsync --fsync")
    return [
        Work("4,000 files", small(4000), (*many, "scp"), count=4000),
        Work("20,000 files", small(20_000), many, count=20_000),
        Work("20,000 unchanged", small(20_000), (OURS, "rsync"), again=True, count=20_000),
        Work(
            "20,000 unchanged, contents compared",
            small(20_000),
            (f"{OURS} --checksum", "rsync -c"),
            again=True,
            count=20_000,
        ),
        Work("1 GiB", lambda f: make_large(f / "large", size), (OURS, "scp", "rsync"), size=size),
        Work(
            "1 GiB unchanged, contents compared",
            lambda f: make_large(f / "large", size),
            (f"{OURS} --checksum", "rsync -c"),
            again=True,
            size=size,
        ),
    ]


@dataclass
class Results:
    """The figures of all rounds of one comparison."""

    figures: dict[str, list[Figure]] = field(default_factory=dict)

    def median(self, tool: str, clock: str) -> float:
        """Seconds."""
        return statistics.median(getattr(one, clock) for one in self.figures[tool])

    def ratio(self, peer: str, ours: str, clock: str) -> tuple[float, float, float]:
        """The peer's time over ours within a round: median, least, most."""
        pairs = zip(self.figures[peer], self.figures[ours], strict=True)
        found = [getattr(one, clock) / getattr(other, clock) for one, other in pairs]
        return statistics.median(found), min(found), max(found)


def compare(work: Work, tools: dict[str, Tool], rounds: int, sources: Path) -> Results:
    """Run one comparison."""
    source = work.make(sources)
    taken = [tools[name] for name in work.tools]
    results = Results({tool.name: [] for tool in taken})
    for number in range(rounds):
        for tool in taken[number % len(taken) :] + taken[: number % len(taken)]:
            target = tool.into if tool.name.startswith(OURS) else tool.into / "in"
            target.mkdir(exist_ok=True)
            if work.again:
                tool.run(source, target)
            os.sync()
            results.figures[tool.name].append(tool.run(source, target))
            check(source, target / source.name)
            shutil.rmtree(target / source.name) if source.is_dir() else (
                target / source.name
            ).unlink()
            os.sync()
    shutil.rmtree(source) if source.is_dir() else source.unlink()
    return results


def check(source: Path, target: Path) -> None:
    """Refuse figures of a transfer that did not do its work."""
    subprocess.run(["diff", "-rq", str(source), str(target)], check=True)


def show(work: Work, results: Results) -> None:
    """Print one comparison."""
    print(f"\n{work.name}", flush=True)
    ours = work.tools[0]
    for tool in work.tools:
        wall, cpu = (results.median(tool, clock) for clock in ("wall", "cpu"))
        rate = (
            f"{work.size / wall / 1e6:8.0f} MB/s" if work.size else f"{work.count / wall:8.0f} /s"
        )
        line = f"  {tool:22} {wall:7.2f} s  {cpu:7.2f} s of CPU {rate}"
        if tool != ours:
            for clock in ("wall", "cpu"):
                middle, least, most = results.ratio(tool, ours, clock)
                line += f"   {clock} {middle:.2f} of ours ({least:.2f} to {most:.2f})"
        print(line, flush=True)


def main() -> None:
    """Run the comparisons."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", type=int, default=1 << 30, help="of the large file (2**30)")
    parser.add_argument("--only", default="", help="comparisons with this text in their names")
    parser.add_argument("--without", default="", help="leave out the tools named, with commas")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument("--folder", type=Path, help="where to put the files (a disk, not a tmpfs)")
    options = parser.parse_args()
    report = {}
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        top = Path(name)
        for part in ("in", "ssh", "keys", "sources", "peer"):
            (top / part).mkdir()
        with (
            hybridkex(top / "in", top / "keys") as ours,
            ssh(top / "ssh", top / "peer") as theirs,
        ):
            tools = {tool.name: tool for tool in (*ours, *theirs)}
            for work in works(options.size):
                left = tuple(t for t in work.tools if t not in options.without.split(","))
                if options.only not in work.name or not left:
                    continue
                chosen = Work(work.name, work.make, left, work.again, work.count, work.size)
                results = compare(chosen, tools, options.rounds, top / "sources")
                show(chosen, results)
                report[work.name] = {
                    tool: [{"wall": one.wall, "cpu": one.cpu} for one in figures]
                    for tool, figures in results.figures.items()
                }
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
