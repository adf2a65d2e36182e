"""Builds the Grafana dashboards: `python dashboards/builder/build.py` writes dashboards/grafana/*.json.

Written against the Grafana Foundation SDK as pinned in pyproject.toml. What is asked of Prometheus is in queries.py.
In the classic schema, which every Grafana imports and provisions; the SDK prefers the one that began with Grafana 12.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import queries as q
from grafana_foundation_sdk.builders import (
    bargauge,
    common,
    dashboard,
    heatmap,
    prometheus,
    stat,
    statetimeline,
    table,
    timeseries,
)
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common as common_models
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models.heatmap import HeatmapColorMode
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

OUT = Path(__file__).parents[1] / "grafana"
SOURCE = common_models.DataSourceRef(type_val="prometheus", uid="${datasource}")

GREEN, BLUE, ORANGE, RED, GREY = "green", "blue", "orange", "red", "text"
STATE_COLOURS = {"ready": GREEN, "launching": BLUE, "unavailable": ORANGE, "dead": RED}

Drawn = TypeVar(
    "Drawn", stat.Panel, timeseries.Panel, heatmap.Panel, table.Panel, statetimeline.Panel, bargauge.Panel
)  # the kinds of panels in use


def now(expr: str, legend: str = "__auto") -> prometheus.Dataquery:
    """A query of the present."""
    return prometheus.Dataquery().expr(expr).instant().legend_format(legend)


def rows(expr: str, ref: str = "A") -> prometheus.Dataquery:
    """A query of the present, as rows of a table."""
    return now(expr).format(PromQueryFormat.TABLE).ref_id(ref)


def over_time(expr: str, legend: str, ref: str = "A") -> prometheus.Dataquery:
    """A query of the dashboard's whole time."""
    return prometheus.Dataquery().expr(expr).range().legend_format(legend).ref_id(ref)


def place(panel: Drawn, title: str, description: str, unit: str, width: int, height: int) -> Drawn:
    """What every panel has."""
    panel.title(title).description(description).unit(unit).datasource(SOURCE).span(width).height(height)
    # What is shown of the present alone looks back over the whole time as well, where a run is gone: in steps of this.
    return panel.max_data_points(100) if isinstance(panel, stat.Panel | table.Panel | bargauge.Panel) else panel


def coded(
    names: Sequence[tuple[str, str]],
) -> list[models.ValueMap | models.RangeMap | models.RegexMap | models.SpecialValueMap]:
    """Values 0, 1, 2 and so on as texts in colours."""
    return [
        models.ValueMap(
            {
                str(code): models.ValueMappingResult(text=text, color=colour, index=code)
                for code, (text, colour) in enumerate(names)
            }
        )
    ]


def steps(*bounds: tuple[float | None, str]) -> dashboard.ThresholdsConfig:
    """A colour from each bound on."""
    return (
        dashboard.ThresholdsConfig()
        .mode(models.ThresholdsMode.ABSOLUTE)
        .steps([models.Threshold(value=bound, color=colour) for bound, colour in bounds])
    )


def number(
    title: str, description: str, expr: str, *, unit: str = "short", width: int = 3, legend: str = ""
) -> stat.Panel:
    """A number, large."""
    panel = place(stat.Panel(), title, description, unit, width, 4)
    return (
        panel.with_target(now(expr, legend))
        .color_mode(common_models.BigValueColorMode.BACKGROUND_SOLID)
        .graph_mode(common_models.BigValueGraphMode.NONE)
        .text_mode(common_models.BigValueTextMode.VALUE_AND_NAME if legend else common_models.BigValueTextMode.VALUE)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
        .thresholds(steps((None, GREY)))
    )


def bad_above_zero(panel: stat.Panel, colour: str) -> stat.Panel:
    """Coloured when there is any."""
    return panel.thresholds(steps((None, GREEN), (1, colour)))


def lines(
    title: str, description: str, unit: str, targets: Sequence[prometheus.Dataquery], width: int = 12
) -> timeseries.Panel:
    """Lines over time."""
    panel = place(timeseries.Panel(), title, description, unit, width, 8)
    return (
        panel.targets(list(targets))
        .min(0)
        .line_interpolation(common_models.LineInterpolation.STEP_AFTER)
        .tooltip(common.VizTooltipOptions().mode(common_models.TooltipDisplayMode.MULTI).hide_zeros(True))
    )


