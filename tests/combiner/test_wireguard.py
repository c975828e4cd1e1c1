"""The pre-shared key of a WireGuard tunnel: with a wg that only records, and with a real one."""

import base64
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import trio

from hybridkex import Secret
from hybridkex.combiner import PskAuthentication
from hybridkex.combiner.wireguard import Tunnel, rotate
from hybridkex.errors import ConfigError, LocalStateError, TruncationError

PEER = base64.b64encode(bytes(range(32))).decode()
PSK = PskAuthentication(Secret(bytes(range(32))))

SLOW = """#!{python}
import time
time.sleep(60)
"""

ECHO = """#!{python}
import sys
sys.exit("Key is not the correct length or format: " + sys.stdin.read())
"""

FAKE = """#!{python}
import sys
with open({log!r}, "a") as log:
    print(*sys.argv[1:], sys.stdin.readline().strip(), file=log)
sys.exit({status})
"""


def fake_wg(folder: Path, status: int = 0) -> tuple[str, Path]:
    """A command that notes its arguments and what came through standard input."""
    folder.mkdir()
    command, log = folder / "wg", folder / "log"
    command.write_text(FAKE.format(python=sys.executable, log=str(log), status=status))
    command.chmod(command.stat().st_mode | stat.S_IXUSR)
    return str(command), log


async def once(near: Tunnel, far: Tunnel, **options: Any) -> list[Any]:
    ends = trio.testing.memory_stream_pair()
    results: dict[str, Any] = {}

    async def side(role: Any, stream: Any, tunnel: Tunnel, local: str, peer: str) -> None:
        try:
            results[role] = await rotate(
                stream, tunnel, role=role, local=local, peer=peer, authentication=PSK, **options
            )
        except (LocalStateError, TruncationError) as error:
            results[role] = error
            await stream.aclose()

    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(side, "initiator", ends[0], near, "a", "b")
            nursery.start_soon(side, "responder", ends[1], far, "b", "a")
    return [results["initiator"], results["responder"]]


async def test_both_ends_get_the_same_key(tmp_path: Path) -> None:
    commands = [fake_wg(tmp_path / name) for name in "ab"]
    near, far = (
        Tunnel(interface="wg0", peer_key=PEER, command=(command,)) for command, _ in commands
    )
    first, _ = await once(near, far)
    second, _ = await once(near, far)
    logs = [log.read_text().splitlines() for _, log in commands]
    assert logs[0] == logs[1]
    keys = [base64.b64encode(one.key.reveal()).decode() for one in (first, second)]
    assert keys[0] != keys[1]
    assert logs[0] == [f"set wg0 peer {PEER} preshared-key /dev/stdin {key}" for key in keys]


async def test_a_responder_that_cannot_install_it(tmp_path: Path) -> None:
    (good, log), (bad, _) = fake_wg(tmp_path / "good"), fake_wg(tmp_path / "bad", status=1)
    near = Tunnel(interface="wg0", peer_key=PEER, command=(good,))
    far = Tunnel(interface="wg0", peer_key=PEER, command=(bad,))
    results = await once(near, far)
    assert [type(one) for one in results] == [TruncationError, LocalStateError]
    assert not log.exists(), "the initiator must keep the old key, too"
    nowhere = Tunnel(interface="wg0", peer_key=PEER, command=(str(tmp_path / "nothing"),))
    with pytest.raises(LocalStateError, match="cannot run"):
        await nowhere.set_psk(Secret(bytes(32)))


def script(path: Path, text: str) -> tuple[str, ...]:
    path.write_text(text.format(python=sys.executable))
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return (str(path),)


async def test_a_wg_that_hangs_or_repeats_the_key(tmp_path: Path) -> None:
    psk = Secret(bytes(range(32)))
    echo = Tunnel(interface="wg0", peer_key=PEER, command=script(tmp_path / "echo", ECHO))
    with pytest.raises(LocalStateError, match=r"format: \(the key\)") as caught:
        await echo.set_psk(psk)
    assert base64.b64encode(psk.reveal()).decode() not in str(caught.value)
    slow = Tunnel(
        interface="wg0", peer_key=PEER, command=script(tmp_path / "slow", SLOW), time_limit=0.2
    )
    with trio.fail_after(20), pytest.raises(LocalStateError, match="did not end within"):
        await slow.set_psk(psk)


