"""What the machine refuses: room on a disk, threads, memory. Every command says so in one line that
has the next step, or goes on; none shows a traceback, and none stays for ever."""

import contextlib
import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from forked import Forkserver, Running, one_line, until

from hybridkex.cli.guarded import explained
from hybridkex.cli.threads import bounded_thread_starts
from hybridkex.errors import LocalStateError
from hybridkex.files import create_file, open_private, write_file
from hybridkex.machine import refusal, write_error
from hybridkex.qkd.store import write_key_file

SERVER = ("--cert", "cert.pem", "--key", "key.pem")
LOCAL = ("0", "--bind", "127.0.0.1")
LISTEN = ("listen", *LOCAL, *SERVER)
RECEIVE = ("receive", "in", *SERVER, "--anyone", "--bind", "127.0.0.1", "--port", "0")
TUNNEL = ("tunnel", "listen", "--target", "127.0.0.1:1", *SERVER, "--local", "127.0.0.1:0",
          "--log-level", "warning")  # fmt: skip
PEER_KEY = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="
WG = ("wg-psk", "--interface", "wg0", "--peer-key", PEER_KEY, "--local", "a", "--peer", "b",
      "--wg", "./wg", "--psk-file", "psk", "--log-level", "error")  # fmt: skip
KME = ("--kme", "https://127.0.0.1:1", "--kme-ca", "ca.pem", "--kme-cert", "cert.pem",
       "--kme-key", "key.pem", "--sae", "a", "--peer-sae", "b")  # fmt: skip
EXPORT = ("kme", "export-pool", *KME, "--ids", "ids")
SMALL = ("--blocks", "1", "--block-bits", "30000", "--distance", "1")
CONNECT = ("connect", "localhost", "{port}", "--ca", "ca.pem")

