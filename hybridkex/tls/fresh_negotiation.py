"""How Extended Key Update and its QKD slot are negotiated (``docs/fresh-keys.md``)."""

from typing import Final

from hybridkex.constants import TlsFlag
from hybridkex.errors import IllegalParameter, PolicyRefused
from hybridkex.reasons import Reason
from hybridkex.tls.config import ClientConfig, ServerConfig
from hybridkex.tls.epochs import KeyUpdates
from hybridkex.tls.policy import Policy, Requirement
from hybridkex.wire import extensions as ext

__all__ = ["agree", "answer", "check_key_updates", "offer", "read_answer"]

_VERSION: Final = 1
_FLAG: Final = frozenset((int(TlsFlag.EXTENDED_KEY_UPDATE),))


def offer(config: ClientConfig) -> list[ext.Extension]:
    """What the ClientHello says."""
    if config.policy_in_force.fresh_keys is Requirement.OFF:
        return []
    return [ext.TlsFlags(_FLAG), ext.FreshQkdKeysOffer((_VERSION,))]


def agree(config: ServerConfig, offered: ext.Extensions) -> KeyUpdates:
    """Choose the kind of key updates that both sides support, at a server.

    Raises:
        PolicyRefused: our policy requires more.
    """
    policy = config.policy_in_force
    flags, slot = offered.get(ext.TlsFlags), offered.get(ext.FreshQkdKeysOffer)
    kind = KeyUpdates.STANDARD
    if policy.fresh_keys is not Requirement.OFF and flags is not None and flags.flags >= _FLAG:
        if slot is not None and _VERSION in slot.versions:
            kind = KeyUpdates.FRESH
        elif policy.fresh_qkd is not Requirement.REQUIRE:
            kind = KeyUpdates.EXTENDED
    check_key_updates(policy, kind)
    return kind


def answer(kind: KeyUpdates) -> list[ext.Extension]:
    """What EncryptedExtensions say."""
    flags: list[ext.Extension] = [ext.TlsFlags(_FLAG)]
    return {
        KeyUpdates.STANDARD: [],
        KeyUpdates.EXTENDED: flags,
        KeyUpdates.FRESH: [*flags, ext.FreshQkdKeysAnswer(_VERSION)],
    }[kind]


def read_answer(config: ClientConfig, answers: ext.Extensions) -> KeyUpdates:
    """The kind of key updates that the server has agreed to, at a client.

    Raises:
        IllegalParameter: it answers what was not offered.
        PolicyRefused: our policy requires more.
    """
    policy = config.policy_in_force
    flags, slot = answers.get(ext.TlsFlags), answers.get(ext.FreshQkdKeysAnswer)
    if flags is not None and not flags.flags <= _FLAG:
        raise IllegalParameter(
            "the server sets a flag that was not offered", Reason.FLAG_NOT_OFFERED
        )
    if slot is not None and (flags is None or slot.version != _VERSION):
        raise IllegalParameter(
            "the server's fresh_qkd_keys does not fit the offer", Reason.FRESH_KEYS_ANSWER
        )
    kind = KeyUpdates.STANDARD
    if flags is not None:
        kind = KeyUpdates.EXTENDED if slot is None else KeyUpdates.FRESH
    check_key_updates(policy, kind)
    return kind


def check_key_updates(policy: Policy, kind: KeyUpdates) -> None:
    """Check that what was agreed satisfies the policy in force.

    Raises:
        PolicyRefused: it does not.
    """
    if policy.fresh_keys is Requirement.REQUIRE and kind is KeyUpdates.STANDARD:
        raise PolicyRefused(
            "our policy requires fresh keys, and the peer does not support Extended Key Update",
            Reason.FRESH_KEYS_REQUIRED,
        )
    if policy.fresh_qkd is Requirement.REQUIRE and kind is KeyUpdates.EXTENDED:
        raise PolicyRefused(
            "our policy requires a QKD key in each key update, and the peer does not support that",
            Reason.FRESH_KEYS_REQUIRED,
        )
