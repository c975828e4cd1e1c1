"""How Extended Key Update, its QKD slot (``docs/fresh-keys.md``) and the one-time pad
(``docs/one-time-pad.md``) are negotiated."""

from typing import Final

from hybridkex.constants import PAD_SUITE, TlsFlag
from hybridkex.errors import IllegalParameter, PolicyRefused
from hybridkex.reasons import Reason
from hybridkex.tls.config import ClientConfig, ServerConfig
from hybridkex.tls.epochs import KeyUpdates
from hybridkex.tls.policy import Policy, Requirement
from hybridkex.tls.session import Session
from hybridkex.values import value
from hybridkex.wire import extensions as ext

_VERSION: Final = 1
_FLAG: Final = frozenset((int(TlsFlag.EXTENDED_KEY_UPDATE),))


@value
class Agreed:
    """The key updates and one-time pad that both sides agreed to use after the handshake."""

    key_updates: KeyUpdates
    one_time_pad: bool


_STANDARD: Final = Agreed(KeyUpdates.STANDARD, one_time_pad=False)


def offer(config: ClientConfig) -> list[ext.Extension]:
    """The extensions of the ClientHello."""
    policy = config.policy_in_force
    if policy.fresh_keys is Requirement.OFF:
        return []
    extensions: list[ext.Extension] = [ext.TlsFlags(_FLAG), ext.FreshQkdKeysOffer((_VERSION,))]
    if policy.one_time_pad is not Requirement.OFF:
        extensions.append(ext.OneTimePadOffer((PAD_SUITE,)))
    return extensions


def agree(config: ServerConfig, offered: ext.Extensions) -> Agreed:
    """Choose what both sides support, at a server.

    Raises:
        PolicyRefused: our policy requires more.
    """
    policy = config.policy_in_force
    if policy.fresh_keys is Requirement.OFF:  # and with it everything that key updates contain
        return _STANDARD
    flags, slot = offered.get(ext.TlsFlags), offered.get(ext.FreshQkdKeysOffer)
    pad = offered.get(ext.OneTimePadOffer)
    kind = KeyUpdates.STANDARD
    if flags is not None and flags.flags >= _FLAG:
        if slot is not None and _VERSION in slot.versions:
            kind = KeyUpdates.FRESH
        elif policy.fresh_qkd is not Requirement.REQUIRE:
            kind = KeyUpdates.EXTENDED
    wanted = policy.one_time_pad is not Requirement.OFF and kind is KeyUpdates.FRESH
    agreed = Agreed(kind, wanted and pad is not None and PAD_SUITE in pad.suites)
    check_key_updates(policy, agreed)
    return agreed


def answer(agreed: Agreed) -> list[ext.Extension]:
    """The extensions of EncryptedExtensions."""
    if agreed.key_updates is KeyUpdates.STANDARD:
        return []
    extensions: list[ext.Extension] = [ext.TlsFlags(_FLAG)]
    if agreed.key_updates is KeyUpdates.FRESH:
        extensions.append(ext.FreshQkdKeysAnswer(_VERSION))
    if agreed.one_time_pad:  # only with fresh keys
        extensions.append(ext.OneTimePadAnswer(PAD_SUITE))
    return extensions


def read_answer(config: ClientConfig, answers: ext.Extensions) -> Agreed:
    """The server's agreement, as seen by a client.

    Raises:
        IllegalParameter: it answers an extension that was not offered.
        PolicyRefused: our policy requires more.
    """
    policy = config.policy_in_force
    if policy.fresh_keys is Requirement.OFF:  # nothing was offered, so no other answer is valid
        return _STANDARD
    flags, slot = answers.get(ext.TlsFlags), answers.get(ext.FreshQkdKeysAnswer)
    pad = answers.get(ext.OneTimePadAnswer)
    if flags is not None and not flags.flags <= _FLAG:
        raise IllegalParameter(
            "the server sets a flag that was not offered", Reason.FLAG_NOT_OFFERED
        )
    if slot is not None and (flags is None or slot.version != _VERSION):
        raise IllegalParameter(
            "the server's fresh_qkd_keys does not fit the offer", Reason.FRESH_KEYS_ANSWER
        )
    if pad is not None and (slot is None or pad.suite != PAD_SUITE):
        raise IllegalParameter(
            "the server's one_time_pad does not fit the offer", Reason.PAD_ANSWER
        )
    kind = KeyUpdates.STANDARD
    if flags is not None:
        kind = KeyUpdates.EXTENDED if slot is None else KeyUpdates.FRESH
    agreed = Agreed(kind, pad is not None)
    check_key_updates(policy, agreed)
    return agreed


def check_key_updates(policy: Policy, agreed: Agreed | Session) -> None:
    """Check that what was agreed satisfies the policy in force.

    Raises:
        PolicyRefused: it does not.
    """
    kind = agreed.key_updates
    # The pad first: without fresh keys both are missing, and the pad is what the user asked for.
    if policy.one_time_pad is Requirement.REQUIRE and not agreed.one_time_pad:
        raise PolicyRefused(
            "our policy requires a one-time pad, and the peer does not support it",
            Reason.PAD_REQUIRED,
        )
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
