"""``send`` and ``receive`` as processes, with the faults that a transfer meets."""

import os
import pty
import re
import resource
import select
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from apps_glue import Run, Wire, small_disk, wait_until

from hybridkex import ClientConfig, DevCa, SecureStream, ServerConfig, TrustStore
from hybridkex.apps.transfer import PROTOCOL, Folder, Receiver
from hybridkex.apps.transfer.frames import Frames
from hybridkex.apps.transfer.messages import (
    DATA,
    VERSION,
    End,
    Failed,
    Have,
    Hello,
    Message,
    Offer,
    ProtocolError,
    Start,
    decode,
    encode,
    header,
    split_header,
)
from hybridkex.apps.transfer.names import PARTIAL, UnsafeName, check_path

MakeWire = Callable[[int], AbstractAsyncContextManager[Wire]]
MIB = 1 << 20


def receive(run: Run, folder: Path, mutual: list[str], *more: object, **options: Any) -> Any:
    return run.server(
        "receive", folder, "--port", 0, "--bind", "127.0.0.1", *mutual, *more, **options
    )


def send(run: Run, mutual: list[str], port: int, *words: object) -> tuple[int, str]:
    process = run.start("send", *words, f"localhost:{port}", *mutual)
    errors = process.communicate(timeout=40)[1]
    assert "Traceback" not in errors
    return process.returncode, errors


def there(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if PARTIAL not in str(path)}


def test_files_and_folders_and_once_more(tmp_path: Path, run: Run, mutual: list[str]) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "empty").mkdir(parents=True)
    (source / "deep" / "er").mkdir(parents=True)
    for number in range(150):
        (source / "deep" / "er" / f"{number} ü").write_bytes(bytes([number]) * number)
    (source / "large").write_bytes(os.urandom(5 * MIB + 17))
    (source / "large").chmod(0o755)
    os.utime(source / "large", (1_000_000_000, 1_000_000_000))
    (source / "link").symlink_to("/etc/passwd")
    single = tmp_path / os.fsdecode(b"not utf-8 \xff")
    single.write_bytes(b"x")
    server, port = receive(run, target, mutual)
    status, errors = send(run, mutual, port, source, single)
    assert status == 1, "a link was left out, which is not success"
    assert "link is a link" in errors
    below = sum(not path.is_symlink() for path in source.rglob("*"))
    assert f"{below + 2} stored" in errors, "what is in the folder, the folder, the single file"
    compared = subprocess.run(
        ["diff", "-r", "-x", "link", str(source), str(target / "source")], check=False
    )
    assert compared.returncode == 0
    assert (target / single.name).read_bytes() == b"x"
    arrived = (target / "source" / "large").stat()
    assert (arrived.st_mode & 0o777, arrived.st_mtime) == (0o755, 1_000_000_000)
    assert not (target / "source" / "link").is_symlink()
    status, errors = send(run, mutual, port, source, single)
    assert f"0 stored, {below + 2} were there; 0 bytes of files" in errors
    server.terminate()
    server.communicate(timeout=10)
    assert server.returncode == 0
    assert not (target / PARTIAL).exists()


def test_nothing_is_overwritten_unless_told(tmp_path: Path, run: Run, mutual: list[str]) -> None:
    target, file, longer = tmp_path / "target", tmp_path / "same", tmp_path / "longer"
    target.mkdir()
    for path in (file, longer):
        path.write_text("new content")
    (target / "same").write_text("old content")
    (target / "longer").write_text("old content that is longer")
    _, port = receive(run, target, mutual)
    status, errors = send(run, mutual, port, file, longer)
    assert status == 1
    assert errors.count("is there already, with other content") == 2
    assert (target / "same").read_text() == "old content"
    _, port = receive(run, target, mutual, "--overwrite")
    status, errors = send(run, mutual, port, file, longer)
    assert status == 0, errors
    assert {(target / name).read_text() for name in ("same", "longer")} == {"new content"}


