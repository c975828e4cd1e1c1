"""Measured detections in files, and keys made of them."""

import base64
import functools
import io
import json
import os
import random
import re
import resource
import shutil
import socket
import subprocess
import sys
import time
import tracemalloc
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trio
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
)

from hybridkex.auth import DevCa
from hybridkex.cli import main
from hybridkex.cli.actions import qkd_data
from hybridkex.errors import BlockAborted, ConfigError, LinkError
from hybridkex.link.authentication import Signatures
from hybridkex.link.greeting import CLASSICAL, NUMBER, greet
from hybridkex.link.ledger import LANE_RESERVE, Direction, Ledger
from hybridkex.link.measured import (
    Measured,
    alice_of,
    bob_of,
    check_unused,
    distil,
    read_measured,
    write_measured,
)
from hybridkex.link.optimise import tuned
from hybridkex.link.party import Alice, Bob
from hybridkex.link.presets import PRESETS, Preset
from hybridkex.link.quantum import sample
from hybridkex.link.randomness import Randomness
from hybridkex.link.settings import MOST_DETECTIONS, LinkSettings
from hybridkex.link.simulated import stream_pair
from hybridkex.link.wire import SessionEnded
from hybridkex.secret import Secret
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


@pytest.mark.parametrize("begins", [0, 1, 10**12, None])
def test_a_block_has_the_time_from_its_first_pulse_to_its_last(begins: int | None) -> None:
    """Wherever pulses are counted from; without them its time is not known, and no number is."""
    alice, bob, chosen = recorded()
    assert alice.pulse is not None
    count = None if begins is None else alice.pulse + begins
    ends = [replace(one, pulse=count) for one in (alice, bob)]
    check = "shares" if begins is None else "full"
    for block in distil(ends[0], ends[1], LinkSettings(preset=chosen, decoy_check=check)):
        if begins is None:
            assert (block.pulses, block.seconds, block.rate) == (None, None, None)
        else:
            assert block.pulses == alice.pulse[-1] - alice.pulse[0] + 1
            assert block.seconds == block.pulses / chosen.channel.repetition_rate_hz
            assert block.rate == block.secret_bits / block.seconds
    if begins is not None:  # half of the light was not recorded
        gap = np.arange(ROWS) >= ROWS // 2
        ends = [replace(one, pulse=count + gap * np.ptp(count)) for one in (alice, bob)]
        with pytest.raises(BlockAborted, match=r"all detections of [\d,]+ pulses: 120000 det"):
            distil(ends[0], ends[1], LinkSettings(preset=chosen))


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
        ({"pulse": np.arange(9) - 1}, "not from 0 to"),
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
        ({"settings": "{"}, "not JSON"),
        ({"settings": "[]"}, "not a JSON object"),
        ({"settings": "{}"}, "no object 'channel'"),
        ({"settings": SETTINGS.replace("0.9", "7")}, "key_basis_probability"),
        ({"settings": SETTINGS.replace("0.9", '"x"')}, "must be a number"),
        (
            {"settings": SETTINGS.replace("misalignment", "misalignments")},
            ".channel. has unknown names: misal",
        ),
        ({"settings": SETTINGS, "extra": np.zeros(9)}, "unknown array"),
        ({"settings": SETTINGS, "bit": np.array(["a"] * 9)}, "integers"),
        ({"settings": SETTINGS, "bit": np.array([None] * 9)}, "of the type object"),
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
    kept = {path: path.read_bytes() for path in (keys, *folder.iterdir())}
    for again in ([*record, "-o", str(folder)], ["qkd", "distil", *files, "--keys", str(keys)]):
        assert main(again) == 1
        assert "exists already and is not replaced" in capsys.readouterr().err
    assert kept == {path: path.read_bytes() for path in kept}
    assert main(["qkd", "distil", *files]) == 0
    capsys.readouterr()
    assert main(["qkd", "distil", files[0], files[0]]) != 0
    assert "the other Bob's" in capsys.readouterr().err
    assert main(["qkd", "distil", "examples/qkd-data/alice.npz"]) != 0
    assert "--listen or --connect" in capsys.readouterr().err


