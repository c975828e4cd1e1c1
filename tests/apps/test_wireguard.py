"""The pre-shared key of a WireGuard tunnel: rotation and its failures in memory, ``wg`` as a
script, and a real WireGuard."""

import base64
import logging
import os
import shutil
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import trio

from hybridkex import Requirement, Secret
from hybridkex.apps.wireguard import LABEL, RotationPolicy, Rotator, Tunnel
from hybridkex.apps.wireguard.tunnel import Uncertain
from hybridkex.combiner import ExchangeConfig, Exchanged, PskAuthentication
from hybridkex.errors import ConfigError, HybridkexError, LocalStateError, TruncationError

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

SHOW = """#!{python}
import sys
print("{other}\\t(none)")
print("{peer}\\t{psk}")
"""


@dataclass(frozen=True, kw_only=True)
class Device(Tunnel):
    """A WireGuard peer in memory."""

    installed: list[Secret | None] = field(default_factory=lambda: [None])
    faults: list[HybridkexError] = field(default_factory=list)

    @property
    def psk(self) -> Secret | None:
        return self.installed[-1]

    async def set_psk(self, psk: Secret) -> None:
        await trio.lowlevel.checkpoint()
        if self.faults:
            raise self.faults.pop(0)
        self.installed.append(psk)

    async def read_psk(self) -> Secret | None:
        await trio.lowlevel.checkpoint()
        return self.psk


class Ends(NamedTuple):
    """Both ends of one tunnel, and a network between them that can be cut."""

    near: Rotator
    far: Rotator
    here: Device
    there: Device
    nursery: trio.Nursery
    blocked: list[bool]
    answers: list[Any]
    overdue: list[Requirement]

    async def connect(self) -> trio.abc.Stream:
        if self.blocked[0]:
            raise LocalStateError("cannot connect to b: no answer")
        near, far = trio.testing.memory_stream_pair()

        async def respond() -> None:
            async with far:
                try:
                    self.answers.append(await self.far.respond(far))
                except HybridkexError as error:
                    self.answers.append(error)

        self.nursery.start_soon(respond)
        return near


def config(role: Any, local: str, peer: str) -> ExchangeConfig:
    return ExchangeConfig(role=role, local=local, peer=peer, authentication=PSK, label=LABEL)


def ends(nursery: trio.Nursery, **policy: Any) -> Ends:
    here, there = (Device(interface=f"wg{n}", peer_key=PEER) for n in range(2))
    overdue: list[Requirement] = []
    rules = RotationPolicy(**policy)
    near, far = (
        Rotator(device, config(*names), rules, on_overdue=overdue.append, clock=trio.current_time)
        for device, names in ((here, ("initiator", "a", "b")), (there, ("responder", "b", "a")))
    )
    return Ends(near, far, here, there, nursery, [False], [], overdue)


# --- the policy ----------------------------------------------------------------------------------


async def test_both_ends_get_the_same_fresh_key(autojump_clock: Any) -> None:
    async with trio.open_nursery() as nursery:
        pair = ends(nursery)
        seen = []
        for _ in range(3):
            await pair.near.initiate(pair.connect)
            assert pair.here.psk is not None
            assert pair.here.psk == pair.there.psk
            seen.append(pair.here.psk.reveal())
        assert len(set(seen)) == 3


