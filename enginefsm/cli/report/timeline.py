"""The timeline of a run, laid out for `timeline.html.jinja`: an engine a row, with its states and its calls."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import NamedTuple

from markupsafe import Markup

from enginefsm.cli.order import natural
from enginefsm.cli.report.axis import ticks
from enginefsm.cli.report.history import Life, Manager, Mark, Run, Span
from enginefsm.cli.times import duration
from enginefsm.fsm.states import EngineState, Reason

_FEW = 40
"""Above so many engines the rows are low."""
_ZOOMS = (1, 4, 16, 64)
_TICKS = 9
_SHAPES = {
    "fault": Markup('<path d="M0 0 L4.5 -8 L-4.5 -8 Z"/>'),
    "failed": Markup('<circle r="4"/><path d="M-2 -2 L2 2 M-2 2 L2 -2"/>'),
    "answered": Markup('<circle r="4"/>'),
    "died": Markup('<path d="M-4 -4 L4 4 M-4 4 L4 -4"/>'),
}
_MEANINGS = {
    "fault": "call failed", "failed": "re-await failed", "answered": "re-await answered", "died": "died",
}  # fmt: skip
_LEGEND = {state.value: (5, 4) if state is EngineState.DEAD else (1, 12) for state in EngineState}


class TickView(NamedTuple):
    """A tick of the axis, and where it stands."""

    at: str
    text: str


@dataclasses.dataclass(frozen=True, slots=True)
class Shape:
    """One thing in a row: a state (`rect`), a call (`use`) or a release (`line`)."""

    element: str
    kind: str
    at: str
    y: int
    width: str = ""
    height: int = 0
    text: str = ""
    """What the reader sees when the pointer is on it."""


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """One engine, all its incarnations."""

    engine: str
    is_smooth: bool
    shapes: list[Shape]


@dataclasses.dataclass(frozen=True, slots=True)
class ManagerRows:
    """The engines of one monitor."""

    text: str
    """The heading; empty where the run has one monitor alone."""
    rows: list[Row]


@dataclasses.dataclass(frozen=True, slots=True)
class Timeline:
    """What the template draws."""

    size: str
    ticks: dict[int, list[TickView]]
    """By zoom."""
    managers: list[ManagerRows]
    shapes = _SHAPES
    meanings = _MEANINGS
    legend = _LEGEND


def timeline(run: Run, manager_text: Callable[[Manager], str]) -> Timeline:
    """Lay out the timeline of a run. `manager_text` heads the rows of each monitor if there are several."""
    start_s, length_s = run.start_s, max(run.end_s - run.start_s, 0.001)
    count = sum(len(manager.engines()) for manager in run.managers)
    is_low = count > _FEW
    ticks_of = {
        zoom: [TickView(_percent(tick.at_s, length_s), tick.text) for tick in ticks(length_s, _TICKS * zoom)]
        for zoom in _ZOOMS
    }
    managers = [
        ManagerRows(
            manager_text(manager) if run.managers[1:] else "",
            [
                Row(
                    name,
                    all(life.is_smooth for life in lives),
                    [shape for life in lives for shape in _life(life, start_s, length_s, is_low)],
                )
                for name, lives in sorted(manager.engines().items(), key=lambda one: natural(one[0]))
            ],
        )
        for manager in run.managers
    ]
    return Timeline("many" if is_low else "few", ticks_of, managers)


def _life(life: Life, start_s: float, length_s: float, is_low: bool) -> Iterator[Shape]:
    top, height = (3, 9) if is_low else (6, 14)
    for span in life.spans:
        thin = span.state == EngineState.DEAD  # nothing is there until another takes its place
        y, tall = (top + height // 2 - height // 6, height // 3) if thin else (top, height)
        at, width = _percent(span.start_s - start_s, length_s), _percent(span.end_s - span.start_s, length_s)
        yield Shape("rect", span.state, at, y, width, tall, _of_span(life, span, start_s))
        if thin:
            yield Shape("use", "died", at, top + height // 2)
    if life.reason == Reason.RELEASED:
        at_s = float(life.steps[-1]["at_s"]) - start_s
        text = f"{life.title}: released at {at_s:.2f} s"
        yield Shape("line", "released", _percent(at_s, length_s), top - 2, height=height + 4, text=text)
    for mark in life.marks:
        y = top + height // 2 if mark.kind != "fault" else top + 3
        yield Shape("use", mark.kind, _percent(mark.at_s - start_s, length_s), y, text=_of_mark(life, mark, start_s))


def _of_span(life: Life, span: Span, start_s: float) -> str:
    why = f" ({span.reason})" if span.reason else ""
    until = f"{span.end_s - start_s:.2f} s" if span.ended else "the end of the log"
    return (
        f"{life.title}: {span.state}{why}\nfrom {span.start_s - start_s:.2f} s to {until}, "
        f"{duration(span.end_s - span.start_s)}"
    )


def _of_mark(life: Life, mark: Mark, start_s: float) -> str:
    what = "probe" if mark.probe else "call"
    attempt = f"re-await {mark.attempt} of the {what}" if mark.attempt else what
    return (
        f"{life.title}: {attempt} {mark.method}(): {mark.outcome}\n"
        f"at {mark.at_s - start_s:.2f} s, after {duration(mark.took_s)}"
    )


def _percent(part_s: float, length_s: float) -> str:
    return f"{min(1.0, max(0.0, part_s / length_s)) * 100:.6g}%" if part_s else "0%"
