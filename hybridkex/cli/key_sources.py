"""The options that say where QKD keys come from, and the key sources that they make."""

import argparse
import hmac
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hybridkex.cli.values import file_path
from hybridkex.errors import ConfigError
from hybridkex.qkd.composite import FailoverSource
from hybridkex.qkd.etsi014.mutual_tls import TLS_KINDS
from hybridkex.qkd.etsi014.naming import IdRule
from hybridkex.qkd.pool import FilePool
from hybridkex.qkd.source import KeySource
from hybridkex.qkd.store import read_key_file
from hybridkex.secret import Secret
from hybridkex.shell.qkd_keys import QkdPskSource
from hybridkex.tls.policy import Requirement

if TYPE_CHECKING:
    from hybridkex.qkd.etsi014.client import KmeAccess

__all__ = [
    "add_exchange_qkd_options",
    "add_kme_options",
    "add_qkd_options",
    "key_sources",
    "kme_access",
    "qkd_keys",
    "qkd_requirement",
]


def add_kme_options(parser: argparse._ActionsContainer, *, required: bool) -> None:
    """Which KME, and how to reach it."""
    parser.add_argument(
        "--kme", required=required, metavar="URL", help="the KME of our site, as https://host:port"
    )
    for name, text in (
        ("ca", "the authority of the KME's certificate"),
        ("cert", "the certificate that names our SAE to it"),
        ("key", "its private key"),
    ):
        parser.add_argument(
            f"--kme-{name}", type=file_path, required=required, metavar="FILE", help=f"{text} (PEM)"
        )
    parser.add_argument("--kme-id", metavar="ID", help="the ID its certificate must have")
    parser.add_argument(
        "--kme-id-rule",
        choices=[rule.value for rule in IdRule],
        default=IdRule.COMMON_NAME.value,
        help="where in its certificate the ID is (default cn)",
    )
    parser.add_argument(
        "--kme-tls",
        default="stdlib",
        choices=TLS_KINDS,
        help="TLS to the KME: the standard library's, or our own, which is post-quantum "
        "(default: %(default)s)",
    )


def kme_access(args: argparse.Namespace) -> "KmeAccess":
    """How to reach the KME of the options.

    Raises:
        ConfigError: an option is missing or makes no sense, or the packages are.
    """
    if args.kme_ca is None or args.kme_cert is None or args.kme_key is None:
        raise ConfigError("--kme goes with --kme-ca, --kme-cert and --kme-key")
    try:
        from hybridkex.qkd.etsi014.client import KmeAccess  # noqa: PLC0415  # needs the extra
    except ModuleNotFoundError as missing:
        raise ConfigError(
            f"--kme needs the package {missing.name}: pip install 'hybridkex[kme]'"
        ) from None
    return KmeAccess(
        url=args.kme,
        ca=args.kme_ca,
        certificate=args.kme_cert,
        key=args.kme_key,
        kme_id=args.kme_id,
        kme_id_rule=IdRule(args.kme_id_rule),
        tls=args.kme_tls,
    )


def add_qkd_options(parser: argparse.ArgumentParser) -> None:
    """Everything about the QKD leg of a channel."""
    group = parser.add_argument_group(
        "QKD keys",
        "With certificates they are used by RFC 9973, without they authenticate both sides.",
    )
    _add_source_options(group, peers="the peer's SAE ID; a listener may have several")
    group.add_argument(
        "--qkd",
        choices=[one.value for one in Requirement],
        help="no connection without a QKD key (require, the default once there is a source), "
        "one without that says so (prefer), or none (off)",
    )


def add_exchange_qkd_options(parser: argparse.ArgumentParser) -> None:
    """QKD keys of an exchange outside TLS, where nothing is negotiated: all rotations or none."""
    group = parser.add_argument_group(
        "QKD keys", "With --kme or --key-pool, given at both ends, a QKD key goes into each key."
    )
    _add_source_options(group, peers="the peer's SAE ID")
    parser.set_defaults(qkd=None)


def _add_source_options(group: argparse._ArgumentGroup, *, peers: str) -> None:
    add_kme_options(group, required=False)
    group.add_argument("--sae", metavar="ID", help="our own SAE ID")
    group.add_argument("--peer-sae", metavar="ID", action="append", default=[], help=peers)
    group.add_argument(
        "--peer-kme-id",
        metavar="ID",
        help="the ID of the peer's KME, where the status of ours hides it",
    )
    group.add_argument(
        "--key-pool",
        type=file_path,
        metavar="FILE",
        help="keys that 'kme export-pool' placed here; beside --kme, where the KME fails",
    )
    group.add_argument(
        "--pool-key", type=file_path, metavar="FILE", help="its key file (default: FILE.key)"
    )


