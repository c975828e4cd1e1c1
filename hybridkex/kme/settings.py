"""The settings of a key management entity: who is attached to it, and its limits."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from hybridkex.errors import ConfigError
from hybridkex.kme.peering import BLOCKS_AT_ONCE, MAX_MESSAGE_BYTES, message_bytes


@dataclass(frozen=True, kw_only=True)
class KmeLimits:
    """Sizes in bits, times in seconds, rates in requests per second for each SAE."""

    key_size: int = 256
    """The default key size, and the size of the producers' blocks."""
    min_key_size: int = 64
    max_key_size: int = 4096
    max_key_count: int = 4096
    max_key_per_request: int = 128
    max_sae_id_count: int = 8
    key_ttl: float = 86_400.0
    tombstone_ttl: float = 30 * 86_400.0
    sync_grace: float = 60.0
    """Seconds for which a block unknown to the peer KME may still be in transit."""
    rate: float = 200.0
    burst: int = 400
    ready_keys: int = 1
    """Keys of a link that must be stored for ``/readyz`` to call it ready."""
    peer_rate: float = 1000.0
    """Requests per second of each peer KME."""
    peer_burst: int = 2000
    max_promised: int = 100_000
    """Keys of ``key_size`` that one peer KME sent by value and that no SAE has collected yet; a
    longer key counts as several."""

    def __post_init__(self) -> None:
        if not 0 < self.min_key_size <= self.key_size <= self.max_key_size:
            raise ConfigError("key sizes must satisfy 0 < min_key_size <= key_size <= max_key_size")
        if self.key_size % 8 or self.min_key_size % 8 or self.max_key_size % 8:
            raise ConfigError("key sizes are multiples of 8")
        for name in (
            "max_key_count",
            "max_key_per_request",
            "burst",
            "peer_rate",
            "peer_burst",
            "max_promised",
            "rate",
            "key_ttl",
            "tombstone_ttl",
        ):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be positive")
        for name in ("max_sae_id_count", "sync_grace", "ready_keys"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name} cannot be negative")
        if self.tombstone_ttl < self.key_ttl:
            # Otherwise the record of a delivered key could be dropped while the peer KME still has
            # the key.
            raise ConfigError("tombstone_ttl cannot be shorter than key_ttl")
        most = message_bytes(
            self.max_key_per_request, self.blocks(self.max_key_size), self.max_key_size
        )
        if most > MAX_MESSAGE_BYTES:
            raise ConfigError(
                f"max_key_per_request keys of max_key_size bits make a message of {most} bytes for "
                f"the peer KME, which takes {MAX_MESSAGE_BYTES}: lower one of them"
            )
        blocks = self.max_key_per_request * self.blocks(self.max_key_size)
        if blocks > BLOCKS_AT_ONCE:
            raise ConfigError(
                f"max_key_per_request keys of max_key_size bits have {blocks} blocks of key_size, "
                f"and the peer KME takes {BLOCKS_AT_ONCE} in a message: lower one of the first two"
            )

    def blocks(self, size: int) -> int:
        """The number of link blocks that make up a key of ``size`` bits."""
        return math.ceil(size / self.key_size)

    @property
    def request_bytes(self) -> int:
        """The maximum body length of a request by an SAE within these limits."""
        return 4096 + 128 * self.max_key_per_request + 2048 * self.max_sae_id_count


@dataclass(frozen=True, kw_only=True)
class EntitySettings:
    """The settings of one KME. Raises ``ConfigError`` if they contradict each other."""

    id: str
    saes: frozenset[str]
    """The SAEs attached to it."""
    peers: Mapping[str, frozenset[str]]
    """The SAEs attached to each KME that has a link to this one."""
    limits: KmeLimits = field(default_factory=KmeLimits)
    self_pairs: bool = False
    """Whether a slave may be attached here too, or be the master itself."""
    not_found_status: int = 400
    """400 in the standard; many deployed KMEs use 404."""

    def __post_init__(self) -> None:
        everyone = [*self.saes, *(sae for attached in self.peers.values() for sae in attached)]
        if not self.id or self.id in self.peers:
            raise ConfigError("a KME needs an ID of its own")
        if len(set(everyone)) != len(everyone) or {self.id, *self.peers} & set(everyone):
            raise ConfigError(
                "SAE IDs and KME IDs must be distinct, and each SAE must belong to one KME"
            )
        if self.not_found_status not in (400, 404):
            raise ConfigError("not_found_status is 400 or 404")
