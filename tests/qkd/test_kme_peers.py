"""Two ETSI GS QKD 014 clients that nobody here wrote, against the KME as a process."""

import json
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio
from etsi_qkd_014_client import QKD014Client
from forked import Forkserver
from qkdsec.client import ETSI014Client
from qkdsec.client.aio import AsyncETSI014Client
from qkdsec.client.errors import KMEHTTPError

from hybridkex.qkd.store import write_key_file

Site = Any  # of conftest.py

PAIR = """
[[kme]]
id = "{kme}"
listen = "127.0.0.1:0"
saes = ["{sae}"]
ca = "{kme}/ca.pem"
certificate = "{kme}/cert.pem"
key = "{kme}/key.pem"
store = "{kme}/store.db"
key_file = "{kme}/store.key"
self_pairs = true
not_found_status = {not_found}

[[kme.peer]]
id = "{peer}"
saes = ["{peer_sae}"]
"""


@contextmanager
def running(forkserver: Forkserver, site: Site, not_found: int) -> Iterator[dict[str, str]]:
    """``hybridkex kme serve`` for two KMEs; gives the address of each."""
    text = ""
    sites = (("kme-a", "alice", "kme-b", "bob"), ("kme-b", "bob", "kme-a", "alice"))
    for kme, sae, peer, peer_sae in sites:
        write_key_file(site.holder(kme) / "store.key")
        site.holder(sae)
        text += PAIR.format(kme=kme, sae=sae, peer=peer, peer_sae=peer_sae, not_found=not_found)
    config = site.folder / "kme.toml"
    config.write_text(text)
    with forkserver.telling("kme", "serve", config) as (said, process):
        lines = [said.readline().split() for _ in range(2)]
        yield {line[0]: line[-1].removeprefix("https://") for line in lines}
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0


def stocked(stored_key_count: Callable[[], int]) -> None:
    """Wait for the first keys of the producer."""
    for _ in range(200):
        if stored_key_count() >= 20:
            return
        time.sleep(0.02)
    raise AssertionError("the KME makes no keys")


def files(folder: Path) -> tuple[str, str, str]:
    return str(folder / "cert.pem"), str(folder / "key.pem"), str(folder / "ca.pem")


@pytest.mark.parametrize(("not_found", "warnings"), [(400, 1), (404, 0)])
def test_qkdsec_doctor(forkserver: Forkserver, site: Site, not_found: int, warnings: int) -> None:
    """It wants 404 for an unknown key, so a KME that is true to the standard gets one warning."""
    certificate, key, ca = files(site.holder("alice"))
    with running(forkserver, site, not_found) as where:
        doctor = str(Path(sys.executable).with_name("qkdsec"))
        result = subprocess.run(
            [doctor, "doctor", f"https://{where['kme-a']}", "-s", "alice", "--cert", certificate,
             "--key", key, "--ca-cert", ca, "-f", "json"],
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    report = json.loads(result.stdout)
    assert len(report["results"]) == 10
    assert report["counts"] == {"pass": 10 - warnings, "warn": warnings, "fail": 0, "skip": 0}
    unhappy = [probe["name"] for probe in report["results"] if probe["status"] != "pass"]
    assert unhappy == ["error_contract_404"][:warnings]


def test_qkdsec_clients(forkserver: Forkserver, site: Site) -> None:
    alice_files, bob_files = files(site.holder("alice")), files(site.holder("bob"))
    with running(forkserver, site, 400) as where:
        with (
            ETSI014Client(
                f"https://{where['kme-a']}", client_cert=alice_files[:2], verify=alice_files[2]
            ) as alice,
            ETSI014Client(
                f"https://{where['kme-b']}", client_cert=bob_files[:2], verify=bob_files[2]
            ) as bob,
        ):
            stocked(lambda: alice.status("bob").stored_key_count)
            keys = alice.get_enc_keys("bob", number=5, size=512)
            ids = [key.key_id for key in keys]
            assert bob.get_dec_keys("alice", key_ids=ids) == keys
            with pytest.raises(KMEHTTPError, match="not found on KME"):
                bob.get_dec_keys("alice", key_ids=ids)

        async def under_trio() -> None:
            context = ssl.create_default_context(cafile=alice_files[2])
            context.load_cert_chain(*alice_files[:2])
            async with (
                httpx.AsyncClient(verify=context) as http,
                AsyncETSI014Client(f"https://{where['kme-a']}", client=http) as client,
            ):
                assert (await client.status("bob")).target_kme_id == "kme-b"
                assert len(await client.get_enc_keys("bob", number=2, method="POST")) == 2

        trio.run(under_trio)


def test_etsi_qkd_014_client(forkserver: Forkserver, site: Site) -> None:
    with running(forkserver, site, 400) as where:
        alice = QKD014Client(where["kme-a"], *files(site.holder("alice")))
        bob = QKD014Client(where["kme-b"], *files(site.holder("bob")))
        code, status = alice.get_status("bob")
        assert (code, status.master_sae_id, status.slave_sae_id) == (200, "alice", "bob")
        stocked(lambda: alice.get_status("bob")[1].stored_key_count)
        code, drawn = alice.get_key("bob", 3, 512)
        assert (code, len(drawn.keys)) == (200, 3)
        code, default = alice.get_key("bob")
        assert (code, len(default.keys)) == (200, 1)
        ids = [key.key_id for key in drawn.keys]
        code, got = bob.get_key_with_key_IDs("alice", ids)
        assert code == 200
        assert [key.key for key in got.keys] == [key.key for key in drawn.keys]
        code, error = bob.get_key_with_key_IDs("alice", ids)
        assert (code, error.message) == (400, "one or more keys specified are not found on KME")
        # An answer without a JSON body would raise here.
        stranger = QKD014Client(where["kme-a"], *files(site.holder("stranger")))
        code, error = stranger.get_status("bob")
        assert (code, error.message) == (401, "Unauthorized")
