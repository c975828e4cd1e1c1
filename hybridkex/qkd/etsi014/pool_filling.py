"""Filling key pools from KMEs: one site draws keys as the master, the other collects them.

Each site runs this once in either role, so that both can open connections without a KME.
"""

from collections.abc import Callable, Sequence

from hybridkex.errors import (
    KeyConsumed,
    KeyExpired,
    KeySourceError,
    KeySourceUnavailable,
    KeyUnknown,
)
from hybridkex.qkd.etsi014.client import KmeClient
from hybridkex.qkd.etsi014.models import DeliveredKey, KeyRequest
from hybridkex.qkd.pool import FilePool, PoolNames
from hybridkex.qkd.source import KeyPart, QkdKey


async def pool_names(client: KmeClient, *, sae: str, peer_sae: str) -> PoolNames:
    """The names of a pool for two SAEs, with the KMEs that the status gives.

    Raises:
        KeySourceError: the KME returns no status.
    """
    status = await client.status(peer_sae)
    return PoolNames(
        sae=sae,
        kme=client.kme_id or status.source_kme_id,
        peer_sae=peer_sae,
        peer_kme=status.target_kme_id,
    )


async def draw_into_pool(
    pool: FilePool,
    client: KmeClient,
    number: int,
    *,
    announce: Callable[[Sequence[str]], object],
    key_bits: int = 256,
) -> None:
    """Draw new keys (Get key, clause 5.2) and put them into a pool, as the master.

    Args:
        pool: the pool of our site.
        client: the KME of our site.
        number: keys to draw.
        announce: called with the IDs of all keys so far, after each request and before its keys are
            in the pool. If it fails, the pool has no key that the peer does not learn of.
        key_bits: length of a key, in bits.

    Raises:
        KeySourceError: the KME returns no more keys, or one a second time. Earlier keys are in the
            pool.
    """
    names = pool.names
    at_once = max(1, (await client.status(names.peer_sae)).max_key_per_request)
    drawn: list[str] = []
    while len(drawn) < number:
        request = KeyRequest(number=min(at_once, number - len(drawn)), size=key_bits)
        found = await client.enc_keys(names.peer_sae, request)
        new = [item.key_id for item in found.keys]
        if await pool.never_here(new) != new:
            raise KeySourceUnavailable(
                "the KME returned a key with an ID that it had returned before, and no key may be "
                "used twice; keys of its earlier responses are in the pool"
            )
        drawn += new
        announce(drawn)
        await pool.add([_key(names, item, master=True) for item in found.keys])


async def collect_into_pool(
    pool: FilePool, client: KmeClient, key_ids: Sequence[str]
) -> dict[str, KeySourceError]:
    """Collect keys that the peer drew (Get key with key IDs, clause 5.3), as the slave.

    Keys that the pool has, or had, are not asked for. So a call that was interrupted can be
    repeated, and a key that the KME no longer has does not keep the others from the pool.

    Returns:
        The keys that the KME refused permanently, with its reasons.

    Raises:
        KeySourceError: the KME or the pool failed. Keys of earlier requests are in the pool.
    """
    names = pool.names
    at_once = max(1, (await client.status(names.peer_sae)).max_key_per_request)
    wanted = await pool.never_here(key_ids)
    refused: dict[str, KeySourceError] = {}

    async def collect(some: Sequence[str]) -> None:
        try:
            found = await client.dec_keys(names.peer_sae, some)
        except (KeyConsumed, KeyExpired, KeyUnknown) as error:
            if len(some) == 1:
                refused[some[0]] = error
                return
            for half in (some[: len(some) // 2], some[len(some) // 2 :]):
                await collect(half)
        else:
            await pool.add([_key(names, item, master=False) for item in found.keys])

    for start in range(0, len(wanted), at_once):
        await collect(wanted[start : start + at_once])
    return refused


def _key(names: PoolNames, item: DeliveredKey, *, master: bool) -> QkdKey:
    ours, theirs = (names.kme, names.sae), (names.peer_kme, names.peer_sae)
    (master_kme, master_sae), (slave_kme, slave_sae) = (ours, theirs) if master else (theirs, ours)
    return QkdKey(
        name=(KeyPart(master_kme, slave_kme, item.key_id),),
        master_sae=master_sae,
        slave_sae=slave_sae,
        key=item.key,
    )
