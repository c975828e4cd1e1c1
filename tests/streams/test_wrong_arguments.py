"""Arguments of the wrong type are refused when they are given, in words, and leave no socket."""

import os
import socket
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from hybridkex import (
    ClientConfig,
    Identity,
    MemoryTicketStore,
    Pins,
    RawIdentity,
    SecureStream,
    ServerConfig,
    TrustStore,
    canonical_peer_name,
    open_secure_tcp_listeners,
    open_secure_tcp_stream,
    serve_secure_tcp,
)
from hybridkex.auth import DevCa
from hybridkex.errors import ConfigError

CA = DevCa.create()
ANY: Any = None
CLIENT = ClientConfig(verifier=TrustStore.from_pem(CA.pem))
SERVER = ServerConfig(identities=(CA.issue("localhost"),))
PIN = "ab" * 32


def wrong(*values: Any) -> list[Any]:
    return [*values, 5, object(), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)]


CASES: dict[str, tuple[Callable[[Any], object], list[Any]]] = {
    "TrustStore": (TrustStore, wrong("ca.pem", b"---", CA.pem, [CA.certificate], ("ca.pem",))),
    "TrustStore pins": (lambda value: TrustStore.from_pem(CA.pem, pins=value), wrong(PIN, [5])),
    "Pins": (Pins, wrong(PIN, b"\x00", [], frozenset(), [5], None)),
    "RawIdentity": (RawIdentity, wrong("key.pem", Path("key.pem"), b"---", None)),
    "Identity chain": (lambda value: Identity(value, CA.issue("a").private_key), wrong("c", b"c")),
    "Identity key": (lambda value: Identity(CA.issue("a").chain, value), wrong("k", b"k", None)),
    "MemoryTicketStore": (
        MemoryTicketStore,
        ["a", 0, -1, 1.5, None, ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)],
    ),
    "SecureStream": (lambda value: SecureStream(value, CLIENT), wrong("a", socket.socket, None)),
    "name": (canonical_peer_name, wrong(b"localhost", None)),
    "host": (lambda name: SecureStream(ANY_STREAM, CLIENT, server_hostname=name), wrong(b"a", "")),
}


class _Stream:
    async def send_all(self, data: bytes) -> None:
        raise AssertionError

    async def receive_some(self) -> bytes:
        raise AssertionError

    async def aclose(self) -> None:
        raise AssertionError


ANY_STREAM: Any = _Stream()


@pytest.mark.parametrize("what", CASES)
def test_a_wrong_argument(what: str) -> None:
    make, values = CASES[what]
    for value in values:
        with pytest.raises(ConfigError) as caught:
            make(value)
        assert PIN not in str(caught.value)


def test_a_path_in_bytes_is_a_path() -> None:
    path: Any = b"/nowhere/ca.pem"
    with pytest.raises(ConfigError, match=r"cannot read /nowhere/ca\.pem"):
        TrustStore.from_file(path)


async def test_a_wrong_configuration_opens_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(*_: object, **__: object) -> None:
        raise AssertionError("it was opened")

    for name in ("open_tcp_stream", "open_tcp_listeners"):
        monkeypatch.setattr(trio, name, opened)
    for value in wrong(SERVER, None):
        with pytest.raises(ConfigError):
            await open_secure_tcp_stream("localhost", 9, value)
    for value in wrong(CLIENT, None):
        with pytest.raises(ConfigError):
            await open_secure_tcp_listeners(0, value)
        with pytest.raises(ConfigError):
            await serve_secure_tcp(print, 0, value)  # type: ignore[arg-type]


async def test_a_wrong_name_leaves_no_socket() -> None:
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with listener:
        port = listener.socket.getsockname()[1]
        before = len(os.listdir("/proc/self/fd"))
        held = []
        for name in ("bad name", "", "127.1"):
            with pytest.raises(ConfigError) as caught:
                await open_secure_tcp_stream("127.0.0.1", port, CLIENT, server_hostname=name)
            held.append(caught)  # its traceback keeps the stream alive
        assert len(os.listdir("/proc/self/fd")) == before
