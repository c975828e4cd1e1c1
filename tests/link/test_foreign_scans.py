"""Scans that went through other programs, and rows that these programs hand over."""

import csv
import io
import json
import math
import tracemalloc
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hybridkex.cli import main
from hybridkex.errors import ConfigError
from hybridkex.link import scan as scan_module
from hybridkex.link.plots import plot_scan
from hybridkex.link.scan import (
    COLUMNS,
    ERROR,
    MOST_POINTS,
    SUFFIXES,
    failed,
    grid,
    nothing,
    read_scan,
    scan,
    write_scan,
)


class NotAvailable:
    """As pandas.NA: it is neither equal nor unequal to anything, and has a text."""

    def __eq__(self, other: object) -> Any:
        return self

    def __ne__(self, other: object) -> Any:
        return self

    __hash__ = object.__hash__

    def __bool__(self) -> bool:
        raise TypeError("boolean value of NA is ambiguous")

    def __repr__(self) -> str:
        return "<NA>"


WORDS = (
    "", "-", "NA", "N/A", "n/a", "#N/A", "#N/A N/A", "#NA", "None", "none", "NULL", "null", "<NA>",
    "NaN", "nan", "-NaN", "-nan", "NaT", "-1.#IND", "1.#QNAN", "missing", " NA ",
)  # fmt: skip
VALUES = (
    None, math.nan, np.nan, np.float32("nan"), np.datetime64("NaT"), np.ma.masked, NotAvailable(),
)  # fmt: skip
AXES = {"distance_km": [0, 20, math.nan, 40], "eve": [None, "split:0.01"], "tuned": [False]}


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    """Six good rows, two wrong ones."""
    found = scan(grid(AXES))
    assert [failed(row) for row in found].count(True) == 2
    return found


@pytest.fixture(scope="module")
def drawn(rows: list[dict[str, Any]]) -> dict[str, list[float]]:
    """The curves of the good rows."""
    return curves(rows)


