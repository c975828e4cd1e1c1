"""Where the processor time goes: shares by what runs, and of Python by package.

The kernel's profiler (perf) interrupts the processes of both ends, with all their threads, many
times a second and notes which library runs; "the interpreter" is Python itself, whoever wrote the
code. A second table divides the time of a handshake's functions by the package they are in
(cProfile, which makes short functions look longer than they are), and the imports of ``connect``
(``-X importtime``).
"""

import cProfile
import pstats
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import hybridkex
from benchmarks import files, handshake, kme_pairs
from benchmarks.processes import COMMAND, ENVIRONMENT, certificates, program, running, until
from benchmarks.results import OURS, Options, Shares

__all__ = ["run"]

LIBRARIES = {
    "the kernel": r"\[",
    "`cryptography`": r"_rust\.|_cffi",
    "OpenSSL (`hashlib`, `ssl`)": r"libcrypto|libssl|_hashlib|_ssl",
    "SQLite": r"sqlite",
    "the interpreter": r"python",
    "the C library and the loader": r"lib(c|m|dl|pthread)[.-]|ld-",
}
"""What a library belongs to: the first whose pattern its name has."""
OTHER = "the rest"
TRIO = ("trio", "attr", "attrs", "outcome", "sniffio", "sortedcontainers", "idna")
"""With what it imports."""
BY_LIBRARY, BY_PACKAGE, BY_MODULE = "libraries", "packages", "modules"
PACKAGE = Path(hybridkex.__file__).parent


@contextmanager
def sampled(perf: str, found: Counter[str], *words: object) -> Iterator[None]:
    """Count the samples of a process (``-p``) or a command by library, until the block ends."""
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / "samples")
        record = [perf, "record", "-q", "-e", "cpu-clock", "-F", "997", "-o", file]
        process = subprocess.Popen(
            [*record, *map(str, words)],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            env=ENVIRONMENT,
        )  # fmt: skip
        time.sleep(0.3 if "-p" in words else 0)
        yield
        if "-p" in words:
            process.send_signal(signal.SIGINT)
        process.wait(300)
        report = [perf, "report", "-i", file, "--stdio", "-q", "-n", "--sort=dso", "-t", ","]
        done = subprocess.run(report, check=True, capture_output=True, text=True)
    for line in filter(None, map(str.strip, done.stdout.splitlines())):
        _, samples, library = (word.strip() for word in line.split(",", 2))
        found[kind_of(library)] += int(samples)


def kind_of(library: str) -> str:
    """What a library belongs to, by its file name."""
    return next((kind for kind, names in LIBRARIES.items() if re.search(names, library)), OTHER)


def shares(table: str, work: str, found: Counter[str]) -> Shares:
    """The parts of a work in per cent."""
    whole = sum(found.values()) or 1
    return Shares(table, work, {name: 100 * part / whole for name, part in found.items()})


def of_handshakes(perf: str, options: Options) -> Iterator[Shares]:
    count = options.size(4000, 5)
    for work, client in (("full", "CLIENT"), ("resumed", "resuming()")):
        found: Counter[str] = Counter()
        code = (
            "from benchmarks.handshake import CLIENT, SERVER, Pair, resuming\n"
            f"client = {client}\nfor _ in range({count}): Pair(client, SERVER).handshake()"
        )
        with sampled(perf, found, sys.executable, "-c", code):
            pass
        yield shares(BY_LIBRARY, f"{work} handshake, engines in memory", found)


def of_connect(perf: str, options: Options) -> Iterator[Shares]:
    found: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as name:
        trust, port_file = certificates(Path(name) / "keys"), Path(name) / "port"
        listen = ("listen", "0", "--bind", "127.0.0.1", "--port-file", port_file, *trust[1:])
        with running(*COMMAND, *listen, "--echo") as server:
            until(port_file.exists, server)
            port = port_file.read_text().strip()
            connect = [*COMMAND, "connect", "localhost", port, trust[0]]
            for _ in range(options.size(10, 1)):
                with sampled(perf, found, *connect):
                    pass
    yield shares(BY_LIBRARY, "`connect`, start and handshake", found)


