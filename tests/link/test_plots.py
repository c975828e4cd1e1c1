"""Pictures. The curves are those of the closed forms, which have tests of their own."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from hybridkex.cli import main
from hybridkex.link import plots
from hybridkex.link.physics import Channel


def test_qber_with_sampled_points(tmp_path: Path) -> None:
    one, other = tmp_path / "one.svg", tmp_path / "other.svg"
    assert main(["qkd", "plot", "--kind", "qber", "-o", str(one)]) == 0
    plots.draw("qber", other)
    assert one.read_bytes() == other.read_bytes()
    assert b"<svg" in one.read_bytes()


@pytest.mark.parametrize("kind", ["rate-vs-distance", "finite-key"])
def test_rates(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the search for the best intensities, which takes seconds and has its own tests."""
    asked = []

    def found(channel: Channel, *, key_detections: float, **_: object) -> SimpleNamespace | None:
        asked.append((channel.distance_km, key_detections))
        return SimpleNamespace(transmitter=None, rate=1e-3) if channel.distance_km < 50 else None

    monkeypatch.setattr(plots, "optimise", found)
    path = tmp_path / "picture.png"
    assert main(["qkd", "plot", "--kind", kind, "-o", str(path)]) == 0
    assert path.read_bytes().startswith(b"\x89PNG")
    assert {distance for distance, _ in asked} == {0, 20, 40, 60}
    assert len({bits for _, bits in asked}) == (5 if kind == "finite-key" else 1)


def test_published_points_are_beside_the_curves() -> None:
    figure = plots.Figure()
    axes = figure.subplots()
    for maximum, label, _ in plots.PUBLISHED_MAXIMA:
        assert 0 < maximum < 150, label
    plots._published(axes)
    shown = {text.get_text() for text in axes.texts}
    assert {"Boaron 2018", "Grünenfelder 2023", "Li 2023"} <= shown
    points = [point for line in axes.lines for point in zip(*line.get_data(), strict=True)]
    drawn = {(float(x), float(y)) for x, y in points}
    assert {(km, rate) for km, rate, _ in plots.PUBLISHED_RATES} <= drawn


@pytest.mark.parametrize("name", ["picture.pdf", "missing/picture.svg"])
def test_where_no_picture_can_be(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["qkd", "plot", "--kind", "qber", "-o", str(tmp_path / name)]) == 1
    assert capsys.readouterr().err.startswith("hybridkex: ")
