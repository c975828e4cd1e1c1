"""Headless Chromium as a client (BoringSSL)."""

import base64
import hashlib
import json
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import trio

from interop.matrix.peer import Peer, PeerFailed, Running
from interop.matrix.peers.commands import find, key_log, version_of
from interop.matrix.peers.reasons import OVER_HTTP
from interop.matrix.task import Report, Task, digest

__all__ = ["PEER"]

LOGGED: Final = (
    "CLIENT_HANDSHAKE_TRAFFIC_SECRET",
    "SERVER_HANDSHAKE_TRAFFIC_SECRET",
    "CLIENT_TRAFFIC_SECRET_0",
    "SERVER_TRAFFIC_SECRET_0",
    "EXPORTER_SECRET",
)
"""What the key log has of a connection."""

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
    """A process that speaks the DevTools Protocol over its descriptors 3 and 4. It takes one task
    after the other, each in a context of its own: nothing of a session is left to the next."""

    def __init__(self, process: trio.Process, keys: Path, version: str) -> None:
        self._process, self._keys = process, keys
        self.version = version
        self._one_task = trio.Lock()
        self._buffer = bytearray()
        self._events: list[str] = []
        self._calls = 0

    async def connect(self, task: Task) -> list[Report]:
        origin = f"https://{task.server_name}:{task.port}"
        async with self._one_task:
            before = len(key_log(self._keys))
            context = (await self._call("Target.createBrowserContext"))["browserContextId"]
            try:
                session = await self._page(context, f"{origin}/?{task.connections}-{task.size}")
                heard = await self._heard(session)
                chain = await self._call("Network.getCertificate", session, origin=origin)
                logs = await self._logged(before, task.connections)
            finally:
                with trio.CancelScope(shield=True), trio.move_on_after(5):
                    await self._call("Target.disposeBrowserContext", browserContextId=context)
        leaf = hashlib.sha256(base64.b64decode(chain["tableNames"][0])).hexdigest()
        return [Report(peer=leaf, received=digest(heard), key_log=log) for log in logs]

    async def serve(
        self, task: Task, *, task_status: trio.TaskStatus[int] = trio.TASK_STATUS_IGNORED
    ) -> list[Report]:
        raise PeerFailed("Chromium is a client")

    async def _page(self, context: str, url: str) -> str:
        """Load the page to its end, and with that run its script; returns the session with it."""
        # Hidden: a window, with what belongs to it, takes more than half of the processor time.
        blank = await self._call(
            "Target.createTarget", url="about:blank", browserContextId=context, hidden=True
        )
        target = await self._call("Target.attachToTarget", targetId=blank["targetId"], flatten=True)
        session: str = target["sessionId"]
        await self._call("Page.enable", session)
        await self._call("Network.enable", session)  # or it tells no certificate
        self._events.clear()
        loading = await self._call("Page.navigate", session, url=url)
        if "errorText" in loading:
            raise PeerFailed(loading["errorText"])
        while "Page.loadEventFired" not in self._events:
            await self._message()
        return session

    async def _heard(self, session: str) -> bytes:
        read = "document.getElementById('heard').textContent"
        found = (await self._call("Runtime.evaluate", session, expression=read))["result"]
        if "value" not in found:
            raise PeerFailed(str(found)[-600:])
        return str(found["value"]).encode()

    async def _logged(self, before: int, connections: int) -> list[tuple[str, ...]]:
        """The key logs of the connections since then. Chromium writes them behind the scenes."""
        while True:
            logs = key_log(self._keys)[before:]
            if len(logs) >= connections and all(len(log) >= len(LOGGED) for log in logs):
                return logs
            await trio.sleep(0.01)

    async def _call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._calls += 1
        call = {"id": self._calls, "method": method, "params": params}
        text = json.dumps(call if session is None else call | {"sessionId": session})
        await self._process.stdin.send_all(text.encode() + b"\0")
        while (answer := await self._message()).get("id") != call["id"]:
            pass
        if "error" in answer:
            raise PeerFailed(f"{method}: {answer['error']}")
        result: dict[str, Any] = answer["result"]
        return result

    async def _message(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        while b"\0" not in self._buffer:
            data = await self._process.stdout.receive_some()
            if not data:
                raise PeerFailed("Chromium ended")
            self._buffer += data
        message, _, self._buffer = self._buffer.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        self._events.append(found.get("method", ""))
        return found


@asynccontextmanager
async def _open() -> AsyncIterator[Running]:
    path = find("chromium", "apt-get install chromium")
    version = await version_of(path, "--version")
    with TemporaryDirectory(prefix="interop-", ignore_cleanup_errors=True) as name:
        keys = Path(name) / "keys"
        command = [
            *("sh", "-c", 'exec "$@" 3<&0 4>&1 </dev/null >/dev/null', "sh"),
            path,
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
            "--remote-debugging-pipe",
            "--ignore-certificate-errors",
            f"--user-data-dir={Path(name) / 'profile'}",
            f"--ssl-key-log-file={keys}",
            # Nothing of what it would like to ask on its own gets out.
            "--host-resolver-rules=MAP * 127.0.0.1",
        ]
        process = await trio.lowlevel.open_process(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        try:
            yield _Chromium(process, keys, version)
        finally:
            process.kill()
            with trio.CancelScope(shield=True):
                await process.wait()
                for pipe in (process.stdin, process.stdout):
                    assert pipe is not None
                    await trio.aclose_forcefully(pipe)


PEER: Final = Peer(
    name="Chromium",
    open=_open,
    http=True,
    page=PAGE,
    note="over HTTP; trusts any chain, and tells the certificate",
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
