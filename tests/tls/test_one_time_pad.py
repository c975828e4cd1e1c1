"""The one-time pad between two engines: what is agreed, what a record takes, what is refused."""

import contextlib
import gc
import itertools
import os
import random
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from cryptography.exceptions import InvalidTag
from leaks import leaks
from test_downgrade import Attacker, damaged, without
from tls_glue import Pair, data_of
from update_glue import OFF, PREFER, REQUIRE, both, configs, events_of, policy, settle

from hybridkex import (
    ClientConfig,
    FreshKeys,
    KeyUpdates,
    OneTimePad,
    PadToMultiple,
    Requirement,
    ServerConfig,
)
from hybridkex.constants import PAD_RECORD, PAD_SUITE, Alert, ExtensionType, HandshakeType
from hybridkex.crypto.one_time_pad import OVERHEAD, Pad
from hybridkex.crypto.schedule import TrafficSecret
from hybridkex.errors import (
    AlertReceived,
    BadRecordMac,
    ConfigError,
    IllegalParameter,
    LocalStateError,
    PadExhausted,
    PeerError,
    PolicyRefused,
    UnexpectedMessage,
)
from hybridkex.reasons import Reason
from hybridkex.secret import Secret
from hybridkex.tls import fresh_negotiation
from hybridkex.tls.connection import Connection
from hybridkex.tls.events import ApplicationData, CloseReceived, EpochBegan, PadKeyWanted
from hybridkex.tls.one_time_pad import MAX_PAD_KEYS, content_within
from hybridkex.wire import extensions as ext
from hybridkex.wire.messages import decode
from hybridkex.wire.update_messages import PadKey

SIDES = ["client", "server"]
ALERTS = 38


class Keys:
    """The KMEs of both ends: every key has a name, and is given out once at each end."""

    def __init__(self, size: int = 32) -> None:
        self.size = size
        self.made: dict[bytes, bytes] = {}
        self._waiting: dict[bytes, bytes] = {}

    def draw(self, size: int | None = None) -> tuple[bytes, Secret]:
        key = os.urandom(size or self.size)
        name = b"key-%d" % len(self.made)
        self.made[name] = self._waiting[name] = key
        return name, Secret(key)

    def look_up(self, name: bytes) -> Secret:
        return Secret(self._waiting.pop(name))


def padded(ours: Any = None, theirs: Any = None, **more: Any) -> Pair:
    pad = policy(one_time_pad=REQUIRE)
    return Pair.make(*configs(ours or pad, theirs or pad, **more)).connect()


def fill(end: Connection, keys: Keys, size: int) -> None:
    """Extend the pad of what one end sends by ``size`` bytes or a little more."""
    for _ in range(0, size, keys.size):
        end.extend_pad(*keys.draw())


def deliver(pair: Pair, keys: Keys) -> None:
    """Carry everything, with the keys that are asked for."""
    while True:
        pair.pump()
        if not answer(pair, keys):
            return


def answer(pair: Pair, keys: Keys) -> bool:
    asked = False
    for end, events in ((pair.client, pair.client_events), (pair.server, pair.server_events)):
        for one in [one for one in events if isinstance(one, PadKeyWanted)]:
            events.remove(one)
            end.provide_pad_key(keys.look_up(one.identity))
            asked = True
        while (event := end.next_event()) is not None:
            events.append(event)
            asked = True
    return asked


def ready(size: int = 1000, **more: Any) -> tuple[Pair, Keys]:
    pair, keys = padded(**more), Keys()
    for end in (pair.client, pair.server):
        fill(end, keys, size)
    deliver(pair, keys)
    return pair, keys


def left(end: Connection) -> int:
    pad = end._records.writer.pad
    assert pad is not None
    return pad.left


def received(pair: Pair, who: str) -> bytes:
    return data_of(pair.client_events if who == "client" else pair.server_events)


# --- what is agreed on ----------------------------------------------------------------------------


def oracle(ours: Requirement, theirs: Requirement) -> bool | None:
    """Whether there is a pad; ``None``: no session."""
    agreed = OFF not in (ours, theirs)
    return None if REQUIRE in (ours, theirs) and not agreed else agreed


