"""``hybridkex tunnel`` as processes, with faults."""

import contextlib
import errno
import hashlib
import os
import random
import shutil
import signal
import socket
import stat
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
import trio
from apps_glue import Kmes, Run, Wire, descriptors
from trio.testing import wait_all_tasks_blocked
from tunnel_glue import (
    Tunnel,
    echo,
    exchange,
    read_metrics,
    receive_all,
    serving,
)
from waiting import PATIENCE, trio_until

from hybridkex import (
    ClientConfig,
    DevCa,
    SecureStream,
    ServerConfig,
    TrustStore,
    open_secure_tcp_stream,
)
from hybridkex.apps.tunnel import TunnelConfig, TunnelMetrics, TunnelServer
from hybridkex.apps.tunnel.sockets import listen
from hybridkex.auth.dev_ca import write_identity
from hybridkex.cli import main
from hybridkex.errors import ConfigError
from hybridkex.net import supervisor
from hybridkex.net.address import TcpAddress, UnixAddress
from hybridkex.qkd.pool import FilePool, PoolNames
from hybridkex.qkd.store import write_key_file
from interop.ports import free_port


@pytest.fixture
def tunnel(run: Run, tmp_path: Path, keys: Path) -> Tunnel:
    return Tunnel(run, tmp_path, keys)


async def is_cut(stream: trio.SocketStream) -> bool:
    """Whether it breaks off, as against: comes to an end."""
    async with stream:
        try:
            await receive_all(stream)
        except trio.BrokenResourceError:
            return True
        return False


# -- what it carries


async def test_an_end_is_of_one_direction(tunnel: Tunnel) -> None:
    """First the program ends and is answered, then the target ends and is still spoken to."""
    upload, later = random.randbytes(3_000_000), random.randbytes(1_000_000)
    heard: list[bytes] = []

    async def answers_at_the_end(stream: trio.SocketStream) -> None:
        if await stream.receive_some(1) == b"1":
            await stream.send_all(hashlib.sha256(await receive_all(stream)).digest())
            await stream.send_eof()
        else:
            await stream.send_all(b"goodbye")
            await stream.send_eof()
            heard.append(await receive_all(stream))

    async with serving(answers_at_the_end) as target:
        tunnel.write(target)
        await tunnel.start()
        async with await tunnel.connect() as stream:
            await stream.send_all(b"1" + upload)
            await stream.send_eof()
            assert await receive_all(stream) == hashlib.sha256(upload).digest()
        async with await tunnel.connect() as stream:
            await stream.send_all(b"2")
            assert await receive_all(stream) == b"goodbye"
            await stream.send_all(later)
            await stream.send_eof()
            await trio_until(lambda: heard == [later])


async def test_many_connections_and_nothing_is_left_of_them(tunnel: Tunnel) -> None:
    """120 at once, each with data of its own; afterwards no descriptor is open."""
    number = 120
    good = []

    async def one() -> None:
        data = random.randbytes(random.randrange(1, 200_000))
        async with await tunnel.connect() as stream:
            good.append(await exchange(stream, data) == data)

    async with serving(echo) as target:
        # On a busy machine 120 handshakes at once may take longer than the default time.
        patient = {"handshake-timeout": 60}
        tunnel.write(target, listen=patient, connect=patient)
        await tunnel.start()
        before = tunnel.descriptors()
        async with trio.open_nursery() as nursery:
            for _ in range(number):
                nursery.start_soon(one)
        assert good == [True] * number
        await trio_until(lambda: tunnel.descriptors() <= before)
        found = tunnel.metrics()
        for name in ("in", "out"):
            assert found[f'hybridkex_tunnel_connections_open{{tunnel="{name}"}}'] == 0
            assert found[f'hybridkex_tunnel_connections_total{{tunnel="{name}"}}'] == number
            assert found[f'hybridkex_tunnel_connections_cut_total{{tunnel="{name}"}}'] == 0
            group = f'auth="certificate",group="X25519MLKEM768",tunnel="{name}"'
            assert found[f"hybridkex_tunnel_handshakes_total{{{group}}}"] == number


