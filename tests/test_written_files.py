"""Files are written whole, and private whatever the umask; and in one place alone."""

import ast
import errno
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest

from examples.chat.store import Change, Slot, Store
from hybridkex import files
from hybridkex.auth import KnownPeers, RawIdentity
from hybridkex.cli import main
from hybridkex.files import (
    PUBLIC,
    create_file,
    make_private,
    make_private_folder,
    open_private,
    reserve_file,
    write_file,
)
from hybridkex.qkd.store import write_key_file
from hybridkex.shell.ticket_file import FileTicketStore

ROOT = Path(__file__).parents[1]


@pytest.fixture(params=[0, 0o022, 0o077, 0o777], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# --- the functions --------------------------------------------------------------------------------


def test_modes_do_not_depend_on_the_umask(umask: int, tmp_path: Path) -> None:
    make_private_folder(folder := tmp_path / "folder")
    write_file(folder / "written", b"x")
    write_file(folder / "public", b"x", mode=PUBLIC)
    create_file(folder / "created", b"x")
    make_private(folder / "made")
    with open_private(folder / "opened") as file:
        file.write(b"x")
    found = {path.name: mode(path) for path in folder.iterdir()}
    private = dict.fromkeys(("written", "created", "made", "opened"), 0o600)
    assert found == {**private, "public": 0o644}
    assert mode(folder) == 0o700


def test_files_that_others_could_read_become_private(tmp_path: Path) -> None:
    for function in (make_private, lambda path: open_private(path, append=True).close()):
        path = tmp_path / "file"
        path.write_bytes(b"before")
        path.chmod(0o666)
        function(path)
        assert (mode(path), path.read_bytes()) == (0o600, b"before")
    write_file(path, b"after")
    assert (mode(path), path.read_bytes()) == (0o600, b"after")


def test_links_and_what_is_there_already(tmp_path: Path) -> None:
    """A link that somebody planted is replaced, or refused; its target is not touched."""
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_bytes(b"target")
    link.symlink_to(target)
    with pytest.raises(FileExistsError):
        create_file(link, b"x")
    with pytest.raises(FileExistsError):
        make_private_folder(tmp_path)
    write_file(link, b"x")
    assert not link.is_symlink()
    assert target.read_bytes() == b"target"


def test_a_failure_leaves_the_old_file_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    write_file(path, b"before")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_file(path, b"after")
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("before", [None, b"before"])
@pytest.mark.parametrize(
    "call",
    [
        "write_file(path, b'after')",
        "create_file(path, b'after')",
        "with reserve_file(path, 100) as write: write(b'after')",
        "with reserve_file(path, 100) as write: os.kill(os.getpid(), 9)",
    ],
)
def test_a_process_that_is_killed_leaves_nothing(
    call: str, before: bytes | None, tmp_path: Path
) -> None:
    """Neither half of a key under the name of the file, nor a key under another name."""
    if before is not None:
        (tmp_path / "key").write_bytes(before)
    script = (
        "import os; from pathlib import Path; from hybridkex.files import *\n"
        "os.fsync = lambda _: os.kill(os.getpid(), 9)\n"
        f"path = Path('key')\n{call}"
    )
    ended = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=False)
    assert ended.returncode == -9
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == (
        {} if before is None else {"key": before}
    )


