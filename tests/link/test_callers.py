"""The link as a library: what a notebook passes to it is taken, or refused by a typed error."""

import dataclasses
import importlib
import pkgutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

import hybridkex.link
from hybridkex.errors import ConfigError, LinkError
from hybridkex.link import asymptotic
from hybridkex.link.cascade import Cascade
from hybridkex.link.eavesdroppers import eavesdropper
from hybridkex.link.finite_key import Counts, Security, expected_counts, proof_for
from hybridkex.link.measured import Measured, distil, read_measured, write_measured
from hybridkex.link.optimise import expected_length, rates, tuned
from hybridkex.link.party import verification_hash
from hybridkex.link.physics import Channel, PairSource, Transmitter
from hybridkex.link.presets import PRESETS, Preset, preset
from hybridkex.link.satellite import SatellitePass
from hybridkex.link.scan import evaluate, grid, read_scan, scan, write_scan
from hybridkex.link.settings import MEMORY, LinkSettings
from hybridkex.link.simulated import SimulatedLink
from hybridkex.link.statistics import (
    binary_entropy,
    mean_lower,
    mean_upper,
    trials_upper,
    unseen_errors,
)
from hybridkex.link.toeplitz import compress, rounding_bound, seed_length

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


LIM = PRESETS["lim2014"]
GYS = PRESETS["gys2005"].channel
COUNTS = {
    "key": (9e4, 9e4, 9e3),
    "key_errors": (900.0, 900.0, 90.0),
    "test": (9e4, 9e4, 9e3),
    "test_errors": (900.0, 900.0, 90.0),
}
PASS = SatellitePass()
BITS = np.array([1, 0, 1, 1, 0, 1, 0, 0], dtype=np.uint8)


def fields_of(one: Any) -> dict[str, Any]:
    return {field.name: getattr(one, field.name) for field in dataclasses.fields(one)}


def spread(call: Any) -> Any:
    """Takes a record's fields by name and hands them over as one dictionary or positionally."""
    return lambda **given: call(given)


