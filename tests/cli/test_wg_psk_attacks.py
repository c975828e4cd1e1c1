"""The port of a ``wg-psk`` responder under attack: replays, changed, cut and reordered messages,
floods of connections. No key changes, and a good initiator rotates all the while."""

import contextlib
import random
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from forked import Forkserver, Running
from waiting import until

from hybridkex.qkd.store import write_key_file

RANDOM = random.Random(6)
PEER_KEY = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="
WG = """#!/bin/sh
if [ "$1" = show ]; then
    printf '%s\\t%s\\n' {key} "$(cat {file} 2>/dev/null || echo '(none)')"
    exit
fi
read -r psk
echo "$psk" > {file}
"""


class Site:
    """A responder, and whoever connects to it."""

    def __init__(self, folder: Path, hybridkex: Forkserver) -> None:
        self._folder = folder
        self._hybridkex = hybridkex
        write_key_file(folder / "psk")
        for name in "ab":
            command = folder / f"wg-{name}"
            command.write_text(WG.format(key=PEER_KEY, file=folder / f"key-{name}"))
            command.chmod(0o755)
        listen = ("--listen", "127.0.0.1:0", "--port-file", "port")
        self.responder: Running = hybridkex.start(*self._words("b", "a"), *listen, folder=folder)
        until((folder / "port").exists, self.responder)
        self.port = int((folder / "port").read_text())

    def _words(self, us: str, them: str) -> tuple[str, ...]:
        return ("wg-psk", "--interface", "wg0", "--peer-key", PEER_KEY, "--psk-file", "psk",
                "--local", us, "--peer", them, "--wg", f"./wg-{us}")  # fmt: skip

    def key(self, of: str) -> str:
        return (self._folder / f"key-{of}").read_text()

    def rotate(self, port: int | None = None) -> None:
        """A good initiator, once."""
        words = ("--connect", f"127.0.0.1:{port or self.port}", "--once", "--log-level", "error")
        before = self.key("b") if (self._folder / "key-b").exists() else ""
        done = self._hybridkex.run(*self._words("a", "b"), *words, folder=self._folder)
        assert done.returncode == 0, done.stderr
        assert self.key("a") == self.key("b") != before

    def captured(self) -> bytes:
        """What an initiator sends in a rotation."""
        found = bytearray()

        def carry() -> None:
            near, _ = listening.accept()
            with near, socket.create_connection(("127.0.0.1", self.port)) as far:
                back = threading.Thread(target=copy, args=(far, near))
                back.start()
                while data := near.recv(1 << 16):
                    found.extend(data)
                    far.sendall(data)
                far.shutdown(socket.SHUT_WR)
                back.join()

        with socket.create_server(("127.0.0.1", 0)) as listening:
            tap = threading.Thread(target=carry)
            tap.start()
            self.rotate(listening.getsockname()[1])
            tap.join()
        return bytes(found)

    def attack(self, data: bytes, *, step: int = 1 << 20, end: str = "close") -> None:
        with contextlib.suppress(OSError), self.connection() as peer:
            for start in range(0, len(data), step):
                peer.sendall(data[start : start + step])
            if end == "half":
                peer.shutdown(socket.SHUT_WR)
            if end == "reset":
                peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            peer.recv(1 << 16)

    def connection(self) -> socket.socket:
        peer = socket.create_connection(("127.0.0.1", self.port))
        peer.settimeout(0.05)
        return peer


def copy(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)


@pytest.fixture
def site(tmp_path: Path, hybridkex: Forkserver) -> Iterator[Site]:
    found = Site(tmp_path, hybridkex)
    yield found
    assert found.responder.poll() is None
    told = found.responder.told()
    assert b"Traceback" not in told
    assert b"internal error" not in told
    found.responder.kill()


def variants(sent: bytes) -> Iterator[tuple[bytes, int, str]]:
    first = int.from_bytes(sent[:4], "big") + 4
    ends = ("close", "half", "reset")
    for end in ends:
        yield sent, 1 << 20, end
        yield sent[:first], 1 << 20, end
        yield sent[:first], 1, end
    yield sent[first:] + sent[:first], 1 << 20, "close"
    yield sent[:first] * 3, 1 << 20, "close"
    yield b"\xff" * 64, 1 << 20, "half"
    for _ in range(12):
        yield sent[: RANDOM.randrange(len(sent))], RANDOM.choice((7, 1 << 20)), RANDOM.choice(ends)
        changed = bytearray(sent)
        changed[RANDOM.randrange(len(sent))] ^= 1 << RANDOM.randrange(8)
        yield bytes(changed), 1 << 20, "close"


def test_messages_of_others_install_no_key(site: Site) -> None:
    sent = site.captured()
    installed = site.key("b")
    for data, step, end in variants(sent):
        site.attack(data, step=step, end=end)
        assert site.key("b") == installed
    site.rotate()


@pytest.mark.parametrize("offers", [False, True], ids=["idle", "with an offer each"])
def test_a_flood_stops_no_rotation(site: Site, offers: bool) -> None:
    sent = site.captured() if offers else b""
    with contextlib.ExitStack() as stack:
        for _ in range(200):
            peer = stack.enter_context(site.connection())
            with contextlib.suppress(OSError):
                peer.sendall(sent[: int.from_bytes(sent[:4], "big") + 4] if sent else b"")
        site.rotate()