def bars(title: str, description: str, target: prometheus.Dataquery, width: int = 12) -> timeseries.Panel:
    """Events in each interval, stacked. Wide intervals: such events are few."""
    return (
        lines(title, description, "short", [target], width)
        .draw_style(common_models.GraphDrawStyle.BARS)
        .fill_opacity(80)
        .stacking(common.StackingConfig().mode(common_models.StackingMode.NORMAL))
        .max_data_points(120)
        .decimals(0)
    )


def totals(title: str, description: str, expr: str, legend: str, width: int = 12) -> bargauge.Panel:
    """Counts so far, the largest first."""
    return (
        place(bargauge.Panel(), title, description, "short", width, 8)
        .with_target(now(f"sort_desc({expr})", legend))
        .orientation(common_models.VizOrientation.HORIZONTAL)
        .display_mode(common_models.BarGaugeDisplayMode.BASIC)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
        .color_scheme(dashboard.FieldColor().mode(models.FieldColorModeId.PALETTE_CLASSIC_BY_NAME))
        .min(0)
        .decimals(0)
    )


def durations(title: str, description: str, histogram: str, width: int = 12) -> heatmap.Panel:
    """How long things took, by when they ended."""
    expr = q.during(f"{histogram}_bucket", "le", f"{q.GROUP}, le")
    return (
        place(heatmap.Panel(), title, description, "s", width, 8)
        .with_target(over_time(expr, "{{le}}").format(PromQueryFormat.HEATMAP))
        .calculate(False)
        .y_axis(heatmap.YAxisConfig().unit("s"))
        .cell_values(heatmap.CellValues().unit("short").decimals(0))
        .color(heatmap.HeatmapColorOptions().mode(HeatmapColorMode.SCHEME).scheme("Oranges").steps(64))
        .filter_values(heatmap.FilterValueRange().le(1e-9))
        .max_data_points(60)
    )


def quantiles(title: str, description: str, histogram: str, width: int = 12) -> timeseries.Panel:
    """Quantiles of all so far."""
    targets = [
        over_time(q.quantile(at, histogram), name, ref)
        for ref, at, name in (("A", 0.5, "median"), ("B", 0.9, "90 %"), ("C", 1, "slowest, at most"))
    ]
    return lines(title, description, "s", targets, width)


def override(name: str, **properties: object) -> tuple[str, list[models.DynamicConfigValue]]:
    """What one field of a table does differently."""
    return name, [models.DynamicConfigValue(id_val=key, value=value) for key, value in properties.items()]


def grid(
    title: str, description: str, unit: str, targets: Sequence[prometheus.Dataquery], columns: dict[str, str]
) -> table.Panel:
    """A table with these columns in this order, under these names; the rest is left out."""
    order = {field: index for index, field in enumerate(columns)}
    # Where there is one query its value is "Value", and merging changes nothing.
    return (
        place(table.Panel(), title, description, unit, 24, 9)
        .targets(list(targets))
        .with_transformation(models.DataTransformerConfig(id_val="merge", options={}))
        .with_transformation(
            models.DataTransformerConfig(id_val="filterFieldsByName", options={"include": {"names": list(columns)}})
        )
        .with_transformation(
            models.DataTransformerConfig(
                id_val="organize", options={"indexByName": order, "renameByName": columns, "excludeByName": {}}
            )
        )
        .filterable(True)
    )


def variables() -> list[Builder[models.VariableModel]]:
    """Data source, run, model, worker type, node."""
    chosen = ""
    made: list[Builder[models.VariableModel]] = [
        dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus"),
    ]
    for name, label, metric, several in (
        ("run", "Run", "enginefsm_monitor_info", False),
        ("model", "Model", "enginefsm_engines_expected", True),
        ("worker_type", "Worker type", "enginefsm_engines_expected", True),
        ("node", "Node", "enginefsm_engine_info", True),
    ):
        query = f"label_values({metric}{{{chosen}}}, {name})" if chosen else f"label_values({metric}, {name})"
        variable = (
            dashboard.QueryVariable(name)
            .label(label)
            .datasource(SOURCE)
            .query({"qryType": 1, "query": query, "refId": "PrometheusVariableQueryEditor-VariableQuery"})
            .definition(query)
            .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
            .sort(models.VariableSort.NATURAL_ASC)
        )
        if several:
            # Not "All" spelled out: an engine need not have the label at all.
            variable.multi(True).include_all(True).all_value(".*").current(
                models.VariableOption(selected=True, text=["All"], value=["$__all"])
            )
        made.append(variable)
        chosen = f'{chosen}, {name}=~"${name}"'.lstrip(", ")
    return made


