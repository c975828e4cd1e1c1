"""Key sources: the in-process pair, the file pool, several at once, prefetching."""

import hashlib
import hmac
import subprocess
import sys
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio
from leaks import leaks

from hybridkex.errors import (
    ConfigError,
    KeyConsumed,
    KeyExpired,
    KeyNotYetAvailable,
    KeySourceError,
    KeySourceExhausted,
    KeySourceUnavailable,
    KeyUnauthorized,
    KeyUnknown,
)
from hybridkex.qkd.composite import CombinedSource, FailoverSource, combine_keys
from hybridkex.qkd.etsi014.models import ModelError, parse_uuid
from hybridkex.qkd.in_process import in_process_pair
from hybridkex.qkd.pool import FilePool, PoolNames
from hybridkex.qkd.prefetch import PrefetchConfig, PrefetchSource
from hybridkex.qkd.source import (
    KeyPart,
    KeyReference,
    KeySource,
    QkdKey,
    SourceStatus,
    canonical_key_id,
)
from hybridkex.qkd.store import write_key_file
from hybridkex.secret import Secret


def test_a_uuid_has_one_form() -> None:
    """Python's UUID() also takes these, all of 36 characters but the first two."""
    text = "4a4a40ce-1234-4123-8123-4a4a40ce0009"
    digits = text.replace("-", "")
    assert parse_uuid(text.upper()) == canonical_key_id(text.upper()) == text
    for other in (
        f"{{{text}}}",
        digits,
        f"urn:{digits}",
        f"----{digits}",
        text.replace("0", "\uff10"),
        text.replace("0009", "0_09"),
        text.replace("4a4a40ce-", "0x4a40ce-"),
        f"+{text[1:]}",
    ):
        with pytest.raises(ModelError, match="not a UUID"):
            parse_uuid(other)
        assert canonical_key_id(other) == other


class Flaky:
    """A source that fails when it is told to, and counts."""

    def __init__(self, inner: KeySource) -> None:
        self.inner = inner
        self.local_sae, self.peer_sae = inner.local_sae, inner.peer_sae
        self.error: KeySourceError | None = None
        self.slow = 0.0
        self.draws = self.gets = 0

    async def get_key(self) -> QkdKey:
        self.draws += 1
        await trio.sleep(self.slow)
        if self.error is not None:
            raise self.error
        return await self.inner.get_key()

    async def get_key_with_id(self, name: KeyReference) -> QkdKey:
        self.gets += 1
        await trio.sleep(self.slow)
        if self.error is not None:
            raise self.error
        return await self.inner.get_key_with_id(name)

    def knows(self, name: KeyReference) -> bool:
        return self.inner.knows(name)

    async def status(self) -> SourceStatus:
        if self.error is not None:
            raise self.error
        return await self.inner.status()


def pairs(number: int) -> tuple[list[Flaky], list[Flaky]]:
    made = [
        in_process_pair("alice", "bob", kmes=(f"a{i}", f"b{i}"), capacity=100)
        for i in range(number)
    ]
    return [Flaky(one) for one, _ in made], [Flaky(other) for _, other in made]


# -- in process


async def test_in_process_pair() -> None:
    alice, bob = in_process_pair("alice", "bob")
    for master, slave in ((alice, bob), (bob, alice)):
        key = await master.get_key()
        assert (key.master_sae, key.slave_sae) == (master.local_sae, slave.local_sae)
        assert len(key.key) == 32
        assert slave.knows(key.name)
        assert not master.knows(key.name)
        with pytest.raises(KeyUnknown):
            await master.get_key_with_id(key.name)
        assert await slave.get_key_with_id(key.name) == key
        with pytest.raises(KeyConsumed):
            await slave.get_key_with_id(key.name)
        strange = (KeyPart(*key.kmes[0], str(uuid.uuid4())),)
        with pytest.raises(KeyUnknown):
            await slave.get_key_with_id(strange)
        with pytest.raises(KeyUnknown):
            await slave.get_key_with_id(key.name * 2)


async def test_in_process_capacity() -> None:
    alice, bob = in_process_pair("alice", "bob", capacity=2)
    first = await alice.get_key()
    await alice.get_key()
    assert (await alice.status()).stored == 0
    with pytest.raises(KeySourceExhausted):
        await alice.get_key()
    await bob.get_key_with_id(first.name)
    await alice.get_key()
    with pytest.raises(ConfigError):
        in_process_pair("alice", "alice")


async def test_a_key_does_not_show_itself() -> None:
    alice, _ = in_process_pair("alice", "bob")
    key = await alice.get_key()
    assert not leaks(repr(key), key.key.reveal())
    assert str(key.key_ids[0]) in repr(key)


