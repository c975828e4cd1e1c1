"""The tables of docs/qkd-link-speed.md are those of the figures in docs/data."""

import json

import numpy as np

from benchmarks import qkd_link


def test_the_tables_of_the_speed_page_are_those_of_the_benchmark() -> None:
    page = qkd_link.PAGE.read_text(encoding="utf-8")
    assert qkd_link.with_tables(page, json.loads(qkd_link.FIGURES.read_text())) == page
    assert page.count("| 1%") == 2


def test_small_blocks_end_to_end() -> None:
    """The peak of memory is that of the block, whatever this process has held."""
    held = np.ones(512 << 20, dtype=np.uint8)
    with qkd_link.new_processes(1) as pool:
        found = pool.submit(qkd_link.whole_block, 10_000, 0).result()
    assert found["keys"] == 9
    assert 0 < found["peak_mib"] < 256 < held.nbytes >> 20 < qkd_link.peak_mib()