def page(uid: str, title: str, description: str, other: str) -> dashboard.Dashboard:
    """An empty dashboard with what both have."""
    return (
        dashboard.Dashboard(title)
        .uid(uid)
        .description(description)
        .tags(["enginefsm"])
        .timezone("browser")
        .time("now-1h", "now")
        .refresh("15s")
        .tooltip(models.DashboardCursorSync.CROSSHAIR)
        .variables(variables())
        .link(
            dashboard.DashboardLink(other).type(models.DashboardLinkType.DASHBOARDS).tags(["enginefsm"]).keep_time(True)
        )
    )


STEP_LABELS = f"{q.GROUP}, from_state, to_state, reason"
STEP_LEGEND = "{{from_state}} → {{to_state}}: {{reason}}"
PHASES = (("failed", RED), ("in progress", BLUE), ("succeeded", GREEN))
MONITOR = (("absent", RED), ("alive", GREEN), ("stopped in good order", BLUE), ("stopped in good order", BLUE))


def bringup() -> dashboard.Dashboard:
    """One run: is it up, and if not, which engines are not, since when, and why."""
    built = page(
        "enginefsm-bringup", "enginefsm: a bringup",
        "The engines of one run: whether they are up, which are not, since when, and why.", "enginefsm",
    )  # fmt: skip

    built.with_row(dashboard.Row("Is it up?"))
    for panel in (
        number(
            "Bringup",
            "Failed once an engine died before it was ever ready; succeeded when all have been ready; by model.",
            q.phase(), unit="none", legend="{{model}}",
        ).mappings(coded(PHASES)),
        number(
            "Ready", "Share of the engines that are ready.", f"{q.engines_in('ready')} / {q.engines()}",
            unit="percentunit",
        ).thresholds(steps((None, RED), (0.9, ORANGE), (1, GREEN))),
        number("Engines ready", "Engines whose launch succeeded and that answer.", q.engines_in("ready"), width=2),
        number("Launching", "Engines whose launch has not ended.", q.engines_in("launching"), width=2),
        bad_above_zero(
            number("Unavailable", "Engines out of reach that are re-awaited.", q.engines_in("unavailable"), width=2),
            ORANGE,
        ),
        bad_above_zero(number("Dead", "Engines that are gone or were given up.", q.engines_in("dead"), width=2), RED),
        bad_above_zero(
            number("Given up", "Of the dead, those whose bounds were spent.", q.given_up(), width=2),
            RED,
        ),
        number(
            "Expected", "Engines adopted and not released, whatever their node.",
            f"sum({q.known('enginefsm_engines_expected', q.GROUP)})", width=2,
        ),
        number(
            "Monitor", "Whether the run's monitor is heard of, was last heard of more than 2 minutes ago, or ended in "
            "good order.", q.monitor_status(), unit="none",
        ).mappings(coded(MONITOR)),
        number("Last heard of", "Time since the monitor's last heartbeat.", q.heartbeat_age(), unit="s").thresholds(
            steps((None, GREEN), (60, ORANGE), (q.ABSENT_AFTER_S, RED))
        ),
    ):  # fmt: skip
        built.with_panel(panel)

    built.with_row(dashboard.Row("Engines"))
    built.with_panel(
        place(
            statetimeline.Panel(), "States of the engines",
            f"The state of each engine over time. While more than {q.MANY} are ready, or launching, these are left out "
            "here: their number is in the panel below.",
            "none", 24, 10,
        )
        .with_target(over_time(q.timeline(), "{{engine}}"))
        .mappings(coded([("", GREY), *((state, STATE_COLOURS[state]) for state in q.STATES)]))
        .merge_values(True)
        .show_value(common_models.VisibilityMode.NEVER)
        .per_page(25)
    )  # fmt: skip
    counts = lines(
        "Engines by state", "How many engines are in each state.", "short",
        [over_time(q.engines_over_time(), "{{state}}")], width=24,
    ).stacking(common.StackingConfig().mode(common_models.StackingMode.NORMAL)).fill_opacity(60)  # fmt: skip
    for state, colour in STATE_COLOURS.items():
        counts.override_by_name(*override(state, color={"mode": "fixed", "fixedColor": colour}))
    built.with_panel(counts)
    built.with_panel(
        grid(
            "Not ready",
            "Engines that are not ready, for how long, and why they are unavailable or dead, the longest first.",
            "s", [rows(f"sort_desc({q.not_ready()})")],
            {
                "engine": "Engine", "state": "State", "Value": "For", "reason": "Reason", "node": "Node",
                "model": "Model", "worker_type": "Worker type", "incarnation": "Incarnation", "actor_id": "Actor",
            },
        )
    )  # fmt: skip

    built.with_row(dashboard.Row("Launches"))
    launch = "enginefsm_launch_duration_seconds"
    built.with_panel(durations("Launch time", "How long engines took to launch, by when they became ready.", launch))
    built.with_panel(quantiles("Launch time so far", "Quantiles over all launches of the run so far.", launch))
    replacement = "enginefsm_replacement_duration_seconds"
    text = "From the death of an engine until an engine of its name was ready again, by when it was."
    built.with_panel(durations("Time to replace", text, replacement))
    text = "Quantiles over all dead engines of the run that have been replaced and were ready again."
    built.with_panel(quantiles("Time to replace so far", text, replacement))

    built.with_row(dashboard.Row("What happened, and why"))
    step = q.during("enginefsm_transitions_total", "from_state, to_state, reason", STEP_LABELS)
    built.with_panel(
        bars(
            "Transitions",
            "Steps of engines from state to state, with the reason.",
            over_time(f"{step} > 0", STEP_LEGEND),
        )
    )
    built.with_panel(
        totals(
            "Transitions so far", "Steps of engines from state to state since the run began, with the reason.",
            q.total("enginefsm_transitions_total", "from_state, to_state, reason", STEP_LABELS), STEP_LEGEND,
        )
    )  # fmt: skip
    outage = "enginefsm_unavailable_duration_seconds"
    built.with_panel(durations("Outages", "How long engines were unavailable, by when that ended.", outage))
    built.with_panel(quantiles("Outages so far", "Quantiles over all outages of the run that have ended.", outage))
    outcome = q.during("enginefsm_outcomes_total", "method, outcome", f"{q.GROUP}, method, outcome")
    built.with_panel(
        bars(
            "Outcomes of calls", "What came of each submission of a call to an engine.",
            over_time(f"{outcome} > 0", "{{method}}: {{outcome}}"),
        )
    )  # fmt: skip
    reawait = q.during("enginefsm_reawaits_total", "method, result", f"{q.GROUP}, method, result")
    built.with_panel(
        bars(
            "Re-awaits", "What came of calls that were submitted again after their engine was unavailable.",
            over_time(f"{reawait} > 0", "{{method}}: {{result}}"),
        )
    )  # fmt: skip
    built.with_panel(
        totals(
            "Given up so far", "Engines whose bounds were spent since the run began, by which.",
            f"sum by (reason) ({q.known('enginefsm_retry_exhausted_total', f'{q.GROUP}, reason')})", "{{reason}}",
        )
    )  # fmt: skip
    built.with_panel(
        lines(
            "Probes", "How long 90 % of the probes took so far, by what came of them.", "s",
            [over_time(q.quantile(0.9, "enginefsm_probe_duration_seconds", "result"), "{{result}}")],
        )
    )  # fmt: skip

    built.with_row(dashboard.Row("Health"))
    check = q.during("enginefsm_health_checks_total", "actor, server", f"{q.GROUP}, actor, server")
    built.with_panel(
        bars(
            "Health checks",
            "What the health monitor found of actors, and what their servers said over HTTP: an actor that is silent, "
            "or unavailable, while its server serves is out of reach, not dead; where the actor answers and the server "
            "fails, it is the server that is dead; a server that is unwell answers, but not that all is well.",
            over_time(f"{check} > 0", "actor {{actor}}, server {{server}}"), width=16,
        )
    )  # fmt: skip
    built.with_panel(
        lines(
            "Verdicts held",
            "Engines that have failed for long enough to be given up, and are kept: most are unavailable at once, or "
            "too many were given up lately.",
            "short", [over_time(f"max by (why) (enginefsm_verdicts_held{{{q.IN_RUN}}})", "{{why}}")], width=8,
        ).decimals(0)
    )  # fmt: skip

    built.with_row(dashboard.Row("The monitor itself"))
    built.with_panel(
        lines(
            "Time since the last heartbeat", "Rises when the monitor is gone, hangs, or is not heard.", "s",
            [over_time(f"time() - max by (run) (last_over_time({q.HEARTBEAT}[15m]))", "{{run}}")], width=8,
        ).thresholds(steps((None, GREEN), (q.ABSENT_AFTER_S, RED)))
    )  # fmt: skip
    built.with_panel(
        lines(
            "Exporters", "Failures of exporters and other listeners, and events that they were never given, so far.",
            "short",
            [
                over_time(f"max by (sink) (enginefsm_export_errors_total{{{q.IN_RUN}}})", "{{sink}}: failures", "A"),
                over_time(f"max by (sink) (enginefsm_events_dropped_total{{{q.IN_RUN}}})", "{{sink}}: dropped", "B"),
            ],
            width=8,
        ).decimals(0)
    )  # fmt: skip
    built.with_panel(
        grid(
            "Versions", "What the monitor runs with.", "none",
            [rows(q.known("enginefsm_monitor_info", "run, version, ray_version", q.IN_RUN))],
            {"run": "Run", "version": "enginefsm", "ray_version": "Ray"},
        ).span(8).height(8)
    )  # fmt: skip
    return built


