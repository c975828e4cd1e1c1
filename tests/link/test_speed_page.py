"""The tables of docs/qkd-link-speed.md are those of the figures in docs/data."""

import json

from benchmarks import qkd_link


def test_the_tables_of_the_speed_page_are_those_of_the_benchmark() -> None:
    page = qkd_link.PAGE.read_text(encoding="utf-8")
    assert qkd_link.with_tables(page, json.loads(qkd_link.FIGURES.read_text())) == page
    assert page.count("| 1%") == 2


def test_small_blocks_end_to_end() -> None:
    found = qkd_link.whole_block(10_000, 0)
    assert found["keys"] == 9
    assert 0 < found["peak_mib"] < 4096