async def test_cut_at_random(
    run: Run,
    mutual: list[str],
    wire: Callable[[int], AbstractAsyncContextManager[Wire]],
) -> None:
    """Whatever is cut, what arrived is the beginning of what was sent, and no cut looks like an
    end."""
    whole: set[bytes] = set()
    data = random.randbytes(1 << 20)

    async def target(stream: trio.SocketStream) -> None:
        """Checks each byte against the one generator that both sides know."""
        name = b""
        while len(name) < 4:
            name += await stream.receive_some(4 - len(name))
        position = 0
        while piece := await stream.receive_some():
            expected = (data + data)[position % len(data) :][: len(piece)]
            assert piece == expected, "a corrupted byte"
            position += len(piece)
        assert position == 8 * len(data), "a cut was taken for an end"
        whole.add(name)
        await stream.send_all(b"done")
        await stream.send_eof()

    async with serving(target) as port:
        listening, inner = run.server(
            "tunnel", "listen", "--local", "127.0.0.1:0", "--target", f"127.0.0.1:{port}", *mutual
        )
        async with wire(inner) as between:
            connecting, outer = run.server(
                *("tunnel", "connect", "--local", "127.0.0.1:0"),
                *("--remote", f"127.0.0.1:{between.port}", "--server-name", "localhost", *mutual),
            )
            before = [descriptors(one) for one in (listening, connecting)]
            cut = done = 0

            async def program(number: int) -> None:
                """Goes on until it has been answered."""
                nonlocal cut, done
                while True:
                    stream = await trio.open_tcp_stream("127.0.0.1", outer)
                    try:
                        await stream.send_all(number.to_bytes(4, "big"))
                        for _ in range(8):
                            await stream.send_all(data)
                        await stream.send_eof()
                        answer = await receive_all(stream)
                    except trio.BrokenResourceError:
                        cut += 1
                    else:
                        assert answer == b"done", "an end where there was a cut"
                        done += 1
                        return
                    finally:
                        await trio.aclose_forcefully(stream)

            def enough(mark: int) -> bool:
                return between.carried > mark or done == 8

            async with trio.open_nursery() as nursery:
                for number in range(8):
                    nursery.start_soon(program, number)
                for _ in range(5):
                    await trio_until(
                        partial(enough, between.carried + random.randrange(2 << 20, 8 << 20))
                    )
                    between.cut()
            assert cut > 0
            assert done == 8
            assert len(whole) == 8
        await trio_until(
            lambda: all(
                descriptors(one) <= most
                for one, most in zip((listening, connecting), before, strict=True)
            )
        )


async def test_who_reads_slowly_is_waited_for(tunnel: Tunnel) -> None:
    """A target that does not read stops the program, and costs no memory."""
    begin = trio.Event()
    found: list[bytes] = []

    async def target(stream: trio.SocketStream) -> None:
        await begin.wait()
        found.append(hashlib.sha256(await receive_all(stream)).digest())

    async with serving(target) as port:
        tunnel.write(port)
        await tunnel.start()
        sent = hashlib.sha256()
        amount = 0
        async with await tunnel.connect() as stream:
            stream.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 18)
            memory = tunnel.memory()
            piece = random.randbytes(1 << 16)
            while True:
                with trio.move_on_after(0.7) as scope:
                    await stream.wait_send_all_might_not_block()
                if scope.cancelled_caught:
                    break
                number = await stream.socket.send(piece)
                sent.update(piece[:number])
                amount += number
                assert amount < 128 << 20, "somebody takes it all"
            # What the kernel's buffers hold, on three sockets, is not the tunnel's memory.
            assert tunnel.memory() - memory < 24 << 20
            begin.set()
            await stream.send_eof()
            await trio_until(lambda: found == [sent.digest()])


async def test_unix_sockets_on_every_side(tunnel: Tunnel) -> None:
    """Between programs and the tunnel, and between its two ends."""
    inner, outer = tunnel.folder / "target.sock", tunnel.folder / "program.sock"
    # One that a dead process left behind.
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(outer))
    server = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    await server.bind(str(inner))
    server.listen()
    data = random.randbytes(500_000)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, echo, [trio.SocketListener(server)])
        tunnel.write(
            f"unix:{inner}",
            listen={"socket-mode": "660"},
            connect={"local": "unix:program.sock"},
        )
        (tunnel.folder / "port").write_text("0")  # there is no port to wait for
        await tunnel.start()
        await trio_until(lambda: tunnel.says("out: listening on unix"))
        assert stat.S_IMODE(outer.stat().st_mode) == 0o600
        assert stat.S_IMODE(tunnel.middle.stat().st_mode) == 0o660
        async with await trio.open_unix_socket(str(outer)) as stream:
            assert await exchange(stream, data) == data
        tunnel.process.terminate()
        assert await tunnel.ended() == 0
        assert not outer.exists()
        assert not tunnel.middle.exists()
        nursery.cancel_scope.cancel()


async def test_idle_local_programs_keep_no_other_out(tunnel: Tunnel) -> None:
    outer = tunnel.folder / "program.sock"

    async def target(stream: trio.SocketStream) -> None:
        with contextlib.suppress(trio.BrokenResourceError):  # of those who made room
            await echo(stream)

    async with trio.open_nursery() as nursery, contextlib.AsyncExitStack() as stack:
        [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, target, [listener])
        tunnel.write(
            listener.socket.getsockname()[1],
            connect={"local": "unix:program.sock", "max-connections": "4"},
        )
        (tunnel.folder / "port").write_text("0")  # there is no port to wait for
        await tunnel.start()
        await trio_until(lambda: tunnel.says("out: listening on unix"))
        for _ in range(4):
            await stack.enter_async_context(await trio.open_unix_socket(str(outer)))
        await trio.sleep(1.2)
        async with await trio.open_unix_socket(str(outer)) as stream:
            assert await exchange(stream, b"let me in") == b"let me in"
        nursery.cancel_scope.cancel()


# -- what goes wrong


