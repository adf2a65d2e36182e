"""The PromQL of the dashboards, put together from a few pieces that know what these metrics are like.

- A run is shown from the hub, from its own process, or from both: `max by` the metric's own labels makes one of them.
- When a run's process was scraped and is gone, so are its series: `known` gives what they last were. While the run's
  monitor is there, an engine that is missing was released, and is not brought back.
- Launches, deaths and outages are few, and a counter may be seen first above 0: `during` counts from there, where
  `increase` and `rate` would show nothing or a fraction.
"""

from __future__ import annotations

from enginefsm.fsm.states import EDGES, EngineState

ENGINE = "run, model, worker_type, engine"
GROUP = "run, model, worker_type"

IN_RUN = 'run=~"$run"'
IN_GROUP = f'{IN_RUN}, model=~"$model", worker_type=~"$worker_type"'
STATES = ("ready", "launching", "unavailable", "dead")

HEARTBEAT = f"enginefsm_monitor_heartbeat_timestamp_seconds{{{IN_RUN}}}"
ABSENT_AFTER_S = 120
"""As in the alert rules."""

MANY = 50
"""Above so many engines in it, a state that is no trouble is shown as a count."""


def known(metric: str, by: str, where: str = IN_GROUP) -> str:
    """What `metric` is, or was when the run was last seen in the dashboard's time."""
    series = f"{metric}{{{where}}}"
    last = f"max by ({by}) (last_over_time({series}[$__range]))"
    return f"(max by ({by}) ({series}) or ({last} unless on (run) {HEARTBEAT}))"


def still(engines: str) -> str:
    """Of engines of runs that are gone, those that had not been released before the run was last seen."""
    since = _last_seen("enginefsm_engine_state_since_timestamp_seconds", ENGINE, IN_GROUP)
    run = _last_seen("enginefsm_monitor_heartbeat_timestamp_seconds", "run", IN_RUN)
    return f"({engines} unless on ({ENGINE}) ({since} < on (run) group_left () {run} unless on (run) {HEARTBEAT}))"


def _last_seen(metric: str, by: str, where: str) -> str:
    # Not by timestamp(): in a subquery, that takes Prometheus 20 times as long.
    return f"max by ({by}) (max_over_time((0 * {metric}{{{where}}} + time())[$__range:$__interval]))"


def during(metric: str, by: str, labels: str, where: str = IN_GROUP) -> str:
    """By how much a counter with `labels` grew in each interval, exactly, its first appearance included."""
    series = f"{metric}{{{where}}}"
    now = f"sum by ({by}) (max by ({labels}) ({series}))"
    before = f"sum by ({by}) (max by ({labels}) (last_over_time({series}[15m] offset $__interval)))"
    return f"clamp_min({now} - ({before} or {now} * 0), 0)"


def on_nodes() -> str:
    """A filter to put behind engines: those on the chosen nodes."""
    info = known("enginefsm_engine_info", f"{ENGINE}, node", f'{IN_GROUP}, node=~"$node"')
    return f"and on ({ENGINE}) {info}"


def engines_in(state: str, by: str = "") -> str:
    """How many engines are in a state; 0, where there are engines at all."""
    grouping = f"by ({by}) " if by else ""
    where = f'{IN_GROUP}, state="{state}"'
    return f"sum {grouping}({still(known('enginefsm_engine_state', ENGINE, where))} {on_nodes()})"


def engines(by: str = "") -> str:
    """How many engines there are."""
    return engines_in("ready", by).replace("sum ", "count ", 1)


def given_up(by: str = "") -> str:
    """How many engines are dead because their bounds were spent; 0, where there are engines at all."""
    grouping = f"by ({by}) " if by else ""
    exhausted = still(known("enginefsm_retry_exhausted_timestamp_seconds", ENGINE))
    return f"(count {grouping}({exhausted} {on_nodes()}) or {engines(by)} * 0)"


def phase() -> str:
    """By run and model: 0 failed, 1 in progress, 2 succeeded."""
    where = f'{IN_RUN}, model=~"$model", phase='
    succeeded = known("enginefsm_bringup_phase", "run, model", f'{where}"succeeded"')
    in_progress = known("enginefsm_bringup_phase", "run, model", f'{where}"in_progress"')
    return f"2 * {succeeded} + {in_progress}"


def heartbeat_age(by: str = "run") -> str:
    """Seconds since the run's monitor was last heard of."""
    return f"time() - max by ({by}) (last_over_time({HEARTBEAT}[$__range]))"


