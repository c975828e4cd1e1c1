"""Alice and Bob as processes of their own, and the link as what feeds KMEs."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import trio
from waiting import trio_until

from hybridkex.auth.dev_ca import DevCa, write_identity
from hybridkex.cli import main
from hybridkex.errors import ConfigError
from hybridkex.kme.config import load_config
from hybridkex.kme.serve import KmeServer
from interop.ports import free_port

PARTY = """
import json, sys, trio
from cryptography import x509
from pathlib import Path
from hybridkex.net.address import TcpAddress
from hybridkex.link.optimise import tuned
from hybridkex.link.presets import PRESETS
from hybridkex.link.authentication import Signatures
from hybridkex.kme.link_feed import PartyFeed
from hybridkex.link.settings import LinkSettings

party, port, folder, peer = sys.argv[1:]
settings = LinkSettings(preset=tuned(PRESETS["rusca2018"].at(0), 30_000), block_bits=30_000)

async def main():
    feed = PartyFeed(
        settings, party=party, address=TcpAddress("127.0.0.1", int(port)),
        signatures=Signatures.from_files(
            Path(folder) / party / "key.pem", Path(folder) / peer / "cert.pem"
        ),
        note=lambda block: None,
    )
    found = {}
    async with trio.open_nursery() as nursery:
        nursery.start_soon(feed.run)
        while len(found) < 40:
            for one in await anext(feed.ends[0]):
                found[str(one.key_id)] = one.key.reveal().hex()
        print(json.dumps(found), flush=True)
        sys.stdin.read()  # until the other one has its keys, too
        nursery.cancel_scope.cancel()

trio.run(main)
"""


async def relay(upstream: int, crossed: bytearray, listener: trio.SocketListener) -> None:
    """Pass connections on, and keep all that crosses the classical one, both ways."""

    async def pump(source: trio.SocketStream, sink: trio.SocketStream, keep: bool) -> None:
        try:
            async for data in source:
                if keep:
                    crossed.extend(data)
                await sink.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass

    async def join(stream: trio.SocketStream) -> None:
        kind = await stream.receive_some(1)
        while True:  # the process behind it may still be on its way to listening
            try:
                other = await trio.open_tcp_stream("127.0.0.1", upstream)
            except OSError:
                await trio.sleep(0.05)
            else:
                break
        await other.send_all(kind)
        async with stream, other, trio.open_nursery() as nursery:
            nursery.start_soon(pump, stream, other, kind == b"C")
            nursery.start_soon(pump, other, stream, kind == b"C")

    await trio.serve_listeners(join, [listener])


async def test_two_processes_make_the_same_keys_and_none_of_them_crosses(tmp_path: Path) -> None:
    ca = DevCa.create()
    for party in ("alice", "bob"):
        write_identity(tmp_path / party, ca, ca.issue(party))
    port = free_port()
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    crossed = bytearray()
    found: dict[str, dict[str, str]] = {}
    ready = {"alice": trio.Event(), "bob": trio.Event()}

    async def play(party: str, peer: str, where: int) -> None:
        process = await trio.lowlevel.open_process(
            [sys.executable, "-c", PARTY, party, str(where), str(tmp_path), peer],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert process.stdout is not None
        assert process.stdin is not None
        try:
            line = b""
            while not line.endswith(b"\n"):
                part = await process.stdout.receive_some()
                assert part, "the process ended early"
                line += part
            found[party] = json.loads(line)
            ready[party].set()
            await ready[peer].wait()
            await process.stdin.aclose()
            await process.wait()
        finally:
            if process.returncode is None:
                process.kill()

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(relay, port, crossed, listener)
            async with trio.open_nursery() as parties:
                parties.start_soon(play, "alice", "bob", port)
                parties.start_soon(play, "bob", "alice", listener.socket.getsockname()[1])
            nursery.cancel_scope.cancel()
    both = found["alice"].keys() & found["bob"].keys()
    assert len(both) >= 40
    for key_id in both:
        assert found["alice"][key_id] == found["bob"][key_id]
        assert bytes.fromhex(found["alice"][key_id]) not in crossed
    assert len(crossed) > 100_000


def written(tmp_path: Path, link: str) -> Path:
    assert main(["kme", "dev-up", str(tmp_path), "--ports", "0,0", "--no-serve"]) == 0
    path = tmp_path / "kme.toml"
    text = path.read_text()
    path.write_text(text.replace('producer = "random"', f'producer = "link"\n{link}'))
    return path


async def test_a_link_feeds_two_kmes(tmp_path: Path) -> None:
    path = written(tmp_path, "link = {preset = 'rusca2018', distance_km = 0, block_bits = 30000}")
    server = KmeServer(load_config(path))
    stored = [0]
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            await nursery.start(server.serve)
            while min(stored) < 20:
                await trio.sleep(0.05)
                stored = [
                    await kme._store.count(link)
                    for kme in server._kmes.values()
                    for link in kme.links
                ]
            server.close()
    text = server.metrics.text().decode()
    for name in ("blocks_total", "qber_ratio", "secret_bits_per_second", "ledger_bits"):
        assert f"hybridkex_qkd_link_{name}{{" in text
    assert 'outcome="made"} 0' not in text


@pytest.mark.parametrize(
    ("link", "reason"),
    [
        ("link = {real_time = 'slow'}", "real_time"),
        ("link = [{distance_km = 5}]", r"kme\[0\].peer\[0\].link must be a table$"),
        (
            "link = {preset = 'x'}",
            r"kme.toml: kme\[0\].peer\[0\].link: no preset 'x'; there are gys",
        ),
        ("link = {block_bits = 5}", r"kme.toml: kme\[0\].peer\[0\].link: block_bits lies between"),
        ("link = {block_bits = 1e5}", r"kme\[0\].peer\[0\].link.block_bits .* must be an integer"),
        ("link = {distance_km = 1e9}", r"kme\[0\].peer\[0\].link: distance_km must be a number"),
        ("link = {party = 'alice'}", r"kme\[0\].peer\[0\].link: .* must be given together"),
        ("link = {party = 'eve'}", "alice or bob"),
        (
            "link = {party = 'bob', address = '127.0.0.1:1', peer_credential = 'x'}",
            "party, address and peer_credential for a link to a KME in another process",
        ),
    ],
)
def test_links_that_cannot_be(tmp_path: Path, link: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        load_config(written(tmp_path, link))


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--preset", "rusca2018", "--distance", "5", "--block-bits", "50000", "--json"]
    assert main(["qkd", "run", "--blocks", "2", *options]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["number"] for line in lines] == [1, 2]
    assert all(line["keys"] == len(line["key_ids"]) > 0 for line in lines)
    assert main(["qkd", "run", "--blocks", "1", *options, "--eve", "intercept:1"]) == 1
    (line,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert "QBER" in line["aborted"]
    assert line["keys"] == 0
    for wrong in (["--preset", "x"], ["--eve", "mitm:1"], ["--blocks", "0"], ["--distance", "900"]):
        assert main(["qkd", "run", *options, *wrong]) == 1
        assert capsys.readouterr().err.startswith("hybridkex: ")
    few = ["--blocks", "1e0", "--block-bits", "1e4", "--key-bits", "1e6", "--eve", "none"]
    assert main(["qkd", "run", *options, *few]) == 1  # secret bits, but too few for one key
    (line,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert "fewer than one key takes" in line["aborted"]
    with pytest.raises(SystemExit):
        main(["qkd", "run", "--satellite", "70", "--distance", "5"])
    assert "not allowed with" in capsys.readouterr().err


@pytest.mark.parametrize("more", [[], ["--bootstrap", "ecdsa"]])
def test_no_line_of_a_run_is_wider_than_its_output(
    more: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["qkd", "run", "--preset", "rusca2018", "--distance", "5", "--block-bits", "5e4"]
    assert main([*command, "--blocks", "1", *more]) == 0
    out = capsys.readouterr().out
    assert ("if no signature was forged" in out) == bool(more)
    assert max(map(len, out.splitlines())) <= 80


def two_files(folder: Path) -> dict[str, Path]:
    """Each KME of ``dev-up`` with a file of its own, and a link between the two processes."""
    assert main(["kme", "dev-up", str(folder), "--ports", "0,0", "--no-serve"]) == 0
    both = load_config(folder / "kme.toml").kme
    ports, link = [free_port(), free_port()], free_port()
    paths = {}
    for number, (kme, party) in enumerate(zip(both, ("alice", "bob"), strict=True)):
        other = both[1 - number]
        paths[kme.id] = folder / f"{kme.id}.toml"
        paths[kme.id].write_text(f"""
