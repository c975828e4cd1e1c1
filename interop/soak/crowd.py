"""Measures how long a crowd at one port delays the clients of another address.

A process of its own connects as fast as it can from one address, or from many; each connection
behaves as its kind says, and stays open. The server is stopped for a second, so that the crowd is
in its queue when the first honest client connects. Then the server continues, and clients of
another address use it again and again; each answer is timed.
"""

import contextlib
import multiprocessing
import selectors
import signal
import socket
import struct
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, Final

from hybridkex import ClientConfig, ClientConnection, DevCa, TrustStore
from interop.faults.services import Kme, Listen, Service, TunnelListen
from interop.faults.world import World
from interop.soak.load import raise_file_limit

__all__ = ["CROWDS", "DOORS", "crowd"]

DOORS: Final[tuple[type[Service], ...]] = (Listen, Kme, TunnelListen)
"""The services that begin with a handshake."""
AHEAD: Final = 1.0
"""Seconds from the start of the crowd to the first honest client; the server is stopped."""
GOES_ON: Final = 0.1
"""Seconds from then until the server continues."""
OPENING: Final = 500
"""Connections for which the attacker waits at once, for connect(2) or for an answer."""


def _hello() -> bytes:
    config = ClientConfig(verifier=TrustStore.from_pem(DevCa.create().pem))
    channel = ClientConnection(config, "localhost")
    channel.start()
    return bytes(channel.data_to_send())


CROWDS: Final[dict[str, Callable[[bytes], bytes]]] = {
    "silent": lambda hello: b"",
    "byte": lambda hello: hello[:1],
    "half": lambda hello: hello[: len(hello) // 2],
    "whole": lambda hello: hello,
    "reset": lambda hello: hello,
}
"""The bytes that each connection of a crowd sends. ``reset``: reset after the first answer."""


class _Attacker:
    """Opens the connections of a crowd."""

    def __init__(self, port: int, kind: str, addresses: list[str]) -> None:
        self._to = ("127.0.0.1", port)
        self._said = CROWDS[kind](_hello())
        self._resets = kind == "reset"
        self._addresses = addresses
        self._selector = selectors.DefaultSelector()
        self._held: list[socket.socket] = []
        self._opened = 0

    def run(self, count: int) -> float:
        """Open ``count`` connections; returns the seconds it took."""
        began = time.monotonic()
        while self._opened < count and time.monotonic() - began < 60:
            while self._opened < count and len(self._selector.get_map()) < OPENING:
                self._open()
            self._look(0.1)
        while self._selector.get_map() and time.monotonic() - began < 60:
            self._look(0.1)
        return time.monotonic() - began

    def _open(self) -> None:
        one = socket.socket()
        one.setblocking(False)
        one.setsockopt(socket.IPPROTO_IP, socket.IP_BIND_ADDRESS_NO_PORT, 1)
        one.bind((self._addresses[self._opened % len(self._addresses)], 0))
        one.connect_ex(self._to)
        self._selector.register(one, selectors.EVENT_WRITE)
        self._opened += 1

    def _look(self, seconds: float) -> None:
        for key, events in self._selector.select(seconds):
            one = key.fileobj
            assert isinstance(one, socket.socket)
            if events & selectors.EVENT_READ:
                self._selector.unregister(one)
                one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                one.close()
                continue
            with contextlib.suppress(OSError):
                one.send(self._said)
            if self._resets:
                self._selector.modify(one, selectors.EVENT_READ)
            else:
                self._selector.unregister(one)
                self._held.append(one)


def _attack(port: int, kind: str, count: int, addresses: list[str], told: Any) -> None:
    raise_file_limit()
    attacker = _Attacker(port, kind, addresses)  # its connections stay as long as it does
    told.send(attacker.run(count))
    told.recv()


def crowd(
    service: type[Service],
    kind: str,
    count: int,
    *,
    addresses: int = 1,
    own: bool = False,
    stays: float = 5.0,
) -> dict[str, Any]:
    """Send a crowd to a service and measure what others see of it.

    Args:
        service: one of :data:`DOORS`.
        kind: one of :data:`CROWDS`.
        count: connections.
        addresses: from which they come.
        own: whether the crowd comes from the address of the good client.
        stays: seconds for which the service is asked after the last connection was opened.

    Returns:
        Seconds of the median and the slowest answer before and during, and how many failed.
    """
    first = 1 if own else 2
    numbers = range(first, first + addresses)
    sources = [f"127.0.{number // 250}.{number % 250 + (number >= 250)}" for number in numbers]
    with tempfile.TemporaryDirectory(prefix="crowd-") as place:
        world = World(Path(place) / "world")
        try:
            served = service(world)
            served.start()
            before = [_seconds(served) for _ in range(5)]
            ours, theirs = multiprocessing.Pipe()
            attacker = multiprocessing.Process(
                target=_attack, args=(served.port, kind, count, sources, theirs)
            )
            during = []
            ends = float("inf")
            took = 0.0
            # The crowd comes first, as if the server had been busy for a moment.
            for process in served.processes:
                process.signal(signal.SIGSTOP)
            attacker.start()
            time.sleep(AHEAD)
            for process in served.processes:
                threading.Timer(GOES_ON, process.signal, [signal.SIGCONT]).start()
            try:
                while time.monotonic() < ends:
                    during.append(_seconds(served))
                    if ours.poll():
                        took = ours.recv()
                        ends = time.monotonic() + stays
                    time.sleep(0.05)
            finally:
                ours.send(None)
                attacker.join()
            for process in served.processes:
                process.lines_allowed += 1000
        finally:
            world.close()
    good = [one for one in during if one is not None]
    return {
        "service": service.name,
        "kind": kind,
        "connections": count,
        "addresses": addresses,
        "own address": own,
        "connecting": round(took, 1),
        "asked": len(during),
        "failed": len(during) - len(good),
        "before": round(median(one or 99.0 for one in before), 3),
        "median": round(median(good), 3) if good else None,
        "slowest": round(max(good), 3) if good else None,
    }


def _seconds(served: Service) -> float | None:
    began = time.monotonic()
    try:
        served.ask()
    except Exception:  # it was refused, or waited for too long
        return None
    return time.monotonic() - began