def _write_credentials(folder: Path) -> None:
    ca = DevCa.create()
    for name in ("alice", "bob"):
        identity = ca.issue(name)
        (folder / f"{name}.pem").write_bytes(identity.leaf.public_bytes(Encoding.PEM))
        (folder / f"{name}.key").write_bytes(
            identity.signing_key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        )


@pytest.mark.parametrize("listens", ["alice", "bob"])
def test_two_ends_distil_over_tcp_whoever_else_connects(tmp_path: Path, listens: str) -> None:
    unused_port = free_port()
    alice, bob, chosen = recorded()
    _write_credentials(tmp_path)
    for name, one in (("alice", alice), ("bob", bob)):
        write_measured(tmp_path / f"{name}.npz", one, chosen)
    there = f"127.0.0.1:{unused_port}"
    command = [sys.executable, "-m", "hybridkex", "qkd", "distil"]

    def start(who: str, peer: str) -> "subprocess.Popen[bytes]":
        way = "--listen" if who == listens else "--connect"
        own = ["--key", f"{who}.key", "--peer", f"{peer}.pem", "--keys", f"{who}.keys"]
        return subprocess.Popen(
            [*command, f"{who}.npz", way, there, *own],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )

    with ExitStack() as stack:
        ends = {}
        for who in (listens, "bob" if listens == "alice" else "alice"):
            peer = "bob" if who == "alice" else "alice"
            ends[who] = stack.enter_context(start(who, peer))
            stack.callback(ends[who].kill)
            if who == listens:  # strangers come first; one of them is silent and stays
                for words in (None, b"", b"GET / HTTP/1.1\r\n\r\n", b"C" + bytes(50), b"C"):
                    stranger = stack.enter_context(_reach(unused_port))
                    if words is None:
                        continue
                    stranger.sendall(words)
                    stranger.close()
        outs = {who: json.loads(end.communicate(timeout=60)[0]) for who, end in ends.items()}
    assert outs["alice"]["keys"] == outs["bob"]["keys"] > 5
    assert outs["alice"]["to_ledger"] == 0  # no further block will need a tag
    assert outs["alice"]["epsilon"]["conditional"]
    assert (tmp_path / "alice.keys").read_text() == (tmp_path / "bob.keys").read_text()
    for who in ends:  # a second run is refused at each end, alone and with the other
        with pytest.raises(ConfigError, match=rf"{who}\.npz have been used"):
            check_unused(tmp_path / f"{who}.npz")


