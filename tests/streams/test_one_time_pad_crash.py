"""Both ends of a session under a one-time pad are killed at random, and a ledger of all uses shows
that no byte of a key was ever used twice.

The keys are in key pools on disk, which is all that outlives a process.
"""

import hashlib
import os
import random
import shutil
import signal
import socket
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, NamedTuple, Self

import pytest
import trio

from hybridkex import (
    X25519,
    ClientConfig,
    DevCa,
    OneTimePad,
    Policy,
    QkdPskSource,
    Requirement,
    Secret,
    SecureStream,
    ServerConfig,
    TrustStore,
)
from hybridkex.crypto.one_time_pad import Pad
from hybridkex.qkd.pool import FilePool, PoolNames
from hybridkex.qkd.source import KeyPart, QkdKey
from hybridkex.qkd.store import write_key_file

CA = DevCa.create(algorithm="ed25519")
TRUST, IDENTITY = TrustStore((CA.certificate,)), CA.issue("localhost", algorithm="ed25519")
NAMES = {
    "alice": PoolNames(sae="alice", kme="kme-a", peer_sae="bob", peer_kme="kme-b"),
    "bob": PoolNames(sae="bob", kme="kme-b", peer_sae="alice", peer_kme="kme-a"),
}
KEYS = 2000
BYTES = 32


def made(master: PoolNames) -> list[QkdKey]:
    return [
        QkdKey(
            name=(KeyPart(master.kme, master.peer_kme, f"{master.sae}-{number}"),),
            master_sae=master.sae,
            slave_sae=master.peer_sae,
            key=Secret(os.urandom(BYTES)),
        )
        for number in range(KEYS)
    ]


