"""Measured detections in files, and keys made of them."""

import functools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
)

from hybridkex.auth import DevCa
from hybridkex.cli import main
from hybridkex.errors import BlockAborted, ConfigError
from hybridkex.link.measured import Measured, distil, read_measured, write_measured
from hybridkex.link.optimise import tuned
from hybridkex.link.presets import PRESETS, Preset
from hybridkex.link.quantum import sample
from hybridkex.link.randomness import Randomness
from hybridkex.link.settings import LinkSettings
from interop.ports import free_port

ROWS = 120_000


@functools.cache
def best(name: str) -> Preset:
    return tuned(PRESETS[name].at(10), 40_000)


def recorded(name: str = "rusca2018", rows: int = ROWS) -> tuple[Measured, Measured, Preset]:
    chosen = best(name)
    sent, seen = sample(
        chosen.channel,
        chosen.transmitter,
        chosen.channel,
        rows,
        first=0,
        randomness=Randomness.seeded(1, "measured"),
    )
    alice = Measured(pulse=seen.pulse, basis=sent.basis, bit=sent.bit, intensity=sent.intensity)
    return alice, Measured(pulse=seen.pulse, basis=seen.basis, bit=seen.bit), chosen


def test_distil_makes_the_same_keys_on_both_sides() -> None:
    alice, bob, chosen = recorded()
    ours, theirs = distil(alice, bob, LinkSettings(preset=chosen))
    assert [one.key for one in ours.keys] == [one.key for one in theirs.keys]
    assert len(ours.keys) > 10
    match = (alice.basis == bob.basis) & (alice.basis == 0)
    assert ours.sifted == int(match.sum())
    assert theirs.qber == pytest.approx((alice.bit != bob.bit)[match].mean())


def test_rows_that_are_sifted_already_will_do() -> None:
    alice, bob, chosen = recorded()
    kept = alice.basis == bob.basis
    sifted = [
        Measured(
            basis=one.basis[kept],
            bit=one.bit[kept],
            intensity=None if one.intensity is None else one.intensity[kept],
        )
        for one in (alice, bob)
    ]
    settings = LinkSettings(preset=chosen, decoy_check="shares")
    whole = distil(alice, bob, settings, seed=1)[0]
    part = distil(sifted[0], sifted[1], settings, seed=1)[0]
    assert part.secret_bits == pytest.approx(whole.secret_bits, abs=100)
    with pytest.raises(ConfigError, match="decoy_check"):
        distil(sifted[0], sifted[1], LinkSettings(preset=chosen))


def test_the_decoy_check_says_what_is_expected_or_is_off() -> None:
    alice, bob, chosen = recorded()
    assert alice.intensity is not None
    elsewhere = chosen.at(60)  # as if much less light should have come
    with pytest.raises(BlockAborted, match="all detections"):
        distil(alice, bob, LinkSettings(preset=elsewhere))
    assert distil(alice, bob, LinkSettings(preset=elsewhere, decoy_check="shares"))[0].keys
    flip = Measured(basis=alice.basis, bit=alice.bit, intensity=1 - alice.intensity)
    other = Measured(basis=bob.basis, bit=bob.bit)
    with pytest.raises(BlockAborted, match="decoy statistics"):
        distil(flip, other, LinkSettings(preset=chosen, decoy_check="shares"))
    with pytest.raises(BlockAborted, match="no secret bit"):
        distil(flip, other, LinkSettings(preset=chosen, decoy_check="off"))


@pytest.mark.parametrize("name", ["rusca2018", "bbm92"])
@pytest.mark.parametrize("ending", [".npz", ".parquet"])
def test_files_there_and_back(tmp_path: Path, ending: str, name: str) -> None:
    if ending == ".parquet":
        pytest.importorskip("pyarrow")
    for number, one in enumerate(recorded(name, 500)[:2]):
        path = tmp_path / f"{number}{ending}"
        chosen = best(name)
        write_measured(path, one, chosen)
        assert path.stat().st_mode & 0o077 == 0
        again, there = read_measured(path)
        for array in ("basis", "bit", "intensity", "pulse"):
            assert np.array_equal(getattr(again, array), getattr(one, array)), array
        assert there.parameters == {**chosen.parameters, "efficiency": there.efficiency}


