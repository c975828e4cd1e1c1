"""The tables and charts of docs/performance.md are those of the figures, and the benchmarks run."""

import json
import os
from pathlib import Path

import pytest

from benchmarks import __main__ as entry
from benchmarks import page, processes, profiles
from benchmarks.chart import draw
from benchmarks.results import (
    Curve,
    Options,
    Row,
    Shares,
    in_turns,
    replaced,
    shares,
    with_peers,
)


def test_the_page_has_the_tables_of_the_figures() -> None:
    kept = json.loads(page.FIGURES.read_text())
    written = page.PAGE.read_text(encoding="utf-8")
    assert page.text(written, kept) == written
    assert [name for name in entry.NAMES if f"<!-- table: {name} -->" not in written] == []


def test_the_page_has_the_charts_of_the_figures() -> None:
    written = page.PAGE.read_text(encoding="utf-8")
    for path, picture in page.charts(json.loads(page.FIGURES.read_text())).items():
        assert path.read_text() == picture
        assert f"(pictures/{path.name})" in written


def test_figures_survive_json() -> None:
    row = Row("work", "1/s", {"hybridkex": [1.0, 2.0], "peer": [2.0, 2.0]}, goal=0.7)
    curve = Curve("growth", "clients", "ms", {"hybridkex": {"1": [0.5], "1000": [0.25]}})
    parts = Shares("libraries", "work", {"the kernel": 25.0, "the rest": 75.0})
    kept = json.loads(json.dumps(page.as_json({"one": [row, curve, parts]})))
    assert page.from_json(kept) == {"one": [row, curve, parts]}


def test_shares_are_one_table_for_each_kind_with_the_largest_part_first() -> None:
    text = shares(
        [
            Shares("libraries", "one", {"kernel": 30.0, "Python": 69.5, "little": 0.5}),
            Shares("modules", "two", {"trio": 100.0}),
            Shares("libraries", "three", {"kernel": 40.0, "SQLite": 60.0}),
        ]
    )
    assert text.splitlines() == [
        "| work | kernel | Python | SQLite |",
        "| --- | --- | --- | --- |",
        "| one | 30 % | 70 % |  |",
        "| three | 40 % |  | 60 % |",
        "",
        "| work | trio |",
        "| --- | --- |",
        "| two | 100 % |",
    ]


def test_ways_of_ours_have_a_column_each_and_no_peer() -> None:
    rows = [
        Row("rate", "1/s", {"SQLite": [325.0, 335.0], "PostgreSQL": [160.0]}, compared=False),
        Row("CPU of the database", "ms", {"PostgreSQL": [2.86]}, compared=False),
    ]
    assert page.tables(rows).splitlines() == [
        "| work | SQLite | PostgreSQL |",
        "| --- | --- | --- |",
        "| rate | 330 1/s | 160 1/s |",
        "| CPU of the database |  | 2.86 ms |",
    ]


