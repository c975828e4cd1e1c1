"""The policy: the requirements that a connection must meet."""

from dataclasses import dataclass
from enum import Enum

from hybridkex.errors import ConfigError
from hybridkex.fields import check_fields


class Requirement(Enum):
    """Whether a part of the keys is required, preferred or off."""

    REQUIRE = "require"
    """A connection without it is refused."""
    PREFER = "prefer"
    """Used if the peer supports it; the session shows whether it was."""
    OFF = "off"
    """Not offered, not accepted."""


class Authentication(Enum):
    """The required authentication of the peer."""

    CERTIFICATE = "certificate"
    PSK = "psk"
    BOTH = "certificate+psk"
    """A certificate and an external PSK in one handshake (RFC 9973)."""
    EITHER = "certificate or psk"
    """An external PSK, or a certificate if the two sides have no PSK in common: either suffices, so
    the connection is only as strong as the weaker one."""


@dataclass(frozen=True, kw_only=True)
class Policy:
    """The requirements that every connection must meet.

    Args:
        post_quantum: whether the key exchange must have a post-quantum part.
        psk: whether an external PSK (a QKD key) must be in the key schedule. ``None`` requires one
            where PSKs or a source of them are configured.
        authentication: ``None`` derives it from what is configured: a certificate where only
            certificates are, a PSK where only PSKs are, both where both are. Where ``psk`` is
            preferred and there is none, ``BOTH`` accepts the certificate alone.
        fresh_keys: whether a live session renews its keys by a new key exchange (Extended Key
            Update, experimental); such a session neither issues nor accepts session tickets.
            ``None`` requires it where a schedule is configured, and leaves it off elsewhere.
        fresh_qkd: whether each such update must have a QKD key of its own. ``None`` follows ``psk``
            where there is a source of QKD keys.
        one_time_pad: whether application data is protected by a one-time pad of QKD keys
            (experimental), which needs ``fresh_keys``. ``None`` requires it where
            :class:`~hybridkex.OneTimePad` is configured, and leaves it off elsewhere.
        session_lifetime: seconds for which a session may be resumed, counted from its first, full
            handshake, however often it is resumed. 0: no resumption.

    Raises:
        ConfigError: a field has the wrong type, or no connection can satisfy the combination.
    """

    post_quantum: Requirement = Requirement.REQUIRE
    psk: Requirement | None = None
    authentication: Authentication | None = None
    fresh_keys: Requirement | None = None
    fresh_qkd: Requirement | None = None
    one_time_pad: Requirement | None = None
    session_lifetime: int = 12 * 3600

    def __post_init__(self) -> None:
        check_fields(self)
        if self.session_lifetime < 0:
            raise ConfigError("session_lifetime must be 0 or more seconds")
        if self.fresh_keys is Requirement.OFF and self.fresh_qkd not in (None, Requirement.OFF):
            raise ConfigError("fresh_qkd applies to key updates, and fresh_keys is off")
        if self.fresh_keys is Requirement.OFF and self.one_time_pad not in (None, Requirement.OFF):
            raise ConfigError("a one-time pad gets its keys by key updates: fresh_keys is off")
        if self.psk is Requirement.OFF and self.authentication in (
            Authentication.PSK,
            Authentication.BOTH,
        ):
            raise ConfigError(
                f"authentication by {self.authentication.value} uses a PSK, and psk is off"
            )
        if self.authentication is Authentication.EITHER and self.psk is not Requirement.PREFER:
            raise ConfigError(
                "Authentication.EITHER needs psk=Requirement.PREFER: if a PSK is required, a "
                "certificate alone is not enough"
            )

    def as_json(self) -> dict[str, str | None]:
        """A dictionary of JSON values with stable keys."""
        values = vars(self).items()
        return {name: value and value.value for name, value in values if name != "session_lifetime"}