GOOD = {"basis": np.zeros(9, np.uint8), "bit": np.zeros(9, np.uint8)}


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"basis": np.zeros(8, np.uint8)}, "not one number for each"),
        ({"bit": np.full(9, 2)}, "from 0 to 1"),
        ({"bit": np.full(9, -1)}, "from 0 to 1"),
        ({"bit": np.zeros(9)}, "integers"),
        ({"bit": np.zeros((3, 3), int)}, "one number for each"),
        ({"intensity": np.full(9, 4)}, "from 0 to 3"),
        ({"pulse": np.zeros(9, int)}, "does not increase"),
        ({"pulse": np.arange(9) - 1}, "does not increase"),
        ({"pulse": np.arange(9.0)}, "one integer"),
        ({"basis": np.zeros(0, np.uint8), "bit": np.zeros(0, np.uint8)}, "between 1 and"),
    ],
)
def test_arrays_that_cannot_be(wrong: dict, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        Measured(**{**GOOD, **wrong})


SETTINGS = json.dumps(
    {
        "source": {
            "intensities": [0.5, 0.2],
            "probabilities": [0.7, 0.3],
            "key_basis_probability": 0.9,
        },
        "channel": {
            "receiver_efficiency": 0.2,
            "dark_count_probability": 1e-8,
            "misalignment": 0.01,
        },
    }
)


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        ({}, "settings are missing"),
        ({"settings": "{"}, "malformed"),
        ({"settings": "[]"}, "malformed"),
        ({"settings": "{}"}, "malformed"),
        ({"settings": SETTINGS.replace("0.9", "7")}, "key_basis_probability"),
        ({"settings": SETTINGS.replace("0.9", '"x"')}, "malformed"),
        ({"settings": SETTINGS.replace("misalignment", "misalignments")}, "unknown settings"),
        ({"settings": SETTINGS, "extra": np.zeros(9)}, "unknown array"),
        ({"settings": SETTINGS, "bit": np.array(["a"] * 9)}, "integers"),
        ({"settings": SETTINGS, "bit": np.array([None] * 9)}, "not an .npz file"),
    ],
)
def test_files_that_cannot_be(tmp_path: Path, arrays: dict, reason: str) -> None:
    path = tmp_path / "x.npz"
    np.savez(path, **{**GOOD, **arrays})
    with pytest.raises(ConfigError, match=reason) as caught:
        read_measured(path)
    assert "x.npz" in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"nonsense" * 100])
@pytest.mark.parametrize("ending", [".npz", ".parquet", ".txt"])
def test_files_that_are_something_else(tmp_path: Path, content: bytes, ending: str) -> None:
    path = tmp_path / f"x{ending}"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="x"):
        read_measured(path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    for ending in (".npz", ".parquet"):
        with pytest.raises(ConfigError, match="cannot read"):
            read_measured(tmp_path / f"nothing{ending}")


def test_record_and_distil_as_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "data"
    record = ["qkd", "record", "--preset", "rusca2018", "--distance", "10", "--seed", "1"]
    assert main([*record, "--detections", "60000", "-o", str(folder)]) == 0
    capsys.readouterr()
    files = [str(folder / "alice.npz"), str(folder / "bob.npz")]
    keys = tmp_path / "keys"
    assert main(["qkd", "distil", *files, "--keys", str(keys)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["keys"] == len(keys.read_text().splitlines()) > 5
    assert keys.stat().st_mode & 0o077 == 0
    assert main(["qkd", "distil", files[0], files[0]]) != 0
    assert "one Bob's" in capsys.readouterr().err
    assert main(["qkd", "distil", files[0]]) != 0
    assert "--listen or --connect" in capsys.readouterr().err


def test_two_ends_distil_over_tcp(tmp_path: Path) -> None:
    unused_port = free_port()
    alice, bob, chosen = recorded()
    ca = DevCa.create()
    for name, one in (("alice", alice), ("bob", bob)):
        write_measured(tmp_path / f"{name}.npz", one, chosen)
        identity = ca.issue(name)
        (tmp_path / f"{name}.pem").write_bytes(identity.leaf.public_bytes(Encoding.PEM))
        (tmp_path / f"{name}.key").write_bytes(
            identity.signing_key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        )
    there = f"127.0.0.1:{unused_port}"
    command = [sys.executable, "-m", "hybridkex", "qkd", "distil"]
    ends = [
        subprocess.Popen(
            [*command, f"{who}.npz", way, there, "--key", f"{who}.key", "--peer", f"{peer}.pem",
             "--keys", f"{who}.keys"],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
        )
        for who, peer, way in (("alice", "bob", "--listen"), ("bob", "alice", "--connect"))
    ]  # fmt: skip
    try:
        outs = [json.loads(end.communicate(timeout=60)[0]) for end in ends]
    finally:
        for end in ends:
            end.kill()
            end.wait()
    assert outs[0]["keys"] == outs[1]["keys"] > 5
    assert outs[0]["epsilon"]["conditional"]
    assert (tmp_path / "alice.keys").read_text() == (tmp_path / "bob.keys").read_text()
