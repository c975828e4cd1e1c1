"""The exchange of one round trip, its attackers, and two channels that are not TLS."""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import trio
from noise.connection import NoiseConnection

from hybridkex import (
    MLKEM768,
    SECP256R1,
    X25519,
    X25519MLKEM768,
    Secret,
)
from hybridkex.auth import KnownPeers, Pins, RawIdentity, WebOfTrust, endorsement
from hybridkex.combiner import (
    ExchangeConfig,
    Exchanged,
    Method,
    PskAuthentication,
    SignatureAuthentication,
    exchange,
)
from hybridkex.errors import (
    CertificateRejected,
    ConfigError,
    DecodeError,
    DecryptError,
    HandshakeTimeout,
    HybridkexError,
    IllegalParameter,
    TruncationError,
)
from hybridkex.qkd.in_process import in_process_pair

PSK = PskAuthentication(Secret(bytes(range(32))))
Change = Callable[[int, bytes], bytes]


@dataclass
class Wire(trio.abc.Stream):
    """One end of an in-memory stream whose outgoing messages can be changed and are kept."""

    inner: Any
    change: Change | None = None
    sent: list[bytes] = field(default_factory=list)

    async def send_all(self, data: bytes) -> None:
        if self.change is not None:
            data = self.change(len(self.sent), data)
        self.sent.append(data)
        await self.inner.send_all(data)

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        return await self.inner.receive_some(max_bytes)

    async def wait_send_all_might_not_block(self) -> None:
        await self.inner.wait_send_all_might_not_block()

    async def aclose(self) -> None:
        await self.inner.aclose()


Outcome = Exchanged | Exception


async def both(
    initiator: dict[str, Any] | None = None,
    responder: dict[str, Any] | None = None,
    *,
    authentication: tuple[Any, Any] = (PSK, PSK),
    change: tuple[Change | None, Change | None] = (None, None),
    **common: Any,
) -> tuple[Outcome, Outcome, Wire, Wire]:
    """Run both sides; each ends with a result or a typed error, and closes its stream."""
    common = {"label": b"test", "time_limit": 5, **common}
    ends = trio.testing.memory_stream_pair()
    wires = Wire(ends[0], change[0]), Wire(ends[1], change[1])
    outcome: dict[str, Outcome] = {}

    async def one(role: Any, wire: Wire, auth: Any, names: tuple[str, str], own: Any) -> None:
        options = {"local": names[0], "peer": names[1], **common, **(own or {})}
        try:
            config = ExchangeConfig(role=role, authentication=auth, **options)
            outcome[role] = await exchange(wire, config)
        except HybridkexError as error:
            outcome[role] = error
            await wire.aclose()

    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            names = ("alice.example", "bob.example")
            nursery.start_soon(one, "initiator", wires[0], authentication[0], names, initiator)
            nursery.start_soon(
                one, "responder", wires[1], authentication[1], names[::-1], responder
            )
    return outcome["initiator"], outcome["responder"], *wires


def signed() -> tuple[SignatureAuthentication, SignatureAuthentication]:
    alice, bob = RawIdentity.generate(), RawIdentity.generate()
    return (
        SignatureAuthentication(alice, Pins(frozenset({bob.pin}))),
        SignatureAuthentication(bob, Pins(frozenset({alice.pin}))),
    )


def agree(one: Outcome, other: Outcome) -> Exchanged:
    assert isinstance(one, Exchanged), one
    assert isinstance(other, Exchanged), other
    assert one.key == other.key
    assert one.qkd_key_ids == other.qkd_key_ids
    return one


@pytest.mark.parametrize("method", Method)
@pytest.mark.parametrize("how", ["psk", "signatures"])
async def test_both_have_the_same_key(method: Method, how: str) -> None:
    authentication = signed() if how == "signatures" else (PSK, PSK)
    a, b, out, back = await both(authentication=authentication, method=method, length=48)
    result = agree(a, b)
    assert len(result.key) == 48
    assert [len(out.sent), len(back.sent)] == [2, 1]  # one round trip, and the confirmation
    if how == "signatures":
        assert result.peer is not None
        assert result.peer.verified_by == "pin"
    again, _, _, _ = await both(authentication=authentication, method=method, length=48)
    assert isinstance(again, Exchanged)
    assert again.key != result.key


