"""Pictures. The curves are those of the closed forms, which have tests of their own."""

import itertools
import math
import random
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from hybridkex.cli import main
from hybridkex.errors import ConfigError
from hybridkex.link import plots
from hybridkex.link.optimise import optimise
from hybridkex.link.presets import preset
from hybridkex.link.scan import (
    COLUMNS,
    ERROR,
    SETTINGS,
    SUFFIXES,
    grid,
    read_scan,
    scan,
    write_scan,
)


def test_qber_with_sampled_points(tmp_path: Path) -> None:
    one, other = tmp_path / "one.svg", tmp_path / "other.svg"
    assert main(["qkd", "plot", "--kind", "qber", "-o", str(one)]) == 0
    plots.save(plots.draw("qber")[0], other)
    assert one.read_bytes() == other.read_bytes()
    assert b"<svg" in one.read_bytes()


@pytest.mark.parametrize("kind", ["rate-vs-distance", "finite-key"])
def test_rates_are_the_best_ones_until_the_key_ends(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    chosen = ["--preset", "rusca2018", "--block-bits", "1e6"]
    assert main(["qkd", "plot", "--kind", kind, *chosen, "-o", str(path)]) == 0
    assert path.read_bytes().startswith(b"\x89PNG")
    _, axes = plots.draw(kind, presets=["rusca2018"], block_bits=[1e6])
    curve = dict(zip(*axes.lines[0].get_data(), strict=True))
    link = preset("rusca2018")
    scale = link.channel.repetition_rate_hz if kind == "rate-vs-distance" else 1.0
    for distance in (0.0, 50.0, 140.0):
        best = optimise(
            link.channel.at(distance),
            key_detections=1e6,
            f=link.efficiency,
            intensities=2,
            security=link.security,
        )
        assert best is not None
        assert curve[distance] == pytest.approx(best.rate * scale, rel=0.02)
    beyond = optimise(
        link.channel.at(max(curve) + 10.0),
        key_detections=1e6,
        f=link.efficiency,
        intensities=2,
        security=link.security,
    )
    assert beyond is None


def test_published_points_are_beside_the_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "rates", lambda *_: [(0.0, 1.0), (450.0, 1e-10)])
    figure, axes = plots.draw("rate-vs-distance")
    shown = {text.get_text() for text in axes.texts}
    assert {"Boaron 2018", "Grünenfelder 2023", "Li 2023"} <= shown
    points = [point for line in axes.lines for point in zip(*line.get_data(), strict=True)]
    drawn = {(float(x), float(y)) for x, y in points}
    assert {(km, rate) for km, rate, *_ in plots.PUBLISHED_RATES} <= drawn
    figure.canvas.draw()
    boxes = [text.get_window_extent() for text in axes.texts]
    for one, other in itertools.combinations(boxes, 2):
        assert not one.overlaps(other)


def test_a_scan_is_drawn_and_a_curve_ends_where_its_rate_does() -> None:
    rows = [
        {"preset": name, "distance_km": km, "rate": max(0.0, top - km / 100), "block_bits": 1000}
        for name, top in (("a", 1.0), ("b", 0.55))
        for km in range(0, 150, 10)
    ]
    figure, axes = plots.plot_scan(rows, by=("preset", "block_bits"))
    assert [line.get_label() for line in axes.lines] == ["a, block_bits 1000", "b, block_bits 1000"]
    assert [max(line.get_xdata()) for line in axes.lines] == [90, 50]
    assert axes.get_xlabel() == "fibre (km)"
    assert axes.get_yscale() == "log"
    assert figure.legends
    with pytest.raises(ConfigError, match="no column"):
        plots.plot_scan(rows, y="beauty")


def test_legends_are_whole_and_letters_readable_at_400_pixels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(plots, "rates", lambda *_: [(0.0, 1e-3)])
    for kind in plots.KINDS:
        figure, axes = plots.draw(kind, distance_km=20)
        figure.canvas.draw()
        whole = figure.bbox
        for legend in figure.legends:
            box = legend.get_window_extent()
            assert whole.x0 <= box.x0 < box.x1 <= whole.x1
            assert whole.y0 <= box.y0 < box.y1 <= whole.y1
        shrunk = 400 / (figure.get_size_inches()[0] * 72)
        assert axes.xaxis.label.get_size() * shrunk >= 8


def test_a_picture_for_other_presets_and_blocks() -> None:
    _, axes = plots.draw("qber", presets=["boaron2018"], distance_km=50, block_bits=[1e5])
    assert "boaron2018" in [line.get_label() for line in axes.lines]
    for wrong in ({"presets": ["none"]}, {"kind": "beauty"}):
        with pytest.raises(ConfigError):
            plots.draw(**{"kind": "qber", **wrong})