async def test_a_target_that_is_down_costs_its_own_connections(tunnel: Tunnel) -> None:
    async with await trio_listener() as spare:
        port = spare.socket.getsockname()[1]
        tunnel.write(port)
        await tunnel.start()
        living = await tunnel.connect()
        there = await spare.accept()
    # Nobody listens any more, and one connection lives.
    assert await is_cut(await tunnel.connect())
    await living.send_all(b"still")
    assert await there.receive_some() == b"still"
    found = tunnel.metrics()
    key = 'hybridkex_tunnel_connections_refused_total{reason="upstream",tunnel="in"}'
    assert found[key] == 1
    assert tunnel.says("in: a local program refused: cannot connect to 127.0.0.1")
    await living.aclose()
    await there.aclose()


async def trio_listener() -> trio.SocketListener:
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    return listener


async def test_the_limit(tunnel: Tunnel) -> None:
    async with serving(echo) as target:
        tunnel.write(target, connect={"max-connections": 2})
        await tunnel.start()
        first, second = await tunnel.connect(), await tunnel.connect()
        for stream in (first, second):
            await stream.send_all(b"x")
            assert await stream.receive_some() == b"x"
        try:
            third = await tunnel.connect()
        except OSError:
            pass  # cut before connect() had returned
        else:
            assert await is_cut(third)
        await first.aclose()
        open_now = 'hybridkex_tunnel_connections_open{tunnel="out"}'
        await trio_until(lambda: tunnel.metrics()[open_now] == 1)
        async with await tunnel.connect() as again:
            assert await exchange(again, b"room") == b"room"
        refused = 'hybridkex_tunnel_connections_refused_total{reason="limit",tunnel="out"}'
        assert tunnel.metrics()[refused] == 1
        await second.aclose()


async def test_silence_before_and_after_the_handshake(tunnel: Tunnel) -> None:
    async with serving(echo) as target:
        tunnel.write(
            target, listen={"handshake-timeout": 0.3}, connect={"idle-timeout": 0.5, "name": "out"}
        )
        await tunnel.start()
        async with await trio.open_unix_socket(str(tunnel.middle)) as mute:
            await receive_all(mute)  # the alert, if there is one, and the end
        failed = "hybridkex_tunnel_handshake_failures_total"
        labels = 'alert="user_canceled",by="us",reason="timeout",tunnel="in"'
        assert tunnel.metrics()[f"{failed}{{{labels}}}"] == 1
        stream = await tunnel.connect()
        await stream.send_all(b"x")
        assert await stream.receive_some() == b"x"
        assert await is_cut(stream)
        await trio_until(lambda: tunnel.says("no data for 0.5 s"))


async def test_who_leaves_early_does_not_stay_in_the_books(tunnel: Tunnel, keys: Path) -> None:
    """close_notify, then the end of TCP, while the target says nothing: the target is let go."""
    gone = trio.Event()

    async def silent(stream: trio.SocketStream) -> None:
        try:
            while await stream.receive_some():
                pass
            # A half-closed socket tells of a reset when it is written to.
            while True:
                await stream.send_all(b"")
                await stream.wait_send_all_might_not_block()
                await trio.sleep(0.02)
                if stream.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                    break
        finally:
            gone.set()

    async with serving(silent) as target:
        tunnel.write(target, listen={"local": "127.0.0.1:0", "port-file": "in-port"})
        config = ClientConfig(verifier=TrustStore.from_file(str(keys / "ca.pem")))
        tunnel.write(
            target,
            listen={"local": "127.0.0.1:0", "port-file": "in-port", "require-client-cert": False},
        )
        text = tunnel.file.read_text().replace("ca =", "# ca =", 1)  # the listener asks nobody
        tunnel.file.write_text(text)
        await tunnel.start()
        port = int((tunnel.folder / "in-port").read_text())
        stream = await open_secure_tcp_stream("localhost", port, config)
        await stream.send_all(b"hello")
        await stream.send_eof()
        await stream.transport_stream.aclose()
        await trio_until(gone.is_set)
        await trio_until(
            lambda: tunnel.says("the channel disconnected before the target had finished")
        )


async def test_who_may_come_in(run: Run, tmp_path: Path) -> None:
    """An allow-list of names; and whoever has no certificate learns that from an alert."""
    ca = DevCa.create()
    for name in ("localhost", "alice", "mallory"):
        write_identity(tmp_path / name, ca, ca.issue(name))

    def options(name: str, *more: str) -> list[str]:
        folder = tmp_path / name
        found = ["--ca", str(folder / "ca.pem")]
        return [*found, *more, "--cert", f"{folder}/cert.pem", "--key", f"{folder}/key.pem"]

    async with serving(echo) as target:
        metrics = tmp_path / "log"
        with metrics.open("wb") as log:
            _, inner = run.server(
                *("tunnel", "listen", "--local", "127.0.0.1:0", "--target", f"127.0.0.1:{target}"),
                *("--allow", "alice", "--name", "door", *options("localhost")),
                stderr=log,
            )
        there = ["--local", "127.0.0.1:0", "--remote", f"localhost:{inner}"]
        ports = {
            "alice": run.server("tunnel", "connect", *there, *options("alice"))[1],
            "mallory": run.server("tunnel", "connect", *there, *options("mallory"))[1],
            "nobody": run.server("tunnel", "connect", *there, *options("alice")[:2])[1],
        }
        async with await trio.open_tcp_stream("127.0.0.1", ports["alice"]) as stream:
            assert await exchange(stream, b"hello") == b"hello"
        for name in ("mallory", "nobody"):
            assert await is_cut(await trio.open_tcp_stream("127.0.0.1", ports[name]))
        await trio_until(lambda: "refused: CN=mallory is not allowed" in metrics.read_text())
        await trio_until(lambda: "handshake failed" in metrics.read_text())