def of_pairs(perf: str, options: Options) -> Iterator[Shares]:
    found: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "site"
        kme_pairs.prepare(kme_pairs.THIS, folder, options.size(10_000, 100))
        with running(
            *COMMAND, "kme", "serve", folder / "kme.toml", stdout=subprocess.PIPE
        ) as server:
            assert server.stdout is not None
            lines = [server.stdout.readline().decode().split() for _ in range(2)]
            time.sleep(options.size(2, 1))  # the two ends compare their stocks
            load = kme_pairs.Load(
                folder, {line[0]: line[-1] for line in lines}, 0.2 if options.quick else 4.0
            )
            with sampled(perf, found, "-p", server.pid):
                load.run(kme_pairs.CLIENTS)
    yield shares(BY_LIBRARY, "KME, pairs of 8 clients", found)


def of_files(perf: str, options: Options) -> Iterator[Shares]:
    many, size = options.size(20_000, 40), options.size(1 << 30, 1 << 20)
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        tool = stack.enter_context(files.ours(work))[OURS]

        def send(source: Path, title: str) -> Shares:
            found: Counter[str] = Counter()
            with (
                sampled(perf, found, "-p", tool.server),
                sampled(perf, found, *tool.command(source, tool.into)),
            ):
                pass
            return shares(BY_LIBRARY, title, found)

        source = files.small(work, many)
        yield send(source, f"{many:,} files")
        yield send(source, f"{many:,} files, unchanged")
        files.remove(source)
        yield send(files.large(work, size), f"{size >> 20:,} MiB")


def of_functions(options: Options) -> Iterator[Shares]:
    """The functions of handshakes by package."""
    for work, client in (("full", handshake.CLIENT), ("resumed", handshake.resuming())):
        profile = cProfile.Profile()
        handshake.Pair(client, handshake.SERVER).handshake()  # what is made at first use
        with profile:
            for _ in range(options.size(500, 5)):
                handshake.Pair(client, handshake.SERVER).handshake()
        found: Counter[str] = Counter()
        stats: dict[tuple[str, int, str], tuple[int, int, float, float, object]]
        stats = pstats.Stats(profile).stats  # type: ignore[attr-defined]
        for (file, _, function), (_, _, own, _, _) in stats.items():
            found[package(file, function)] += round(own * 1e9)
        yield shares(BY_PACKAGE, f"functions of a {work} handshake", found)


def package(file: str, function: str) -> str:
    """Whose a function is."""
    if Path(file).is_relative_to(PACKAGE):
        return f"`{Path(file).relative_to(PACKAGE).parts[0].removesuffix('.py')}`"
    return "`cryptography`" if "cryptography" in file + function else "Python's own"


def of_imports() -> Iterator[Shares]:
    """The modules that ``connect`` imports; it fails at a port where nobody listens."""
    code = [sys.executable, "-X", "importtime", *COMMAND[1:], "connect", "127.0.0.1", "1"]
    done = subprocess.run(code, check=False, capture_output=True, text=True, env=ENVIRONMENT)
    found: Counter[str] = Counter()
    for own, _, name in re.findall(r"^import time: +(\d+) \| +(\d+) \| +(\S+)$", done.stderr, re.M):
        top = name.partition(".")[0]
        mine = {OURS: OURS, "cryptography": "`cryptography`"} | dict.fromkeys(TRIO, "trio")
        found[mine.get(top, "Python's own")] += int(own)
    yield shares(BY_MODULE, "imports of `connect`", found)


def run(options: Options) -> Iterator[Shares]:
    """Measure."""
    perf = program("perf")
    if perf is not None:
        for work in (of_handshakes, of_connect, of_pairs, of_files):
            yield from work(perf, options)
    yield from of_functions(options)
    yield from of_imports()
