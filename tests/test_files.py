"""Files that a configuration names, whatever has become of them."""

import ast
import contextlib
import os
import random
import socket
import sqlite3
import stat
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from examples.chat.store import Store as ChatStore
from hybridkex import files
from hybridkex.auth import Identity, KnownPeers, RawIdentity, TrustStore
from hybridkex.cli import main
from hybridkex.cli.actions.kme import _read_ids
from hybridkex.cli.actions.tunnel import load_file
from hybridkex.errors import ConfigError
from hybridkex.files import (
    LIMIT,
    PRIVATE,
    change_mode,
    create_file,
    make_private,
    open_private,
    read_file,
    read_toml,
    reserve_file,
    write_file,
    write_files,
)
from hybridkex.kme.config import load_config
from hybridkex.link.measured import read_measured
from hybridkex.link.scan import read_scan
from hybridkex.qkd.etsi014.mutual_tls import client_tls
from hybridkex.qkd.pool import FilePool, PoolNames
from hybridkex.qkd.sqlite_file import open_locked
from hybridkex.qkd.sqlite_store import SqliteKeyStore
from hybridkex.qkd.store import read_key_file, write_key_file
from hybridkex.secret import Secret
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


def test_integers_of_toml(tmp_path: Path) -> None:
    """They have 64 bits (TOML 1.0, section Integer)."""
    file = tmp_path / "x.toml"
    for number in (0, -1, (1 << 63) - 1, -(1 << 63), True):
        file.write_text(f"x = {number}".lower())
        assert read_toml(file) == {"x": number}
    for number in (1 << 63, -(1 << 63) - 1, 10**400, -(10**400)):
        for text, name in (
            (f"grace = {number}", "grace"),
            (f"[[kme]]\npeer = [1, {{ x = {number} }}]", r"kme\[0\].peer\[1\].x"),
        ):
            file.write_text(text)
            for read in (read_toml, load_config, load_file):
                with pytest.raises(ConfigError, match=f"{name}' is an integer of more"):
                    read(file)


WIDE = [f"utf-{bits}{order}" for bits in (16, 32) for order in ("", "-le", "-be")]


def test_texts_as_other_systems_save_them(tmp_path: Path) -> None:
    file = tmp_path / "x.toml"
    for encoding in ("utf-8", "utf-8-sig"):
        file.write_text('name = "Zürich"\r\n', encoding=encoding, newline="")
        assert read_toml(file) == {"name": "Zürich"}
    for encoding, words in (
        *((name, "text in UTF-16 or UTF-32, or damaged; save it as UTF-8") for name in WIDE),
        ("latin-1", "not text in UTF-8; save it as UTF-8"),
    ):
        file.write_text('name = "Zürich"\n', encoding=encoding)
        for read in (read_toml, KnownPeers, FileTicketStore, _read_ids):
            with pytest.raises(ConfigError, match=words):
                read(file)
        for ending in (".csv", ".json"):
            scan = file.with_suffix(ending)
            scan.write_bytes(file.read_bytes())
            with pytest.raises(ConfigError, match=words):
                read_scan(scan)


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


# --- what another user has put there --------------------------------------------------------------

OTHER = 65534
SHARED = (0o777, 0o1777, 0o2770, 0o755)
"""Permissions of the folder; with the last, it belongs to the other user."""
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs files of another user")