# -- a new configuration


async def test_reload(tunnel: Tunnel) -> None:
    """A broken file changes nothing; a good one is for new connections; certificates are read
    again."""

    def answering(text: bytes) -> Callable[[trio.SocketStream], object]:
        async def answer(stream: trio.SocketStream) -> None:
            while await stream.receive_some():
                await stream.send_all(text)
            await stream.send_eof()

        return answer

    async with serving(answering(b"old")) as old, serving(answering(b"new")) as new:  # type: ignore[arg-type]
        tunnel.write(old)
        await tunnel.start()
        living = await tunnel.connect()

        async def asked(stream: trio.SocketStream) -> bytes:
            await stream.send_all(b"?")
            with trio.fail_after(PATIENCE):
                return bytes(await stream.receive_some())

        assert await asked(living) == b"old"
        good = tunnel.file.read_text()
        for broken, reason in (
            ("metrics = [", "Invalid"),
            (good.replace("target", "tarjet"), "[[listen]] in: unknown setting tarjet"),
            (good.replace("cert.pem", "none.pem"), "none.pem: No such file"),
            (good + '[[connect]]\nname = "third"\nlocal = "192.0.2.1:9"\nremote = "a:1"\n', "192"),
            (
                good + "[[connect]]\n" + good.split("[[connect]]\n")[1],
                "two tunnels have the name out",
            ),
        ):
            tunnel.file.write_text(broken)
            await tunnel.reload("not reloaded, the old configuration stays")
            assert reason in tunnel.log.read_text().splitlines()[-3:][0] + tunnel.log.read_text()
            assert await asked(living) == b"old"
            async with await tunnel.connect() as stream:
                assert await asked(stream) == b"old"
        # Both sides get other certificates and another target; the port stays the same.
        other = tunnel.folder / "other"
        ca = DevCa.create()
        write_identity(other, ca, ca.issue("localhost"))
        tunnel._keys = other
        tunnel.write(new)
        await tunnel.reload("reloaded")
        assert await asked(living) == b"old"
        async with await tunnel.connect() as stream:
            assert await asked(stream) == b"new"
        # The same file; the certificates in it have changed: the two sides do not trust each other
        # any more only if they are read again.
        ca = DevCa.create()
        shutil.rmtree(other)
        write_identity(other, ca, ca.issue("elsewhere"))
        await tunnel.reload("reloaded")
        assert await is_cut(await tunnel.connect())
        await trio_until(lambda: tunnel.says("handshake failed: .*(elsewhere|localhost)"))
        assert await asked(living) == b"old"
        await living.aclose()


async def test_tunnels_come_and_go(tunnel: Tunnel) -> None:
    """A tunnel that is added listens, one that is taken away does not, and no old channel stays."""
    async with serving(echo) as target:
        tunnel.write(target)
        await tunnel.start()
        both = tunnel.file.read_text()
        third = both.split("[[connect]]\n")[1].replace('"out"', '"third"')
        third = third.replace('"127.0.0.1:0"', '"unix:third.sock"').replace("port_file", "#")
        async with await tunnel.connect() as stream:  # what the first connection opens for good
            assert await exchange(stream, b"x") == b"x"
        before = tunnel.descriptors()
        tunnel.file.write_text(f"{both}[[connect]]\n{third}")
        await tunnel.reload("reloaded")
        path = tunnel.folder / "third.sock"
        living = await trio.open_unix_socket(str(path))
        await living.send_all(b"x")
        assert await living.receive_some() == b"x"
        tunnel.file.write_text(both)
        await tunnel.reload("reloaded")
        await trio_until(lambda: not path.exists())
        assert await exchange(living, b"goes on") == b"goes on"
        await living.aclose()
        async with await tunnel.connect() as stream:
            assert await exchange(stream, b"x") == b"x"
        await trio_until(lambda: tunnel.descriptors() <= before)


# -- as a service


async def test_sigterm_lets_connections_end(tunnel: Tunnel) -> None:
    async with serving(echo) as target:
        tunnel.write(target)
        await tunnel.start()
        living = await tunnel.connect()
        await living.send_all(b"x")
        assert await living.receive_some() == b"x"
        tunnel.process.terminate()
        await trio_until(lambda: tunnel.says("have 10 s to finish"))
        with pytest.raises(OSError):
            await tunnel.connect()
        data = random.randbytes(2_000_000)
        assert await exchange(living, data) == data
        await living.aclose()
        assert await tunnel.ended() == 0


