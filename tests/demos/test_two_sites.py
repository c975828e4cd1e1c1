"""The demonstration of two sites: it passes only if every record was searched, and fails when the
cipher is taken out."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio

from hybridkex.auth import DevCa, TrustStore
from hybridkex.crypto.suites import TLS_AES_128_GCM_SHA256
from hybridkex.demos.rndl import trial
from hybridkex.demos.rndl.now.tap import wire_tap
from hybridkex.demos.two_sites import Demonstration, overheard, show
from hybridkex.demos.two_sites.marked import MARKER_BYTES, mark, unmark
from hybridkex.demos.two_sites.overheard import overhear
from hybridkex.demos.two_sites.processes import (
    DemonstrationFailed,
    contents,
    finished,
    lines,
    running,
)
from hybridkex.errors import RecordingError
from hybridkex.streams import SecureStream, open_secure_tcp_stream, serve_secure_tcp
from hybridkex.tls.config import ClientConfig, ServerConfig

ROOT = Path(__file__).parents[2]
MARKER = bytes(range(0xE0, 0xF0))
SIZES = (0, 1, 6, 1007, 1008, 1009, 1008 * 64 - 1, 1008 * 64, 1008 * 64 + 1, 200_000)


@pytest.mark.parametrize("size", SIZES)
def test_markers_go_in_and_out(size: int, tmp_path: Path) -> None:
    source, marked, back = (tmp_path / name for name in ("source", "marked", "back"))
    source.write_bytes(os.urandom(size))
    written = mark(source, marked, MARKER)
    data = marked.read_bytes()
    assert len(data) == written == size + MARKER_BYTES * (1 + -(-size // 1008))
    unmark(marked, back, MARKER)
    assert back.read_bytes() == source.read_bytes()
    # Whatever the records' limits are, one as long as a block and a marker has a whole marker.
    window = 1024 + MARKER_BYTES
    for start in range(0, len(data), 997):
        piece = data[start : start + window]
        assert MARKER in piece or len(piece) < window
    for broken in (data[:-1], data + b"x", data[1:], b"x" + data[1:], b""):
        marked.write_bytes(broken)
        with pytest.raises(RecordingError):
            unmark(marked, back, MARKER)


class NoCipher:
    """An AEAD that leaves its input as it is, with a tag of zeros."""

    def __init__(self, key: bytes) -> None:
        pass

    def encrypt(self, nonce: Any, data: Any, associated_data: Any) -> bytes:
        out = bytearray(len(memoryview(data)) + 16)
        self.encrypt_into(nonce, data, associated_data, memoryview(out))
        return bytes(out)

    def decrypt(self, nonce: Any, data: Any, associated_data: Any) -> bytes:
        out = bytearray(len(memoryview(data)) - 16)
        self.decrypt_into(nonce, data, associated_data, memoryview(out))
        return bytes(out)

    def encrypt_into(self, nonce: Any, data: Any, associated_data: Any, buf: Any) -> int:
        size = len(memoryview(data))
        buf[:size] = bytes(data)
        buf[size : size + 16] = bytes(16)
        return size + 16

    def decrypt_into(self, nonce: Any, data: Any, associated_data: Any, buf: Any) -> int:
        size = len(memoryview(data)) - 16
        buf[:size] = bytes(memoryview(data)[:size])
        return size


async def send(sent: Path, capture: Path, aead: Callable[[bytes], Any] | None = None) -> None:
    """Send a file over a channel that is tapped."""
    content = sent.read_bytes()  # noqa: ASYNC240
    suite = TLS_AES_128_GCM_SHA256
    suites = (replace(suite, aead=aead) if aead is not None else suite,)
    ca = DevCa.create()
    server = ServerConfig(identities=(ca.issue("localhost"),), suites=suites)
    client = ClientConfig(verifier=TrustStore((ca.certificate,)), suites=suites)
    arrived = bytearray()

    async def receive(stream: SecureStream[trio.SocketStream]) -> None:
        async with stream:
            while data := await stream.receive_some():
                arrived.extend(data)

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(
            partial(serve_secure_tcp, receive, 0, server, host="127.0.0.1")
        )
        where = listeners[0].transport_listener.socket.getsockname()
        async with wire_tap(capture, where) as (host, port):
            stream = await open_secure_tcp_stream(host, port, client, server_hostname="localhost")
            async with stream:
                await stream.send_all(content)
                await stream.send_eof()
                await stream.receive_some()
        nursery.cancel_scope.cancel()
    assert arrived == content


@pytest.fixture(params=[0, 6, 40, 5000, 100_000])
def sent(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    source, marked = tmp_path / "source", tmp_path / "sent"
    source.write_bytes((b"all work and no play. " * 5000)[: request.param])
    mark(source, marked, MARKER)
    return marked


async def test_every_record_is_searched(sent: Path, tmp_path: Path) -> None:
    capture = tmp_path / "eve.pcapng"
    await send(sent, capture)
    found = overhear(capture, sent, MARKER)
    assert found.size > MARKER_BYTES
    assert found.records >= 7
    assert found.needles >= 1


async def test_without_the_cipher_it_fails(sent: Path, tmp_path: Path) -> None:
    capture = tmp_path / "eve.pcapng"
    await send(sent, capture, NoCipher)
    with pytest.raises(RecordingError, match=r"record .* shows what was sent"):
        overhear(capture, sent, MARKER)


async def test_a_single_record_in_the_clear_is_found(tmp_path: Path) -> None:
    """The cipher fails once, in the last record of data."""
    source, sent, capture = (tmp_path / name for name in ("source", "sent", "eve.pcapng"))
    source.write_bytes(os.urandom(100_000))
    mark(source, sent, MARKER)

    class Failing(NoCipher):
        def __init__(self, key: bytes) -> None:
            self._good = TLS_AES_128_GCM_SHA256.aead(key)

        def encrypt_into(self, nonce: Any, data: Any, associated_data: Any, buf: Any) -> int:
            if 1000 < len(memoryview(data)) < 16_000 and MARKER in bytes(data):
                return super().encrypt_into(nonce, data, associated_data, buf)
            return self._good.encrypt_into(nonce, data, associated_data, buf)

        def decrypt_into(self, nonce: Any, data: Any, associated_data: Any, buf: Any) -> int:
            if bytes(memoryview(data)[-16:]) == bytes(16):
                return super().decrypt_into(nonce, data, associated_data, buf)
            return self._good.decrypt_into(nonce, data, associated_data, buf)

    await send(sent, capture, Failing)
    with pytest.raises(RecordingError, match=r"record .* shows what was sent"):
        overhear(capture, sent, MARKER)


async def test_it_does_not_pass_without_having_searched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A recording of something else, none, half of one, and a search that finds nothing."""
    small, large = tmp_path / "small", tmp_path / "large"
    for path, size in ((small, 10), (large, 50_000)):
        source = tmp_path / "source"
        source.write_bytes(os.urandom(size))
        mark(source, path, MARKER)
    capture = tmp_path / "eve.pcapng"
    await send(small, capture)
    overhear(capture, small, MARKER)
    with pytest.raises(RecordingError, match="is incomplete"):
        overhear(capture, large, MARKER)
    with pytest.raises(RecordingError, match="cannot find the marker"):
        overhear(capture, small, bytes(16))
    with monkeypatch.context() as patched:
        patched.setattr(overheard, "_search", lambda needles, haystack: False)
        with pytest.raises(RecordingError, match="cannot find the marker"):
            overhear(capture, small, MARKER)
    whole = capture.read_bytes()
    for cut in (0, 100, len(whole) // 4):
        capture.write_bytes(whole[:cut])
        with pytest.raises(RecordingError):
            overhear(capture, small, MARKER)
    await send(large, capture)
    whole = capture.read_bytes()
    capture.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RecordingError):
        overhear(capture, large, MARKER)


