"""Progress of a transfer, on a terminal and elsewhere."""

import io
import random
import re
from collections import Counter
from typing import NamedTuple

import pytest

from hybridkex.cli.progress import showing


class Sent(NamedTuple):
    path: tuple[str, ...]
    size: int


class Screen(io.StringIO):
    def __init__(self, *, is_terminal: bool) -> None:
        super().__init__()
        self._is_terminal = is_terminal

    def isatty(self) -> bool:
        return self._is_terminal


def alike(number: int) -> Sent:
    """A file whose name looks like the others' on a screen, where a long one is shortened."""
    return Sent(("a" * 160, f"{number}", "b" * 160), 1000 + number)


@pytest.mark.parametrize("is_terminal", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_files_of_any_names_in_any_order(
    monkeypatch: pytest.MonkeyPatch, is_terminal: bool, seed: int
) -> None:
    """Files that overlap and are shown alike, that fail before they begin, and whose last data move
    after they have failed: each has its own line at the end."""
    screen = Screen(is_terminal=is_terminal)
    monkeypatch.setattr("sys.stderr", screen)
    choice = random.Random(seed)
    files = [alike(number) for number in range(8)]
    ended: Counter[str] = Counter()
    with showing("sent", lambda: 0, lambda: 10_000) as progress:
        for file in files:
            progress.begin(file, 0)
        calls = [(call, file) for call in ("advance", "end", "advance") for file in files]
        choice.shuffle(calls)
        for call, file in calls:
            if call == "advance":
                progress.advance(file, 10)
            else:
                outcome = choice.choice([None, "the disk is full"])
                progress.end(file, outcome)
                ended[outcome or f"{file.size:,} bytes"] += 1
        progress.end(Sent(("never begun",), 1), "gone")
        progress.stored(files)
        progress.note("a word")
    text = re.sub(r"\s+", "", screen.getvalue())
    for outcome, count in ended.items():
        ours = re.sub(r"\s+", "", outcome)
        assert text.count(ours) >= count, outcome
    for file in files:
        assert f"{file.size:,}bytes" in text
    assert "neverbegun:gone" in text
