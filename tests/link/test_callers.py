"""The link as a library: what a notebook passes to it is taken, or refused by a typed error."""

import dataclasses
import importlib
import pkgutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hybridkex.link
from hybridkex.errors import ConfigError
from hybridkex.link.measured import Measured, read_measured, write_measured
from hybridkex.link.optimise import rates, tuned
from hybridkex.link.presets import PRESETS, preset
from hybridkex.link.satellite import SatellitePass
from hybridkex.link.scan import evaluate, grid, read_scan, scan, write_scan
from hybridkex.link.settings import MEMORY, LinkSettings

POINT = {"tuned": False, "distance_km": 10.0}


def test_numbers_of_numpy_are_numbers(tmp_path: Path) -> None:
    whole = scan(grid({"distance_km": np.arange(3), "tuned": [np.bool_(False)]}))
    plain = scan(grid({"distance_km": [0, 1, 2], "tuned": [False]}))
    single = scan(grid({"distance_km": np.arange(3, dtype=np.float32), "tuned": [False]}))
    assert whole == plain == single
    assert evaluate({**POINT, "intensities": np.array([0.5, 0.2, 2e-4])}) == evaluate(
        {**POINT, "intensities": [0.5, 0.2, 2e-4]}
    )
    name = str(tmp_path / "rows.json")  # a path may be a string
    write_scan(name, whole)
    assert read_scan(name) == plain
    for bits in (20_000, 2e4, np.int64(20_000), np.float32(20_000)):
        settings = LinkSettings(block_bits=bits)  # type: ignore[arg-type]
        assert type(settings.block_bits) is int
        assert settings.digest == LinkSettings(block_bits=20_000).digest


@pytest.mark.parametrize(
    "call",
    [
        lambda: LinkSettings(block_bits=20_000.5),
        lambda: LinkSettings(block_bits="20000"),
        lambda: LinkSettings(block_bits=float("nan")),
        lambda: LinkSettings(key_bits=None),
        lambda: LinkSettings(block_detections=1.5),
        lambda: LinkSettings(preset="lim2014"),
        lambda: grid({"distance_km": 5}),
        lambda: grid({"preset": "lim2014"}),
        lambda: evaluate(POINT, blocks=-1),
        lambda: evaluate(POINT, blocks=1.5),
        lambda: scan([POINT], blocks=-1),
        lambda: tuned(PRESETS["lim2014"], 0),
        lambda: rates(PRESETS["lim2014"], 0),
        lambda: rates(PRESETS["lim2014"], float("inf")),
        lambda: SatellitePass(altitude_km=float("inf")),
        lambda: SatellitePass(waist_m=1e-200),
        lambda: SatellitePass(zenith_loss_db=-100.0),
        lambda: SatellitePass(aperture_m="1"),
        lambda: Measured(basis=None, bit=None),
        lambda: Measured(basis=[[0], [0, 1]], bit=[0, 1]),
        lambda: Measured(basis=[0, 1], bit=[0, 1], pulse=[[1], [2, 3]]),
        lambda: Measured(basis=np.ma.masked_array([0, 1], [False, True]), bit=[0, 1]),
    ],
)
def test_what_makes_no_sense_is_a_config_error(call: Any) -> None:
    with pytest.raises(ConfigError):
        call()


@pytest.mark.parametrize(
    "options",
    [
        {"kind": "qber", "distance_km": 0.0},
        {"kind": "qber", "distance_km": 1e-300},
        {"kind": "qber", "distance_km": float("nan")},
        {"kind": "qber", "block_bits": [0]},
        {"kind": "finite-key", "block_bits": [0]},
        {"kind": "finite-key", "block_bits": 1e6},
        {"kind": "finite-key", "presets": "lim2014"},
    ],
)
def test_pictures_that_cannot_be_drawn(options: dict[str, Any]) -> None:
    plots = pytest.importorskip("hybridkex.link.plots")
    with pytest.raises(ConfigError):
        plots.draw(**options)


def test_a_scan_of_another_hand_is_drawn() -> None:
    plots = pytest.importorskip("hybridkex.link.plots")
    rows = ({"distance_km": np.int64(n), "rate": np.float32(0.1)} for n in range(3))
    _, axes = plots.plot_scan(rows)
    assert len(axes.lines[0].get_xdata()) == 3
    with pytest.raises(ConfigError, match="by takes a list"):
        plots.plot_scan([{"distance_km": 1.0, "rate": 1.0, "preset": "x"}], by="preset")


def test_no_representation_shows_raw_key(tmp_path: Path) -> None:
    """A failed cell of a notebook, or a traceback, shows the arguments."""
    measured = Measured(basis=[0] * 4, bit=[1, 0, 1, 1], intensity=[0] * 4)
    path = str(tmp_path / "a.npz")
    write_measured(path, measured, preset("rusca2018"))
    assert "1, 0, 1, 1" not in repr(read_measured(path)[0])
    shown = []
    for module in pkgutil.iter_modules(hybridkex.link.__path__, "hybridkex.link."):
        if module.name.endswith((".wire", ".plots")):  # what is announced; an extra
            continue
        for kind in vars(importlib.import_module(module.name)).values():
            if isinstance(kind, type) and dataclasses.is_dataclass(kind):
                shown += [
                    f"{kind.__name__}.{one.name}"
                    for one in dataclasses.fields(kind)
                    if one.name in ("bit", "key")
                    and one.repr
                    and "Secret" not in str(one.type)
                    and "tuple" not in str(one.type)
                ]
    assert shown == []


def test_short_keys_count_in_the_memory_of_a_block() -> None:
    """A key of eight bits takes about 600 bytes at each end."""
    short, usual = (LinkSettings(block_bits=10**7, key_bits=bits) for bits in (8, 256))
    assert short.memory - usual.memory > 1.1 * 10**9
    LinkSettings(block_bits=3 * 10**7)
    with pytest.raises(ConfigError, match="GiB"):
        LinkSettings(block_bits=3 * 10**7, key_bits=8)
    assert LinkSettings(block_bits=3 * 10**7).memory <= MEMORY