async def test_every_kind_of_exchange() -> None:
    for exchanges in (
        (X25519MLKEM768.exchange,),
        (SECP256R1.exchange, X25519.exchange, MLKEM768.exchange),
    ):
        a, b, *_ = await both(exchanges=exchanges)
        names = tuple(part.name for one in exchanges for part in one.parts)
        assert agree(a, b).parts == names


async def test_a_qkd_key_is_one_of_the_legs() -> None:
    ours, theirs = in_process_pair("alice", "bob")
    a, b, out, back = await both({"key_source": ours}, {"key_source": theirs})
    result = agree(a, b)
    assert len(result.qkd_key_ids) == 1
    assert [len(wire.sent) for wire in (out, back)] == [2, 2]
    key_id = result.qkd_key_ids[0].encode()
    assert [key_id in message for message in out.sent] == [False, True]


class CountingSource:
    """A key source that counts look-ups."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.drawn = self.asked = 0
        self.local_sae, self.peer_sae = inner.local_sae, inner.peer_sae
        self.knows, self.status = inner.knows, inner.status

    async def get_key(self) -> Any:
        self.drawn += 1
        return await self.inner.get_key()

    async def get_key_with_id(self, name: Any) -> Any:
        self.asked += 1
        return await self.inner.get_key_with_id(name)


@pytest.mark.parametrize("how", ["psk", "signatures"])
async def test_replays_cost_no_look_up_and_no_key(how: str) -> None:
    """Copies of an offer, before and after the exchange that it belongs to, with the copied finish
    behind it: the key source is asked once, for the peer itself."""
    ours, theirs = map(CountingSource, in_process_pair("alice", "bob"))
    authentication = signed() if how == "signatures" else (PSK, PSK)
    names: dict[str, Any] = {"local": "bob.example", "peer": "alice.example", "label": b"test"}
    config = ExchangeConfig(
        role="responder", authentication=authentication[1], key_source=theirs, **names
    )

    async def replay(*messages: bytes) -> None:
        near, far = trio.testing.memory_stream_pair()
        for message in messages:
            await far.send_all(message)
        await far.send_eof()
        authenticated = []
        with pytest.raises((TruncationError, DecryptError)):
            await exchange(near, config, on_authenticated=lambda: authenticated.append(1))
        assert not authenticated

    copies: list[bytes] = []

    def copy(index: int, data: bytes) -> bytes:
        copies.append(data)
        return data

    class CopyFirst(Wire):
        """The copies reach the responder, on other connections, before the original does."""

        async def send_all(self, data: bytes) -> None:
            copies.append(data)
            for _ in range(50 if len(copies) == 1 else 3):
                await replay(*copies)
            await super().send_all(data)

    ends = trio.testing.memory_stream_pair()
    results: dict[str, Exchanged] = {}

    async def side(role: str, stream: Any, config: ExchangeConfig) -> None:
        results[role] = await exchange(stream, config)

    async with trio.open_nursery() as nursery:
        initiator = ExchangeConfig(
            role="initiator",
            authentication=authentication[0],
            key_source=ours,
            **(names | {"local": names["peer"], "peer": names["local"]}),
        )
        nursery.start_soon(side, "initiator", CopyFirst(ends[0]), initiator)
        nursery.start_soon(side, "responder", ends[1], config)
    assert results["initiator"].key == results["responder"].key
    for _ in range(10):
        await replay(*copies)
    assert len(copies) == 2
    assert (ours.drawn, theirs.asked) == (1, 1)


async def test_no_key_is_drawn_for_a_responder_that_is_not_the_peer() -> None:
    ours = CountingSource(in_process_pair("alice", "bob")[0])
    (alice, _), (_, eve) = signed(), signed()
    a, *_ = await both(
        {"key_source": ours}, {"key_source": ours}, authentication=(alice, eve), time_limit=1
    )
    assert isinstance(a, CertificateRejected | TruncationError)
    assert ours.drawn == ours.asked == 0


async def test_kmes_that_give_different_keys() -> None:
    """Both sides notice, and neither has a key."""

    class Wrong(CountingSource):
        async def get_key_with_id(self, name: Any) -> Any:
            return replace(await self.inner.get_key_with_id(name), key=Secret(bytes(32)))

    ours, theirs = in_process_pair("alice", "bob")
    a, b, *_ = await both({"key_source": ours}, {"key_source": Wrong(theirs)})
    assert (type(a), type(b)) == (TruncationError, DecryptError)
    assert "KME" in str(b)


async def test_a_replayed_offer_confirms_nothing() -> None:
    _, _, out, _ = await both()
    replay, stuck, *_ = await both(change=(lambda i, d: out.sent[i], None))
    assert isinstance(replay, DecryptError)  # it does not fit what the responder answers
    assert isinstance(stuck, TruncationError | DecryptError)


@pytest.mark.parametrize(
    "option",
    [
        {"label": b"other"},
        {"context": b"other"},
        {"length": 33},
        {"method": Method.CASCADE},
        {"peer": "carol.example"},
        {"local": "carol.example"},
    ],
    ids=lambda option: next(iter(option)),
)
async def test_both_must_mean_the_same(option: dict[str, Any]) -> None:
    for authentication in ((PSK, PSK), signed()):
        a, b, *_ = await both(option, authentication=authentication)
        assert isinstance(b, DecryptError)
        assert isinstance(a, TruncationError)


async def test_other_exchanges_or_no_qkd_key() -> None:
    a, b, *_ = await both({"exchanges": (X25519.exchange,)})
    assert (type(a), type(b)) == (TruncationError, IllegalParameter)
    a, b, *_ = await both(None, {"key_source": in_process_pair("alice", "bob")[1]})
    assert (type(a), type(b)) == (TruncationError, DecryptError)
    a, b, *_ = await both({"key_source": in_process_pair("alice", "bob")[0]})
    assert (type(a), type(b)) == (TruncationError, DecryptError)
    stranger = in_process_pair("alice", "eve", kmes=("x", "y"))[0]
    friend = in_process_pair("alice", "bob")[1]
    a, b, *_ = await both({"key_source": stranger}, {"key_source": friend})
    assert (type(a), type(b)) == (TruncationError, IllegalParameter)


async def test_the_wrong_peer() -> None:
    other = PskAuthentication(Secret(bytes(32)))
    a, b, *_ = await both(authentication=(other, PSK))
    assert (type(a), type(b)) == (TruncationError, DecryptError)
    (alice, bob), (eve, _) = signed(), signed()
    a, b, *_ = await both(authentication=(eve, bob))
    assert (type(a), type(b)) == (TruncationError, CertificateRejected)
    a, b, *_ = await both(
        authentication=(
            alice,
            SignatureAuthentication(eve.identity, Pins(frozenset({alice.identity.pin}))),
        )
    )
    assert (type(a), type(b)) == (CertificateRejected, TruncationError)


async def test_another_known_peer_is_not_the_one_who_is_expected(tmp_path: Any) -> None:
    """Mallory is known to Bob and says that she is Alice: her key is good, and not Alice's."""
    pysequoia = pytest.importorskip("pysequoia", reason="needs pysequoia: pip install pysequoia")
    alice, bob, mallory = (RawIdentity.generate() for _ in range(3))
    known = KnownPeers(tmp_path / "known")
    ann = pysequoia.Tsk.generate("Ann <ann@example.org>")
    until = datetime.now(UTC).date() + timedelta(days=1)
    statements = []
    for name, who in (("alice.example", alice), ("mallory.example", mallory)):
        known.add(name, who.chain[0])
        text = endorsement(name, who.pin, until)
        statements.append(bytes(pysequoia.sign(ann.signer(), text)))
    web = WebOfTrust((str(ann.extract_certificate()).encode(),), tuple(statements))
    trusts_bob = Pins(frozenset({bob.pin}))
    for verifier in (known, web):
        theirs = SignatureAuthentication(bob, verifier)
        a, b, *_ = await both(authentication=(SignatureAuthentication(alice, trusts_bob), theirs))
        assert agree(a, b)
        a, b, *_ = await both(authentication=(SignatureAuthentication(mallory, trusts_bob), theirs))
        assert (type(a), type(b)) == (TruncationError, CertificateRejected)
        assert "mallory.example" in str(b)


