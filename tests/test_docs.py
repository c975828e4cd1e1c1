"""What the documentation names exists."""

import re
from functools import cache
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


def test_tests_and_files_that_are_named() -> None:
    missing = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for path, name in re.findall(r"`((?:tests|interop)/[\w/.]+\.py)(?:::(\w+))?`", text):
            if (f"def {name}(" if name else "\n") not in source(path):
                missing.append(f"{page.name}: {path}::{name}")
        for path in re.findall(r"`((?:hybridkex|benchmarks|docs|examples)/[\w/.-]+\.\w+)`", text):
            if not (ROOT / path).is_file():
                missing.append(f"{page.name}: {path}")
    assert missing == []


@cache
def source(path: str) -> str:
    """The text of a file; without one, none."""
    return (ROOT / path).read_text(encoding="utf-8") if (ROOT / path).is_file() else ""


def test_links() -> None:
    missing = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
            if "://" not in target and not (page.parent / target).exists():
                missing.append(f"{page.name}: {target}")
    assert missing == []


def test_the_threat_page_names_tests() -> None:
    text = (ROOT / "docs" / "known-attacks.md").read_text(encoding="utf-8")
    assert len(re.findall(r"`tests/[\w/.]+::\w+`", text)) > 40


def test_git_ignores_the_folders_that_the_pages_have_the_reader_make() -> None:
    """They have private keys in them."""
    pages = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    made = set(re.findall(r"^ *hybridkex (?:dev-ca|kme dev-up) ([a-z]\w*)", pages, re.MULTILINE))
    assert {"keys", "sites"} <= made
    ignored = (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()
    assert {f"/{folder}/" for folder in made} <= set(ignored)


def test_every_page_is_in_the_table_of_contents() -> None:
    contents = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    pages = {page.name for page in ROOT.glob("docs/*.md")} - {"README.md"}
    assert pages <= set(re.findall(r"\]\(([\w-]+\.md)\)", contents))


def test_no_line_of_prose_stands_twice_in_a_row() -> None:
    """A search and replace that went wrong once repeated a paragraph 58 times."""
    for page in PAGES:
        lines = page.read_text(encoding="utf-8").splitlines()
        for line, following in pairwise(lines):
            # Beginnings, since a wrong end may follow each time.
            assert len(line) < 60 or line[0] in " |" or line[:60] != following[:60], (page, line)
