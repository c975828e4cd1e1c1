"""The models of docs/models, run by ProVerif and Spin where they are installed."""

import importlib.util
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

MODELS = Path(__file__).parents[2] / "docs" / "models"


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("models_run", MODELS / "run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


run = _load()

# Less than a second each on a quiet core: a proof and its attack from each family.
QUICK = {
    "one-name ONLY_PSK DEPENDENT_KEYS",
    "one-name ONLY_PSK DEPENDENT_KEYS DROP_ID_IN_IMPORT",
    "secrecy-qkd ONLY_PSK BEFORE_ECDH BEFORE_MLKEM BEFORE_SIGNATURES",
    "secrecy-qkd ONLY_PSK AFTER_ECDH AFTER_MLKEM AFTER_QKD",
    "update-agrees",
    "update-recovers THIEF_LISTENS BEFORE_MLKEM BEFORE_QKD",
    "update-recovers THIEF_LISTENS DROP_EXCHANGE",
}


def _need(*tools: str) -> None:
    for tool in tools:
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed: {run.HOW_TO_GET.get(tool, tool)}")


@pytest.mark.parametrize(
    "wanted",
    [
        pytest.param(r, marks=() if r.name in QUICK else pytest.mark.slow, id=r.name)
        for r in run.RUNS
    ],
)
def test_proverif(wanted: Any) -> None:
    _need("proverif")
    assert run.as_expected(wanted, said := run.verify(wanted)), said


@pytest.fixture(scope="module")
def verifiers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    _need("spin", "gcc")
    directory = tmp_path_factory.mktemp("spin")
    run.build_verifiers(directory)
    return directory


@pytest.mark.parametrize("wanted", run.SEARCHES, ids=lambda s: s.name)
def test_spin(verifiers: Path, wanted: Any) -> None:
    assert run.search(verifiers, wanted), wanted.says


def test_the_quick_runs_exist() -> None:
    assert {r.name for r in run.RUNS} >= QUICK


def test_each_claim_has_a_proof_and_a_control() -> None:
    for claim in run.CLAIMS:
        assert any(not r.control for r in claim.runs), claim.name
        assert any(r.control for r in claim.runs), claim.name


def test_the_cases_that_decide_all() -> None:
    """Each of the 81 cases follows from one that is run: it is weaker than a safe one, or stronger
    than one that is lost."""

    def readable(t: dict[str, int]) -> bool:
        return run.all_known(t) or t["QKD"] == t["SIGNATURES"] == run.BEFORE

    chosen = run.deciding(run.LEGS, readable)
    assert len(chosen) < 10
    for case in run.all_times(run.LEGS):
        if readable(case):
            assert any(readable(c) and all(c[k] <= case[k] for k in case) for c in chosen)
        else:
            assert any(not readable(c) and all(case[k] <= c[k] for k in case) for c in chosen)


def test_switches() -> None:
    source = "#if A B\na\n#elif C\nc\n#ifnot D\nnot d\n#endif\n#else\nelse\n#endif\n(* QUERIES *)\n"
    expand = run.expand
    assert expand(source, ["B"], "q").split() == ["a", "q"]
    assert expand(source, ["C"], "q").split() == ["c", "not", "d", "q"]
    assert expand(source, ["C", "D"], "q").split() == ["c", "q"]
    assert expand(source, [], "q").split() == ["else", "q"]
    with pytest.raises(ValueError, match="#endif"):
        expand("#if A\n", [])


def test_every_switch_is_in_its_model() -> None:
    for r in run.RUNS:
        words = set((MODELS / r.model).read_text().split())
        assert set(r.switches) <= words, r.name


def test_the_table_has_every_claim() -> None:
    text = (MODELS / "README.md").read_text()
    for claim in run.CLAIMS:
        assert f"`{claim.name}`" in text