def runs() -> dashboard.Dashboard:
    """All runs, side by side."""
    built = page(
        "enginefsm-runs",
        "enginefsm: all runs",
        "The runs side by side: which are up, which are in trouble.",
        "enginefsm",
    )
    run = next(v for v in built.build().templating.list_val if v.name == "run")  # type: ignore[union-attr]
    run.multi, run.include_all, run.all_value = True, True, ".*"
    run.current = models.VariableOption(selected=True, text=["All"], value=["$__all"])

    alive = f"{q.monitor_status()} == 1"
    firing = f'ALERTS{{alertname=~"Enginefsm.*", alertstate="firing", {q.IN_RUN}}}'
    built.with_row(dashboard.Row("Now"))
    for panel in (
        number("Runs alive", "Runs whose monitor is heard of.", f"count({alive}) or vector(0)", width=4),
        number("Engines", "Engines of the chosen runs.", q.engines(), width=4),
        number("Ready", "Share of the engines that are ready.", f"{q.engines_in('ready')} / {q.engines()}",
               unit="percentunit", width=4).thresholds(steps((None, RED), (0.9, ORANGE), (1, GREEN))),
        bad_above_zero(number("Dead", "Engines that are gone or were given up.", q.engines_in("dead"), width=4), RED),
        bad_above_zero(
            number("Given up", "Of the dead, those whose bounds were spent.", q.given_up(), width=4), RED
        ),
        bad_above_zero(
            number("Firing", "Alerts of enginefsm that are firing.", f"count({firing}) or vector(0)", width=4), RED
        ),
    ):  # fmt: skip
        built.with_panel(panel)

    by = "run, model"
    overview = grid(
        "Runs",
        "Each run and model: how its bringup stands, its engines by state, and when its monitor was last heard of. "
        "A click on the run opens its bringup.",
        "short",
        [
            rows(q.phase(), "A"),
            rows(q.engines(by), "B"),
            *(rows(q.engines_in(state, by), ref) for state, ref in zip(q.STATES, "CDEF", strict=True)),
            rows(q.given_up(by), "G"),
            rows(f"{q.engines(by)} * 0 + on (run) group_left () ({q.heartbeat_age()})", "H"),
            rows(f"{q.engines(by)} * 0 + on (run) group_left () ({q.monitor_status()})", "I"),
        ],
        {
            "run": "Run", "model": "Model", "Value #A": "Bringup", "Value #B": "Engines", "Value #C": "Ready",
            "Value #D": "Launching", "Value #E": "Unavailable", "Value #F": "Dead", "Value #G": "Given up",
            "Value #H": "Last heard of", "Value #I": "Monitor",
        },
    )  # fmt: skip
    text = {"type": "color-background"}
    overview.override_by_name(*override("Bringup", mappings=coded(PHASES), **{"custom.cellOptions": text}))
    overview.override_by_name(*override("Monitor", mappings=coded(MONITOR), **{"custom.cellOptions": text}))
    overview.override_by_name(*override("Last heard of", unit="s"))
    to_bringup = "/d/enginefsm-bringup?var-run=${__value.text}&var-datasource=${datasource}&${__url_time_range}"
    overview.override_by_name(*override("Run", links=[{"title": "Its bringup", "url": to_bringup}]))
    built.with_panel(overview)
    built.with_panel(
        grid(
            "Alerts", "Alerts of enginefsm that are firing; empty is good.", "none", [rows(firing)],
            {"alertname": "Alert", "severity": "Severity", "run": "Run", "model": "Model", "engine": "Engine",
             "reason": "Reason", "sink": "Exporter"},
        )
    )  # fmt: skip

    built.with_row(dashboard.Row("Over time"))
    state = f'max by ({q.ENGINE}) (enginefsm_engine_state{{{q.IN_GROUP}, state="ready"}})'
    nodes = f'and on ({q.ENGINE}) enginefsm_engine_info{{{q.IN_GROUP}, node=~"$node"}}'
    built.with_panel(
        lines("Ready, by run", "Share of each run's engines that are ready.", "percentunit",
              [over_time(f"avg by (run) ({state} {nodes})", "{{run}}")]).max(1)
    )  # fmt: skip
    built.with_panel(
        lines("Engines, by run", "How many engines each run has.", "short",
              [over_time(f"sum by (run) (max by ({q.GROUP}) (enginefsm_engines_expected{{{q.IN_GROUP}}}))", "{{run}}")])
    )  # fmt: skip
    dead = f'{q.IN_GROUP}, to_state="dead", reason!="released"'
    built.with_panel(
        bars("Deaths", "Engines that died or were given up, with the reason.",
             over_time(q.during("enginefsm_transitions_total", "run, reason", STEP_LABELS, dead) + " > 0",
                       "{{run}}: {{reason}}"))
    )  # fmt: skip
    lost = f'{q.IN_GROUP}, to_state="unavailable"'
    built.with_panel(
        bars("Outages", "Engines that became unavailable, with the reason.",
             over_time(q.during("enginefsm_transitions_total", "run, reason", STEP_LABELS, lost) + " > 0",
                       "{{run}}: {{reason}}"))
    )  # fmt: skip
    built.with_panel(
        lines("Launch time, by run", "Median of all launches of each run so far.", "s",
              [over_time(q.quantile(0.5, "enginefsm_launch_duration_seconds", "run"), "{{run}}")])
    )  # fmt: skip
    built.with_panel(
        lines("Exporters, by run", "Failures of exporters, and events that they were never given, so far.", "short",
              [over_time(f"sum by (run) (max by (run, sink) ({metric}{{{q.IN_RUN}}}))", f"{{{{run}}}}: {what}", ref)
               for ref, metric, what in (("A", "enginefsm_export_errors_total", "failures"),
                                         ("B", "enginefsm_events_dropped_total", "dropped"))])
    )  # fmt: skip
    return built


def build() -> dict[str, str]:
    """The text of each file of dashboards/grafana/, by its name."""
    encoder = JSONEncoder(sort_keys=True, indent=2)
    made = {"bringup.json": bringup().build(), "runs.json": runs().build()}
    for one in made.values():
        for number_, panel in enumerate(one.panels or [], start=1):
            panel.id_val = number_
    return {name: encoder.encode(one) + "\n" for name, one in made.items()}


if __name__ == "__main__":
    for name, text in build().items():
        (OUT / name).write_text(text)
