"""Files that a configuration names, whatever has become of them."""

import os
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hybridkex.auth import Identity, KnownPeers, RawIdentity, TrustStore
from hybridkex.errors import ConfigError
from hybridkex.files import LIMIT, create_file, read_file, read_toml, write_file
from hybridkex.kme.config import load_config
from hybridkex.qkd.etsi014.mutual_tls import client_tls
from hybridkex.qkd.store import read_key_file

NOT_FILES = ("missing", "folder", "silent pipe", "/dev/zero", "a\0b", "a/b" * 3000, "loop", "huge")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "silent pipe")
    (tmp_path / "loop").symlink_to("loop")
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(LIMIT + 1)
    return tmp_path


READERS = (
    read_file,
    read_toml,
    TrustStore.from_file,
    lambda path: Identity.from_files(path, path),
    RawIdentity.from_file,
    KnownPeers,
    read_key_file,
    load_config,
    lambda path: client_tls("stdlib", ca=path, certificate=path, key=path),
    lambda path: client_tls("hybridkex", ca=path, certificate=path, key=path),
)


@pytest.mark.parametrize("name", NOT_FILES, ids=lambda name: repr(name)[:20])
@pytest.mark.parametrize("reader", READERS)
def test_what_is_not_a_file_is_named(place: Path, reader: object, name: str) -> None:
    """In every place that reads one: an error of ours that names it, at once."""
    assert callable(reader)
    began = time.monotonic()
    empty = name == "silent pipe" and reader in (read_file, read_toml, KnownPeers)
    if empty or (reader is KnownPeers and name == "missing"):
        reader(place / name)
    else:
        with pytest.raises(ConfigError) as raised:
            reader(place / name)
        assert "\0" not in str(raised.value)
        assert repr(name)[1:8].strip("'") in str(raised.value)
    assert time.monotonic() - began < 3


def test_a_pipe_is_read_to_its_end() -> None:
    """As a shell makes one of ``<(command)``."""
    reading, writing = os.pipe()

    def write() -> None:
        with os.fdopen(writing, "wb") as pipe:
            for piece in (b"one ", b"two ", b"three" * 20_000):
                pipe.write(piece)
                pipe.flush()
                time.sleep(0.05)

    writer = threading.Thread(target=write)
    writer.start()
    assert read_file(f"/dev/fd/{reading}") == b"one two " + b"three" * 20_000
    writer.join()
    os.close(reading)


def test_toml_that_is_none(tmp_path: Path) -> None:
    numbers = random.Random(15)
    file = tmp_path / "x.toml"
    broken = [
        b"x = [" * 5000,
        b"x = " + b"9" * 5000,
        b"\xff\xfe",
        b"[a]\n[a]\n",
        *(numbers.randbytes(numbers.randrange(1, 200)) for _ in range(200)),
    ]
    for content in broken:
        file.write_bytes(content)
        with pytest.raises(ConfigError, match=r"x\.toml"):
            read_toml(file)


@pytest.mark.parametrize("write", [write_file, create_file])
def test_an_error_of_writing_names_one_file(tmp_path: Path, write: Callable[..., None]) -> None:
    path = tmp_path / "missing" / "file"
    with pytest.raises(FileNotFoundError) as caught:
        write(path, b"content")
    assert str(caught.value) == f"[Errno 2] No such file or directory: '{path}'"
