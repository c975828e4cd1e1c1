"""The HTTP examples: httpx as client, an ASGI application as server, and foreign peers of both."""

import runpy
import shutil
import ssl
import subprocess
from pathlib import Path

import httpx
import pytest
import trio

from hybridkex import (
    ClientConfig,
    DevCa,
    Policy,
    Requirement,
    ServerConfig,
    TrustStore,
)

EXAMPLES = Path(__file__).parents[2] / "examples"
server_example = runpy.run_path(str(EXAMPLES / "asgi_server.py"), run_name="asgi_server")
client_example = runpy.run_path(str(EXAMPLES / "httpx_client.py"), run_name="httpx_client")
serve_asgi, hello = server_example["serve_asgi"], server_example["hello"]
secure_transport = client_example["secure_transport"]

CA = DevCa.create()
OURS = CA.issue("localhost", "127.0.0.1")
BOTH = ("h2", "http/1.1")


def server(alpn: tuple[str, ...] = BOTH) -> ServerConfig:
    policy = Policy(post_quantum=Requirement.PREFER)
    return ServerConfig(identities=(OURS,), alpn=alpn, policy=policy)


def client(alpn: tuple[str, ...] = BOTH) -> ClientConfig:
    return ClientConfig(verifier=TrustStore.from_pem(CA.pem), alpn=alpn)


@pytest.mark.parametrize(("alpn", "version"), [(BOTH, "HTTP/2"), (("http/1.1",), "HTTP/1.1")])
async def test_httpx_and_asgi(nursery: trio.Nursery, alpn: tuple[str, ...], version: str) -> None:
    port = await nursery.start(serve_asgi, hello, 0, server())
    async with httpx.AsyncClient(transport=secure_transport(client(alpn))) as http:
        for _ in range(3):
            answer = await http.post(f"https://localhost:{port}/x", content=b"a" * 300_000)
            assert answer.http_version == version
            number = version.partition("/")[2].removesuffix(".0")
            assert answer.text == f"POST /x HTTP/{number} 300000\n"
            session = answer.extensions["network_stream"].get_extra_info("session")
            assert session.post_quantum
    nursery.cancel_scope.cancel()


async def test_many_requests_at_once(nursery: trio.Nursery) -> None:
    port = await nursery.start(serve_asgi, hello, 0, server())
    done = []
    async with httpx.AsyncClient(transport=secure_transport(client())) as http:

        async def one(number: int) -> None:
            answer = await http.get(f"https://localhost:{port}/{number}")
            done.append(answer.text == f"GET /{number} HTTP/2 0\n")

        async with trio.open_nursery() as requests:
            for number in range(30):
                requests.start_soon(one, number)
    assert done == [True] * 30
    nursery.cancel_scope.cancel()


async def test_httpx_says_why_there_is_no_channel(nursery: trio.Nursery) -> None:
    port = await nursery.start(serve_asgi, hello, 0, server())
    stranger = ClientConfig(verifier=TrustStore.from_pem(DevCa.create().pem), alpn=BOTH)
    async with httpx.AsyncClient(transport=secure_transport(stranger)) as http:
        with pytest.raises(httpx.ConnectError, match=r"authorit|issuer|certificate"):
            await http.get(f"https://localhost:{port}/")
        with pytest.raises(httpx.ConnectError):
            await http.get("https://localhost:1/")
    nursery.cancel_scope.cancel()


@pytest.mark.parametrize(("option", "number"), [("--http1.1", "1.1"), ("--http2", "2")])
async def test_curl(nursery: trio.Nursery, tmp_path: Path, option: str, number: str) -> None:
    if (curl := shutil.which("curl")) is None:
        pytest.skip("curl is not installed")
    (tmp_path / "ca.pem").write_bytes(CA.pem)
    port = await nursery.start(serve_asgi, hello, 0, server())
    made = await trio.run_process(
        [
            *(curl, "-sS", option, "--cacert", str(tmp_path / "ca.pem"), "--max-time", "20"),
            *("--noproxy", "*", "--data-binary", "abc", f"https://localhost:{port}/y"),
        ],
        capture_stdout=True,
        stderr=subprocess.STDOUT,
        check=False,
    )
    assert made.stdout.decode() == f"POST /y HTTP/{number} 3\n"
    nursery.cancel_scope.cancel()


async def test_the_standard_library_as_client(nursery: trio.Nursery) -> None:
    port = await nursery.start(serve_asgi, hello, 0, server())
    trust = ssl.create_default_context(cadata=CA.pem.decode())
    async with httpx.AsyncClient(verify=trust, trust_env=False) as http:
        answer = await http.get(f"https://localhost:{port}/z")
    assert answer.text == "GET /z HTTP/1.1 0\n"
    nursery.cancel_scope.cancel()
