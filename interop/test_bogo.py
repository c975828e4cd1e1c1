"""Runs BoGo if its runner has been built; always tests the parts of the shim."""

import json
import os
import socket
import subprocess
import tempfile
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from hybridkex import TrustStore
from hybridkex.auth import DevCa
from hybridkex.tls.config import ClientConfig
from hybridkex.tls.connection import ClientConnection
from hybridkex.tls.events import ApplicationData, SessionProposed
from hybridkex.tls.policy import Policy, Requirement
from interop.bogo.launch import launcher
from interop.bogo.results import CONFIG, Outcome, run

RUNNER = os.environ.get("HYBRIDKEX_BOGO_RUNNER")


@pytest.mark.skipif(
    RUNNER is None,
    reason="HYBRIDKEX_BOGO_RUNNER names no runner: build ssl/test/runner of BoringSSL with "
    "`go test -c` and name it there",
)
def test_bogo() -> None:
    results = run(Path(RUNNER or ""))
    assert results.of(Outcome.FAILED) == []
    assert results.without_reason() == []
    assert len(results.of(Outcome.PASSED)) > 800


def test_every_exception_has_a_reason() -> None:
    config = json.loads(CONFIG.read_text())
    assert all(len(reason) > 5 for reason in config["DisabledTests"].values())
    assert all(len(reason) > 5 and names for reason, names in config["NotSupported"].items())
    assert all(one["sees"] and "RFC" in one["because"] for one in config["OtherAlerts"].values())


def _talk(peer: socket.socket, trust: TrustStore) -> bytes:
    """Run the handshake, send hello, and return the answer."""
    policy = Policy(post_quantum=Requirement.PREFER)
    client = ClientConnection(ClientConfig(verifier=trust, policy=policy), "localhost")
    client.start()
    sent = False
    while True:
        peer.sendall(client.data_to_send())
        event = client.next_event()
        if isinstance(event, SessionProposed):
            client.accept()
        elif isinstance(event, ApplicationData):
            client.send_close()
            peer.sendall(client.data_to_send())
            return bytes(event.data)
        if client.handshake_complete and not sent:
            sent = True
            client.send_data(b"hello")
        elif event is None:
            client.receive_data(peer.recv(1 << 16))


def test_the_shim_serves_a_test() -> None:
    """Do what the runner does: listen, start the shim with flags, read its ID, speak TLS."""
    ca = DevCa.create()
    identity = ca.issue("localhost")
    with tempfile.TemporaryDirectory() as name, socket.create_server(("127.0.0.1", 0)) as listener:
        folder = Path(name)
        certificate, key = folder / "cert.pem", folder / "key.pem"
        certificate.write_bytes(identity.leaf.public_bytes(Encoding.PEM))
        key.write_bytes(
            identity.private_key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        )
        with launcher(folder) as shim:
            port = str(listener.getsockname()[1])
            flags = ["-server", "-port", port, "-shim-id", "7"]
            flags += ["-cert-file", str(certificate), "-key-file", str(key)]
            process = subprocess.Popen([shim, *flags])
            accepted, _ = listener.accept()
            with accepted:
                assert accepted.recv(8) == (7).to_bytes(8, "little")
                got = _talk(accepted, TrustStore((ca.certificate,)))
            assert got == bytes(byte ^ 0xFF for byte in b"hello")
            assert process.wait(10) == 0
            assert subprocess.run([shim, "-no-such-flag"], check=False).returncode == 89
