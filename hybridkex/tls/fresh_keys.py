"""The schedule of key updates, and the protocol for sources of their QKD keys."""

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from hybridkex.errors import ConfigError
from hybridkex.fields import check_fields
from hybridkex.tls.epochs import UpdateKey
from hybridkex.tls.session import Session


@runtime_checkable
class UpdateKeySource(Protocol):
    """Methods that a :class:`~hybridkex.tls.config.PskSource` adds if it supplies QKD keys for
    key updates (``docs/fresh-keys.md``). The shell calls it; the engine never does."""

    async def draw_for_update(self, session: Session, *, client: bool, epoch: int) -> UpdateKey:
        """Draw a new key for an update that we start.

        Args:
            session: the session whose keys are updated.
            client: whether we are its client.
            epoch: the number of the epoch that the update begins.

        Raises :class:`~hybridkex.errors.KeySourceError`.
        """

    async def look_up_for_update(
        self, identity: bytes, session: Session, *, client: bool, epoch: int
    ) -> UpdateKey:
        """The key that the peer named in its request by an encoded ``ImportedIdentity``.

        Raises :class:`~hybridkex.errors.KeySourceError`.

        Args:
            identity: the encoded ``ImportedIdentity`` of the request.
            session: the session of the update.
            client: whether we are the client of the session.
            epoch: the number of the epoch that the update begins.
        """

    async def stock_for_updates(self, session: Session) -> int | None:
        """The number of keys that can be drawn for the peer of ``session``; ``None`` if it is not
        known.

        Raises :class:`~hybridkex.errors.KeySourceError`.
        """


@dataclass(frozen=True, kw_only=True)
class FreshKeys:
    """When a session renews its keys. One side or both may have a schedule.

    Args:
        every: seconds from one update to the next.
        after_bytes: the number of application data bytes in both directions, 65,536 or more, after
            which the keys are renewed immediately; ``None``: no limit.
        deadline: seconds that an update may be late. Then a session whose policy requires fresh
            keys ends; any other session continues and logs a warning.
        jitter: the fraction of ``every`` by which an update may be early, chosen at random, so that
            many sessions do not query a KME at the same time.
        low_stock: if fewer QKD keys than this are in stock, ``every`` is increased in proportion.
        stretch: the maximum factor by which ``every`` is increased.

    Raises:
        ConfigError: a field has the wrong type or is out of range.
    """

    every: float = 60.0
    after_bytes: int | None = None
    deadline: float = 30.0
    jitter: float = 0.1
    low_stock: int = 16
    stretch: float = 4.0

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.every > 0 or not self.deadline > 0:
            raise ConfigError("every and deadline of FreshKeys must be more than 0 seconds")
        if self.after_bytes is not None and self.after_bytes < 1 << 16:
            raise ConfigError("after_bytes of FreshKeys must be 65,536 or more")
        if not 0 <= self.jitter < 1:
            raise ConfigError("jitter of FreshKeys must be at least 0 and less than 1")
        if self.low_stock < 0 or not 1 <= self.stretch < math.inf:
            raise ConfigError("low_stock of FreshKeys must be 0 or more, and stretch 1 or more")