# -- file pools


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    write_key_file(tmp_path / "pool.key")
    return tmp_path / "pool.key"


ALICE = PoolNames(sae="alice", kme="kme-a", peer_sae="bob", peer_kme="kme-b")
BOB = PoolNames(sae="bob", kme="kme-b", peer_sae="alice", peer_kme="kme-a")


def keys_of(master: PoolNames, number: int) -> list[QkdKey]:
    return [
        QkdKey(
            name=(KeyPart(master.kme, master.peer_kme, str(uuid.uuid4())),),
            master_sae=master.sae,
            slave_sae=master.peer_sae,
            key=Secret(uuid.uuid4().bytes * 2),
        )
        for _ in range(number)
    ]


async def test_file_pools(tmp_path: Path, key_file: Path) -> None:
    keys = [*keys_of(ALICE, 3), *keys_of(BOB, 2)]
    for names, path in ((ALICE, "a.pool"), (BOB, "b.pool")):
        async with FilePool.open(tmp_path / path, key_file=key_file, names=names) as pool:
            await pool.add(keys)
    async with (
        FilePool.open(tmp_path / "a.pool", key_file=key_file) as alice,
        FilePool.open(tmp_path / "b.pool", key_file=key_file, names=BOB) as bob,
    ):
        assert (alice.local_sae, alice.peer_sae) == ("alice", "bob")
        assert (await alice.status()).stored == 3
        drawn = [await alice.get_key() for _ in range(3)]
        assert all(key in keys[:3] for key in drawn)
        with pytest.raises(KeySourceExhausted):
            await alice.get_key()
        for key in reversed(drawn):
            assert await bob.get_key_with_id(key.name) == key
        with pytest.raises(KeyConsumed):
            await bob.get_key_with_id(drawn[0].name)
        with pytest.raises(KeyUnknown):
            await alice.get_key_with_id(drawn[0].name)
        key = await bob.get_key()
        assert alice.knows(key.name)
        assert not bob.knows(key.name)
        assert await alice.get_key_with_id(key.name) == key
    # What is gone is gone for the next process as well, and is not taken in again.
    async with FilePool.open(tmp_path / "a.pool", key_file=key_file) as alice:
        await alice.add(keys[:3])
        with pytest.raises(KeySourceExhausted):
            await alice.get_key()


