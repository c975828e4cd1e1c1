"""The example runs as it stands."""

import re
import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "examples" / "combine.py"


def test_both_sides_read_each_other() -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLE)], capture_output=True, text=True, timeout=60, check=True
    )
    assert "Alice says: what time is it?" in done.stdout
    assert "Bob says: time for new keys" in done.stdout
    assert re.search(r"QKD key [0-9a-f-]{36}", done.stdout)
