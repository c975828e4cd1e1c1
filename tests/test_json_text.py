"""JSON of others is read in one place."""

import ast
import json
from collections.abc import Callable
from pathlib import Path
from uuid import UUID

import pytest

import hybridkex
from hybridkex.json_text import MOST_VALUES, load_json
from hybridkex.kme.peering import BLOCKS_AT_ONCE, MAX_ANSWER_BYTES, ExtKeys
from hybridkex.net.http import parse_json
from hybridkex.qkd.etsi014.models import message_of
from hybridkex.qkd.store import Allotment
from hybridkex.secret import Secret

PACKAGE = Path(hybridkex.__file__).parent
READERS = {Path("json_text.py")}


@pytest.mark.parametrize("read", [load_json, parse_json])
@pytest.mark.parametrize(
    "text",
    [
        *(opening * 100_000 for opening in (b"[", b'{"a":', b'[{"a":', b'{"a":[')),
        b"[" * 5000 + b"]" * 5000,
        b"[" * 65 + b"]" * 65,
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


@pytest.mark.parametrize("read", [load_json, parse_json])
@pytest.mark.parametrize(
    "value",
    ["[]", "{}", "0", "0e9", '""', '{"a":0}', "[" * 60 + "]" * 60, "null ", " \n0"],
)
def test_a_text_of_very_many_values_is_not_parsed(
    read: Callable[[bytes], object], value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = f"[{','.join([value] * (MOST_VALUES + 1))}]".encode()
    monkeypatch.setattr(json, "loads", None)
    with pytest.raises(ValueError, match=f"more than {MOST_VALUES} values"):
        read(text)


def test_an_object_of_very_many_members_is_not_parsed() -> None:
    members = ",".join(f'"{n:x}":0' for n in range(MOST_VALUES + 1))
    with pytest.raises(ValueError, match="values"):
        load_json(f"{{{members}}}")


def test_the_longest_messages_between_two_kmes_are_parsed() -> None:
    name = str(UUID(int=0))
    key = Allotment(blocks=(name,), size=32, value=Secret(bytes(32)))
    message = ExtKeys(
        allotments=(key,) * BLOCKS_AT_ONCE, master="m" * 255, slaves=("s" * 255,) * 99
    )
    assert load_json(json.dumps(message.to_json())) == message.to_json()
    refusal = {"message": "m" * 255, "refused": dict.fromkeys(range(BLOCKS_AT_ONCE), "x" * 80)}
    assert load_json(json.dumps(refusal))
    assert len(json.dumps(refusal)) < MAX_ANSWER_BYTES


def test_a_file_of_the_user_may_have_more_values() -> None:
    text = f"[{','.join(['0'] * (MOST_VALUES + 2))}]"
    assert len(load_json(text, most_values=None)) == MOST_VALUES + 2


def test_nobody_else_decodes_json() -> None:
    """``json.loads`` also raises ``RecursionError``. The demonstrations read their own files."""
    others = {
        path.relative_to(PACKAGE)
        for path in PACKAGE.rglob("*.py")
        if "demos" not in path.parts
        if "json" in (source := path.read_text())
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute)
        and node.attr in ("loads", "load", "JSONDecoder")
        and isinstance(node.value, ast.Name)
        and node.value.id == "json"
    }
    assert others == READERS
