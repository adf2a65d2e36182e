"""The alert rules: their own unit tests, and that they, the dashboards, the runbooks and the exporter agree."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
import yaml
from support.standin_fleet import every_metric

DASHBOARDS = Path(__file__).parents[2] / "dashboards"
RULES = DASHBOARDS / "rules" / "enginefsm.rules.yml"
UNIT_TESTS = sorted((DASHBOARDS / "rules").glob("*_test.yml"))
ALERTS = {
    rule["alert"]: rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]
}  # fmt: skip
EXAMPLES = DASHBOARDS / "examples"


def run(*command):
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def promql_of_the_dashboards():
    for path in (DASHBOARDS / "grafana").glob("*.json"):
        dashboard = json.loads(path.read_text())
        for panel in dashboard["panels"]:
            yield from (target["expr"] for target in panel.get("targets", ()))
        for variable in dashboard["templating"]["list"]:
            yield variable.get("definition", "")


def metrics_in(text):
    return set(re.findall(r"\benginefsm_[a-z_]+", text))


def cases():
    """(alert, time, whether it fires) of every case of the unit tests, in order."""
    for path in UNIT_TESTS:
        for test in yaml.safe_load(path.read_text())["tests"]:
            for case in test.get("alert_rule_test", ()):
                yield case["alertname"], test["name"], bool(case["exp_alerts"])


@pytest.mark.parametrize("path", UNIT_TESTS, ids=lambda path: path.stem)
def test_the_unit_tests_of_the_rules_pass(path):
    assert "SUCCESS" in run("promtool", "test", "rules", path)


@pytest.mark.parametrize("alert", ALERTS)
def test_each_alert_is_tested_to_be_silent_below_its_bound_to_fire_above_it_and_to_resolve(alert):
    of_one_test = {}
    for name, test, fires in cases():
        if name == alert:
            of_one_test.setdefault(test, []).append(fires)
    assert any(course[0] is False and True in course and course[-1] is False for course in of_one_test.values())


def test_the_rules_and_the_examples_are_what_prometheus_and_alertmanager_accept():
    run("promtool", "check", "rules", "--lint=all", "--lint-fatal", RULES)
    run("promtool", "check", "config", EXAMPLES / "prometheus.yml")
    run("amtool", "check-config", EXAMPLES / "alertmanager.yml")


@pytest.mark.parametrize("alert", ALERTS)
def test_each_alert_says_how_bad_what_and_where_to_read_on(alert):
    rule = ALERTS[alert]
    assert rule["labels"]["severity"] in ("critical", "warning")
    assert rule["annotations"]["summary"]
    assert rule["annotations"]["description"]
    page, anchor = rule["annotations"]["runbook_url"].split("#")
    headings = re.findall(r"^## (.+)$", (DASHBOARDS / page).read_text(), re.MULTILINE)
    assert anchor == alert.lower()
    assert alert in headings


def test_the_runbooks_say_for_each_alert_first_what_to_do_with_commands_to_paste_and_then_why():
    sections = re.split(r"^## ", (DASHBOARDS / "runbooks.md").read_text(), flags=re.MULTILINE)[1:]
    assert [section.split("\n", 1)[0] for section in sections] == list(ALERTS)
    for section in sections:
        assert re.findall(r"^\*\*(.+?)\.\*\*", section, re.MULTILINE) == ["Do", "Why"]
        assert "```bash" in section.partition("**Why.**")[0]


def test_rules_and_dashboards_name_only_metrics_that_a_monitor_exports():
    samples = {sample.name for family in every_metric().values() for sample in family.samples}
    named = metrics_in(RULES.read_text()).union(*map(metrics_in, promql_of_the_dashboards()))
    assert named - samples == set()


def test_each_metric_that_a_monitor_exports_is_used_by_a_rule_or_a_dashboard():
    named = metrics_in(RULES.read_text()).union(*map(metrics_in, promql_of_the_dashboards()))
    unused = {
        name
        for name, family in every_metric().items()
        if not named.intersection(sample.name for sample in family.samples)
    }
    assert unused == set()
