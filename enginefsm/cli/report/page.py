"""The page: one file of HTML that needs no network. `page.html.jinja` writes it from the views that are made here."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from importlib import resources

from jinja2 import DictLoader, Environment, StrictUndefined

from enginefsm.cli.order import natural
from enginefsm.cli.report.history import Life, Manager, Run
from enginefsm.cli.report.timeline import Timeline, timeline
from enginefsm.cli.times import duration
from enginefsm.fsm.states import EngineState

_SLOWEST = 10
_NAMED = 5
"""How many engines a cause names."""
_MANAGERS = 4
"""How many monitors the line below a run's name tells of."""
_COLUMNS = (
    ("engine", ""), ("state", ""), ("reason", ""), ("ready after", "n"), ("unavailable", "n"), ("faults", "n"),
    ("re-awaits", "n"), ("node", ""), ("worker type", ""), ("model", ""),
)  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True)
class Tile:
    """One number at the top of a run."""

    name: str
    value: str
    kind: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Cause:
    """Why engines died, became unavailable, or had calls that failed."""

    state: str
    """Empty for a call that failed."""
    why: str
    times: int
    engines: str


@dataclasses.dataclass(frozen=True, slots=True)
class SlowLaunch:
    """A launch that took long, or that has not ended."""

    title: str
    text: str
    never: bool
    share: str
    """The length in percent of the longest."""


@dataclasses.dataclass(frozen=True, slots=True)
class RunView:
    """One run, as the template shows it."""

    name: str
    began: str
    length_s: float
    managers: list[str]
    tiles: list[Tile]
    causes: list[Cause]
    slowest: list[SlowLaunch]
    timeline: Timeline
    lives: list[Life]


def render(runs: Sequence[Run], names: Sequence[str], passed_over: int) -> bytes:
    """Return the page of these runs, which were read from files of these names."""
    css, script = _asset("page.css"), _asset("page.js")
    environment = Environment(
        loader=DictLoader({name: _asset(name) for name in ("page.html.jinja", "timeline.html.jinja")}),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["duration"] = duration
    page = environment.get_template("page.html.jinja").render(
        title=f"enginefsm: {', '.join(run.run or 'a run' for run in runs[:3])}{' ...' if runs[3:] else ''}",
        names=names,
        passed_over=passed_over,
        dropped=sum(manager.dropped for run in runs for manager in run.managers),
        columns=_COLUMNS,
        runs=[_run(run) for run in runs],
        css=css,
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
    return page.encode("utf-8", "replace")


def _asset(name: str) -> str:
    return resources.files("enginefsm.cli.report").joinpath(name).read_text(encoding="utf-8")


def _run(run: Run) -> RunView:
    managers = [manager_text(manager) for manager in run.managers[:_MANAGERS]]
    if run.managers[_MANAGERS:]:
        managers.append(f"and {len(run.managers) - _MANAGERS} more monitors")
    return RunView(
        name=run.run,
        began=f"{datetime.fromtimestamp(run.start_s, UTC):%Y-%m-%d %H:%M:%S}",
        length_s=run.end_s - run.start_s,
        managers=managers,
        tiles=list(_tiles(run)),
        causes=_causes(run),
        slowest=_slowest(run),
        timeline=timeline(run, manager_text),
        lives=[
            life
            for manager in run.managers
            for life in sorted(manager.lives.values(), key=lambda one: (natural(one.engine), one.incarnation))
        ],
    )


def manager_text(manager: Manager) -> str:
    """Return where the monitor ran, and how it ended."""
    about = manager.about
    where = f"monitor on {about.get('host', '?')}, pid {about.get('pid', '?')}" if about else "a monitor"
    end = "ended in good order" if manager.ended_s is not None else "left no end: it still runs, or its process died"
    return f"{where}, {end}"


def _tiles(run: Run) -> Iterator[Tile]:
    newest = [lives[-1] for manager in run.managers for lives in manager.engines().values()]
    states = Counter(life.state for life in newest)
    yield Tile("engines", str(len(newest)))
    yield Tile(EngineState.READY, str(states[EngineState.READY]), "good")
    for state in (EngineState.LAUNCHING, EngineState.UNAVAILABLE, "released"):
        if states[state]:
            yield Tile(state, str(states[state]))
    if died := sum(life.died for life in run.lives):
        yield Tile("died", str(died), "bad")
    if slowest_s := max((life.ready_after_s or 0.0 for life in newest), default=0.0):
        yield Tile("slowest launch", duration(slowest_s))
    yield Tile("faults", str(sum(life.faults for life in run.lives)))
    yield Tile("re-awaits", str(sum(life.reawaits for life in run.lives)))
    if unavailable_s := sum(life.unavailable_s for life in run.lives):
        yield Tile("unavailable, together", duration(unavailable_s))


def _causes(run: Run) -> list[Cause]:
    """Return the causes, deaths first, and the most frequent first."""
    causes: dict[tuple[int, str, str], list[str]] = defaultdict(list)
    for life in run.lives:
        for span in life.spans:
            if span.state == EngineState.DEAD:
                causes[0, "dead", span.reason].append(life.title)
            elif span.state == EngineState.UNAVAILABLE:
                causes[1, "unavailable", span.reason or "?"].append(life.title)
        for mark in life.marks:
            if mark.fault:
                causes[2, "", f"{mark.method}(): {mark.outcome}"].append(life.title)
    ordered = sorted(causes.items(), key=lambda one: (one[0][0], -len(one[1]), one[0]))
    return [Cause(state, why, len(titles), _named(titles)) for (_, state, why), titles in ordered]


def _named(titles: Iterable[str]) -> str:
    several = sorted(set(titles), key=natural)
    more = f" and {len(several) - _NAMED} more" if several[_NAMED:] else ""
    return ", ".join(several[:_NAMED]) + more


def _slowest(run: Run) -> list[SlowLaunch]:
    ready = sorted(((life.ready_after_s, life) for life in run.lives if life.ready_after_s), key=lambda one: -one[0])
    never = [life for life in run.lives if life.ready_after_s is None and life.steps and life.state != "released"]
    longest_s = max([ready[0][0] if ready else 0.0, *(_age_s(life) for life in never)], default=0.0) or 1.0
    shown = [(life, _age_s(life), True) for life in sorted(never, key=_age_s, reverse=True)[: _SLOWEST // 2]]
    shown += [(life, after_s, False) for after_s, life in ready[: _SLOWEST - len(shown)]]
    return [
        SlowLaunch(life.title, _launch_text(life, after_s, is_never), is_never, f"{after_s / longest_s:.1%}")
        for life, after_s, is_never in shown
    ]


def _launch_text(life: Life, after_s: float, is_never: bool) -> str:
    if not is_never:
        return duration(after_s)
    if life.state == EngineState.DEAD:
        return f"not ready: {life.state} after {duration(after_s)}"
    return f"not yet: {life.state}, {duration(after_s)}"


def _age_s(life: Life) -> float:
    """Return how long it lived, or lives already."""
    return sum(span.end_s - span.start_s for span in life.spans if span.state != EngineState.DEAD)
