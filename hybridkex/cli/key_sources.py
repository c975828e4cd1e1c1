"""The key sources that the options of a command describe."""

import hmac
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hybridkex.cli.choices import KME_ID_RULES, KME_TLS_KINDS
from hybridkex.cli.own_certificate import watched
from hybridkex.cli.qkd_options import KmeOptions, QkdOptions
from hybridkex.cli.qkd_requirement import qkd_requirement
from hybridkex.errors import ConfigError
from hybridkex.qkd.composite import FailoverSource
from hybridkex.qkd.etsi014.naming import IdRule, own_certificate
from hybridkex.qkd.pool import FilePool
from hybridkex.qkd.source import KeySource
from hybridkex.qkd.store import read_key_file
from hybridkex.secret import Secret
from hybridkex.shell.qkd_keys import QkdPskSource
from hybridkex.tls.policy import Requirement

if TYPE_CHECKING:
    from hybridkex.qkd.etsi014.client import KmeAccess


def kme_access(options: KmeOptions) -> "KmeAccess":
    """The KME access that the options describe.

    Raises:
        ConfigError: an option is missing or invalid, or a package is missing.
    """
    if options.kme is None:
        raise ConfigError("--kme is missing")
    if options.kme_ca is None or options.kme_cert is None or options.kme_key is None:
        raise ConfigError("--kme requires --kme-ca, --kme-cert and --kme-key")
    try:
        from hybridkex.qkd.etsi014.client import KmeAccess  # noqa: PLC0415  # needs the extra
    except ModuleNotFoundError as missing:
        raise ConfigError(
            f"--kme needs the package {missing.name}: pip install 'hybridkex[kme]'"
        ) from None
    return KmeAccess(
        url=options.kme,
        ca=options.kme_ca,
        certificate=options.kme_cert,
        key=options.kme_key,
        kme_id=options.kme_id,
        kme_id_rule=IdRule(options.kme_id_rule or KME_ID_RULES[0]),
        tls=options.kme_tls or KME_TLS_KINDS[0],
    )


@asynccontextmanager
async def qkd_keys(options: QkdOptions) -> AsyncIterator[QkdPskSource | None]:
    """The PSK source that the options describe, for the duration of the context.

    Raises:
        ConfigError: the options contradict each other, or a file cannot be used.
    """
    async with key_sources(options) as sources:
        yield QkdPskSource(*sources) if sources else None


@asynccontextmanager
async def key_sources(options: QkdOptions) -> AsyncIterator[list[KeySource]]:
    """Open a source for each peer that the options name; none if QKD keys are off.

    Raises:
        ConfigError: the options contradict each other, or a file cannot be used.
    """
    if qkd_requirement(options) is Requirement.OFF:
        yield []
        return
    async with AsyncExitStack() as stack:
        sources: dict[str, list[KeySource]] = {}
        if options.kme.kme is not None:
            if options.sae is None or not options.peer_sae:
                raise ConfigError("--kme requires --sae and --peer-sae")
            if options.peer_kme_id is not None and len(options.peer_sae) > 1:
                raise ConfigError("--peer-kme-id requires exactly one --peer-sae")
            access = kme_access(options.kme)
            from hybridkex.qkd.etsi014.client import (  # noqa: PLC0415  # as above
                Etsi014Source,
                KmeClient,
            )

            client = await stack.enter_async_context(KmeClient(access))
            ours = own_certificate(access.certificate)
            stack.enter_context(watched(access.certificate, ours))
            for peer in options.peer_sae:
                sources[peer] = [
                    Etsi014Source(
                        client, sae=options.sae, peer_sae=peer, peer_kme=options.peer_kme_id
                    )
                ]
        if options.key_pool is not None:
            key_file = options.pool_key or Path(f"{options.key_pool}.key")
            pool = await stack.enter_async_context(_shared_pool(options.key_pool, key_file))
            if options.sae not in (None, pool.local_sae):
                raise ConfigError(f"{options.key_pool} is the key pool of {pool.local_sae}")
            if options.peer_sae and pool.peer_sae not in options.peer_sae:
                raise ConfigError(f"{options.key_pool} holds keys shared with {pool.peer_sae}")
            sources.setdefault(pool.peer_sae, []).append(pool)
        yield [one[0] if len(one) == 1 else FailoverSource(one) for one in sources.values()]


@dataclass
class _OpenPool:
    """A key pool that is open in this process, by however many channels."""

    pool: FilePool
    key: Secret
    users: int = 0


_OPEN_POOLS: dict[tuple[int, int], _OpenPool] = {}
"""The open pools, by device and inode. Only one connection at a time may open a pool file, and a
process that reloads its configuration needs the file twice for a moment."""


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
        return 0, 0  # it does not exist; opening it reports that
    return status.st_dev, status.st_ino
