"""Text from outside can steer no terminal and forge no line, wherever it becomes text."""

import ast
import contextlib
import io
import json
import logging
import re
import subprocess
import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import anyio
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

import hybridkex
from hybridkex import errors
from hybridkex.cli import main
from hybridkex.machine import broken
from hybridkex.text import (
    PRINTABLE,
    PrintableOutput,
    escaped,
    get_logger,
    json_line,
    printable,
    said,
    terminal,
)

MEMBERS = (
    *(chr(code) for code in range(0x20)),
    *(chr(code) for code in range(0x7F, 0xA1)),
    *"\u061c\u200b\u200c\u200d\u200e\u200f\u2028\u2029\u202a\u202b\u202c\u202d\u202e\u2060\u2061",
    *"\u2066\u2067\u2068\u2069\u3000\u3164\u115f\uffa0\u034f\ufe0f\ufeff\ufff9\ufffe\U000e0041",
    *"\U000e0100\ud800\udc80\udfff\ue000\U0010ffff",
)
"""One of each kind that must never be shown as it is."""
SHOWN = "Az09 ~äßж日本語😀«\"'\\%{}"


def is_safe(text: str, *, keep: str = "") -> bool:
    return all(char in keep or (char.isprintable() and char not in MEMBERS) for char in text)


@pytest.mark.parametrize("char", MEMBERS, ids=ascii)
def test_each_member_is_escaped(char: str) -> None:
    assert printable(f"a{char}b") == f"a{ascii(char)[1:-1]}b"
    assert escaped(f"a{char}b", keep=char) == f"a{char}b"


def test_what_can_be_shown_stays() -> None:
    assert printable(SHOWN) == SHOWN


@given(st.text(st.characters(exclude_categories=())))
def test_any_text(text: str) -> None:
    shown = printable(text)
    assert printable(shown) == shown
    for char in shown:
        assert unicodedata.category(char) not in {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
    assert is_safe(shown)
    shown.encode()


@pytest.mark.parametrize("quoted", ["x", "a b", "\0", "\u202e", "\U000e0041"], ids=ascii)
def test_a_message_that_quotes_a_long_text_keeps_both_ends(quoted: str) -> None:
    for length in (1, 100, 4000, 5000, 70_000):
        text = f"a.toml: [listen] name: {quoted * length} is too long; choose a shorter one"
        shown = printable(text)
        assert len(shown) <= 4096
        assert shown.startswith("a.toml: [listen] name: ")
        assert shown.endswith(" is too long; choose a shorter one")
        assert (" characters in all) ..." in shown) == (len(escaped(text)) > 4096)
        assert printable(shown) == shown == str(errors.ConfigError(text))
        assert len(printable(text, most=200)) <= 200


def test_what_is_left_out_of_a_long_text_is_not_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer may send millions of characters, and escaping each of them takes time."""
    text = "".join(map(chr, range(20_000)))
    sizes: list[int] = []

    def counting(part: str) -> str:
        sizes.append(len(part))
        return escaped(part)

    monkeypatch.setattr("hybridkex.text.escaped", counting)
    shown, whole = printable(text), escaped(text)
    assert sizes == [2 * 4096]
    before, after = re.split(r"\.\.\. \([\d,]+ characters in all\) \.\.\.", shown)
    assert len(shown) == 4096
    assert min(len(before), len(after)) > 1000
    assert whole.startswith(before)
    assert whole.endswith(after)


@pytest.mark.parametrize(
    "words",
    [
        ["LONG"],
        ["connect", "localhost", "LONG"],
        ["connect", "LONG", "1"],
        ["connect", "localhost", "1", "--ca", "LONG"],
        ["connect", "localhost", "1", "--groups", "LONG"],
        ["listen", "0", "--log-level", "LONG"],
        ["tunnel", "listen", "--local", "LONG", "--target", "h:1"],
        ["tunnel", "run", "LONG"],
        ["kme", "serve", "LONG", "--check"],
        ["dev-ca", "LONG"],
        ["qkd", "scan", "--vary", "distance_km=LONG", "-o", "x.csv"],
        ["demo", "LONG"],
        ["rndl", "--json", "LONG"],
    ],
    ids=" ".join,
)
def test_no_command_says_more_than_a_screen(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever says it: argparse, our errors, the operating system."""
    with contextlib.suppress(SystemExit):
        assert main([one.replace("LONG", "x" * 70_000) for one in words]) == 1
    said = capsys.readouterr().err
    assert 10 < len(said) < 4300
    assert said.startswith("hybridkex: ")
    assert said.count("\n") == 1


# --- errors ---------------------------------------------------------------------------------------


def all_errors(kind: type[BaseException] = errors.HybridkexError) -> Iterator[type[BaseException]]:
    yield kind
    for below in kind.__subclasses__():
        yield from all_errors(below)


@pytest.mark.parametrize("kind", [one for one in all_errors() if one is not errors.AlertReceived])
def test_every_error_of_ours(kind: type[BaseException]) -> None:
    """However its message was made: an f-string has no memory of what was quoted."""
    evil = "".join(MEMBERS)
    try:
        error = kind(f"certificate {evil}")
    except TypeError:
        pytest.skip("made from other things than a message")
    assert is_safe(str(error)), str(error)
    assert is_safe(f"{error}")
    assert str(error).startswith("certificate ")


# --- logs -----------------------------------------------------------------------------------------


class Odd:
    def __str__(self) -> str:
        return "".join(MEMBERS)


def test_a_logger_of_ours(caplog: pytest.LogCaptureFixture) -> None:
    logger = get_logger("hybridkex.test")
    assert get_logger("hybridkex.test").filters.count(PRINTABLE) == 1
    evil = "".join(MEMBERS)
    with caplog.at_level(logging.DEBUG, "hybridkex.test"):
        logger.info("a peer %s of %d, %.1f and %s", evil, 3, 2.5, None)
        logger.info("%s", Odd())
        logger.info("%s", ValueError(evil))
        logger.info("%(who)s", {"who": evil})
        logger.info(f"a careless one: {evil}")
        try:
            int(evil)
        except ValueError:
            logger.exception("failed")
    assert len(caplog.records) == 6
    for record in caplog.records:
        assert is_safe(record.getMessage()), ascii(record.getMessage())
        assert is_safe(record.exc_text or "", keep="\n")
    assert ", 2.5 and None" in caplog.records[0].getMessage()
    assert "Traceback" in (caplog.records[-1].exc_text or "")


def test_no_room_has_another_logger() -> None:
    """The type that escapes is the only one that the library uses."""
    root = Path(hybridkex.__file__).parent
    allowed = {"text.py", "__init__.py", "cli/logs.py", "crypto/oqs.py"}
    for path in root.rglob("*.py"):
        if str(path.relative_to(root)) in allowed:
            continue
        source = path.read_text()
        for node in ast.walk(ast.parse(source)) if "getLogger" in source else ():
            if isinstance(node, ast.Attribute):
                assert node.attr != "getLogger", path
            if isinstance(node, ast.ImportFrom) and node.module == "logging":
                assert "getLogger" not in {one.name for one in node.names}, path


# --- output ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
def test_output(encoding: str) -> None:
    raw = io.BytesIO()
    stream = PrintableOutput(io.TextIOWrapper(raw, encoding=encoding))
    print("".join(MEMBERS), SHOWN, file=stream, flush=True)
    stream.writelines(["a\tb\n", "\x1b[2J\r"])
    stream.flush()
    text = raw.getvalue().decode(encoding)
    assert is_safe(text, keep="\n\t"), ascii(text)
    assert text.endswith("a\tb\n\\x1b[2J\\r")
    assert terminal(stream) is stream.stream
    assert terminal(PrintableOutput(stream)) is stream.stream  # type: ignore[arg-type]
    assert not stream.isatty()


@given(
    st.recursive(
        st.text(st.characters(exclude_categories=())) | st.none() | st.integers(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters()), inner),
    )
)
def test_json(value: object) -> None:
    text = json_line(value)
    assert text.isascii()
    assert text.isprintable()
    json.dumps(json.loads(text), ensure_ascii=False).encode()  # no lone surrogate is in it