async def test_a_cut_connection_goes_on_where_it_was(
    tmp_path: Path, run: Run, mutual: list[str], wire: MakeWire
) -> None:
    source, target = tmp_path / "file", tmp_path / "target"
    content = os.urandom(24 * MIB)
    source.write_bytes(content)
    server, port = receive(run, target, mutual)
    async with wire(port) as proxy:
        proxy.cut_after = 15 * MIB
        status, errors = await trio.to_thread.run_sync(send, run, mutual, proxy.port, source)
        assert status == 0, errors
        assert "trying again in" in errors
        assert proxy.connections == 2
        # Not from the beginning: only what had not reached the disk went twice.
        assert proxy.carried < 33 * MIB
    assert (target / "file").read_bytes() == content
    assert there(target) == {"file"}
    assert open_descriptors(server) < 15


def open_descriptors(process: "subprocess.Popen[str]") -> int:
    return len(os.listdir(f"/proc/{process.pid}/fd"))


def test_a_killed_receiver_is_found_again(tmp_path: Path, run: Run, mutual: list[str]) -> None:
    source, target = tmp_path / "file", tmp_path / "target"
    content = os.urandom(40 * MIB)
    source.write_bytes(content)
    server, port = receive(run, target, mutual)
    sender = run.start("send", source, f"localhost:{port}", *mutual)
    parts = target / PARTIAL
    wait_until(lambda: any(part.stat().st_size > 4 * MIB for part in parts.glob("*")), sender)
    server.kill()
    server.communicate()
    assert there(target) == set(), "nothing half-written under a final name"
    run.server("receive", target, "--port", port, "--bind", "127.0.0.1", *mutual)
    errors = sender.communicate(timeout=30)[1]
    assert sender.returncode == 0, errors
    assert re.search(r"of which [\d,]+ were there", errors)
    assert (target / "file").read_bytes() == content


def test_a_killed_sender_leaves_nothing_under_a_final_name(
    tmp_path: Path, run: Run, mutual: list[str]
) -> None:
    source, target = tmp_path / "file", tmp_path / "target"
    source.write_bytes(os.urandom(40 * MIB))
    server, port = receive(run, target, mutual)
    sender = run.start("send", source, f"localhost:{port}", *mutual)
    parts = target / PARTIAL
    wait_until(lambda: any(part.stat().st_size > 4 * MIB for part in parts.glob("*")), sender)
    sender.kill()
    sender.communicate()
    assert there(target) == set()
    status, errors = send(run, mutual, port, source)
    assert status == 0, errors
    assert "were there" in errors
    assert (target / "file").read_bytes() == source.read_bytes()
    assert server.poll() is None


def test_disk_full_before_and_in_the_middle(tmp_path: Path, run: Run, mutual: list[str]) -> None:
    with small_disk(tmp_path / "disk", 12) as disk:
        server, port = receive(run, disk / "in", mutual)
        large, small = tmp_path / "large", tmp_path / "small"
        large.write_bytes(bytes(16 * MIB))
        small.write_bytes(b"fits")
        status, errors = send(run, mutual, port, large, small)
        assert status == 1
        assert re.search(r"large: the disk is full: 16,777,216 bytes are still to come", errors)
        assert (disk / "in" / "small").read_bytes() == b"fits", "the next file is tried"
        # Each of two fits, both do not: the end of the disk comes in the middle.
        files = [tmp_path / "one", tmp_path / "two"]
        for file in files:
            file.write_bytes(os.urandom(9 * MIB))
        senders = [run.start("send", file, f"localhost:{port}", *mutual) for file in files]
        told = [sender.communicate(timeout=30)[1] for sender in senders]
        assert any("the disk is full" in errors for errors in told), told
        for file in files:
            arrived = disk / "in" / file.name
            assert not arrived.exists() or arrived.read_bytes() == file.read_bytes()
        server.terminate()
        server.communicate(timeout=10)


def test_a_write_error_in_the_middle(tmp_path: Path, run: Run, mutual: list[str]) -> None:
    """Where no tmpfs may be mounted this is the full disk: writing fails after 3 MiB."""
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (3 * MIB, 3 * MIB))
    target = tmp_path / "target"
    _, port = receive(run, target, mutual, preexec_fn=limit)
    large, small = tmp_path / "large", tmp_path / "small"
    large.write_bytes(bytes(8 * MIB))
    small.write_bytes(b"fits")
    status, errors = send(run, mutual, port, large, small)
    assert status == 1
    assert "cannot write large: the file is larger than the limit for files here" in errors
    assert there(target) == {"small"}