@pytest.mark.parametrize(
    ("ours", "theirs"), list(itertools.product(Requirement, repeat=2)), ids=str
)
def test_the_policies_of_both_sides(ours: Requirement, theirs: Requirement) -> None:
    pair = Pair.make(
        *configs(
            policy(fresh_keys=PREFER, one_time_pad=ours),
            policy(fresh_keys=PREFER, one_time_pad=theirs),
        )
    )
    pair.client.start()
    pair.fight()
    expected = oracle(ours, theirs)
    if expected is None:
        errors = [one for one in pair.errors.values() if isinstance(one, PolicyRefused)]
        assert [one.reason for one in errors] == [Reason.PAD_REQUIRED]
        assert not pair.both_complete
        return
    for end in (pair.client, pair.server):
        assert end.session.one_time_pad is expected
        assert (end.pad is not None) is expected
        assert end.session.as_json()["one_time_pad"] is expected
    if not expected:
        pair.exchange(b"to server", b"to client")
        assert ("NO ONE-TIME PAD" in str(pair.client.session)) is (ours is PREFER)
    else:
        assert "under a one-time pad" in str(pair.client.session)
        with pytest.raises(PadExhausted):
            pair.client.send_data(b"not without")


@pytest.mark.parametrize("who", SIDES)
def test_a_pad_that_is_required_of_a_peer_without_the_slot(
    who: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer = fresh_negotiation.offer
    monkeypatch.setattr(
        fresh_negotiation,
        "offer",
        lambda config: [one for one in offer(config) if not isinstance(one, ext.FreshQkdKeysOffer)],
    )
    strict, loose = policy(one_time_pad=REQUIRE), policy(one_time_pad=PREFER)
    pair = Pair.make(*configs(*((strict, loose) if who == "client" else (loose, strict))))
    pair.client.start()
    pair.fight()
    error = pair.errors[who]
    assert isinstance(error, PolicyRefused)
    assert error.reason is Reason.PAD_REQUIRED


@pytest.mark.parametrize("suite", [PAD_SUITE, 0x1301])
def test_an_answer_that_does_not_fit_the_offer(suite: int, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ext.TlsFlags(frozenset((64,)))
    answers = [flags] if suite == PAD_SUITE else [flags, ext.FreshQkdKeysAnswer(1)]
    answers.append(ext.OneTimePadAnswer(suite))  # type: ignore[arg-type]
    monkeypatch.setattr(fresh_negotiation, "answer", lambda agreed: answers)
    pair = Pair.make(*configs(policy(one_time_pad=PREFER), policy(one_time_pad=PREFER)))
    pair.client.start()
    pair.fight()
    error = pair.errors["client"]
    assert isinstance(error, IllegalParameter)
    assert error.reason is Reason.PAD_ANSWER


def test_a_server_takes_no_suite_that_it_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    offer = ext.OneTimePadOffer((0xFF02, 0xFF03))
    monkeypatch.setattr(fresh_negotiation, "OneTimePadOffer", offer, raising=False)
    inner = fresh_negotiation.offer

    def other(config: ClientConfig) -> list[ext.Extension]:
        return [offer if isinstance(one, ext.OneTimePadOffer) else one for one in inner(config)]

    monkeypatch.setattr(fresh_negotiation, "offer", other)
    pad = policy(one_time_pad=PREFER)
    assert not Pair.make(*configs(pad, pad)).connect().client.session.one_time_pad


def test_an_attacker_on_the_wire_takes_the_pad_from_nobody() -> None:
    """Two ends that prefer one, and an attacker who strips or damages what says so."""
    pad = policy(one_time_pad=PREFER)
    code = int(ExtensionType.ONE_TIME_PAD)
    for change in (without(code), *(damaged(code, place) for place in range(3))):
        attacker = Attacker(HandshakeType.CLIENT_HELLO, change)
        pair = Pair.make(*configs(pad, pad), on_wire=attacker)
        pair.client.start()
        pair.fight()
        assert attacker.changed == 1
        assert not pair.both_complete
        assert pair.errors


def test_a_configuration_with_a_pad() -> None:
    ours, theirs = configs()
    pad = ClientConfig(
        verifier=ours.verifier, psk_source=ours.psk_source, one_time_pad=OneTimePad()
    )
    assert pad.policy_in_force.one_time_pad is REQUIRE
    assert pad.policy_in_force.fresh_keys is REQUIRE
    assert (
        ServerConfig(
            identities=theirs.identities, psk_source=theirs.psk_source, one_time_pad=OneTimePad()
        ).tickets
        is None
    )
    for wrong, match in (
        ({"one_time_pad": OneTimePad()}, "needs a source"),
        ({"policy": policy(one_time_pad=PREFER)}, "needs a source"),
        ({"one_time_pad": OneTimePad(), "policy": policy(one_time_pad=OFF)}, "turns it off"),
        ({"one_time_pad": 1024}, "OneTimePad"),
    ):
        with pytest.raises(ConfigError, match=match):
            ClientConfig(verifier=ours.verifier, **wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="fresh_keys is off"):
        policy(fresh_keys=OFF, one_time_pad=PREFER)
    with pytest.raises(ConfigError, match="fresh_keys, which the policy turns off"):
        ClientConfig(
            verifier=ours.verifier,
            psk_source=ours.psk_source,
            policy=policy(fresh_keys=OFF),
            one_time_pad=OneTimePad(),
        )
    for wrong_pad in ({"hold": 255}, {"hold": 16385}, {"deadline": 0.0}, {"hold": "x"}):
        with pytest.raises(ConfigError):
            OneTimePad(**wrong_pad)  # type: ignore[arg-type]


# --- what a record takes --------------------------------------------------------------------------


def poly1305(point: bytes, s: bytes, message: bytes) -> bytes:
    """RFC 8439 section 2.5.1, a second time."""
    r = int.from_bytes(point, "little") & 0x0FFFFFFC0FFFFFFC0FFFFFFC0FFFFFFF
    total = 0
    for start in range(0, len(message), 16):
        block = message[start : start + 16] + b"\1"
        total = (total + int.from_bytes(block, "little")) * r % ((1 << 130) - 5)
    return ((total + int.from_bytes(s, "little")) % (1 << 128)).to_bytes(16, "little")


class Stock:
    """The bytes of some keys in order, each taken once."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def take(self, size: int) -> bytes:
        assert size <= len(self.data)
        taken, self.data = self.data[:size], self.data[size:]
        return taken


def test_every_record_is_protected_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the specification alone: with integers, and no part of the package."""
    sealed: list[tuple[int, bytes]] = []
    inner = Pad.seal

    def seal(self: Pad, type_: int, content: Any) -> bytes:
        found = inner(self, type_, content)
        sealed.append((type_, found))
        return found

    monkeypatch.setattr(Pad, "seal", seal)
    pair, keys = padded(), Keys()
    fill(pair.client, keys, 4000)
    messages = [random.randbytes(random.randrange(1, 200)) for _ in range(20)]
    for one in messages:
        pair.client.send_data(one)
    pair.client.send_close()
    stock = Stock(b"".join(keys.made.values()))
    point = stock.take(16)
    expected = [(23, one) for one in messages] + [(21, b"\1\0")]
    for number, ((type_, content), (seen, record)) in enumerate(zip(expected, sealed, strict=True)):
        assert seen == type_
        plain = content + bytes((type_,))
        mask = stock.take(len(plain))
        hidden = bytes(a ^ b for a, b in zip(plain, mask, strict=True))
        tag = poly1305(point, stock.take(16), number.to_bytes(8, "big") + hidden)
        assert record == hidden + tag
    deliver(pair, keys)
    assert received(pair, "server") == b"".join(messages)
    assert events_of(pair, CloseReceived, "server")


VECTOR = (
    "71656672777e36766c397e7a6b73099ba17cbdfc685c4861f3cf7b3b12c4b1",
    "2e302444ec9239e0862d80cee5e04fd55ae065",
)


def test_the_vector_of_the_documentation() -> None:
    pad = Pad()
    pad.extend(Secret(bytes(range(32))))
    pad.extend(Secret(bytes(range(32, 96))))
    assert pad.seal(23, b"attack at dawn").hex() == VECTOR[0]
    assert pad.seal(21, b"\1\0").hex() == VECTOR[1]
    assert pad.left == 96 - 16 - 31 - 19
    other = Pad()
    other.extend(Secret(bytes(range(96))))
    assert other.open(bytes.fromhex(VECTOR[0])) == (23, b"attack at dawn")
    assert other.open(bytes.fromhex(VECTOR[1])) == (21, b"\1\0")


class Uses:
    """Every byte of every pad that is taken, by its key and its place there."""

    def __init__(self, keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
        self.taken: dict[int, bytearray] = {}
        inner = Pad._take

        def take(pad: Pad, size: int) -> bytes:
            found = inner(pad, size)
            assert len(found) == size
            self.taken.setdefault(id(pad), bytearray()).extend(found)
            return found

        monkeypatch.setattr(Pad, "_take", take)

    def of(self, end: Connection) -> bytes:
        return bytes(self.taken.get(id(end._records.writer.pad), b""))


@pytest.mark.parametrize("limit", [None, 64, 700], ids=["16384", "64", "700"])
def test_the_budget_is_exact(limit: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every byte of key is counted over random messages: what is announced, what is taken, and what
    the formula says."""
    uses = Uses(keys := Keys(), monkeypatch)
    pair = padded(record_size_limit=limit)
    record = (limit or 16384) - OVERHEAD
    spent = {"client": 0, "server": 0}
    for _ in range(150):
        who = random.choice(SIDES)
        end, other = both(pair, who)
        message = random.randbytes(random.choice((1, 2, 30, 31, record, record + 1, 2000)))
        cost = len(message) + 17 * -(-len(message) // record)
        first = 0 if spent[who] else 16
        budget = end.pad
        assert budget is not None
        assert budget.record == record
        assert budget.cost(len(message)) == cost
        if budget.message < len(message):
            with pytest.raises(PadExhausted) as caught:
                end.send_data(message)
            assert f"enough for {budget.message:,} bytes" in str(caught.value)
            assert not end.has_data_to_send
            assert end.pad == budget  # nothing is taken
            missing = cost + first + ALERTS - left(end)
            assert missing > 0
            fill(end, keys, missing)
        assert end.pad.message >= len(message)
        before = left(end)
        end.send_data(message)
        assert left(end) == before - cost - first
        spent[who] += cost + first
        assert end.pad.sent == spent[who]
        deliver(pair, keys)
        assert other.pad is not None
        assert other.pad.received == spent[who]
        assert other.pad.receiving == left(end)
    for who in SIDES:
        end, _ = both(pair, who)
        used = uses.of(end)
        assert len(used) == spent[who]
        assert b"".join(keys.made[name] for name in NAMED.get(id(end), ())).startswith(used)


NAMED: dict[int, list[bytes]] = {}


@pytest.fixture(autouse=True)
def names(monkeypatch: pytest.MonkeyPatch) -> None:
    NAMED.clear()
    inner = Connection.extend_pad

    def extend_pad(self: Connection, identity: bytes, key: Secret) -> None:
        inner(self, identity, key)
        NAMED.setdefault(id(self), []).append(identity)

    monkeypatch.setattr(Connection, "extend_pad", extend_pad)


def test_the_longest_message_is_the_longest() -> None:
    for size in (0, 53, 54, 71, 72, 500, 1000):
        for limit in (64, 300, 16384):
            pair, keys = padded(record_size_limit=limit), Keys(1)
            fill(pair.client, keys, size)
            assert pair.client.pad is not None
            longest = pair.client.pad.message
            assert longest == content_within(size - 54, limit)
            with pytest.raises(PadExhausted):
                pair.client.send_data(bytes(longest + 1))
            if longest:
                pair.client.send_data(bytes(longest))
                assert ALERTS <= left(pair.client) <= ALERTS + OVERHEAD
            pair.client.send_close()
            deliver(pair, keys)
            assert received(pair, "server") == bytes(longest)
            assert pair.server.close_received


def test_padding_costs_no_key() -> None:
    pair, _ = ready(padding=PadToMultiple(size=256))
    before = left(pair.client)
    pair.client.send_data(b"x")
    assert left(pair.client) == before - 16 - 18
    assert len(pair.client.data_to_send()) == 5 + 256 + 1 + 16


def test_a_thief_of_all_secrets_but_the_pad() -> None:
    """Who has recorded everything and has the key log, which is to have broken ECDH, ML-KEM and the
    QKD key of the handshake at once, finds records that any message of the same length explains."""
    log: list[str] = []
    pair, keys = ready(key_log=log.append)
    secret, other = b"the convoy leaves at dawn", b"nothing to report, stay i"
    pair.client.send_data(secret)
    record = bytes(pair.client.data_to_send())
    texts = {line.split()[0]: line.split()[2] for line in log}
    assert not any(key.hex() in "".join(texts.values()) for key in keys.made.values())
    opened = b""
    suite = pair.client._connected().suite
    traffic = TrafficSecret(suite, Secret(bytes.fromhex(texts["CLIENT_TRAFFIC_SECRET_0"])))
    key, iv = traffic.key_and_iv()
    for number in range(4):  # the keys were named in records before
        nonce = int.from_bytes(iv, "big") ^ number
        with contextlib.suppress(InvalidTag):
            opened = suite.aead(key).decrypt(nonce.to_bytes(12, "big"), record[5:], record[:5])
    assert opened[-1] == PAD_RECORD
    assert secret not in opened
    hidden, tag = opened[: len(secret) + 1], opened[len(secret) + 1 : -1]
    explanation = Pad()
    mask = bytes(a ^ b for a, b in zip(hidden, other + b"\x17", strict=True))
    point = bytes(range(16))
    empty = poly1305(point, bytes(16), bytes(8) + hidden)
    s = (int.from_bytes(tag, "little") - int.from_bytes(empty, "little")) % (1 << 128)
    explanation.extend(Secret(point + mask + s.to_bytes(16, "little")))
    assert explanation.open(hidden + tag) == (23, other)


# --- the two directions, key updates, segments ----------------------------------------------------


def test_random_segments_with_keys_that_come_late() -> None:
    """Data, keys and key updates of both sides in pieces of any size: every byte comes, in order,
    and no record is opened before its key is there."""
    for seed in range(25):
        rng = random.Random(seed)
        pair, keys = padded(), Keys(rng.choice((1, 16, 32, 100)))
        ends = {"client": pair.client, "server": pair.server}
        sent = {who: bytearray() for who in SIDES}
        heard = {who: bytearray() for who in SIDES}
        wire = {who: bytearray() for who in SIDES}
        due: dict[str, list[bytes]] = {who: [] for who in SIDES}
        updates = 0

        def hear(who: str) -> None:
            nonlocal updates
            end = ends[who]  # noqa: B023
            while (event := end.next_event()) is not None:
                if isinstance(event, ApplicationData):
                    heard[who] += event.data  # noqa: B023
                elif isinstance(event, PadKeyWanted):
                    due[who].append(event.identity)  # noqa: B023
                elif isinstance(event, EpochBegan):
                    updates += 1

        for _ in range(300):
            who = rng.choice(SIDES)
            other = SIDES[1 - SIDES.index(who)]
            end = ends[who]
            action = rng.random()
            if action < 0.3:
                message = rng.randbytes(rng.randrange(1, 90))
                assert end.pad is not None
                if end.pad.message < len(message):
                    fill(end, keys, 120)
                else:
                    end.send_data(message)
                    sent[other] += message
            elif action < 0.35 and not end.update_under_way:
                end.start_update()
            elif action < 0.6 and due[who]:
                end.provide_pad_key(keys.look_up(due[who].pop(0)))
                hear(who)
            else:
                wire[other] += end.data_to_send()
                size = rng.randrange(1, 200)
                piece, wire[who] = bytes(wire[who][:size]), wire[who][size:]
                if piece and not end.waits_for_pad:
                    end.receive_data(piece)
                    hear(who)
                else:
                    wire[who] = bytearray(piece) + wire[who]
        for _ in range(6):
            for who in SIDES:
                wire[SIDES[1 - SIDES.index(who)]] += ends[who].data_to_send()
                ends[who].receive_data(bytes(wire[who])) if wire[who] else None
                wire[who].clear()
                hear(who)
                while due[who]:
                    ends[who].provide_pad_key(keys.look_up(due[who].pop(0)))
                    hear(who)
        assert heard == sent
        assert len(sent["client"]) > 500
        assert updates >= 2


def test_data_that_needs_no_new_key_does_not_wait() -> None:
    pair, keys = ready(200)
    end = pair.client
    fill(end, keys, 200)  # named, and looked up slowly
    end.send_data(b"under the pad that is there")
    end.send_data(bytes(150))
    pair.pump()
    assert received(pair, "server") == b"under the pad that is there"
    assert pair.server.waits_for_pad
    for _ in range(3):
        assert pair.server.next_event() is None
    deliver(pair, keys)
    assert received(pair, "server") == b"under the pad that is there" + bytes(150)
    assert not pair.server.waits_for_pad


def test_key_updates_go_on_under_the_pad() -> None:
    pair, _ = ready()
    for number, who in enumerate(SIDES * 3):
        starter, _ = both(pair, who)
        starter.start_update()
        starter.send_data(b"before")
        settle(pair)
        pair.exchange(b"a", b"b")
        assert pair.client.session.epoch == number + 1
    assert pair.client.session.key_updates is KeyUpdates.FRESH


# --- what a hostile peer or a broken cipher may do ------------------------------------------------


def refused(pair: Pair, who: str, kind: type[PeerError], reason: Reason) -> None:
    """One end has refused what came, and the other learns of it."""
    error = pair.errors[who]
    assert isinstance(error, kind)
    assert error.reason is reason
    other = pair.errors[SIDES[1 - SIDES.index(who)]]
    assert isinstance(other, AlertReceived)
    assert other.alert == reason.alert


def test_each_byte_on_the_wire() -> None:
    """Each byte of a record under the pad, and of one that names a key, is flipped, dropped and
    doubled: nothing of it is delivered, and both ends end."""
    pair, keys = ready()
    pair.client.extend_pad(*keys.draw())
    size = len(pair.client.data_to_send())
    pair.client.send_data(b"secret")
    size += len(pair.client.data_to_send())
    for place in range(size):
        pair, keys = ready(200)
        pair.client.extend_pad(*keys.draw())
        pair.client.send_data(b"secret")
        whole = bytes(pair.client.data_to_send())
        assert len(whole) == size
        changed = (flip, drop, double)[place % 3](whole, place)
        pair.on_wire = iter_once(changed)
        pair.client.send_data(b".")
        pair.fight()
        pair.cut()
        assert received(pair, "server") == (b"secret" if changed.startswith(whole) else b"")
        assert pair.errors["server"] is not None
        with pytest.raises(LocalStateError):
            pair.server.send_data(b"x")


def iter_once(data: bytes) -> Callable[[Connection, bytes], bytes]:
    pieces = iter((data,))
    return lambda receiver, old: next(pieces, old)


def flip(data: bytes, place: int) -> bytes:
    return data[:place] + bytes((data[place] ^ 1 << random.randrange(8),)) + data[place + 1 :]


def drop(data: bytes, place: int) -> bytes:
    return data[:place] + data[place + 1 :]


def double(data: bytes, place: int) -> bytes:
    return data[: place + 1] + data[place:]


@pytest.mark.parametrize("act", [flip, drop, double])
def test_each_byte_inside_the_session_keys(act: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same with the protection of the session's keys broken: the pad alone stands."""
    for place in range(6 + OVERHEAD):
        pair, _ = ready(200)
        inner = pair.server._records.reader._padded

        def padded_(pad: Pad, sealed: bytes, place: int = place, inner: Any = inner) -> Any:
            return inner(pad, act(sealed, place))

        monkeypatch.setattr(pair.server._records.reader, "_padded", padded_)
        pair.client.send_data(b"secret")
        pair.fight()
        assert received(pair, "server") == b""
        refused(pair, "server", BadRecordMac, Reason.RECORD_NOT_AUTHENTIC)


def test_records_in_another_order_inside_the_session_keys() -> None:
    for order in ((1, 0), (1,), (0, 0)):
        pair, _ = ready(200)
        client = pair.client._records.writer
        sealed = [client.pad.seal(23, b"one"), client.pad.seal(23, b"two")]  # type: ignore[union-attr]
        for number in order:
            client._outgoing.append(
                client.keyed.seal(PAD_RECORD, memoryview(sealed[number]), client.record_limit)
            )
            pair.fight()
        assert received(pair, "server") == (b"one" if order[0] == 0 else b"")
        refused(pair, "server", BadRecordMac, Reason.RECORD_NOT_AUTHENTIC)


def smuggle(pair: Pair, type_: int, content: bytes) -> None:
    """A record of the client under its session keys, with another type inside."""
    writer = pair.client._records.writer
    writer.flush()
    writer._outgoing.append(writer.keyed.seal(type_, memoryview(content), writer.record_limit))


def test_nothing_goes_beside_the_pad() -> None:
    for begun, type_, content, reason in (
        (False, 23, b"data", Reason.PAD_MISSING),
        (True, 23, b"data", Reason.PAD_MISSING),
        (True, 21, bytes((1, Alert.CLOSE_NOTIFY)), Reason.PAD_MISSING),
        (True, 21, bytes((2, Alert.INTERNAL_ERROR)), Reason.PAD_MISSING),
        (True, 23, b"", Reason.PAD_MISSING),
        (True, 99, b"", Reason.RECORD_TYPE),
        (True, PAD_RECORD, bytes(2000), Reason.PAD_MISSING),
    ):
        pair, _ = ready()
        if begun:
            pair.client.send_data(b"x")
            pair.pump()
        smuggle(pair, type_, content)
        pair.fight()
        refused(pair, "server", UnexpectedMessage, reason)
        assert received(pair, "server") == (b"x" if begun else b"")


@pytest.mark.parametrize("size", [0, 1, 16])
def test_records_under_the_pad_that_are_too_short(size: int) -> None:
    pair, _ = ready()
    smuggle(pair, PAD_RECORD, bytes(size))
    pair.fight()
    refused(pair, "server", BadRecordMac, Reason.RECORD_NOT_AUTHENTIC)


def test_other_content_under_the_pad() -> None:
    for type_, content in ((22, b"\x18\0\0\1\0"), (20, b"\1"), (0, b"x"), (PAD_RECORD, bytes(20))):
        pair, _ = ready()
        writer = pair.client._records.writer
        assert writer.pad is not None
        smuggle(pair, PAD_RECORD, writer.pad.seal(type_, content))
        pair.fight()
        refused(pair, "server", UnexpectedMessage, Reason.RECORD_TYPE)


def test_empty_records_under_the_pad_are_bounded() -> None:
    pair, _ = ready(2000)
    writer = pair.client._records.writer
    assert writer.pad is not None
    for _ in range(33):
        smuggle(pair, PAD_RECORD, writer.pad.seal(23, b""))
    pair.fight()
    refused(pair, "server", UnexpectedMessage, Reason.RECORDS_EMPTY_TOO_MANY)


def test_a_pad_where_none_was_negotiated() -> None:
    for act in (
        lambda pair: smuggle(pair, PAD_RECORD, bytes(40)),
        lambda pair: pair.client._records.writer.send(PadKey(b"key")),
    ):
        pair = Pair.make(*configs()).connect()
        act(pair)
        pair.fight()
        error = pair.errors["server"]
        assert isinstance(error, UnexpectedMessage)
        assert error.reason in (Reason.RECORD_TYPE, Reason.UPDATE_OUT_OF_ORDER)
        with pytest.raises(LocalStateError):
            pair.client.extend_pad(b"key", Secret(b"x"))
    assert pair.client.pad is None


def test_keys_without_end() -> None:
    """A peer may name as many keys as it has not used up, whether we have them yet or not."""
    for looked_up in (True, False):
        pair, keys = padded(), Keys()
        for _ in range(MAX_PAD_KEYS):
            pair.client.extend_pad(*keys.draw())
        pair.pump()
        if looked_up:
            deliver(pair, keys)
        with pytest.raises(LocalStateError, match="1,024 keys"):
            pair.client.extend_pad(*keys.draw())
        pair.client._records.writer.send(PadKey(b"one more"))
        pair.fight()
        refused(pair, "server", UnexpectedMessage, Reason.PAD_KEYS_TOO_MANY)


def test_a_key_before_the_confirmation_of_an_update() -> None:
    pair, _ = ready()
    pair.client.start_update()
    pair.pump()
    pair.server.data_to_send()
    pair, _ = ready()
    pair.client.start_update()
    pair._carry(pair.client, pair.server, pair.server_events)
    # The server has changed its key and confirms; the confirmation is replaced by a key's name.
    writer = pair.server._records.writer
    *rest, confirmation = writer._outgoing
    assert confirmation
    writer._outgoing[:] = rest
    assert writer.protection is not None
    writer.protection._sequence = 0
    writer.send(PadKey(b"key"))
    pair.fight()
    error = pair.errors["client"]
    assert isinstance(error, UnexpectedMessage)
    assert error.reason is Reason.UPDATE_NOT_CONFIRMED


def test_each_byte_of_a_message_that_names_a_key() -> None:
    """It is refused, or names another key, which no KME has."""
    raw = bytes.fromhex("f0000006e400036b6579")
    assert decode(raw) == PadKey(b"key")
    for place in range(1, len(raw)):
        for act in (flip, drop, double):
            changed = act(raw, place)
            changed = changed[:1] + (len(changed) - 4).to_bytes(3, "big") + changed[4:]
            if changed == raw:
                continue
            try:
                found = decode(changed)
            except PeerError:
                continue
            assert isinstance(found, PadKey)
            assert found.identity != b"key"


# --- the end --------------------------------------------------------------------------------------


def test_the_end_at_the_last_byte() -> None:
    """Data may not take the pad of the last alert."""
    for orderly in (True, False):
        pair, _ = ready(100)
        assert pair.client.pad is not None
        pair.client.send_data(bytes(pair.client.pad.message))
        assert pair.client.pad.message == 0
        with pytest.raises(PadExhausted):
            pair.client.send_data(b"x")
        assert left(pair.client) >= ALERTS
        if orderly:
            pair.client.send_close()
        else:
            pair.client.abort(PadExhausted("used up"))
        pair.fight()
        if orderly:
            assert pair.server.close_received
            assert not pair.errors
        else:
            error = pair.errors["server"]
            assert isinstance(error, AlertReceived)
            assert error.alert == Alert.INSUFFICIENT_SECURITY
            assert "further QKD keys" in str(error)
        assert left(pair.client) == 0  # erased


def test_a_close_without_any_pad() -> None:
    pair = padded()
    pair.client.send_close()
    pair.server.send_close()
    pair.fight()
    assert not pair.errors
    assert pair.client.close_received
    assert pair.server.close_received


def test_one_direction_goes_on_when_the_other_is_closed() -> None:
    pair, keys = ready()
    pair.client.send_data(b"last")
    pair.client.send_close()
    deliver(pair, keys)
    with pytest.raises(LocalStateError, match="close_notify"):
        pair.client.extend_pad(*keys.draw())
    fill(pair.server, keys, 100)
    pair.server.send_data(b"still here")
    deliver(pair, keys)
    assert received(pair, "client") == b"still here"
    pair.server.send_close()
    deliver(pair, keys)
    assert pair.client.close_received


def test_used_pad_and_the_rest_of_a_closed_one_are_gone() -> None:
    pair, keys = ready(320)
    kept = memory(pair)
    assert all(any(key in one for one in kept) for key in keys.made.values())  # it finds them
    pair.client.send_data(bytes(100))
    pair.pump()
    used = b"".join(keys.made[name] for name in NAMED[id(pair.client)])[:133]
    kept = memory(pair)
    for start in range(0, 133 - 8, 8):
        if start:  # the first 16 bytes are the polynomial's point
            piece = used[start : start + 8]
            assert start < 16 or not any(piece in one for one in kept)
    pair.client.send_close()
    pair.server.send_close()
    pair.pump()
    kept = memory(pair)
    for key in keys.made.values():
        for start in range(0, 32, 8):
            assert not any(key[start : start + 8] in one for one in kept)


def memory(pair: Pair) -> list[bytes]:
    """All bytes that hang on the engines, in their own objects."""
    return [bytes(one) for end in (pair.client, pair.server) for one in reachable(end)]


def reachable(root: object) -> Iterator[bytes | bytearray]:
    seen: set[int] = set()
    todo = [root]
    while todo:
        one = todo.pop()
        if id(one) in seen or isinstance(one, type):
            continue
        seen.add(id(one))
        if isinstance(one, bytes | bytearray):
            yield one
            continue
        module = getattr(type(one), "__module__", "")
        plain = isinstance(one, dict | list | tuple | set)
        if plain or module.startswith(("hybridkex", "collections")):
            todo += gc.get_referents(one)


def test_no_pad_in_a_text() -> None:
    pair, keys = ready()
    texts = [repr(pair.client.pad), repr(pair.client._records.writer.pad), str(pair.client.session)]
    texts += [repr(PadKeyWanted(b"name")), repr(PadExhausted("used up"))]
    for key in keys.made.values():
        for text in texts:
            assert not leaks(text, key)
    assert repr(Pad()) == "Pad(0 bytes left)"


def test_a_forked_process_uses_nothing_of_the_pad(monkeypatch: pytest.MonkeyPatch) -> None:
    pair, _ = ready()
    pair.client.send_data(b"before")
    monkeypatch.setattr(os, "getpid", lambda: -1)
    with pytest.raises(LocalStateError, match="forked"):
        pair.client.send_data(b"again")


def test_a_child_with_the_process_id_of_its_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a PID namespace of its own."""
    monkeypatch.setattr(os, "getpid", lambda: 1)
    pair, _ = ready()
    pair.client.send_data(b"before")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # other tests have threads
        child = os.fork()
    if not child:
        try:
            pair.client.send_data(b"again")
        except LocalStateError:
            os._exit(7)
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_a_schedule_and_a_pad() -> None:
    ours, _ = configs()
    config = ClientConfig(
        verifier=ours.verifier,
        psk_source=ours.psk_source,
        one_time_pad=OneTimePad(),
        fresh_keys=FreshKeys(),
        policy=policy(one_time_pad=PREFER, fresh_keys=None),
    )
    assert config.policy_in_force.fresh_keys is REQUIRE
    assert config.policy_in_force.one_time_pad is PREFER
