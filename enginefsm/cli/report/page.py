"""The page: one file of HTML that needs no network and nothing beside it. Every text in it is escaped."""

from __future__ import annotations

import base64
import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from html import escape
from importlib import resources

from enginefsm.cli.order import natural
from enginefsm.cli.report.history import Life, Manager, Run
from enginefsm.cli.report.timeline import timeline
from enginefsm.cli.times import duration
from enginefsm.fsm.states import EngineState

_SLOWEST = 10
_NAMED = 5
"""How many engines a cause names."""
_COLUMNS = (
    ("engine", ""), ("state", ""), ("reason", ""), ("ready after", "n"), ("unavailable", "n"), ("faults", "n"),
    ("re-awaits", "n"), ("node", ""), ("worker type", ""), ("model", ""),
)  # fmt: skip


def render(runs: Sequence[Run], names: Sequence[str], passed_over: int) -> bytes:
    """The page of these runs, which were read from files of these names."""
    assets = resources.files("enginefsm.cli.report")
    css = assets.joinpath("page.css").read_text(encoding="utf-8")
    script = assets.joinpath("page.js").read_text(encoding="utf-8")
    hashed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # Nothing is fetched, and no script runs but the one that is meant to, whatever an engine is called.
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{hashed}'; base-uri 'none'"
    parts = [
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n',
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n',
        f"<title>{_title(runs)}</title>\n<style>{css}</style></head>\n<body>\n",
        f'<header><h1>enginefsm report</h1><p class="faint">of {escape(", ".join(names))}</p>\n',
        *_notes(runs, passed_over),
        '<div class="controls">'
        '<input id="search" type="search" placeholder="find an engine" aria-label="find an engine">'
        '<label><input id="troubled" type="checkbox"> only those with a fault, or dead</label></div></header>\n',
        *(part for run in runs for part in _run(run)),
        f"<script>{script}</script>\n</body></html>\n",
    ]
    return "".join(parts).encode("utf-8", "replace")


def _title(runs: Sequence[Run]) -> str:
    return escape(f"enginefsm: {', '.join(run.run or 'a run' for run in runs[:3])}{' ...' if runs[3:] else ''}")


def _notes(runs: Sequence[Run], passed_over: int) -> Iterator[str]:
    if passed_over:
        yield f'<p class="note">{passed_over} lines could not be understood and were passed over.</p>\n'
    dropped = sum(manager.dropped for run in runs for manager in run.managers)
    if dropped:
        yield (
            f'<p class="note">{dropped} events are missing: they came faster than they could be written. '
            f"What is shown may have gaps.</p>\n"
        )


def _run(run: Run) -> Iterator[str]:
    yield f"<section><h2>run {escape(run.run) or '(without a name)'}</h2>\n"
    began = datetime.fromtimestamp(run.start_s, UTC)
    yield f'<p class="faint">{began:%Y-%m-%d %H:%M:%S} UTC, {duration(run.end_s - run.start_s)}; '
    yield f"{'; '.join(manager_text(manager) for manager in run.managers[:4])}"
    yield f"{f'; and {len(run.managers) - 4} more monitors' if run.managers[4:] else ''}</p>\n"
    yield from _tiles(run)
    yield '<div class="pair"><div><h3>Causes</h3>'
    yield from _causes(run)
    yield "</div><div><h3>The slowest</h3>"
    yield from _slowest(run)
    yield "</div></div>\n"
    yield from timeline(run, manager_text)
    yield "<h3>Engines</h3>\n"
    yield from _table(run)
    yield "</section>\n"


def manager_text(manager: Manager) -> str:
    """Where the monitor ran, and how it ended; escaped."""
    about = manager.about
    where = f"monitor on {about.get('host', '?')}, pid {about.get('pid', '?')}" if about else "a monitor"
    end = "ended in good order" if manager.ended_s is not None else "left no end: it still runs, or its process died"
    return escape(f"{where}, {end}")


def _newest(run: Run) -> list[Life]:
    return [lives[-1] for manager in run.managers for lives in manager.engines().values()]


def _tiles(run: Run) -> Iterator[str]:
    newest = _newest(run)
    states = Counter(life.state for life in newest)
    died = sum(life.died for life in run.lives)
    slowest = max((life.ready_after_s or 0.0 for life in newest), default=0.0)
    tiles = [("engines", str(len(newest)), "")]
    tiles += [(state, str(states[state]), "good") for state in (EngineState.READY,)]
    tiles += [
        (state, str(states[state]), "")
        for state in (EngineState.LAUNCHING, EngineState.UNAVAILABLE, "released")
        if states[state]
    ]
    if died:
        tiles.append(("died", str(died), "bad"))
    if slowest:
        tiles.append(("slowest launch", duration(slowest), ""))
    tiles.append(("faults", str(sum(life.faults for life in run.lives)), ""))
    tiles.append(("re-awaits", str(sum(life.reawaits for life in run.lives)), ""))
    unavailable_s = sum(life.unavailable_s for life in run.lives)
    if unavailable_s:
        tiles.append(("unavailable, together", duration(unavailable_s), ""))
    yield '<ul class="tiles">'
    yield from (f'<li class="{kind}"><b>{value}</b>{name}</li>' for name, value, kind in tiles)
    yield "</ul>\n"