def rewritten(rows: list[dict[str, Any]], nothing: str) -> str:
    """As ``to_csv(na_rep=nothing)`` of pandas writes them, with the numbers of the rows."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["", *names])
    for number, row in enumerate(rows):
        values = (row.get(name) for name in names)
        writer.writerow([number, *(nothing if one is None else one for one in values)])
    return text.getvalue()


def curves(rows: list[dict[str, Any]]) -> dict[str, list[float]]:
    lines = plot_scan(rows)[1].lines
    return {line.get_label(): line.get_xdata().tolist() for line in lines}


@pytest.mark.parametrize("word", WORDS)
def test_a_word_of_another_program_for_nothing_is_no_error_and_no_value(
    word: str,
    rows: list[dict[str, Any]],
    drawn: dict[str, list[float]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "x.csv"
    path.write_text(rewritten(rows, word))
    found = read_scan(path)
    assert [failed(row) for row in found] == [failed(row) for row in rows]
    assert found == [{"": n, ERROR: None, **row} for n, row in enumerate(rows)]
    assert curves(found) == drawn == {"no eve": [0, 20, 40], "split:0.01": [0, 20, 40]}
    if word in ("", "nan", "missing"):  # a picture takes 0.1 s, and shows what the curves are
        assert main(["qkd", "plot", "--scan", str(path), "-o", str(tmp_path / "x.svg")]) == 0
        assert "which are not drawn: 2" in capsys.readouterr().err
    (tmp_path / "x.json").write_text(json.dumps([{"eve": word, ERROR: word, "rate": 1}]))
    assert read_scan(tmp_path / "x.json") == [{"eve": None, ERROR: None, "rate": 1}]


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_a_value_of_another_program_for_nothing_is_none(
    value: Any, rows: list[dict[str, Any]], drawn: dict[str, list[float]], tmp_path: Path
) -> None:
    assert nothing(value)
    given = [{**row, "eve": row["eve"] or value, ERROR: row.get(ERROR, value)} for row in rows]
    assert curves(given) == drawn
    for row in given:
        row.update({name: value for name in COLUMNS if row[name] is None})
    assert curves(given) == drawn
    write_scan(tmp_path / "x.json", given)
    assert read_scan(tmp_path / "x.json") == [{ERROR: None, **row} for row in rows]


@pytest.mark.parametrize("value", [0, 0.0, False, "a", "0", [], [None], math.inf, Decimal(1)])
def test_other_values_are_something(value: Any) -> None:
    assert not nothing(value)


def test_rows_of_pandas(
    rows: list[dict[str, Any]], drawn: dict[str, list[float]], tmp_path: Path
) -> None:
    pandas = pytest.importorskip("pandas", reason="pip install pandas")
    table = pandas.DataFrame(rows)
    tables = [table, table.convert_dtypes(), table.convert_dtypes(dtype_backend="pyarrow")]
    for one in tables:
        assert curves(one.to_dict("records")) == drawn
        assert curves([row for _, row in one.iterrows()]) == drawn
    for word in WORDS:
        table.to_csv(tmp_path / "x.csv", na_rep=word)
        assert curves(read_scan(tmp_path / "x.csv")) == drawn
        again = pandas.read_csv(tmp_path / "x.csv", na_values=list(WORDS))
        assert curves(again.to_dict("records")) == drawn
    table.to_json(tmp_path / "x.json", orient="records")
    assert curves(read_scan(tmp_path / "x.json")) == drawn
    for orient in ("columns", "index", "split", "table", "values"):
        table.to_json(tmp_path / "x.json", orient=orient)
        with pytest.raises(ConfigError, match=r"orient=.records"):
            read_scan(tmp_path / "x.json")


def test_rows_of_polars(
    rows: list[dict[str, Any]], drawn: dict[str, list[float]], tmp_path: Path
) -> None:
    polars = pytest.importorskip("polars", reason="pip install polars")
    table = polars.DataFrame(rows, infer_schema_length=None)
    assert curves(table.to_dicts()) == drawn
    for word in WORDS:
        table.with_row_index().write_csv(tmp_path / "x.csv", null_value=word)
        assert curves(read_scan(tmp_path / "x.csv")) == drawn
    table.write_json(tmp_path / "x.json")
    assert curves(read_scan(tmp_path / "x.json")) == drawn


@pytest.mark.parametrize(
    "content",
    [
        {"distance_km": {"0": 1, "1": 2}, "rate": {"0": 1, "1": 2}},  # columns
        {"0": {"distance_km": 1, "rate": 1}},  # index
        {"columns": ["distance_km", "rate"], "index": [0], "data": [[1, 1]]},  # split
        [[1, 1], [2, 2]],  # values
        {"schema": {"fields": []}, "data": [{"distance_km": 1, "rate": 1}]},  # table
    ],
)
def test_json_in_another_form_is_answered_with_the_one_that_is_read(
    content: Any, tmp_path: Path
) -> None:
    path = tmp_path / "x.json"
    lines = '{"distance_km": 1}\n{"distance_km": 2}\n'
    for text in (json.dumps(content), lines):
        path.write_text(text)
        with pytest.raises(ConfigError, match=r"not a scan: .*list of rows.*orient=.records"):
            read_scan(path)


@pytest.mark.parametrize(
    "text",
    [
        "distance_km;rate\n1;0.5\n",
        "distance_km;rate\n1,5;0,5\n",
        "distance_km\trate\n1\t0.5\n",
        "sep=;\ndistance_km;rate\n1;0,5\n",
        'distance_km,rate\n1,"0,5"\n',
        'distance_km,rate\n1,"1,5e-4"\n',
        'distance_km,rate,block_bits\n1,0.5,"1,000,000"\n',
        'distance_km,rate,misalignment\n1,0.5,"0,01"\n',
        "distance_km,rate\n1,5,0,5\n",
    ],
)
def test_other_separators_and_decimal_commas_are_told(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text(text)
    with pytest.raises(ConfigError, match=r"x.csv: not a scan: .*write numbers with a decimal"):
        read_scan(tmp_path / "x.csv")


def test_words_with_commas_are_words(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text('note,intensities\n"1,5","[0.5, 0.2]"\n')
    assert read_scan(tmp_path / "x.csv") == [{"note": "1,5", "intensities": "[0.5, 0.2]"}]


@pytest.mark.parametrize(
    ("true", "false"), [("true", "false"), ("TRUE", "FALSE"), ("True", "False")]
)
def test_truth_values_of_other_programs(true: str, false: str, tmp_path: Path) -> None:
    lines = [f"{km},0.5,{one}" for km in (0, 9) for one in (true, false)]
    (tmp_path / "x.csv").write_text("\n".join(["distance_km,rate,tuned", *lines]))
    assert curves(read_scan(tmp_path / "x.csv")) == {"tuned": [0, 9], "not tuned": [0, 9]}


def test_a_setting_without_a_value_was_not_set() -> None:
    known = [("intensities", [0.5, 0.1]), ("misalignment", 0.01), ("eve", "pns"), ("lamp", "b")]
    for (name, value), label in zip(
        known, ("intensities not set", "misalignment not set", "no eve", "no lamp"), strict=True
    ):
        given = [
            {"distance_km": km, "rate": 1, name: one} for km in (0, 9) for one in (value, None)
        ]
        assert list(curves(given))[1] == label


SERIES: dict[str, Callable[[int, int], Any]] = {
    "words": lambda series, _: "ab"[series],
    "truth": lambda series, _: bool(series),
    "numbers": lambda series, _: series + 1,
    "fractions": lambda series, _: 20.5 + series,
    "missing": lambda series, _: "a" if series else None,
}
NO_SERIES: dict[str, Callable[[int, int], Any]] = {
    "same": lambda *_: "x",
    "index": lambda _, km: km % 7,
    "": lambda _, km: km % 7,
    "row": lambda series, km: 100 * series + km,
    "ratio": lambda series, km: 1 / (1 + series + km),
    "transmittance": lambda _, km: 10 ** (-km / 50),
}


@pytest.mark.parametrize("shift", [0, 5])
@pytest.mark.parametrize("x", ["distance_km", "temperature"])
def test_columns_of_a_users_own_tell_series_apart(shift: int, x: str) -> None:
    """Not those that number the rows, or have another result."""
    for name, value in (SERIES | NO_SERIES).items():
        given = [
            {x: km, "rate": 0.5, "preset": "ab"[series], "own": "same", name: value(series, km)}
            for series in range(2)
            for km in range(shift * series, 60 + shift * series, 10)
        ]
        if name in SERIES:
            for row in given:
                del row["preset"]
        lines = plot_scan(given, x=x)[1].lines
        expected = [[*range(0, 60, 10)], [*range(shift, 60 + shift, 10)]]
        assert [line.get_xdata().tolist() for line in lines] == expected, name
        assert all(line.get_linestyle() == "-" for line in lines)


def test_too_many_columns_that_differ_are_told() -> None:
    given = [{"distance_km": n, "rate": 0.5, "note": f"at {n}"} for n in range(60)]
    with pytest.raises(ConfigError, match=r"60 curves.* of note; .*leave .* columns out"):
        plot_scan(given)


@pytest.mark.parametrize("end", ["100,1.3", "100", "# a comment", "(3 rows)", "100,1.3e-06\n0,1,2"])
def test_a_row_with_too_few_values_is_refused(tmp_path: Path, end: str) -> None:
    """A file that was cut off would have a wrong value in its last row."""
    (tmp_path / "x.csv").write_text(f"distance_km,rate,bit_per_s\n0,1.1e-02,1.1e7\n{end}")
    with pytest.raises(ConfigError, match="line 3 has fewer values than there are columns"):
        read_scan(tmp_path / "x.csv")


@pytest.mark.parametrize("kind", ["date32", "date64", "timestamp", "duration"])
def test_times_that_python_does_not_have_are_refused(tmp_path: Path, kind: str) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="pip install pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet", reason="pip install pyarrow")
    long = {
        "date32": pyarrow.array([0, 2**31 - 1], pyarrow.int32()).cast(pyarrow.date32()),
        "date64": pyarrow.array([0, 2**53 * 1000], pyarrow.int64()).cast(pyarrow.date64()),
        "timestamp": pyarrow.array([0, 2**62], pyarrow.timestamp("us")),
        "duration": pyarrow.array([0, 2**62], pyarrow.duration("ms")),
    }[kind]
    columns = {"distance_km": [0.0, 10.0], "rate": [0.1, 0.01], "when": long}
    parquet.write_table(pyarrow.table(columns), tmp_path / "x.parquet")
    with pytest.raises(ConfigError, match=r"x\.parquet: not a scan: "):
        read_scan(tmp_path / "x.parquet")


def test_a_damaged_parquet_file_is_read_or_refused(
    tmp_path: Path, rows: list[dict[str, Any]]
) -> None:
    pytest.importorskip("pyarrow", reason="pip install pyarrow")
    path = tmp_path / "x.parquet"
    write_scan(path, rows)
    good = path.read_bytes()
    refused = 0
    for bit in range(8 * (len(good) - 3000), 8 * len(good), 23):  # the schema stands at the end
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        path.write_bytes(bad)
        try:
            read_scan(path)
        except ConfigError:
            refused += 1
    assert refused > 100


def test_a_whole_number_that_no_float_holds_is_refused(tmp_path: Path) -> None:
    big = 10**400
    found = [{"distance_km": 1, "block_bits": big, "rate": 0.5}, {"distance_km": 2, "rate": 1.0}]
    (tmp_path / "x.json").write_text(json.dumps(found))
    with pytest.raises(ConfigError, match="more than 308 digits"):
        plot_scan(read_scan(tmp_path / "x.json"))
    with pytest.raises(ConfigError, match="more than 308 digits"):
        plot_scan(found)


NUMBERS = ["distance_km", "block_bits", "rate", "qber", "blocks_made", "max_qber"]


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize(
    "word", [".", "n.a.", "?", "1.000.000", "1 000", "1'000", "12:30", "0,5", "1,000", "true", "x"]
)
def test_text_in_a_column_of_numbers_is_refused(name: str, word: str, tmp_path: Path) -> None:
    """It would be a curve of its own, or of another number than the one that is meant."""
    rows: list[dict[str, Any]] = [{"note": "a", name: 1}, {"note": "b", name: word}]
    (tmp_path / "x.csv").write_text(f'note,{name}\na,1\nb,"{word}"\n')
    (tmp_path / "x.json").write_text(json.dumps(rows))
    write_scan(tmp_path / "y.json", [*rows, {"note": "c", name: True}])
    for path in ("x.csv", "x.json", "y.json"):
        with pytest.raises(ConfigError, match=f"not a scan: {name} has .*takes numbers.*point"):
            read_scan(tmp_path / path)


def test_the_points_of_thousands_are_not_taken_for_decimal_points(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    for text in ("10.000", "1.000.000", "100.000", "-10.000"):
        path.write_text(f"distance_km,block_bits,rate\n0,{text},1e-2\n")
        with pytest.raises(ConfigError, match="without separators of thousands"):
            read_scan(path)
    for text in ("10000.0", "1e4", "10000", "1.0e4", "10000.000", "1.00e4", "+1E+04"):
        path.write_text(f"distance_km,block_bits,rate\n10.000,{text},1.125\n")
        assert read_scan(path) == [{"distance_km": 10, "block_bits": 10_000, "rate": 1.125}]


def test_decimal_numbers_and_fractions_are_numbers(tmp_path: Path) -> None:
    rows = [
        {"distance_km": km, "block_bits": Decimal(10**6), "rate": Fraction(1, 2 + number)}
        for number, km in enumerate((0, Decimal(10), Decimal("20.5")))
    ]
    assert list(curves(rows).values()) == [[0, 10, 20.5]]
    write_scan(tmp_path / "x.csv", rows)
    assert read_scan(tmp_path / "x.csv")[2]["distance_km"] == 20.5
    assert nothing(Decimal("nan"))
    assert nothing(Decimal("snan"))
    with pytest.raises(ConfigError, match="has the text '1/2'"):
        plot_scan([{"distance_km": 1, "rate": "1/2"}])
    pyarrow = pytest.importorskip("pyarrow", reason="pip install pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet", reason="pip install pyarrow")
    table = pyarrow.table({"distance_km": [Decimal("0.0"), Decimal("10.5")], "rate": [0.5, 0.25]})
    parquet.write_table(table, tmp_path / "x.parquet")
    assert list(curves(read_scan(tmp_path / "x.parquet")).values()) == [[0, 10.5]]


@pytest.mark.parametrize("word", [".", "n.a.", "nil", "?", r"\N", "#VALUE!", "(null)"])
def test_rows_that_all_count_as_failed_are_told_with_the_first_word(
    word: str, tmp_path: Path
) -> None:
    (tmp_path / "x.csv").write_text(f"distance_km,rate,error\n0,0.5,{word}\n9,0.1,{word}\n")
    with pytest.raises(ConfigError) as caught:
        plot_scan(read_scan(tmp_path / "x.csv"))
    assert f"2 have an error, the first {word!r}; " in str(caught.value)


def test_a_flipped_bit_in_a_page_of_a_parquet_scan_is_noticed(
    tmp_path: Path, rows: list[dict[str, Any]]
) -> None:
    pytest.importorskip("pyarrow", reason="pip install pyarrow")
    path = tmp_path / "x.parquet"
    write_scan(path, rows)
    good, right, refused = path.read_bytes(), read_scan(path), 0
    footer = len(good) - 8 - int.from_bytes(good[-8:-4], "little")
    for bit in range(8 * 4, 8 * footer, 31):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        path.write_bytes(bad)
        try:
            found = read_scan(path)
        except ConfigError:
            refused += 1
        else:
            assert found == right
    assert refused > 100


def test_blanks_after_the_commas_are_no_part_of_names_and_values(tmp_path: Path) -> None:
    text = 'distance_km, rate, eve, note\n0, 0.5, pns, "a, b"\n9,0.25,"pns","a, b"\n'
    (tmp_path / "x.csv").write_text(text)
    found = read_scan(tmp_path / "x.csv")
    assert [list(one) for one in found] == [["distance_km", "rate", "eve", "note"]] * 2
    assert [one["note"] for one in found] == ["a, b"] * 2
    assert list(curves(found).values()) == [[0, 9]]


def test_two_columns_of_a_name_are_refused(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="pip install pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet", reason="pip install pyarrow")
    column = pyarrow.array([0.5])
    parquet.write_table(pyarrow.table([column] * 2, names=["rate", "rate"]), tmp_path / "x.parquet")
    with pytest.raises(ConfigError, match="not a scan: two columns have the same name"):
        read_scan(tmp_path / "x.parquet")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_more_rows_than_a_scan_has_are_refused_before_they_take_memory(
    suffix: str, tmp_path: Path
) -> None:
    """Constant columns take next to nothing in a file."""
    path, rows = tmp_path / f"x{suffix}", MOST_POINTS + 1
    if suffix == ".csv":
        path.write_text("rate\n" + "1\n" * rows)
    elif suffix == ".json":
        path.write_text("[" + "{}," * rows + "{}]")
    else:
        pyarrow = pytest.importorskip("pyarrow", reason="pip install pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet", reason="pip install pyarrow")
        parquet.write_table(pyarrow.table({"rate": np.zeros(rows)}), path)
    tracemalloc.start()
    try:
        with pytest.raises(ConfigError, match="a scan has at most 1,000,000 rows"):
            read_scan(path)
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
    finally:
        tracemalloc.stop()


def test_values_without_bound_are_refused(
    monkeypatch: pytest.MonkeyPatch, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    monkeypatch.setattr(scan_module, "MOST_VALUES", len(rows) * len(rows[0]) // 2)
    for suffix in SUFFIXES if find_spec("pyarrow") else SUFFIXES[::2]:
        write_scan(tmp_path / f"x{suffix}", rows)
        with pytest.raises(ConfigError, match=r"at most|more than .* values"):
            read_scan(tmp_path / f"x{suffix}")


def test_a_zero_byte_is_escaped(tmp_path: Path) -> None:
    """No text has one, and a file with one is not read."""
    for suffix in SUFFIXES if find_spec("pyarrow") else SUFFIXES[::2]:
        write_scan(tmp_path / f"x{suffix}", [{"a\0": "b\0"}])
        assert read_scan(tmp_path / f"x{suffix}") == [{r"a\x00": r"b\x00"}]