WRITING: tuple[Any, ...] = (
    # Every command that writes a file; {new} is one in the place of the fault.
    ("dev-ca", "{new}"),
    ("kme", "dev-up", "{new}", "--no-serve"),
    (*EXPORT, "--key-pool", "{new}", "--pool-key", "{new}.key"),
    (*LISTEN, "--port-file", "{new}"),
    (*RECEIVE, "--port-file", "{new}"),
    (*TUNNEL, "--port-file", "{new}"),
    (*WG, "--listen", "127.0.0.1:0", "--port-file", "{new}"),
    ("qkd", "plot", "--kind", "qber", "-o", "{new}.png"),
    ("qkd", "scan", "--vary", "distance_km=1", *SMALL[:2], "-o", "{new}.csv"),
    ("qkd", "record", *SMALL[4:], "--as-published", "--detections", "1000", "-o", "{new}"),
    ("demo", "text", "--keep", "{new}"),
    ("rndl", "--keep", "{new}"),
)
RESUME = (*CONNECT, "--resume", "{new}")
FILES = (*WRITING[2:8], RESUME)
"""Those that make no folder."""
TEMPORARY = (("demo", "text"), ("rndl",))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, keys: Path) -> Path:
    folder = tmp_path_factory.mktemp("machine")
    folder.chmod(0o755)
    for name in ("ca.pem", "cert.pem", "key.pem"):
        shutil.copy(keys / name, folder)
        (folder / name).chmod(0o644)
    (folder / "text").write_text("hello")
    (folder / "in").mkdir()
    write_key_file(folder / "psk")
    (folder / "wg").write_text(
        f"#!/bin/sh\n[ \"$1\" = show ] && printf '%s\\t(none)\\n' {PEER_KEY} || cat >/dev/null\n"
    )
    (folder / "wg").chmod(0o755)
    return folder


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file system without room for a file, but for its name."""
    folder = tmp_path_factory.mktemp("full")
    mount = ["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs is not allowed here")
    try:
        with contextlib.suppress(OSError), (folder / "fill").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def where(words: tuple[str, ...], new: Path, port: str = "") -> list[str]:
    return [word.replace("{new}", str(new)).replace("{port}", port) for word in words]


def named(words: tuple[str, ...]) -> str:
    return " ".join(word for word in words if word.isalpha() or "{new}" in word)[:40]


@pytest.mark.parametrize("words", WRITING, ids=named)
def test_a_full_disk(
    hybridkex: Forkserver, place: Path, full: Path, words: tuple[str, ...]
) -> None:
    port = ""
    with contextlib.ExitStack() as stack:
        if "{port}" in words:
            port, _ = stack.enter_context(hybridkex.listening(place, *SERVER, "--echo"))
        done = hybridkex.run(*where(words, full / "new", port), folder=place)
    if (full / "new").is_dir():
        shutil.rmtree(full / "new")
    assert [one.name for one in full.iterdir()] == ["fill"], "no half of a file stays"
    assert done.returncode == 1
    line = one_line(done.stderr)
    assert f"cannot write {'the key file ' if 'export-pool' in words else ''}{full}/new" in line
    assert "No space left on device; free some space there, or choose another" in line
    assert line.count(";") == 1


def test_new_tickets_on_a_full_disk(hybridkex: Forkserver, place: Path, full: Path) -> None:
    """The connection needs none of them."""
    with hybridkex.listening(place, *SERVER, "--echo") as (port, _):
        done = hybridkex.run(*where(RESUME, full / "new", port), folder=place)
    assert done.returncode == 0
    assert [one.name for one in full.iterdir()] == ["fill"], "no half of a file stays"
    said = done.stderr.decode()
    assert f"new session tickets are not stored: cannot write {full}/new" in said
    assert said.count("No space left on device; free some space there, or choose") == 1


@pytest.mark.parametrize("words", TEMPORARY, ids=named)
def test_a_full_temporary_place(
    hybridkex: Forkserver, place: Path, full: Path, words: tuple[str, ...]
) -> None:
    """One that has room for the first files only: a place without any is passed over."""
    subprocess.run(["mount", "-o", "remount,size=80k", str(full)], check=True)
    try:
        done = hybridkex.run(*words, folder=place, environment={"TMPDIR": str(full)})
    finally:
        subprocess.run(["mount", "-o", "remount,size=8k", str(full)], check=True)
    assert done.returncode == 1
    line = one_line(done.stderr)
    assert "cannot write" in line
    assert "No space left on device; free some space there, or choose another place for " in line
    assert line.endswith("TMPDIR=FOLDER")
    assert [one.name for one in full.iterdir()] == ["fill"]


@pytest.mark.parametrize("words", FILES, ids=named)
def test_a_folder_that_is_not_there(
    hybridkex: Forkserver, place: Path, words: tuple[str, ...]
) -> None:
    port = ""
    with contextlib.ExitStack() as stack:
        if "{port}" in words:
            port, _ = stack.enter_context(hybridkex.listening(place, *SERVER, "--echo"))
        done = hybridkex.run(*where(words, place / "nothing" / "new", port), folder=place)
    assert done.returncode == 1
    assert f"{place}/nothing/new" in one_line(done.stderr)
    assert "check that the folder exists" in one_line(done.stderr)


def test_the_place_is_tried_once_more(tmp_path: Path) -> None:
    """Whatever the words of the failure were, the place is the reason where nothing can be
    written to it; where it can, they stay."""
    with pytest.raises(ValueError, match="own"), explained(tmp_path, "elsewhere"):
        raise ValueError("own words")
    assert not list(tmp_path.iterdir())
    gone = tmp_path / "gone"
    with (
        pytest.raises(LocalStateError, match=f"removed the folder {gone}.*or elsewhere"),
        explained(gone, "elsewhere"),
    ):
        raise ValueError("the other party closed the connection")


def test_every_writer_names_the_file(tmp_path: Path) -> None:
    for write in (write_file, create_file):
        with pytest.raises(OSError, match="No such file") as caught:
            write(tmp_path / "no" / "file", b"x")
        assert caught.value.filename == str(tmp_path / "no" / "file")
        assert f"{tmp_path}/no/file: No such file" in (refusal(caught.value) or "")
    with pytest.raises(OSError, match="No space") as caught:
        write_file("/dev/full", b"x")
    assert "cannot write /dev/full: No space left" in str(write_error("/dev/full", caught.value))
    with open_private(tmp_path / "file"):
        pass


def test_what_is_a_refusal_and_what_is_a_defect() -> None:
    assert "ulimit -u" in (refusal(RuntimeError("can't start new thread")) or "")
    assert "ulimit -v" in (refusal(MemoryError()) or "")
    assert "ulimit -v" in (refusal(SystemError("error return without exception set")) or "")
    assert "ulimit -v" in (refusal(RuntimeError("can't allocate read lock")) or "")
    assert refusal(SystemError("anything else")) is None
    assert refusal(RuntimeError("anything else")) is None
    assert refusal(KeyError("x")) is None


# --- no thread, no memory -------------------------------------------------------------------------

LIMITS = (
    # With none, threads do not begin.
    *({"RLIMIT_AS": size} for size in (0, 1 << 16, 3 << 17, 1 << 20)),
    {"RLIMIT_NPROC": 0},
)
CLIENTS = (
    CONNECT,
    ("send", "text", "localhost:{port}", "--ca", "ca.pem", "--retries", "0"),
    (*WG, "--connect", "127.0.0.1:1", "--once"),
    ("kme", "status", *KME),
    ("dev-ca", "{new}"),
    ("doctor",),
    ("qkd", "run", "--json", *SMALL),
)
SERVERS = (
    (*LISTEN, "--echo"),
    RECEIVE,
    TUNNEL,
    (*WG, "--listen", "127.0.0.1:0"),
)


def limited(place: Path, limits: dict[str, int]) -> dict[str, Any]:
    return {
        "folder": place,
        "limits": limits,
        "unprivileged": "RLIMIT_NPROC" in limits,
        # A thread that would begin later is refused as well.
        "constants": {"hybridkex.cli.threads.PATIENCE": 0.2},
    }


def is_clean(process: Running) -> None:
    for text in (process.said(), process.told()):
        assert b"Traceback" not in text, text.decode()
        assert b"internal error" not in text, text.decode()


@pytest.mark.parametrize("limits", LIMITS, ids=str)
def test_clients(
    hybridkex: Forkserver, place: Path, tmp_path: Path, limits: dict[str, int]
) -> None:
    """All at once: each that hung would cost its whole time."""
    options = limited(place, limits)
    with (
        hybridkex.listening(place, *SERVER, "--echo") as (port, _),
        hybridkex.listening(place, *SERVER, "--echo", "--alpn", "hybridkex-transfer/2") as (to, _),
    ):
        started = [
            hybridkex.start(
                *where(words, tmp_path / str(number), to if words[0] == "send" else port), **options
            )
            for number, words in enumerate(CLIENTS)
        ]
        for process in started:
            assert process.stdin is not None
            process.stdin.close()
        for process in started:
            process.wait(30)
            is_clean(process)
            if process.returncode and b"hybridkex: " in process.told():
                assert process.told().count(b"hybridkex: ") == 1


@pytest.mark.parametrize("limits", LIMITS, ids=str)
def test_servers(
    hybridkex: Forkserver, place: Path, tmp_path: Path, limits: dict[str, int]
) -> None:
    """A server that has begun ends when it is told to, whatever its clients made it need."""
    # Not a pure "unprivileged": the folder to receive into is ours.
    options = limited(place, limits)
    started = []
    for number, words in enumerate(SERVERS):
        port_file = tmp_path / str(number)
        tmp_path.chmod(0o777)
        started.append((hybridkex.start(*words, "--port-file", port_file, **options), port_file))
    for process, port_file in started:
        with contextlib.suppress(AssertionError):
            until(port_file.exists, process)
    clients = [
        hybridkex.start(*("connect", "localhost", port_file.read_text().strip()), folder=place)
        for process, port_file in started
        if process.poll() is None
    ]
    for client in clients:
        client.communicate(b"x", 30)
    for process, _ in started:
        process.send_signal(signal.SIGTERM)
    for process, _ in started:
        process.wait(30)
        is_clean(process)


def test_a_thread_that_dies_before_it_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hybridkex.cli.threads.PATIENCE", 0.05)
    before = threading.Thread.start, signal.getsignal(signal.SIGALRM)
    with bounded_thread_starts():
        good = threading.Thread(target=int)
        good.start()
        good.join()
        # As if it had no memory for its first frame.
        starts = "_start_joinable_thread", "_start_new_thread"  # from Python 3.13 on, and before
        name = next(one for one in starts if hasattr(threading, one))
        monkeypatch.setattr(threading, name, lambda *_, **__: None)
        dead = threading.Thread(target=int)
        with pytest.raises(MemoryError):
            dead.start()
        threading._limbo.pop(dead, None)  # type: ignore[attr-defined]

        # The process was slow, and time is up where the lock of the waiting thread is free.
        release = threading.Condition._release_save  # type: ignore[attr-defined]

        def release_late(condition: threading.Condition) -> None:
            release(condition)
            for _ in range(2):
                signal.raise_signal(signal.SIGALRM)

        monkeypatch.setattr(threading.Condition, "_release_save", release_late)
        dead = threading.Thread(target=int)
        with pytest.raises(MemoryError):
            dead.start()
        threading._limbo.pop(dead, None)  # type: ignore[attr-defined]
    assert (threading.Thread.start, signal.getsignal(signal.SIGALRM)) == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
