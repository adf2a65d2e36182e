"""The judgements of `enginefsm doctor`, from facts to findings, without Ray."""

from __future__ import annotations

import dataclasses
import json

import pytest

from enginefsm._ray import versions
from enginefsm.cli.doctor import checks, showing
from enginefsm.cli.doctor.checks import Finding, Verdict, diagnose
from enginefsm.cli.doctor.facts import Cluster, Facts, FileSd, Here, Hub, HubActor, Node

NOW_S = 1_800_000_000.0
URL = "http://10.0.0.1:9400"
HERE = Here("head", "3.11.7", "2.60.0", "0.2.0", 20.0, None)
NODES = (Node("10.0.0.1", "head", True, True), Node("10.0.0.2", "worker", True, False))


def manager(**other):
    return {
        "manager": "m", "host": "head", "pid": 7, "version": "0.2.0", "ray_version": "2.60.0", "python": "3.11.7",
        "silent_link_s": 20.0, "heartbeat_s": NOW_S - 1.2, "heard_s_ago": 1.0, "state": "alive", **other,
    }  # fmt: skip


def fleet(*managers, hub=None, state="alive", engines=()):
    about = {
        "address": URL, "problem": None, "started_s": NOW_S - 60, "pid": 42, "node_ip": "10.0.0.1",
        "enginefsm": "0.2.0", "file_sd": "/tmp/ray/sd.json", **(hub or {}),
    }  # fmt: skip
    run = {"run": "glm", "state": state, "managers": list(managers), "engines": list(engines)}
    return {"version": 1, "now_s": NOW_S, "hub": about, "runs": [run]}


def well(**other):
    facts = Facts(
        HERE,
        cluster=Cluster("10.0.0.1:6379", "2.60.0", "3.11.7", NODES, HubActor("10.0.0.1", 42)),
        hub=Hub(fleet(manager()), NOW_S - 0.01, NOW_S + 0.01, URL),
        metrics="",
        file_sd=FileSd("/tmp/ray/sd.json", True, URL),
        own_group=True,
    )
    return dataclasses.replace(facts, **other)


def hub_of(content):
    return Hub(content, NOW_S - 0.01, NOW_S + 0.01, URL)


def row(facts, check):
    (found,) = [finding for finding in diagnose(facts) if finding.check == check]
    return found


def test_nothing_needs_doing_where_all_is_well():
    assert {finding.verdict for finding in diagnose(well())} == {Verdict.OK}
    assert checks.exit_code_is_ok(diagnose(well()))


REPEATED = {"engine": "e", "max_task_retries": -1}


def metrics(name, value, run="glm"):
    return f'# TYPE enginefsm_{name}_total counter\nenginefsm_{name}_total{{run="{run}",sink="textfile"}} {value}\n'


FAULTS = {
    "another Python at the head": ("versions", {"cluster": dataclasses.replace(well().cluster, python="3.12.1")}),
    "another enginefsm in a monitor": ("versions", {"hub": hub_of(fleet(manager(version="0.1.0")))}),
    "another enginefsm in the hub": ("versions", {"hub": hub_of(fleet(hub={"enginefsm": "0.1.0"}))}),
    "a Ray that is too old": ("tested Ray", {"here": dataclasses.replace(HERE, ray="2.9.0")}),
    "a Ray that is too new": ("tested Ray", {"here": dataclasses.replace(HERE, ray="2.100.0")}),
    "a monitor without keepalive": ("silent links", {"hub": hub_of(fleet(manager(), manager(silent_link_s=420.0)))}),
    "a monitor that turned it off": ("silent links", {"hub": hub_of(fleet(manager(), manager(silent_link_s=-1.0)))}),
    "a hub with a problem": ("hub", {"hub": hub_of(fleet(hub={"problem": "it cannot listen"}))}),
    "a hub that hangs": ("hub", {"hub": None, "hub_problem": "it does not answer"}),
    "a hub that cannot be reached": ("scraping", {"metrics": None, "metrics_problem": "refused"}),
    "a file that is gone": ("file_sd", {"file_sd": FileSd("/tmp/ray/sd.json", False, None)}),
    "a file of another": ("file_sd", {"file_sd": FileSd("/tmp/ray/sd.json", True, "http://10.0.0.9:1")}),
    "an exporter with errors": ("exporters", {"metrics": metrics("export_errors", 3)}),
    "an exporter that dropped events": ("exporters", {"metrics": metrics("events_dropped", 3)}),
    "a clock that is behind": ("clocks", {"hub": Hub(fleet(manager()), NOW_S - 9, NOW_S - 8, URL)}),
    "a monitor's clock that is ahead": ("clocks", {"hub": hub_of(fleet(manager(heartbeat_s=NOW_S + 9)))}),
    "a monitor's clock that is behind": ("clocks", {"hub": hub_of(fleet(manager(heartbeat_s=NOW_S - 60)))}),
    "an engine that Ray repeats": ("retries", {"hub": hub_of(fleet(engines=[REPEATED]))}),
    "no cluster": ("cluster", {"cluster": None, "cluster_problem": "refused", "hub": None}),
}  # fmt: skip


