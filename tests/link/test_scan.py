"""Scans: the same rows wherever they are computed, files, pictures."""

import contextlib
import io
import itertools
import logging
import math
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from waiting import until

from hybridkex.cli import main
from hybridkex.cli.actions import qkd_scan
from hybridkex.cli.actions.qkd_scan import dask_executor
from hybridkex.errors import ConfigError, LinkError, LocalStateError
from hybridkex.link import quantum
from hybridkex.link.measured import Measured, read_measured, write_measured
from hybridkex.link.optimise import optimise
from hybridkex.link.plots import plot_scan, save
from hybridkex.link.presets import PRESETS, preset
from hybridkex.link.ranges import PICTURES
from hybridkex.link.scan import (
    COLUMNS,
    ERROR,
    LIMITS,
    SETTINGS,
    SUFFIXES,
    evaluate,
    grid,
    read_scan,
    scan,
    write_scan,
)

MISSING = [] if find_spec("pyarrow") else ["parquet"]
POINTS = grid({"preset": ["lim2014", "rusca2018"], "distance_km": [10, 60, 400]})
SMALL = grid({"preset": ["rusca2018"], "distance_km": [5, 20], "block_bits": [20_000]})


def test_rows_are_those_of_the_optimiser() -> None:
    row = evaluate({"preset": "rusca2018", "distance_km": 50})
    chosen = PRESETS["rusca2018"]
    best = optimise(
        chosen.channel.at(50),
        key_detections=1e6,
        f=chosen.efficiency,
        intensities=2,
        security=chosen.security,
    )
    assert best is not None
    # The scan also counts what a link announces beside parities, and rounds intensities.
    assert row["rate"] == pytest.approx(best.rate, rel=1e-3)
    assert row["loss_db"] == pytest.approx(10)
    assert row["bit_per_s"] == pytest.approx(row["rate"] * 1e9)


def test_points_without_key_have_a_rate_of_zero() -> None:
    rows = scan(POINTS)
    assert [row["rate"] > 0 for row in rows] == [True, True, False] * 2
    assert all(set(COLUMNS) <= set(row) for row in rows)


OF_A_BLOCK = ("qber", "phase_error", "leak_bits", "seconds")
OF_BLOCKS = ("blocks_made", "blocks_aborted")
DARK = {"receiver_efficiency": 0, "dark_count_probability": 0, "tuned": False}
TINY = {"preset": "rusca2018", "distance_km": 0, "block_bits": 1000, "tuned": False}


@pytest.mark.parametrize(
    ("point", "blocks", "unknown"),
    [
        ({"distance_km": 400}, 0, OF_A_BLOCK + OF_BLOCKS),
        ({"distance_km": 400}, 1, OF_A_BLOCK + OF_BLOCKS),
        (DARK, 0, OF_A_BLOCK + OF_BLOCKS),
        ({**TINY, "eve": "intercept"}, 0, OF_BLOCKS),
        ({**TINY, "eve": "intercept"}, 2, OF_A_BLOCK[:-1]),
        ({"preset": "lim2014"}, 0, OF_BLOCKS),
    ],
)
def test_no_number_stands_for_what_is_not_known(
    point: dict[str, Any], blocks: int, unknown: tuple[str, ...], tmp_path: Path
) -> None:
    row = evaluate(point, blocks=blocks)
    assert {name for name in COLUMNS if row[name] is None} == set(unknown)
    if row["rate"] == 0:
        assert (row["bit_per_s"], row["secret_bits"]) == (0, 0)
    if "blocks_made" not in unknown:
        assert row["blocks_made"] + row["blocks_aborted"] == blocks
    other = evaluate({"distance_km": 50})
    for suffix in SUFFIXES if "parquet" not in MISSING else SUFFIXES[::2]:
        write_scan(tmp_path / f"x{suffix}", [row, other])
        again = read_scan(tmp_path / f"x{suffix}")
        assert {name for name in COLUMNS if again[0][name] is None} == set(unknown)
        for name in set(OF_A_BLOCK) & set(unknown):
            lines = plot_scan(again, x="distance_km", y=name)[1].lines
            assert [one for line in lines for one in line.get_ydata()] == [other[name]]