def qkd_requirement(args: argparse.Namespace) -> Requirement:
    """What ``--qkd`` asks for.

    Raises:
        ConfigError: it asks for keys, and there is no source.
    """
    has_source = args.kme is not None or args.key_pool is not None
    if args.qkd is None:
        return Requirement.REQUIRE if has_source else Requirement.OFF
    requirement = Requirement(args.qkd)
    if requirement is not Requirement.OFF and not has_source:
        raise ConfigError(f"--qkd {args.qkd} needs --kme or --key-pool")
    return requirement


@asynccontextmanager
async def qkd_keys(args: argparse.Namespace) -> AsyncIterator[QkdPskSource | None]:
    """The keys that the options ask for, as long as the context lasts.

    Raises:
        ConfigError: the options contradict each other, or a file cannot be used.
    """
    async with key_sources(args) as sources:
        yield QkdPskSource(*sources) if sources else None


@asynccontextmanager
async def key_sources(args: argparse.Namespace) -> AsyncIterator[list[KeySource]]:
    """One source for each peer that the options name; none where QKD keys are off.

    Raises:
        ConfigError: the options contradict each other, or a file cannot be used.
    """
    if qkd_requirement(args) is Requirement.OFF:
        yield []
        return
    async with AsyncExitStack() as stack:
        sources: dict[str, list[KeySource]] = {}
        if args.kme is not None:
            if args.sae is None or not args.peer_sae:
                raise ConfigError("--kme goes with --sae and --peer-sae")
            if args.peer_kme_id is not None and len(args.peer_sae) > 1:
                raise ConfigError("--peer-kme-id goes with one --peer-sae")
            access = kme_access(args)
            from hybridkex.qkd.etsi014.client import (  # noqa: PLC0415  # as above
                Etsi014Source,
                KmeClient,
            )

            client = await stack.enter_async_context(KmeClient(access))
            for peer in args.peer_sae:
                sources[peer] = [
                    Etsi014Source(client, sae=args.sae, peer_sae=peer, peer_kme=args.peer_kme_id)
                ]
        if args.key_pool is not None:
            key_file = args.pool_key or args.key_pool.with_name(args.key_pool.name + ".key")
            pool = await stack.enter_async_context(_shared_pool(args.key_pool, key_file))
            if args.sae not in (None, pool.local_sae):
                raise ConfigError(f"{args.key_pool} is the key pool of {pool.local_sae}")
            if args.peer_sae and pool.peer_sae not in args.peer_sae:
                raise ConfigError(f"{args.key_pool} holds keys that {pool.peer_sae} shares")
            sources.setdefault(pool.peer_sae, []).append(pool)
        yield [one[0] if len(one) == 1 else FailoverSource(one) for one in sources.values()]


@dataclass
class _OpenPool:
    """A key pool that is open in this process, by however many channels."""

    pool: FilePool
    key: Secret
    users: int = 0


_OPEN_POOLS: dict[tuple[int, int], _OpenPool] = {}
"""By device and inode. One connection at a time may have the file, and a process that reloads its
configuration needs it twice for a moment."""


@asynccontextmanager
async def _shared_pool(path: Path, key_file: Path) -> AsyncIterator[FilePool]:
    """Raises ``ConfigError``: the pool cannot be opened, or the key file is not its own."""
    opened = _OPEN_POOLS.get(_inode(path))
    if opened is None:
        pool = FilePool.open(path, key_file=key_file)
        opened = _OPEN_POOLS[_inode(path)] = _OpenPool(pool, read_key_file(key_file))
    elif not hmac.compare_digest(opened.key.reveal(), read_key_file(key_file).reveal()):
        raise ConfigError(f"{key_file} is not the key file with which {path} was opened")
    opened.users += 1
    try:
        yield opened.pool
    finally:
        opened.users -= 1
        if not opened.users:
            for inode in [inode for inode, one in _OPEN_POOLS.items() if one is opened]:
                del _OPEN_POOLS[inode]
            await opened.pool.aclose()


def _inode(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except (OSError, ValueError):
        return 0, 0  # there is none; to open it says so
    return status.st_dev, status.st_ino