@pytest.mark.parametrize("name", ["picture.pdf", "missing/picture.svg"])
def test_where_no_picture_can_be(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["qkd", "plot", "--kind", "qber", "-o", str(tmp_path / name)]) == 1
    assert capsys.readouterr().err.startswith("hybridkex: ")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("words.csv", "distance_km,rate\n1,fast\n"),
        ("infinite.csv", "distance_km,rate\n1,inf\n"),
        ("more.csv", "distance_km,rate\n1,2,3\n"),
        ("objects.json", '[{"distance_km": [1], "rate": {}}]'),
        ("huge.json", '[{"distance_km": 1, "rate": 1' + "0" * 400 + "}]"),
    ],
)
def test_a_scan_with_other_things_than_numbers_is_refused(
    name: str, content: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError):
        plots.plot_scan(read_scan(tmp_path / name))


def test_a_curve_may_be_for_a_value_that_has_parts_or_is_missing() -> None:
    rows = [{"distance_km": 1, "rate": 1e-3, "by": [1, 2]}, {"distance_km": 1, "rate": 1e-3}]
    plots.plot_scan(rows, by=["by"])


@pytest.mark.parametrize("y", ["rate", "distance_km"])
@pytest.mark.parametrize("x", ["block_bits", "distance_km"])
@pytest.mark.parametrize("values", [(0, 0), (-1, 5), (5, 1e-310)])
def test_a_scan_without_a_point_for_its_axes_is_refused_and_another_is_drawn(
    x: str, y: str, values: tuple[float, float], tmp_path: Path
) -> None:
    row = {"distance_km": 1, "rate": 2, "bit_per_s": 2, "block_bits": 2, y: values[1], x: values[0]}
    if all(row[name] >= plots.LEAST_NUMBER or name == "distance_km" for name in (x, y)):
        plots.save(plots.plot_scan([row], x=x, y=y)[0], tmp_path / "x.png")
    else:
        with pytest.raises(ConfigError, match="no row that can be drawn"):
            plots.plot_scan([row], x=x, y=y)
    good = {**row, **dict.fromkeys(set(row) & {x, y}, 1)}
    plots.save(plots.plot_scan([row, good], x=x, y=y)[0], tmp_path / "x.png")


def test_a_legend_names_every_kind_of_value() -> None:
    values = [None, True, False, "pns", 5, 0.25, [1, 2]]
    rows = [{"distance_km": 1, "rate": 1e-3, "eve": value} for value in values]
    _, axes = plots.plot_scan(rows, by=["eve"])
    assert [line.get_label() for line in axes.lines] == [
        "no eve", "eve", "not eve", "pns", "eve 5", "eve 0.25", "[1, 2]",
    ]  # fmt: skip
    rows = [{"distance_km": 1, "rate": 1e-3, "decoy_check": value} for value in ("full", "off")]
    _, axes = plots.plot_scan(rows, by=["decoy_check"])
    assert [line.get_label() for line in axes.lines] == ["decoy_check full", "decoy_check off"]


@pytest.mark.parametrize(
    "options",
    [
        ["--kind", "finite-key", "--distance", "50"],
        ["--kind", "rate-vs-distance", "--distance", "50"],
        ["--scan", "x.csv", "--distance", "50"],
        ["--kind", "qber", "--block-bits", "1e5", "--block-bits", "1e6"],
    ],
)
def test_an_option_that_a_picture_does_not_use_is_refused(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["qkd", "plot", *options, "-o", str(tmp_path / "x.svg")]) == 1
    assert "--kind" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "suffix"),
    [
        *((text, ".svg") for text in (r"$\bad$", "$x", "$x_$y$", "_hidden", "a\tb\x1b[31m")),
        *((text, ".svg") for text in ("\u202ea", "\ud800", "<b>&--!>", "\0")),
        *((text, ".png") for text in (r"$\bad$", "_hidden", "\ud800", "\0")),
    ],
)
def test_words_of_a_scan_are_drawn_as_they_are(text: str, suffix: str, tmp_path: Path) -> None:
    """Not as formulas, not as characters that end the picture, and none is left out."""
    rows = [{text: n, "rate": 0.1, "curve": text} for n in range(3)]
    figure, axes = plots.plot_scan(rows, x=text, by=["curve"])
    assert len(figure.legends[0].get_texts()) == 1
    plots.save(figure, tmp_path / f"x{suffix}")
    if suffix == ".svg":
        ElementTree.parse(tmp_path / "x.svg")
    assert axes.get_xlabel()