async def test_a_peer_that_vanishes_after_the_exchange(tmp_path: Path) -> None:
    """A reset between the confirmation and the responder's word is a typed error on either side."""

    class Vanishing(trio.abc.Stream):
        def __init__(self, inner: trio.abc.Stream) -> None:
            self.inner = inner

        async def send_all(self, data: bytes) -> None:
            if len(data) == 1:
                raise trio.BrokenResourceError
            await self.inner.send_all(data)

        async def receive_some(self, max_bytes: int | None = None) -> bytes:
            if max_bytes == 1:
                raise trio.BrokenResourceError
            return await self.inner.receive_some(max_bytes)

        async def wait_send_all_might_not_block(self) -> None:
            await self.inner.wait_send_all_might_not_block()

        async def aclose(self) -> None:
            await self.inner.aclose()

    command, _ = fake_wg(tmp_path / "a")
    tunnel = Tunnel(interface="wg0", peer_key=PEER, command=(command,))
    ends = trio.testing.memory_stream_pair()
    failed = []

    async def side(role: Any, stream: Any, local: str, peer: str) -> None:
        with pytest.raises(TruncationError):
            await rotate(
                Vanishing(stream), tunnel, role=role, local=local, peer=peer,
                authentication=PSK,
            )  # fmt: skip
        failed.append(role)

    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(side, "initiator", ends[0], "a", "b")
            nursery.start_soon(side, "responder", ends[1], "b", "a")
    assert set(failed) == {"initiator", "responder"}


def test_what_is_no_tunnel() -> None:
    for wrong in (
        {"peer_key": "AAAA"},
        {"peer_key": "%"},
        {"interface": "-x"},
        {"command": ()},
        {"time_limit": 0},
    ):
        with pytest.raises(ConfigError):
            Tunnel(**{"interface": "wg0", "peer_key": PEER, **wrong})


def wg(*arguments: str, stdin: str = "") -> str:
    done = subprocess.run(
        arguments, input=stdin, capture_output=True, text=True, timeout=10, check=True
    )
    return done.stdout.strip()


@pytest.fixture
def interfaces() -> Any:
    """Two WireGuard devices, of the kernel or of wireguard-go, that know each other's keys."""
    if os.geteuid() != 0 or not shutil.which("wg") or not shutil.which("ip"):
        pytest.skip("a real WireGuard needs root, wg (wireguard-tools) and ip (iproute2)")
    names = [f"hkx{os.getpid() % 100000}{side}" for side in "ab"]
    made, processes = [], []
    try:
        for name in names:
            kernel = subprocess.run(
                ["ip", "link", "add", name, "type", "wireguard"], capture_output=True, check=False
            )
            if kernel.returncode:
                user_space = shutil.which("wireguard-go")
                if user_space is None:
                    reason = kernel.stderr.decode().strip()
                    pytest.skip(f"no WireGuard in this kernel ({reason}), and no wireguard-go")
                process = subprocess.Popen(
                    [user_space, "--foreground", name],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                )
                processes.append(process)
                socket = Path(f"/var/run/wireguard/{name}.sock")
                for _ in range(100):
                    if socket.exists() or process.poll() is not None:
                        break
                    trio.run(trio.sleep, 0.05)
                if not socket.exists():
                    pytest.skip("wireguard-go does not start here (it needs /dev/net/tun)")
            made.append(name)
        private = [wg("wg", "genkey") for _ in names]
        public = [wg("wg", "pubkey", stdin=key) for key in private]
        for name, key, other in zip(names, private, public[::-1], strict=True):
            wg("wg", "set", name, "private-key", "/dev/stdin", "peer", other, stdin=key)
        yield names, public
    finally:
        for name in made:
            subprocess.run(["ip", "link", "delete", name], capture_output=True, check=False)
        for process in processes:
            process.terminate()
            process.wait(timeout=10)


async def test_a_real_wireguard(interfaces: Any) -> None:
    names, public = interfaces
    near, far = (
        Tunnel(interface=name, peer_key=key) for name, key in zip(names, public[::-1], strict=True)
    )
    seen = set()
    for _ in range(2):
        first, _ = await once(near, far)
        expected = base64.b64encode(first.key.reveal()).decode()
        for name, key in zip(names, public[::-1], strict=True):
            assert wg("wg", "show", name, "preshared-keys").split() == [key, expected]
        seen.add(expected)
    assert len(seen) == 2
