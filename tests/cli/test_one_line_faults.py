"""Every command with the faults that people meet: one line that says what to do, never a traceback.

Each case runs as a process of its own. What it may say beside its one line is named here: the
warning of ``--insecure`` and the log of ``tunnel``.
"""

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from forked import Forkserver, Running, one_line
from waiting import until

from hybridkex.auth.dev_ca import DevCa, write_identity
from hybridkex.cli.commands import COMMANDS
from hybridkex.qkd.store import write_key_file

BESIDE = ("hybridkex: WARNING: --insecure", "20")  # a log line begins with the year
QUICK = {"RES_OPTIONS": "timeout:1 attempts:1", "COLUMNS": "100"}  # a resolver that is not there
KEY = "5a" * 32
LONG = "a" * 64  # longer than a label of a host name can be
SERVER = ("--cert", "cert.pem", "--key", "key.pem")
KME = ("--kme", "https://127.0.0.1:{closed}", "--kme-ca", "ca.pem", "--kme-cert", "cert.pem",
       "--kme-key", "key.pem", "--sae", "a")  # fmt: skip
POOL = ("--key-pool", "pool", "--pool-key", "psk", "--ids", "ids")
WG = ("wg-psk", "--interface", "wg0", "--peer-key", "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=",
      "--local", "a", "--peer", "b", "--wg", "./wg", "--log-level", "error")  # fmt: skip
