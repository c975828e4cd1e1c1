"""Prefetched keys, so that a handshake does not wait for the KME."""

from collections import OrderedDict, deque
from dataclasses import dataclass
from functools import partial
from typing import Final

from hybridkex.errors import ConfigError, KeySourceError, KeySourceExhausted
from hybridkex.fields import check_fields, checked
from hybridkex.net.event_loop import Event, ask, checkpoint_if_cancelled, current_time, sleep
from hybridkex.qkd.source import (
    KeyReference,
    KeySource,
    QkdKey,
    SourceStatus,
    draw_key,
    is_known,
    look_up_key,
)
from hybridkex.text import get_logger

__all__ = ["PrefetchConfig", "PrefetchSource"]

LOG: Final = get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class PrefetchConfig:
    """The number of keys that are kept in stock, and their age.

    Raises:
        ConfigError: a number is not positive, or ``low`` is above ``high``.
    """

    low: int = 2
    """Low watermark: the stock is refilled below this."""
    high: int = 8
    """High watermark: the maximum of the stock, and of the keys that a crash loses."""
    ttl: float = 300.0
    """Seconds after which an unused key is discarded."""
    retry_after: float = 1.0
    """Seconds to wait after the source failed; doubled each time, up to 32 times as long."""

    def __post_init__(self) -> None:
        check_fields(self)
        if not 0 < self.low <= self.high:
            raise ConfigError("the watermarks must satisfy 0 < low <= high")
        if self.ttl <= 0 or self.retry_after <= 0:
            raise ConfigError("ttl and retry_after must be positive")


class PrefetchSource:
    """A key source with a stock in memory.

    Start :meth:`fill` as a task: ``nursery.start_soon(source.fill)`` in trio,
    ``group.create_task(source.fill())`` in asyncio. Keys in stock when the program ends are lost.

    The master's side draws ahead. The slave's side can look keys up ahead once it has been told
    their names (:meth:`upcoming` at the master, :meth:`expect` at the slave); telling is up to the
    caller, for example over a session that is already there.

    Args:
        source: gives the keys.
        config: see :class:`PrefetchConfig`.

    Raises:
        ConfigError: ``source`` is not a key source.
    """

    @checked
    def __init__(self, source: KeySource, config: PrefetchConfig | None = None) -> None:
        self.local_sae: Final = source.local_sae
        self.peer_sae: Final = source.peer_sae
        self._source = source
        self._config = config or PrefetchConfig()
        self._ready: deque[tuple[float, QkdKey]] = deque()
        self._expected: OrderedDict[KeyReference, tuple[float, QkdKey]] = OrderedDict()
        self._low = Event()
        self._low.set()

    async def get_key(self) -> QkdKey:
        """A key from the stock, or from the source itself if the stock is empty."""
        self._drop_old()
        if self._ready:
            _, key = self._ready.popleft()
            self._wake()
            await checkpoint_if_cancelled()
            return key
        self._wake()
        return await draw_key(self._source)

    async def get_key_with_id(self, name: KeyReference) -> QkdKey:
        """Get the key that the peer drew; see :class:`~hybridkex.qkd.source.KeySource`."""
        self._drop_old()
        held = self._expected.pop(name, None)
        if held is not None:
            await checkpoint_if_cancelled()
            return held[1]
        return await look_up_key(self._source, name)

    def knows(self, name: KeyReference) -> bool:
        """Whether the KMEs named are those of this source. No I/O."""
        return is_known(self._source, name)

    async def status(self) -> SourceStatus:
        """The source's stock plus ours."""
        self._drop_old()
        inner = await self._source.status()
        return SourceStatus(
            stored=inner.stored + len(self._ready),
            capacity=inner.capacity + self._config.high,
            key_bits=inner.key_bits,
        )

    def upcoming(self) -> tuple[KeyReference, ...]:
        """The names of the keys that :meth:`get_key` will give next, in order."""
        self._drop_old()
        return tuple(key.name for _, key in self._ready)

    async def expect(self, name: KeyReference) -> None:
        """Look the key of ``name`` up ahead of the :meth:`get_key_with_id` that will ask for it.

        Raises what ``get`` raises, and ``KeySourceExhausted`` when ``high`` keys are held already.
        """
        self._drop_old()
        if name in self._expected:
            return
        if len(self._expected) >= self._config.high:
            raise KeySourceExhausted(f"{self._config.high} keys are prefetched already")
        key = await look_up_key(self._source, name)
        self._expected[name] = (current_time() + self._config.ttl, key)

    async def fill(self) -> None:
        """Keep the stock between the watermarks, until it is cancelled."""
        wait = self._config.retry_after
        while True:
            await self._low.wait()
            self._low = Event()
            self._drop_old()
            try:
                while len(self._ready) < self._config.high:
                    key = await ask(partial(draw_key, self._source))
                    self._ready.append((current_time() + self._config.ttl, key))
                    wait = self._config.retry_after
            except KeySourceError as error:
                pause = max(wait, error.retry_after or 0.0)
                LOG.warning("prefetching: %s; next try in %.1f s", error, pause)
                await sleep(pause)
                wait = min(wait * 2, self._config.retry_after * 32)
                self._low.set()

    def _wake(self) -> None:
        if len(self._ready) < self._config.low:
            self._low.set()

    def _drop_old(self) -> None:
        now = current_time()
        while self._ready and self._ready[0][0] <= now:
            self._ready.popleft()
        while self._expected and next(iter(self._expected.values()))[0] <= now:
            self._expected.popitem(last=False)
        self._wake()