@pytest.mark.parametrize("end", ["initiator", "responder"])
@pytest.mark.parametrize("requirement", [Requirement.REQUIRE, Requirement.PREFER])
@pytest.mark.parametrize("initial", [None, "random", "keep"])
@pytest.mark.parametrize("before", [None, b"configured".ljust(32)])
async def test_while_the_other_end_cannot_be_reached(
    end: str, requirement: Requirement, initial: Any, before: bytes | None,
    autojump_clock: Any, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """From the start, for an hour: what is installed, and what the log says of it."""
    caplog.set_level(logging.INFO)
    async with trio.open_nursery() as nursery:
        pair = ends(nursery, fresh_psk=requirement, initial=initial)
        pair.blocked[0] = True
        rotator, device = (pair.near, pair.here) if end == "initiator" else (pair.far, pair.there)
        device.installed[:] = [before if before is None else Secret(before)]
        await rotator.start()
        blocked = initial == "random" or (initial is None and requirement is Requirement.REQUIRE)
        assert (len(device.installed) == 2) == blocked
        async with trio.open_nursery() as running:
            running.start_soon(rotator.watch)
            if end == "initiator":
                running.start_soon(rotator.run_initiator, pair.connect)
            await trio.sleep(3600)
            running.cancel_scope.cancel()
        stopped = requirement is Requirement.REQUIRE and not blocked
        assert len(device.installed) == 1 + blocked + stopped
        assert len({psk.reveal() for psk in device.installed if psk}) == (
            (before is not None) + blocked + stopped
        )
        assert pair.overdue == ([] if blocked else [requirement])
        said = [record.message for record in caplog.records]
        assert ("is stopped" in " ".join(said)) == stopped
        if blocked or stopped:
            assert "a random pre-shared key blocks the tunnel" in said[-1]
        elif before is None:
            assert "the tunnel has NO pre-shared key" in said[-1]
        else:
            assert "configured before stays in force" in said[-1]
        assert (before is not None and not blocked) or not any("stays" in one for one in said)


async def test_an_agreed_key_that_grows_too_old(
    autojump_clock: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Both ends stop; once the network is back, so is the tunnel, by itself."""
    async with trio.open_nursery() as nursery:
        pair = ends(nursery, interval=100, max_age=250)
        for rotator in (pair.near, pair.far):
            await rotator.start()
            nursery.start_soon(rotator.watch)
        nursery.start_soon(pair.near.run_initiator, pair.connect)
        await trio.sleep(350)
        assert pair.overdue == []
        assert pair.here.psk == pair.there.psk
        agreed = pair.here.psk
        pair.blocked[0] = True
        await trio.sleep(190)
        assert pair.here.psk == pair.there.psk == agreed
        assert "agreed" in caplog.records[-1].message
        await trio.sleep(70)
        assert pair.overdue == [Requirement.REQUIRE] * 2
        assert pair.here.psk != pair.there.psk
        assert agreed not in (pair.here.psk, pair.there.psk)
        pair.blocked[0] = False
        await trio.sleep(150)
        assert pair.here.psk == pair.there.psk
        nursery.cancel_scope.cancel()


async def test_a_key_that_another_program_replaces_is_restored(
    autojump_clock: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """``wg-quick down`` and ``up``, for example: the peer has no key any more."""
    async with trio.open_nursery() as nursery:
        pair = ends(nursery)
        await pair.near.initiate(pair.connect)
        agreed = pair.here.psk
        nursery.start_soon(pair.near.watch)
        for replaced in (None, Secret(bytes(32))):
            pair.here.installed.append(replaced)
            await trio.sleep(11)
            assert pair.here.psk == agreed
        assert "replaced" in caplog.text
        nursery.cancel_scope.cancel()


# --- failures ------------------------------------------------------------------------------------


async def test_a_responder_that_cannot_install_the_key(autojump_clock: Any) -> None:
    async with trio.open_nursery() as nursery:
        pair = ends(nursery)
        pair.there.faults.append(LocalStateError("wg set failed: Operation not permitted"))
        with pytest.raises(TruncationError, match="did not confirm"):
            await pair.near.initiate(pair.connect)
        assert pair.here.psk is pair.there.psk is None
        await pair.near.initiate(pair.connect)
        assert pair.here.psk == pair.there.psk != None  # noqa: E711


async def test_an_initiator_that_cannot_install_the_key(autojump_clock: Any) -> None:
    async with trio.open_nursery() as nursery:
        pair = ends(nursery)
        pair.here.faults.append(Uncertain("wg set did not finish within 5 s"))
        with pytest.raises(LocalStateError):
            await pair.near.initiate(pair.connect)
        assert "not known" in pair.near.standing
        await trio.testing.wait_all_tasks_blocked()
        assert "agreed 0 s ago" in pair.far.standing


class Mute(trio.abc.Stream):
    """Breaks when the responder's confirmation is sent or awaited."""

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


async def test_a_connection_that_breaks_after_the_exchange(autojump_clock: Any) -> None:
    """The responder has the new key in force, and says so; the initiator does not have it."""
    async with trio.open_nursery() as nursery:
        pair = ends(nursery)
        near, far = trio.testing.memory_stream_pair()
        errors: list[HybridkexError] = []

        async def respond() -> None:
            with pytest.raises(TruncationError, match="may not have installed") as caught:
                await pair.far.respond(Mute(far))
            errors.append(caught.value)

        async def connect() -> trio.abc.Stream:
            return Mute(near)

        nursery.start_soon(respond)
        with pytest.raises(TruncationError, match="did not confirm"):
            await pair.near.initiate(connect)
        await trio.testing.wait_all_tasks_blocked()
        assert errors
        assert pair.there.psk is not None
        assert "agreed 0 s ago is in force" in pair.far.standing
        assert pair.here.psk is None
        assert "not known" in pair.near.standing


async def test_an_exchange_that_was_overtaken_installs_nothing(autojump_clock: Any) -> None:
    async with trio.open_nursery() as nursery:
        pair = ends(nursery)
        slow = trio.Event()

        class Slow(Mute):
            async def send_all(self, data: bytes) -> None:
                if len(data) < 100:
                    await slow.wait()
                await self.inner.send_all(data)

        async def connect() -> trio.abc.Stream:
            return Slow(await pair.connect())

        async def overtaken() -> None:
            with pytest.raises(TruncationError):
                await pair.near.initiate(connect)

        nursery.start_soon(overtaken)
        await trio.testing.wait_all_tasks_blocked()
        await pair.near.initiate(pair.connect)
        agreed = pair.there.psk
        slow.set()
        await trio.sleep(1)
        assert pair.here.psk == pair.there.psk == agreed
        assert any("a newer exchange" in str(one) for one in pair.answers)


def test_policies_that_cannot_work() -> None:
    for wrong in (
        {"interval": 0},
        {"interval": float("nan")},
        {"interval": float("inf")},
        {"max_age": 10},
        {"max_age": float("nan")},
        {"fresh_psk": Requirement.OFF},
        {"initial": "none"},
    ):
        with pytest.raises(ConfigError):
            RotationPolicy(**wrong)
    assert RotationPolicy(interval=7).age_limit == 21
    device = Device(interface="wg0", peer_key=PEER)
    long = ExchangeConfig(
        role="initiator", local="a", peer="b", authentication=PSK, label=LABEL, length=48
    )
    with pytest.raises(ConfigError, match="32 bytes"):
        Rotator(device, long)


# --- wg ------------------------------------------------------------------------------------------


def script(path: Path, text: str) -> tuple[str, ...]:
    path.write_text(text.format(python=sys.executable))
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return (str(path),)


async def test_a_wg_that_hangs_or_repeats_the_key(tmp_path: Path) -> None:
    psk = Secret(bytes(range(32)))
    echo = Tunnel(interface="wg0", peer_key=PEER, command=script(tmp_path / "echo", ECHO))
    with pytest.raises(LocalStateError, match="format: …") as caught:
        await echo.set_psk(psk)
    assert base64.b64encode(psk.reveal()).decode() not in str(caught.value)
    slow = Tunnel(
        interface="wg0", peer_key=PEER, command=script(tmp_path / "slow", SLOW), time_limit=0.2
    )
    with trio.fail_after(20), pytest.raises(Uncertain, match="did not finish within"):
        await slow.set_psk(psk)


async def test_reading_the_key(tmp_path: Path) -> None:
    psk = base64.b64encode(bytes(range(1, 33))).decode()
    other = base64.b64encode(bytes(32)).decode()

    def tunnel(name: str, peer: str, psk: str) -> Tunnel:
        text = SHOW.replace("{other}", other).replace("{peer}", peer).replace("{psk}", psk)
        return Tunnel(interface="wg0", peer_key=PEER, command=script(tmp_path / name, text))

    assert await tunnel("with", PEER, psk).read_psk() == Secret(bytes(range(1, 33)))
    assert await tunnel("without", PEER, "(none)").read_psk() is None
    with pytest.raises(LocalStateError, match="wg0 has no peer"):
        await tunnel("other", psk, psk).read_psk()
    nowhere = Tunnel(interface="wg0", peer_key=PEER, command=(str(tmp_path / "nothing"),))
    for call in (nowhere.read_psk(), nowhere.set_psk(Secret(bytes(32)))):
        with pytest.raises(LocalStateError, match="cannot run"):
            await call


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


# --- a real WireGuard ----------------------------------------------------------------------------


PROBE = """
import socket, sys
try:
    socket.create_connection((sys.argv[1], 9), 1.5)
except ConnectionRefusedError:
    sys.exit(0)
except OSError:
    sys.exit(1)
"""


class Site(NamedTuple):
    """One WireGuard device, in a network namespace of its own."""

    namespace: str
    device: str
    private: str
    public: str
    inner: str
    """The address in the tunnel."""

    @property
    def command(self) -> tuple[str, ...]:
        return ("ip", "netns", "exec", self.namespace, "wg")

    def run(self, *words: str, stdin: str = "") -> str:
        return run("ip", "netns", "exec", self.namespace, *words, stdin=stdin)

    def reaches(self, address: str) -> bool:
        """Whether a TCP connection through the tunnel is refused, rather than lost."""
        inside = ("ip", "netns", "exec", self.namespace, sys.executable, "-c", PROBE, address)
        return subprocess.run(inside, timeout=20, check=False).returncode == 0


def run(*words: str, stdin: str = "") -> str:
    done = subprocess.run(
        words, input=stdin, capture_output=True, text=True, timeout=10, check=True
    )
    return done.stdout.strip()


@pytest.fixture
def sites() -> Iterator[list[Site]]:
    """Two namespaces with a cable between them and a WireGuard tunnel over it."""
    needed = ("wg", "ip")
    if os.geteuid() != 0 or not all(map(shutil.which, needed)):
        pytest.skip(f"a real WireGuard needs root and {', '.join(needed)}")
    mark = os.getpid() % 10000
    names = [f"hkx{mark}{side}" for side in "ab"]
    processes: list[subprocess.Popen[bytes]] = []
    try:
        try:
            for name in names:
                run("ip", "netns", "add", name)
            run("ip", "link", "add", f"v{names[0]}", "type", "veth", "peer", f"v{names[1]}")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces here: {error.stderr.strip()}")
        found = []
        for number, name in enumerate(names, 1):
            private = run("wg", "genkey")
            public = run("wg", "pubkey", stdin=private)
            site = Site(name, f"w{name}", private, public, f"10.99.0.{number}")
            run("ip", "link", "set", f"v{name}", "netns", name)
            site.run("ip", "address", "add", f"192.0.2.{number}/24", "dev", f"v{name}")
            for link in (f"v{name}", "lo"):
                site.run("ip", "link", "set", link, "up")
            make_device(site, processes)
            site.run("ip", "address", "add", f"{site.inner}/24", "dev", site.device)
            site.run("ip", "link", "set", site.device, "up")
            found.append(site)
        for number, (site, other) in enumerate(zip(found, found[::-1], strict=True), 1):
            where = ("endpoint", f"192.0.2.{3 - number}:51820", "allowed-ips", f"{other.inner}/32")
            words = ("wg", "set", site.device, "listen-port", "51820", "private-key", "/dev/stdin")
            site.run(*words, "peer", other.public, *where, stdin=site.private)
        yield found
    finally:
        for process in processes:
            process.terminate()
            process.wait(timeout=10)
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


def make_device(site: Site, processes: "list[subprocess.Popen[bytes]]") -> None:
    inside = ("ip", "netns", "exec", site.namespace)
    kernel = subprocess.run(
        [*inside, "ip", "link", "add", site.device, "type", "wireguard"],
        capture_output=True,
        check=False,
    )
    if kernel.returncode == 0:
        return
    user_space = shutil.which("wireguard-go")
    if user_space is None:
        pytest.skip("no WireGuard in this kernel, and no wireguard-go")
    process = subprocess.Popen(
        [*inside, user_space, "--foreground", site.device],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    processes.append(process)
    control = Path(f"/var/run/wireguard/{site.device}.sock")
    for _ in range(100):
        if control.exists() or process.poll() is not None:
            break
        trio.run(trio.sleep, 0.05)
    if not control.exists():
        pytest.skip("wireguard-go does not start here (it needs /dev/net/tun)")


@pytest.mark.slow
async def test_a_real_tunnel_carries_traffic_only_under_an_agreed_key(sites: list[Site]) -> None:
    """Blocked before the first rotation, open after it, and blocked for new handshakes again when
    the key is too old."""
    now = [0.0]
    near, far = (
        Rotator(
            Tunnel(interface=site.device, peer_key=other.public, command=site.command),
            config(*names),
            RotationPolicy(interval=1, max_age=1),
            clock=lambda: now[0],
        )
        for site, other, names in (
            (sites[0], sites[1], ("initiator", "a", "b")),
            (sites[1], sites[0], ("responder", "b", "a")),
        )
    )
    for rotator in (near, far):
        await rotator.start()
    assert not sites[0].reaches(sites[1].inner)

    result = await rotate_once(near, far)
    expected = base64.b64encode(result.key.reveal()).decode()
    for site, other in zip(sites, sites[::-1], strict=True):
        shown = site.run("wg", "show", site.device, "preshared-keys").split()
        assert shown == [other.public, expected]
    await until_reached(sites)

    now[0] = 2.0
    async with trio.open_nursery() as nursery:
        nursery.start_soon(near.watch)
        nursery.start_soon(far.watch)
        with trio.fail_after(10):
            while "random" not in near.standing or "random" not in far.standing:  # noqa: ASYNC110
                await trio.sleep(0.05)
        nursery.cancel_scope.cancel()
    start_again(sites)  # the session of before lives for up to REJECT_AFTER seconds
    assert not sites[0].reaches(sites[1].inner)

    await rotate_once(near, far)
    await until_reached(sites)


async def rotate_once(near: Rotator, far: Rotator) -> Exchanged:
    sockets = map(trio.socket.from_stdlib_socket, socket.socketpair())
    ours, theirs = map(trio.SocketStream, sockets)

    async def connect() -> trio.abc.Stream:
        return ours

    async with theirs, trio.open_nursery() as nursery:
        nursery.start_soon(far.respond, theirs)
        return await near.initiate(connect)


def start_again(sites: list[Site]) -> None:
    """Another private key ends the sessions, and the 5 s in which no handshake follows another."""
    for site in sites:
        for key in (run("wg", "genkey"), site.private):
            site.run("wg", "set", site.device, "private-key", "/dev/stdin", stdin=key)


async def until_reached(sites: list[Site]) -> None:
    start_again(sites)
    with trio.fail_after(30):
        while not sites[0].reaches(sites[1].inner):  # noqa: ASYNC110
            await trio.sleep(0.1)