def test_any_setting_may_vary() -> None:
    points = grid(
        {
            "misalignment": [0.005, 0.03],
            "intensities": [[0.5, 0.2, 2e-4]],
            "secrecy": [1e-9],
            "tuned": [False],
        }
    )
    rows = scan(points)
    assert rows[0]["qber"] < rows[1]["qber"]
    for wrong in ({"colour": [1]}, {"distance_km": range(10**6), "block_bits": [1, 2]}):
        with pytest.raises(ConfigError, match=r"unknown setting|at most"):
            grid(wrong)
    with pytest.raises(ConfigError, match="has no setting"):
        evaluate({"brightness": 0.1})
    with pytest.raises(ConfigError, match="laser"):
        evaluate({"preset": "bbm92", "eve": "pns"})


def test_limits_of_the_protocol_may_vary() -> None:
    """They are columns only of a scan that varies them."""
    fixed = {"preset": ["rusca2018"], "distance_km": [5], "block_bits": [20_000]}
    strict, loose = scan(grid({**fixed, "max_qber": [0.005, 0.2]}))
    assert strict["rate"] == 0 < loose["rate"]
    assert not set(LIMITS) & set(evaluate({}))
    rows = scan(grid({**fixed, "eve": ["split:0.5"], "decoy_check": ["full", "off"]}), blocks=1)
    assert [row["blocks_made"] for row in rows] == [0, 1]
    rows = scan(grid({**fixed, "eve": ["split:0.5"], "tolerance": [0.1, 0.999]}), blocks=1)
    assert [row["blocks_made"] for row in rows] == [0, 1]
    for wrong in ({"max_qber": 0.6}, {"tolerance": 1}, {"decoy_check": "some"}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            evaluate(wrong)


def test_eve_shows_in_a_scan() -> None:
    rows = scan(grid({"eve": [None, "intercept:0.05", "pns", "intercept"], "tuned": [False]}))
    assert rows[0]["rate"] > rows[1]["rate"] > 0
    assert rows[2]["rate"] == rows[3]["rate"] == 0
    assert rows[3]["qber"] > 0.2


def test_simulated_blocks_agree_with_closed_forms() -> None:
    points = grid({"preset": ["rusca2018"], "distance_km": [10], "block_bits": [100_000]})
    expected, simulated = scan(points)[0], scan(points, blocks=2, seed=1)[0]
    assert simulated["blocks_made"] == 2
    assert simulated["rate"] == pytest.approx(expected["rate"], rel=0.15)
    assert simulated["qber"] == pytest.approx(expected["qber"], rel=0.15)
    assert scan(points, blocks=2, seed=1) == [simulated]
    assert scan(points, blocks=2, seed=2) != [simulated]


def test_the_same_seed_gives_the_same_rows_whichever_party_runs_first() -> None:
    """Eve is found at the first bytes: the light of the block ends at the same moment each time."""
    usual = {"preset": ["rusca2018"], "distance_km": [0.0], "tuned": [False]}
    points = grid(usual | {"block_bits": [1000], "eve": ["tamper:0", "tamper:1", "mitm"]})
    first, *others = (scan(points, blocks=2, seed=1) for _ in range(6))  # trio's order is random
    assert all(row["seconds"] > 0 for row in first)
    assert all(rows == first for rows in others)


def test_many_processes_give_the_same_rows() -> None:
    here = scan(SMALL, blocks=1, seed=3)
    told: list[int] = []
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        assert scan(SMALL, blocks=1, seed=3, executor=pool, progress=told.append) == here
    assert told == list(range(1, len(SMALL) + 1))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_dask_cluster_gives_the_same_rows_though_a_worker_dies() -> None:
    distributed = pytest.importorskip("distributed")
    points = grid({"preset": ["rusca2018"], "distance_km": [10.0 * n for n in range(8)]})
    here = scan(points, seed=3)
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None
    ) as cluster:
        workers = [one.pid for one in cluster.workers.values()]
        for one in cluster.workers.values():
            one.auto_restart = False
        killed: list[int] = []

        def kill(done: int) -> None:
            if done == 3:
                os.kill(workers[0], signal.SIGKILL)
                killed.append(workers[0])

        with dask_executor(cluster.scheduler_address) as executor:
            assert scan(points, seed=3, executor=executor, progress=kill) == here
    assert killed


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_dask_cluster_that_ends_in_the_middle_is_one_line() -> None:
    distributed = pytest.importorskip("distributed")
    points = grid({"preset": ["rusca2018"], "distance_km": [1.0 * n for n in range(100)]})
    heard = io.StringIO()
    handler = logging.StreamHandler(heard)
    log = logging.getLogger("distributed.client")
    log.addHandler(handler)
    try:
        with (
            distributed.LocalCluster(
                n_workers=1, threads_per_worker=1, processes=False, dashboard_address=None
            ) as cluster,
            pytest.raises(LocalStateError, match="lost the scan"),
            dask_executor(cluster.scheduler_address) as executor,
        ):
            scan(points, executor=executor, progress=lambda _: end(cluster, log))
    finally:
        log.removeHandler(handler)
    assert heard.getvalue() == ""


