"""Which sessions a configuration admits: one decision for full handshakes and for resumptions.

The states of the handshake refuse a peer, with the right alert, as soon as a message shows that the
policy cannot be met. This module decides in the end: every session passes :func:`check_session`
before it is proposed to the caller, and a ticket is used only where :func:`resumable` says that its
session would pass.
"""

from collections.abc import Mapping
from typing import Final, Protocol

from hybridkex.auth import Identity, RawIdentity
from hybridkex.errors import PolicyRefused
from hybridkex.reasons import Reason
from hybridkex.tls.config import ClientConfig, ServerConfig
from hybridkex.tls.fresh_negotiation import check_key_updates
from hybridkex.tls.policy import Authentication, Requirement
from hybridkex.tls.session import AuthenticatedBy, Session

# NOTHING: the caller asked not to verify; its verifier is asked again at every resumption.
_CERTIFICATE: Final = (AuthenticatedBy.CERTIFICATE, AuthenticatedBy.BOTH, AuthenticatedBy.NOTHING)
_ENOUGH: Final[Mapping[Authentication, tuple[AuthenticatedBy, ...]]] = {
    Authentication.PSK: (AuthenticatedBy.PSK,),
    Authentication.CERTIFICATE: _CERTIFICATE,
    Authentication.BOTH: (AuthenticatedBy.BOTH,),
    Authentication.EITHER: tuple(AuthenticatedBy),
}


class Remembered(Protocol):
    """A session as a ticket remembers it, at the client or at the server."""

    @property
    def authenticated_by(self) -> AuthenticatedBy:
        """The authentication of the server in the first handshake."""

    @property
    def psk_identity(self) -> bytes | None:
        """The external PSK in the key schedule of the first handshake."""

    @property
    def began_at(self) -> float:
        """The time of the first handshake, in seconds since the epoch."""

    @property
    def binding(self) -> bytes:
        """The binding (:meth:`~hybridkex.tls.config._Config.binding`) of the configuration that
        made the session."""


def check_session(config: ClientConfig | ServerConfig, session: Session) -> None:
    """Check that a session satisfies the policy in force.

    Raises:
        PolicyRefused: it does not.
    """
    policy = config.policy_in_force
    if policy.post_quantum is Requirement.REQUIRE and not session.post_quantum:
        raise PolicyRefused("our policy requires a post-quantum key exchange", Reason.POST_QUANTUM)
    if policy.post_quantum is Requirement.OFF and session.post_quantum:
        raise PolicyRefused("our policy excludes post-quantum key exchanges", Reason.POST_QUANTUM)
    check_key_updates(policy, session)
    reason = _lacks(config, session.authenticated_by, session.psk_identity)
    if reason is not None:
        raise PolicyRefused(reason, Reason.AUTHENTICATION)
    if session.resumed and remaining_lifetime(config, session.began_at) <= 0:
        raise PolicyRefused(
            "the session that was resumed is older than our policy allows", Reason.SESSION_TOO_OLD
        )
    if (
        isinstance(config, ServerConfig)
        and config.require_client_certificate
        and session.peer_credential is None
    ):
        raise PolicyRefused("our policy requires a client certificate", Reason.AUTHENTICATION)


def resumable(
    config: ClientConfig | ServerConfig,
    remembered: Remembered,
    identity: Identity | RawIdentity | None,
) -> bool:
    """Whether the session of a ticket may be resumed. If not, the handshake is a full one.

    Args:
        identity: our identity in this handshake.
    """
    return (
        remembered.binding == config.binding(identity)
        and remaining_lifetime(config, remembered.began_at) > 0
        and _lacks(config, remembered.authenticated_by, remembered.psk_identity) is None
    )


def remaining_lifetime(config: ClientConfig | ServerConfig, began_at: float) -> int:
    """Seconds for which a session of this first handshake may still be resumed.

    0 or less if it may not, also if the clock has been set back to before the handshake.
    """
    age = config.clock() - began_at
    return int(config.policy.session_lifetime - age) if age >= 0 else 0


def _lacks(
    config: ClientConfig | ServerConfig, by: AuthenticatedBy, psk_identity: bytes | None
) -> str | None:
    """The requirement of the policy in force that a session does not meet."""
    policy = config.policy_in_force
    if policy.psk is Requirement.REQUIRE and psk_identity is None:
        return "our policy requires a PSK, and the session has none"
    if policy.psk is Requirement.OFF and psk_identity is not None:
        return "our policy excludes PSKs, and the session has one"
    if by not in config.once(_enough):
        return (
            f"our policy requires authentication by {config.authentication.value}, and the session "
            f"has {by.value}"
        )
    return None


def _enough(config: ClientConfig | ServerConfig) -> tuple[AuthenticatedBy, ...]:
    """The ways in which the server of a session may have been authenticated."""
    wanted = config.authentication
    if wanted is Authentication.BOTH and config.policy_in_force.psk is Requirement.PREFER:
        return _CERTIFICATE
    return _ENOUGH[wanted]