def test_a_large_file_in_little_memory(tmp_path: Path, run: Run, mutual: list[str]) -> None:
    source, target = tmp_path / "sparse", tmp_path / "target"
    with source.open("wb") as file:
        file.truncate(300 * MIB)
    server, port = receive(run, target, mutual)
    sender = run.start("send", source, f"localhost:{port}", *mutual)
    peak = 0
    while sender.poll() is None:
        peak = max(peak, memory(server.pid), memory(sender.pid))
        time.sleep(0.1)
    assert sender.returncode == 0
    assert (target / "sparse").stat().st_size == 300 * MIB
    assert 0 < peak < 150 * MIB


def memory(pid: int) -> int:
    """The most that a process has held so far."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    return int(found[1]) * 1024 if found else 0


def test_bars_on_a_terminal(tmp_path: Path, run: Run, mutual: list[str]) -> None:
    source = tmp_path / "file"
    source.write_bytes(bytes(20 * MIB))
    _, port = receive(run, tmp_path / "target", mutual)
    ours, theirs = pty.openpty()
    words = ["send", str(source), f"localhost:{port}", *mutual]
    process = subprocess.Popen(
        [sys.executable, "-m", "hybridkex", *words],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "120"},
    )
    os.close(theirs)
    screen = b""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if select.select([ours], [], [], 0.1)[0]:
            try:
                screen += os.read(ours, 65536)
            except OSError:  # the other end is closed
                break
    os.close(ours)
    assert process.wait(timeout=10) == 0
    text = screen.decode()
    assert "━" in text
    assert "wire" in text
    assert "1 stored; 20,971,520 bytes of files" in text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["receive", "d", "--cert", "{cert}", "--key", "{key}"], "whoever connects could write"),
        (["send", "/nowhere", "localhost", "--ca", "{ca}"], "No such file or directory"),
        (["send", "{ca}", "localhost:1", "--ca", "{ca}"], "cannot connect to localhost:1"),
        (["send", "{ca}", "localhost:x", "--ca", "{ca}"], "is not HOST:PORT"),
        (["send", "{ca}", "{ca}", "localhost", "--ca", "{ca}"], "have the same name"),
        (["receive", "{ca}/x", "--anyone", "--cert", "{cert}", "--key", "{key}"], "cannot use"),
    ],
)
def test_mistakes_in_one_line(
    tmp_path: Path, run: Run, keys: Path, words: list[str], said: str
) -> None:
    paths = {name: str(keys / f"{name}.pem") for name in ("ca", "cert", "key")}
    process = run.start(*(word.format(**paths) for word in words), cwd=tmp_path)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 1
    assert said in errors
    assert len(errors.strip().splitlines()) == 1


def test_a_stranger_sends_nothing(tmp_path: Path, run: Run, keys: Path, mutual: list[str]) -> None:
    _, port = receive(run, tmp_path / "target", mutual)
    process = run.start("send", keys / "ca.pem", f"localhost:{port}", "--ca", keys / "ca.pem")
    errors = process.communicate(timeout=10)[1]
    assert process.returncode == 1
    assert "Traceback" not in errors
    assert len(errors.splitlines()[-1]) > 20, "the last line says why"
    assert there(tmp_path / "target") == set()


# --- a peer that does not keep to the protocol ------------------------------------------------


@pytest.fixture(scope="module")
def configs() -> tuple[ClientConfig, ServerConfig]:
    authority = DevCa.create()
    return (
        ClientConfig(verifier=TrustStore((authority.certificate,)), alpn=(PROTOCOL,)),
        ServerConfig(identities=(authority.issue("localhost"),), alpn=(PROTOCOL,)),
    )


async def talk(
    folder: Folder, configs: tuple[ClientConfig, ServerConfig], *said: Message | bytes
) -> list[object]:
    """What a receiver answers."""
    one, other = trio.testing.memory_stream_pair()
    client = SecureStream(one, configs[0], server_hostname="localhost")
    server = SecureStream(other, configs[1])
    answers: list[object] = []
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:

            async def serve() -> None:
                await server.do_handshake()
                answers.append(await Receiver(folder).serve(server))

            nursery.start_soon(serve)
            await client.do_handshake()
            frames = Frames(client)
            try:
                for message in (Hello(version=VERSION, transfer="t"), *said):
                    if isinstance(message, bytes):
                        await client.send_all(message)
                    else:
                        await frames.send(message)
                await client.send_eof()
                while (answer := await frames.receive()) is not None:
                    answers.append(answer)
            except trio.BrokenResourceError:
                pass
            await client.aclose()
    return answers


def offer(*path: str, size: int = 3) -> Offer:
    return Offer(n=0, path=path, folder=False, size=size, mtime_ns=0, executable=False)


@pytest.mark.parametrize(
    "path",
    [
        (),
        ("..", "x"),
        ("a", "..", "x"),
        ("/etc", "x"),
        ("a/b",),
        ("",),
        (".",),
        ("a\0b",),
        ("a\x1b[2J",),
        ("a\nb",),
        ("x" * 256,),
        ("ü" * 128,),
        ("\ud800",),
        (PARTIAL, "x"),
        ("a",) * 129,
    ],
)
async def test_no_path_escapes(
    tmp_path: Path, configs: tuple[ClientConfig, ServerConfig], path: tuple[str, ...]
) -> None:
    with pytest.raises(UnsafeName):
        check_path(path)
    folder = Folder(tmp_path / "in")
    answers = await talk(folder, configs, offer(*path))
    folder.close()
    assert any(isinstance(answer, Failed) for answer in answers)
    assert there(tmp_path) == {"in"}


async def test_links_lead_nobody_out(
    tmp_path: Path, configs: tuple[ClientConfig, ServerConfig]
) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "out").symlink_to(tmp_path / "outside")
    (tmp_path / "in" / "file").symlink_to(tmp_path / "outside" / "file")
    folder = Folder(tmp_path / "in", overwrite=True)
    for path in (("out", "x"), ("file",)):
        answers = await talk(folder, configs, offer(*path))
        assert any(isinstance(answer, Failed) for answer in answers), answers
    made = Offer(n=0, path=("out", "f"), folder=True, size=0, mtime_ns=0, executable=False)
    assert any(isinstance(answer, Failed) for answer in await talk(folder, configs, made))
    folder.close()
    assert list((tmp_path / "outside").iterdir()) == []


async def test_a_wrong_digest_stores_nothing(
    tmp_path: Path, configs: tuple[ClientConfig, ServerConfig]
) -> None:
    folder = Folder(tmp_path / "in")
    data = header(DATA, 3) + b"abc"
    answers = await talk(
        folder, configs, offer("x"), Start(n=0, offset=0), data, End(n=0, sha256="0" * 64)
    )
    folder.close()
    failures = [answer.reason for answer in answers if isinstance(answer, Failed)]
    assert failures == ["x: what arrived is not what was sent"]
    assert there(tmp_path / "in") == set()


@pytest.mark.parametrize(
    "said",
    [
        [Start(n=0, offset=0)],
        [offer("x"), Start(n=0, offset=1)],
        [offer("x"), Start(n=0, offset=0), header(DATA, 4) + b"abcd"],
        [header(DATA, 4) + b"abcd"],
        [offer("x"), offer("x")],
        [Have(n=0, size=0, sha256="", complete=False, replace=False)],
        [b"\xff\0\0\0\0"],
        [header(2, 3) + b"{}]"],
        [header(2, 1 << 20)],
        [header(2, 100) + b"{"],
    ],
)
async def test_a_peer_out_of_its_mind_is_shown_out(
    tmp_path: Path, configs: tuple[ClientConfig, ServerConfig], said: list[Message | bytes]
) -> None:
    folder = Folder(tmp_path / "in")
    answers = await talk(folder, configs, *said)
    folder.close()
    assert False in answers
    assert there(tmp_path / "in") == set()


def test_messages_there_and_back() -> None:
    message = offer("ü", "\udcff")
    frame = encode(message)
    kind, length = split_header(frame[:5])
    assert length == len(frame) - 5
    assert decode(kind, frame[5:]) == message
    for body in (b"[]", b"{}", b'{"n":true,"offset":0}', b'{"n":0,"offset":-1}', b"[" * 9999):
        with pytest.raises(ProtocolError):
            decode(5, body)