async def test_who_waits_says_that_the_other_end_was_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where it has another certificate than the one that was given here."""
    _write_credentials(tmp_path)
    own, wrong = tmp_path / "alice.key", tmp_path / "alice.pem"
    bob = Signatures.from_files(tmp_path / "bob.key", wrong)
    desk = qkd_data._Desk(Signatures.from_files(own, wrong), Direction.BOB_TO_ALICE)
    monkeypatch.setattr(qkd_data, "WAIT", 0.1)
    near, far = stream_pair()

    async def connect() -> None:
        with pytest.raises(SessionEnded, match="does not accept our signature"):
            await greet(far, bob, CLASSICAL, bytes(NUMBER), sends=Direction.BOB_TO_ALICE)

    async with near, far, trio.open_nursery() as nursery:
        nursery.start_soon(connect)
        with pytest.raises(LinkError):
            await desk.receive(near, None)  # type: ignore[arg-type]
    with pytest.raises(
        LinkError, match=r"within 0 seconds; a connection was refused: .*alice\.pem"
    ):
        await desk.other_end()


def _reach(port: int) -> socket.socket:
    for _ in range(600):
        try:
            return socket.create_connection(("127.0.0.1", port))
        except ConnectionRefusedError:
            time.sleep(0.05)
    raise AssertionError("nobody listens")


def test_no_room_for_the_keys_is_found_before_the_other_end_makes_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _write_credentials(tmp_path)
    monkeypatch.setattr(qkd_data, "WAIT", 0.3)
    here = f"127.0.0.1:{free_port()}"
    shutil.copy("examples/qkd-data/alice.npz", tmp_path)
    command = ["qkd", "distil", str(tmp_path / "alice.npz"), "--listen", here,
               "--key", str(tmp_path / "alice.key"), "--peer", str(tmp_path / "bob.pem"),
               "--keys"]  # fmt: skip
    assert main([*command, str(tmp_path / "missing" / "keys")]) == 1
    assert "keys: No such file or directory" in capsys.readouterr().err
    assert main([*command, str(tmp_path)]) == 1
    assert "Is a directory; name a file" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.distilled"))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))  # as a full disk
    try:
        assert main([*command, str(tmp_path / "keys")]) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "keys: File too large" in capsys.readouterr().err
    assert main([*command, str(tmp_path / "keys")]) == 1
    assert "did not connect" in capsys.readouterr().out
    command[4] = "127.0.0.1:0"
    assert main([*command, str(tmp_path / "keys")]) == 1
    assert "a port other than 0" in capsys.readouterr().err
    assert not [one for one in tmp_path.iterdir() if "keys" in one.name]


def _archive(**arrays: object) -> dict[str, object]:
    good = dict(np.load("examples/qkd-data/bob.npz"))
    return {name: one for name, one in {**good, **arrays}.items() if one is not None}


def _settings(**changed: object) -> np.ndarray[tuple[()], np.dtype[np.str_]]:
    found = json.loads(str(np.load("examples/qkd-data/bob.npz")["settings"]))
    for name, value in changed.items():
        part, _, field = name.partition("__")
        if field:
            found[part][field] = value
        else:
            found[part] = value
    return np.array(json.dumps(found))


ODD: dict[str, dict[str, object]] = {
    "floats": {"bit": np.zeros(60_000)},
    "two columns": {"bit": np.zeros((2, 30_000), dtype=np.uint8)},
    "an unknown array": {"more": np.zeros(3)},
    "settings in bytes": {"settings": np.array(b"{}")},
    "many settings": {"settings": np.array(["{}"] * 2)},
    "no settings": {"settings": None},
    "a list": {"settings": np.array("[]")},
    "no text of Unicode": {
        "settings": np.frombuffer((0x110005).to_bytes(4, "little"), "<U1").reshape(())
    },
    "another object": {"settings": _settings(securtiy={"secrecy": 1e-12})},
    "no source": {"settings": _settings(source=None)},
    "a channel that is a list": {"settings": _settings(channel=[])},
    "an unknown security": {"settings": _settings(security__more=1)},
    "a distance of 400 digits": {"settings": _settings(channel__distance_km=10**400)},
    "a word for a number": {"settings": _settings(channel__distance_km="far")},
    "true for a number": {"settings": _settings(channel__receiver_efficiency=True)},
    "nested intensities": {"settings": _settings(source__intensities=[[0.5], [0.2]])},
    "a clock of 1e300 Hz": {"settings": _settings(channel__repetition_rate_hz=1e300)},
    "a dead time of 1e300 s": {"settings": _settings(channel__dead_time_s=1e300)},
    "a secrecy of 1e-300": {"settings": _settings(security__secrecy=1e-300)},
    "dark counts of 1": {"settings": _settings(channel__dark_count_probability=1)},
    "pulses beyond 2^63": {"pulse": np.arange(60_000, dtype=np.uint64) + np.uint64(1 << 63)},
    "a wrap in the pulses": {
        "pulse": np.array([*range(59_998), 2**63 - 1, -(2**63)], dtype=np.int64)
    },
}


@pytest.mark.parametrize("what", ODD)
def test_an_archive_that_is_not_of_detections_is_refused_in_one_line(
    what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "bob.npz", **_archive(**ODD[what]))  # type: ignore[arg-type]
    assert main(["qkd", "distil", "examples/qkd-data/alice.npz", str(tmp_path / "bob.npz")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "bob.npz: " in line
    assert not any(word in line for word in ("__init__", "argument", "object has", "subscript"))


def test_any_value_of_any_setting_is_refused_in_one_line_or_taken(tmp_path: Path) -> None:
    """JSON of every kind, in every field of the settings in a file."""
    whole = json.loads(str(np.load("examples/qkd-data/bob.npz")["settings"]))
    values = [None, True, "x", [], [1], [[1]], [0.5, 0.2], {}, {"a": 1}, -1, 0, 0.5, 1e300,
              10**400, float("nan"), float("inf")]  # fmt: skip
    path, taken = tmp_path / "alice.npz", 0
    bits = np.zeros(2, dtype=np.uint8)
    for part, given in whole.items():
        for field in given:
            for value in values:
                settings = _settings(**{f"{part}__{field}": value})
                np.savez(path, basis=bits, bit=bits, intensity=bits, settings=settings)
                try:
                    _, chosen = read_measured(path)
                except ConfigError as error:
                    assert str(error).startswith(f"{path}: ")  # noqa: PT017  # it may be taken
                else:
                    LinkSettings(preset=chosen, block_bits=1000)
                    taken += 1
    assert taken > 10


def test_a_shape_that_is_no_number_of_rows(tmp_path: Path) -> None:
    content = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        content, {"descr": "|u1", "fortran_order": False, "shape": (True,)}
    )
    content.write(b"\1")
    with zipfile.ZipFile(tmp_path / "bob.npz", "w") as archive:
        archive.writestr("bit.npy", content.getvalue())
    with pytest.raises(ConfigError, match="bit has the shape"):
        read_measured(tmp_path / "bob.npz")


def test_an_intensity_that_the_source_does_not_have(tmp_path: Path) -> None:
    alice, bob, chosen = recorded(rows=5000)
    assert alice.intensity is not None
    more = replace(alice, intensity=alice.intensity + 1)
    write_measured(tmp_path / "alice.npz", more, chosen)
    for refuse in (
        lambda: read_measured(tmp_path / "alice.npz"),
        lambda: distil(more, bob, LinkSettings(preset=chosen, decoy_check="off")),
    ):
        with pytest.raises(ConfigError, match="intensity has the index 2, and the source has only"):
            refuse()


@pytest.mark.parametrize("moved", [1, None])
def test_two_ends_with_other_pulses_are_told(moved: int | None) -> None:
    """Over a stream nobody compares the files beforehand; both ends are told."""
    alice, bob, chosen = recorded(rows=20_000)
    assert alice.pulse is not None
    odd = replace(bob, pulse=None if moved is None else alice.pulse + moved)
    near, far = stream_pair()
    secret = Secret(bytes(2 * LANE_RESERVE))
    chosen_settings = LinkSettings(preset=chosen, decoy_check="off")

    async def run() -> None:
        async with near, far, trio.open_nursery() as nursery:
            for end in (
                alice_of(alice, chosen_settings, near, Ledger(secret)),
                bob_of(odd, chosen_settings, far, Ledger(secret)),
            ):
                nursery.start_soon(told, end)

    async def told(end: Alice | Bob) -> None:
        with pytest.raises(LinkError, match="files are not of the same"):
            await end.block()

    trio.run(run)


def test_a_damaged_archive_is_refused_in_one_line(tmp_path: Path) -> None:
    good, path = Path("examples/qkd-data/bob.npz").read_bytes(), tmp_path / "bob.npz"
    rng = np.random.default_rng(7)
    encrypted = bytearray(good)
    for mark, flags in ((b"PK\1\2", 8), (b"PK\3\4", 6)):
        at = -1
        while (at := encrypted.find(mark, at + 1)) >= 0:
            encrypted[at + flags] |= 1
    damaged = [bytes(encrypted), good[:5000]]
    for _ in range(100):
        one = bytearray(good)
        for place in rng.integers(0, len(one), 5):
            one[place] = rng.integers(256)
        damaged.append(bytes(one))
    for one in damaged:
        path.write_bytes(one)
        with pytest.raises(ConfigError, match=r"bob\.npz"):
            read_measured(path)


HEADERS = [
    "(((", "{'descr': '|u1', 'fortran_order': False, 'shape': (3,)", "{1: 2, 'descr': 3}",
    "{'descr': (((),)), 'fortran_order': False, 'shape': (3,)}", "[" * 300, "{'descr': '|u1'}",
    "{'descr': '\0u1', 'fortran_order': 0, 'shape': 3}", "", "\xff", "{'descr': [('a',)]}",
]  # fmt: skip


@pytest.mark.parametrize("version", [1, 2, 3])
@pytest.mark.parametrize("header", HEADERS)
def test_a_damaged_header_of_an_array_is_refused_in_one_line(
    tmp_path: Path, header: str, version: int
) -> None:
    """It is read before its checksum, and numpy hands it to Python's own parsers."""
    text = header.encode("latin-1") + b"\n"
    start = (
        b"\x93NUMPY" + bytes([version, 0]) + len(text).to_bytes(2 if version == 1 else 4, "little")
    )
    with zipfile.ZipFile(tmp_path / "bob.npz", "w") as archive:
        archive.writestr("bit.npy", start + text + bytes(3))
    with pytest.raises(ConfigError, match=r"bob\.npz: "):
        read_measured(tmp_path / "bob.npz")