async def test_sigterm_does_not_wait_for_ever(tunnel: Tunnel) -> None:
    async with serving(echo) as target:
        tunnel.write(target, top={"grace": 0.2})
        await tunnel.start()
        living = await tunnel.connect()
        await living.send_all(b"x")
        assert await living.receive_some() == b"x"
        tunnel.process.terminate()
        assert await is_cut(living)
        assert await tunnel.ended() == 0
        assert tunnel.says("cut: the tunnel is ending")


async def test_systemd_is_told(tunnel: Tunnel) -> None:
    """sd_notify(3), and a log in the journal's form."""
    path = tunnel.folder / "notify"
    heard = trio.socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    await heard.bind(str(path))

    async def next_message() -> dict[str, str]:
        with trio.fail_after(PATIENCE):
            text = (await heard.recv(4096)).decode()
        return dict(line.split("=", 1) for line in text.splitlines())

    async with serving(echo) as target:
        tunnel.write(target)
        tunnel.log.touch()
        status = tunnel.log.stat()
        await tunnel.start(
            NOTIFY_SOCKET=str(path), JOURNAL_STREAM=f"{status.st_dev}:{status.st_ino}"
        )
        assert await next_message() == {"READY": "1", "STATUS": "2 tunnels"}
        tunnel.process.send_signal(signal.SIGHUP)
        reloading = await next_message()
        assert reloading["RELOADING"] == "1"
        assert reloading["MONOTONIC_USEC"].isdigit()
        assert (await next_message())["READY"] == "1"
        tunnel.process.terminate()
        assert (await next_message())["STOPPING"] == "1"
        assert await tunnel.ended() == 0
    lines = tunnel.log.read_text().splitlines()
    assert lines
    assert all(line.startswith(("<6>", "<4>")) for line in lines)
    heard.close()


async def test_a_service_manager_that_reads_nothing(tunnel: Tunnel) -> None:
    """It has been stopped, and its queue is full: the tunnels go on."""
    path = tunnel.folder / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as deaf:
        deaf.bind(str(path))
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.setblocking(False)
            sender.connect(str(path))
            with contextlib.suppress(BlockingIOError):
                while True:
                    sender.send(b"x")
        async with serving(echo) as target:
            tunnel.write(target)
            await tunnel.start(NOTIFY_SOCKET=str(path))
            async with await tunnel.connect() as stream:
                assert await exchange(stream, b"x") == b"x"
            tunnel.process.terminate()
            assert await tunnel.ended() == 0


async def test_qkd_keys_from_the_file(tunnel: Tunnel, kmes: Kmes) -> None:
    """The options of ``connect`` and ``listen``, word for word: a new QKD key each connection."""

    def site(words: list[str]) -> dict[str, object]:
        found: dict[str, object] = {
            name.removeprefix("--"): value
            for name, value in zip(words[::2], words[1::2], strict=True)
        }
        return {**found, "peer-sae": [found["peer-sae"]]}

    async with serving(echo) as target:
        tunnel.write(target, listen=site(kmes.bob), connect=site(kmes.alice))
        await tunnel.start()
        for _ in range(3):
            async with await tunnel.connect() as stream:
                assert await exchange(stream, b"x") == b"x"
        found = tunnel.metrics()
        for name in ("in", "out"):
            assert found[f'hybridkex_tunnel_qkd_keys_total{{tunnel="{name}"}}'] == 3
        assert tunnel.says("QKD .* of ")
        # A connection after a reload finds key sources that are open.
        await tunnel.reload("reloaded")
        async with await tunnel.connect() as stream:
            assert await exchange(stream, b"x") == b"x"


async def test_a_connection_that_lasts_renews_its_keys(tunnel: Tunnel, kmes: Kmes) -> None:
    """With a new QKD key each time, and it is counted."""

    def site(words: list[str], fresh_keys: str) -> dict[str, object]:
        found: dict[str, object] = {
            name.removeprefix("--"): value
            for name, value in zip(words[::2], words[1::2], strict=True)
        }
        return {**found, "peer-sae": [found["peer-sae"]], "fresh-keys": fresh_keys}

    async with serving(echo) as target:
        tunnel.write(target, listen=site(kmes.bob, "peer"), connect=site(kmes.alice, "0.05s"))
        await tunnel.start()
        async with await tunnel.connect() as stream:

            def renewed() -> int:
                found, key = tunnel.metrics(), "hybridkex_tunnel_key_updates_total"
                return min(
                    int(found.get(f'{key}{{qkd="yes",tunnel="{name}"}}', 0))
                    for name in ("in", "out")
                )

            for number in range(1000):
                text = b"%d" % number
                await stream.send_all(text)
                assert await stream.receive_some() == text
                if number % 20 == 19 and renewed() >= 3:
                    break
                await trio.sleep(0.01)
            assert renewed() >= 3