class Trickle(Wire):
    """Gives a few bytes at a time."""

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        return await self.inner.receive_some(min(max_bytes or 11, 11))


@pytest.mark.parametrize("role", ["initiator", "responder"])
async def test_cancelled_anywhere(role: str, autojump_clock: trio.testing.MockClock) -> None:
    """At every checkpoint of one side: it ends at once, and the other says that it is alone."""
    step = 0
    while True:
        ends = trio.testing.memory_stream_pair()
        wires = {"initiator": Trickle(ends[0]), "responder": Trickle(ends[1])}
        outcome: dict[str, Any] = {}
        scope = trio.CancelScope()

        class Counted(trio.abc.Instrument):
            left = step
            victim: Any = None

            def before_task_step(self, task: Any, scope: trio.CancelScope = scope) -> None:
                if task is self.victim:
                    if self.left == 0:
                        scope.cancel()
                    self.left -= 1

        counted = Counted()

        async def side(
            own: Any,
            outcome: dict[str, Any] = outcome,
            wires: Any = wires,
            scope: Any = scope,
            counted: Any = counted,
        ) -> None:
            if own == role:
                counted.victim = trio.lowlevel.current_task()
            names = ("a", "b") if own == "initiator" else ("b", "a")
            with scope if own == role else trio.CancelScope():
                try:
                    config = ExchangeConfig(
                        role=own, local=names[0], peer=names[1], authentication=PSK,
                        label=b"l", exchanges=(X25519.exchange,), time_limit=5,
                    )  # fmt: skip
                    outcome[own] = await exchange(wires[own], config)
                except TruncationError as error:
                    outcome[own] = error
            if own == role and own not in outcome:
                await wires[own].aclose()

        trio.lowlevel.add_instrument(counted)
        try:
            async with trio.open_nursery() as nursery:
                for own in wires:
                    nursery.start_soon(side, own)
        finally:
            trio.lowlevel.remove_instrument(counted)
        other = outcome["responder" if role == "initiator" else "initiator"]
        if isinstance(outcome.get(role), Exchanged):
            agree(outcome[role], other)
            break
        # The initiator may have its key and confirm it to a responder that is not there any more.
        assert isinstance(other, TruncationError) or role == "responder", step
        step += 1
    assert step > 20


