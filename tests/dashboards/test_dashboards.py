"""The dashboards: built by their builder, complete, and right.

Right means: a real Prometheus, with the example configuration, scrapes the hub, to which a manager in a Ray actor
reports a fleet with known faults, and every query of every panel and every variable gives what these faults imply; and
again when the manager is gone; and again when the hub is gone as well.
"""

from __future__ import annotations

import json
import math
import re
import time
from pathlib import Path

import build
import pytest
import ray
from support.clusters import WITH_ENGINEFSM
from support.engines import held_within, kill, wait_until
from support.known_faults import Manager
from support.servers import monitoring
from support.standin_fleet import StandInFleet

from enginefsm.cli import dashboard_files
from enginefsm.export import hub
from enginefsm.fsm.states import Reason

TESTS = Path(__file__).parents[1]
GRAFANA = TESTS.parent / "dashboards" / "grafana"
DASHBOARDS = {path.name: json.loads(path.read_text()) for path in sorted(GRAFANA.glob("*.json"))}
PANELS = {
    (name, panel["title"]): panel
    for name, dashboard in DASHBOARDS.items()
    for panel in dashboard["panels"]
    if panel["type"] != "row"
}
QUERIES = {
    (*place, target.get("refId", "A")): target for place, panel in PANELS.items() for target in panel["targets"]
}  # fmt: skip


def test_the_committed_dashboards_are_what_the_builder_builds():
    assert {name: (GRAFANA / name).read_text() for name in DASHBOARDS} == build.build()


@pytest.mark.parametrize("place", PANELS, ids=": ".join)
def test_each_panel_says_what_it_shows_and_in_what_unit(place):
    panel = PANELS[place]
    assert panel["title"]
    assert len(panel["description"]) > 20
    assert panel["fieldConfig"]["defaults"]["unit"]
    assert panel["datasource"]["uid"] == "${datasource}"


