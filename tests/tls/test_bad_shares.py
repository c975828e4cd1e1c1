"""A share of the wrong length, malformed, or of another group gets ``illegal_parameter``, in both
directions, for every group of ours and of liboqs."""

from dataclasses import dataclass
from typing import Any

import pytest
from tls_glue import ANY_GROUP, Pair

from hybridkex.auth import Pins, RawIdentity
from hybridkex.constants import Alert
from hybridkex.crypto.kex import (
    ALL_GROUPS,
    MLKEM768,
    SECP256R1,
    X25519,
    X25519MLKEM768,
    Concat,
    Group,
    KeyExchange,
    Property,
)
from hybridkex.crypto.kex_oqs import CODES, OqsKem, oqs_group
from hybridkex.crypto.oqs import oqs_status
from hybridkex.errors import AlertReceived, BadRecordMac, ConfigError, IllegalParameter
from hybridkex.secret import Secret
from hybridkex.tls.config import ClientConfig, ServerConfig

STATUS = oqs_status()
THREE = Group(
    code=0xFEC0,
    name="three parts",
    exchange=Concat(SECP256R1.exchange, MLKEM768.exchange, X25519.exchange),
)
GROUPS = [*ALL_GROUPS, THREE, *(oqs_group(name) for name in STATUS.kems if name in CODES)]
if STATUS.available and "HQC-3" in STATUS.kems:
    exchange = Concat(X25519MLKEM768.exchange, OqsKem("HQC-3"))
    GROUPS.append(Group(code=0xFEC1, name="X25519MLKEM768HQC-3", exchange=exchange))
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
@pytest.mark.parametrize("group", GROUPS, ids=str)
def test_rubbish_of_the_right_length(group: Group, liar: str) -> None:
    """A KEM that takes any bytes gives another secret: then no record of the peer's opens."""
    for change in (lambda s: bytes(len(s)), lambda s: b"\xff" * len(s), lambda s: s[::-1]):
        victim, other = clash(group, change, liar)
        if isinstance(victim, IllegalParameter):
            assert refused((victim, other))
        else:
            # Not even the alert can be read, where it is encrypted already.
            assert BadRecordMac in (type(victim), type(other)), (victim, other)
            assert isinstance(victim, BadRecordMac | AlertReceived), victim
            assert isinstance(other, BadRecordMac | AlertReceived), other


@pytest.mark.parametrize("part", [0, 1, 2])
def test_one_malformed_part_of_three(part: int) -> None:
    """Whatever part it is, the whole share is refused; that of ML-KEM by the server alone."""
    for liar in ("client", "server"):
        lengths = [
            one.offer_length if liar == "client" else one.answer_length
            for one in THREE.exchange.parts
        ]

        def change(share: bytes, lengths: list[int] = lengths) -> bytes:
            start = sum(lengths[:part])
            filling = b"\xff" if part == 1 else b"\0"
            return share[:start] + filling * lengths[part] + share[start + lengths[part] :]

        if (part, liar) != (1, "server"):
            assert refused(clash(THREE, change, liar)), (part, liar)


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
