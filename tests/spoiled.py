"""Configuration files that cannot be used, made of a good one."""

import json
import os
import random
from collections.abc import Collection
from pathlib import Path

_NUMBERS = random.Random(33)
_PATHS = ("pipe", "folder", "empty", "loop", "huge", "missing", "/dev/zero", "/proc/self/mem")
_PATHS += ("a\0b", "/", "x" * 300, "x/" * 3000, "empty/x")
_VALUES = (
    *('"\\u0000"', "[]", "{}", "{a = 1}", "[[1]]", "1979-05-27", "nan", "-inf", "", "'"),
    *("9" * 5000, "[" * 3000, '"\\ud800"', "-1", "true", '["a", "b"]', "'''"),
)


def spoiled(
    good: str, folder: Path, *, files: Collection[str], harmless: Collection[str]
) -> list[str]:
    """More than 150 files that cannot be used.

    Args:
        good: a file that can be used, with a setting in each line.
        folder: of that file; some things are put there that are no files to be read.
        files: the settings that name a file.
        harmless: settings that may have some of the values that would be wrong elsewhere.
    """
    os.mkfifo(folder / "pipe")
    (folder / "folder").mkdir()
    (folder / "empty").touch()
    (folder / "loop").symlink_to("loop")
    with (folder / "huge").open("wb") as file:
        file.truncate(1 << 40)
    lines, found = good.splitlines(), []
    for number, line in enumerate(lines):
        name, is_setting, _ = line.partition(" = ")
        if not is_setting:
            continue
        if name in files:
            found += [changed(lines, number, json.dumps(path)) for path in _PATHS]
        elif name not in harmless:
            found += [changed(lines, number, value) for value in _VALUES]
        found.append(good.replace(line, f"{line}\n{line}", 1))
        found.append(good.replace(line, f"un{line}", 1))
    found += [
        "\n".join(lines[:number]) + _NUMBERS.choice(['\nx = "', "\n[[[", "\n[listen]\n"])
        for number in range(1, len(lines), 2)
    ]
    return [*found, "", "\0", "\ufeff" * 3, "x" * (17 << 20), "[listen]\n", "grace = 1\n"]


def changed(lines: list[str], number: int, value: str) -> str:
    """The text with another value in a line."""
    name = lines[number].partition(" = ")[0]
    return "\n".join([*lines[:number], f"{name} = {value}", *lines[number + 1 :]])