WITHOUT_CIPHER = """

class _NoCipher:
    def __init__(self, key):
        pass

    def encrypt(self, nonce, data, associated_data):
        return bytes(data) + bytes(16)

    def decrypt(self, nonce, data, associated_data):
        return bytes(data)[:-16]

    def encrypt_into(self, nonce, data, associated_data, buf):
        size = len(memoryview(data))
        buf[:size] = bytes(data)
        buf[size : size + 16] = bytes(16)
        return size + 16

    def decrypt_into(self, nonce, data, associated_data, buf):
        size = len(memoryview(data)) - 16
        buf[:size] = bytes(memoryview(data)[:size])
        return size


for _suite in ALL_SUITES:
    object.__setattr__(_suite, "aead", _NoCipher)
"""


@pytest.mark.slow
def test_the_command_fails_without_the_cipher(tmp_path: Path) -> None:
    """The whole command, in a copy of the package that encrypts no record."""
    shutil.copytree(ROOT / "hybridkex", tmp_path / "hybridkex")
    with (tmp_path / "hybridkex/crypto/suites.py").open("a", encoding="utf-8") as module:
        module.write(WITHOUT_CIPHER)
    (tmp_path / "small.txt").write_text("hello\n")
    done = subprocess.run(
        [sys.executable, "-m", "hybridkex", "demo", "small.txt"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path), "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 1, done.stdout
    assert "of Eve's recording shows what was sent" in done.stderr
    assert not list(tmp_path.glob("hybridkex-demo-*"))


DEAD = "kill -9 $$"
ENDINGS = (
    (DEAD, "ended without a message, exit status -9; check the limits of the shell"),
    ("echo an aside >&2; " + DEAD, "an aside"),
    ("echo hybridkex: no room >&2; exit 1", "no room"),
    ("exit 3", "ended without a message, exit status 3;"),
)
each_ending = pytest.mark.parametrize(("script", "said"), ENDINGS)


def program(tmp_path: Path, **scripts: str) -> tuple[str, ...]:
    """A program with a script for each command of ``hybridkex``."""
    path = tmp_path / "program"
    cases = "".join(f"{name}) shift; {script};;\n" for name, script in scripts.items())
    path.write_text(f'#!/bin/sh\nshift; shift\ncase "$1" in\n{cases}esac\n')
    path.chmod(0o700)
    return str(path), "-m", "hybridkex"


def demonstration(tmp_path: Path) -> Demonstration:
    return Demonstration(
        folder=tmp_path,
        source=Path(__file__),
        capture=tmp_path / "eve.pcapng",
        distance=1,
        print_line=lambda _: None,
    )


@each_ending
async def test_a_program_that_dies_is_named(script: str, said: str, tmp_path: Path) -> None:
    command = ["sh", "-c", script, "name"]
    for wait in (
        lambda process: anext(lines(process)),
        lambda process: contents(trio.Path(tmp_path / "none"), process),
    ):
        with pytest.RaisesGroup(pytest.RaisesExc(DemonstrationFailed, match=said)):
            async with running(command) as process:
                await wait(process)
    async with running(["sh", "-c", "exit 0"]) as process:
        assert not (await finished(process)).returncode


@each_ending
@pytest.mark.parametrize("lines_before", [0, 1, 3])
async def test_the_kmes_die(
    script: str, said: str, lines_before: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They die before they have told the port, or when the first page of metrics is due."""
    told = "echo at http://127.0.0.1:1/metrics;" * lines_before
    monkeypatch.setattr(show, "_COMMAND", program(tmp_path, kme=told + script))
    with pytest.RaisesGroup(
        pytest.RaisesExc(DemonstrationFailed, match=said), flatten_subgroups=True
    ):
        await demonstration(tmp_path).run()


@pytest.mark.parametrize(
    ("listen", "connect", "said"),
    [
        (DEAD, "exit 0", "hybridkex listen ended without a message, exit status -9"),
        (DEAD, "echo hybridkex: cut off >&2; exit 1", "hybridkex listen ended without a message"),
        ("exit 0", DEAD, "hybridkex connect ended without a message, exit status -9"),
        ("echo hybridkex: cut off >&2; exit 1", DEAD, "hybridkex connect ended without a message"),
        ("echo an aside >&2; exit 0", "echo hybridkex: no key >&2; exit 1", "^no key$"),
        ("echo hybridkex: no key >&2; exit 1", "echo hybridkex: no >&2; exit 0", "^no key$"),
    ],
)
async def test_a_party_dies(
    listen: str, connect: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = tmp_path / "port"
    listen = f"echo 1 > {port}.new; mv {port}.new {port}; {listen}"  # whole, as ours writes it
    monkeypatch.setattr(show, "_COMMAND", program(tmp_path, listen=listen, connect=connect))
    (tmp_path / "sent").write_bytes(b"x")
    with pytest.RaisesGroup(
        pytest.RaisesExc(DemonstrationFailed, match=said),
        flatten_subgroups=True,
        allow_unwrapped=True,
    ):
        await demonstration(tmp_path)._run_programs({"alice": "a", "bob": "b"}, tmp_path / "got")


@pytest.mark.parametrize(
    ("script", "said"),
    [
        (DEAD, "exit status -9: it said nothing"),
        ("echo Traceback >&2; echo MemoryError >&2; exit 1", "exit status 1: MemoryError"),
        ("printf '{'; " + DEAD, "exit status -9: it said nothing"),
    ],
)
async def test_an_adversary_dies(
    script: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "program"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o700)
    monkeypatch.setattr(trial, "sys", SimpleNamespace(executable=str(path)))
    with pytest.raises(RecordingError, match=f"^an adversary failed, {said}$"):
        await trial._run_adversaries([tmp_path], print)
