"""The notebook of the documentation runs, and has been run."""

import re
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[2] / "docs/qkd-link.ipynb"


def test_the_notebook_runs_and_prints_what_it_shows(tmp_path: Path) -> None:
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    shown = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(shown)
    again = nbformat.read(NOTEBOOK, as_version=4)
    where = {"metadata": {"path": str(NOTEBOOK.parent)}}
    nbclient.NotebookClient(again, timeout=300, kernel_name="python3", resources=where).execute()

    def printed(notebook: "nbformat.NotebookNode") -> list[str]:
        return [
            "".join(output.text for output in cell.outputs if output.output_type == "stream")
            for cell in notebook.cells
            if cell.cell_type == "code"
        ]

    assert all(printed(shown))
    texts, numbers = zip(*map(parts, printed(shown)), strict=True)
    again_texts, again_numbers = zip(*map(parts, printed(again)), strict=True)
    assert again_texts == texts
    for one, other in zip(again_numbers, numbers, strict=True):
        assert one == pytest.approx(other, rel=0.01)


def parts(text: str) -> tuple[str, list[float]]:
    """The words and the numbers: an optimiser's last digit depends on the machine."""
    number = r"\d+(?:\.\d+)?(?:e[+-]\d+)?"
    return re.sub(number, "#", text), [float(found) for found in re.findall(number, text)]
