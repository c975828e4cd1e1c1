"""Headless Chromium as a client (BoringSSL)."""

import base64
import hashlib
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import trio
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from interop.matrix.peer import Peer, PeerFailed, Running
from interop.matrix.peers.commands import find, key_log, run, version_of
from interop.matrix.peers.reasons import OVER_HTTP
from interop.matrix.task import Material, Report, Task, digest

__all__ = ["PEER"]

# It says its text in as many POSTs as there are connections, and writes what it heard into the
# document.
PAGE: Final = b"""<!doctype html><title>interop</title><pre id="heard"></pre><script>
const [connections, size] = location.search.slice(1).split('-').map(Number);
let said = '';
for (let n = 0; said.length < size; n++) said += `client ${String(n).padStart(8, '0')}\\n`;
for (let times = connections; times; times--) {
  const request = new XMLHttpRequest();
  request.open('POST', '/', false);
  request.send(said);
  document.getElementById('heard').textContent = request.responseText;
}
</script>"""


class _Chromium:
    def __init__(self, path: str, version: str) -> None:
        self._path = path
        self.version = version

    async def connect(self, task: Task) -> list[Report]:
        with TemporaryDirectory(prefix="interop-") as name:
            return await self._fetch(task, Path(name))

    async def _fetch(self, task: Task, folder: Path) -> list[Report]:
        keys = folder / "keys"
        command = [
            self._path,
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--in-process-gpu",
            "--disable-extensions",
            "--disable-component-extensions-with-background-pages",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--no-proxy-server",
            "--password-store=basic",
            f"--user-data-dir={folder / 'profile'}",
            f"--ssl-key-log-file={keys}",
            # Nothing else of what it would like to ask on its own gets out.
            f"--host-resolver-rules=MAP {task.server_name} 127.0.0.1, MAP * ~NOTFOUND",
            f"--ignore-certificate-errors-spki-list={_pin(task.expected)}",
            "--dump-dom",
            f"https://{task.server_name}:{task.port}/?{task.connections}-{task.size}",
        ]
        done = await run(command)
        heard = re.search(rb'<pre id="heard">([^<]*)</pre>', done.stdout)
        if heard is None:
            raise PeerFailed((done.stderr or done.stdout)[-600:].decode(errors="replace"))
        return [Report(received=digest(heard[1]), key_log=log) for log in key_log(keys)]

    async def serve(
        self, task: Task, *, task_status: trio.TaskStatus[int] = trio.TASK_STATUS_IGNORED
    ) -> list[Report]:
        raise PeerFailed("Chromium is a client")


def _pin(expected: Material | None) -> str:
    """The server's public key, which this Chromium takes in place of a chain that it trusts."""
    assert expected is not None
    leaf = x509.load_pem_x509_certificates(Path(expected.chain).read_bytes())[0]
    key = leaf.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return base64.b64encode(hashlib.sha256(key).digest()).decode()


@asynccontextmanager
async def _open() -> AsyncIterator[Running]:
    path = find("chromium", "apt-get install chromium")
    yield _Chromium(path, await version_of(path, "--version"))


PEER: Final = Peer(
    name="Chromium",
    open=_open,
    http=True,
    page=PAGE,
    note="over HTTP; takes the server's public key in place of a chain that it trusts",
    lacks={
        "server *": "a client alone",
        "client retry from x25519 to X25519MLKEM768": "it sends shares of both",
        "client group MLKEM*": "not offered",
        "client group SecP*": "not offered",
        "client certificate ed25519": "not offered",
        "client certificate mldsa*": "not offered",
        # Where the first connection takes more than a moment, a second one is begun beside it.
        "client resumption": "resumes, but may open its second connection before it has a session",
        "client client certificate": "it takes client certificates from its user's store alone",
    }
    | OVER_HTTP,
)
