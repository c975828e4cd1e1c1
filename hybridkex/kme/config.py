"""The TOML file of ``hybridkex kme serve``; see ``docs/kme.md``."""

import dataclasses
import errno
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, Final, TypeVar, get_type_hints

from hybridkex.errors import ConfigError
from hybridkex.files import read_toml
from hybridkex.kme.settings import KmeLimits
from hybridkex.net.address import TcpAddress, parse_tcp_address
from hybridkex.net.http import HttpLimits
from hybridkex.qkd.etsi014.mutual_tls import TLS_KINDS
from hybridkex.qkd.etsi014.naming import IdRule
from hybridkex.secret import Secret

PRODUCERS: Final = ("random", "link")

_POSITIVE: Final = (
    "max_connections",
    "max_sae_connections",
    "max_peer_connections",
    "max_handshakes",
    "handshake_timeout",
    "peer_timeout",
)

T = TypeVar("T")
N = TypeVar("N", int, float)


@dataclass(frozen=True)
class PostgresUrl:
    """The URL of a key store in PostgreSQL. It may hold a password, so it is in no ``repr``."""

    url: Secret

    def __hash__(self) -> int:
        return hash(PostgresUrl)


@dataclass(frozen=True)
class RemoteEnd:
    """The other end of a link, in another process."""

    party: str
    """Our role: ``alice``, who listens, or ``bob``."""
    address: TcpAddress
    peer_credential: Path


@dataclass(frozen=True, kw_only=True)
class LinkConfig:
    """A simulated QKD link; ``docs/qkd-link.md`` explains the settings."""

    preset: str = "lim2014"
    distance_km: float = 50.0
    block_bits: int = 1_000_000
    tuned: bool = True
    """Optimise the intensities for the distance, instead of using the preset's."""
    real_time: bool = False
    """Whether detections come at the rate of the laser; otherwise as fast as they are computed."""
    bootstrap: str | None = None
    """What authenticates the first block. ``None``: ML-DSA within one process, the algorithm of
    the two certificates' keys between processes."""
    party: str | None = None
    """Our role if the other end is in another process: ``alice``, who listens, or ``bob``."""
    address: TcpAddress | None = None
    peer_credential: Path | None = None
    """The credential of the other KME; with our own it authenticates the first block. Its key is
    pinned: the dates of the certificate do not count."""
    reauthentication: str = "refuse"
    """``signatures``: re-authenticate by signature if one end has lost its authentication key."""

    @property
    def remote(self) -> "RemoteEnd | None":
        """The other end, where it is in another process."""
        if self.party is None or self.address is None or self.peer_credential is None:
            return None
        return RemoteEnd(self.party, self.address, self.peer_credential)

    def __post_init__(self) -> None:
        usual = LinkConfig  # whose values need neither a check nor the packages for it
        if (self.preset, self.distance_km, self.block_bits) != (
            usual.preset,
            usual.distance_km,
            usual.block_bits,
        ):
            from hybridkex.link.presets import preset  # noqa: PLC0415  # an extra
            from hybridkex.link.settings import LinkSettings  # noqa: PLC0415

            chosen = preset(self.preset).at(self.distance_km)
            bits = self.block_bits
            LinkSettings(preset=chosen, block_bits=bits, block_detections=bits)
        if self.address is not None and not self.address.port:
            raise ConfigError("address must have a port other than 0, which Bob can connect to")
        if self.reauthentication not in ("refuse", "signatures"):
            raise ConfigError("reauthentication must be refuse or signatures")
        if self.party not in (None, "alice", "bob"):
            raise ConfigError("party must be alice or bob")
        if {self.party is None, self.address is None, self.peer_credential is None} == {
            True,
            False,
        }:
            raise ConfigError("party, address and peer_credential must be given together")
        if self.reauthentication == "signatures" and self.party is None:
            raise ConfigError(
                'reauthentication = "signatures" applies only to a link between two processes: '
                "remove it"
            )


