"""Shows the hub's JSON as plain text, for pipes and logs, and if rich is not installed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from enginefsm.cli.status.finding import FleetJson
from enginefsm.cli.times import duration
from enginefsm.fsm.states import EngineState, why

URGENCY = (EngineState.DEAD, EngineState.UNAVAILABLE, EngineState.LAUNCHING, EngineState.READY)
Key = tuple[str, str, str, str]


def printable(text: str) -> str:
    """Return the text with control characters made visible, so that a terminal does not obey them."""
    return text if text.isprintable() else "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)


def title(engine: Mapping[str, Any]) -> str:
    """Return the engine's name, with the incarnation if it is not the first."""
    name = printable(engine["engine"])
    return name if engine["incarnation"] == 1 else f"{name} #{engine['incarnation']}"


def reason(engine: Mapping[str, Any]) -> str:
    """Return the reason of the engine's state, or the stage of its launch while it launches."""
    return printable(why(engine["reason"], engine.get("stage")))


def run_name(run: Mapping[str, Any]) -> str:
    """Return the run's name, or a text in its place if it has none."""
    return printable(run["run"]) or "(a run without a name)"


def counted(run: Mapping[str, Any]) -> str:
    """Return how many of the run's engines are in each state: `7 of 8 ready, 1 dead`."""
    counts = run["counts"]
    others = [f"{counts[state]} {state}" for state in URGENCY if state != EngineState.READY and counts[state]]
    return ", ".join([f"{counts[EngineState.READY]} of {sum(counts.values())} ready", *others])


def summary(run: Mapping[str, Any], now_s: float) -> str:
    """Return the run in one line, without its name."""
    heard = duration(now_s - run["heartbeat_s"])
    life = {
        "alive": f"alive, heard of {heard} ago",
        "silent": f"SILENT, last heard of {heard} ago",
        "stopped": f"ended {duration(now_s - (run['stopped_s'] or now_s))} ago",
    }.get(run["state"], printable(str(run["state"])))
    phases = ", ".join(
        f"{printable(model) + ': ' if model else ''}bringup {printable(phase).replace('_', ' ')}"
        for model, phase in run["phases"].items()
    )
    return "; ".join(part for part in (counted(run), phases, life) if part)


def lines(fleet: FleetJson, *, most_ready: int | None = None) -> Iterator[str]:
    """Yield each run and its engines, ready ones last. If more than `most_ready` are ready, only count them."""
    for place, run in enumerate(fleet["runs"]):
        if place:
            yield ""
        yield f"{run_name(run)}: {summary(run, fleet['now_s'])}"
        engines = sorted(run["engines"], key=lambda engine: _urgency(engine["state"]))
        ready = [engine for engine in engines if engine["state"] == EngineState.READY]
        hidden = 0
        if most_ready is not None and len(ready) > most_ready:
            hidden = len(ready)
            engines = [engine for engine in engines if engine["state"] != EngineState.READY]
        rows = [("engine", "state", "for", "reason", "node")] if engines else []
        rows += [
            (
                title(engine), engine["state"], duration(engine["in_state_s"]), reason(engine),
                printable(engine["node"]) or "-",
            )
            for engine in engines
        ]  # fmt: skip
        widths = [max(len(row[column]) for row in rows) for column in range(5)] if rows else []
        for row in rows:
            yield "  " + "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        if hidden:
            yield f"  and {hidden} ready (--all names them)" if engines else f"  {hidden} ready (--all names them)"
    if fleet["hub"].get("problem"):
        yield f"the hub has a problem: {printable(fleet['hub']['problem'])}"


def _urgency(state: str) -> int:
    return URGENCY.index(EngineState(state)) if state in URGENCY else 0


def key(run: Mapping[str, Any], engine: Mapping[str, Any]) -> Key:
    """Return the key of an engine among all engines of all runs."""
    return run["run"], engine["model"], engine["worker_type"], engine["engine"]


def changes(before: FleetJson | None, now: FleetJson) -> Iterator[str]:
    """Yield one line for each change. Without a `before`, yield the runs and the engines that are not ready."""
    old_runs = {run["run"]: run for run in before["runs"]} if before else {}
    old = {key(run, engine): engine for run in old_runs.values() for engine in run["engines"]}
    for run in now["runs"]:
        name = run_name(run)
        known = old_runs.pop(run["run"], None)
        if known is None or known["state"] != run["state"]:
            yield f"{name}: {summary(run, now['now_s'])}"
        for engine in run["engines"]:
            was = old.pop(key(run, engine), None)
            if was is None:
                if before is None and engine["state"] == EngineState.READY:
                    continue
                yield f"{name}  {title(engine)}: {engine['state']} ({reason(engine)}){_where(engine)}"
            elif (was["state"], was["since_s"], was["incarnation"], reason(was)) != (
                engine["state"], engine["since_s"], engine["incarnation"], reason(engine)
            ):  # fmt: skip
                step = f"{was['state']} -> {engine['state']}" if was["state"] != engine["state"] else engine["state"]
                yield f"{name}  {title(engine)}: {step} ({reason(engine)}){_where(engine)}"
    for run_of, _, _, engine_name in old:
        yield f"{printable(run_of)}  {printable(engine_name)}: not there any more"
    for gone in old_runs:
        yield f"{printable(gone)}: not there any more"


def _where(engine: Mapping[str, Any]) -> str:
    return f" on {printable(engine['node'])}" if engine["node"] else ""
