"""SIGHUP with whatever may have become of the file, of what it names, and of the sockets.

A reload that cannot be done leaves everything as it was: the connections, the sockets, the
configuration.
"""

import json
import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
from apps_glue import Run
from spoiled import changed, spoiled
from tunnel_glue import Tunnel, echo, exchange, serving
from waiting import trio_until


@pytest.fixture
def tunnel(run: Run, tmp_path: Path, keys: Path) -> Tunnel:
    return Tunnel(run, tmp_path, keys)


def broken_files(good: str, folder: Path) -> list[str]:
    """200 files that cannot be used."""
    found = spoiled(
        good,
        folder,
        files=("ca", "cert", "key"),
        harmless=("name", "server_name", "require_client_cert"),
    )
    lines = good.splitlines()
    for number, line in enumerate(lines):
        name = line.partition(" = ")[0]
        if name in ("local", "target", "remote", "port_file"):
            for value in ("unix:" + "x" * 200, "unix:a\0b", "unix:folder", "a\0b:1", "a:65536"):
                if name in ("local", "port_file") or "65536" in value or ":1" in value:
                    text = value if name != "port_file" else f"folder/{value}/x"
                    found.append(changed(lines, number, json.dumps(text)))
    return found


async def works(tunnel: Tunnel, living: trio.SocketStream) -> None:
    """Both an old and a new connection."""
    with trio.fail_after(30):
        await living.send_all(b"x")
        assert await living.receive_some() == b"x"
        async with await tunnel.connect() as stream:
            assert await exchange(stream, b"hello") == b"hello"


@pytest.mark.slow
async def test_files_that_cannot_be_used_change_nothing(tunnel: Tunnel) -> None:
    async with serving(echo) as target:
        tunnel.write(
            target,
            listen={"socket-mode": "600"},
            connect={"max-connections": 50, "idle-timeout": 600},
        )
        await tunnel.start()
        await trio_until(lambda: tunnel.says("out: listening on 127.0.0.1"))
        living = await tunnel.connect()
        await works(tunnel, living)
        descriptors = tunnel.descriptors()
        good = tunnel.file.read_text()
        broken = broken_files(good, tunnel.folder)
        assert len(broken) >= 200
        (tunnel.folder / "port").unlink()
        for number, text in enumerate(broken):
            tunnel.file.write_text(text, encoding="utf-8", errors="surrogatepass")
            known = len(tunnel.log.read_text())
            await tunnel.reload("reloaded")
            said = tunnel.log.read_text()[known:]
            difference = set(text.splitlines()) - set(good.splitlines())
            assert "not reloaded, the old configuration stays" in said, (difference, said)
            assert "Traceback" not in said, said
            assert "Error(" not in said, said
            if number % 10 == 0:
                await works(tunnel, living)
        assert not (tunnel.folder / "port").exists()
        assert stat.S_IMODE(tunnel.middle.stat().st_mode) == 0o600
        await trio_until(lambda: tunnel.descriptors() <= descriptors)
        tunnel.file.write_text(good)
        await tunnel.reload("reloaded")
        await works(tunnel, living)
        await living.aclose()


def removed(path: Path) -> None:
    path.unlink()


def replaced_by_a_socket(path: Path) -> None:
    """As another program's that has ended."""
    path.unlink()
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(os.path.relpath(path))


def renamed(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))


@pytest.mark.parametrize("change", [removed, replaced_by_a_socket, renamed])
async def test_a_socket_that_was_taken_away_comes_back(
    tunnel: Tunnel, change: Callable[[Path], None]
) -> None:
    async with serving(echo) as target:
        tunnel.write(target)
        await tunnel.start()
        living = await tunnel.connect()
        await living.send_all(b"x")
        assert await living.receive_some() == b"x"
        descriptors = tunnel.descriptors()
        change(tunnel.middle)
        await tunnel.reload("reloaded")
        await works(tunnel, living)
        await trio_until(lambda: tunnel.descriptors() <= descriptors)
        await tunnel.reload("reloaded")
        await works(tunnel, living)
        await living.aclose()
        tunnel.process.terminate()
        assert await tunnel.ended() == 0
        assert not tunnel.middle.exists()


@pytest.mark.parametrize("change", [removed, replaced_by_a_socket, renamed])
async def test_a_socket_that_was_taken_away_comes_back_by_itself(
    tunnel: Tunnel, change: Callable[[Path], None]
) -> None:
    """Nobody reloads."""
    async with serving(echo) as target:
        tunnel.write(target)
        await tunnel.start()
        living = await tunnel.connect()
        await works(tunnel, living)
        descriptors = tunnel.descriptors()
        change(tunnel.middle)
        await trio_until(lambda: tunnel.says("was removed or replaced; it has been created again"))
        await works(tunnel, living)
        await trio_until(lambda: tunnel.descriptors() <= descriptors)
        tunnel.middle.unlink()
        tunnel.middle.write_text("not a socket")
        await trio_until(lambda: tunnel.says("it accepts no connections; retrying"))
        tunnel.middle.unlink()
        await trio_until(tunnel.middle.is_socket)
        await works(tunnel, living)
        await living.aclose()
        tunnel.process.terminate()
        assert await tunnel.ended() == 0
        assert not tunnel.middle.exists()
        assert tunnel.log.read_text().count("it accepts no connections; retrying") == 1


async def test_something_else_in_the_place_of_a_socket(tunnel: Tunnel) -> None:
    """It is not ours to take away: the reload is refused, and the end leaves it there."""
    async with serving(echo) as target:
        tunnel.write(target)
        await tunnel.start()
        living = await tunnel.connect()
        await works(tunnel, living)
        tunnel.middle.unlink()
        tunnel.middle.write_text("somebody's")
        await tunnel.reload("something that is not a socket is there")
        await living.send_all(b"x")
        assert await living.receive_some() == b"x"
        tunnel.process.terminate()
        await living.aclose()
        assert await tunnel.ended() == 0
        assert tunnel.middle.read_text() == "somebody's"


async def test_permissions_change_only_with_the_rest(tunnel: Tunnel) -> None:
    async with serving(echo) as target:
        tunnel.write(target)
        await tunnel.start()
        tunnel.write(target, listen={"socket-mode": "660"}, connect={"port-file": "nowhere/port"})
        await tunnel.reload("not reloaded")
        assert stat.S_IMODE(tunnel.middle.stat().st_mode) == 0o600
        tunnel.write(target, listen={"socket-mode": "660"})
        await tunnel.reload("reloaded")
        assert stat.S_IMODE(tunnel.middle.stat().st_mode) == 0o660


async def test_an_end_does_not_wait_for_a_reload(tunnel: Tunnel, keys: Path) -> None:
    """A pipe that somebody holds open and never writes to takes its time to be refused."""
    async with serving(echo) as target:
        tunnel.write(target)
        await tunnel.start()
        os.mkfifo(tunnel.folder / "slow.toml")
        writer = os.open(tunnel.folder / "slow.toml", os.O_RDWR)
        tunnel.file.unlink()
        tunnel.file.symlink_to("slow.toml")
        tunnel.process.send_signal(1)
        await trio.sleep(0.2)
        tunnel.process.terminate()
        with trio.fail_after(4):
            await trio_until(lambda: tunnel.process.poll() is not None)
        os.close(writer)
        assert await tunnel.ended() == 0
