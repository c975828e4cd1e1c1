"""What the documentation names exists."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tests_and_files_that_are_named(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for path, name in re.findall(r"`((?:tests|interop)/[\w/.]+\.py)(?:::(\w+))?`", text):
        assert (ROOT / path).is_file(), path
        if name:
            source = (ROOT / path).read_text(encoding="utf-8")
            assert re.search(rf"def {name}\(", source), f"{path} has no {name}"
    for path in re.findall(r"`((?:hybridkex|benchmarks|docs|examples)/[\w/.-]+\.\w+)`", text):
        assert (ROOT / path).is_file(), path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_the_threat_page_names_tests() -> None:
    text = (ROOT / "docs" / "known-attacks.md").read_text(encoding="utf-8")
    assert len(re.findall(r"`tests/[\w/.]+::\w+`", text)) > 40


def test_every_page_is_in_the_table_of_contents() -> None:
    contents = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    pages = {page.name for page in ROOT.glob("docs/*.md")} - {"README.md"}
    assert pages <= set(re.findall(r"\]\(([\w-]+\.md)\)", contents))
