"""A share of the wrong length, malformed, or of another group gets ``illegal_parameter``, in both
directions, for every group of ours and of liboqs."""

from dataclasses import dataclass
from typing import Any

import pytest
from tls_glue import ANY_GROUP, Pair

from hybridkex.auth import Pins, RawIdentity
from hybridkex.constants import Alert
from hybridkex.crypto.kex import ALL_GROUPS, MLKEM768, X25519, Group, KeyExchange, Property
from hybridkex.crypto.kex_oqs import oqs_groups
from hybridkex.crypto.oqs import oqs_status
from hybridkex.errors import AlertReceived, ConfigError, IllegalParameter
from hybridkex.secret import Secret
from hybridkex.tls.config import ClientConfig, ServerConfig

STATUS = oqs_status()
GROUPS = [*ALL_GROUPS, *(oqs_groups() if STATUS.available else ())]
IDENTITY = RawIdentity.generate()

# What every bit pattern of the right length cannot be: coordinates and coefficients out of range.
# The other KEMs take any bytes of the right length; a wrong one gives another secret.
CHECKED = {"x25519", "secp256r1", "secp384r1"} | {
    group.name for group in ALL_GROUPS if Property.POST_QUANTUM in group.properties
}


@dataclass
class Liar:
    """A key exchange that says something else than the real one would."""

    real: KeyExchange
    change: Any

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def start(self) -> Any:
        started = self.real.start()

        class Started:
            share = self.change(started.share)
            finish = started.finish

        return Started()

    def respond(self, peer_share: bytes) -> tuple[bytes, Secret]:
        share, secret = self.real.respond(peer_share)
        return self.change(share), secret


def clash(group: Group, change: Any, liar: str) -> tuple[Exception, Exception]:
    """A handshake in which one side lies; the victim's error and the liar's."""
    lying = Group(code=group.code, name=group.name, exchange=Liar(group.exchange, change))  # type: ignore[arg-type]
    ours, theirs = (lying, group) if liar == "client" else (group, lying)
    pair = Pair.make(
        ClientConfig(verifier=Pins(frozenset({IDENTITY.pin})), groups=(ours,), policy=ANY_GROUP),
        ServerConfig(identities=(IDENTITY,), groups=(theirs,), policy=ANY_GROUP),
    )
    pair.client.start()
    pair.fight()
    victim = "server" if liar == "client" else "client"
    return pair.errors[victim], pair.errors[liar]


def refused(errors: tuple[Exception, Exception]) -> bool:
    victim, liar = errors
    return (
        isinstance(victim, IllegalParameter)
        and isinstance(liar, AlertReceived)
        and liar.alert == Alert.ILLEGAL_PARAMETER
    )


@pytest.mark.parametrize("liar", ["client", "server"])
@pytest.mark.parametrize("group", GROUPS, ids=str)
def test_wrong_lengths(group: Group, liar: str) -> None:
    for change in (lambda s: s[:-1], lambda s: s + b"\0", lambda s: s[:1], lambda s: s + s):
        if 2 * max(group.exchange.offer_length, group.exchange.answer_length) < 60000:
            assert refused(clash(group, change, liar))


@pytest.mark.parametrize("group", [one for one in GROUPS if one.name in CHECKED], ids=str)
def test_malformed_shares(group: Group) -> None:
    zeros_and_ones = [lambda s: bytes(len(s)), lambda s: b"\xff" * len(s)]
    if group is X25519:
        zeros_and_ones.pop()  # Every string of 32 bytes is a point of Curve25519 or its twist.
    for change in zeros_and_ones:
        if group.name.startswith("MLKEM") and change is zeros_and_ones[0]:
            continue  # Coefficients that are all zero are in range.
        assert refused(clash(group, change, "client")), group
    # A ciphertext cannot be malformed, ML-KEM rejects implicitly; a point can.
    if Property.CLASSICAL in group.properties:
        assert refused(clash(group, zeros_and_ones[0], "server")), group


@pytest.mark.parametrize("liar", ["client", "server"])
def test_a_share_of_another_group(liar: str) -> None:
    for group in GROUPS:
        other = X25519 if group is not X25519 else MLKEM768

        def swap(_share: bytes, other: Group = other) -> bytes:
            started = other.exchange.start()
            return started.share if liar == "client" else other.exchange.respond(started.share)[0]

        assert refused(clash(group, swap, liar)), group


def test_liboqs_is_among_them() -> None:
    if not STATUS.available:
        pytest.skip(f"needs liboqs: {STATUS.problem}")
    assert len(GROUPS) > len(ALL_GROUPS) + 10


def test_shares_that_no_client_hello_can_hold() -> None:
    class Large(Liar):
        offer_length = 61441

    group = Group(code=0xFEC0, name="large", exchange=Large(MLKEM768.exchange, None))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="61440"):
        ClientConfig(verifier=Pins(frozenset({IDENTITY.pin})), groups=(group,))
