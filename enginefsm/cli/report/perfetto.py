"""The trace of runs, in Chrome's trace event format, which Perfetto and chrome://tracing open.

A manager is a process, and an engine is a thread. A state is a slice whose arguments hold its reason. A call that
failed or was submitted again is an instant. Times are microseconds since the first event.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import Any

from enginefsm.cli.order import natural
from enginefsm.cli.report.history import Life, Mark, Run

# Names of colours that chrome://tracing has; Perfetto chooses its own.
_COLOURS = {"launching": "thread_state_runnable", "ready": "good", "unavailable": "bad", "dead": "terrible"}


def render(runs: list[Run]) -> bytes:
    """Return the trace as JSON."""
    began_s = min(run.start_s for run in runs)
    trace = {
        "displayTimeUnit": "ms",
        "otherData": {"began_s": began_s, "made_by": "enginefsm report"},
        "traceEvents": list(_events(runs, began_s)),
    }
    return json.dumps(trace, separators=(",", ":")).encode()


def _events(runs: list[Run], began_s: float) -> Iterator[dict[str, Any]]:
    managers = [(run, manager) for run in runs for manager in run.managers]
    # Managers and engines share no number: Perfetto takes a thread with the number of its process for its main thread.
    tids = itertools.count(len(managers) + 1)
    for pid, (run, manager) in enumerate(managers, 1):
        where = f"{manager.about.get('host', '?')}, pid {manager.about['pid']}" if "pid" in manager.about else ""
        yield _named("process_name", pid, 0, name=f"run {run.run or '?'}" + (f" ({where})" if where else ""))
        yield _named("process_sort_index", pid, 0, sort_index=pid)
        engines = sorted(manager.engines().items(), key=lambda one: natural(one[0]))
        for tid, (name, lives) in zip(tids, engines, strict=False):
            yield _named("thread_name", pid, tid, name=name)
            yield _named("thread_sort_index", pid, tid, sort_index=tid)
            for life in lives:
                for event in _life(life, began_s):
                    yield {**event, "pid": pid, "tid": tid}


def _life(life: Life, began_s: float) -> Iterator[dict[str, Any]]:
    for span in life.spans:
        start_us, end_us = _us(span.start_s, began_s), _us(span.end_s, began_s)
        if span is life.spans[-1]:  # a slice of no length is drawn below the one before it
            end_us = max(end_us, start_us + 1)
        yield {
            "ph": "X", "cat": "state", "name": span.state, "ts": start_us, "dur": end_us - start_us,
            "cname": _COLOURS[span.state],
            "args": {"reason": span.reason, "incarnation": life.incarnation, "ended": span.ended, **_labels(life)},
        }  # fmt: skip
    for mark in life.marks:
        yield {
            "ph": "i", "s": "t", "cat": "call", "name": _what(mark), "ts": _us(mark.at_s, began_s),
            "args": {
                "method": mark.method, "outcome": mark.outcome, "attempt": mark.attempt, "took_s": mark.took_s,
                "probe": mark.probe, "incarnation": life.incarnation,
            },
        }  # fmt: skip


def _what(mark: Mark) -> str:
    return f"{mark.method}: {mark.outcome}" if not mark.attempt else f"re-await {mark.attempt}: {mark.outcome}"


def _labels(life: Life) -> dict[str, str]:
    return {f"label.{name}": value for name, value in life.labels.items()}


def _us(at_s: float, began_s: float) -> int:
    return max(0, round((at_s - began_s) * 1e6))


def _named(what: str, pid: int, tid: int, **args: Any) -> dict[str, Any]:
    return {"ph": "M", "name": what, "pid": pid, "tid": tid, "ts": 0, "args": args}
