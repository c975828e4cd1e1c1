"""``--fresh-keys`` of the commands with a channel."""

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from forked import Forkserver, one_line

from hybridkex.cli.values import renewal


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("60s", 60), ("0.5s", 0.5), ("90", 90), ("5m", 300), ("2h", 7200), ("1d", 86400), ("peer", 0)],
)
def test_times(text: str, seconds: float) -> None:
    assert renewal(text) == seconds


@pytest.mark.parametrize("text", ["", "s", "0", "-1s", "inf", "nan", "5 minutes", "1w", "Peer"])
def test_texts_that_are_no_times(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="neither a time such as"):
        renewal(text)


def server_keys(keys: Path) -> list[str]:
    return ["--cert", str(keys / "cert.pem"), "--key", str(keys / "key.pem")]


def lines(stderr: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stderr.splitlines() if line.startswith(b"{")]


def test_a_session_renews_its_keys_and_says_so(
    hybridkex: Forkserver, tmp_path: Path, keys: Path
) -> None:
    words = ["--once", "--json", "--fresh-keys", "peer"]
    with hybridkex.listening(tmp_path, *server_keys(keys), *words) as (port, server):
        read, write = os.pipe()
        with os.fdopen(read, "rb") as source, os.fdopen(write, "wb") as sink:
            client = hybridkex.start(
                *("connect", "localhost", port, "--ca", str(keys / "ca.pem")),
                *("--json", "--fresh-keys", "0.05s"),
                stdin=source,
            )
            for _ in range(20):
                sink.write(b"data")
                sink.flush()
                time.sleep(0.02)
        received, server_errors = server.communicate(b"", timeout=30)
        _, client_errors = client.communicate(timeout=30)
    assert received == b"data" * 20
    for stderr in (server_errors, client_errors):
        first, last = lines(stderr)
        assert first["key_updates"] == last["key_updates"] == "fresh"
        assert first["epochs"] == []
        assert last["epoch"] >= 2
        assert last["epochs"][0]["confirmed"]


@pytest.mark.parametrize("policy", ["require", "prefer"])
def test_a_server_that_does_not_know_it(
    hybridkex: Forkserver, tmp_path: Path, keys: Path, policy: str
) -> None:
    with hybridkex.listening(tmp_path, *server_keys(keys), "--echo") as (port, _):
        done = hybridkex.run(
            *("connect", "localhost", port, "--ca", str(keys / "ca.pem")),
            *("--fresh-keys", "60s", "--fresh-keys-policy", policy),
            data=b"ping",
        )
    if policy == "require":
        assert done.returncode == 1
        assert "requires fresh keys" in one_line(done.stderr)
    else:
        assert (done.returncode, done.stdout) == (0, b"ping")
        assert b"NO FRESH KEYS" in done.stderr


def test_tickets_and_fresh_keys(hybridkex: Forkserver, tmp_path: Path) -> None:
    words = ["--resume", str(tmp_path / "tickets"), "--fresh-keys", "60s", "--insecure"]
    done = hybridkex.run("connect", "localhost", "1", *words, data=b"")
    assert done.returncode == 1
    assert b"--resume and --fresh-keys exclude each other" in done.stderr


def test_the_file_of_a_tunnel(hybridkex: Forkserver, tmp_path: Path, keys: Path) -> None:
    file = tmp_path / "tunnels.toml"
    for value, wrong in (('"60s"', False), ("90", False), ('"peer"', False), ('"soon"', True)):
        file.write_text(
            '[[listen]]\nname = "a"\nlocal = "127.0.0.1:0"\ntarget = "127.0.0.1:1"\n'
            f'cert = "{keys / "cert.pem"}"\nkey = "{keys / "key.pem"}"\n'
            f'fresh_keys = {value}\nfresh_keys_policy = "prefer"\n'
        )
        done = hybridkex.run("tunnel", "run", str(file), "--check", data=b"")
        assert (done.returncode == 0) is not wrong, done.stderr