def _causes(run: Run) -> Iterator[str]:
    """Why engines died, became unavailable, and which calls failed: how often, and of whom."""
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
    if not causes:
        yield '<p class="faint">Nothing failed.</p>'
        return
    yield '<table class="causes"><thead><tr><th>cause</th><th class="n">times</th><th>engines</th></tr></thead><tbody>'
    for (_, state, why), titles in sorted(causes.items(), key=lambda one: (one[0][0], -len(one[1]), one[0])):
        what = f'<span class="dot {state}"></span>{state}: {escape(why)}' if state else f"call failed: {escape(why)}"
        yield f'<tr><td>{what}</td><td class="n">{len(titles)}</td><td>{_named(titles)}</td></tr>'
    yield "</tbody></table>"


def _named(titles: Iterable[str]) -> str:
    several = sorted(set(titles), key=natural)
    more = f" and {len(several) - _NAMED} more" if several[_NAMED:] else ""
    return escape(", ".join(several[:_NAMED])) + more


def _slowest(run: Run) -> Iterator[str]:
    ready = sorted(((life.ready_after_s, life) for life in run.lives if life.ready_after_s), key=lambda one: -one[0])
    never = [life for life in run.lives if life.ready_after_s is None and life.steps and life.state != "released"]
    longest_s = max([ready[0][0] if ready else 0.0, *(_age_s(life) for life in never)], default=0.0) or 1.0
    shown = [(life, _age_s(life), True) for life in sorted(never, key=_age_s, reverse=True)[: _SLOWEST // 2]]
    shown += [(life, after_s, False) for after_s, life in ready[: _SLOWEST - len(shown)]]
    if not shown:
        yield '<p class="faint">No launch was seen.</p>'
        return
    yield '<table class="slowest"><thead><tr><th>engine</th><th class="n">ready after</th><th></th></tr></thead><tbody>'
    for life, after_s, is_never in shown:
        text = f"not ready: {escape(life.state)} after {duration(after_s)}" if is_never else duration(after_s)
        if is_never and life.state != EngineState.DEAD:
            text = f"not yet: {escape(life.state)}, {duration(after_s)}"
        yield (
            f'<tr><td>{escape(life.title)}</td><td class="n">{text}</td><td>'
            f'<span class="bar{" never" if is_never else ""}" style="width:{after_s / longest_s:.1%}"></span></td></tr>'
        )
    yield "</tbody></table>"


def _age_s(life: Life) -> float:
    """How long it lived, or lives already."""
    living = [span.end_s - span.start_s for span in life.spans if span.state != EngineState.DEAD]
    return sum(living)


def _table(run: Run) -> Iterator[str]:
    yield '<div class="wide"><table class="engines"><thead><tr>'
    for name, kind in _COLUMNS:
        yield f'<th class="{kind}" scope="col"><button type="button">{name}</button></th>'
    yield "</tr></thead><tbody>\n"
    for manager in run.managers:
        for life in sorted(manager.lives.values(), key=lambda one: (natural(one.engine), one.incarnation)):
            yield _table_row(life)
    yield "</tbody></table></div>\n"


def _table_row(life: Life) -> str:
    labels = life.labels
    words = (labels.get("node", ""), labels.get("worker_type", ""), labels.get("model", ""))
    cells = [
        f"<td>{escape(life.title)}</td>",
        f'<td><span class="dot {life.state}"></span>{life.state or "?"}</td>',
        f"<td>{escape(life.reason)}</td>",
        _seconds(life.ready_after_s),
        _seconds(life.unavailable_s or None),
        f'<td class="n">{life.faults}</td>',
        f'<td class="n">{life.reawaits}</td>',
        *(f"<td>{escape(word)}</td>" for word in words),
    ]
    return f'<tr data-engine="{escape(life.engine)}" data-smooth="{int(life.is_smooth)}">{"".join(cells)}</tr>\n'


def _seconds(value_s: float | None) -> str:
    if value_s is None:
        return '<td class="n" data-v=""></td>'
    return f'<td class="n" data-v="{value_s:.3f}">{duration(value_s)}</td>'
