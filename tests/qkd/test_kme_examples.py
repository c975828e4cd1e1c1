"""The files for those who run KMEs: they fit the program, and each other."""

import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from forked import Forkserver
from prometheus_client.parser import text_string_to_metric_families

from hybridkex.kme.config import load_config
from hybridkex.kme.metrics import KmeMetrics

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "kme"


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
        assert "POSTGRES_USER" not in database["environment"], "it would be a superuser"
        assert "./role.sql:/docker-entrypoint-initdb.d/role.sql:ro" in database["volumes"]
        for number in (1, 2):
            one = services[f"kme-{site}-{number}"]
            assert f"/sites/kme-{site}/kme.toml" in one["command"]
            assert one["networks"]["between"]["aliases"] == [f"kme-{site}"]
            assert one["healthcheck"]["test"][-1].endswith(":9464/readyz')")
        assert config.peer[0].url == f"https://kme-{'b' if site == 'a' else 'a'}:8443"
    assert load_config(tmp_path / "kme-a" / "kme.toml").metrics is not None


def steps(instruction: str) -> list[list[str]]:
    """The words of each instruction of this kind in the Containerfile."""
    text = (FOLDER / "Containerfile").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [line.split()[1:] for line in lines if line.split()[0] == instruction]


def test_the_image_has_what_it_needs_and_no_more() -> None:
    """What is copied out of the checkout is what the package is built from; and nothing else is."""
    copied = [words[:-1] for words in steps("COPY") if not words[0].startswith("--from")]
    sources = {one.rstrip("/") for words in copied for one in words}
    assert all((ROOT / one).exists() for one in sources)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    hatch = project["tool"]["hatch"]
    readme = hatch["metadata"]["hooks"]["fancy-pypi-readme"]["fragments"]
    needed = {
        "pyproject.toml",
        *project["project"]["license-files"],
        *(one["path"] for one in readme),
        *hatch["build"]["targets"]["wheel"]["packages"],
    }
    assert sources == needed | {"examples/kme/make_sites.py"}
    assert hatch["version"]["path"].split("/")[0] in sources


def test_the_image_has_the_files_that_compose_names(hybridkex: Forkserver) -> None:
    """Every path in the image is one that a step creates, and every command is one of ours."""
    copied = {words[-1] for words in steps("COPY")}
    [entry] = steps("ENTRYPOINT")
    assert json.loads(" ".join(entry)) == ["hybridkex"]
    [[user]] = steps("USER")
    [number] = [words[words.index("--uid") + 1] for words in steps("RUN") if "useradd" in words]
    [[path]] = steps("ENV")
    assert path == "PATH=/opt/hybridkex/bin:$PATH"
    assert "/opt/hybridkex" in copied
    services = loaded("compose.yaml")["services"]
    setup = services["setup"]["command"][0]
    assert user in " ".join(words[-1] for words in steps("RUN"))
    assert f"chown -R {number} /sites" in setup
    assert set(re.findall(r"/opt/hybridkex/\S+", setup)) <= copied
    for service in services.values():
        if service["image"] == "hybridkex-kme" and "entrypoint" not in service:
            refused = hybridkex.run(*service["command"])
            assert service["command"][2].encode() in refused.stderr, "the options are right"
            assert refused.stderr.count(b"\n") == 1


def test_the_unit(tmp_path: Path, hybridkex: Forkserver) -> None:
    text = (FOLDER / "hybridkex-kme@.service").read_text()
    for words in re.findall(r"^ExecStart(?:Pre)?=/usr/local/bin/hybridkex (.*)$", text, re.M):
        refused = hybridkex.run(*words.replace("%i", "1").split())
        assert b"/etc/hybridkex/kme.toml" in refused.stderr, "the options are right"
    assert re.search(r"^ExecStart=.* --metrics \S+%i ", text, re.M), "each process has its own port"
    assert re.search(r"^StartLimitIntervalSec=0$", text, re.M), "it is started until it can serve"
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed: apt install systemd")
    unit = tmp_path / "hybridkex-kme@.service"
    unit.write_text(text.replace("/usr/local/bin/hybridkex", "/bin/true"))
    checked = subprocess.run(
        ["systemd-analyze", "verify", tmp_path / "hybridkex-kme@1.service"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    said = [line for line in checked.stderr.splitlines() if "hybridkex" in line]
    assert said == []