# -- what is wrong before anything runs


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "no tunnel is configured"),
        ("grace = -1\n", "no tunnel is configured"),
        ("color = 1\n", "unknown setting color"),
        ("grace = true\n", "grace has the wrong type: it must be a string or a number"),
        ("listen = 1\n", "write each tunnel as a table [[listen]]"),
        ("[[connect]]\n", "the following arguments are required: local, remote"),
        ('[[connect]]\nlocal="x"\nremote="h:1"\n', "'x' is not HOST:PORT"),
        ('[[connect]]\nlocal="h:1"\nremote="h:1"\nqkd="require"\n', "needs --kme or --key-pool"),
        ('[[connect]]\nlocal="h:1"\nremote="unix:s"\nca="CA"\n', "needs a server_name"),
        ('[[connect]]\nlocal="h:1"\nremote="h:1"\nmax_connections=0\n', "must be at least 1"),
        (
            '[[connect]]\nlocal="h:1"\nremote="h:1"\nmax_connections="a"\n',
            "max_connections: a whole number is needed",
        ),
        (
            '[[connect]]\nlocal="h:1"\nremote="h:1"\nidle_timeout=0\n',
            "time limits must be positive",
        ),
        ('[[connect]]\nlocal="h:1"\nremote="h:1"\nlocal-x=0\n', "unknown setting local-x"),
        ("[[connect]]\nidle-timeout=9\n", "write idle-timeout as idle_timeout in a file"),
        (
            '[[connect]]\nlocal="h:1"\nremote="h:1"\ninsecure="yes"\n',
            "insecure must be true or false",
        ),
        ('[[connect]]\nlocal="h:1"\nremote="h:1"\nname=["a"]\n', "name takes one value"),
        (
            '[[listen]]\nlocal="h:1"\ntarget="h:1"\nallow=["a"]\n',
            "configure the trusted authorities or keys: ca, pin or known_peers",
        ),
        ('[[listen]]\nlocal="h:1"\ntarget="h:1"\n', "a server must authenticate itself"),
        ('[[listen]]\nlocal="h:1"\ntarget="h:1"\nsocket_mode="9"\n', "three octal digits"),
        (
            '[[listen]]\nlocal="h:1"\ntarget="h:1"\nkeylog="\\u0000"\n',
            "keylog: the path has invalid characters",
        ),
    ],
)
def test_what_a_file_cannot_say(
    tmp_path: Path, keys: Path, capsys: pytest.CaptureFixture[str], text: str, complaint: str
) -> None:
    path = tmp_path / "tunnels.toml"
    path.write_text(text.replace("CA", str(keys / "ca.pem")))
    assert main(["tunnel", "run", str(path), "--check"]) == 1
    error = capsys.readouterr().err
    assert complaint in error
    assert len(error.strip().splitlines()) == 1


ONE = '[[listen]]\nname = "one"\npsk = "a:PSK"\ntarget = "h:1"\n'
TWO = ONE.replace("one", "two")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (ONE + 'local = "unix:nowhere/x"', "No such file or directory"),
        (ONE + 'local = "unix:file"', "something that is not a socket is there"),
        (ONE + 'local = "unix:file/x"', "Not a directory"),
        (ONE + 'local = "192.0.2.1:1"', "this machine has no such address"),
        (ONE + 'local = "nowhere.invalid:1"', "check the host's name"),
        (ONE + 'local = "127.0.0.1:0"\nport_file = "nowhere/port"', "No such file or directory"),
        (ONE + 'local = "127.0.0.1:0"\nport_file = "."', "Is a directory"),
        (ONE + 'local = "127.0.0.1:0"\nkeylog = "nowhere/log"', "No such file or directory"),
        (ONE + 'local = "127.0.0.1:0"\nkeylog = "."', "Is a directory"),
        ('metrics = "192.0.2.1:1"\n' + ONE + 'local = "127.0.0.1:0"', "has no such address"),
        ('metrics = "127.0.0.1:PORT"\n' + ONE + 'local = "127.0.0.1:PORT"', "already in use"),
        (ONE + 'local = "127.0.0.1:PORT"\n' + TWO + 'local = "0.0.0.0:PORT"', "already in use"),
    ],
)
def test_the_check_refuses_what_a_run_refuses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, complaint: str
) -> None:
    (tmp_path / "file").touch()
    path = tmp_path / "tunnels.toml"
    path.write_text(text.replace("PORT", str(free_port())).replace("PSK", "ab" * 32))
    for words in (["--check"], []):
        before = sorted(tmp_path.iterdir())
        assert main(["tunnel", "run", str(path), *words]) == 1
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert complaint in error, words
        assert sorted(tmp_path.iterdir()) == before


def test_a_check_creates_nothing(tmp_path: Path) -> None:
    path = tmp_path / "tunnels.toml"
    more = 'local = "unix:middle"\nport_file = "port"\nkeylog = "log"\n'
    path.write_text(ONE.replace("PSK", "ab" * 32) + more)
    assert main(["tunnel", "run", str(path), "--check"]) == 0
    assert list(tmp_path.iterdir()) == [path]


