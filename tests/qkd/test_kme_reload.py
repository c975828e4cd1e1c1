"""SIGHUP: a running KME takes a new configuration as a whole, or stays as it is."""

import os
import random
import re
import signal
import threading
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio
from forked import Forkserver
from spoiled import spoiled
from waiting import until

from hybridkex.cli import main
from hybridkex.cli.actions.kme import _reload
from hybridkex.errors import ConfigError
from hybridkex.kme.config import ServeConfig, load_config
from hybridkex.kme.serve import KmeServer
from hybridkex.qkd.store import write_key_file


@pytest.fixture
def site(tmp_path: Path) -> Path:
    assert main(["kme", "dev-up", str(tmp_path / "s"), "--ports", "0,0", "--no-serve"]) == 0
    return tmp_path / "s"


def client(site: Path, port: str) -> httpx.Client:
    import ssl

    context = ssl.create_default_context(cafile=site / "alice" / "ca.pem")
    context.load_cert_chain(site / "alice" / "cert.pem", site / "alice" / "key.pem")
    return httpx.Client(base_url=f"https://localhost:{port}/api/v1/keys", verify=context)


def test_a_reload(hybridkex: Forkserver, site: Path, tmp_path: Path) -> None:
    """Limits change, a connection that is there goes on, and broken files change nothing."""
    path = site / "kme.toml"
    good = path.read_text()
    out, err = tmp_path / "out", tmp_path / "err"
    with out.open("wb") as stdout, err.open("wb") as stderr:
        server = hybridkex.start(
            "kme", "serve", path, "--log-level", "info", stdout=stdout, stderr=stderr
        )
    until(lambda: out.read_text().count("listens on") == 2)
    port = re.findall(r"kme-a listens on https://127\.0\.0\.1:(\d+)", out.read_text())[0]

    def hang_up(text: str, said: str) -> None:
        before = err.read_text().count(said)
        path.write_text(text)
        os.kill(server.pid, signal.SIGHUP)
        until(lambda: err.read_text().count(said) > before)

    with client(site, port) as http:
        assert http.get("/bob/status").json()["max_key_per_request"] == 128
        changed = good.replace("[[kme.peer]]", "limits.max_key_per_request = 7\n[[kme.peer]]")
        hang_up(changed, " reloaded")
        assert http.get("/bob/status").json()["max_key_per_request"] == 7
        for broken in (
            "",
            good.replace("kme-a/ca.pem", "missing"),
            good.replace("kme-a/cert.pem", "kme-b/cert.pem"),
            good.replace("127.0.0.1:0", "127.0.0.1:1"),
            good.replace('"kme-a"', '"kme-c"'),
            good.replace('saes = ["alice"]', 'saes = ["bob"]'),
            good.replace("kme-a/ca.pem", "kme-a\\u0000ca.pem"),
        ):
            hang_up(broken, "not reloaded")
            assert http.get("/bob/status").json()["max_key_per_request"] == 7
        hang_up(good, " reloaded")
        assert http.get("/bob/status").json()["max_key_per_request"] == 128
        assert http.get("/bob/enc_keys").status_code == 200
    assert server.poll() is None


async def test_files_that_cannot_be_used_change_nothing(
    site: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """200 of them: what they say, what they name, and what a crash of an editor leaves."""
    path = site / "kme.toml"
    good = path.read_text()
    files = ("ca", "certificate", "key", "key_file")
    broken = random.Random(33).sample(spoiled(good, site, files=files, harmless=("saes",)), 200)
    server = KmeServer(load_config(path))
    caplog.set_level("INFO", "hybridkex.cli.kme")
    async with trio.open_nursery() as nursery:
        where = await nursery.start(server.serve)
        with client(site, str(where.kmes["kme-a"].port)) as http:

            async def draws() -> None:
                while (await trio.to_thread.run_sync(http.get, "/bob/enc_keys")).is_error:  # noqa: ASYNC110
                    await trio.sleep(0.05)  # another task makes the keys

            for number, text in enumerate(broken):
                path.write_text(text, encoding="utf-8", errors="surrogatepass")
                caplog.clear()
                await _reload(server, partial(load_config, path))
                said = caplog.messages
                difference = set(text.splitlines()) - set(good.splitlines())
                assert len(said) == 1, (difference, said)
                assert "not reloaded, the old configuration stays" in said[0], difference
                assert not re.search(r": \w+Error$", said[0]), (difference, said)
                if number % 25 == 0:
                    await draws()
            path.write_text(good)
            await _reload(server, partial(load_config, path))
            assert caplog.messages[-1] == "reloaded"
            await draws()
        server.close()


async def test_a_sealing_key_that_was_taken_up_is_named(site: Path) -> None:
    """The store of the first of two KMEs has its new key for good when that of the second fails."""
    path = site / "kme.toml"
    server: Any = KmeServer(load_config(path))
    for name in ("kme-a", "kme-b"):
        write_key_file(site / name / "new.key")
    new = path.read_text().replace('store.key"', 'new.key"')
    path.write_text(new.replace('a/new.key"', 'a/new.key"\nread_key_files = ["kme-a/store.key"]'))
    try:
        with pytest.raises(ConfigError, match=r"kme-b: .*; the new key_file of kme-a is in use"):
            await server.reload(partial(load_config, path))
    finally:
        for store in server._stores.values():
            store.close()


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("kme-a/keys.db", "kme-a/other.db", "store"),
        ('listen = "127.0.0.1:0"', 'listen = "127.0.0.1:1"', "listen"),
        ('tls = "stdlib"', 'tls = "stdlib"\nself_pairs = true', "self_pairs"),
        ('producer = "random"', 'producer = "link"', "producer"),
        *(
            (
                'producer = "random"',
                f'producer = "link"\n{link}\n',
                f"{name} in the link table of kme-b",
            )
            for name, link in (
                ("distance_km", "link = { distance_km = 2 }"),
                ("block_bits", "link = { distance_km = 1, block_bits = 30000 }"),
                ("bootstrap", 'link = { distance_km = 1, bootstrap = "psk" }'),
            )
        ),
    ],
)
async def test_what_needs_a_restart_is_said(site: Path, old: str, new: str, said: str) -> None:
    path = site / "kme.toml"
    text = path.read_text()
    if "link table" in said:
        path.write_text(text.replace(old, 'producer = "link"\nlink = { distance_km = 1 }\n'))
    server: Any = KmeServer(load_config(path))
    try:
        path.write_text(text.replace(old, new))
        with pytest.raises(ConfigError, match=f"another {said} needs a restart"):
            await server.reload(partial(load_config, path))
    finally:
        for store in server._stores.values():
            store.close()


async def test_a_reload_that_waits_for_a_file_holds_up_nobody(site: Path) -> None:
    """As on a network file system that does not answer."""
    server = KmeServer(load_config(site / "kme.toml"))
    asked, answers = threading.Event(), threading.Event()

    def load() -> ServeConfig:
        asked.set()
        assert answers.wait(30)
        return load_config(site / "kme.toml")

    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.reload, load)
            assert await trio.to_thread.run_sync(asked.wait, 10)
            answers.set()
    finally:
        answers.set()
        for store in server._stores.values():
            store.close()
