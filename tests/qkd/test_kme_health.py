"""What the owner of a KME sees from outside: health, readiness, the life of a key, ``--check``."""

import base64
import json
import logging
import os
import re
import sqlite3
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import pytest
import trio
from forked import Forkserver
from leaks import leaks
from test_kme_server import as_sae, filled
from waiting import until

from hybridkex.cli import main
from hybridkex.errors import KeySourceUnavailable
from hybridkex.kme import entity, health
from hybridkex.kme.audit import AuditTrail
from hybridkex.kme.config import PeerConfig, ServeConfig
from hybridkex.kme.entity import KeyManagementEntity, LocalPeer
from hybridkex.kme.metrics import KmeMetrics
from hybridkex.kme.peering import HttpPeer
from hybridkex.kme.settings import EntitySettings, KmeLimits
from hybridkex.net.address import TcpAddress
from hybridkex.qkd.etsi014.models import ErrorResponse, KeyRequest
from hybridkex.qkd.sqlite_store import SqliteKeyStore
from hybridkex.qkd.store import Allotment, OutcomeUnknown, new_key_file, read_key_file
from hybridkex.secret import Secret
from interop.ports import free_port

Site = Any  # of conftest.py
ANYWHERE = TcpAddress("127.0.0.1", 0)


async def page(where: Any, name: str) -> tuple[int, Any]:
    async with httpx.AsyncClient(verify=False) as client:
        answer = await client.get(f"http://{where.metrics}/{name}")
        return answer.status_code, answer.json()


async def test_ready_with_a_store_a_peer_and_keys(
    site: Site, serve: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "GOOD_FOR", 0.0)
    limits = KmeLimits(ready_keys=4096)
    config = replace(site.pair(limits=limits), metrics=ANYWHERE)
    async with serve(config) as where:
        assert await page(where, "healthz") == (200, {"alive": True})
        with trio.fail_after(20):
            while (found := await page(where, "readyz"))[0] != 200:
                told = {text for links in found[1]["kmes"].values() for text in links.values()}
                for text in told - {"ready"}:  # one of the two KMEs may be ready before the other
                    assert re.search(r"^\d+ keys are stored, and limits.ready_keys is 4096$", text)
                await trio.sleep(0.05)
        assert found[1] == {
            "ready": True,
            "kmes": {"kme-a": {"kme-b": "ready"}, "kme-b": {"kme-a": "ready"}},
        }

        async def fails(*_: Any) -> int:
            raise KeySourceUnavailable("the key store failed: disk I/O error")

        with monkeypatch.context() as patch:
            patch.setattr(SqliteKeyStore, "count", fails)
            status, body = await page(where, "readyz")
            assert (status, body["ready"]) == (503, False)
            assert body["kmes"]["kme-a"]["kme-b"] == "the key store failed: disk I/O error"
            assert (await page(where, "healthz"))[0] == 200
        assert (await page(where, "readyz"))[0] == 200