def test_the_check_of_a_tunnel_that_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It has its key pool, which one process uses, and its port."""
    pool, path = tmp_path / "pool", tmp_path / "tunnels.toml"
    write_key_file(tmp_path / "pool.key")
    names = PoolNames(sae="a", kme="A", peer_sae="b", peer_kme="B")
    with socket.create_server(("127.0.0.1", 0)) as server:
        local = f'local = "127.0.0.1:{server.getsockname()[1]}"\n'
        path.write_text(ONE.replace('psk = "a:PSK"', 'qkd = "require"\nkey_pool = "pool"') + local)
        opened = FilePool.open(pool, key_file=tmp_path / "pool.key", names=names)
        try:
            assert main(["tunnel", "run", str(path), "--check"]) == 0
            assert capsys.readouterr().out == f"{path}: 1 tunnel\n"
        finally:
            trio.run(opened.aclose)


def test_a_good_file_is_said_to_be_good(tunnel: Tunnel, capsys: pytest.CaptureFixture[str]) -> None:
    tunnel.write(1)
    assert main(["tunnel", "run", str(tunnel.file), "--check"]) == 0
    assert capsys.readouterr().out == f"{tunnel.file}: 2 tunnels\n"


def test_the_example_files_can_be_used(
    tmp_path: Path, keys: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The one beside the documentation, with the certificates that it names."""
    example = Path(__file__).parents[2] / "examples" / "tunnel" / "tunnels.toml"
    shutil.copy(example, tmp_path)
    for name in ("ca.pem", "cert.pem", "key.pem"):
        shutil.copy(keys / name, tmp_path)
    assert main(["tunnel", "run", str(tmp_path / "tunnels.toml"), "--check"]) == 0
    assert "tunnels" in capsys.readouterr().out


async def test_an_address_in_use(tunnel: Tunnel, run: Run, tmp_path: Path) -> None:
    async with serving(echo) as target:
        tunnel.write(target)
        await tunnel.start()
        second = run.start(
            *("tunnel", "connect", "--local", f"127.0.0.1:{tunnel.port}", "--remote", "h:1"),
            *("--insecure",),
        )
        await trio_until(lambda: second.poll() is not None)
        lines = second.communicate()[1].splitlines()
        assert second.returncode == 1
        assert "Address already in use; another program listens there" in lines[-1]
        assert read_metrics(tunnel.metrics_port)


async def test_no_task_is_left(tmp_path: Path) -> None:
    """In one process: connections that end, that are cut, that nobody answers; and reloads."""
    ca = DevCa.create()

    @asynccontextmanager
    async def server_side() -> AsyncIterator[ServerConfig]:
        yield ServerConfig(identities=(ca.issue("localhost"),))

    @asynccontextmanager
    async def client_side() -> AsyncIterator[ClientConfig]:
        yield ClientConfig(verifier=TrustStore((ca.certificate,)))

    middle = UnixAddress(str(tmp_path / "middle"))
    outer = UnixAddress(str(tmp_path / "outer"))
    async with serving(echo) as port, trio.open_nursery() as nursery:
        tunnels = (
            TunnelConfig(
                name="in", local=middle, forward=TcpAddress("127.0.0.1", port), channel=server_side
            ),
            TunnelConfig(
                name="out",
                local=outer,
                forward=middle,
                channel=client_side,
                server_name="localhost",
            ),
        )
        server = TunnelServer(TunnelMetrics())
        await nursery.start(server.run, tunnels)

        def tasks() -> int:
            return trio.lowlevel.current_statistics().tasks_living

        await wait_all_tasks_blocked()
        before = tasks()

        async def ends(data: bytes) -> None:
            async with await trio.open_unix_socket(outer.path) as stream:
                assert await exchange(stream, data) == data

        async def is_gone_at_once() -> None:
            stream = await trio.open_unix_socket(outer.path)
            await stream.send_all(b"x" * 100_000)
            await trio.aclose_forcefully(stream)

        async def says_nothing() -> None:
            async with await trio.open_unix_socket(middle.path):
                pass

        async with trio.open_nursery() as programs:
            for _ in range(30):
                programs.start_soon(ends, random.randbytes(300_000))
                programs.start_soon(is_gone_at_once)
                programs.start_soon(says_nothing)
            for _ in range(5):
                await server.apply(tunnels)
        await trio_until(lambda: server._open.total() == 0 and tasks() == before)
        with pytest.raises(ConfigError, match="no tunnel"):
            await server.apply(())
        server.close(0)


@pytest.mark.parametrize("turns", range(12))
async def test_two_signals_at_once(tmp_path: Path, turns: int) -> None:
    """A process manager and a shell may both pass a signal on; the second ends it at once, however
    far the first has come."""

    @asynccontextmanager
    async def client_side() -> AsyncIterator[ClientConfig]:
        yield ClientConfig(verifier=TrustStore((DevCa.create().certificate,)))

    local, far = (UnixAddress(str(tmp_path / name)) for name in ("outer", "nobody"))
    server = TunnelServer(TunnelMetrics())
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            tunnel = TunnelConfig(
                name="out", local=local, forward=far, channel=client_side, server_name="localhost"
            )
            await nursery.start(server.run, (tunnel,))
            async with await trio.open_unix_socket(local.path):
                await wait_all_tasks_blocked()
                server.close(30)
                for _ in range(turns):
                    await trio.lowlevel.checkpoint()
                server.close(0)


