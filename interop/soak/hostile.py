"""Hostile peers at every door that the commands open, drawn from a seed.

Each service of :mod:`interop.faults.services` is started; strangers of the kinds in :data:`MEMBERS`
come to each of its ports. Then the service must answer as before, hold no more descriptors and
little more memory, and have written no traceback and no flood of log lines. A KME's keys are
checked by its service: none is delivered twice.
"""

import contextlib
import random
import socket
import ssl
import struct
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from hybridkex import ClientConfig, ClientConnection, DevCa, TrustStore
from hybridkex.auth.dev_ca import write_identity
from interop.faults.services import SERVICES, Service
from interop.faults.world import Broken, World

__all__ = ["MEMBERS", "attack", "doors"]

AT_ONCE: Final = 24
"""Strangers that stay connected at a door."""
GROWTH: Final = 48 << 20
"""Bytes of resident memory that a process may have more than before."""

Member = Callable[[socket.socket, random.Random, "Material"], None]


class Material:
    """What strangers bring with them."""

    def __init__(self, folder: Path) -> None:
        authority = DevCa.create()
        junk = authority.issue("x" * 60, *(f"{number}.{'y' * 50}.example" for number in range(60)))
        write_identity(folder / "junk", authority, junk)
        self.tls: Final = ssl.create_default_context()
        self.tls.check_hostname = False
        self.tls.verify_mode = ssl.CERT_NONE
        self.tls.load_cert_chain(folder / "junk" / "cert.pem", folder / "junk" / "key.pem")
        channel = ClientConnection(
            ClientConfig(verifier=TrustStore.from_pem(authority.pem)), "localhost"
        )
        channel.start()
        self.hello: Final = bytes(channel.data_to_send())


def _silence(one: socket.socket, choice: random.Random, material: Material) -> None:
    """Nothing at all."""


def _reset(one: socket.socket, choice: random.Random, material: Material) -> None:
    """A reset at once."""
    one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    one.close()


def _head(one: socket.socket, choice: random.Random, material: Material) -> None:
    """``curl -I``."""
    one.sendall(b"HEAD /metrics HTTP/1.1\r\nHost: x\r\n\r\n")


def _half_request(one: socket.socket, choice: random.Random, material: Material) -> None:
    """The beginning of an HTTP request, of a body, or of many requests that nobody reads."""
    get = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"
    post = b"POST /metrics HTTP/1.1\r\nHost: x\r\nContent-Length: 99999\r\n\r\n{"
    one.sendall(choice.choice([get[: choice.randrange(1, len(get))], post, get * 500]))


def _junk(one: socket.socket, choice: random.Random, material: Material) -> None:
    """Bytes by chance, and lengths that promise more."""
    kinds = (
        choice.randbytes(choice.randrange(1, 3000)),
        b"\x16\x03\x01\x40\x00" + choice.randbytes(99),
        b"\xff" * 70_000,
        struct.pack(">BI", choice.randrange(12), (1 << 27) - 1),
        bytes([choice.randrange(256)]),
        b"CQ"[choice.randrange(2) :][:1] + choice.randbytes(16),
    )
    one.sendall(choice.choice(kinds))


def _half_hello(one: socket.socket, choice: random.Random, material: Material) -> None:
    """A ClientHello that stops, or is altered; sometimes a reset in the middle of the handshake."""
    hello = bytearray(material.hello)
    kind = choice.randrange(4)
    if kind == 0:
        del hello[choice.randrange(len(hello)) :]
    elif kind == 1:
        hello[choice.randrange(len(hello))] ^= 1 << choice.randrange(8)
    one.sendall(hello)
    if kind == 2:
        with contextlib.suppress(OSError):
            one.recv(64)
        _reset(one, choice, material)