async def test_the_status_of_a_pool_says_how_long_its_keys_are(
    tmp_path: Path, key_file: Path
) -> None:
    path = tmp_path / "a.pool"
    async with FilePool.open(path, key_file=key_file, names=ALICE) as pool:
        for bits in (4096, 512, 264, 256, 136, 128, 1024):
            [key] = keys_of(ALICE, 1)
            await pool.add([replace(key, key=Secret(bytes(bits // 8)))])
        seen = []
        while (status := await pool.status()).stored:
            seen.append((status.key_bits, len((await pool.get_key()).key)))
        shortest = [min(8 * size for _, size in seen[place:]) for place in range(len(seen))]
        assert [bits for bits, _ in seen] == shortest
        assert status.key_bits == 256


async def test_pool_files_that_cannot_be_used(tmp_path: Path, key_file: Path) -> None:
    path = tmp_path / "a.pool"
    with pytest.raises(ConfigError, match="no key pool"):
        FilePool.open(path, key_file=key_file)
    assert not path.exists()
    async with FilePool.open(path, key_file=key_file, names=ALICE) as pool:
        with pytest.raises(ConfigError, match="its own two SAEs"):
            await pool.add(keys_of(PoolNames(sae="x", kme="x", peer_sae="y", peer_kme="y"), 1))
    with pytest.raises(ConfigError, match="other SAEs"):
        FilePool.open(path, key_file=key_file, names=BOB)
    write_key_file(tmp_path / "other.key")
    with pytest.raises(ConfigError, match="not the one"):
        FilePool.open(path, key_file=tmp_path / "other.key")
    path.write_bytes(b"something else" * 100)
    with pytest.raises(ConfigError, match="key store"):
        FilePool.open(path, key_file=key_file)


KILLED = """
import os, sys, trio
from pathlib import Path
from hybridkex.qkd.pool import FilePool

async def main():
    folder = Path(sys.argv[1])
    pool = FilePool.open(folder / "a.pool", key_file=folder / "pool.key")
    while True:
        key = await pool.get_key()
        os.write(1, (str(key.key_ids[0]) + "\\n").encode())

trio.run(main)
"""


def draw_until_killed(folder: Path, number: int) -> list[str]:
    """The IDs of the keys that a process drew before it was killed."""
    command = [sys.executable, "-c", KILLED, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        seen = [process.stdout.readline().strip() for _ in range(number)]
        process.kill()
        return seen + process.stdout.read().split()


async def test_a_pool_survives_kill(tmp_path: Path, key_file: Path) -> None:
    keys = keys_of(ALICE, 400)
    async with FilePool.open(tmp_path / "a.pool", key_file=key_file, names=ALICE) as pool:
        await pool.add(keys)
    seen: list[str] = []
    kills = 4
    for _ in range(kills):
        seen += draw_until_killed(tmp_path, 50)
    async with FilePool.open(tmp_path / "a.pool", key_file=key_file) as pool:
        left = (await pool.status()).stored
    assert len(seen) >= 50 * kills
    assert len(set(seen)) == len(seen), "a key was given out twice"
    # One key at most was on its way at each kill.
    assert 400 - kills <= len(seen) + left <= 400


# -- several sources


async def test_failover() -> None:
    (a0, a1), (b0, b1) = pairs(2)
    alice = FailoverSource([a0, a1], retry_after=0.2, timeout=0.1)
    bob = FailoverSource([b0, b1])
    assert (await alice.get_key()).kmes == (("a0", "b0"),)
    a0.error = KeySourceUnavailable("down")
    key = await alice.get_key()
    assert key.kmes == (("a1", "b1"),)
    assert await bob.get_key_with_id(key.name) == key
    assert (b0.gets, b1.gets) == (0, 1), "only the source of these KMEs is asked"
    # While it is out of favour it is not asked again...
    a0.error = None
    draws = a0.draws
    assert (await alice.get_key()).kmes == (("a1", "b1"),)
    assert a0.draws == draws
    # ...unless the other fails too...
    a1.error = KeySourceExhausted("empty")
    assert (await alice.get_key()).kmes == (("a0", "b0"),)
    # ...and one that hangs costs its time limit.
    a0.slow, a1.error = 10, None
    assert (await alice.get_key()).kmes == (("a1", "b1"),)
    a0.slow = 0
    await trio.sleep(0.25)
    assert (await alice.get_key()).kmes == (("a0", "b0"),), "and it is healthy again"
    a0.error, a1.error = KeySourceUnavailable("down"), KeySourceExhausted("empty")
    with pytest.raises(KeySourceExhausted):
        await alice.get_key()
    with pytest.raises(KeyUnknown):
        await bob.get_key_with_id((KeyPart("x", "y", str(uuid.uuid4())),))


ERRORS = (
    KeyNotYetAvailable,
    KeySourceExhausted,
    KeySourceUnavailable,
    KeyUnauthorized,
    KeyExpired,
    KeyConsumed,
    KeyUnknown,
)
"""In the order in which a failover reports them when every source fails."""


@pytest.mark.parametrize("kind", [*ERRORS, KeySourceError])
async def test_failover_goes_on_after_every_error(kind: type[KeySourceError]) -> None:
    (a0, a1), (b0, b1) = pairs(2)
    for one in (a1, b1):  # a pool of keys that were drawn from the same KMEs
        one.knows = lambda name: True  # type: ignore[method-assign]
    for one in (a0, b0):
        one.knows = lambda name: True  # type: ignore[method-assign]
        one.error = kind("of the first source")
    key = await FailoverSource([a0, a1]).get_key()
    assert key.kmes == (("a1", "b1"),)
    assert await FailoverSource([b0, b1]).get_key_with_id(key.name) == key
    assert (b0.gets, b1.gets) == (1, 1)


async def test_names_that_a_peer_made_up_do_not_fill_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    _, sources = pairs(2)
    for one in sources:
        one.knows = lambda name: True  # type: ignore[method-assign]
    failover = FailoverSource(sources)
    for _ in range(50):
        with pytest.raises(KeyUnknown):
            await failover.get_key_with_id((KeyPart("a0", "b0", str(uuid.uuid4())),))
    assert 10 <= len(caplog.messages) < 50  # of two lines each

    async def down(name: KeyReference) -> QkdKey:
        raise KeySourceUnavailable("it is down")

    sources[0].get_key_with_id = down  # type: ignore[method-assign]
    with pytest.raises(KeySourceError):
        await failover.get_key_with_id((KeyPart("a0", "b0", str(uuid.uuid4())),))
    assert "key source 1 of 2: it is down" in caplog.messages


@pytest.mark.parametrize("first", ERRORS)
@pytest.mark.parametrize("second", ERRORS)
async def test_failover_reports_the_error_that_leaves_most_hope(
    first: type[KeySourceError], second: type[KeySourceError]
) -> None:
    _, (b0, b1) = pairs(2)
    for one, kind in ((b0, first), (b1, second)):
        one.error = kind("x")
        one.knows = lambda name: True  # type: ignore[method-assign]
    with pytest.raises(min(first, second, key=ERRORS.index)):
        await FailoverSource([b0, b1]).get_key_with_id((KeyPart("a", "b", "1"),))


async def test_failover_passes_over_a_look_up_that_hangs() -> None:
    (_, a1), (b0, b1) = pairs(2)
    b0.slow, b0.knows = 10, lambda name: True  # type: ignore[method-assign]
    key = await a1.get_key()
    with trio.fail_after(2):
        assert await FailoverSource([b0, b1], timeout=0.05).get_key_with_id(key.name) == key


async def test_a_pool_is_for_one_process(tmp_path: Path, key_file: Path) -> None:
    path = tmp_path / "a.pool"
    async with FilePool.open(path, key_file=key_file, names=ALICE) as pool:
        await pool.add(keys_of(ALICE, 3))
        command = [sys.executable, "-c", KILLED, str(tmp_path)]
        result = await trio.run_process(command, capture_stderr=True, check=False)
        assert b"FileInUse: " in result.stderr  # a ConfigError
        assert b"is in use by another process" in result.stderr
        assert (await pool.status()).stored == 3


async def test_failover_status() -> None:
    (a0, a1), _ = pairs(2)
    alice = FailoverSource([a0, a1])
    assert (await alice.status()).stored == 200
    a0.error = KeySourceUnavailable("down")
    assert (await alice.status()).stored == 100
    a1.error = KeySourceUnavailable("down")
    with pytest.raises(KeySourceUnavailable):
        await alice.status()


async def test_combined() -> None:
    (a0, a1), (b0, b1) = pairs(2)
    alice, bob = CombinedSource([a0, a1]), CombinedSource([b0, b1])
    key = await alice.get_key()
    assert key.kmes == (("a0", "b0"), ("a1", "b1"))
    assert len(key.key_ids) == 2
    assert bob.knows(key.name)
    assert not bob.knows(key.name[::-1])
    assert not bob.knows(key.name[:1])
    assert await bob.get_key_with_id(key.name) == key
    with pytest.raises(KeyConsumed):
        await bob.get_key_with_id(key.name)
    with pytest.raises(KeyUnknown):
        await bob.get_key_with_id(key.name[:1])
    await a0.get_key()
    assert (await alice.status()).stored == 99, "the scarcest decides"
    a1.error = KeySourceUnavailable("down")
    with pytest.raises(KeySourceUnavailable):
        await alice.get_key()


async def test_combined_wants_different_links() -> None:
    (a0,), _ = pairs(1)
    with pytest.raises(KeySourceUnavailable, match="one link"):
        await CombinedSource([a0, a0]).get_key()
    other, _ = in_process_pair("alice", "carol")
    for kind in (CombinedSource, FailoverSource):
        with pytest.raises(ConfigError, match="different pairs"):
            kind([a0, other])
        with pytest.raises(ConfigError, match="at least two"):
            kind([a0])


def part(kmes: tuple[str, str], key_id: int, key: bytes, **saes: str) -> QkdKey:
    return QkdKey(
        name=(KeyPart(*kmes, str(uuid.UUID(int=key_id))),),
        master_sae=saes.get("master", "alice"),
        slave_sae=saes.get("slave", "bob"),
        key=Secret(key),
    )


def test_the_combiner_from_first_principles() -> None:
    """SP 800-56C Rev. 2 section 5 and RFC 5869, with hmac and hashlib alone."""
    first, second = bytes(range(32)), bytes(range(100, 148))
    found = combine_keys([part(("a", "b"), 1, first), part(("kme-c", "d"), 2, second)])
    z = b"\0\x20" + first + b"\0\x30" + second
    fixed_info = (
        b"hybridkex combined QKD keys v1"
        b"\0\x05alice" + b"\0\x03bob"
        b"\0\x01a" + b"\0\x01b" + b"\0\x2400000000-0000-0000-0000-000000000001"
        b"\0\x05kme-c" + b"\0\x01d" + b"\0\x2400000000-0000-0000-0000-000000000002"
    )
    extracted = hmac.digest(bytes(32), z, hashlib.sha256)
    expanded = hmac.digest(extracted, fixed_info + b"\1", hashlib.sha256)
    assert found.key.reveal() == expanded
    assert found.key_ids == (str(uuid.UUID(int=1)), str(uuid.UUID(int=2)))


def test_the_combiner_binds_everything() -> None:
    one, two = part(("a", "b"), 1, b"x" * 32), part(("c", "d"), 2, b"y" * 32)
    variants: list[list[QkdKey]] = [
        [one, two],
        [two, one],
        [one],
        [part(("a", "b"), 3, b"x" * 32), two],
        [part(("a", "bb"), 1, b"x" * 32), two],
        [part(("b", "a"), 1, b"x" * 32), two],
        [part(("a", "b"), 1, b"z" * 32), two],
        [part(("a", "b"), 1, b"x" * 31), part(("c", "d"), 2, b"x" + b"y" * 32)],
        [part(("a", "b"), 1, b"x" * 32, master="alicia"), two],
        [part(("a", "b"), 1, b"x" * 32, master="bob", slave="alice"), two],
    ]
    assert len({combine_keys(variant).key.reveal() for variant in variants}) == len(variants)


# -- prefetching


async def filling(source: PrefetchSource, nursery: trio.Nursery, number: int) -> None:
    nursery.start_soon(source.fill)
    while len(source.upcoming()) < number:  # noqa: ASYNC110
        await trio.sleep(0.01)


async def test_prefetched_keys_need_no_source(autojump_clock: Any) -> None:
    (a,), (b,) = pairs(1)
    config = PrefetchConfig(low=2, high=4)
    alice, bob = PrefetchSource(a, config), PrefetchSource(b, config)
    a.slow = b.slow = 1.0
    async with trio.open_nursery() as nursery:
        await filling(alice, nursery, 4)
        # The names go ahead of the keys, over a session that is there already, say.
        names = alice.upcoming()
        for name in names:
            await bob.expect(name)
        began = trio.current_time()
        for name in names:
            key = await alice.get_key()
            assert key.name == name
            assert await bob.get_key_with_id(name) == key
        assert trio.current_time() == began, "neither side waited"
        with pytest.raises(KeyConsumed):
            await bob.get_key_with_id(names[0])
        nursery.cancel_scope.cancel()


async def test_watermarks(autojump_clock: Any) -> None:
    (a,), _ = pairs(1)
    alice = PrefetchSource(a, PrefetchConfig(low=2, high=4))
    async with trio.open_nursery() as nursery:
        await filling(alice, nursery, 4)
        await trio.sleep(10)
        assert a.draws == 4, "no more than the high watermark"
        await alice.get_key()
        await alice.get_key()
        await trio.sleep(1)
        assert a.draws == 4, "not before the low watermark"
        await alice.get_key()
        await trio.sleep(1)
        assert a.draws == 7
        assert (await alice.status()).stored == 100 - 7 + 4
        nursery.cancel_scope.cancel()


async def test_time_to_live(autojump_clock: Any) -> None:
    (a,), (b,) = pairs(1)
    config = PrefetchConfig(low=1, high=2, ttl=5)
    alice, bob = PrefetchSource(a, config), PrefetchSource(b, config)
    async with trio.open_nursery() as nursery:
        await filling(alice, nursery, 2)
        old = alice.upcoming()
        await bob.expect(old[0])
        await trio.sleep(6)
        fresh = await alice.get_key()
        assert fresh.name not in old
        with pytest.raises(KeyConsumed):
            await bob.get_key_with_id(old[0])  # held ahead and thrown away
        nursery.cancel_scope.cancel()


async def test_expect_is_capped(autojump_clock: Any) -> None:
    (a,), (b,) = pairs(1)
    bob = PrefetchSource(b, PrefetchConfig(low=1, high=2))
    names = [(await a.get_key()).name for _ in range(3)]
    await bob.expect(names[0])
    await bob.expect(names[0])
    assert b.gets == 1, "a name is looked up once"
    await bob.expect(names[1])
    with pytest.raises(KeySourceExhausted):
        await bob.expect(names[2])


async def test_a_failing_source_is_asked_less_and_less(autojump_clock: Any) -> None:
    (a,), _ = pairs(1)
    a.error = KeySourceUnavailable("down")
    alice = PrefetchSource(a, PrefetchConfig(retry_after=1.0))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(alice.fill)
        await trio.sleep(30)
        assert 4 <= a.draws <= 6
        with pytest.raises(KeySourceUnavailable):
            await alice.get_key()
        a.error = None
        assert await alice.get_key(), "an empty stock does not stop a handshake"
        await trio.sleep(60)
        assert len(alice.upcoming()) == 8
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    "wrong", [{"low": 0}, {"low": 9, "high": 8}, {"ttl": 0.0}, {"retry_after": 0.0}]
)
def test_prefetch_configuration(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        PrefetchConfig(**wrong)