@pytest.mark.parametrize(("check", "change"), FAULTS.values(), ids=FAULTS)
def test_a_fault_is_one_row_with_advice(check, change):
    findings = diagnose(well(**change))
    urgent = [finding for finding in findings if finding.verdict is Verdict.ATTENTION]
    assert check in [finding.check for finding in urgent]
    follows = {"versions"} if check == "tested Ray" else set()  # the head node's Ray is not this one then
    assert {finding.check for finding in urgent} == {check} | follows
    assert all(finding.found and finding.meaning and finding.advice for finding in urgent)
    assert not checks.exit_code_is_ok(findings)


HARMLESS = {
    "an old Ray leaves children": ("children", Verdict.NOTE, {"own_group": False}),
    "a Ray between tested ones": ("tested Ray", Verdict.NOTE, {"here": dataclasses.replace(HERE, ray="2.58.0")}),
    "a run that ended had errors": (
        "exporters", Verdict.OK, {"metrics": metrics("export_errors", 3), "hub": hub_of(fleet(state="stopped"))}
    ),
    "a slow first report": ("clocks", Verdict.OK, {"hub": hub_of(fleet(manager(heartbeat_s=NOW_S - 20)))}),
    "a slow answer": ("clocks", Verdict.OK, {"hub": Hub(fleet(manager()), NOW_S - 20, NOW_S + 0.1, None)}),
    "a hub on another host": (
        "scraping", Verdict.UNKNOWN,
        {"metrics": None, "metrics_problem": "refused", "here": dataclasses.replace(HERE, host="worker")},
    ),
    "a file on another host": ("file_sd", Verdict.UNKNOWN, {"here": dataclasses.replace(HERE, host="worker")}),
    "a hub that writes no file": ("file_sd", Verdict.NOTE, {"file_sd": None}),
    "a hub of a cluster of another Ray": (
        "hub", Verdict.UNKNOWN,
        {"hub": None, "hub_problem": "not asked", "here": dataclasses.replace(HERE, ray="2.57.1")},
    ),
    "a monitor that does not tell": ("silent links", Verdict.OK, {"hub": hub_of(fleet(manager(silent_link_s=None)))}),
}  # fmt: skip


@pytest.mark.parametrize(("check", "verdict", "change"), HARMLESS.values(), ids=HARMLESS)
def test_what_needs_no_doing_is_no_fault(check, verdict, change):
    assert row(well(**change), check).verdict is verdict


def test_the_version_tells_of_children_where_the_hub_is_elsewhere():
    for version, verdict in (("2.47.1", Verdict.NOTE), ("2.55.1", Verdict.NOTE), ("2.57.1", Verdict.OK)):
        cluster = dataclasses.replace(well().cluster, ray=version)
        assert row(well(own_group=None, cluster=cluster), "children").verdict is verdict


def test_a_version_with_letters_is_a_version():
    assert versions.numbers("2.60.0rc1") == (2, 60, 0)
    assert versions.numbers("3.0.0.dev0") == (3, 0, 0)


def test_json_and_text_say_the_same():
    findings = diagnose(well(metrics=None, metrics_problem="no hub answers at \x1b[2J"))
    told = json.loads(showing.as_json(findings))
    assert told["ok"] is False
    text = "\n".join(showing.lines(findings))
    for finding in told["findings"]:
        assert f"{finding['verdict']:9}  {finding['check']}" in text
    assert "\x1b" not in text
    assert text.endswith("Something needs doing: scraping. Not seen from here: exporters.")


def test_a_table_names_advice_in_a_column_of_its_own_where_there_is_room():
    finding = Finding("hub", Verdict.ATTENTION, "gone", "It is gone.", "Start it.")
    assert [column.header for column in showing.table([finding], 80).columns] == [
        "", "check", "found", "meaning, and what to do",
    ]  # fmt: skip
    assert [column.header for column in showing.table([finding], 160).columns][-1] == "what to do"