@pytest.mark.parametrize("ending", [".npz", ".parquet"])
def test_a_flipped_bit_changes_nothing_that_is_read(tmp_path: Path, ending: str) -> None:
    """Neither the detections nor the settings, which no page of a Parquet file has."""
    if ending == ".parquet":
        pytest.importorskip("pyarrow")
    alice, _, chosen = recorded(rows=2000)
    path = tmp_path / f"alice{ending}"
    write_measured(path, alice, chosen)
    _, right = read_measured(path)
    whole = path.read_bytes()
    bits = random.Random(11).sample(range(8 * len(whole)), 1000)
    if ending == ".parquet":  # numbers of the settings, which pyarrow reads from Base64
        start = re.search(rb"ARROW:schema[^/]*", whole).end()
        rate = base64.b64decode(whole[start : start + 4000]).index(b"repetition_rate_hz")
        bits += range(8 * (start + rate * 4 // 3), 8 * (start + (rate + 32) * 4 // 3))
    for bit in bits:
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            found, settings = read_measured(path)
        except ConfigError:
            continue
        assert settings.parameters == right.parameters
        for name in ("basis", "bit", "intensity"):
            assert np.array_equal(getattr(found, name), getattr(alice, name))


def test_settings_that_were_changed_need_no_digest(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    _, bob, chosen = recorded(rows=2000)
    path = tmp_path / "bob.parquet"
    write_measured(path, bob, chosen)
    table = parquet.read_table(path)
    text = table.schema.metadata[b"hybridkex"].replace(b'"misalignment"', b'"misalignment" ')
    changed = {**table.schema.metadata, b"hybridkex": text}
    parquet.write_table(table.replace_schema_metadata(changed), path)
    with pytest.raises(ConfigError, match="leave out the value 'hybridkex_sha256'"):
        read_measured(path)
    del changed[b"hybridkex_sha256"]
    parquet.write_table(table.replace_schema_metadata(changed), path)
    assert read_measured(path)[1].channel == chosen.channel


def test_a_file_that_polars_has_written(tmp_path: Path) -> None:
    """It has the settings in its footer, and not in the schema that Arrow keeps there."""
    polars = pytest.importorskip("polars", reason="pip install polars")
    parquet = pytest.importorskip("pyarrow.parquet")
    _, bob, chosen = recorded(rows=2000)
    ours, theirs = tmp_path / "bob.parquet", tmp_path / "polars.parquet"
    write_measured(ours, bob, chosen)
    settings = parquet.read_schema(ours).metadata[b"hybridkex"].decode()
    polars.read_parquet(ours).write_parquet(theirs, metadata={"hybridkex": settings})
    found, preset = read_measured(theirs)
    assert preset.channel == chosen.channel
    assert np.array_equal(found.bit, bob.bit)


def test_an_announced_size_is_not_believed(tmp_path: Path) -> None:
    for shape in ((10**13,), (10**19, 10**19), (1 << 28,)):
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            header, {"descr": "|u1", "fortran_order": False, "shape": shape}
        )
        with zipfile.ZipFile(tmp_path / "bob.npz", "w") as archive:
            archive.writestr("bit.npy", header.getvalue())
        with pytest.raises(ConfigError, match=r"bit (has the shape|is cut off)"):
            read_measured(tmp_path / "bob.npz")


@pytest.mark.parametrize("version", [1, 2, 3])
def test_a_header_without_end_is_not_read(tmp_path: Path, version: int) -> None:
    """A few MB of an archive are some GB of blanks, which numpy reads before it objects."""
    size = 1 << (16 if version == 1 else 26)
    start = b"\x93NUMPY" + bytes([version, 0])
    start += (size - 1).to_bytes(2 if version == 1 else 4, "little")
    with zipfile.ZipFile(tmp_path / "bob.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bit.npy", start + b" " * size)
    tracemalloc.start()
    try:
        with pytest.raises(ConfigError, match="bit has a header that is too long"):
            read_measured(tmp_path / "bob.npz")
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def _varint(number: int, length: int) -> bytes:
    """Thrift's, of this length."""
    number *= 2
    return bytes(
        (number >> 7 * one) & 127 | (128 if one < length - 1 else 0) for one in range(length)
    )


@contextmanager
def arrow_pool() -> Iterator[Any]:
    """A pool whose peak is that of the calls within; that of the usual pool is its whole life's."""
    arrow = pytest.importorskip("pyarrow")
    usual = arrow.default_memory_pool()
    pool = arrow.proxy_memory_pool(usual)
    arrow.set_memory_pool(pool)
    try:
        yield pool
    finally:
        arrow.set_memory_pool(usual)


def test_the_rows_of_a_parquet_file_are_not_those_that_it_announces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = 1 << 21
    monkeypatch.setattr("hybridkex.link.measured.MOST_DETECTIONS", rows - 1)
    path = tmp_path / "bob.parquet"
    columns = dict.fromkeys(("basis", "bit"), np.zeros(rows, dtype=np.uint8))
    parquet.write_table(arrow.table(columns), path, row_group_size=rows)
    whole = path.read_bytes()
    footer = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    told = _varint(rows, 4)
    path.write_bytes(whole[:footer] + whole[footer:].replace(told, _varint(1000, 4), 1))
    with parquet.ParquetFile(path) as file:
        assert file.metadata.num_rows == 1000
    with (
        arrow_pool() as pool,
        pytest.raises(ConfigError, match=f"{rows:,} detections, and at most"),
    ):
        read_measured(path)
    assert pool.max_memory() == 0


@pytest.mark.parametrize("name", ["a.npz", "a.parquet", "a.csv", "a"])
@pytest.mark.parametrize("kind", ["missing", "folder", "pipe"])
def test_a_file_that_cannot_be_read_is_named_once(tmp_path: Path, name: str, kind: str) -> None:
    path = tmp_path / name
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    with pytest.raises(ConfigError) as caught:
        read_measured(path)
    assert str(caught.value).count(str(path)) == 1


def test_a_file_with_more_rows_than_a_block_may_have_is_not_read(tmp_path: Path) -> None:
    """Constant columns take next to nothing in a file."""
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    piece = arrow.table(dict.fromkeys(("basis", "bit"), np.zeros(1 << 20, dtype=np.uint8)))
    path = tmp_path / "bob.parquet"
    with parquet.ParquetWriter(path, piece.schema) as writer:
        for _ in range((MOST_DETECTIONS >> 20) + 1):
            writer.write_table(piece)
    with (
        arrow_pool() as pool,
        pytest.raises(ConfigError, match=f"at most {MOST_DETECTIONS:,} are taken"),
    ):
        read_measured(path)
    assert pool.max_memory() == 0
    assert main(["qkd", "record", "--detections", str(MOST_DETECTIONS + 1), "-o", "x"]) == 1


def test_the_largest_file_makes_a_block_that_is_allowed() -> None:
    chosen = PRESETS["rusca2018"]
    LinkSettings(preset=chosen, block_bits=MOST_DETECTIONS, block_detections=MOST_DETECTIONS)
    more = MOST_DETECTIONS + 1
    with pytest.raises(ConfigError, match="GiB"):
        LinkSettings(preset=chosen, block_bits=more, block_detections=more)


def test_a_flipped_bit_in_a_page_of_a_parquet_file_is_noticed(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    path = tmp_path / "bob.parquet"
    _, bob, chosen = recorded(rows=5000)
    write_measured(path, bob, chosen)
    whole = path.read_bytes()
    draw = np.random.default_rng(5)
    for place in draw.integers(4, len(whole) // 2, 100):  # the pages are in front
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(draw.integers(8))
        path.write_bytes(damaged)
        try:
            found, _ = read_measured(path)
        except ConfigError:
            continue
        for name in ("basis", "bit", "pulse"):  # what changed is not part of the detections
            assert np.array_equal(getattr(found, name), getattr(bob, name))


def test_parquet_columns_of_other_types_are_refused(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    _, bob, chosen = recorded(rows=5000)
    write_measured(tmp_path / "bob.parquet", bob, chosen)
    good = parquet.read_table(tmp_path / "bob.parquet")
    path = tmp_path / "odd.parquet"
    for kind in (arrow.float64(), arrow.string(), arrow.decimal128(5)):
        place = good.column_names.index("bit")
        parquet.write_table(good.set_column(place, "bit", good["bit"].cast(kind)), path)
        with pytest.raises(ConfigError, match=r"bit has values of the type .*, not integers"):
            read_measured(path)
    nulls = arrow.array([None, *bob.bit[1:].tolist()], type=arrow.uint8())
    parquet.write_table(good.set_column(good.column_names.index("bit"), "bit", nulls), path)
    with pytest.raises(ConfigError, match="rows without a value"):
        read_measured(path)
    parquet.write_table(good.append_column("__index_level_0__", good["bit"]), path)
    with pytest.raises(ConfigError, match=r"unknown array '__index_level_0__'; .*index=False"):
        read_measured(path)
    parquet.write_table(good.append_column("bit", good["bit"]), path)
    with pytest.raises(ConfigError, match="two arrays 'bit'"):
        read_measured(path)


def test_files_of_two_links_and_blocks_without_a_key_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "bob.npz", **_archive(settings=_settings(security__secrecy=0.5)))  # type: ignore[arg-type]
    alice = "examples/qkd-data/alice.npz"
    assert main(["qkd", "distil", alice, str(tmp_path / "bob.npz")]) == 1
    assert "the settings in the two files differ" in capsys.readouterr().err
    bob = "examples/qkd-data/bob.npz"
    assert main(["qkd", "distil", alice, bob, "--key-bits", "80000"]) == 1


def test_a_block_without_a_key_leaves_no_file_and_another_run_may_have_its_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = [shutil.copy(f"examples/qkd-data/{name}.npz", tmp_path) for name in ("alice", "bob")]
    keys = tmp_path / "keys"
    command = ["qkd", "distil", *data, "--keys", str(keys), "--key-bits"]
    for bits, status in (("8000", 1), ("8000", 1), ("256", 0)):
        assert main([*command, bits]) == status
        told = json.loads(capsys.readouterr().out)
        assert keys.exists() == bool(told["keys"]) == (not status)
        assert ("aborted" in told) == bool(status)
        assert told["repetition_rate_hz"] == 1e9


@pytest.mark.parametrize("laser", [(), ("intensities",), ("intensities", "probabilities")])
@pytest.mark.parametrize("pairs", [(), ("brightness",), ("brightness", "alice_efficiency")])
def test_a_source_of_two_kinds_or_of_none_is_told_apart(
    laser: tuple[str, ...], pairs: tuple[str, ...], tmp_path: Path
) -> None:
    settings = json.loads(SETTINGS)
    settings["source"] = {**dict.fromkeys(pairs, 0.1), "key_basis_probability": 0.9} | {
        name: settings["source"][name] for name in laser
    }
    np.savez(tmp_path / "x.npz", **GOOD, settings=json.dumps(settings))
    if laser and pairs:
        words = rf"laser pulses \({', '.join(laser)}\) and of pairs \({', '.join(sorted(pairs))}\)"
    elif len(laser + pairs) == 2:
        read_measured(tmp_path / "x.npz")
        return
    else:
        words = "the settings lack in 'source': "
    with pytest.raises(ConfigError, match=words):
        read_measured(tmp_path / "x.npz")