@pytest.fixture(params=SHARED, ids=oct)
def shared(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    folder = tmp_path / "shared"
    folder.mkdir()
    folder.chmod(request.param)
    os.chown(folder, OTHER if request.param == 0o755 else 0, OTHER)
    return folder


def reserved(path: Path, content: bytes) -> None:
    with reserve_file(path, len(content)) as write:
        write(content)


@pytest.mark.parametrize("kind", ["folder", "socket"])
def test_what_cannot_be_written_to_is_told_when_room_is_reserved(tmp_path: Path, kind: str) -> None:
    """Afterwards the content may be lost: keys, hours of work."""
    path = tmp_path / "x"
    with contextlib.ExitStack() as stack:
        if kind == "folder":
            path.mkdir()
        else:
            stack.enter_context(socket.socket(socket.AF_UNIX)).bind(str(path))
        with pytest.raises(OSError, match=r"directory|device") as caught, reserve_file(path, 1):
            pytest.fail("room is reserved")
    assert caught.value.filename == str(path)


def opened(path: Path, content: bytes) -> None:
    with open_private(path) as file:
        file.write(content)


def appended(path: Path, content: bytes) -> None:
    with open_private(path, append=True) as file:
        file.write(content)


def database(path: Path, content: bytes) -> None:
    db = open_locked(path)
    try:
        db.execute("CREATE TABLE one (value)")
        db.execute("INSERT INTO one VALUES (?)", (content,))
    finally:
        db.close()


WRITERS = (
    write_file,
    reserved,
    lambda path, content: write_files({path: (content, PRIVATE)}),
    create_file,
    opened,
    appended,
    lambda path, content: make_private(path),
    database,
)
SECRET = b"a secret"


def plant(kind: str, path: Path, victim: Path) -> int | None:
    """Put something of the other user there; returns where he would read what is written."""
    theirs = path.with_name("theirs")
    match kind:
        case "file":
            path.touch()
            path.chmod(0o666)
        case "pipe" | "link to a pipe":
            pipe = path if kind == "pipe" else theirs
            os.mkfifo(pipe)
            os.chown(pipe, OTHER, OTHER)
            if pipe is theirs:
                path.symlink_to(theirs)
        case "link to our file":
            path.symlink_to(victim)
        case "link to nothing":
            path.symlink_to(victim.with_name("new"))
        case "link to a link":
            theirs.symlink_to(victim)
            os.lchown(theirs, OTHER, OTHER)
            path.symlink_to(theirs)
        case "link to their file":
            theirs.touch()
            theirs.chmod(0o666)
            os.chown(theirs, OTHER, OTHER)
            path.symlink_to(theirs)
        case "second name of our file":
            path.hardlink_to(victim)
            return None
    os.lchown(path, OTHER, OTHER)
    return os.open(path, os.O_RDONLY | os.O_NONBLOCK) if path.exists() else None


@as_root
@pytest.mark.parametrize(
    "kind",
    ["file", "pipe", "link to a pipe", "link to our file", "link to nothing", "link to a link",
     "link to their file", "second name of our file"],
)  # fmt: skip
@pytest.mark.parametrize("write", WRITERS)
def test_nothing_is_written_to_what_another_user_has_put_there(
    shared: Path, kind: str, write: Callable[[Path, bytes], object]
) -> None:
    """It is refused, or replaced by a file of ours."""
    victim = shared.parent / "victim"
    victim.write_bytes(b"as it was")
    victim.chmod(0o640)
    path = shared / "file"
    reader = plant(kind, path, victim)
    try:
        write(path, SECRET)
    except (PermissionError, FileExistsError, ConfigError):
        pass
    else:
        status = path.lstat()
        assert stat.S_ISREG(status.st_mode)
        assert status.st_uid == 0
        assert stat.S_IMODE(status.st_mode) == PRIVATE
    if reader is not None:
        with contextlib.suppress(BlockingIOError):
            assert SECRET not in os.read(reader, 1 << 16)
        os.close(reader)
    assert victim.read_bytes() == b"as it was"
    assert stat.S_IMODE(victim.stat().st_mode) == 0o640
    assert not victim.with_name("new").exists()


@as_root
@pytest.mark.parametrize("suffix", ["-wal", "-journal", "-shm"])
def test_a_log_that_another_user_has_put_beside_a_database(shared: Path, suffix: str) -> None:
    """SQLite would take what it says for the content of the database."""
    path = shared / "keys.db"
    database(path, SECRET)
    planted = Path(f"{path}{suffix}")
    planted.touch()
    os.chown(planted, OTHER, OTHER)
    with pytest.raises(ConfigError, match="belongs to another user"):
        open_locked(path)


@as_root
@pytest.mark.parametrize("new", [True, False])
@pytest.mark.parametrize("make", [lambda path: SqliteKeyStore(path, Secret(bytes(32))), ChatStore])
def test_a_log_that_another_user_puts_there_meanwhile(
    shared: Path, make: Callable[[Path], Any], new: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two statements of ours; SQLite would make it with the first change."""
    path, log = shared / "keys.db", shared / "keys.db-wal"
    planted: list[int] = []
    if not new:
        make(path).close()
        log.unlink(missing_ok=True)

    class Connection(sqlite3.Connection):
        def execute(self, *arguments: Any) -> sqlite3.Cursor:
            with contextlib.suppress(FileExistsError):
                os.close(os.open(log, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666))
                os.chown(log, OTHER, OTHER)
                planted.append(log.stat().st_ino)
            return super().execute(*arguments)

    monkeypatch.setattr(sqlite3, "connect", partial(sqlite3.connect, factory=Connection))
    if new:
        with pytest.raises(ConfigError, match="belongs to another user"):
            make(path)
    else:
        make(path).close()
        assert not planted, "it may be open in another process"


KEPT = (KnownPeers, FileTicketStore, read_key_file)


@as_root
@pytest.mark.parametrize("kind", ["file", "our link to it", "link to our file"])
@pytest.mark.parametrize("reader", KEPT)
@pytest.mark.parametrize("shared", SHARED[:3], ids=oct, indirect=True)
def test_no_trust_is_read_from_what_another_user_has_put_there(
    shared: Path, reader: Callable[[Path], object], kind: str
) -> None:
    """Also where a link of ours, in a folder of ours, leads to it."""
    path, ours = shared / "file", shared.parent / "ours"
    theirs = ours if kind == "link to our file" else path
    theirs.write_bytes(b"00" * 32 if reader is read_key_file else b"{}")
    theirs.chmod(0o600)
    if kind == "link to our file":
        path.symlink_to(ours)
    elif kind == "our link to it":
        ours.symlink_to(path)
    os.lchown(path, OTHER, OTHER)
    with pytest.raises(ConfigError, match="belongs to another user"):
        reader(ours if kind == "our link to it" else path)


@pytest.mark.parametrize("name", ["/proc/kmsg", "/proc/cpuinfo", "/dev/null", "empty", "text"])
def test_what_is_no_key_pool_stays_as_it_is(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first one has no end, and nothing to read most of the time."""
    monkeypatch.setattr(files, "PATIENCE", 0.1)
    path = tmp_path / name
    if name == "empty":
        path.touch(mode=0o644)
    if name == "text":
        path.write_text("a file of another program\n" * 100)
        path.chmod(0o644)
        tmp_path.chmod(0o777)
    key_file = tmp_path / "key"
    write_key_file(key_file)
    there = sorted(tmp_path.iterdir())
    for names in (None, PoolNames(sae="a", kme="A", peer_sae="b", peer_kme="B")):
        if names is not None and name == "empty":
            break  # a process that was killed may have left it
        before = path.lstat()
        with pytest.raises(ConfigError, match=path.name):
            FilePool.open(path, key_file=key_file, names=names)
        assert (path.lstat().st_size, path.lstat().st_mode) == (before.st_size, before.st_mode)
        assert sorted(tmp_path.iterdir()) == there


@pytest.mark.parametrize("write", [opened, appended, write_file])
def test_links_of_our_own_and_devices_are_used(
    tmp_path: Path, write: Callable[[Path, bytes], object]
) -> None:
    """In a folder that others may change, too, and where the link has no target of a name."""
    tmp_path.chmod(0o777)
    link = tmp_path / "link"
    link.symlink_to("/dev/null")
    write(link, b"content")
    assert link.is_symlink()
    with tempfile.TemporaryFile(dir=tmp_path) as file:
        (tmp_path / "proc").symlink_to(f"/proc/self/fd/{file.fileno()}")
        if write is not write_file:
            write(tmp_path / "proc", b"content")
            assert file.read() == b"content"
    reading, writing = os.pipe()
    write(Path(f"/dev/fd/{writing}"), b"content")
    assert os.read(reading, 100) == b"content"
    os.close(reading)
    os.close(writing)


def test_a_pipe_whose_reader_comes_later(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    content = bytes(range(256)) * 1000
    found: list[bytes] = []

    def read() -> None:
        time.sleep(0.1)
        found.append(pipe.read_bytes())

    reader = threading.Thread(target=read)
    reader.start()
    write_file(pipe, content)
    reader.join()
    assert found == [content]


def test_a_pipe_without_a_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "PATIENCE", 0.1)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(OSError, match="No such device") as caught:
        write_file(pipe, b"content")
    assert caught.value.filename == str(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    with pytest.raises(OSError, match=r"took no data for 0\.1 s"):
        write_file(pipe, bytes(1 << 20))
    os.close(reader)


def test_permissions_of_what_is_no_longer_there(tmp_path: Path) -> None:
    other, name = tmp_path / "other", tmp_path / "name"
    for one in (other, name):
        one.touch(0o600)
    status = name.stat()
    inode = status.st_dev, status.st_ino
    change_mode(name, 0o640, inode=inode)
    assert stat.S_IMODE(name.stat().st_mode) == 0o640
    name.rename(tmp_path / "moved")
    for put in (name.symlink_to, name.hardlink_to):
        put(other)
        with pytest.raises(OSError, match="another file was put there"):
            change_mode(name, 0o666, inode=inode)
        name.unlink()
    assert stat.S_IMODE(other.stat().st_mode) == 0o600


@as_root
def test_a_command_names_the_file_of_another_user(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tmp_path.chmod(0o777)
    key = tmp_path / "key.pem"
    os.mkfifo(key)
    os.chown(key, OTHER, OTHER)
    authority = tmp_path / "ca.pem"
    authority.write_bytes(b"as it was")
    assert main(["dev-ca", "--force", str(tmp_path)]) == 1
    assert authority.read_bytes() == b"as it was"
    said = capsys.readouterr().err
    assert said.startswith(f"hybridkex: cannot write {key}: it belongs to another user")
    assert set(tmp_path.iterdir()) == {authority, key}
