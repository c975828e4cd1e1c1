"""The commonest failure of all: a server that has no post-quantum group."""

import socket
import threading
from pathlib import Path

import pytest
from forked import Forkserver, one_line

HANDSHAKE_FAILURE = bytes.fromhex("15030300020228")


@pytest.mark.parametrize("answer", [HANDSHAKE_FAILURE, b""])
def test_the_option_is_named(hybridkex: Forkserver, keys: Path, answer: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        port = server.getsockname()[1]
        done = hybridkex.run("connect", "127.0.0.1", port, "--ca", keys / "ca.pem")
        thread.join()
    assert done.returncode == 1
    assert "--groups X25519MLKEM768,x25519" in one_line(done.stderr)
