"""Hostile peers at every port that the commands open, drawn from a seed.

Each service of :mod:`interop.faults.services` is started; strangers of the kinds in :data:`MEMBERS`
(and :data:`LINK_MEMBERS`) come to each of its ports. Then the service must answer as before, hold
no more descriptors and little more memory, and have written no traceback and no flood of log lines.
A KME's keys are checked by its service: none is delivered twice.
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

from hybridkex import (
    ClientConfig,
    ClientConnection,
    DevCa,
    Identity,
    InsecureNoVerification,
    Policy,
    Requirement,
    TrustStore,
)
from hybridkex.auth.dev_ca import write_identity
from hybridkex.errors import HybridkexError
from hybridkex.link.authentication import Signatures
from hybridkex.link.greeting import CHALLENGE, GREETING, KINDS, NUMBER
from hybridkex.link.ledger import Direction
from hybridkex.link.wire import HEADER, LIMITS, Type
from hybridkex.tls.events import SessionProposed
from interop.faults.services import SERVICES, Service
from interop.faults.world import Broken, World

__all__ = ["LINK_MEMBERS", "MEMBERS", "attack", "listening_ports"]

AT_ONCE: Final = 24
"""Strangers that stay connected to a port."""
GROWTH: Final = 48 << 20
"""Bytes by which the resident memory of a process may grow."""

Member = Callable[[socket.socket, random.Random, "Material"], None]


class Material:
    """What the strangers use.

    Args:
        folder: for files.
        service: that they come to; some of them have the credentials of peers that it trusts.
    """

    def __init__(self, folder: Path, service: Service) -> None:
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
        self.insiders: Final = [
            Identity.from_files(one / "cert.pem", one / "key.pem") for one in service.insiders
        ]
        self.bob: Final = Signatures.from_files(*service.link) if service.link else None
        self.nobody: Final = Signatures(junk.signing_key, junk.leaf.public_key())


def _silence(one: socket.socket, choice: random.Random, material: Material) -> None:
    """Connect and send nothing."""


def _reset(one: socket.socket, choice: random.Random, material: Material) -> None:
    """Connect and reset at once."""
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
    """Random bytes, and lengths that announce more than follows."""
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
    """A ClientHello that stops, or is altered, or comes a byte at a time."""
    hello = bytearray(material.hello)
    kind = choice.randrange(3)
    if kind == 0:
        del hello[choice.randrange(len(hello)) :]
    elif kind == 1:
        hello[choice.randrange(len(hello))] ^= 1 << choice.randrange(8)
    else:
        one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in hello[:300]:
            one.sendall(bytes([byte]))
        return
    one.sendall(hello)


def _reset_in_handshake(one: socket.socket, choice: random.Random, material: Material) -> None:
    """A reset in the middle of a handshake: in a flight of the client's, or in the server's."""
    hello = material.hello
    if choice.random() < 0.5:
        one.sendall(hello[: choice.randrange(1, len(hello))])
    else:
        one.sendall(hello)
        one.settimeout(1)
        one.recv(choice.randrange(1, 2000))
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


def _insider(one: socket.socket, choice: random.Random, material: Material) -> None:
    """A peer with a certificate that the service trusts: of an SAE, of a KME, of a client. After
    its handshake it is silent, breaks HTTP off, floods, sends rubbish or resets."""
    identity = choice.choice(material.insiders)
    config = ClientConfig(
        verifier=InsecureNoVerification(),
        identity=identity,
        policy=Policy(post_quantum=Requirement.PREFER),
    )
    channel = ClientConnection(config, "localhost")
    channel.start()
    one.settimeout(2)
    while not channel.handshake_complete:
        event = channel.next_event()
        one.sendall(channel.data_to_send())
        if isinstance(event, SessionProposed):
            channel.accept()
        elif event is None:
            data = one.recv(1 << 16)
            if not data:
                return
            channel.receive_data(data)
    one.sendall(channel.data_to_send())
    path = choice.choice(
        [
            "/api/v1/keys/bob/enc_keys",
            "/api/v1/keys/alice/dec_keys",
            "/kmapi/v1/ext_keys",
            "/kmapi/v1/void",
        ]
    )
    body = choice.choice([b"", b"{", b"[" * 5000, b'{"number":1e400}', b'{"key_IDs":[{}]}'])
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: "
    said = (
        b"",
        head.encode()[: choice.randrange(1, len(head))],
        f"{head}{len(body) + choice.choice([0, 1, 99_999])}\r\n\r\n".encode() + body,
        f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode() * 50,
        choice.randbytes(choice.randrange(1, 20_000)),
    )
    channel.send_data(choice.choice(said))
    one.sendall(channel.data_to_send())
    end = choice.randrange(3)
    if end == 0:
        _reset(one, choice, material)
    elif end == 1:
        channel.send_close()
        one.sendall(channel.data_to_send())


def _greeting(one: socket.socket, choice: random.Random, material: Material) -> None:
    """A greeting for the port of a QKD link, with the signature of another key, or without end."""
    first = choice.choice(KINDS) + choice.randbytes(NUMBER)
    one.settimeout(0.5)
    if choice.random() < 0.3:
        one.sendall(first * 2)
    else:
        for byte in first:
            one.sendall(bytes([byte]))
    challenge = one.recv(CHALLENGE, socket.MSG_WAITALL)
    parts = [GREETING, first[:1], first[1:], challenge]
    signature = material.nobody.tag(Direction.BOB_TO_ALICE, parts)
    said = (
        len(signature).to_bytes(2) + signature,
        b"\xff\xff" + choice.randbytes(choice.randrange(65_536)),
        b"\0\0",
        len(signature).to_bytes(2) + signature[: choice.randrange(len(signature))],
    )
    one.sendall(choice.choice(said))


def _bob(one: socket.socket, choice: random.Random, material: Material) -> None:
    """A party of a QKD link with Bob's key: both channels under one name or the same one twice, and
    then frames that are odd, cut, of another version or of the greatest length, or none."""
    assert material.bob is not None
    number = choice.randbytes(NUMBER)
    pairs = [KINDS, KINDS[::-1], (b"C", b"C"), (b"Q", b"Q")]
    streams = [one, socket.create_connection(one.getpeername(), 0.5)]
    try:
        for stream, kind in zip(streams, choice.choice(pairs), strict=True):
            stream.settimeout(0.5)
            stream.sendall(kind + number)
            challenge = stream.recv(CHALLENGE, socket.MSG_WAITALL)
            parts = [GREETING, kind, number, challenge]
            signature = material.bob.tag(Direction.BOB_TO_ALICE, parts)
            stream.sendall(len(signature).to_bytes(2) + signature)
            _frames(stream, choice)
        if choice.random() < 0.5:
            _reset(one, choice, material)
        else:
            time.sleep(choice.uniform(0, 0.3))
    finally:
        streams[1].close()


def _frames(one: socket.socket, choice: random.Random) -> None:
    """Send frames that are no messages of a link, or do not fit."""
    spot = struct.pack(">QQ", choice.randrange(1 << 64), (1 << 64) - 1)
    hello = bytes([choice.choice([0, 1, 2, 3, 255]), choice.randrange(3)]) + choice.randbytes(64)
    bodies = (hello, hello + spot, hello + bytes(16) + spot, hello * 2, b"", choice.randbytes(128))
    for _ in range(choice.randrange(4)):
        kind = choice.choice([*Type, 0, 10, 255])
        body = choice.choice(bodies)
        longest = LIMITS.get(kind, 1 << 20) + choice.choice([-1, 0, 1])
        length = choice.choice([len(body), len(body), len(body) + 1, longest, (1 << 32) - 1])
        one.sendall(HEADER.pack(kind, length) + body)
    if choice.random() < 0.3:  # of a length that is allowed, to its end
        kind = choice.choice([Type.TAG, Type.REPORT])
        one.sendall(HEADER.pack(kind, LIMITS[kind]) + bytes(LIMITS[kind]))


MEMBERS: Final[tuple[Member, ...]] = (
    _silence,
    _reset,
    _head,
    _half_request,
    _junk,
    _half_hello,
    _reset_in_handshake,
    _long_name,
    _junk_certificate,
    _insider,
)
"""The kinds of strangers for every port."""
LINK_MEMBERS: Final[tuple[Member, ...]] = (_reset, _junk, _greeting, _bob)
"""The kinds of strangers for every port of a service with a QKD link."""


def listening_ports(service: Service) -> list[int]:
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
    members: Sequence[Member] | None = None,
) -> dict[str, Any]:
    """Send strangers to every port of a service.

    Args:
        kind: the service.
        seed: what the strangers do depends on it alone.
        rounds: how often each kind comes to each port.
        tell: is told what was done.
        members: what they do; all that there is if ``None``.

    Raises:
        Broken: the service did not come through.
    """
    choice = random.Random(f"{seed} {kind.name}")
    with tempfile.TemporaryDirectory(prefix="hostile-") as place:
        world = World(Path(place) / "world")
        held: list[socket.socket] = []
        try:
            service = kind(world)
            material = Material(Path(place), service)
            service.start()
            ports = listening_ports(service)
            before = {one.pid: _resident(one.pid) for one in service.processes}
            began = time.monotonic()
            if members is None:
                members = MEMBERS + (LINK_MEMBERS if service.link else ())
            order = [(port, member) for port in ports for member in members] * rounds
            choice.shuffle(order)
            for process in service.processes:
                process.lines_allowed += service.lines_each * len(order)
            for port, member in order:
                with contextlib.suppress(
                    OSError, HybridkexError
                ):  # the service may do to them what it likes
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
                "ports": len(ports),
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
    """The kinds with these names, or all."""
    return [one for one in SERVICES if not names or one.name in names]
