"""Listening on names: every address that the machine has, none that it lacks."""

import errno
import re
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import trio

import hybridkex
from hybridkex.apps.tunnel.sockets import listen
from hybridkex.errors import ConfigError
from hybridkex.net.address import TcpAddress, UnixAddress
from hybridkex.net.listening import open_tcp_listeners

HERE = "127.0.0.1"
ABSENT = "192.0.2.1"  # RFC 5737: nobody's
ABSENT_6 = "2001:db8::1"  # RFC 3849


class Names(trio.abc.HostnameResolver):
    """``sites.example`` has the addresses that a test chooses."""

    def __init__(self, *addresses: str) -> None:
        self.addresses = addresses

    async def getaddrinfo(self, host: Any, port: Any, *rest: Any, **more: Any) -> Any:
        assert host in ("sites.example", b"sites.example")
        return [
            found
            for address in self.addresses
            for found in socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)
        ]

    async def getnameinfo(self, *args: Any) -> Any:
        raise NotImplementedError


async def _tunnel() -> list[trio.SocketListener]:
    return list((await listen(TcpAddress("sites.example", 0), mode=0o600)).listeners)


OPENERS: list[Callable[[], Awaitable[list[Any]]]] = [
    lambda: open_tcp_listeners(0, host="sites.example"),
    lambda: open_tcp_listeners(0, host=b"sites.example", backlog=5),
    _tunnel,
]


@pytest.mark.parametrize("opener", OPENERS)
@pytest.mark.parametrize(
    "addresses", [(HERE,), (ABSENT, HERE), (HERE, ABSENT), (ABSENT_6, HERE, ABSENT)]
)
async def test_addresses_that_this_machine_lacks_are_left_out(
    opener: Callable[[], Awaitable[list[Any]]], addresses: tuple[str, ...]
) -> None:
    trio.socket.set_custom_hostname_resolver(Names(*addresses))
    listeners = await opener()
    try:
        assert [one.socket.getsockname()[0] for one in listeners] == [HERE]
    finally:
        for one in listeners:
            await one.aclose()


async def test_a_name_of_other_machines_alone_is_refused() -> None:
    trio.socket.set_custom_hostname_resolver(Names(ABSENT, ABSENT_6))
    with pytest.raises(OSError) as caught:
        await open_tcp_listeners(0, host="sites.example")
    assert caught.value.errno == errno.EADDRNOTAVAIL


async def test_a_port_in_use_is_refused_and_no_socket_stays_open() -> None:
    (taken,) = await trio.open_tcp_listeners(0, host="127.0.0.2")
    port = taken.socket.getsockname()[1]
    trio.socket.set_custom_hostname_resolver(Names(ABSENT, HERE, "127.0.0.2"))
    with pytest.raises(OSError) as caught:
        await open_tcp_listeners(port, host="sites.example")
    assert caught.value.errno == errno.EADDRINUSE
    with socket.socket() as again:
        again.bind((HERE, port))
    await taken.aclose()


async def test_a_file_in_the_place_of_a_socket_is_told_once(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    with pytest.raises(ConfigError) as caught:
        await listen(UnixAddress(str(path)), mode=0o600)
    assert str(caught.value).count("cannot listen on") == 1


def test_every_server_listens_here() -> None:
    root = Path(hybridkex.__file__).parent
    others = [
        path.relative_to(root).as_posix()
        for path in sorted(root.rglob("*.py"))
        if re.search(r"trio\.open_tcp_listeners\(", path.read_text(encoding="utf-8"))
    ]
    assert others == ["net/listening.py"]