@pytest.fixture(scope="module")
def pools(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the key pools of both ends, as they are before the first use."""
    folder = tmp_path_factory.mktemp("pools")
    keys = [*made(NAMES["alice"]), *made(NAMES["bob"])]

    async def fill() -> None:
        for who, names in NAMES.items():
            write_key_file(folder / f"{who}.key")
            pool = FilePool.open(folder / f"{who}.db", key_file=folder / f"{who}.key", names=names)
            async with pool:
                await pool.add(keys)

    trio.run(fill)
    return folder


@pytest.fixture
def folder(pools: Path, tmp_path: Path) -> Path:
    """Copies of the pools."""
    shutil.copytree(pools, tmp_path, dirs_exist_ok=True)
    return tmp_path


class Use(NamedTuple):
    """One piece of a key that a pad gave away."""

    who: str
    process: int
    pad: int
    key: str
    start: int
    size: int


def keep_a_ledger(path: Path, who: str) -> None:
    """Write a line before each byte of a pad is used, in this process."""
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    names: dict[int, tuple[str, int]] = {}
    extend, take = Pad.extend, Pad._take

    def extending(pad: Pad, key: Secret) -> None:
        extend(pad, key)
        names[id(pad._keys[-1])] = hashlib.sha256(key.reveal()).hexdigest()[:16], len(key)

    def taking(pad: Pad, size: int) -> bytes:
        missing = size
        for key in pad._keys:
            name, whole = names[id(key)]
            piece = min(missing, len(key))
            if piece:
                line = f"{who} {os.getpid()} {id(pad)} {name} {whole - len(key)} {piece}\n"
                os.write(file, line.encode())
            missing -= piece
        return take(pad, size)

    Pad.extend, Pad._take = extending, taking  # type: ignore[method-assign]


def process(main: Callable[[], Awaitable[None]], folder: Path, who: str) -> int:
    """A process of its own that runs ``main``; its id."""
    child = os.fork()
    if child:
        return child
    try:
        keep_a_ledger(folder / "ledger", who)
        trio.run(main)
    except BaseException:
        os._exit(1)
    os._exit(0)


def settings(pool: FilePool) -> dict[str, Any]:
    return {
        "groups": (X25519,),
        "psk_source": QkdPskSource(pool),
        "one_time_pad": OneTimePad(hold=256, deadline=5),
        "policy": Policy(post_quantum=Requirement.PREFER),
    }


def opened(folder: Path, who: str) -> FilePool:
    until = time.monotonic() + 5
    while True:
        try:
            return FilePool.open(folder / f"{who}.db", key_file=folder / f"{who}.key")
        except Exception:
            if time.monotonic() > until:
                raise
            time.sleep(0.02)


async def serve(listening: socket.socket, folder: Path) -> None:
    async with opened(folder, "bob") as pool:
        config = ServerConfig(identities=(IDENTITY,), **settings(pool))
        listener = trio.SocketListener(trio.socket.from_stdlib_socket(listening))
        while True:
            stream = SecureStream(await listener.accept(), config)
            try:
                async for data in stream:
                    await stream.send_all(data)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                pass
            finally:
                await trio.aclose_forcefully(stream)


async def talk(address: Any, folder: Path) -> None:
    async with opened(folder, "alice") as pool:
        config = ClientConfig(verifier=TRUST, **settings(pool))
        said = 0
        while True:
            try:
                tcp = await trio.open_tcp_stream(*address)
                stream = SecureStream(tcp, config, server_hostname="localhost")
                async with stream:
                    while True:
                        text = random.randbytes(random.randrange(1, 60))
                        await stream.send_all(text)
                        answer = b""
                        while len(answer) < len(text):
                            answer += await stream.receive_some()
                        assert answer == text
                        said += 1
                        await trio.sleep(0.01)  # a fast machine is not to use all keys up
                        if not random.randrange(20):
                            break
            except (OSError, trio.BrokenResourceError):
                await trio.sleep(0.01)


def read_ledger(path: Path) -> list[Use]:
    uses = []
    for line in path.read_text().splitlines():
        who, child, pad, key, start, size = line.split()
        uses.append(Use(who, int(child), int(pad), key, int(start), int(size)))
    return uses


class Ends:
    """Both ends, as processes that are killed and started again."""

    def __init__(self, folder: Path, seed: int) -> None:
        self._folder = folder
        self._rng = random.Random(seed)
        self._listening = socket.create_server(("127.0.0.1", 0))
        self._running: dict[str, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for who in list(self._running):
            self.kill(who)
        self._listening.close()

    def start(self) -> None:
        address, folder = self._listening.getsockname(), self._folder
        mains = {
            "alice": lambda: talk(address, folder),
            "bob": lambda: serve(self._listening, folder),
        }
        for who, main in mains.items():
            if who not in self._running:
                self._running[who] = process(main, folder, who)

    def kill(self, who: str) -> None:
        child = self._running.pop(who)
        os.kill(child, signal.SIGKILL)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL, f"{who} had ended before"

    def rounds(self, number: int) -> None:
        for one in range(number):
            self.start()
            before = uses_in(self._folder)
            time.sleep(self._rng.uniform(0.02, 0.2))
            if one % 2:  # a slow machine, too, comes to use its keys
                wait_for_uses(self._folder, before + 8)
            for who in self._rng.choice((["alice"], ["bob"], ["alice", "bob"])):
                self.kill(who)


def uses_in(folder: Path) -> int:
    """How many the ledger has."""
    ledger = folder / "ledger"
    return ledger.read_bytes().count(b"\n") if ledger.exists() else 0


def wait_for_uses(folder: Path, number: int) -> int:
    """Wait until the ledger has so many; returns how many it has."""
    until = time.monotonic() + 30
    while (found := uses_in(folder)) < number:
        assert time.monotonic() < until, f"{found} uses in 30 seconds"
        time.sleep(0.05)
    return found


def used_twice(uses: list[Use], who: str) -> int:
    """How many bytes of keys one end has used more than once."""
    pieces = sorted((use.key, use.start, use.start + use.size) for use in uses if use.who == who)
    again, used, key, end = 0, 0, "", 0
    for name, start, stop in pieces:
        if name != key:
            key, end = name, 0
        again += max(0, min(stop, end) - start)
        used += max(0, stop - max(start, end))
        end = max(end, stop)
    assert used > 100
    return again


def check(uses: list[Use]) -> None:
    for who in NAMES:
        assert not used_twice(uses, who)
    # One direction each: a key is in one pad at either end.
    pads = defaultdict[str, set[tuple[str, int, int]]](set)
    for use in uses:
        pads[use.key].add((use.who, use.process, use.pad))
    for found in pads.values():
        assert len(found) <= 2
        assert len({who for who, _, _ in found}) == len(found)


@pytest.mark.parametrize(
    ("rounds", "seed"), [(4, 1), pytest.param(25, 2, marks=pytest.mark.slow)], ids=["few", "many"]
)
def test_no_byte_of_a_key_is_used_twice(rounds: int, seed: int, folder: Path) -> None:
    with Ends(folder, seed) as ends:
        ends.rounds(rounds)
    uses = read_ledger(folder / "ledger")
    assert len({use.process for use in uses}) >= rounds / 2
    check(uses)


def test_a_key_pool_that_is_restored_from_a_copy(folder: Path) -> None:
    """What must never be done. Nothing notices before the first use: the control that shows that
    the ledger finds what is used twice."""
    copy = (folder / "bob.db").read_bytes()
    with Ends(folder, 3) as ends:
        for _ in range(20):  # at times the keys that are used again are not the same
            ends.start()
            wait_for_uses(folder, uses_in(folder) + 200)
            ends.kill("alice")
            ends.kill("bob")
            if used_twice(read_ledger(folder / "ledger"), "bob"):
                return
            for rest in folder.glob("bob.db*"):
                rest.unlink()
            (folder / "bob.db").write_bytes(copy)
    pytest.fail("no byte was used twice")
