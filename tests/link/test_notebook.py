"""The notebook of the documentation runs, and has been run."""

import asyncio
import contextlib
import importlib.util
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).parents[2] / "docs/qkd-link.ipynb"


def test_the_notebook_runs_and_prints_what_it_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its cells are plain Python. As in a kernel, they run inside a loop of asyncio."""
    pytest.importorskip("IPython")
    notebook = json.loads(NOTEBOOK.read_text())
    monkeypatch.chdir(NOTEBOOK.parent)
    names: dict[str, Any] = {"__name__": "__main__"}

    async def run(source: str) -> None:
        exec(source, names)

    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            with contextlib.redirect_stdout(io.StringIO()) as again:
                asyncio.run(run("".join(cell["source"])))
            streams = [one["text"] for one in cell["outputs"] if one["output_type"] == "stream"]
            text, numbers = parts("".join(part for lines in streams for part in lines))
            assert text
            assert parts(again.getvalue()) == (text, pytest.approx(numbers, rel=0.01))


def test_the_notebook_is_in_the_format_of_notebooks() -> None:
    """By the schema of nbformat, without its modules, which take a second to import."""
    fastjsonschema = pytest.importorskip("fastjsonschema")
    found = importlib.util.find_spec("nbformat")
    if found is None or found.origin is None:
        pytest.skip("nbformat is not installed: pip install nbformat")
    notebook = json.loads(NOTEBOOK.read_text())
    version = f"v{notebook['nbformat']}"
    schema = f"{version}/nbformat.{version}.{notebook['nbformat_minor']}.schema.json"
    validate = fastjsonschema.compile(json.loads((Path(found.origin).parent / schema).read_text()))
    validate(notebook)
    del notebook["cells"][0]["cell_type"]
    with pytest.raises(fastjsonschema.JsonSchemaException):
        validate(notebook)


def parts(text: str) -> tuple[str, list[float]]:
    """The words and the numbers: an optimiser's last digit depends on the machine."""
    number = r"\d+(?:\.\d+)?(?:e[+-]\d+)?"
    return re.sub(number, "#", text), [float(found) for found in re.findall(number, text)]