@pytest.mark.parametrize("dashboard", DASHBOARDS)
def test_no_title_is_used_twice_and_no_panel_covers_another(dashboard):
    panels = DASHBOARDS[dashboard]["panels"]
    assert len({panel["title"] for panel in panels}) == len(panels)
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for at in (panel["gridPos"] for panel in panels)
        for x in range(at.get("x", 0), at.get("x", 0) + at["w"])
        for y in range(at.get("y", 0), at.get("y", 0) + at["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24


@pytest.mark.parametrize("dashboard", DASHBOARDS)
def test_each_dashboard_can_be_narrowed_by_data_source_run_model_worker_type_and_node(dashboard):
    names = [variable["name"] for variable in DASHBOARDS[dashboard]["templating"]["list"]]
    assert names == ["datasource", "run", "model", "worker_type", "node"]


# The fleet with known faults.

GLM = {"run": "glm", "model": "tiny"}
REGULAR = {**GLM, "worker_type": "regular"}


def about(seconds, up_to=300):
    """An age that began so many seconds before the faults were made, and has grown since."""
    return lambda value: seconds - 1 <= value <= seconds + up_to


def not_ready(engine, state, reason, for_s, worker_type="regular", node="n2"):
    return {
        "run": "glm", "model": "tiny", "worker_type": worker_type, "engine": engine, "state": state,
        "node": node, "incarnation": "1", "actor_id": f"{engine}-1", **({"reason": reason} if reason else {}),
    }, about(for_s)  # fmt: skip


def step(from_state, to_state, reason, times):
    labels = {"to_state": to_state, "reason": reason}
    return ({"from_state": from_state, **labels} if from_state else labels), times


STEPS = [
    step("", "launching", "adopted", 12), step("launching", "ready", "init_succeeded", 4),
    step("launching", "unavailable", "actor_unavailable", 3), step("unavailable", "ready", "recovered", 1),
    step("unavailable", "dead", "retry_exhausted", 1), step("launching", "dead", "actor_died", 1),
    step("launching", "dead", "out_of_memory", 1), step("launching", "dead", "constructor_failed", 1),
    step("launching", "dead", "init_failed", 1), step("ready", "dead", "released", 1),
]  # fmt: skip


def buckets(bounds, upper_bounds):
    """What is counted below each bound of a histogram: cumulative, as Prometheus has it."""
    return [({"le": le}, sum(bound <= float(le) for bound in upper_bounds)) for le in bounds]


def launch_buckets(*took_s):
    bounds = "1.0 2.0 5.0 10.0 20.0 30.0 60.0 120.0 180.0 300.0 600.0 900.0 1200.0 1800.0 2700.0 3600.0 +Inf"
    return buckets(bounds.split(), took_s)


def outage_buckets(*took_s):
    bounds = "0.1 0.25 0.5 1.0 2.0 5.0 10.0 20.0 30.0 60.0 120.0 300.0 600.0 +Inf"
    return buckets(bounds.split(), took_s)


def timeline(states):
    codes = {"r": 1, "l": 2, "u": 3, "d": 4}
    return [({"run": "glm", "engine": engine}, codes[state]) for engine, state in states.items()]


IS_HEARD_OF = lambda value: 0 <= value < 110  # noqa: E731  an age; of 120 s on, it would be absent

# What each query gives: labels, and the value, or what holds of it. Of a query over time, the last value of a line;
# of bars and heatmaps the sum over the whole time. Nothing else may come.
BRINGUP = {
    ("Bringup", "A"): [(GLM, 0)],
    ("Ready", "A"): [({}, 4 / 11)],
    ("Engines ready", "A"): [({}, 4)],
    ("Launching", "A"): [({}, 1)],
    ("Unavailable", "A"): [({}, 1)],
    ("Dead", "A"): [({}, 5)],
    ("Given up", "A"): [({}, 1)],
    ("Expected", "A"): [({}, 11)],
    ("Monitor", "A"): [({"run": "glm"}, 1)],
    ("Last heard of", "A"): [({"run": "glm"}, IS_HEARD_OF)],
    ("States of the engines", "A"): timeline(
        {"e0": "r", "e1": "r", "e2": "r", "e3": "r", "e4": "l", "e5": "d", "e6": "d", "e7": "u", "p0": "d", "d0": "d",
         "d1": "d", "gone": "l"}
    ),
    ("Engines by state", "A"): [
        ({"state": "ready"}, 4), ({"state": "launching"}, 1), ({"state": "unavailable"}, 1), ({"state": "dead"}, 5),
    ],
    ("Not ready", "A"): [
        not_ready("e4", "launching", None, 200),
        not_ready("e7", "unavailable", "actor_unavailable", 45),
        not_ready("e5", "dead", "retry_exhausted", 30),
        not_ready("e6", "dead", "actor_died", 20),
        not_ready("p0", "dead", "out_of_memory", 20, "prefill", "n3"),
        not_ready("d0", "dead", "constructor_failed", 20, "decode", "n3"),
        not_ready("d1", "dead", "init_failed", 20, "decode", "n3"),
    ],
    ("Launch time", "A"): launch_buckets(10.1, 10.1, 50, 100, 100),
    ("Launch time so far", "A"): [({}, lambda s: 30 < s <= 60)],
    ("Launch time so far", "B"): [({}, lambda s: 60 < s <= 120)],
    ("Launch time so far", "C"): [({}, 120)],
    ("Time to replace", "A"): launch_buckets(160),
    ("Time to replace so far", "A"): [({}, lambda s: 120 < s <= 180)],
    ("Time to replace so far", "B"): [({}, lambda s: 120 < s <= 180)],
    ("Time to replace so far", "C"): [({}, 180)],
    ("Transitions", "A"): STEPS,
    ("Transitions so far", "A"): STEPS,
    ("Outages", "A"): outage_buckets(12, 120.1),
    ("Outages so far", "A"): [({}, 20)],
    ("Outages so far", "B"): [({}, lambda s: 120 < s <= 300)],
    ("Outages so far", "C"): [({}, 300)],
    ("Outcomes of calls", "A"): [
        ({"method": "init", "outcome": "succeeded"}, 5), ({"method": "init", "outcome": "actor_unavailable"}, 4),
        ({"method": "init", "outcome": "actor_died"}, 1),
    ],
    ("Re-awaits", "A"): [
        ({"method": "init", "result": "answered"}, 1), ({"method": "init", "result": "unavailable"}, 1),
    ],
    ("Given up so far", "A"): [
        ({"reason": "retry_exhausted"}, 1), ({"reason": "launch_deadline"}, 0), ({"reason": "health_checks_failed"}, 0),
    ],
    ("Probes", "A"): [({"result": "actor_unavailable"}, lambda s: 0.25 < s <= 0.5)],
    ("Health checks", "A"): [
        ({"actor": "answered", "server": "serves"}, 5), ({"actor": "silent", "server": "serves"}, 3),
        ({"actor": "answered", "server": "fails"}, 2),
    ],
    ("Verdicts held", "A"): [({"why": "kill_cap"}, 2), ({"why": "mass_outage"}, 0)],
    ("Time since the last heartbeat", "A"): [({"run": "glm"}, IS_HEARD_OF)],
    ("Exporters", "A"): [({"sink": "hub"}, 2)],
    ("Exporters", "B"): [({"sink": "hub"}, 3)],
    ("Versions", "A"): [({"run": "glm", "version": str, "ray_version": str}, 1)],
}  # fmt: skip

QWEN = {"run": "qwen", "model": "tiny"}
RUNS = {
    ("Runs alive", "A"): [({}, 2)],
    ("Engines", "A"): [({}, 13)],
    ("Ready", "A"): [({}, 6 / 13)],
    ("Dead", "A"): [({}, 5)],
    ("Given up", "A"): [({}, 1)],
    ("Runs", "A"): [(GLM, 0), (QWEN, 2)],
    ("Runs", "B"): [(GLM, 11), (QWEN, 2)],
    ("Runs", "C"): [(GLM, 4), (QWEN, 2)],
    ("Runs", "D"): [(GLM, 1), (QWEN, 0)],
    ("Runs", "E"): [(GLM, 1), (QWEN, 0)],
    ("Runs", "F"): [(GLM, 5), (QWEN, 0)],
    ("Runs", "G"): [(GLM, 1), (QWEN, 0)],
    ("Runs", "H"): [(GLM, IS_HEARD_OF), (QWEN, IS_HEARD_OF)],
    ("Runs", "I"): [(GLM, 1), (QWEN, 1)],
    ("Ready, by run", "A"): [({"run": "glm"}, 4 / 11), ({"run": "qwen"}, 1)],
    ("Engines, by run", "A"): [({"run": "glm"}, 11), ({"run": "qwen"}, 2)],
    ("Deaths", "A"): [
        ({"run": "glm", "reason": reason}, 1)
        for reason in ("retry_exhausted", "actor_died", "out_of_memory", "constructor_failed", "init_failed")
    ],
    ("Outages", "A"): [({"run": "glm", "reason": "actor_unavailable"}, 3)],
    ("Launch time, by run", "A"): [({"run": "glm"}, lambda s: 30 < s <= 60), ({"run": "qwen"}, lambda s: 2 < s <= 5)],
    ("Exporters, by run", "A"): [({"run": "glm"}, 2), ({"run": "qwen"}, 0)],
    ("Exporters, by run", "B"): [({"run": "glm"}, 3), ({"run": "qwen"}, 0)],
}  # fmt: skip


def alerts(hub_lives):
    """What fires on the fleet's faults; on engines that live, only until their monitor is absent, or the hub is."""

    def alert(name, severity, **labels):
        return {
            "alertname": f"Enginefsm{name}",
            "severity": severity,
            "alertstate": "firing",
            "run": "glm",
            **labels,
        }, 1

    def engine(name, severity, engine, worker_type="regular", **labels):
        return alert(name, severity, model="tiny", worker_type=worker_type, engine=engine, **labels)

    lasting = [
        engine("RetryExhausted", "critical", "e5", reason="retry_exhausted"),
        engine("EngineDead", "critical", "e5"),
        engine("EngineDead", "critical", "e6"),
        engine("EngineDead", "critical", "p0", "prefill"),
        engine("EngineDead", "critical", "d0", "decode"),
        engine("EngineDead", "critical", "d1", "decode"),
        alert("ExportErrors", "warning", sink="hub"),
        alert("EventsDropped", "warning", sink="hub"),
    ]
    living = [
        engine("EngineUnavailable", "warning", "e7"),
        engine("LaunchSlow", "warning", "e4"),
        alert("VerdictsHeld", "critical", why="kill_cap"),
    ]
    return lasting + (living if hub_lives else [])


def all_of(text):
    """The values of the variables at which a dashboard opens, `run` being the one that is chosen."""
    return {"run": text, "model": ".*", "worker_type": ".*", "node": ".*"}


class Watched:
    """A Prometheus as a dashboard asks it."""

    def __init__(self, server):
        self.server = server
        self.began_s = time.time()

    def ask(self, target, chosen):
        """[(labels, value)] of a panel's query, the bars and the heatmaps summed up."""
        expr = self.fill_in(target["expr"], chosen)
        if target.get("instant"):
            return self.server.instant(expr)
        end_s = time.time()
        found = self.server.over(expr, end_s - math.ceil(end_s - self.began_s), end_s, 1)
        summed = "offset 1s" in expr
        return [(labels, sum(v for _, v in points) if summed else points[-1][1]) for labels, points in found]

    def fill_in(self, expr, chosen):
        for name, value in {**chosen, "__range": f"{int(time.time() - self.began_s) + 1}s", "__interval": "1s"}.items():
            expr = re.sub(rf"\${name}\b", value, expr)
        assert "$" not in expr.replace('"$1"', ""), expr
        return expr

    def choices(self, variable, chosen):
        """What a variable offers: `label_values(selector, label)` as Grafana understands it."""
        selector, label = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["definition"]).groups()
        selector = self.fill_in(selector, chosen)
        return self.server.api(f"label/{label}/values", **{"match[]": selector, "start": self.began_s})


def assert_gives(ask, expected):
    """That `ask()` gives what is expected; a machine that is busy may cost Prometheus a scrape, and all its values."""
    found = {}

    def gives():
        found.clear()
        found.update(differences(ask(), expected))
        return not found

    assert held_within(20, gives), found


def differences(found, expected):
    """What came and was not expected, and the other way round."""
    found = [({k: v for k, v in labels.items() if k != "__name__"}, value) for labels, value in found]
    missing = []
    for labels, value in expected:
        match = next((one for one in found if same_labels(one[0], labels) and same_value(one[1], value)), None)
        if match is None:
            missing.append((labels, value))
        else:
            found.remove(match)
    return {"missing": missing, "unexpected": found} if missing or found else {}


def same_labels(found, expected):
    return found.keys() == expected.keys() and all(v is str or found[k] == v for k, v in expected.items())


def same_value(found, expected):
    return bool(expected(found)) if callable(expected) else math.isclose(found, expected, abs_tol=1e-9)


@pytest.fixture(scope="module")
def watched(clusters, tmp_path_factory):
    """The hub before a real Prometheus, and a manager's two runs: `glm` with faults, `qwen` without."""
    directory = tmp_path_factory.mktemp("watched")
    dashboard_files.write(directory)
    clusters.use(PYTHONPATH=WITH_ENGINEFSM)
    file_sd = directory / "hub.json"
    running = hub.start(hub.HubSettings(file_sd=str(file_sd)))
    try:
        with monitoring(directory, directory / "examples", file_sd) as (server, _):
            seen = Watched(server)
            seen.hub, seen.manager = running, ray.remote(num_cpus=0)(Manager).remote()
            server.wait_for('up{job="enginefsm"} == 1')
            ray.get(seen.manager.launch.remote())
            server.wait_for('enginefsm_engine_state{run="glm", engine="gone", state="launching"} == 1')
            ray.get(seen.manager.fail.remote())
            server.wait_for('enginefsm_transitions_total{run="glm", reason="released"} == 1')  # the last that happens
            server.wait_for('enginefsm_monitor_info{run="qwen"}')
            yield seen
    finally:
        ray.kill(running)


@pytest.fixture(
    scope="module", params=["while its manager lives", "after its manager is gone", "after the hub is gone too"]
)
def fleet(request, watched):
    """The same at three times, in this order."""
    watched.hub_lives = "hub" not in request.param
    if request.param == "after its manager is gone":
        kill(watched.manager)
        watched.server.wait_for(f'timestamp(up{{job="enginefsm"}}) > {time.time()}')
    elif not watched.hub_lives:
        ray.kill(watched.hub)
        watched.server.wait_until_gone("enginefsm_monitor_heartbeat_timestamp_seconds")
    return watched


def test_every_query_of_every_panel_is_held_to_what_it_must_give():
    expected = {("bringup.json", *key) for key in BRINGUP} | {("runs.json", *key) for key in RUNS}
    assert set(QUERIES) - expected == {("runs.json", "Alerts", "A"), ("runs.json", "Firing", "A")}
    assert expected - set(QUERIES) == set()


@pytest.mark.parametrize("key", BRINGUP, ids=" ".join)
def test_a_query_of_a_bringup_gives_what_its_faults_imply(fleet, key):
    target = QUERIES["bringup.json", *key]
    assert_gives(lambda: fleet.ask(target, all_of("glm")), BRINGUP[key])


@pytest.mark.parametrize("key", RUNS, ids=" ".join)
def test_a_query_over_all_runs_gives_what_their_faults_imply(fleet, key):
    target = QUERIES["runs.json", *key]
    assert_gives(lambda: fleet.ask(target, all_of(".*")), RUNS[key])


def test_the_alerts_that_fire_are_those_that_the_faults_imply(fleet):
    shown, counted = (QUERIES["runs.json", title, "A"] for title in ("Alerts", "Firing"))

    def firing():
        every, ((_, count),) = (fleet.ask(query, all_of(".*")) for query in (shown, counted))
        # One of them waits for a minute, which may have passed.
        some = [one for one in every if one[0]["alertname"] != "EnginefsmFleetDegraded"]
        return [*some, ({"counted": str(count == len(every))}, count)]

    assert_gives(firing, [*alerts(fleet.hub_lives), ({"counted": "True"}, lambda _: True)])


def test_the_alert_on_a_dead_engine_says_why_it_died(fleet):
    reasons = {"e5": "retry_exhausted", "e6": "actor_died", "p0": "out_of_memory", "d0": "constructor_failed",
               "d1": "init_failed"}  # fmt: skip

    def told():
        return {
            one["labels"]["engine"]: re.findall("The reason is ([a-z_]+)\\.", one["annotations"]["description"])
            for one in fleet.server.api("alerts")["alerts"]
            if one["labels"]["alertname"] == "EnginefsmEngineDead"
        }

    wait_until(lambda: told() == {engine: [reason] for engine, reason in reasons.items()}, 20, "the alerts")


def test_what_happened_before_the_first_scrape_is_counted_once(fleet):
    steps = [step("", "launching", "adopted", 2), step("launching", "ready", "init_succeeded", 2)]
    shown, launches = (QUERIES["bringup.json", title, "A"] for title in ("Transitions", "Launch time"))
    assert_gives(lambda: fleet.ask(shown, all_of("qwen")), steps)
    assert_gives(lambda: fleet.ask(launches, all_of("qwen")), launch_buckets(4.1, 4.1))


@pytest.mark.parametrize("dashboard", DASHBOARDS)
def test_each_variable_offers_what_there_is(fleet, dashboard):
    variables = {one["name"]: one for one in DASHBOARDS[dashboard]["templating"]["list"]}
    offers = {
        name: fleet.choices(variables[name], all_of("glm")) for name in ("run", "model", "worker_type", "node")
    }  # fmt: skip
    assert offers == {
        "run": ["glm", "qwen"], "model": ["tiny"], "worker_type": ["decode", "prefill", "regular"],
        "node": ["n1", "n2", "n3"],
    }  # fmt: skip
    assert variables["datasource"]["query"] == "prometheus"


@pytest.mark.parametrize(
    ("chosen", "title", "expected"),
    [
        ({"node": "n1"}, "Engines ready", [({}, 4)]),
        ({"node": "(n1|n2)"}, "Dead", [({}, 2)]),
        ({"node": "n3", "worker_type": "decode"}, "Dead", [({}, 2)]),
        ({"node": "n1"}, "Given up", [({}, 0)]),
        ({"node": "n1"}, "Engines by state",
         [({"state": "ready"}, 4), *(({"state": s}, 0) for s in ("launching", "unavailable", "dead"))]),
        ({"node": "n1"}, "Not ready", []),
        ({"worker_type": "prefill"}, "Not ready", [not_ready("p0", "dead", "out_of_memory", 20, "prefill", "n3")]),
        ({"model": "other"}, "Transitions so far", []),
    ],
)  # fmt: skip
def test_a_choice_narrows_what_is_shown(fleet, chosen, title, expected):
    assert_gives(lambda: fleet.ask(QUERIES["bringup.json", title, "A"], all_of("glm") | chosen), expected)


@pytest.mark.ray
def test_a_fleet_of_a_thousand_shows_what_is_not_ready_and_the_rest_as_counts(tmp_path):
    dashboard_files.write(tmp_path)
    targets = tmp_path / "targets"
    targets.mkdir()
    big = StandInFleet("big")
    for number in range(1000):
        big.launch(f"e{number:03}", s_ago=30, node=f"n{number // 8}")
    shown, counted = (QUERIES["bringup.json", title, "A"] for title in ("States of the engines", "Engines by state"))
    with monitoring(tmp_path, tmp_path / "examples", targets) as (server, _), big.served(targets):
        seen = Watched(server)
        all_launching = 'count(enginefsm_engine_state{state="launching"} == 1) == 1000'
        server.wait_for(all_launching)
        launching = [({"state": "launching"}, 1000), *(({"state": s}, 0) for s in ("ready", "unavailable", "dead"))]
        assert_gives(lambda: seen.ask(counted, all_of("big")), launching)
        assert_gives(lambda: seen.ask(shown, all_of("big")), [])
        for number in range(990):
            big.step(f"e{number:03}", Reason.INIT_SUCCEEDED)
        for number in range(3):
            big.step(f"e{number:03}", Reason.ACTOR_UNAVAILABLE)
        for number in range(990, 995):
            big.step(f"e{number:03}", Reason.ACTOR_DIED)
        server.wait_for('count(enginefsm_engine_state{state="dead"} == 1) == 5')
        codes = [(range(3), 3), (range(990, 995), 4), (range(995, 1000), 2)]
        rows = [({"run": "big", "engine": f"e{number:03}"}, code) for numbers, code in codes for number in numbers]
        assert_gives(lambda: seen.ask(shown, all_of("big")), rows)
        counts = [
            ({"state": "ready"}, 987), ({"state": "launching"}, 5),
            ({"state": "unavailable"}, 3), ({"state": "dead"}, 5),
        ]  # fmt: skip
        assert_gives(lambda: seen.ask(counted, all_of("big")), counts)


@pytest.mark.ray
def test_an_engine_that_was_replaced_on_another_node_is_shown_where_it_was_last(tmp_path):
    dashboard_files.write(tmp_path)
    targets = tmp_path / "targets"
    targets.mkdir()
    fleet = StandInFleet("moved")
    fleet.launch("e0", s_ago=50, node="old")
    fleet.step("e0", Reason.ACTOR_DIED)
    table = QUERIES["bringup.json", "Not ready", "A"]

    def rows():
        found = [labels for labels, _ in seen.ask(table, all_of("moved"))]
        return {(row["engine"], row["node"], row["incarnation"], row["state"]) for row in found}

    with monitoring(tmp_path, tmp_path / "examples", targets) as (server, _):
        seen = Watched(server)
        with fleet.served(targets):
            server.wait_for("enginefsm_engine_info")
            wait_until(lambda: rows() == {("e0", "old", "1", "dead")}, 20, "the engine")
            fleet.launch("e0", incarnation=2, node="new")
            server.wait_for('enginefsm_engine_info{incarnation="2"}')
            wait_until(lambda: rows() == {("e0", "new", "2", "launching")}, 20, "the replacement")
        server.wait_until_gone("enginefsm_monitor_heartbeat_timestamp_seconds")
        assert rows() == {("e0", "new", "2", "launching")}
