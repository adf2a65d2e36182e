"""The timeline: an engine a row, its states as spans, and the calls that failed or were submitted again as marks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from html import escape

from enginefsm.cli.order import natural
from enginefsm.cli.report.axis import ticks
from enginefsm.cli.report.history import Life, Manager, Mark, Run, Span
from enginefsm.cli.times import duration
from enginefsm.fsm.states import EngineState, Reason

_FEW = 40
"""Engines above which the rows are low."""
_ZOOMS = (1, 4, 16, 64)
_TICKS = 9
_MARKS = {
    "fault": '<path d="M0 0 L4.5 -8 L-4.5 -8 Z"/>',
    "failed": '<circle r="4"/><path d="M-2 -2 L2 2 M-2 2 L2 -2"/>',
    "answered": '<circle r="4"/>',
    "died": '<path d="M-4 -4 L4 4 M-4 4 L4 -4"/>',
}
_MEANINGS = {
    "fault": "call failed", "failed": "re-await failed", "answered": "re-await answered", "died": "died",
}  # fmt: skip


def timeline(run: Run, manager_text: Callable[[Manager], str]) -> Iterator[str]:
    """The timeline of a run, as HTML. `manager_text` heads the rows of each manager where there are several."""
    start_s, length_s = run.start_s, max(run.end_s - run.start_s, 0.001)
    count = sum(len(manager.engines()) for manager in run.managers)
    size = "few" if count <= _FEW else "many"
    yield '<h3>Timeline <span class="faint shown"></span></h3>\n'
    yield from _legend(size)
    yield f'<div class="timeline {size}" data-zoom="1"><div class="lanes"><div class="grid"><svg>'
    yield from _ticks(length_s, lambda at, _: f'<line x1="{at}" x2="{at}" y1="0" y2="100%"/>')
    yield '</svg></div>\n<div class="row axis"><div class="label">since the first launch</div><svg>'
    yield from _ticks(
        length_s, lambda at, text: f'<line x1="{at}" x2="{at}" y1="22" y2="28"/><text x="{at}" y="17">{text}</text>'
    )
    yield "</svg></div>\n"
    for manager in run.managers:
        if run.managers[1:]:
            yield f'<div class="manager">{manager_text(manager)}</div>\n'
        for name, lives in sorted(manager.engines().items(), key=lambda one: natural(one[0])):
            smooth = int(all(life.is_smooth for life in lives))
            shown = escape(name)
            yield f'<div class="row" data-engine="{shown}" data-smooth="{smooth}">'
            yield f'<div class="label" title="{shown}">{shown}</div><svg>'
            for life in lives:
                yield from _life(life, start_s, length_s, size)
            yield "</svg></div>\n"
    yield "</div></div>\n"


def _ticks(length_s: float, drawn: Callable[[str, str], str]) -> Iterator[str]:
    """The axis's ticks for each zoom; `drawn` gives one, from where it is and what it says."""
    for zoom in _ZOOMS:
        yield f'<g class="ticks z{zoom}">'
        yield from (drawn(_percent(tick.at_s, length_s), tick.text) for tick in ticks(length_s, _TICKS * zoom))
        yield "</g>"


def _legend(size: str) -> Iterator[str]:
    yield '<svg width="0" height="0" style="position:absolute" aria-hidden="true"><defs>'
    scale = "" if size == "few" else ' transform="scale(.72)"'
    yield from (f'<g id="{kind}-{size}"{scale}>{shape}</g>' for kind, shape in _MARKS.items())
    yield '</defs></svg>\n<div class="controls"><div class="legend">'
    for state in EngineState:
        height, top = (4, 5) if state is EngineState.DEAD else (12, 1)
        yield (
            f'<span><svg width="22" height="14"><rect class="{state}" x="1" y="{top}" width="20" height="{height}" '
            f'rx="2"/></svg>{state}</span>'
        )
    for kind, meaning in _MEANINGS.items():
        top = 11 if kind == "fault" else 7
        use = f'<use href="#{kind}-{size}" class="{kind}" x="7" y="{top}"/>'
        yield f'<span><svg width="14" height="14">{use}</svg>{meaning}</span>'
    yield '</div><div class="zoom">zoom '
    for zoom in _ZOOMS:
        pressed = "true" if zoom == 1 else "false"
        yield f'<button type="button" value="{zoom}" aria-pressed="{pressed}">{zoom}x</button> '
    yield "</div></div>\n"


def _life(life: Life, start_s: float, length_s: float, size: str) -> Iterator[str]:
    top, height = (6, 14) if size == "few" else (3, 9)
    for span in life.spans:
        thin = span.state == EngineState.DEAD  # it is no more, until another takes its place
        y, tall = (top + height // 2 - height // 6, height // 3) if thin else (top, height)
        at, width = (
            _percent(span.start_s - start_s, length_s),
            _percent(span.end_s - span.start_s, length_s),
        )
        yield (
            f'<rect class="{span.state}" x="{at}" width="{width}" y="{y}" height="{tall}">'
            f"<title>{escape(_of_span(life, span, start_s))}</title></rect>"
        )
        if thin:
            yield f'<use href="#died-{size}" class="died" x="{at}" y="{top + height // 2}"/>'
    if life.reason == Reason.RELEASED:
        at_s = float(life.steps[-1]["at_s"]) - start_s
        at = _percent(at_s, length_s)
        yield (
            f'<line class="released" x1="{at}" x2="{at}" y1="{top - 2}" y2="{top + height + 2}" stroke-width="2">'
            f"<title>{escape(life.title)}: released at {at_s:.2f} s</title></line>"
        )
    for mark in life.marks:
        y = top + height // 2 if mark.kind != "fault" else top + 3
        at = _percent(mark.at_s - start_s, length_s)
        yield (
            f'<use href="#{mark.kind}-{size}" class="{mark.kind}" x="{at}" y="{y}">'
            f"<title>{escape(_of_mark(life, mark, start_s))}</title></use>"
        )


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
