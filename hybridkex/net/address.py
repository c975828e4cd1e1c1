"""Addresses to listen on or connect to: ``HOST:PORT``, ``[2001:db8::1]:PORT``, ``unix:/path``."""

from dataclasses import dataclass

from hybridkex.errors import ConfigError


@dataclass(frozen=True)
class TcpAddress:
    """A host name or an IP address, and a port."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True)
class UnixAddress:
    path: str

    def __str__(self) -> str:
        return f"unix:{self.path}"


Address = TcpAddress | UnixAddress


def parse_address(text: str) -> Address:
    """Parse an address of either kind. Raises ``ConfigError``."""
    if not text.startswith("unix:"):
        return parse_tcp_address(text)
    path = text.removeprefix("unix:")
    # 108 bytes with the terminating zero is what sockaddr_un holds on Linux.
    if not path or "\0" in path or len(path.encode("utf-8", "surrogateescape")) > 107:
        raise ConfigError(f"{text!r}: the path of a Unix socket must have 1 to 107 bytes")
    return UnixAddress(path)


def parse_tcp_address(text: str, *, default_port: int | None = None) -> TcpAddress:
    """Parse ``HOST:PORT``; the port is optional if there is a default. Raises ``ConfigError``."""
    if text.startswith("["):
        host, bracket, rest = text[1:].partition("]")
        separator, port = rest[:1], rest[1:]
        whole = bool(bracket) and separator in ("", ":")
    else:
        host, separator, port = text.partition(":")
        whole = ":" not in port
    if not whole:
        raise ConfigError(f"{text!r} is not HOST:PORT; write an IPv6 address in brackets")
    if not host or not host.isprintable():
        raise ConfigError(f"{text!r} has no host")
    try:
        host.encode("idna" if host.isascii() else "utf-8")
    except UnicodeError:
        raise ConfigError(f"{host!r} is not a host: each label must have 1 to 63 bytes") from None
    if not separator and default_port is not None:
        return TcpAddress(host, default_port)
    if not (port.isascii() and port.isdigit() and int(port) < 1 << 16):
        raise ConfigError(f"{text!r} is not HOST:PORT, with a port up to 65535")
    return TcpAddress(host, int(port))