def _long_name(one: socket.socket, choice: random.Random, material: Material) -> None:
    """A server name that a ticket or an answer cannot carry."""
    length = choice.choice([255, 256, 16_000, 65_420])
    name = struct.pack(">BH", 0, length) + b"a" * length
    names = struct.pack(">HH", 0, min(len(name) + 2, 65535)) + struct.pack(">H", len(name)) + name
    body = b"\x03\x03" + bytes(32) + b"\0" + b"\0\x02\x13\x01" + b"\x01\0"
    body += struct.pack(">H", min(len(names), 65535)) + names
    message = b"\x01" + len(body).to_bytes(3) + body
    for start in range(0, len(message), 16_000):
        piece = message[start : start + 16_000]
        one.sendall(b"\x16\x03\x01" + struct.pack(">H", len(piece)) + piece)


def _junk_certificate(one: socket.socket, choice: random.Random, material: Material) -> None:
    """A whole handshake with a certificate of nobody's authority; then a byte, or silence."""
    one.settimeout(2)
    stream = material.tls.wrap_socket(one, server_hostname="localhost", suppress_ragged_eofs=True)
    if choice.random() < 0.5:
        stream.sendall(choice.randbytes(choice.choice([1, 20_000])))
    stream.close()


MEMBERS: Final[tuple[Member, ...]] = (
    _silence,
    _reset,
    _head,
    _half_request,
    _junk,
    _half_hello,
    _long_name,
    _junk_certificate,
)


def doors(service: Service) -> list[int]:
    """The TCP ports that a service listens on, as the system has them."""
    found = set()
    for process in service.processes:
        inodes = set()
        for link in Path(f"/proc/{process.pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                inodes.add(str(link.readlink()).removeprefix("socket:[").removesuffix("]"))
        for line in Path(f"/proc/{process.pid}/net/tcp").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A" and words[9] in inodes:  # TCP_LISTEN
                found.add(int(words[1].partition(":")[2], 16))
    return sorted(found)


def _check_growth(growth: int) -> None:
    if growth > GROWTH:
        raise Broken(f"{growth >> 20} MB more memory than before")


def _resident(pid: int) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * 4096


def attack(
    kind: type[Service],
    *,
    seed: int,
    rounds: int,
    tell: Callable[[str], object] = print,
    members: Sequence[Member] = MEMBERS,
) -> dict[str, Any]:
    """Strangers at every door of a service.

    Args:
        kind: the service.
        seed: what the strangers do depends on it alone.
        rounds: how often each member comes to each door.
        tell: is told what was done.
        members: what they do.

    Raises:
        Broken: the service did not come through.
    """
    choice = random.Random(f"{seed} {kind.name}")
    with tempfile.TemporaryDirectory(prefix="hostile-") as place:
        world = World(Path(place) / "world")
        material = Material(Path(place))
        held: list[socket.socket] = []
        try:
            service = kind(world)
            service.start()
            ports = doors(service)
            before = {one.pid: _resident(one.pid) for one in service.processes}
            began = time.monotonic()
            order = [(port, member) for port in ports for member in members] * rounds
            choice.shuffle(order)
            for port, member in order:
                with contextlib.suppress(OSError):  # what the service does to them is its affair
                    one = socket.create_connection(("127.0.0.1", port), 5)
                    held.append(one)
                    member(one, choice, material)
                    one.setblocking(False)
                while len(held) > AT_ONCE * len(ports):
                    held.pop(0).close()
            service.recover("strangers who are still there")
            for one in held:
                one.close()
            service.recover("strangers")
            service.check_descriptors()
            growth = max(_resident(pid) - size for pid, size in before.items())
            _check_growth(growth)
            found = {
                "service": kind.name,
                "doors": len(ports),
                "strangers": len(order),
                "seconds": round(time.monotonic() - began, 1),
                "megabytes more": round(growth / 1e6, 1),
            }
            service.stop()
            world.check_nothing_left()
        except Broken as error:
            again = f"python -m interop.soak hostile --service '{kind.name}' --seed {seed}"
            raise Broken(f"{kind.name}: {error}\nrepeat it: {again}") from None
        finally:
            for one in held:
                one.close()
            world.close()
    tell(f"{kind.name}: {found}")
    return found


def services(names: Sequence[str] | None) -> list[type[Service]]:
    """Those of these names, or all."""
    return [one for one in SERVICES if not names or one.name in names]
