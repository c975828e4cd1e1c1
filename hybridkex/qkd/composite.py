"""Several key sources as one: in order of preference, or combined."""

import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Final

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from hybridkex.constants import Label
from hybridkex.errors import (
    ConfigError,
    KeyConsumed,
    KeyExpired,
    KeyNotYetAvailable,
    KeySourceError,
    KeySourceExhausted,
    KeySourceUnavailable,
    KeyUnauthorized,
    KeyUnknown,
)
from hybridkex.fields import check_members, checked
from hybridkex.net.event_loop import current_time, time_limit
from hybridkex.net.log import BoundedLog
from hybridkex.qkd.source import (
    KeyReference,
    KeySource,
    QkdKey,
    SourceStatus,
    draw_key,
    is_known,
    look_up_key,
)
from hybridkex.secret import Secret
from hybridkex.text import get_logger
from hybridkex.wire.codec import vector16

__all__ = ["CombinedSource", "FailoverSource", "combine_keys"]

LOG: Final = get_logger(__name__)

COMBINED_BYTES: Final = 32


def _same_saes(sources: Sequence[KeySource]) -> tuple[str, str]:
    if len(sources) < 2:
        raise ConfigError("at least two key sources are required")
    for source in sources:
        check_members("sources", source, KeySource)
    saes = {(source.local_sae, source.peer_sae) for source in sources}
    if len(saes) != 1:
        raise ConfigError("the key sources are for different pairs of SAEs")
    return saes.pop()


class FailoverSource:
    """Several sources in order of preference: the first one that returns a key is used.

    An error of one source does not fail a call as long as another source may have the key. A source
    that was unavailable or too slow is asked last for ``retry_after`` seconds. A named key can only
    be at a source whose KMEs are in the name; there may be several, such as a KME and a pool filled
    from it.

    Raises:
        ConfigError: there are fewer than two sources, they are for different pairs of SAEs, or a
            time is out of range.
    """

    @checked
    def __init__(
        self, sources: Sequence[KeySource], *, retry_after: float = 10.0, timeout: float = 5.0
    ) -> None:
        """``timeout`` bounds the call of one of the ``sources``, in seconds; then the next one is
        asked."""
        self.local_sae, self.peer_sae = _same_saes(sources)
        if retry_after < 0 or timeout <= 0:
            raise ConfigError("retry_after and timeout must be positive")
        self._sources = tuple(sources)
        self._retry_after = retry_after
        self._timeout = timeout
        self._down_until = [0.0] * len(sources)
        self._lines = BoundedLog(LOG)
        self._of_keys = BoundedLog(LOG)  # a peer may name keys that no source has

    async def get_key(self) -> QkdKey:
        """The first key that a source returns. Raises the last source's error if none does."""
        return await self._first(range(len(self._sources)), draw_key)

    async def get_key_with_id(self, name: KeyReference) -> QkdKey:
        """The key of this name, from the first source that has it.

        If none has it, raises the error that gives the most reason to retry: a key that one source
        does not know yet, or that an unreachable source may have, may still become available.
        """
        places = [i for i, source in enumerate(self._sources) if is_known(source, name)]
        if not places:
            raise KeyUnknown("no key source has these KMEs")
        return await self._first(places, lambda source: look_up_key(source, name))

    async def _first(
        self, places: Iterable[int], call: Callable[[KeySource], Awaitable[QkdKey]]
    ) -> QkdKey:
        now = current_time()
        errors: list[KeySourceError] = []
        for index in sorted(places, key=lambda i: (self._down_until[i] > now, i)):
            error: KeySourceError
            try:
                async with time_limit(self._timeout):
                    key = await call(self._sources[index])
                    self._down_until[index] = 0.0
                    return key
            except TimeoutError:
                error = KeySourceUnavailable("the key source was too slow")
            except KeySourceError as failure:
                error = failure
            if isinstance(error, KeySourceUnavailable | KeyUnauthorized):
                # The source failed. The other errors concern a key or its stock.
                pause = max(self._retry_after, error.retry_after or 0.0)
                self._down_until[index] = current_time() + pause
            line = "key source %d of %d: %s", index + 1, len(self._sources), error
            if isinstance(error, KeySourceUnavailable):
                self._lines.log(logging.WARNING, *line)
            else:
                self._of_keys.log(logging.WARNING, *line)
            errors.append(error)
        raise min(errors, key=_hope)

    def knows(self, name: KeyReference) -> bool:
        """Whether the KMEs named are those of this source. No I/O."""
        return any(is_known(source, name) for source in self._sources)

    async def status(self) -> SourceStatus:
        """The sum over the sources that answer."""
        found: list[SourceStatus] = []
        error: KeySourceError | None = None
        for source in self._sources:
            try:
                found.append(await source.status())
            except KeySourceError as failure:
                error = failure
        if error is not None and not found:
            raise error
        return SourceStatus(
            stored=sum(status.stored for status in found),
            capacity=sum(status.capacity for status in found),
            key_bits=min(status.key_bits for status in found),
        )


