"""Reads event logs, a line at a time. A line that is no event carries the reason; the other lines count."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from enginefsm.export.jsonl import FORMAT
from enginefsm.fsm.states import EngineState

EventJson = dict[str, Any]


class ReportError(Exception):
    """The report cannot be made. The message says why, in one line."""


class Line(NamedTuple):
    """One line of an event log."""

    number: int
    event: EventJson
    problem: str
    """Why the line is no event; empty if it is one."""


def read(path: Path) -> Iterator[Line]:
    """Yield the events of known kinds, and the lines that are no events. Raise ReportError if it cannot be read."""
    try:
        with path.open("rb") as file:
            for number, text in enumerate(file, 1):
                if not text.strip():
                    continue
                try:
                    event = _checked(_parsed(text))
                except _NoEventError as problem:
                    yield Line(number, {}, str(problem))
                else:
                    if event is not None:
                        yield Line(number, event, "")
    except OSError as error:
        raise ReportError(f"cannot read {path}: {error.strerror or error}") from error


class _NoEventError(ValueError):
    pass


def _parsed(text: bytes) -> Any:
    try:
        return json.loads(text.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise _NoEventError("not UTF-8") from None
    except RecursionError:
        raise _NoEventError("not an event: too deep") from None
    except ValueError as error:
        raise _NoEventError(f"not JSON: {error}") from None


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_below(value: object, bound: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -bound < value < bound


def _is_number(value: object) -> bool:
    return _is_below(value, 1e11)  # NaN is not


def _is_time(value: object) -> bool:
    return _is_number(value) and isinstance(value, int | float) and value >= 0  # up to the year 5138


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53


def _is_flag(value: object) -> bool:
    return isinstance(value, bool)


def _is_labels(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(one, str) for one in value.values())


def _is_state(value: object) -> bool:
    return isinstance(value, str) and value in list(EngineState)


def _is_earlier_state(value: object) -> bool:
    return value is None or _is_state(value)


_ALL: Mapping[str, Callable[[object], bool]] = {"run": _is_text, "manager": _is_text, "at_s": _is_time}
_OF_ENGINES = {"seq": _is_count, "engine": _is_text, "labels": _is_labels, "incarnation": _is_count}
_FIELDS: Mapping[str, Mapping[str, Callable[[object], bool]]] = {
    "begin": _ALL,
    "end": _ALL,
    "dropped": {**_ALL, "events": _is_count},
    "transition": {
        **_ALL, **_OF_ENGINES, "from": _is_earlier_state, "to": _is_state, "reason": _is_text, "spent_s": _is_number,
        "age_s": _is_number, "first_ready": _is_flag,
    },
    "outcome": {
        **_ALL, **_OF_ENGINES, "method": _is_text, "outcome": _is_text, "attempt": _is_count, "took_s": _is_number,
        "probe": _is_flag, "fault": _is_flag,
    },
}  # fmt: skip


def _checked(event: Any) -> EventJson | None:
    """Return the event, or None if this version does not know its kind. Raise _NoEventError if it is no event."""
    if not isinstance(event, dict) or not isinstance(event.get("kind"), str):
        raise _NoEventError("not an event: it has no kind")
    fields = _FIELDS.get(event["kind"])
    if fields is None:
        return None
    for name, is_right in fields.items():
        if name not in event:
            raise _NoEventError(f"not an event: {event['kind']} lacks {name}")
        if not is_right(event[name]):
            raise _NoEventError(f"not an event: {name} cannot be {_short(event[name])}")
    if event["kind"] == "begin" and event.get("format", FORMAT) != FORMAT:
        raise _NoEventError(f"of format {_short(event['format'])}, and this enginefsm reads format {FORMAT}")
    return event


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
