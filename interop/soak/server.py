"""The server under load, in a separate process: ``python -m interop.soak.server DEADLINE``.

Writes its port, then echoes all data. It answers each line of standard input with a line of JSON:
its memory, open files and connections. It ends when standard input is closed.
"""

import gc
import json
import os
import resource
import sys
from functools import partial
from pathlib import Path

import trio

from hybridkex import DevCa, SecureListener, SecureStream, ServerConfig

PAGE = resource.getpagesize()


def usage(connections: int, failed: int) -> dict[str, int]:
    """What this process holds now; garbage is collected first."""
    gc.collect()
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * PAGE
    files = len(os.listdir("/proc/self/fd"))
    tasks = trio.lowlevel.current_statistics().tasks_living
    return {
        "resident": resident,
        "files": files,
        "tasks": tasks,
        "connections": connections,
        "failed": failed,
    }


async def main(deadline: float) -> None:
    ca = DevCa.create()
    config = ServerConfig(identities=(ca.issue("localhost"),))
    open_now = failed = 0

    async def handle(stream: SecureStream[trio.SocketStream]) -> None:
        nonlocal open_now, failed
        open_now += 1
        try:
            await stream.do_handshake()
            while data := await stream.receive_some():
                await stream.send_all(data)
            await stream.aclose()
        except trio.BrokenResourceError:
            failed += 1
            await trio.aclose_forcefully(stream)
        finally:
            open_now -= 1

    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1", backlog=4096)
    secure = [SecureListener(one, config, handshake_timeout=deadline) for one in listeners]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(trio.serve_listeners, handle, secure))
        port = listeners[0].socket.getsockname()[1]
        print(json.dumps({"port": port, "ca": ca.pem.decode()}), flush=True)
        while await trio.to_thread.run_sync(sys.stdin.readline):
            print(json.dumps(usage(open_now, failed)), flush=True)
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    trio.run(main, float(sys.argv[1]))