async def test_first_use_is_remembered_when_all_is_done(tmp_path: Any) -> None:
    alice, bob = RawIdentity.generate(), RawIdentity.generate()
    known = KnownPeers(tmp_path / "known")
    authentication = (
        SignatureAuthentication(alice, known),
        SignatureAuthentication(bob, Pins(frozenset({alice.pin}))),
    )

    def damage(index: int, data: bytes) -> bytes:
        return data[:-1] + bytes((data[-1] ^ 1,))  # the responder's confirmation

    a, _, *_ = await both(authentication=authentication, change=(None, damage))
    assert isinstance(a, DecryptError)
    assert not known.path.exists()
    a, b, *_ = await both(authentication=authentication)
    assert agree(a, b).peer is not None
    assert a.peer.verified_by == "first use"  # type: ignore[union-attr]
    a, b, *_ = await both(authentication=authentication)
    assert agree(a, b).peer.verified_by == "known"  # type: ignore[union-attr]


@pytest.mark.parametrize("how", ["psk", "signatures"])
async def test_no_bit_can_be_changed(how: str) -> None:
    """Of each message, bits all along it; whatever is changed, no side accepts a key alone."""
    authentication = signed() if how == "signatures" else (PSK, PSK)
    _, _, out, back = await both(authentication=authentication)
    targets = [(0, 0, len(out.sent[0])), (0, 1, len(out.sent[1])), (1, 0, len(back.sent[0]))]
    for side, message, length in targets:
        # Past the first four bytes, whose change only makes the other side wait.
        for position in range(4, length, 61 if length > 100 else 5):

            def flip(index: int, data: bytes, m: int = message, p: int = position) -> bytes:
                if index != m:
                    return data
                return data[:p] + bytes((data[p] ^ 0x10,)) + data[p + 1 :]

            change = (flip, None) if side == 0 else (None, flip)
            a, b, *_ = await both(authentication=authentication, change=change, time_limit=1)
            assert not isinstance(b, Exchanged), (side, message, position)
            if message == 0:
                assert not isinstance(a, Exchanged), (side, message, position)


