"""`enginefsm dashboards`: what it writes, from a source tree and from an installed package, and what it refuses."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from enginefsm.cli.main import main

ROOT = Path(__file__).parents[2]
CARRIED = {
    path.relative_to(ROOT / "dashboards"): path.read_text()
    for path in (ROOT / "dashboards").rglob("*")
    if path.suffix in (".json", ".md", ".yml")
}


def written(directory):
    return {path.relative_to(directory): path.read_text() for path in directory.rglob("*") if path.is_file()}


def test_it_writes_dashboards_rules_their_tests_runbooks_and_examples_and_says_where(tmp_path, capsys):
    out = tmp_path / "not" / "there"
    assert main(["dashboards", "--out", str(out)]) == 0
    assert written(out) == CARRIED
    assert {Path(line).relative_to(out) for line in capsys.readouterr().out.splitlines()} == set(CARRIED)


def test_an_installed_package_writes_the_same(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(
        ROOT, source, symlinks=True, ignore=shutil.ignore_patterns(".*", "build", "*.egg-info", "__pycache__", "tests")
    )
    installed = tmp_path / "installed"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--target", installed, source], check=True)
    shutil.rmtree(source)
    code = "import sys, enginefsm; from enginefsm.cli.main import main; print(enginefsm.__file__); sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", code, "dashboards", "--out", tmp_path / "out"],
        env={"PYTHONPATH": str(installed)}, cwd=tmp_path, check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout.startswith(str(installed))
    assert written(tmp_path / "out") == CARRIED
    assert not list((installed / "enginefsm" / "dashboards").rglob("*.py"))


def test_it_does_not_overwrite_unless_forced(tmp_path, capsys):
    mine = tmp_path / "rules" / "enginefsm.rules.yml"
    mine.parent.mkdir()
    mine.write_text("mine")
    assert main(["dashboards", "--out", str(tmp_path)]) == 2
    refusal = capsys.readouterr().err
    assert str(mine) in refusal
    assert "--force" in refusal
    assert written(tmp_path) == {mine.relative_to(tmp_path): "mine"}
    assert main(["dashboards", "--out", str(tmp_path), "--force"]) == 0
    assert written(tmp_path) == CARRIED


def test_alerts_link_to_where_the_team_reads_its_runbooks(tmp_path):
    assert main(["dashboards", "--out", str(tmp_path), "--runbooks-url", "https://wiki.example/enginefsm"]) == 0
    groups = yaml.safe_load((tmp_path / "rules" / "enginefsm.rules.yml").read_text())["groups"]
    links = [rule["annotations"]["runbook_url"] for group in groups for rule in group["rules"]]
    assert links
    assert all(link.startswith("https://wiki.example/enginefsm#enginefsm") for link in links)


@pytest.mark.parametrize("blocked", ["", "grafana"])
def test_a_place_that_cannot_be_written_to_is_named(tmp_path, capsys, blocked):
    out = tmp_path / "out"
    if blocked:
        out.mkdir()
    (out / blocked).write_text("a file, not a directory")
    assert main(["dashboards", "--out", str(out)]) == 2
    complaint = capsys.readouterr().err
    assert complaint.startswith(f"enginefsm dashboards: cannot write to {out}: ")
    assert complaint.count("\n") == 1


def test_an_installation_without_them_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("enginefsm.cli.dashboard_files._PLACES", (tmp_path / "nothing",))
    assert main(["dashboards", "--out", str(tmp_path / "out")]) == 2
    assert "lacks its dashboards" in capsys.readouterr().err