def end(cluster: Any, log: logging.Logger) -> None:
    """End a cluster, and have Dask's client log the error, as it does when a connection breaks."""
    log.error("the connection is lost", exc_info=ConnectionRefusedError())
    cluster.close()


@pytest.mark.filterwarnings("ignore")
def test_a_dask_cluster_without_workers_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    distributed = pytest.importorskip("distributed")
    monkeypatch.setattr(qkd_scan, "WORKER_SECONDS", 0.2)
    with (
        distributed.LocalCluster(n_workers=0, processes=False, dashboard_address=None) as cluster,
        dask_executor(cluster.scheduler_address) as executor,
    ):
        said = capsys.readouterr().err
        assert "has no workers, and the scan waits for them" in said
        assert len(said.splitlines()) == 1
        cluster.scale(1)
        assert scan(POINTS[:1], executor=executor) == scan(POINTS[:1])


def test_no_dask_cluster_is_one_line() -> None:
    pytest.importorskip("distributed")
    with (
        pytest.raises(ConfigError, match="cannot reach the Dask cluster"),
        dask_executor("no-such-scheme://x"),
    ):
        pass


@pytest.mark.parametrize("ending", [".csv", ".json", ".parquet"])
def test_files_there_and_back(tmp_path: Path, ending: str) -> None:
    if ending == ".parquet":
        pytest.importorskip("pyarrow")
    rows = scan(POINTS[:2])
    path = tmp_path / f"scan{ending}"
    write_scan(path, rows)
    again = read_scan(path)
    assert len(again) == 2
    for row, back in zip(rows, again, strict=True):
        assert set(row) == set(back)
        for name, value in row.items():
            assert back[name] == value or (
                isinstance(value, float) and math.isclose(back[name], value)
            ), name