NO_LINK: Final = LinkConfig()
"""Stands for a table that is not in the file."""


@dataclass(frozen=True, kw_only=True)
class PeerConfig:
    """The peer KME of a link."""

    id: str
    saes: tuple[str, ...]
    url: str | None = None
    """``None``: the KME of this ID in the same file."""
    producer: str = "random"
    link: LinkConfig = NO_LINK

    def __post_init__(self) -> None:
        if self.producer not in PRODUCERS:
            raise ConfigError(f"producer must be one of {', '.join(PRODUCERS)}")
        if self.producer != "link" and self.link is not NO_LINK:
            raise ConfigError(f'{self.id}: a link table needs producer = "link"')
        if self.producer == "link" and (self.url is None) != (self.link.party is None):
            raise ConfigError(
                f"{self.id}: set party, address and peer_credential for a link to a KME in "
                "another process, and only there"
            )


@dataclass(frozen=True, kw_only=True)
class KmeConfig:
    """One KME."""

    id: str
    listen: TcpAddress
    saes: tuple[str, ...]
    ca: Path
    certificate: Path
    key: Path
    store: Path | PostgresUrl
    """A file of SQLite, or a database of PostgreSQL that several processes of this KME share."""
    key_file: Path
    """The file of the key under which the keys in the store are encrypted."""
    read_key_files: tuple[Path, ...] = ()
    """The files of earlier such keys, while some rows are still encrypted under them."""
    audit: Path | None = None
    """The folder of the audit trail; ``None``: there is none."""
    tls: str = "stdlib"
    id_rule: IdRule = IdRule.COMMON_NAME
    reuse_port: bool = False
    """Whether other processes of this KME on this machine listen at the same address."""
    self_pairs: bool = False
    not_found_status: int = 400
    max_connections: int = 256
    """Simultaneous connections of all SAEs."""
    max_sae_connections: int = 64
    """Simultaneous connections of one SAE."""
    max_peer_connections: int = 64
    """Simultaneous connections of all peer KMEs, counted separately from those of SAEs."""
    max_handshakes: int = 128
    """Simultaneous connections that have not yet authenticated."""
    handshake_timeout: float = 10.0
    peer_timeout: float = 3.0
    peer: tuple[PeerConfig, ...] = ()
    limits: KmeLimits = field(default_factory=KmeLimits)
    http: HttpLimits = field(default_factory=HttpLimits)

    def __post_init__(self) -> None:
        if self.tls not in TLS_KINDS:
            raise ConfigError(f"tls must be one of {', '.join(TLS_KINDS)}")
        for name in _POSITIVE:
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be positive")
        if len({peer.id for peer in self.peer}) != len(self.peer):
            raise ConfigError(f"{self.id} lists a peer twice")


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """All KMEs of a process."""

    kme: tuple[KmeConfig, ...]
    metrics: TcpAddress | None = None
    grace: float = 5.0
    """Seconds that requests in progress may take after the signal to stop."""

    def __post_init__(self) -> None:
        if not self.grace >= 0:
            raise ConfigError("grace cannot be negative")
        if not self.kme:
            raise ConfigError("the configuration has no [[kme]]")
        here = {kme.id: kme for kme in self.kme}
        if len(here) != len(self.kme) or len({kme.store for kme in self.kme}) != len(self.kme):
            raise ConfigError("every KME needs an ID and a store of its own")
        for kme in self.kme:
            for peer in kme.peer:
                if peer.url is None:
                    _check_pair(kme, peer, here.get(peer.id))


def _check_pair(kme: KmeConfig, peer: PeerConfig, other: KmeConfig | None) -> None:
    if other is None:
        raise ConfigError(f"{kme.id}: the peer {peer.id} has no url and is not in this file")
    back = next((one for one in other.peer if one.id == kme.id), None)
    if back is None or set(back.saes) != set(kme.saes) or set(peer.saes) != set(other.saes):
        raise ConfigError(f"{kme.id} and {peer.id} do not agree on their SAEs")
    if kme.limits.key_size != other.limits.key_size or (
        peer.producer,
        peer.link,
    ) != (back.producer, back.link):
        raise ConfigError(f"{kme.id} and {peer.id} do not agree on key_size, producer or link")