def monitor_status() -> str:
    """By run: 0 absent, 1 alive, 2 or 3 stopped in good order."""
    stopped = known("enginefsm_monitor_stopped_timestamp_seconds", "run", IN_RUN)
    return f"2 * ({stopped} > bool 0) + ({heartbeat_age()} < bool {ABSENT_AFTER_S})"


def engines_over_time() -> str:
    """How many engines are in each state, all along."""
    states = f"enginefsm_engine_state{{{IN_GROUP}}}"
    # Only what holds is matched with its node: of a thousand engines that is a quarter of the work, and most of it.
    held = f"max by ({ENGINE}, state) ({states} == 1)"
    shown = f'{held} and on ({ENGINE}) enginefsm_engine_info{{{IN_GROUP}, node=~"$node"}}'
    return f"sum by (state) ({shown}) or sum by (state) ({states}) * 0"


def timeline() -> str:
    """By engine: 1 ready, 2 launching, 3 unavailable, 4 dead.

    The unavailable and the dead always; the ready, and the launching, while there are not too many of them to look at.
    """
    parts = []
    for code, state in reversed(list(enumerate(STATES, start=1))):
        these = f'max by ({ENGINE}) (enginefsm_engine_state{{{IN_GROUP}, state="{state}"}} == 1)'
        few = f" and on (run) count by (run) ({these}) <= {MANY}" if state in ("ready", "launching") else ""
        parts.append(f"({code} * {these}{few})")
    shown = f'and on ({ENGINE}) enginefsm_engine_info{{{IN_GROUP}, node=~"$node"}}'
    return f"max by (run, engine) (({' or '.join(parts)}) {shown})"


def not_ready() -> str:
    """By engine that is not ready, with its state, reason, node, incarnation and actor: seconds in that state.

    One that launches has no reason: it is launched.
    """
    not_in_ready = f'{IN_GROUP}, state!="ready"'
    state = f"({known('enginefsm_engine_state', f'{ENGINE}, state', not_in_ready)} == 1)"
    since = still(known("enginefsm_engine_state_since_timestamp_seconds", ENGINE))
    newest_info = _newest("enginefsm_engine_info", "node, incarnation, actor_id", f'{IN_GROUP}, node=~"$node"')
    return (
        f"(time() - {since})"
        f" * on ({ENGINE}) group_left (state, reason)"
        f" ({_with_reason(EngineState.UNAVAILABLE)} or {_with_reason(EngineState.DEAD)} or on ({ENGINE}) {state})"
        f" * on ({ENGINE}) group_left (node, incarnation, actor_id) {newest_info}"
    )


def _with_reason(state: EngineState) -> str:
    """One series an engine in a state, of value 1, with the reason that took it there."""
    reasons = "|".join(reason for reason, (_, dest) in EDGES.items() if dest is state)
    reason = _newest("enginefsm_engine_reason", "reason", f'{IN_GROUP}, reason=~"{reasons}"')
    now_in = known("enginefsm_engine_state", f"{ENGINE}, state", f'{IN_GROUP}, state="{state}"')
    return f"({now_in} == 1) * on ({ENGINE}) group_left (reason) {reason}"


def _newest(gauge: str, labels: str, where: str) -> str:
    """One series an engine, of value 1: of a gauge's series of the engine, which differ in `labels`, the last seen."""
    labels = f"{ENGINE}, {labels}"
    seen = f"{_last_seen(gauge, labels, where)} or max by ({labels}) (last_over_time({gauge}{{{where}}}[$__range]))"
    present = f"max by ({labels}) ({gauge}{{{where}}})"
    return f"(topk by ({ENGINE}) (1, {present} or (({seen}) unless on (run) {HEARTBEAT})) > bool 0)"


def quantile(q: float, histogram: str, by: str = "") -> str:
    """A quantile of everything that a histogram has counted so far."""
    grouping = f"{by}, le" if by else "le"
    labels = f"{GROUP}, le" if by in ("", "run") else f"{GROUP}, {by}, le"
    return f"histogram_quantile({q}, sum by ({grouping}) (max by ({labels}) ({histogram}_bucket{{{IN_GROUP}}})))"


def total(counter: str, by: str, labels: str, where: str = IN_GROUP) -> str:
    """What a counter with `labels` has come to; nothing where that is 0."""
    return f"sum by ({by}) ({known(counter, labels, where)}) > 0"