def test_an_iterator_of_block_sizes_is_used_up_once() -> None:
    for given in ([1e5], iter([1e5]), {1e5}):
        _, axes = plots.draw("finite-key", presets=iter(["rusca2018"]), block_bits=given)
        assert [line.get_label() for line in axes.lines] == ["rusca2018, 1e+05 bit"]


def test_a_missing_column_is_answered_with_those_that_are_there(tmp_path: Path) -> None:
    for text, hint in (("a;b\n1;2\n", "by commas"), ("a,b\n1,2\n", "it has a, b")):
        (tmp_path / "x.csv").write_text(text)
        with pytest.raises(ConfigError, match=hint):
            plots.plot_scan(read_scan(tmp_path / "x.csv"))


def test_a_scan_with_wrong_rows_is_drawn_without_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Impossible and misspelt values, on the axis and beside it: one line says how many."""
    path, picture = tmp_path / "a.csv", tmp_path / "a.svg"
    values = {"distance_km": "nan,0,fifty,20,1e9,40", "eve": "none,nonsense", "tuned": "false"}
    vary = [word for name, given in values.items() for word in ("--vary", f"{name}={given}")]
    assert main(["qkd", "scan", *vary, "-o", str(path)]) == 0
    capsys.readouterr()
    assert main(["qkd", "plot", "--scan", str(path), "-o", str(picture)]) == 0
    said = capsys.readouterr().err
    assert said.startswith(
        "hybridkex: rows with an error in place of results, which are not drawn: 9. The first "
        "error: distance_km=nan, "
    )
    assert said.count("\n") == 1
    (line,) = plots.plot_scan(read_scan(path))[1].lines
    assert list(line.get_xdata()) == [0, 20, 40]


def test_a_curve_has_a_gap_where_a_value_in_its_middle_is_zero_or_unknown() -> None:
    rows: list[dict[str, Any]] = [{"distance_km": km, "rate": 0.1, ERROR: None} for km in range(9)]
    rows[2]["rate"], rows[4]["rate"], rows[6]["rate"] = 0, None, math.nan
    rows[0]["rate"] = rows[8]["rate"] = math.nan
    (line,) = plots.plot_scan(rows[::-1])[1].lines
    assert list(map(math.isfinite, line.get_ydata())) == [True, False] * 3 + [True]
    assert line.get_markevery() == [0, 2, 4, 6]  # each is alone


@pytest.mark.parametrize("kind", sorted(plots.KINDS))
def test_pictures_end_where_they_are_asked_to_end(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind != "qber":
        with pytest.raises(ConfigError, match="no key at any distance"):
            plots.draw(kind, presets=["rusca2018"], block_bits=[10])
        with pytest.raises(ConfigError, match="at most 10 sizes"):
            plots.draw(kind, block_bits=[1e5] * 11)
        return
    monkeypatch.setattr(plots, "_sampled_qber", lambda *_: 0.1)
    for farthest in (1, 3, 3.5, 50):
        lines = plots.draw(kind, presets=["lim2014"], distance_km=farthest)[1].lines
        assert [max(line.get_xdata()) for line in lines[:2]] == [farthest] * 2
        assert all(len(line.get_xdata()) > 10 for line in lines[:2])


def test_too_many_curves_are_refused_and_a_long_legend_is_whole() -> None:
    rows = [
        {"distance_km": km, "rate": 0.1, "block_bits": n, "eve": "pns" * 9, "misalignment": n / 7}
        for n in range(plots.MOST_CURVES + 1)
        for km in (1, 2)
    ]
    with pytest.raises(ConfigError, match=r"51 curves, .*block_bits"):
        plots.plot_scan(rows)
    figure, axes = plots.plot_scan(rows[2:])
    looks = {(line.get_color(), line.get_linestyle(), line._dash_pattern[1] is None, str(
        line._unscaled_dash_pattern)) for line in axes.lines}  # fmt: skip
    assert len(looks) == len(axes.lines) == plots.MOST_CURVES
    figure.canvas.draw()
    box = figure.legends[0].get_window_extent()
    assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1
    assert figure.bbox.y0 <= box.y0 < box.y1 <= figure.bbox.y1
    assert axes.get_window_extent().height > 200


VARIED: dict[str, list[Any]] = {
    "preset": ["lim2014", "rusca2018", "bbm92", "lim2015"],
    "eve": [None, "intercept:0.02", "pns", "nonsense"],
    "block_bits": [20_000, 1_000_000, 1e300],
    "finite_key": ["tight", "published"],
    "misalignment": [0, 0.02, 0.4, "x"],
    "dead_time_s": [0, 1e-7, math.nan],
    "receiver_efficiency": [0, 0.1, 0.3],
}
DISTANCES = [0, 5, 10, 25, 40, 80, 150, 400, math.nan, math.inf, "fifty"]


def drawn(row: dict[str, Any], names: tuple[str, ...]) -> bool:
    logarithmic = ("rate", "bit_per_s", "secret_bits", "seconds", "leak_bits", "block_bits")
    return row.get(ERROR) is None and all(
        row[name] is not None and (row[name] > 0 or name not in logarithmic) for name in names
    )


def steps_of(rows: list[dict[str, Any]], one: tuple[float, ...], other: tuple[float, ...],
             names: tuple[str, ...]) -> bool:  # fmt: skip
    """Whether a line from one point to the other is from a value of a setting to the next one,
    everything else being the same."""
    of = {name for name in SETTINGS if name in rows[0]}
    ends = [
        [row for row in rows if tuple(row[name] for name in names) == at] for at in (one, other)
    ]
    for first, last in itertools.product(*ends):
        changed = [name for name in of if first[name] != last[name]]
        if len(changed) == 1:
            (name,) = changed
            same = [row for row in rows if all(row[n] == first[n] for n in of - {name})]
            low, high = sorted((first[name], last[name]))
            if not any(row[name] is not None and low < row[name] < high for row in same):
                return True
    return False


def test_every_picture_shows_the_rows_of_its_scan_and_joins_only_neighbours(tmp_path: Path) -> None:
    draw, pictures = random.Random(20), 0
    suffixes = [one for one in SUFFIXES if one != ".parquet" or find_spec("pyarrow")]
    for _ in range(45):
        axes = {"tuned": [False], "distance_km": draw.sample(DISTANCES, draw.randint(1, 8))}
        for name in draw.sample(sorted(VARIED), draw.randint(0, 3)):
            axes[name] = draw.sample(VARIED[name], draw.randint(1, min(3, len(VARIED[name]))))
        try:
            rows = scan(grid(axes))
        except ConfigError:  # all of its points are impossible
            continue
        for row in draw.sample(rows, len(rows) // 4):
            row.update(rate=0, qber=None)
        read = []
        for suffix in suffixes:
            write_scan(tmp_path / f"x{suffix}", rows)
            read.append(read_scan(tmp_path / f"x{suffix}"))
            assert b"NaN" not in (tmp_path / f"x{suffix}").read_bytes()
        names = {name for row in rows for name in row}
        tables = [[[row.get(name) for name in names] for row in one] for one in read]
        assert all(table == tables[0] for table in tables)
        numbers = ("distance_km", "block_bits", "misalignment", "dead_time_s", *COLUMNS)
        x = draw.choice([name for name in numbers if name in rows[0]])
        y = draw.choice([name for name in COLUMNS if name != x])
        shown = {(row[x], row[y]) for row in rows if drawn(row, (x, y))}
        if not shown:
            with pytest.raises(ConfigError, match="no row that can be drawn"):
                plots.plot_scan(draw.choice(read), x=x, y=y)
            continue
        pictures += 1
        lines = plots.plot_scan(draw.choice(read), x=x, y=y)[1].lines
        assert len({line.get_label() for line in lines}) == len(lines)
        if x in SETTINGS:
            others = [name for name in SETTINGS if name in rows[0] and name != x]
            good = [row for row in rows if row.get(ERROR) is None]
            assert len(lines) == len({tuple(row[name] for name in others) for row in good})
            assert all(line.get_linestyle() != "None" for line in lines)
        points = [list(zip(*line.get_data(), strict=True)) for line in lines]
        finite = {one for some in points for one in some if all(map(math.isfinite, one))}
        assert finite == shown
        for line, some in zip(lines, points, strict=True):
            dots = {some[place] for place in line.get_markevery() or ()}
            joined = set()
            for one, other in itertools.pairwise(some if line.get_linestyle() != "None" else []):
                if all(map(math.isfinite, one + other)):
                    assert steps_of(rows, one, other, (x, y)), (axes, x, y, one, other)
                    joined |= {one, other}
            assert dots | joined == {one for one in some if all(map(math.isfinite, one))}
    assert pictures > 15


@pytest.mark.parametrize("nothing", [None, math.nan, "", False])
def test_other_programs_have_a_value_where_a_row_has_no_error(nothing: Any) -> None:
    """pandas has NaN, where at least one row has an error."""
    rows = [{"distance_km": n, "rate": 1e-3 / (n + 1), "error": nothing} for n in range(3)]
    rows.append({"distance_km": 3, "rate": None, "error": "fibre: no key"})
    _, axes = plots.plot_scan(rows)
    assert list(axes.lines[0].get_xdata()) == [0, 1, 2]
