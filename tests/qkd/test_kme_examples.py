"""The files for those who run KMEs: they fit the program, and each other."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from forked import Forkserver
from prometheus_client.parser import text_string_to_metric_families

from hybridkex.kme.config import load_config
from hybridkex.kme.metrics import KmeMetrics

FOLDER = Path(__file__).parents[2] / "examples" / "kme"


def metric_names() -> set[str]:
    families = text_string_to_metric_families(KmeMetrics().text().decode())
    return {
        family.name + suffix
        for family in families
        for suffix in {"counter": ["_total"], "histogram": ["_bucket"]}.get(family.type, [""])
    }


def loaded(name: str) -> Any:
    yaml = pytest.importorskip("yaml")
    return yaml.safe_load((FOLDER / name).read_text())


def test_dashboard_and_alerts_name_metrics_that_exist() -> None:
    board = json.loads((FOLDER / "dashboard.json").read_text())
    shown = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    alerts = [rule["expr"] for rule in loaded("alerts.yaml")["groups"][0]["rules"]]
    assert len(alerts) >= 8
    names = metric_names()
    for expression in (*shown, *alerts):
        used = set(re.findall(r"hybridkex_\w+", expression))
        assert used <= names, expression
        assert expression.count("(") == expression.count(")")
    assert len({re.findall(r"hybridkex_\w+", one)[0] for one in shown}) >= 12


def test_compose_has_two_sites_of_two_processes(tmp_path: Path) -> None:
    services = loaded("compose.yaml")["services"]
    subprocess.run([sys.executable, FOLDER / "make_sites.py", tmp_path], check=True)
    for site in ("a", "b"):
        [config] = load_config(tmp_path / f"kme-{site}" / "kme.toml").kme
        database = services[f"postgres-{site}"]
        assert f"@postgres-{site}/kme" in config.store.url.reveal().decode()  # type: ignore[union-attr]
        assert database["environment"]["POSTGRES_USER"] == "kme"
        for number in (1, 2):
            one = services[f"kme-{site}-{number}"]
            assert f"/sites/kme-{site}/kme.toml" in one["command"]
            assert one["networks"]["between"]["aliases"] == [f"kme-{site}"]
            assert one["healthcheck"]["test"][-1].endswith(":9464/readyz')")
        assert config.peer[0].url == f"https://kme-{'b' if site == 'a' else 'a'}:8443"
    assert load_config(tmp_path / "kme-a" / "kme.toml").metrics is not None


def test_the_unit(tmp_path: Path, hybridkex: Forkserver) -> None:
    text = (FOLDER / "hybridkex-kme@.service").read_text()
    for words in re.findall(r"^ExecStart(?:Pre)?=/usr/local/bin/hybridkex (.*)$", text, re.M):
        refused = hybridkex.run(*words.split())
        assert b"/etc/hybridkex/kme.toml" in refused.stderr, "the options are right"
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd is not installed")
    unit = tmp_path / "hybridkex-kme@.service"
    unit.write_text(text.replace("/usr/local/bin/hybridkex", "/bin/true"))
    checked = subprocess.run(
        ["systemd-analyze", "verify", tmp_path / "hybridkex-kme@1.service"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    said = [line for line in checked.stderr.splitlines() if "hybridkex" in line]
    assert said == []