CALLS: dict[str, tuple[Any, dict[str, Any]]] = {
    "Channel": (Channel, fields_of(LIM.channel)),
    "Transmitter": (Transmitter, fields_of(LIM.transmitter)),
    "PairSource": (PairSource, fields_of(PRESETS["bbm92"].transmitter)),
    "Security": (Security, fields_of(Security())),
    "Preset": (Preset, fields_of(LIM)),
    "preset": (preset, {"name": "lim2014"}),
    "Preset.at": (LIM.at, {"distance_km": 5.0}),
    "with_loss": (LIM.channel.with_loss, {"decibels": 3.0}),
    "SatellitePass": (SatellitePass, fields_of(PASS)),
    "loss": (PASS, {"seconds": 3.0}),
    "elevation": (PASS.elevation_deg, {"seconds": 3.0}),
    "range": (PASS.range_km, {"elevation_deg": 30.0}),
    "LinkSettings": (LinkSettings, fields_of(LinkSettings())),
    "SimulatedLink": (
        SimulatedLink,
        {"settings": LinkSettings(), "eve": "pns", "bootstrap": "psk", "seed": 1, "fading": None},
    ),
    "eavesdropper": (
        eavesdropper,
        {"text": "split:0.5", "channel": LIM.channel, "transmitter": LIM.transmitter},
    ),
    "Counts": (Counts, COUNTS),
    "expected_counts": (
        expected_counts,
        {"channel": LIM.channel, "transmitter": LIM.transmitter, "pulses": 1e9},
    ),
    "expected_length": (
        expected_length,
        {
            "channel": LIM.channel,
            "transmitter": LIM.transmitter,
            "key_detections": 1e5,
            "f": 1.1,
            "security": Security(),
        },
    ),
    **{
        f"secret_length {name}": (
            proof_for(PRESETS[name].transmitter).secret_length,
            {
                "source": PRESETS[name].transmitter,
                "counts": expected_counts(LIM.channel, PRESETS[name].transmitter, 1e9),
                "security": Security(),
                "leak": 1000.0,
            },
        )
        for name in ("lim2014", "rusca2018", "bbm92")
    },
    "proof_for": (proof_for, {"source": LIM.transmitter, "finite_key": "tight"}),
    "tuned": (tuned, {"preset": "lim2014", "block_bits": 0, "finite_key": "x"}),
    "rates": (rates, {"preset": "lim2014", "block_bits": 0, "finite_key": "x"}),
    "grid": (grid, {"axes": {"distance_km": [1.0]}}),
    "grid values": (spread(grid), {"distance_km": [1.0], "preset": ["lim2014"]}),
    "evaluate": (evaluate, {"point": POINT, "blocks": 0, "seed": 1}),
    "evaluate values": (
        spread(evaluate),
        {
            **POINT,
            "preset": "lim2014",
            "block_bits": 1e5,
            "eve": "pns",
            "finite_key": "tight",
            "leak": "both",
            "intensities": [0.5, 0.2, 2e-4],
            "efficiency": 1.1,
            "secrecy": 1e-9,
        },
    ),
    "scan": (scan, {"points": [POINT], "blocks": 0, "seed": 1}),
    "Measured": (
        Measured,
        {"basis": [0, 1], "bit": [0, 1], "intensity": [0, 1], "pulse": [3, 5]},
    ),
    "compress": (compress, {"key": BITS, "seed": BITS[1:], "length": 3}),
    "seed_length": (seed_length, {"length": 3}),
    "rounding_bound": (rounding_bound, {"length": 3}),
    "verification_hash": (verification_hash, {"key": BITS, "seed": bytes(32), "bits": 50}),
    "respond": (Cascade().respond, {"key": BITS, "error_rate": 0.02}),
    "correct": (
        lambda **given: next(Cascade().correct(**given), None),
        {"key": BITS, "error_rate": 0.02},
    ),
    "binary_entropy": (binary_entropy, {"probability": 0.1}),
    "mean_upper": (mean_upper, {"seen": 3, "total": 9, "failure": 0.1}),
    "mean_lower": (mean_lower, {"seen": 3, "total": 9, "failure": 0.1}),
    "trials_upper": (trials_upper, {"heads": 3, "failure": 0.1}),
    "unseen_errors": (unseen_errors, {"unseen": 50, "sample": 9, "seen": 1, "failure": 0.1}),
    "gain": (asymptotic.gain, {"channel": GYS, "mean_photons": 0.5}),
    "error_rate": (asymptotic.error_rate, {"channel": GYS, "mean_photons": 0.5}),
    "infinite_decoy": (asymptotic.infinite_decoy, {"channel": GYS}),
    "decoy_bounds": (
        asymptotic.decoy_bounds,
        {"channel": GYS, "signal": 0.5, "decoy": 0.1, "second": 0.0},
    ),
}
ODD: tuple[Any, ...] = (
    *(None, "", "x", b"x", True, 0, -1, 10**400, 0.5, 1e300, float("nan"), float("inf"), 1j),
    *([], [0.1], [None], ["x"], [0.1] * 4, [[0.1], [0.1, 0.2]], (0.5, 0.5, 0.5), {}, {"x": 1}),
    *(np.array([]), np.array([[0.1]]), np.array(["x"]), np.float32("nan"), np.int64(-5)),
    *(np.array(0.5), np.bool_(True), np.datetime64("2020-01-01"), np.ma.masked, range(2)),
    *(ec.SECP256R1(), object, lambda: 1),
)
NOTHING = Channel(receiver_efficiency=0.0, dark_count_probability=0.0, misalignment=0.0)
WRONG = Channel(
    receiver_efficiency=1.0,
    dark_count_probability=0.5,
    misalignment=1.0,
    afterpulse_probability=1.0,
)


@pytest.mark.parametrize("name", sorted(CALLS))
def test_whatever_is_given_for_an_argument_is_taken_or_refused(name: str) -> None:
    """Each argument of each call, with each odd value: a result, or one typed error."""
    call, good = CALLS[name]
    refused = 0
    for argument in good:
        odd = (*ODD, NOTHING, WRONG) if isinstance(good[argument], Channel) else ODD
        for value in odd:
            try:
                call(**{**good, argument: value})
            except (ConfigError, LinkError) as error:
                refused += bool(str(error))
            except Exception as error:
                raise AssertionError(f"{name}({argument}={value!r})") from error
    assert refused > len(good)