@pytest.mark.parametrize("ending", [".csv", ".json", ".parquet", ".txt"])
def test_files_that_are_no_scans(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"x{ending}"
    with pytest.raises(ConfigError, match="x"):
        read_scan(path)
    path.write_bytes(b"{\xff}")
    with pytest.raises(ConfigError, match="x"):
        read_scan(path)


def test_scan_and_plot_as_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    out, picture = tmp_path / "a.csv", tmp_path / "a.svg"
    vary = ["--vary", "distance_km=0:60:20", "--vary", "preset=rusca2018"]
    assert main(["qkd", "scan", *vary, "-o", str(out)]) == 0
    assert len(read_scan(out)) == 4
    command = ["qkd", "plot", "--scan", str(out), "--by", "preset", "-o", str(picture)]
    assert main(command) == 0
    assert picture.read_text().startswith("<?xml")
    capsys.readouterr()
    for wrong, told in (
        (["qkd", "scan", "--vary", "distance_km", "-o", str(out)], "NAME=VALUES"),
        (["qkd", "scan", "--vary", "distance_km=5:1:1", "-o", str(out)], "ascend"),
        (["qkd", "scan", "--vary", "distance_km=0:9:x", "-o", str(out)], "with numbers"),
        (["qkd", "scan", "-o", str(tmp_path / "a.txt")], ".parquet"),
        (["qkd", "plot", "--scan", str(out), "--y", "beauty", "-o", str(picture)], "no column"),
    ):
        assert main(wrong) != 0
        assert told in capsys.readouterr().err


def test_the_table_of_the_bounds_comes_from_a_scan() -> None:
    """docs/qkd-link-proofs.md has the rates of docs/data/qkd-bounds.csv."""
    docs = Path(__file__).parents[2] / "docs"
    rates = {
        (row["preset"], row["distance_km"], row["block_bits"], row["finite_key"]): row["rate"]
        for row in read_scan(docs / "data/qkd-bounds.csv")
    }
    found = re.findall(
        r"\| `(\w+)`, (\d+) km, (1e\d) \| (\S+) \| (\S+) \| (\d+) % \|",
        (docs / "qkd-link-proofs.md").read_text(),
    )
    assert len(found) == 4
    for name, distance, bits, published, tight, gain in found:
        old, new = (
            rates[name, float(distance), int(float(bits)), kind] for kind in ("published", "tight")
        )
        assert (published, tight) == tuple(f"{one:.2e}".replace("e-0", "e-") for one in (old, new))
        assert int(gain) == round(100 * (new / old - 1))


def test_the_price_of_the_leak_comes_from_a_scan() -> None:
    docs = Path(__file__).parents[2] / "docs"
    both, alice = sorted(row["secret_bits"] for row in read_scan(docs / "data/qkd-leak.csv"))
    found = re.search(
        r"gives (\d+),000 secret bits instead of (\d+),000 \(`docs/data/qkd-leak.csv`",
        (docs / "qkd-link-proofs.md").read_text(),
    )
    assert found is not None
    assert [int(one) for one in found.groups()] == [round(both / 1000), round(alice / 1000)]


@pytest.mark.parametrize(
    "name", ["qkd-rates.csv", "qkd-blocks.csv", "qkd-bounds.csv", "qkd-leak.csv"]
)
def test_the_pictures_of_the_documentation_come_from_scans(name: str, thorough: bool) -> None:
    """docs/data has what the commands of the page write; a few rows are computed again, all with
    ``--thorough``."""
    docs = Path(__file__).parents[2] / "docs"
    rows = read_scan(docs / "data" / name)
    page = (docs / "qkd-link.md").read_text()
    command = re.search(rf"^hybridkex qkd scan (.*) -o docs/data/{name}$", page, re.MULTILINE)
    assert command is not None
    given = command[1].removeprefix("--vary ").split(" --vary ")
    points = grid(dict(map(qkd_scan._values, given)))
    assert [{name: row[name] for name in points[0]} for row in rows] == points
    # Where a curve ends the search is at its hardest.
    others = sorted(set(points[0]) - {"distance_km"})
    curves = sorted(rows, key=lambda row: ([str(row[one]) for one in others], row["distance_km"]))
    ends = [row for row, after in itertools.pairwise(curves) if row["rate"] and not after["rate"]]
    few = rows if thorough else rows[:: max(1, len(rows) // 2)]
    for row in [*few, *ends]:
        names = ("preset", "distance_km", "block_bits", "finite_key", "leak")
        point = {name: row[name] for name in names}
        again = evaluate(point)
        assert again["rate"] == pytest.approx(row["rate"], rel=5e-4)


def processes_of(leader: int) -> list[int]:
    """The processes of a session that run, but for its leader."""
    found = []
    for place in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            number = int(place.name)
            ended = "Z" in (place / "stat").read_text().rpartition(")")[2].split()[0]
            if os.getsid(number) == leader != number and not ended:
                found.append(number)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["worker", signal.SIGTERM, signal.SIGINT])
def test_a_scan_on_many_processes_that_is_killed(tmp_path: Path, fault: Any) -> None:
    """One line if a worker is killed, as the system does for want of memory; and no worker, and no
    half file, outlives the command, whatever ends it."""
    command = [sys.executable, "-m", "hybridkex", "qkd", "scan", "--jobs", "2", "--blocks", "9"]
    command += ["--vary", "distance_km=0:99:1", "-o", str(tmp_path / "rows.csv")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, start_new_session=True) as running:
        until(lambda: len(processes_of(running.pid)) >= 3)  # a tracker of resources and two workers
        time.sleep(0.5)
        if fault == "worker":
            os.kill(max(processes_of(running.pid)), signal.SIGKILL)
        else:
            # A terminal sends Ctrl-C to all of them.
            send = os.killpg if fault == signal.SIGINT else os.kill
            send(running.pid, fault)
        _, said = running.communicate(timeout=60)
        assert running.returncode != 0
        until(lambda: not processes_of(running.pid))
    assert b"Traceback" not in said
    if fault == signal.SIGTERM:
        assert said == b""  # nor a warning of multiprocessing's own process
    if fault == "worker":
        assert said.startswith(b"hybridkex: something ended a process of the scan")
        assert len(said.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", [*SETTINGS])
@pytest.mark.parametrize("value", ["a:b", math.inf, math.nan, True, [1, "a"], None, {}])
def test_a_setting_of_the_wrong_type(name: str, value: Any) -> None:
    """Refused, or a value that the setting has: never a traceback, never a rate of zero."""
    if (name, value) in (("eve", None), ("tuned", True)):
        assert evaluate({name: value})["rate"] > 0
        return
    with pytest.raises(ConfigError):
        evaluate({name: value})


@pytest.mark.parametrize(
    "point",
    [
        {"secrecy": 1e-300},
        {"dead_time_s": 1e300},
        {"efficiency": 0},
        {"block_bits": 1},
        {"block_bits": 10**30},
        {"dark_count_probability": 1},
        {"key_basis_probability": 0.5},
        {"intensities": [0.5, 0.2, 0.0]},
        {"preset": "bbm92", "brightness": 0.1},
    ],
)
def test_a_setting_that_cannot_be_is_refused_and_makes_no_row(point: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        evaluate(point)


@pytest.mark.parametrize("name", ["lim2014", "bbm92"])
def test_a_link_without_detections_has_a_rate_of_zero(name: str) -> None:
    point = {"preset": name, "receiver_efficiency": 0, "dark_count_probability": 0}
    for chosen in (True, False):
        assert evaluate({**point, "tuned": chosen})["rate"] == 0


def test_numbers_of_processes_without_bound_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hybridkex.cli.actions.qkd_scan.ProcessPoolExecutor", None)
    command = ["qkd", "scan", "--vary", "distance_km=5", "-o", str(tmp_path / "x.csv"), "--jobs"]
    for jobs in (4 * (os.cpu_count() or 1) + 1, 5000, 10**9):
        assert main([*command, str(jobs)]) == 1
        assert "--jobs 0 starts one for each" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("again", ["distance_km=7", "distance_km=5", "distance_km=0:10:5"])
def test_a_setting_that_varies_twice_is_refused(
    again: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["qkd", "scan", "--vary", "distance_km=5", "--vary", "preset=lim2014"]
    assert main([*command, "--vary", again, "-o", str(tmp_path / "x.csv")]) == 1
    assert "--vary distance_km is given twice" in capsys.readouterr().err


def test_true_for_another_value_is_told_what_the_setting_takes() -> None:
    for name, kind in (("distance_km", "a number"), ("preset", "a word"), ("tuned", "true or")):
        with pytest.raises(ConfigError, match=f"{name} takes {kind}"):
            evaluate({name: 1 if name == "tuned" else True})


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_a_place_that_cannot_be_written_to_is_found_before_the_work(
    jobs: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def no_work(*args: object, **more: object) -> None:
        raise AssertionError("it works for nothing")

    monkeypatch.setattr("hybridkex.cli.actions.qkd_scan.scan", no_work)
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    for output in ("a.csv", str(tmp_path / "missing" / "a.csv")):
        command = ["qkd", "scan", "--vary", "distance_km=0:50:25", "--jobs", jobs, "-o", output]
        assert main(command) == 1
        assert f"cannot write {output}: No such file" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", [".csv", ".json"])
def test_files_that_went_through_a_spreadsheet(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"x{suffix}"
    rows = [{"preset": "lim2014", "rate": 0.5}, {"preset": "bbm92", "rate": 0.25}]
    write_scan(path, rows)
    written = path.read_bytes()
    for content in (written, b"\xef\xbb\xbf" + written, written.replace(b"\n", b"\r\n")):
        path.write_bytes(content)
        assert read_scan(path) == rows
    path.write_bytes(written.decode().encode("utf-16"))
    with pytest.raises(ConfigError, match="save it as UTF-8"):
        read_scan(path)
    path.write_text("rate,rate\n1,2\n" if suffix == ".csv" else '[{"rate": 1, "rate": 2}]')
    with pytest.raises(ConfigError, match="same name"):
        read_scan(path)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("blocks", [0, 1])
def test_an_impossible_point_has_a_row_that_says_why_and_the_scan_goes_on(
    suffix: str, blocks: int, tmp_path: Path
) -> None:
    axes = {
        "preset": ["bbm92", "lim2014", "lim2015"],
        "eve": ["pns", None, 5],
        "block_bits": [20_000, -1],
        "tuned": [False],
        "distance_km": [0.0],
    }
    rows = scan(grid(axes), blocks=blocks)
    good = [row for row in rows if ERROR not in row]
    assert [(row["preset"], row["eve"], row["block_bits"]) for row in good] == [
        ("bbm92", None, 20_000),
        ("lim2014", "pns", 20_000),
        ("lim2014", None, 20_000),
    ]
    assert rows[0][ERROR].startswith("preset=bbm92, eve=pns, block_bits=20000")
    assert rows[0]["rate"] is None
    path = tmp_path / f"x{suffix}"
    write_scan(path, rows)
    again = read_scan(path)
    assert [row["rate"] for row in again] == [row["rate"] for row in rows]
    assert [row.get(ERROR) for row in again] == [row.get(ERROR) for row in rows]
    plot_scan(again, x="block_bits", y="seconds", by=["preset"])
    with pytest.raises(ConfigError, match=r"preset=bbm92, eve=pns, tuned=False: .*not pairs"):
        scan(grid({"preset": ["bbm92"], "eve": ["pns"], "tuned": [False]}), blocks=blocks)


@pytest.mark.parametrize(
    ("point", "blocks"),
    [
        *(({"eve": eve}, n) for eve in ("nonsense", "", "split:2", "tamper:x", 5) for n in (0, 1)),
        ({"eve": "tamper:0"}, 0),
        ({"eve": "mitm"}, 0),
        ({"eve": "pns", "preset": "bbm92"}, 0),
        ({"eve": "pns", "preset": "bbm92"}, 1),
        ({"correctness": 1e-100}, 0),
        ({"block_bits": 536_870_912}, 0),
    ],
)
def test_an_impossible_point_is_refused_where_no_key_is_made_too(
    point: dict[str, Any], blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_work(*args: object, **more: object) -> None:
        raise AssertionError("it is known before the search")

    monkeypatch.setattr("hybridkex.link.scan.tuned", no_work)
    with pytest.raises(ConfigError):
        evaluate({"distance_km": 900, **point}, blocks=blocks)


def test_wrong_values_are_empty_and_change_no_type_of_a_column(tmp_path: Path) -> None:
    wrong: dict[str, list[Any]] = {
        "distance_km": [math.nan, math.inf, "fifty", True],
        "block_bits": [1e300, 0.5, "many", 10**30],
        "eve": [5, True],
        "tuned": [1, "maybe"],
        "preset": [5, None],
        "misalignment": ["x", math.nan, [1]],
        "intensities": [0.5, "x", [math.nan]],
    }
    right = {"tuned": False, "misalignment": 0, "intensities": [0.5, 0.2, 2e-4]}
    points = [right, *({**right, name: one} for name, values in wrong.items() for one in values)]
    rows = scan(points)
    assert [ERROR in row for row in rows] == [False] + [True] * (len(points) - 1)
    assert {row[name] for row in rows for name in row if name in wrong} <= {
        None, 50.0, 1_000_000, False, "lim2014", (0.5,), (0.5, 0.2, 2e-4),
    }  # fmt: skip
    tables = []
    for suffix in SUFFIXES if "parquet" not in MISSING else SUFFIXES[::2]:
        write_scan(tmp_path / f"x{suffix}", rows)
        write_scan(tmp_path / f"y{suffix}", rows[:1])
        tables.append([{ERROR: None, **row} for row in read_scan(tmp_path / f"x{suffix}")])
    assert all(table == tables[0] for table in tables)
    if "parquet" not in MISSING:
        from pyarrow import parquet

        whole, good = (parquet.read_schema(tmp_path / f"{name}.parquet") for name in "xy")
        assert [one for one in whole if one.name != ERROR] == list(good)


def test_a_column_of_parquet_has_one_type_in_all_files(tmp_path: Path) -> None:
    """Also where it is empty in all rows, so that files are read together."""
    parquet = pytest.importorskip("pyarrow.parquet")
    schemas = []
    for number, (axes, blocks) in enumerate(
        [
            ({"distance_km": [400.0]}, 0),  # no key
            ({"distance_km": [0.0]}, 0),
            ({"distance_km": [0.0], "eve": ["none", "intercept:1"]}, 1),
        ]
    ):
        path = tmp_path / f"{number}.parquet"
        rows = scan(grid(axes | {"preset": ["rusca2018"], "block_bits": [10_000]}), blocks=blocks)
        write_scan(path, rows)
        assert read_scan(path) == rows
        schemas.append(parquet.read_schema(path))
    assert schemas[0] == schemas[1] == schemas[2]
    assert "null" not in map(str, schemas[0].types)
    for name in ("dead_time_s", "misalignment", "efficiency", "attenuation_db_per_km", "secrecy"):
        for number, values in enumerate([[1], [0, 0.5], [None], [1, None]]):
            path = tmp_path / f"{name}{number}.parquet"
            write_scan(path, [{name: value, "rate": 1} for value in values])
            assert str(parquet.read_schema(path).field(name).type) == "double"


def test_values_of_several_types_in_a_column_lose_no_row(tmp_path: Path) -> None:
    """A column of Parquet has one type, and the computation may have taken hours."""
    pytest.importorskip("pyarrow")
    path, odd = tmp_path / "x.parquet", (1, 0.5, "x", None, True, 10**30, [0.5, 0.2])
    rows = [{"a": one, "b": other, "c": 1.5} for one in odd for other in odd]
    write_scan(path, rows)
    again = read_scan(path)
    assert [row["c"] for row in again] == [1.5] * len(rows)
    assert [row["a"] is None for row in again] == [row["a"] is None for row in rows]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_value_that_is_no_text_loses_no_row(suffix: str, tmp_path: Path) -> None:
    """An argument may have any bytes."""
    path = tmp_path / f"x{suffix}"
    odd = os.fsdecode(b"lim\xff")
    vary = ["--vary", f"preset=lim2014,{odd}", "--vary", "distance_km=0"]
    assert main(["qkd", "scan", *vary, "-o", str(path)]) == 0
    first, second = read_scan(path)
    assert first["rate"] > 0
    assert second["preset"] == r"lim\udcff"
    write_scan(path, [{odd: 1}])
    assert read_scan(path) == [{r"lim\udcff": 1}]


@pytest.mark.parametrize("command", ["scan", "record"])
def test_a_missing_package_is_known_before_the_work(
    command: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setattr("hybridkex.cli.actions.qkd_scan.scan", pytest.fail)
    monkeypatch.setattr("hybridkex.cli.actions.qkd_data.tuned", pytest.fail)
    path = tmp_path / "x.parquet"
    given = {"scan": ["-o", str(path)], "record": ["--parquet", "-o", str(tmp_path / "x")]}
    assert main(["qkd", command, *given[command]]) != 0
    assert "pip install 'hybridkex[parquet]'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("x=1", [1]),
        ("x=0:20:10", [0, 10, 20]),
        ("x = 0:20:10 , 50,70:90:20 ", [0, 10, 20, 50, 70, 90]),
        ("x=lim2014, bbm92", ["lim2014", "bbm92"]),
        ("x= None ,true, 1e5", [None, True, 100_000]),
        ("x=0.5 / 0.2/ 2e-4, 0.4/0.1/0", [[0.5, 0.2, 2e-4], [0.4, 0.1, 0]]),
    ],
)
def test_values_that_vary_are_split_at_commas_first(text: str, values: list[Any]) -> None:
    assert qkd_scan._values(text) == ("x", values)


def test_words_with_a_colon_are_no_range() -> None:
    words = ("intercept:0.1", "split:0.02", "pns", "tamper:9")
    for count in (1, 2, 3):
        for given in itertools.permutations(words, count):
            assert qkd_scan._values(f"eve={','.join(given)}") == ("eve", list(given))


def test_values_without_bound_are_refused() -> None:
    with pytest.raises(ConfigError, match="more than 100,000 values"):
        qkd_scan._values("x=" + ",".join(["0:1:1.1e-5"] * 1000))


def test_a_scan_with_impossible_points_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "X.CSV"
    command = ["qkd", "scan", "--vary", "preset=bbm92,lim2014", "--vary", "eve=pns"]
    assert main([*command, "--vary", "tuned=false", "-o", str(path)]) == 0
    output = capsys.readouterr()
    assert output.out == f"{path}: 2 rows\n"
    assert "because their settings are impossible: 1; " in output.err
    assert "preset=bbm92, eve=pns, tuned=False: " in output.err


@pytest.mark.parametrize("eve", ["intercept", "mitm", "tamper:0", "tamper:30000"])
def test_a_link_that_stops_does_not_end_a_scan(eve: str) -> None:
    """Blocks that are given up use up the authentication key; the link is begun again."""
    point = {"preset": "rusca2018", "distance_km": 0, "block_bits": 1000, "tuned": False}
    rows = scan([{**point, "eve": eve}, point], blocks=12)
    assert rows[0]["blocks_aborted"] == 12
    assert rows[0]["rate"] == 0
    assert rows[1]["seconds"] > 0


@pytest.mark.parametrize("distance", [650, 800, 2000])
@pytest.mark.parametrize("name", ["rusca2018", "bbm92"])
def test_a_distance_at_which_nothing_arrives_has_a_row(name: str, distance: float) -> None:
    point = {"preset": name, "block_bits": 1000, "tuned": False, "dark_count_probability": 0.0}
    rows = scan([{**point, "distance_km": distance}, {**point, "distance_km": 1}], blocks=1)
    assert rows[0]["blocks_aborted"] == 1
    assert rows[0]["rate"] == 0
    assert rows[0]["seconds"] is None  # nobody knows when the light would have ended
    assert rows[1]["seconds"] > 0


@pytest.mark.parametrize("pieces", [1, 2, 3])
def test_the_time_of_light_without_enough_detections_is_not_that_of_its_first_pieces(
    pieces: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, usual = itertools.count(1), quantum.sample

    def sample(*given: Any, **more: Any) -> Any:
        if next(calls) == pieces:
            raise LinkError("nothing arrives any more")
        return usual(*given, **more)

    monkeypatch.setattr(quantum, "PIECE", 500)
    monkeypatch.setattr(quantum, "sample", sample)
    (row,) = scan([TINY], blocks=1)
    assert (row["blocks_aborted"], row["seconds"], row["rate"]) == (1, None, 0)


@pytest.mark.parametrize("ending", [".csv", ".json", ".parquet", ".npz", ".svg", ".png"])
def test_the_ending_of_a_file_may_be_in_capitals(ending: str, tmp_path: Path) -> None:
    for name in (ending.upper(), ending.title()):
        path = tmp_path / f"x{name}"
        if ending in SUFFIXES:
            write_scan(path, [{"rate": 0.5, "preset": "lim2014"}])
            assert read_scan(path) == [{"rate": 0.5, "preset": "lim2014"}]
        if ending in (".npz", ".parquet"):
            bits = np.array([0, 1], dtype=np.uint8)
            write_measured(path, Measured(basis=bits, bit=bits), preset("lim2014"))
            assert (read_measured(path)[0].basis == bits).all()
        if ending in PICTURES:
            save(plot_scan([{"distance_km": 1, "rate": 1}])[0], path)
            assert path.read_bytes()[:5] in (b"<?xml", b"\x89PNG\r")
    other = tmp_path / "x.txt"
    for call in (
        lambda: write_scan(other, []),
        lambda: read_scan(other),
        lambda: read_measured(other),
        lambda: save(plot_scan([{"distance_km": 1, "rate": 1}])[0], other),
    ):
        with pytest.raises(ConfigError, match=r"x.txt: the name of a file with .* must end in \."):
            call()