async def test_a_message_reflected_to_its_sender() -> None:
    """Selfie: with one key for both directions, our own offer is not an answer to us."""
    near, far = trio.testing.memory_stream_pair()

    async def mirror() -> None:
        await far.send_all(await far.receive_some(1 << 20))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(mirror)
        config = ExchangeConfig(
            role="initiator", local="a", peer="b", authentication=PSK, label=b"test"
        )
        with pytest.raises(DecodeError):
            await exchange(near, config)


async def test_silence_rubbish_and_floods() -> None:
    near, far = trio.testing.memory_stream_pair()
    options: dict[str, Any] = {"local": "a", "peer": "b", "authentication": PSK, "label": b"l"}
    responder = ExchangeConfig(role="responder", **options)
    with pytest.raises(HandshakeTimeout):
        await exchange(near, ExchangeConfig(role="responder", time_limit=0.05, **options))
    await far.send_all(b"\xff\xff\xff\xff")
    with pytest.raises(IllegalParameter):
        await exchange(near, responder)
    for rubbish in (b"", b"\0\0\0\1x", bytes(8)):
        await far.send_all(len(rubbish).to_bytes(4, "big") + rubbish)
        with pytest.raises(DecodeError):
            await exchange(near, responder)
    await far.aclose()
    with pytest.raises(TruncationError):
        await exchange(near, responder)
    for wrong in (
        {"peer": "a"},
        {"local": ""},
        {"exchanges": ()},
        {"label": b""},
        {"length": 0},
        {"length": -1},
        {"length": 8065},
        {"length": "32"},
        {"length": True},
        {"label": "text"},
        {"context": None},
        {"peer": b"b"},
        {"peer": "\ud800"},
        {"method": "CatKDF"},
        {"time_limit": 0},
        {"time_limit": math.nan},
        {"role": "Initiator"},
        {"role": "initiator", "peer": "no host", "authentication": signed()[0]},
    ):
        with pytest.raises(ConfigError):
            ExchangeConfig(**({"role": "responder"} | options | wrong))
    with pytest.raises(ConfigError):
        PskAuthentication(Secret(bytes(15)))


async def test_what_follows_is_the_callers() -> None:
    a, b, out, back = await both()
    agree(a, b)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(out.send_all, b"data")
        assert await back.receive_some(10) == b"data"


async def test_a_noise_channel_with_the_key() -> None:
    """NNpsk0 of the Noise framework (revision 34, section 9): the key is its PSK."""

    async def noise(wire: Wire, result: Exchanged, *, initiator: bool) -> NoiseConnection:
        channel = NoiseConnection.from_name(b"Noise_NNpsk0_25519_ChaChaPoly_SHA256")
        channel.set_psks(psk=result.key.reveal())
        channel.set_as_initiator() if initiator else channel.set_as_responder()
        channel.start_handshake()
        for ours in (initiator, not initiator):
            if ours:
                await wire.send_all(bytes(channel.write_message()))
            else:
                channel.read_message(bytes(await wire.receive_some(65535)))
        return channel

    a, b, out, back = await both(authentication=signed(), label=b"noise psk")
    agree(a, b)
    channels: dict[bool, NoiseConnection] = {}

    async def side(wire: Wire, result: Outcome, initiator: bool) -> None:
        assert isinstance(result, Exchanged)
        channels[initiator] = await noise(wire, result, initiator=initiator)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(side, out, a, True)
        nursery.start_soon(side, back, b, False)
    secret = b"over Noise " + hashlib.sha256(b"x").digest()
    assert channels[False].decrypt(channels[True].encrypt(secret)) == secret
    assert channels[True].decrypt(channels[False].encrypt(secret)) == secret
