"""What is installed with the library: reasons for every lower bound, and a bill of materials."""

import json
import re
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "supply-chain.md").read_text(encoding="utf-8")


def requirements() -> set[str]:
    """Names and lower bounds of the core and of the extras that users install."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    listed = [*project["dependencies"]]
    for extra in extras.keys() - {"test", "dev", "docs"}:
        listed += [one for one in extras[extra] if not one.startswith("hybridkex")]
    return set(listed)


def test_every_lower_bound_has_a_reason() -> None:
    rows = dict(re.findall(r"^\| `([\w-]+>=[\w.]+)` \| (.+) \|$", PAGE, re.MULTILINE))
    assert set(rows) == requirements()
    assert all(len(reason) > 20 for reason in rows.values())


def test_the_core_is_three_packages() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    names = {re.split(r"[>=]", one)[0] for one in project["dependencies"]}
    assert names == {"cryptography", "idna", "trio"}


def test_the_command_makes_a_bill_of_materials(tmp_path: Path) -> None:
    """The page's own command, with this Python's tool and environment.

    It also holds its result to the format's schema, which takes longer than all the rest.
    """
    command = re.search(r"^cyclonedx-py (environment .*) > sbom\.json$", PAGE, re.MULTILINE)
    assert command is not None
    tool = [sys.executable, "-m", "cyclonedx_py"]
    made = subprocess.run(
        [*tool, *command[1].split(), "--no-validate"],
        cwd=ROOT,
        capture_output=True,
        check=False,
        text=True,
    )
    assert made.returncode == 0, made.stderr
    bill = json.loads(made.stdout)
    assert bill["bomFormat"] == "CycloneDX"
    assert bill["metadata"]["component"]["name"] == "hybridkex"
    listed = {one["name"].lower(): one["version"] for one in bill["components"]}
    for name in ("cryptography", "idna", "trio"):
        assert listed[name] == version(name)