async def test_no_memory_is_no_internal_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The line of the connection and that of the supervisor say the same."""

    @asynccontextmanager
    async def client_side() -> AsyncIterator[ClientConfig]:
        yield ClientConfig(verifier=TrustStore((DevCa.create().certificate,)))

    async def fails(_: object) -> None:
        raise ExceptionGroup("", [MemoryError()])

    monkeypatch.setattr("hybridkex.apps.tunnel.server._Connection._establish", fails)
    caplog.set_level("INFO", "hybridkex")
    outer = UnixAddress(str(tmp_path / "outer"))
    tunnels = (
        TunnelConfig(
            name="out", local=outer, forward=outer, channel=client_side, server_name="localhost"
        ),
    )
    async with trio.open_nursery() as nursery:
        await nursery.start(TunnelServer(TunnelMetrics()).run, tunnels)
        with contextlib.suppress(trio.BrokenResourceError):
            async with await trio.open_unix_socket(outer.path) as stream:
                assert await stream.receive_some() == b""
        await trio_until(lambda: "out: a local program: there is no more memory" in caplog.text)
        nursery.cancel_scope.cancel()
    assert "cut: there is no more memory for the program" in caplog.text
    assert "internal error" not in caplog.text


@pytest.mark.parametrize("known", [True, False])
async def test_unknown_peers_cannot_fill_the_log(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    known: bool,
) -> None:
    """Where anybody may connect, a line for each connection is too many."""
    monkeypatch.setattr(supervisor, "SERVED_RATE", 0.001)
    monkeypatch.setattr(supervisor, "SERVED_BURST", 20)
    ca = DevCa.create(algorithm="ed25519")
    trust, identity = TrustStore((ca.certificate,)), ca.issue("localhost", algorithm="ed25519")

    @asynccontextmanager
    async def server_side() -> AsyncIterator[ServerConfig]:
        yield ServerConfig(identities=(identity,), client_verifier=trust if known else None)

    caplog.set_level("INFO", "hybridkex")
    middle = UnixAddress(str(tmp_path / "middle"))
    client = ClientConfig(verifier=trust, identity=identity if known else None)
    async with serving(echo) as port, trio.open_nursery() as nursery:
        tunnel = TunnelConfig(
            name="in", local=middle, forward=TcpAddress("127.0.0.1", port), channel=server_side
        )
        await nursery.start(TunnelServer(TunnelMetrics()).run, (tunnel,))
        for _ in range(25):
            wire = await trio.open_unix_socket(middle.path)
            async with SecureStream(wire, client, server_hostname="localhost") as stream:
                await stream.send_all(b"x")
                assert await stream.receive_some() == b"x"
        nursery.cancel_scope.cancel()
    lines = caplog.text.count("open; TLS 1.3")
    assert lines == (25 if known else 10)


async def test_a_new_tunnel_that_finds_no_descriptor_leaves_everything_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Watching its pending connections needs one, besides that of its socket."""

    @asynccontextmanager
    async def client_side() -> AsyncIterator[ClientConfig]:
        yield ClientConfig(verifier=TrustStore((DevCa.create().certificate,)))

    def tunnel(name: str) -> TunnelConfig:
        local = UnixAddress(str(tmp_path / name))
        return TunnelConfig(
            name=name, local=local, forward=local, channel=client_side, server_name="localhost"
        )

    def refuse() -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    async with trio.open_nursery() as nursery:
        server = TunnelServer(TunnelMetrics())
        await nursery.start(server.run, [tunnel("old")])
        with monkeypatch.context() as full:
            full.setattr("hybridkex.net.pending.selectors.DefaultSelector", refuse)
            with pytest.raises(
                ConfigError, match=r"new: cannot accept connections at .*open files"
            ):
                await server.apply([tunnel("old"), tunnel("new")])
        assert not (tmp_path / "new").exists()
        async with await trio.open_unix_socket(str(tmp_path / "old")):
            pass
        await server.apply([tunnel("old"), tunnel("new")])
        async with await trio.open_unix_socket(str(tmp_path / "new")):
            pass
        nursery.cancel_scope.cancel()


async def test_permissions_of_what_has_replaced_the_socket(tmp_path: Path) -> None:
    """Whoever may change the folder can put a link there; what it leads to keeps its own."""
    ours = tmp_path / "ours"
    ours.touch(0o600)
    place = tmp_path / "socket"
    listening = await listen(UnixAddress(str(place)), mode=0o600)
    assert listening.set_mode(0o640) == 0o600
    place.rename(tmp_path / "moved")
    for put in (place.symlink_to, place.hardlink_to):
        put(ours)
        with pytest.raises(ConfigError, match="cannot change the permissions"):
            listening.set_mode(0o666)
        assert stat.S_IMODE(ours.stat().st_mode) == 0o600
        await listening.aclose()
        assert place.exists()
        place.unlink()
