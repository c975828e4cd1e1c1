"""Files that a configuration names, whatever has become of them."""

import ast
import os
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import BinaryIO

import pytest

from hybridkex.auth import Identity, KnownPeers, RawIdentity, TrustStore
from hybridkex.cli.actions.kme import _read_ids
from hybridkex.errors import ConfigError
from hybridkex.files import (
    LIMIT,
    create_file,
    make_private,
    open_private,
    read_file,
    read_toml,
    write_file,
)
from hybridkex.kme.config import load_config
from hybridkex.link.measured import read_measured
from hybridkex.link.scan import read_scan
from hybridkex.qkd.etsi014.mutual_tls import client_tls
from hybridkex.qkd.store import read_key_file
from hybridkex.shell.ticket_file import FileTicketStore

NOT_FILES = ("missing", "folder", "silent pipe", "/dev/zero", "a\0b", "a/b" * 3000, "loop", "huge")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "silent pipe")
    (tmp_path / "loop").symlink_to("loop")
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(LIMIT + 1)
    return tmp_path


def as_type(ending: str, read: Callable[[Path], object]) -> Callable[[Path], object]:
    """Read the place by a name with this ending, as programs that look at it need."""

    def reader(path: Path) -> object:
        if "\0" in str(path) or len(str(path)) > 4000:
            return read_file(path)
        with TemporaryDirectory(suffix=str(path).replace("/", ",")) as folder:
            link = Path(folder) / f"one{ending}"
            link.symlink_to(path)
            return read(link)

    return reader


READERS = (
    FileTicketStore,
    _read_ids,
    as_type(".csv", read_scan),
    as_type(".json", read_scan),
    as_type(".npz", read_measured),
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
    if empty or (reader in (KnownPeers, FileTicketStore) and name == "missing"):
        reader(place / name)
    else:
        with pytest.raises(ConfigError) as raised:
            reader(place / name)
        assert "\0" not in str(raised.value)
        assert repr(name)[1:8].strip("'") in str(raised.value).replace(",", "/")
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


# --- nobody reads files otherwise -----------------------------------------------------------------

PACKAGE = Path(__file__).parents[1] / "hybridkex"
OWN = {
    "files.py": "here it is",
    "demos": "files that the demonstration has made itself, or has looked at",
}


def reads(node: ast.AST) -> bool:
    """Whether a call reads a file by its name, other than with :func:`read_file`."""
    if not isinstance(node, ast.Call):
        return False
    name = getattr(node.func, "attr", getattr(node.func, "id", ""))
    if name in {"read_text", "read_bytes", "read_table", "ParquetFile", "ZipFile", "fromfile"}:
        return not (node.args and "content" in ast.unparse(node.args[0]).lower())
    if name != "open":
        return False
    if isinstance(node.func, ast.Name):
        return not (node.args and isinstance(node.args[0], ast.Constant))  # a descriptor
    return any(one.arg in ("newline", "encoding") for one in node.keywords) or [
        one.value for one in node.args if isinstance(one, ast.Constant)
    ] in (["r"], ["rb"])


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("path.read_text()", True),
        ("path.open('rb')", True),
        ("path.open(newline='')", True),
        ("open(path)", True),
        ("open(1, 'w')", False),
        ("zipfile.ZipFile(path)", True),
        ("zipfile.ZipFile(content)", False),
        ("tickets.open(identity)", False),
    ],
)
def test_the_reader_of_sources_sees_what_reads(source: str, found: bool) -> None:
    assert any(map(reads, ast.walk(ast.parse(source)))) == found


def test_all_files_are_read_in_one_place() -> None:
    """Where a pipe without a writer, an endless device and a huge file end with an error."""
    seen = []
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE)
        if name.parts[0] not in OWN:
            tree = ast.parse(path.read_text(encoding="utf-8"))
            seen += [f"{name}:{node.lineno}" for node in ast.walk(tree) if reads(node)]
    assert seen == []


@pytest.mark.skipif(os.geteuid() != 0, reason="a file of another user")
@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o770, 0o755])
@pytest.mark.parametrize("use", [open_private, make_private])
def test_a_file_that_another_user_has_made(
    tmp_path: Path, mode: int, use: Callable[[Path], BinaryIO | None]
) -> None:
    """Root must not write secrets into it where that user could have put it."""
    folder = tmp_path / "shared"
    folder.mkdir()
    planted = folder / "file"
    planted.touch(0o600)
    os.chown(planted, 65534, 65534)
    folder.chmod(mode)
    if mode == 0o755:
        if (opened := use(planted)) is not None:
            opened.close()
        return
    with pytest.raises(PermissionError, match="belongs to another user"):
        use(planted)
