"""The generated parts of ``docs/interop.md``, each between two comments."""

from pathlib import Path
from typing import Final

__all__ = ["DOCS", "part_of", "put_into"]

DOCS: Final = Path(__file__).parents[1] / "docs"


def part_of(page: Path, name: str) -> str:
    """Return the text between the comments of a part.

    Raises:
        ValueError: the page does not have them.
    """
    return _split(page, name)[1].strip()


def put_into(page: Path, name: str, part: str) -> None:
    """Replace the text of a part.

    Raises:
        ValueError: the page has no such part.
    """
    before, _, after = _split(page, name)
    page.write_text(f"{before}\n\n{part.strip()}\n\n{after}", encoding="utf-8")


def _split(page: Path, name: str) -> tuple[str, str, str]:
    begin, end = f"<!-- {name}: generated -->", f"<!-- {name}: end -->"
    before, found, rest = page.read_text(encoding="utf-8").partition(begin)
    part, ended, after = rest.partition(end)
    if not found or not ended:
        raise ValueError(f"{page} has no part {name!r}")
    return before + begin, part, end + after
