"""Silent, idle and rude connections keep nobody out of a KME, and end nothing."""

import contextlib
import random
import socket
import ssl
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
import trio

from hybridkex.auth.dev_ca import DevCa, write_identity
from hybridkex.cli import main
from hybridkex.kme.config import load_config
from hybridkex.kme.serve import KmeServer, Serving


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """Two KMEs, of which the first has room for a few connections only."""
    ca = DevCa.create()
    site = tmp_path / "s"
    assert main(["kme", "dev-up", str(site), "--ports", "0,0", "--no-serve"]) == 0
    for name in ("alice", "carol", "kme-a", "kme-b", "bob"):  # one authority for all
        write_identity(
            site / name, ca, ca.issue("127.0.0.1", "localhost", common_name=name), overwrite=True
        )
    path = site / "kme.toml"
    text = path.read_text().replace('saes = ["alice"]', 'saes = ["alice", "carol"]')
    limits = "max_connections = 12\nmax_sae_connections = 8\nmax_handshakes = 64\n[[kme.peer]]"
    path.write_text('metrics = "127.0.0.1:0"\n' + text.replace("[[kme.peer]]", limits))
    return site


def context(site: Path, name: str) -> ssl.SSLContext:
    made = ssl.create_default_context(cafile=site / name / "ca.pem")
    made.load_cert_chain(site / name / "cert.pem", site / name / "key.pem")
    return made


@contextlib.contextmanager
def serving(site: Path) -> Iterator[Callable[[Callable[[Serving], None]], None]]:
    """Runs a function in a thread beside the KMEs."""

    def run(work: Callable[[Serving], None]) -> None:
        async def run_both() -> None:
            server = KmeServer(load_config(site / "kme.toml"))
            async with trio.open_nursery() as nursery:
                where = await nursery.start(
                    lambda task_status: server.serve(task_status=task_status)
                )
                try:
                    await trio.to_thread.run_sync(work, where)
                finally:
                    server.close()

        trio.run(run_both)

    yield run


def ask(site: Path, where: Serving, name: str, kme: str, other: str) -> int:
    url = f"https://localhost:{where.kmes[kme].port}/api/v1/keys/{other}/status"
    with httpx.Client(verify=context(site, name), timeout=20) as http:
        return http.get(url).status_code


def test_silence_keeps_nobody_out(site: Path) -> None:
    """256 TCP connections without a byte; then idle connections of one SAE."""

    def work(where: Serving) -> None:
        port = where.kmes["kme-a"].port
        with contextlib.ExitStack() as held:
            for _ in range(256):
                held.enter_context(socket.create_connection(("127.0.0.1", port)))
            assert ask(site, where, "alice", "kme-a", "bob") == 200
        with contextlib.ExitStack() as held:
            alice = context(site, "alice")
            idle = []
            for _ in range(40):  # more than an SAE, and than all SAEs may have
                tcp = held.enter_context(socket.create_connection(("127.0.0.1", port)))
                with contextlib.suppress(OSError):
                    idle.append(alice.wrap_socket(tcp, server_hostname="localhost"))
            assert ask(site, where, "carol", "kme-a", "bob") == 200
            for one in idle:
                one.close()

    with serving(site) as run:
        run(work)


def storm(port: int, client: ssl.SSLContext, rng: random.Random, count: int) -> None:
    """Resets, garbage, half-open connections and HTTP that breaks off, at every stage."""
    request = b"GET /api/v1/keys/bob/status HTTP/1.1\r\nHost: x\r\n\r\n"
    for _ in range(count):
        tcp = socket.create_connection(("127.0.0.1", port))
        tcp.settimeout(0.3)
        with contextlib.suppress(OSError):
            match rng.randrange(6):
                case 0:
                    tcp.send(rng.randbytes(rng.randrange(1, 3000)))
                case 1:
                    tcp.send(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03")
                case 2:
                    tcp.send(request)
                case 3:
                    tcp = client.wrap_socket(tcp, server_hostname="localhost")
                    tcp.send(request[: rng.randrange(len(request))])
                case 4:
                    tcp = client.wrap_socket(tcp, server_hostname="localhost")
                    tcp.send(request.replace(b"GET", rng.choice([b"HEAD", b"POST", b"\0"])) * 3)
                case _:
                    pass
        with contextlib.suppress(OSError):  # TLS may have closed it
            tcp.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        tcp.close()


@pytest.mark.parametrize("tls", ["stdlib", "hybridkex"])
def test_a_storm_ends_nothing(site: Path, tls: str) -> None:
    path = site / "kme.toml"
    path.write_text(path.read_text().replace('tls = "stdlib"', f'tls = "{tls}"'))

    def work(where: Serving) -> None:
        rng = random.Random(7)
        assert where.metrics is not None
        for port in (where.kmes["kme-a"].port, where.metrics.port):
            storm(port, context(site, "alice"), rng, 40)
        url = f"http://127.0.0.1:{where.metrics.port}/metrics"
        assert httpx.head(url, timeout=20, verify=False).status_code == 200
        assert httpx.get(url, timeout=20, verify=False).status_code == 200
        if tls == "stdlib":
            assert ask(site, where, "alice", "kme-a", "bob") == 200

    with serving(site) as run:
        run(work)