def _hope(error: KeySourceError) -> int:
    """The rank of an error among those of several sources; the lowest is raised."""
    kinds = (
        KeyNotYetAvailable,  # the same key may arrive in a moment
        KeySourceExhausted,  # another key may arrive later
        KeySourceUnavailable,  # possible once the source is back
        KeyUnauthorized,  # not without a change of configuration
        KeyExpired,
        KeyConsumed,
        KeyUnknown,
    )
    return next((rank for rank, kind in enumerate(kinds) if isinstance(error, kind)), len(kinds))


class CombinedSource:
    """Combines one key of every source; secret while at least one of the links is.

    Each source must give keys with single-part names, and no two may share a link.

    Args:
        sources: two key sources or more, in the same order at both SAEs.

    Raises:
        ConfigError: there are fewer, or they are for different pairs of SAEs.
    """

    @checked
    def __init__(self, sources: Sequence[KeySource]) -> None:
        self.local_sae, self.peer_sae = _same_saes(sources)
        self._sources = tuple(sources)

    async def get_key(self) -> QkdKey:
        """Draw a key from each source and combine them. If one fails, the others' keys are lost."""
        return self._combined([await draw_key(source) for source in self._sources])

    async def get_key_with_id(self, name: KeyReference) -> QkdKey:
        """Get the key that the peer drew; see :class:`~hybridkex.qkd.source.KeySource`."""
        if not self.knows(name):
            raise KeyUnknown("the name does not have one key of each source, in order")
        pairs = zip(self._sources, name, strict=True)
        return self._combined([await look_up_key(source, (part,)) for source, part in pairs])

    def knows(self, name: KeyReference) -> bool:
        """Whether the KMEs named are those of this source. No I/O."""
        return len(name) == len(self._sources) and all(
            is_known(source, (part,)) for source, part in zip(self._sources, name, strict=True)
        )

    async def status(self) -> SourceStatus:
        """The minimum over the sources."""
        found = [await source.status() for source in self._sources]
        return SourceStatus(
            stored=min(status.stored for status in found),
            capacity=min(status.capacity for status in found),
            key_bits=COMBINED_BYTES * 8,
        )

    @staticmethod
    def _combined(parts: list[QkdKey]) -> QkdKey:
        if any(len(part.name) != 1 for part in parts):
            raise KeySourceUnavailable("only keys with single-part names can be combined")
        kmes = [set(part.kmes[0]) for part in parts]
        if len({frozenset(pair) for pair in kmes}) != len(kmes):
            raise KeySourceUnavailable("two of the combined keys are of one link")
        return combine_keys(parts)


def combine_keys(parts: Sequence[QkdKey]) -> QkdKey:
    """Combine keys of different links into one of 32 bytes.

    Two-step key derivation of NIST SP 800-56C Rev. 2 section 5 with HKDF-SHA-256 (RFC 5869)::

        Z         = len(key 1) || key 1 || len(key 2) || key 2 ...
        FixedInfo = "hybridkex combined QKD keys v1" || len(master) || master || len(slave) || slave
                    || for each part: len(KME) || master's KME || len(KME) || slave's KME
                       || len(key ID) || key ID
        key       = HKDF-Expand(HKDF-Extract(salt = zeros, Z), FixedInfo, 32)

    Lengths are two bytes, big-endian; IDs are UTF-8. So both SAEs, the roles,
    all KMEs, all key IDs and their order are bound, and the encoding is injective.

    Args:
        parts: one key of each link; all have the same two SAEs and the same master.
    """
    master, slave = parts[0].master_sae, parts[0].slave_sae
    fixed_info = Label.COMBINED_QKD_KEYS + vector16(master.encode()) + vector16(slave.encode())
    for part in parts:
        for ref in part.name:
            fixed_info += vector16(ref.master_kme.encode()) + vector16(ref.slave_kme.encode())
            fixed_info += vector16(ref.key_id.encode())
    shared = b"".join(vector16(part.key.reveal()) for part in parts)
    derive = HKDF(algorithm=hashes.SHA256(), length=COMBINED_BYTES, salt=None, info=fixed_info)
    return QkdKey(
        name=tuple(ref for part in parts for ref in part.name),
        master_sae=master,
        slave_sae=slave,
        key=Secret(derive.derive(shared)),
    )