WG_SCRIPT = f"""#!/bin/sh
[ "$1" = show ] && printf '%s\\t(none)\\n' {WG[4]} || cat >/dev/null
"""
CONNECT = ("connect", "127.0.0.1", "{closed}")
LISTEN = ("listen", "0", "--bind", "127.0.0.1", "--once")
RECEIVE = ("receive", "in", *SERVER, "--anyone", "--bind", "127.0.0.1", "--port")
TUNNEL = ("tunnel", "listen", "--target", "127.0.0.1:1", *SERVER, "--local")
TUNNEL_0 = (*TUNNEL, "127.0.0.1:0")
STATUS = ("kme", "status", "--peer-sae", "b")
EXPORT = ("kme", "export-pool", "--peer-sae", "b", *KME)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with good files and bad ones."""
    folder = tmp_path_factory.mktemp("faults")
    folder.chmod(0o755)
    ca = DevCa.create()
    write_identity(folder, ca, ca.issue("localhost", "127.0.0.1"))
    (folder / "locked.pem").write_bytes((folder / "key.pem").read_bytes())
    (folder / "locked.pem").chmod(0)
    (folder / "junk.pem").write_text(
        "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"
    )
    (folder / "binary").write_bytes(bytes(range(256)))
    (folder / "text").write_text("hello")
    (folder / "empty").touch()
    (folder / "folder").mkdir()
    (folder / "bad.toml").write_text("x = [\n")
    write_key_file(folder / "psk")
    (folder / "wg").write_text(WG_SCRIPT)
    (folder / "wg").chmod(0o755)
    return folder


@pytest.fixture(scope="module")
def ports() -> Iterator[dict[str, int]]:
    """One that is taken, one where nobody listens, and one who never answers."""
    with socket.create_server(("127.0.0.1", 0)) as busy, socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        with socket.create_server(("127.0.0.1", 0), backlog=64) as silent:
            found = {"busy": busy, "closed": closed, "silent": silent}
            yield {name: one.getsockname()[1] for name, one in found.items()}


REFUSED = "Connection refused; no program listens there"
TAKEN = "Address already in use"
FAULTS: tuple[tuple[tuple[str, ...], str], ...] = (
    # files
    ((*CONNECT, "--ca", "nothing"), "cannot read nothing: No such file"),
    ((*CONNECT, "--ca", "folder"), "cannot read folder: Is a directory"),
    ((*CONNECT, "--ca", "binary"), "cannot use the certificates of binary: "),
    ((*CONNECT, "--ca", "junk.pem"), "cannot use the certificates of junk.pem: "),
    ((*CONNECT, "--cert", "cert.pem"), "--cert requires --key"),
    ((*CONNECT, "--cert", "cert.pem", "--key", "locked.pem"), "locked.pem: Permission denied"),
    ((*CONNECT, "--insecure", "--keylog", "folder"), "cannot write folder"),
    ((*CONNECT, "--insecure", "--resume", "text"), "text is not a ticket store"),
    ((*CONNECT, "--known-peers", "text"), "text, line 1"),
    ((*CONNECT, "--key-pool", "nothing"), "no key pool nothing"),
    ((*LISTEN, "--cert", "nothing", "--key", "key.pem"), "cannot read nothing: No such file"),
    ((*LISTEN, "--cert", "junk.pem", "--key", "key.pem"), "junk.pem is not a certificate"),
    ((*LISTEN, "--cert", "cert.pem", "--key", "cert.pem"), "cert.pem is not a private key"),
    ((*LISTEN, "--cert", "cert.pem", "--key", "binary"), "binary is not a private key"),
    ((*LISTEN, *SERVER, "--port-file", "folder"), "cannot write folder"),
    (LISTEN, "a server must authenticate itself"),
    (("send", "nothing", "127.0.0.1", "--insecure"), "nothing: cannot read it: No such file"),
    (
        (*RECEIVE[:1], "text", *RECEIVE[2:], "0"),
        "cannot use the folder text: something else has this name",
    ),
    (("receive", "in", *SERVER), "name the senders' authority with --ca"),
    ((*TUNNEL_0, "--ca", "nothing"), "cannot read nothing"),
    ((*TUNNEL_0, "--socket-mode", "9"), "octal"),
    (("tunnel", "run", "nothing"), "cannot read nothing: No such file"),
    (("tunnel", "run", "bad.toml"), "bad.toml: "),
    (("tunnel", "run", "binary"), "binary: "),
    (("tunnel", "run", "empty"), "no tunnel is configured"),
    ((*WG, "--connect", "127.0.0.1", "--psk-file", "nothing"), "cannot read the key file nothing"),
    ((*WG, "--connect", "127.0.0.1", "--psk-file", "text"), "chmod 600 text"),
    ((*WG, "--connect", "127.0.0.1", "--key", "binary", "--pin", "00"), "not a private key"),
    ((*WG, "--connect", "127.0.0.1", "--psk-file", "psk", "--wg", "'"), "--wg is not a command"),
    (("demo", "nothing"), "nothing: there is no such file"),
    (("demo", "text", "--keep", "text"), "cannot write text"),
    (("rndl", "--html", "nothing/page.html"), "there is no folder"),
    (("rndl", "--json", "folder"), "folder is a folder"),
    (("rndl", "--keep", "folder"), "cannot write folder: File exists; choose another name"),
    (("dev-ca", "text"), "cannot write text"),
    (("dev-ca", "."), "--force replaces it"),
    (("kme", "serve", "nothing"), "cannot read nothing: No such file"),
    (("kme", "serve", "bad.toml"), "bad.toml: "),
    (("kme", "serve", "empty"), "empty: kme is missing"),
    (("kme", "dev-up", "text"), "cannot write text"),
    ((*STATUS, *KME, "--kme-ca", "binary"), "cannot use the certificates of binary: "),
    (
        (*STATUS, *KME, "--kme-key", "cert.pem"),
        "cert.pem is not a private key in PEM form: it is a certificate",
    ),
    ((*EXPORT, *POOL, "--ids", "text"), "text exists already"),
    ((*EXPORT, *POOL, "--ids", "text", "--role", "slave"), "text is not a list of key IDs"),
    ((*EXPORT, *POOL, "--pool-key", "nothing/key"), "cannot write the key file nothing/key"),
    (("qkd", "plot", "--kind", "qber", "-o", "nothing.txt"), ".png or .svg"),
    # places
    (CONNECT, REFUSED),
    (("connect", "no-such-host.invalid", "1"), "check the host's name"),
    (("connect", LONG, "1"), "this is not a valid host name"),
    (("connect", "127.0.0.1", "70000"), "from 0 to 65535, not 70000"),
    ((*CONNECT, "--bind", "203.0.113.1"), "203.0.113.1"),
    (("listen", "{busy}", "--bind", "127.0.0.1", *SERVER), f"{TAKEN}; another program listens"),
    (("listen", "0", "--bind", "203.0.113.1", *SERVER), "this machine has no such address"),
    (("listen", "0", "--bind", LONG, *SERVER), "this is not a valid host name"),
    (("listen", "65536", *SERVER), "from 0 to 65535, not 65536"),
    (("send", "text", "127.0.0.1:{closed}", "--insecure"), REFUSED),
    (("send", "text", "no-such-host.invalid"), "check the host's name"),
    (("send", "text", LONG), "1 to 63 bytes"),
    (("send", "text", "127.0.0.1:x"), "HOST:PORT"),
    ((*RECEIVE, "{busy}"), TAKEN),
    ((*RECEIVE, "70000"), "from 0 to 65535"),
    ((*TUNNEL, "127.0.0.1:{busy}"), TAKEN),
    ((*TUNNEL, "unix:text"), "something that is not a socket is there"),
    ((*TUNNEL_0, "--metrics", "127.0.0.1:{busy}"), TAKEN),
    (("tunnel", "connect", "--local", "127.0.0.1:0", "--remote", "x:y"), "HOST:PORT"),
    ((*WG, "--connect", "127.0.0.1:{closed}", "--psk-file", "psk", "--once"), REFUSED),
    ((*WG, "--connect", LONG, "--psk-file", "psk", "--once"), "1 to 63 bytes"),
    ((*WG, "--listen", "127.0.0.1:{busy}", "--psk-file", "psk"), TAKEN),
    (("kme", "dev-up", "busy", "--ports", "{busy},0"), TAKEN),
    (("kme", "dev-up", "other", "--ports", "1"), "--ports takes two port numbers"),
    ((*STATUS, *KME), "cannot be reached: Connection refused"),
    ((*STATUS, *KME, "--kme", "https://no-such-host.invalid:1"), "Name or service"),
    ((*STATUS, *KME, "--kme", "nonsense"), "https://host:port"),
    ((*EXPORT, *POOL), "cannot be reached: Connection refused"),
    (("doctor", "--kme", "https://127.0.0.1:1"), "--kme requires --peer-sae"),
    # values
    ((*CONNECT, "--psk", "no-colon"), "IDENTITY:HEX"),
    ((*CONNECT, "--psk", f"site:{KEY}z"), "the key of --psk is not hexadecimal"),
    ((*CONNECT, "--psk", f"site:{KEY[:8]}"), "at least 16 bytes"),
    ((*CONNECT, "--psk", f"site:{KEY}", "--psk-import", "z"), "--psk-import is not hexadecimal"),
    ((*CONNECT, "--psk-import", "00"), "--psk-import requires --psk"),
    ((*CONNECT, "--pin", "zz"), "64 digits in hex"),
    ((*CONNECT, "--groups", "kyber"), "unknown group 'kyber'; known are X25519MLKEM768"),
    ((*CONNECT, "--suites", "RC4"), "unknown cipher suite 'RC4'; known are TLS_"),
    ((*CONNECT, "--groups", ","), "at least one group"),
    ((*CONNECT, "--alpn", "x" * 256), "the ALPN protocol"),
    ((*CONNECT, "--insecure", "--pin", "00" * 32), "--insecure cannot be combined"),
    ((*CONNECT, *KME), "--kme requires --sae and --peer-sae"),
    ((*CONNECT, "--qkd", "require"), "--qkd require needs --kme or --key-pool"),
    ((*LISTEN, *SERVER, "--groups", "kyber"), "unknown group 'kyber'"),
    (
        (*LISTEN, *SERVER, "--require-client-cert"),
        "--require-client-cert needs trusted authorities or keys",
    ),
    (("send", "text", "127.0.0.1", "--retries", "-1"), "--retries must not be negative"),
    ((*RECEIVE, "0", "--max-connections", "0"), "--max-connections must be at least 1"),
    ((*TUNNEL_0, "--grace", "-1"), "grace must be a number of seconds"),
    ((*TUNNEL_0, "--idle-timeout", "-1"), "time limits must be positive"),
    (
        (*WG, "--listen", "0", "--psk-file", "psk", "--interval", "0"),
        "rotation interval must be positive",
    ),
    (("dev-ca", "new", "--name", "a b"), "'a b' is not a host name"),
    (("qkd", "run", "--preset", "none"), "there are gys2005"),
    (("qkd", "run", "--block-bits", "0"), "--block-bits must be positive"),
    (("qkd", "run", "--distance", "5000"), "shorten the fibre or make the blocks larger"),
    (
        ("qkd", "run", "--satellite", "12", "--block-bits", "1000"),
        "choose a higher pass or make the blocks larger",
    ),
    (
        ("qkd", "record", "--detections", "500", "-o", "made"),
        "lim2014 makes no key over 50 km of 500 detections; shorten the fibre, raise --detections, "
        "or use --as-published",
    ),
    (
        ("qkd", "record", "--distance", "900", "-o", "made"),
        "lim2014 makes no key over 900 km of 1000000 detections; shorten the fibre, raise "
        "--detections, or use --as-published",
    ),
    (("qkd", "run", "--eve", "mallory"), "no eavesdropper 'mallory'"),
)


def filled(words: tuple[str, ...], ports: dict[str, int]) -> list[str]:
    return [word.format(**ports) if word.count("{") == 1 else word for word in words]


def is_clean(process: Any, place: Path) -> None:
    """No traceback, and nothing of a key."""
    for text in (process.stdout.decode(), process.stderr.decode()):
        assert "Traceback" not in text
        assert "Error(" not in text
        assert KEY[:16] not in text
        for line in (place / "key.pem").read_text().splitlines()[1:-1]:
            assert line not in text


@pytest.mark.parametrize(
    ("words", "reason"), FAULTS, ids=lambda one: one[0] if isinstance(one, tuple) else one[:30]
)
def test_one_line_with_the_next_step(
    hybridkex: Forkserver,
    place: Path,
    ports: dict[str, int],
    words: tuple[str, ...],
    reason: str,
) -> None:
    done = hybridkex.run(
        *filled(words, ports),
        folder=place,
        environment=QUICK,
        unprivileged="locked.pem" in words,
    )
    assert done.returncode == 1, done.stderr
    line = one_line(done.stderr, beside=BESIDE)
    assert line.startswith("hybridkex: ")
    assert not line.startswith("hybridkex: hybridkex")
    assert reason in line
    is_clean(done, place)


@pytest.mark.parametrize(
    "words",
    [
        ("send", "", "127.0.0.1", "--insecure"),
        ("receive", "", *SERVER),
        (*CONNECT, "--ca", ""),
        (*LISTEN, "--cert", "", "--key", "key.pem"),
    ],
    ids=lambda words: words[0],
)
def test_an_empty_path_is_a_wrong_use(
    hybridkex: Forkserver, place: Path, ports: dict[str, int], words: tuple[str, ...]
) -> None:
    done = hybridkex.run(*filled(words, ports), folder=place, environment=QUICK)
    assert done.returncode == 2, done.stderr
    assert b"the path is empty; is a shell variable unset?" in done.stderr
    is_clean(done, place)


def test_every_command_is_among_them() -> None:
    """``completion`` has no fault of its own; ``doctor`` reports them on standard output."""
    assert {words[0] for words, _ in FAULTS} == COMMANDS.keys() - {"completion"}


def test_the_doctor_tells_of_a_kme_that_is_not_there(
    hybridkex: Forkserver, place: Path, ports: dict[str, int]
) -> None:
    words = filled(("doctor", *KME[:-2], "--peer-sae", "b"), ports)
    done = hybridkex.run(*words, folder=place)
    assert (done.returncode, done.stderr) == (1, b"")
    assert re.search(rb"^FAILED  KME https.*\n +-> check --kme", done.stdout, re.MULTILINE)
    is_clean(done, place)


# --- words that the parser does not take ----------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ((), "required: command"),
        (("conect",), "'conect'"),
        (("connect",), "required: HOST, PORT"),
        (("connect", "host", "port"), "PORT"),
        (("connect", "host", "1", "--psk-hash", "md5"), "'md5'"),
        (("connect", "host", "1", "--kme-id-rule", "x"), "--kme-id-rule"),
        (("listen", "1", "--no-such-option"), "--no-such-option"),
        (("kme", "dev-up", "new", "--producer", "link", "--distance", "nan"), "'nan'"),
        (("send", "file"), "HOST"),
        (("receive",), "DIR"),
        (("tunnel",), "command"),
        (("tunnel", "listen"), "--local, --target"),
        (("wg-psk",), "--interface"),
        (("demo", "--distance", "far"), "'far'"),
        *(
            ((*words, "--distance=-1"), "--distance: 0 to 1,000,000 km are possible, not '-1'")
            for words in (
                ("demo",),
                ("kme", "dev-up", "new", "--producer", "link"),
                ("qkd", "run"),
                ("qkd", "record", "-o", "new"),
                ("qkd", "plot", "--kind", "qber", "-o", "new.png"),
            )
        ),
        (("qkd", "run", "--distance", "inf"), "--distance: 0 to 1,000,000 km are possible"),
        (("rndl", "--nothing"), "--nothing"),
        (("dev-ca", "new", "--alg", "dsa"), "'dsa'"),
        (("kme",), "command"),
        (("kme", "dev-up", "new", "--metrics", "x"), "--metrics"),
        (("qkd", "run", "--seed", "x"), "--seed"),
        (("doctor", "now"), "now"),
        (("completion", "cmd"), "'cmd'"),
    ],
    ids=lambda one: " ".join(one) if isinstance(one, tuple) else "",
)
def test_a_word_out_of_place(hybridkex: Forkserver, words: tuple[str, ...], reason: str) -> None:
    done = hybridkex.run(*words)
    assert (done.returncode, done.stdout) == (2, b"")
    line = one_line(done.stderr)
    assert line.startswith("hybridkex: ")
    assert reason in line
    command = re.search(r"try: (hybridkex.* --help)$", line)
    assert command is not None
    assert hybridkex.run(*command[1].split()[1:]).returncode == 0


# --- a package that is missing --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "missing"),
    [
        (("qkd", "run"), "numpy"),
        (("qkd", "plot", "--kind", "qber", "-o", "new.png"), "matplotlib"),
        (("rndl",), "rich"),
        (("kme", "serve", "x"), "httpx"),
        (("demo",), "prometheus_client"),
        (("tunnel", "run", "x"), "prometheus_client"),
        ((*CONNECT, *KME, "--peer-sae", "b"), "httpx"),
        (("completion", "bash"), "shtab"),
    ],
    ids=lambda one: one[0] if isinstance(one, tuple) else one,
)
def test_a_missing_package_is_named_with_how_to_get_it(
    hybridkex: Forkserver, place: Path, words: tuple[str, ...], missing: str
) -> None:
    done = hybridkex.run(*filled(words, {"closed": 1}), folder=place, without=[missing])
    assert done.returncode == 1
    line = one_line(done.stderr)
    assert missing in line
    assert re.search(r"pip install 'hybridkex\[[\w,]+\]'$", line)


# --- Ctrl-C ---------------------------------------------------------------------------------------


def opened(process: Running, place: Path) -> bool:
    return bool(list(place.glob("port-*")))


def spoke(process: Running, place: Path) -> bool:
    return bool(process.said())


def warned(process: Running, place: Path) -> bool:
    return bool(process.told())


SILENT = ("https://127.0.0.1:{silent}", *KME[2:8])
WAITING: tuple[tuple[tuple[str, ...], Callable[[Running, Path], bool] | None, int], ...] = (
    (("connect", "127.0.0.1", "{silent}", "--insecure"), None, 130),
    ((*LISTEN, *SERVER, "--port-file", "port-1"), opened, 130),
    ((*LISTEN[:-1], *SERVER, "--port-file", "port-1"), opened, 130),
    (("send", "text", "127.0.0.1:{silent}", "--insecure"), None, 130),
    ((*RECEIVE, "0", "--port-file", "port-1"), opened, 130),
    ((*TUNNEL_0, "--port-file", "port-1"), opened, 0),
    ((*WG, "--listen", "127.0.0.1:0", "--psk-file", "psk", "--port-file", "port-1"), opened, 130),
    ((*WG, "--connect", "127.0.0.1:{silent}", "--psk-file", "psk"), None, 130),
    (("demo", "text"), spoke, 130),
    (("kme", "dev-up", "sites", "--ports", "0,0"), spoke, 0),
    (("kme", "status", "--kme", *SILENT, "--sae", "a", "--peer-sae", "b"), None, 130),
    (("qkd", "run", "--json", "--blocks", "999", "--block-bits", "50000"), spoke, 130),
    (("doctor", "--kme", *SILENT, "--peer-sae", "b"), None, 130),
)


@pytest.mark.parametrize(
    ("words", "ready", "status"), WAITING, ids=[" ".join(words[:2]) for words, _, _ in WAITING]
)
def test_ctrl_c_ends_it_without_a_word(
    hybridkex: Forkserver,
    place: Path,
    words: tuple[str, ...],
    ready: Callable[[Running, Path], bool] | None,
    status: int,
    tmp_path: Path,
) -> None:
    for path in place.iterdir():
        if path.is_file() and os.access(path, os.R_OK):
            (tmp_path / path.name).write_bytes(path.read_bytes())
            (tmp_path / path.name).chmod(path.stat().st_mode)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(30)
        ports = {"silent": silent.getsockname()[1]}
        process = hybridkex.start(
            *filled(words, ports), folder=tmp_path, environment={"TMPDIR": str(temporary)}
        )
        if ready is None:
            accepted, _ = silent.accept()
        else:
            until(lambda: ready(process, tmp_path), process)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == status, process.told()
        if ready is None:
            accepted.close()
    for line in process.told().decode().splitlines():
        assert line.startswith((*BESIDE, "receiving into"))
    assert not list(temporary.iterdir())


# --- standard output ------------------------------------------------------------------------------

TALKING = (
    ("--help",),
    ("connect", "--help"),
    ("doctor",),
    ("dev-ca", "new"),
    ("demo", "text"),
    ("kme", "dev-up", "sites", "--no-serve"),
    ("qkd", "run", "--json", "--blocks", "1", "--block-bits", "30000", "--distance", "1"),
    ("qkd", "run", "--blocks", "1", "--block-bits", "30000", "--distance", "1"),
    ("completion", "bash"),
)


@pytest.mark.parametrize("words", TALKING, ids=" ".join)
def test_a_reader_who_has_left_and_a_disk_that_is_full(
    hybridkex: Forkserver, place: Path, tmp_path: Path, words: tuple[str, ...]
) -> None:
    (tmp_path / "text").write_text("hello")
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as pipe:
        gone = hybridkex.run(*words, folder=tmp_path, stdout=pipe, to_the_end=True)
    assert gone.stderr == b""
    assert gone.returncode == 1
    for made in ("new", "sites"):
        if (tmp_path / made).exists():
            (tmp_path / made).rename(tmp_path / f"{made}-1")
    with Path("/dev/full").open("wb") as full:
        done = hybridkex.run(*words, folder=tmp_path, stdout=full, to_the_end=True)
    assert done.returncode == 1
    assert one_line(done.stderr).startswith("hybridkex: standard output: No space left on device; ")


@pytest.mark.parametrize(
    "words", [("--help",), ("connect", "--help"), ("--version",)], ids=" ".join
)
def test_a_disk_that_is_full_and_output_without_a_buffer(words: tuple[str, ...]) -> None:
    """``argparse`` passes over an error of writing."""
    program = "import sys; from hybridkex.cli import main; sys.exit(main())"
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [sys.executable, "-u", "-c", program, *words],
            stdout=full, stderr=subprocess.PIPE, check=False, timeout=60,
        )  # fmt: skip
    assert done.returncode == 1
    assert one_line(done.stderr).startswith("hybridkex: standard output: No space left on device; ")


@pytest.mark.parametrize("unbuffered", [(), ("-u",)], ids=str)
@pytest.mark.parametrize(
    "write",
    [
        "print('x')",
        "print('x', flush=True)",
        "sys.stdout.writelines(['x', 'y'])",
        "terminal(sys.stdout).write('x')",
        "terminal(sys.stdout).write('x' * 100_000)",
        "terminal(terminal(sys.stdout)).flush() or print('x')",
        "Console(file=sys.stdout).print('x')",
        "Console(file=terminal(sys.stdout)).print('x')",
        "Console(file=terminal(sys.stdout)).print('x', markup=False)",
    ],
)
def test_whatever_writes_to_a_full_disk_names_standard_output(
    write: str, unbuffered: tuple[str, ...]
) -> None:
    """``rndl`` draws with ``rich`` on the stream underneath."""
    program = (
        "import sys; from hybridkex.cli import run_program; from hybridkex.text import terminal; "
        f"from rich.console import Console; sys.exit(run_program(lambda: {write}))"
    )
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [sys.executable, *unbuffered, "-c", program],
            stdout=full, stderr=subprocess.PIPE, check=False, timeout=60,
        )  # fmt: skip
    assert done.returncode == 1
    assert one_line(done.stderr).startswith("hybridkex: standard output: No space left on device; ")


def test_the_data_of_a_channel_has_no_reader(
    hybridkex: Forkserver, place: Path, tmp_path: Path
) -> None:
    words = ("--cert", place / "cert.pem", "--key", place / "key.pem", "--echo")
    with hybridkex.listening(tmp_path, *words) as (port, server):
        reading, writing = os.pipe()
        os.close(reading)
        with os.fdopen(writing, "wb") as pipe:
            done = hybridkex.run(
                *("connect", "localhost", port, "--ca", place / "ca.pem", "--json"),
                data=b"x" * 1000,
                stdout=pipe,
            )
        assert done.returncode == 1
        assert done.stderr.count(b"\n") == 1  # the session
        assert server.poll() is None