async def test_not_ready_while_no_delivery_can_be_recorded(
    site: Site, serve: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the store or in the audit trail; reading works."""
    monkeypatch.setattr(health, "GOOD_FOR", 0.0)
    config = site.pair()
    audited = tuple(replace(one, audit=tmp_path / one.id) for one in config.kme)
    async with serve(replace(config, kme=audited, metrics=ANYWHERE)) as where:
        await filled(where, site)
        assert (await page(where, "readyz"))[0] == 200

        async def fails(*_: Any) -> None:
            raise KeySourceUnavailable("the disk is full")

        for of in (SqliteKeyStore, AuditTrail):
            with monkeypatch.context() as patch:
                patch.setattr(of, "check", fails)
                status, body = await page(where, "readyz")
                assert (status, body["kmes"]["kme-a"]["kme-b"]) == (503, "the disk is full")
        assert (await page(where, "readyz"))[0] == 200


async def test_no_keys_are_used_up_while_none_can_be_delivered(
    site: Site, serve: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other KME would promise keys for each request, and none of them could be delivered."""
    promises = []
    allots = health.KeyManagementEntity.peer_allots

    async def noted(kme: Any, *message: Any) -> None:
        promises.append(message)
        await allots(kme, *message)

    async def fails(*_: Any, **named: Any) -> None:
        raise KeySourceUnavailable("the disk is full")

    monkeypatch.setattr(health.KeyManagementEntity, "peer_allots", noted)
    async with serve(site.pair()) as where:
        await filled(where, site)
        async with as_sae(site, "alice", where.kmes["kme-a"]) as alice:
            for pause, change in ((0.0, "check"), (60.0, "allot")):
                monkeypatch.setattr(entity, "TRY_AGAIN_AFTER", pause)
                promises.clear()
                with monkeypatch.context() as patch:
                    patch.setattr(SqliteKeyStore, "allot", fails)
                    patch.setattr(SqliteKeyStore, change, fails)
                    for _ in range(5):
                        assert (await alice.get("/bob/enc_keys")).status_code == 503
                assert len(promises) == 1
                if not pause:
                    assert (await alice.get("/bob/enc_keys")).status_code == 200


async def test_requests_that_fail_for_other_reasons_take_no_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One request a second is tried after a delivery that could not be recorded. Requests for more
    keys than there are, or to a KME that is away, would otherwise keep the others from it."""
    store = SqliteKeyStore(tmp_path / "keys.db", Secret(bytes(32)))
    peers = {"kme-b": frozenset({"bob"}), "kme-c": frozenset({"carl"})}
    settings = EntitySettings(id="kme-a", saes=frozenset({"alice"}), peers=peers)
    kme = KeyManagementEntity(settings, store=store, metrics=KmeMetrics())

    class End:
        async def ext_keys(self, _: Any) -> None:
            await trio.lowlevel.checkpoint()

    class Away(End):
        async def ext_keys(self, _: Any) -> None:
            raise KeySourceUnavailable("it cannot be reached")

    for target, end in (("kme-b", End()), ("kme-c", Away())):
        await store.add(target, [(str(uuid4()), Secret(bytes(32))) for _ in range(3)])
        kme.connect(target, end)  # type: ignore[arg-type]

    async def fails(*_: Any, **named: Any) -> None:
        raise KeySourceUnavailable("the disk is full")

    monkeypatch.setattr(entity, "TRY_AGAIN_AFTER", 0.0)
    with monkeypatch.context() as patch:
        patch.setattr(SqliteKeyStore, "allot", fails)
        with pytest.raises(KeySourceUnavailable):
            await kme.get_key("alice", "bob", KeyRequest())
    monkeypatch.setattr(entity, "TRY_AGAIN_AFTER", 60.0)
    for slave, number in (("bob", 4), ("carl", 1)):
        with pytest.raises(ErrorResponse, match="503"):
            await kme.get_key("alice", slave, KeyRequest(number=number))
    assert len((await kme.get_key("alice", "bob", KeyRequest())).keys) == 1
    await store.aclose()


async def test_not_ready_without_a_peer(site: Site, serve: Any) -> None:
    """One link that can serve is enough."""
    away = PeerConfig(id="kme-x", saes=("xavier",), url=f"https://127.0.0.1:{free_port()}")
    config = site.kme("kme-a", saes=("alice",), peer=(away,))
    async with serve(ServeConfig(kme=(config,), metrics=ANYWHERE)) as where:
        with trio.fail_after(20):
            while "the peer KME" not in (await page(where, "readyz"))[1]["kmes"]["kme-a"]["kme-x"]:  # noqa: ASYNC110
                await trio.sleep(0.1)
        assert (await page(where, "readyz"))[0] == 503
    both = replace(config, self_pairs=True)
    async with serve(ServeConfig(kme=(both,), metrics=ANYWHERE)) as where:
        with trio.fail_after(20):
            while (found := await page(where, "readyz"))[0] != 200:  # noqa: ASYNC110
                await trio.sleep(0.1)
        assert found[1]["kmes"]["kme-a"]["kme-a"] == "ready"


async def nothing(*_: Any) -> None:
    await trio.lowlevel.checkpoint()


async def test_links_are_looked_at_together(
    site: Site, serve: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each silent KME would delay the answer, until a load balancer gives up."""
    asked, all_asked = [], trio.Event()

    async def silent(peer: Any, _: Any) -> list[str]:
        asked.append(peer)
        if len(asked) == 4:
            all_asked.set()
        await all_asked.wait()
        return []

    monkeypatch.setattr(HttpPeer, "check", silent)
    monkeypatch.setattr(KeyManagementEntity, "_reconcile_if_due", nothing)
    here = tuple(
        site.kme(
            f"kme-{own}",
            saes=(own,),
            limits=KmeLimits(ready_keys=0),
            peer=tuple(
                PeerConfig(id=f"kme-{own}{end}", saes=(f"{own}{end}",), url="https://127.0.0.1:1")
                for end in "xy"
            ),
        )
        for own in "ab"
    )
    async with serve(ServeConfig(kme=here, metrics=ANYWHERE)) as where:
        with trio.fail_after(20):
            assert (await page(where, "readyz"))[0] == 200
    assert len(asked) == 4


async def test_a_kme_that_is_away_delays_no_other_link(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its keys are counted, those of the others are compared, and the log has one line."""
    store, metrics = SqliteKeyStore(tmp_path / "keys.db", Secret(bytes(32))), KmeMetrics()
    peers = {f"kme-{end}": frozenset({end}) for end in "bcd"}
    settings = EntitySettings(
        id="kme-a", saes=frozenset({"a"}), peers=peers, limits=KmeLimits(sync_grace=0)
    )
    kme = KeyManagementEntity(settings, store=store, metrics=metrics)
    asked: dict[str, int] = dict.fromkeys(peers, 0)

    @dataclass
    class End:
        name: str

        async def check(self, ids: Any) -> list[str]:
            asked[self.name] += 1
            if self.name == "kme-b":
                raise KeySourceUnavailable("it cannot be reached")
            return list(ids)

    for name in peers:
        await store.add(name, [(str(uuid4()), Secret(bytes(32)))])
        kme.connect(name, End(name))  # type: ignore[arg-type]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(kme.maintain, 0.01)
        with trio.fail_after(20):
            while asked["kme-b"] < 3 or await store.count("kme-c") + await store.count("kme-d"):  # noqa: ASYNC110
                await trio.sleep(0.01)
        nursery.cancel_scope.cancel()
    await store.aclose()
    assert 'hybridkex_kme_keys_stored{kme="kme-a",link="kme-b"} 1.0' in metrics.text().decode()
    [line] = [one for one in caplog.messages if "reached" in one]
    assert line.startswith("kme-a: the KME kme-b: it cannot be reached")


@pytest.mark.parametrize("committed", [True, False])
@pytest.mark.parametrize("drawn_meanwhile", [True, False])
async def test_keys_of_an_uncertain_commit_are_counted_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, committed: bool, drawn_meanwhile: bool
) -> None:
    """At both ends, whether or not the database had committed when it was lost."""
    metrics, saes = KmeMetrics(), {"kme-a": frozenset({"a"}), "kme-b": frozenset({"b"})}
    stores = {one: SqliteKeyStore(tmp_path / one, Secret(bytes(32))) for one in saes}
    kmes = {}
    for own, other in (("kme-a", "kme-b"), ("kme-b", "kme-a")):
        settings = EntitySettings(id=own, saes=saes[own], peers={other: saes[other]})
        kmes[own] = KeyManagementEntity(settings, store=stores[own], metrics=metrics)
    kme, store = kmes["kme-a"], stores["kme-a"]
    kme.connect("kme-b", LocalPeer(own_id="kme-a", other=kmes["kme-b"]))
    await store.add("kme-b", [(str(uuid4()), Secret(bytes(32))) for _ in range(6)], shared=False)
    allot = store.allot

    async def lost(*arguments: Any, **named: Any) -> None:
        if committed:
            await allot(*arguments, **named)
        raise OutcomeUnknown("the server was killed")

    with monkeypatch.context() as patch:
        patch.setattr(store, "allot", lost)
        with pytest.raises(OutcomeUnknown):
            await kme.get_key("a", "b", KeyRequest(number=2, size=512))
    monkeypatch.setattr("hybridkex.kme.entity.TRY_AGAIN_AFTER", 0)
    kme._links["kme-b"].try_again = None
    if drawn_meanwhile:
        await kme.get_key("a", "b", KeyRequest(number=1))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(kme.maintain, 0.01)
        with trio.fail_after(20):
            while kme._links["kme-b"].unsettled:  # noqa: ASYNC110
                await trio.sleep(0.01)
            await trio.sleep(0.05)
        nursery.cancel_scope.cancel()
    with suppress(ErrorResponse):  # what the other end refuses
        await kme.get_key("a", "b", KeyRequest(number=2))
    for one in stores.values():
        await one.aclose()
    pattern = r'keys_lost_total{kme="(.+?)",link=".+?",reason="(.+?)"} ([1-9].*)'
    found = {kme: (why, float(n)) for kme, why, n in re.findall(pattern, metrics.text().decode())}
    why = "unrecorded" if committed else "refused"
    assert found == {"kme-a": (why, 4.0), "kme-b": ("voided", 2.0)}


@pytest.mark.parametrize("committed", [True, False])
async def test_keys_whose_collection_is_uncertain_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, committed: bool
) -> None:
    """If the database had committed, the slave never gets them; otherwise it may ask again."""
    store, metrics = SqliteKeyStore(tmp_path / "keys.db", Secret(bytes(32))), KmeMetrics()
    settings = EntitySettings(id="kme-b", saes=frozenset({"b"}), peers={"kme-a": frozenset({"a"})})
    kme = KeyManagementEntity(settings, store=store, metrics=metrics)
    ids = [str(uuid4()) for _ in range(3)]
    keys = tuple(Allotment(blocks=(one,), size=32, value=Secret(bytes(32))) for one in ids)
    await store.accept("kme-a", keys, master="a", slaves=["b"])
    collect = store.collect

    async def lost(*arguments: Any, **named: Any) -> None:
        if committed:
            await collect(*arguments, **named)
        raise OutcomeUnknown("the server was killed")

    with monkeypatch.context() as patch:
        patch.setattr(store, "collect", lost)
        with pytest.raises(OutcomeUnknown):
            await kme.get_key_with_ids("b", "a", ids[:2])
    with suppress(ErrorResponse):
        assert len((await kme.get_key_with_ids("b", "a", ids[:1])).keys) == 1
        assert not committed
    async with trio.open_nursery() as nursery:
        nursery.start_soon(kme.maintain, 0.01)
        with trio.fail_after(20):
            while kme._links["kme-a"].uncollected:  # noqa: ASYNC110
                await trio.sleep(0.01)
        nursery.cancel_scope.cancel()
    await store.aclose()
    number = "2.0" if committed else "0.0"
    line = f'keys_lost_total{{kme="kme-b",link="kme-a",reason="unrecorded"}} {number}'
    assert line in metrics.text().decode()


async def test_counters_of_a_link_begin_at_zero(tmp_path: Path) -> None:
    """Prometheus sees no increase before the first value: keys lost at once would go unnoticed."""
    store, metrics = SqliteKeyStore(tmp_path / "keys.db", Secret(bytes(32))), KmeMetrics()
    settings = EntitySettings(
        id="kme-a", saes=frozenset({"a"}), peers={"kme-b": frozenset({"b"})}, self_pairs=True
    )
    KeyManagementEntity(settings, store=store, metrics=metrics)
    await store.aclose()
    begun = set(
        re.findall(r'(hybridkex_\w+_total){kme="kme-a",link="kme-[ab]"', metrics.text().decode())
    )
    names = ("keys_lost", "keys_produced", "blocks_refused", "peer_excess", "shortages")
    assert begun == {f"hybridkex_kme_{name}_total" for name in names}
    text = metrics.text().decode()
    assert 'hybridkex_kme_keys_expired_total{kme="kme-a"} 0.0' in text
    for role in ("master", "slave"):
        assert f'keys_delivered_total{{kme="kme-a",role="{role}",sae="a"}} 0.0' in text


async def test_many_who_ask_load_nothing(
    site: Site, serve: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "GOOD_FOR", 60.0)
    asked = []
    readiness = health.KeyManagementEntity.readiness

    async def counted(kme: Any) -> dict[str, str | None]:
        asked.append(kme.kme_id)
        return await readiness(kme)

    monkeypatch.setattr(health.KeyManagementEntity, "readiness", counted)
    async with (
        serve(replace(site.pair(), metrics=ANYWHERE)) as where,
        trio.open_nursery() as nursery,
    ):
        for _ in range(20):
            nursery.start_soon(page, where, "readyz")
    assert sorted(asked) == ["kme-a", "kme-b"]


async def test_the_life_of_a_key(site: Site, serve: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "hybridkex.kme.entity")
    async with serve(site.pair()) as where:
        await filled(where, site)
        async with (
            as_sae(site, "alice", where.kmes["kme-a"]) as alice,
            as_sae(site, "bob", where.kmes["kme-b"]) as bob,
        ):
            [key] = (await alice.get("/bob/enc_keys")).json()["keys"]
            key_id = key["key_ID"]
            await bob.get("/alice/dec_keys", params={"key_ID": key_id})
    fields = [getattr(one, "fields", None) for one in caplog.records]
    life = [one for one in fields if one is not None and key_id in one["key_ids"]]
    assert sorted(one["event"] for one in life[:2]) == ["stored", "stored"]
    parties = {"master": "alice", "slaves": ["bob"]}
    assert [{**one, "key_ids": []} for one in life[2:]] == [
        {"event": event, "kme": kme, "link": link, "key_ids": [], **parties}
        for event, kme, link in (
            ("promised", "kme-b", "kme-a"),
            ("drawn", "kme-a", "kme-b"),
            ("collected", "kme-b", "kme-a"),
        )
    ]
    assert not leaks(caplog.text, base64.b64decode(key["key"]))


@pytest.fixture
def two_kmes(tmp_path: Path) -> Path:
    """The settings of two KMEs, ``kme.toml`` in a folder ``s`` with all that they name."""
    folder = tmp_path / "s"
    assert main(["kme", "dev-up", str(folder), "--ports", "0,0", "--no-serve"]) == 0
    return folder / "kme.toml"


def test_the_log_as_json_and_the_check(two_kmes: Path, hybridkex: Forkserver) -> None:
    path, folder = two_kmes, two_kmes.parent
    checked = hybridkex.run("kme", "serve", path, "--check")
    assert (checked.returncode, checked.stdout) == (0, f"{path} can be served\n".encode())
    assert not (folder / "kme-a" / "keys.db").exists()
    server = hybridkex.start("kme", "serve", path, "--log-level", "info", "--log-format", "json")
    until(lambda: any("stored" in line for line in server.lines()), server)
    for line in server.lines()[:5]:
        assert json.loads(line).keys() >= {"time", "level", "logger", "message"}
    # While it runs, too.
    assert hybridkex.run("kme", "serve", path, "--check").returncode == 0
    good = path.read_text()
    for before, after, said in (
        ("kme-a/store.key", "kme-a/none.key", "cannot read the key file"),
        ("kme-b/cert.pem", "kme-a/cert.pem", "private key is not that of the certificate"),
        ("kme-a/keys.db", "nowhere/keys.db", "files cannot be created in"),
        ("kme-a/keys.db", f"postgresql://kme@127.0.0.1:{free_port()}/kme", "cannot use the key"),
        ("[[kme.peer]]", "[[kme.pear]]", "unknown setting"),
    ):
        path.write_text(good.replace(before, after, 1))
        refused = hybridkex.run("kme", "serve", path, "--check")
        assert refused.returncode == 1
        assert re.search(said, refused.stderr.decode()), refused.stderr
        assert refused.stderr.count(b"\n") == 1


def test_the_check_refuses_what_a_run_refuses(
    two_kmes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, folder = two_kmes, two_kmes.parent
    good = path.read_text()
    port, link = free_port(), 'producer = "link"\nlink = '
    (folder / "other").symlink_to("kme-a")
    for change, said in (
        ({"127.0.0.1:0": "192.0.2.1:1"}, "cannot listen on 192.0.2.1:1: "),
        ({"127.0.0.1:0": "nowhere.invalid:1"}, "cannot listen on nowhere.invalid:1: "),
        ({"127.0.0.1:0": f"127.0.0.1:{port}"}, f"cannot listen on 127.0.0.1:{port}: "),
        ({"# Two": f'metrics = "192.0.2.1:{port}"\n#'}, f"cannot listen on 192.0.2.1:{port}: "),
        ({"kme-b/keys.db": "other/keys.db"}, "the same store|in use by another process"),
        ({'producer = "random"': link + '{ preset = "none" }'}, "preset"),
        ({'producer = "random"': link + "{ distance_km = 1e9 }"}, "distance|too far|km"),
        ({'producer = "random"': link + "{ block_bits = 1 }"}, "block"),
        ({'producer = "random"': link + '{ bootstrap = "none", tuned = false }'}, "bootstrap"),
    ):
        text = good
        for before, after in change.items():
            text = text.replace(before, after)
        path.write_text(text)
        for words in (["--check"], []):
            capsys.readouterr()
            assert main(["kme", "serve", str(path), *words]) == 1, (change, words)
            assert re.search(said, capsys.readouterr().err.splitlines()[-1]), (change, words)


def test_a_peer_is_reached_over_tls_alone(
    two_kmes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With "http://", keys that go by value would leave in the clear, to anybody."""
    path, good = two_kmes, two_kmes.read_text()
    for url in (
        *("http://127.0.0.1:1", "HTTP://127.0.0.1:1", "127.0.0.1:1", "//127.0.0.1:1", "https:", ""),
        *("https://127.0.0.1:1/kme", "https://127.0.0.1:1?x", "https://127.0.0.1:0"),
        *("https://127.0.0.1:x", "https://[::1:1", "ws://127.0.0.1:1"),
    ):
        path.write_text(
            good.replace('saes = ["bob"]\nproducer', f'saes = ["bob"]\nurl = "{url}"\nproducer')
        )
        for words in (["--check"], []):
            capsys.readouterr()
            assert main(["kme", "serve", str(path), *words]) == 1, url
            [line] = capsys.readouterr().err.splitlines()
            assert "of a KME" in line, url


@pytest.fixture
def checked(two_kmes: Path, hybridkex: Forkserver) -> Callable[[], str]:
    """``--check`` of the two KMEs: what it says; nothing if they can be served."""

    def check() -> str:
        done = hybridkex.run("kme", "serve", two_kmes, "--check")
        assert done.returncode == (1 if done.stderr else 0)
        return done.stderr.decode()

    return check


def states(folder: Path) -> list[tuple[str, bytes]]:
    return [(one.name, one.read_bytes()) for one in sorted(folder.glob("keys.db"))]


def test_the_check_opens_a_store_file(
    tmp_path: Path, hybridkex: Forkserver, checked: Callable[[], str]
) -> None:
    """While a KME uses it, after that KME was killed, and when nobody does."""
    folder = tmp_path / "s" / "kme-a"
    config, key_file = tmp_path / "s" / "kme.toml", folder / "store.key"
    server = hybridkex.start("kme", "serve", config, "--log-level", "info")
    until(lambda: b"stored" in server.told(), server)
    right = key_file.read_bytes()

    def refused() -> bool:
        assert checked() == ""
        key_file.write_bytes(new_key_file())
        said = checked()
        key_file.write_bytes(right)
        return said.count("\n") == 1 and "the key file is not the one under which" in said

    until(lambda: (folder / "keys.db").stat().st_size > 10_000, server)
    assert refused(), "while a KME uses it"
    second = hybridkex.run("kme", "serve", config)
    assert b"is in use by another process" in second.stderr, "the KME has the lock as before"
    assert server.poll() is None
    server.kill()
    server.wait()
    assert (folder / "keys.db-wal").exists()
    assert refused(), "after kill -9"
    before = states(folder)
    assert refused(), "when nobody does"
    assert states(folder) == before


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda file: file.write_bytes(b"no database" * 1000), "not a database"),
        (lambda file: file.mkdir(), "is not a regular file"),
        (lambda file: altered(file, "PRAGMA user_version = 99"), "a later version"),
        (lambda file: altered(file, "DROP TABLE meta"), "and not a key store"),
        (
            lambda file: altered(file, "INSERT INTO meta VALUES ('x-moved', 'db at x')"),
            "have been moved to db at x",
        ),
        (
            lambda file: altered(file, "INSERT INTO meta VALUES ('x-moving', 'y')"),
            "are being moved into another",
        ),
        (lambda file: altered(file, "DELETE FROM meta"), "is not the one under which"),
        (lambda file: os.link(made(file), file.with_name("another")), "several names"),
        (lambda file: made(file).write_bytes(b""), ""),
    ],
)
def test_the_check_says_why_a_store_file_cannot_be_served(
    tmp_path: Path, checked: Callable[[], str], change: Callable[[Path], Any], said: str
) -> None:
    change(tmp_path / "s" / "kme-a" / "keys.db")
    found = checked()
    assert said in found
    assert (found == "") == (said == "")
    assert found.count("\n") <= 1


def made(file: Path) -> Path:
    """A new store at this place."""
    SqliteKeyStore(file, read_key_file(file.with_name("store.key"))).close()
    return file


def altered(file: Path, statement: str) -> None:
    with closing(sqlite3.connect(made(file), isolation_level=None)) as db:
        db.execute(statement)