[[kme]]
id = "{kme.id}"
listen = "127.0.0.1:{ports[number]}"
saes = ["{kme.saes[0]}"]
ca = "{kme.id}/ca.pem"
certificate = "{kme.id}/cert.pem"
key = "{kme.id}/key.pem"
store = "{kme.id}/keys.db"
key_file = "{kme.id}/store.key"
[[kme.peer]]
id = "{other.id}"
saes = ["{other.saes[0]}"]
url = "https://127.0.0.1:{ports[1 - number]}"
producer = "link"
[kme.peer.link]
preset = "rusca2018"
distance_km = 0
block_bits = 30000
tuned = false
reauthentication = "signatures"
party = "{party}"
address = "127.0.0.1:{link}"
peer_credential = "{other.id}/cert.pem"
""")
    return paths


async def test_renewed_certificates_begin_the_next_session(tmp_path: Path) -> None:
    """SIGHUP at both ends, then one is restarted: the other does not go on with what it had."""
    paths = two_files(tmp_path)

    def made(server: KmeServer) -> bool:
        return b"qkd_link_blocks_total{kme" in server.metrics.text()

    async def serve(nursery: trio.Nursery, name: str) -> KmeServer:
        server = KmeServer(load_config(paths[name]))
        await nursery.start(server.serve)
        return server

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            a = await serve(nursery, "kme-a")
            async with trio.open_nursery() as until_restart:
                b = await serve(until_restart, "kme-b")
                await trio_until(lambda: made(a) and made(b))
                ca = DevCa.create()
                for name in paths:
                    identity = ca.issue("127.0.0.1", common_name=name)
                    write_identity(tmp_path / name, ca, identity, overwrite=True)
                for server, name in ((a, "kme-a"), (b, "kme-b")):
                    await server.reload(partial(load_config, paths[name]))
                b.close()
            again = await serve(nursery, "kme-b")
            await trio_until(lambda: made(again))
            for server in (a, again):
                server.close()


@pytest.mark.parametrize("check", [["--check"], []])
def test_a_bootstrap_that_is_not_held_is_refused_at_the_start(
    check: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = two_files(tmp_path)["kme-a"]
    good = path.read_text()
    for asked in ("psk", "ml-dsa", "nonsense"):
        path.write_text(good.replace("tuned", f'bootstrap = "{asked}"\ntuned'))
        assert main(["kme", "serve", str(path), *check]) == 1
        said = capsys.readouterr().err
        assert f'bootstrap = "{asked}", but' in said
        assert 'write bootstrap = "ecdsa"' in said