@pytest.mark.parametrize("links", [True, False])
def test_a_file_system_without_nameless_files(
    links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor, perhaps, hard links: as FAT."""

    def refused(*_: object, **__: object) -> NoReturn:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(files, "_DESCRIPTORS", "/nonexistent")
    if not links:
        monkeypatch.setattr(os, "link", refused)
    path, other = tmp_path / "written", tmp_path / "created"
    for content in (b"before", b"after"):
        write_file(path, content)
    create_file(other, b"first")
    with pytest.raises(FileExistsError):
        create_file(other, b"second")
    with reserve_file(path, 100) as write:
        write(b"reserved")
    found = {path.name: (path.read_bytes(), mode(path)) for path in tmp_path.iterdir()}
    assert found == {"written": (b"reserved", 0o600), "created": (b"first", 0o600)}


def test_devices(tmp_path: Path) -> None:
    write_file("/dev/null", b"x")
    with open_private("/dev/null") as file:
        file.write(b"x")
    assert Path("/dev/null").is_char_device()


# --- what the commands write ----------------------------------------------------------------------

PUBLIC_NAMES = {"ca.pem", "cert.pem", "kme.toml", "port"}


def test_whatever_is_written_is_private(umask: int, tmp_path: Path) -> None:
    """Under each umask: every file but certificates and configurations has mode 600."""
    if umask == 0o777:
        pytest.skip("no folder that could be used")
    assert main(["dev-ca", str(tmp_path / "ca")]) == 0
    assert main(["kme", "dev-up", str(tmp_path / "kmes"), "--no-serve"]) == 0
    write_key_file(tmp_path / "pool.key")
    KnownPeers(tmp_path / "known").add("a.example", RawIdentity.generate().chain[0])
    store = Store(tmp_path / "chat")
    store.apply([Change("enter", Slot("ann", bytes(32), "", 0, "lobby"))])
    try:
        names = [path for path in tmp_path.rglob("*") if path.is_file()]
        found = {path.name: mode(path) for path in names if path.name not in PUBLIC_NAMES}
    finally:
        store.close()
    assert {"key.pem", "store.key", "pool.key", "known", "chat", "chat.key"} <= found.keys()
    assert set(found.values()) == {0o600}, found


def test_a_key_log_and_a_ticket_store(umask: int, tmp_path: Path) -> None:
    if umask == 0o777:
        pytest.skip("no folder that could be used")
    log, sessions = tmp_path / "keys", tmp_path / "sessions"
    log.touch(mode=0o644)
    command = [sys.executable, "-m", "hybridkex", "connect", "127.0.0.1", "1", "--insecure"]
    command += ["--keylog", str(log), "--resume", str(sessions)]
    subprocess.run(command, capture_output=True, timeout=60, check=False, stdin=subprocess.DEVNULL)
    assert mode(log) == 0o600
    store = FileTicketStore(sessions)
    store.take("nobody")
    store.flush()
    assert mode(sessions) == 0o600


# --- nobody writes files otherwise ----------------------------------------------------------------

# File and function: why.
ELSEWHERE = {
    ("hybridkex/files.py", "*"): "here it is",
    ("hybridkex/apps/transfer/part.py", "*"): "a received file has the mode that its sender says",
    ("hybridkex/apps/transfer/arrivals.py", "*"): "a received file has the mode of its source",
    ("hybridkex/apps/tunnel/sockets.py", "*"): "the mode of a Unix socket is the user's choice",
}
WRITERS = {"write_text", "write_bytes", "touch", "mkstemp", "NamedTemporaryFile", "copyfile"}
CREATING = {"O_CREAT", "O_TMPFILE"}


def writes(node: ast.AST) -> bool:
    """Whether a call creates or writes a file by other means."""
    if isinstance(node, ast.Attribute) and node.attr in CREATING:
        return True
    if not isinstance(node, ast.Call):
        return False
    name = getattr(node.func, "attr", getattr(node.func, "id", ""))
    if name in WRITERS:
        # Eve's photons have a touch of their own.
        return not (name == "touch" and len(node.args) > 1)
    if name != "open" or (node.args and isinstance(getattr(node.args[0], "value", None), int)):
        return False  # a descriptor is open already
    own = isinstance(node.func, ast.Attribute) and not (
        isinstance(node.func.value, ast.Name) and node.func.value.id in ("io", "builtins")
    )
    values = [*node.args[0 if own else 1 :], *(key.value for key in node.keywords)]
    modes = [one.value for one in values if isinstance(one, ast.Constant)]
    return any(isinstance(one, str) and set(one) <= set("rwaxbt+U") and set(one) & set("wax+")
               for one in modes)  # fmt: skip


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("open(path, 'w')", True),
        ("open(path, mode='ab')", True),
        ("path.open('x')", True),
        ("path.open()", False),
        ("open(path, 'rb')", False),
        ("path.write_text('x')", True),
        ("os.open(path, os.O_WRONLY | os.O_CREAT)", True),
        ("os.open(path, os.O_RDONLY)", False),
        ("pool = FilePool.open(path, key_file=key)", False),
        ("open(1, 'w', closefd=False)", False),
        ("path.touch()", True),
        ("tempfile.mkstemp()", True),
    ],
)
def test_the_reader_of_sources_sees_what_writes(source: str, found: bool) -> None:
    assert any(map(writes, ast.walk(ast.parse(source)))) == found


def test_all_files_are_written_in_one_place() -> None:
    seen = set()
    for folder in ("hybridkex", "examples"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = str(path.relative_to(ROOT))
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if writes(node) and (name, "*") not in ELSEWHERE:
                    seen.add(f"{name}:{getattr(node, 'lineno', 0)}")
    assert seen == set()


# --- files that belong together -------------------------------------------------------------------


@pytest.mark.parametrize(
    "words", [["dev-ca", "new/ca"], ["kme", "dev-up", "new/kmes", "--no-serve"]]
)
def test_a_command_whose_files_have_no_room_can_be_repeated(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever of its files is the first one without room: none is left, nor a folder."""
    monkeypatch.chdir(tmp_path)
    allocate, files_until_full = os.posix_fallocate, 0
    fits = iter(range(0))

    def full(*arguments: int) -> None:
        if next(fits, None) is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        allocate(*arguments)

    with monkeypatch.context() as now:
        now.setattr(os, "posix_fallocate", full)
        for files_until_full in range(40):
            fits = iter(range(files_until_full))
            if main(words) == 0:
                break
            assert list(tmp_path.rglob("*")) == []
    assert files_until_full == sum(path.is_file() for path in tmp_path.rglob("*")) >= 3


@pytest.mark.parametrize("fails", [0, 1, 2])
def test_files_that_are_replaced_together(
    fails: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``dev-ca --force``: a key without its certificate is of no use."""
    assert main(["dev-ca", str(tmp_path)]) == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    allocate, fits = os.posix_fallocate, iter(range(fails))

    def full(*arguments: int) -> None:
        if next(fits, None) is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        allocate(*arguments)

    with monkeypatch.context() as now:
        now.setattr(os, "posix_fallocate", full)
        assert main(["dev-ca", str(tmp_path), "--force"]) == 1
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert main(["dev-ca", str(tmp_path), "--force"]) == 0
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} != before