def test_profiles_without_perf(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each part belongs to something, and the parts of a work are all of it. How large they are
    depends on what else the machine does."""
    monkeypatch.setattr(profiles, "program", lambda name: None)
    found = list(profiles.run(Options(quick=True)))
    assert [one.table for one in found] == ["packages", "packages", "modules"]
    for one in found:
        assert sum(one.parts.values()) == pytest.approx(100)
        assert len([part for part in one.parts.values() if part > 0]) > 2
    assert found[0].parts["`tls`"] > 0
    assert found[2].parts["trio"] > 0


@pytest.mark.parametrize(
    ("library", "kind"),
    [
        ("[kernel.kallsyms]", "the kernel"),
        ("[vdso]", "the kernel"),
        ("libpython3.11.so.1.0", "the interpreter"),
        ("python3.13", "the interpreter"),
        ("math.cpython-311-x86_64-linux-gnu.so", "the interpreter"),
        ("_rust.abi3.so", "`cryptography`"),
        ("_cffi_backend.cpython-311-x86_64-linux-gnu.so", "`cryptography`"),
        ("libcrypto.so.3", "OpenSSL (`hashlib`, `ssl`)"),
        ("_hashlib.cpython-311-x86_64-linux-gnu.so", "OpenSSL (`hashlib`, `ssl`)"),
        ("libsqlite3.so.0.8.6", "SQLite"),
        ("_sqlite3.cpython-311-x86_64-linux-gnu.so", "SQLite"),
        ("libc.so.6", "the C library and the loader"),
        ("libc-2.31.so", "the C library and the loader"),
        ("ld-linux-x86-64.so.2", "the C library and the loader"),
        ("libzstd.so.1", "the rest"),
    ],
)
def test_what_a_library_belongs_to(library: str, kind: str) -> None:
    assert profiles.kind_of(library) == kind


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (Row("w", "1/s", {"a": [3.0, 1.0, 4.0], "b": [1.0, 2.0, 2.0]}, 1.5), "1.5: met"),
        (Row("w", "1/s", {"a": [1.0], "b": [2.0]}, 0.8), "0.8: missed by 0.30"),
        (Row("w", "ms", {"a": [1.0], "b": [2.0]}, 0.8), "0.8: met"),
        (Row("w", "s", {"a": [0.3]}, bound=0.2), "0.20 s: missed by 0.1"),
        (Row("w", "1/s", {"a": [700.0]}, bound=600), "600 1/s: met"),
        (Row("w", "1/s", {"a": [700.0]}, goal=1.0), ""),
    ],
)
def test_goals(row: Row, words: str) -> None:
    assert row.verdict() == words
    assert with_peers([row]).splitlines()[2].rstrip(" |").endswith(words)


def test_a_ratio_is_the_median_of_those_within_a_round() -> None:
    row = Row("w", "ms", {"a": [1.0, 2.0, 10.0], "b": [2.0, 8.0, 10.0]})
    assert row.ratio("b") == (2.0, 1.0, 4.0)


def test_tools_take_turns() -> None:
    called: list[str] = []
    tools = {name: lambda name=name: called.append(name) or 1.0 for name in "abc"}
    assert in_turns(2, tools) == {"a": [1.0, 1.0], "b": [1.0, 1.0], "c": [1.0, 1.0]}
    assert called == [*"abc", *"bca"]


def test_a_page_without_the_place_of_a_table_is_refused() -> None:
    with pytest.raises(RuntimeError, match="one table files"):
        replaced("no place", {"files": "| a |"})


def test_a_missing_peer_is_named_with_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(processes, "PLACES", "/nowhere")
    monkeypatch.setattr(processes, "_told", set())
    assert processes.program("rsync") is None
    assert processes.program("rsync") is None
    told = capsys.readouterr().err.splitlines()
    assert told == ["rsync is missing, and its rows are left out: apt install rsync"]


def test_a_chart_has_a_line_for_each_tool() -> None:
    lines = {tool: {"1": [1.0, 2.0, 9.0], "1000": [40.0]} for tool in ("ours", "a & b")}
    picture = draw(Curve("Growth", "clients", "ms", lines))
    assert picture.count("<polyline") == 2
    assert "a &amp; b" in picture
    assert ">1,000</text>" in picture


def test_without_peers_rows_and_charts_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import handshake

    monkeypatch.setattr(handshake, "has", lambda name: False)
    rows = list(handshake.run(Options(rounds=1, quick=True)))
    assert [list(row.figures) for row in rows[:2]] == [["hybridkex"], ["hybridkex"]]


def test_benchmarks_in_one_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["handshake", "channel", "fresh_keys", "one_time_pad", "providers"]
    entry.main([*names, "--quick", "--json", str(tmp_path / "figures.json")])
    found = json.loads((tmp_path / "figures.json").read_text())
    assert list(found) == names
    assert all(one["rows"] for one in found.values())
    assert "times as fast" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["files", "many_files", "tunnel", "startup", "kme", "kme_load", "qkd_handshake"]
)
def test_benchmarks_with_programs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sync", lambda: None)  # it waits for all that the machine writes
    entry.main([name, "--quick", "--json", str(tmp_path / "figures.json")])
    (found,) = json.loads((tmp_path / "figures.json").read_text()).values()
    assert found["rows"]