def test_json_says_what_there_is() -> None:
    said = {"subject": "a\x7f\x1b\u202e", "n": [1, 2.5, True, None]}
    assert json.loads(json_line(said)) == said
    assert json_line("\udc80") == r'"\\udc80"'


def test_a_library_does_not_warn_users() -> None:
    """A warning would show a line of our source, when a peer chooses."""
    script = """
import warnings
from hybridkex.auth import InsecureNoVerification
from tests.auth.corpus import CASES
for title in ("serial number: 0", "serial number: negative", "names: long common name"):
    case = CASES[title]()
    try:
        InsecureNoVerification().verify_client(case.chain).certificate.common_name
        from hybridkex.auth import TrustStore
        from tests.auth.test_corpus import verify
        verify(case)
    except Exception as error:
        assert "Warning" not in type(error).__name__
"""
    done = subprocess.run(
        [sys.executable, "-W", "default", "-c", script],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[1],
    )
    assert done.stderr == ""


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8", "koi8-r"])
def test_code_that_draws_on_a_terminal_may_use_any_character(encoding: str) -> None:
    raw = io.BytesIO()
    drawn = terminal(PrintableOutput(io.TextIOWrapper(raw, encoding=encoding)))
    drawn.write("· ━ ü 量子")
    drawn.flush()
    assert raw.getvalue() == "· ━ ü 量子".encode(encoding, "backslashreplace")


WITHOUT_TEXT = (
    TimeoutError(),
    OSError(),
    MemoryError(),
    ValueError(""),
    errors.ConfigError(""),
    errors.LocalStateError(),
    trio.BrokenResourceError(),
    anyio.EndOfStream(),
)


@pytest.mark.parametrize("error", WITHOUT_TEXT, ids=lambda one: type(one).__name__)
def test_an_exception_without_a_text_is_named(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    """No message ends after its colon."""
    name = type(error).__name__
    get_logger("hybridkex.test").warning("it failed: %s", error)
    assert caplog.messages == [f"it failed: {name}"]
    assert said(error) == name
    assert broken(error) == name
    cause = RuntimeError()
    cause.__cause__ = error
    assert broken(cause) == name
    if isinstance(error, errors.HybridkexError):
        assert f"it failed: {error}" == f"it failed: {name}"


def unfilled(source: str) -> list[str]:
    """Texts of messages and f-strings that name a value in braces and do not fill it in."""
    tree = ast.parse(source)
    texts = [
        one for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for one in node.values
    ]
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            texts += node.exc.args
    values = [one.value for one in texts if isinstance(one, ast.Constant)]
    return [one for one in values if re.search(r"\{[a-z_][\w.]*(\(.*\))?\}", str(one))]


def test_every_message_has_its_values() -> None:
    assert unfilled('raise ValueError(f"it is {{now}} of {then}")')
    assert unfilled('raise ValueError("it is {text(now)}, " f"not {then}")')
    assert unfilled('raise ValueError("it is {now}")')
    assert not unfilled('x = f"{now} {{ distance_km = {then} }}"')
    for path in sorted((Path(__file__).parents[1] / "hybridkex").rglob("*.py")):
        assert unfilled(path.read_text()) == [], path