@pytest.mark.parametrize(
    "wrong", [2 * BITS, BITS.astype(float), BITS.reshape(2, 4), "10110100", -BITS.astype(int), None]
)
def test_what_is_no_array_of_bits_is_not_hashed(wrong: Any) -> None:
    for call in (
        lambda: compress(wrong, BITS[1:], 3),
        lambda: compress(BITS, wrong, 3),
        lambda: verification_hash(wrong, bytes(32), 50),
        lambda: Cascade().respond(wrong, 0.02),
    ):
        with pytest.raises(ConfigError, match="takes an array of bits, each 0 or 1"):
            call()
    with pytest.raises(ConfigError):
        next(Cascade().correct(wrong, 0.02))
    for same in (BITS.tolist(), BITS.astype(bool), BITS.astype(int), np.repeat(BITS, 2)[::2]):
        assert (compress(same, BITS[1:], 3) == compress(BITS, BITS[1:], 3)).all()
        assert compress(same, BITS[1:], 3).dtype == np.uint8


def test_counts_that_cannot_be_are_refused() -> None:
    assert Counts(**COUNTS) == Counts(
        **{name: np.array(values) for name, values in COUNTS.items()}  # type: ignore[arg-type]
    )
    for name, values in COUNTS.items():
        for wrong in (values[:2], (*values, 1.0), (), (-1.0, *values[1:]), (1e40, *values[1:])):
            with pytest.raises(ConfigError, match=r"number|wrong bits"):
                Counts(**{**COUNTS, name: wrong})
    with pytest.raises(ConfigError, match="more wrong bits"):
        Counts(**{**COUNTS, "test_errors": (9e4 + 1.0, 0.0, 0.0)})


def test_tables_are_refused_with_what_to_do(tmp_path: Path) -> None:
    plots = pytest.importorskip("hybridkex.link.plots")

    class Table(list[Any]):
        """Iterates over the names of its columns, as those of pandas and polars do."""

    table = Table(["distance_km", "rate"])
    for call in (scan, plots.plot_scan, lambda rows: write_scan(tmp_path / "x.csv", rows)):
        for rows in (table, {"distance_km": [1.0]}, [1, 2], None, "rows"):
            with pytest.raises(ConfigError, match="to_dict"):
                call(rows)


def test_numbers_of_numpy_become_pythons(tmp_path: Path) -> None:
    """So that they compare, are written to files and have one digest."""
    chosen = LIM.at(np.float32(3.0))
    assert type(chosen.channel.distance_km) is float
    source = Transmitter(
        intensities=np.array([0.5, 0.2]),  # type: ignore[arg-type]
        probabilities=[0.7, 0.3],  # type: ignore[arg-type]
        key_basis_probability=0.9,
    )
    assert source == PRESETS["rusca2018"].transmitter
    path = tmp_path / "a.npz"
    write_measured(path, Measured(basis=[0, 1], bit=[1, 0], intensity=[0, 1]), chosen)
    assert read_measured(path)[1].parameters == LIM.at(3.0).parameters | {"efficiency": 1.1}
    rows = [{"a": np.int64(1), "b": np.float32(0.5), "c": np.arange(2), "d": None}]
    for suffix in (".json", ".csv"):
        write_scan(tmp_path / f"x{suffix}", rows)
        assert read_scan(tmp_path / f"x{suffix}") == [{"a": 1, "b": 0.5, "c": "[0, 1]", "d": None}]
    for value in (1j, object()):
        with pytest.raises(ConfigError, match="column 'a'"):
            write_scan(tmp_path / "x.json", [{"a": value}])
    seeds = (np.int64(5), 5.0, 5)
    runs = [scan([{**POINT, "block_bits": 1e4}], blocks=1, seed=seed) for seed in seeds]
    assert runs[0] == runs[1] == runs[2]


def test_alices_detections_are_not_taken_for_bobs() -> None:
    alice = Measured(basis=[0, 1] * 600, bit=[1, 0] * 600, intensity=[0] * 1200)
    settings = LinkSettings(preset=PRESETS["rusca2018"], decoy_check="off")
    with pytest.raises(ConfigError, match="not Bob's"):
        distil(alice, alice, settings)
    for wrong in (
        lambda: distil(alice.bit, alice, settings),  # type: ignore[arg-type]
        lambda: distil(alice, alice, PRESETS["rusca2018"]),  # type: ignore[arg-type]
        lambda: write_measured("x.npz", alice, settings),  # type: ignore[arg-type]
    ):
        with pytest.raises(ConfigError, match="takes a"):
            wrong()


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
