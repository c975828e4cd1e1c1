"""JSON of others is read in one place."""

import ast
import json
from pathlib import Path

import pytest

import hybridkex
from hybridkex.json_text import load_json
from hybridkex.net.http import parse_json
from hybridkex.qkd.etsi014.models import message_of

PACKAGE = Path(hybridkex.__file__).parent
READERS = {Path("json_text.py"), Path("net/http.py")}


@pytest.mark.parametrize("read", [load_json, parse_json])
@pytest.mark.parametrize(
    "text",
    [
        *(opening * 100_000 for opening in (b"[", b'{"a":', b'[{"a":', b'{"a":[')),
        b"[" * 5000 + b"]" * 5000,
        b"9" * 5000,
        b"\xff",
        b"\x00",
        b"",
        b"{",
        b"nul",
        b'{"a":1,"a":1}',
        b'[{"b":{"a":null,"a":1}}]',
        b'{"a":1,"\\u0061":2}',
    ],
)
def test_what_is_no_json_is_a_value_error(read: object, text: bytes) -> None:
    assert callable(read)
    with pytest.raises(ValueError):  # the promise is the type
        read(text)


@pytest.mark.parametrize("opening", ["[", '{"message":', '[{"detail":', '{"error":['])
def test_no_value_is_nested_so_deeply_that_reading_it_fails(opening: str) -> None:
    closing = "".join({"[": "]", "{": "}"}.get(one, "") for one in reversed(opening))
    read = 0
    for depth in range(1, 1000, 3):
        text = opening * depth + '"x"' + closing * depth
        try:
            value = load_json(text)
        except ValueError:
            continue
        read += 1
        assert message_of(value) in ("x", "")
        json.dumps(value, indent=2)
    assert read >= 8


def test_nobody_else_decodes_json() -> None:
    """``json.loads`` also raises ``RecursionError``. The demonstrations read their own files."""
    others = {
        path.relative_to(PACKAGE)
        for path in PACKAGE.rglob("*.py")
        if "demos" not in path.parts
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
        and node.attr in ("loads", "load", "JSONDecoder")
        and isinstance(node.value, ast.Name)
        and node.value.id == "json"
    }
    assert others == READERS