def load_config(path: Path) -> ServeConfig:
    """Read a configuration file. Paths in it are relative to its folder. Raises ``ConfigError``."""
    data = read_toml(path)
    try:
        return _build(ServeConfig, data, path.parent, "")
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _build(kind: type[T], data: object, base: Path, where: str) -> T:
    """Build a configuration class from a table, checked against the types of its fields."""
    if not isinstance(data, dict):
        raise ConfigError(f"{where.removesuffix('.') or 'the file'} must be a table")
    hints = get_type_hints(kind)
    fields = {one.name: one for one in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for name in data:
        if name not in fields:
            raise ConfigError(f"unknown setting {where}{name}")
    for name, one in fields.items():
        required = one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING
        if required and name not in data:
            raise ConfigError(f"{where}{name} is missing")
    values = {
        name: _value(hints[name], value, base, f"{where}{name}") for name, value in data.items()
    }
    try:
        return kind(**values)
    except ConfigError as error:
        raise ConfigError(f"{where.removesuffix('.')}: {error}" if where else str(error)) from None


def _value(kind: Any, value: Any, base: Path, where: str) -> Any:
    if (
        isinstance(kind, UnionType) and kind not in _SCALARS
    ):  # optional: TOML has no null, so the value has the other type
        kind = next(one for one in kind.__args__ if one is not type(None))
    if getattr(kind, "__origin__", None) is tuple:
        if not isinstance(value, list):
            raise ConfigError(f"{where} must be an array")
        return tuple(
            _value(kind.__args__[0], item, base, f"{where}[{index}]")
            for index, item in enumerate(value)
        )
    scalar = _SCALARS.get(kind)
    if scalar is None:
        return _build(kind, value, base, f"{where}.")
    expected, convert = scalar
    if type(value) not in expected:
        raise ConfigError(f"{where} has the wrong type: it must be {_WORDS[expected]}")
    try:
        return convert(value, base)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def _id_rule(text: str) -> IdRule:
    try:
        return IdRule(text)
    except ValueError:
        known = ", ".join(rule.value for rule in IdRule)
        raise ConfigError(f"it must be one of {known}") from None


def _store(text: str, base: Path) -> Path | PostgresUrl:
    if text.startswith(("postgresql://", "postgres://")):
        return PostgresUrl(Secret(text.encode()))
    return _path(text, base)


def _path(text: str, base: Path) -> Path:
    path = base / text
    try:
        os.lstat(path)
    except ValueError:
        raise ConfigError("the path has invalid characters") from None
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise ConfigError("the path is too long") from None
    return path


def _number(value: N) -> N:
    """A setting's number. None of them may be negative, and NaN passes comparisons unseen."""
    if not value >= 0:
        raise ConfigError("it must be a number of zero or more")
    return value


_WORDS: Final[dict[tuple[type, ...], str]] = {
    (bool,): "true or false",
    (int,): "an integer, such as 100000 and not 1e5, which is a float in TOML",
    (int, float): "a number",
    (str,): "a string",
}
_SCALARS: Final[dict[Any, tuple[tuple[type, ...], Callable[[Any, Path], Any]]]] = {
    bool: ((bool,), lambda value, _: value),
    int: ((int,), lambda value, _: _number(value)),
    str: ((str,), lambda value, _: value),
    float: ((int, float), lambda value, _: _number(float(value))),
    Path: ((str,), _path),
    Path | PostgresUrl: ((str,), _store),
    TcpAddress: ((str,), lambda value, _: parse_tcp_address(value)),
    IdRule: ((str,), lambda value, _: _id_rule(value)),
}
"""The TOML types that each type of field accepts, and the conversion from them."""
