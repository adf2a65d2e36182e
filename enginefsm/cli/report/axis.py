"""The ticks of a time axis."""

from __future__ import annotations

import math
from typing import NamedTuple

_MINUTE_S, _HOUR_S, _DAY_S = 60, 3600, 86400
_STEPS_S = (
    *(base * 10.0**power for power in range(-3, 1) for base in (1, 2, 5)), 10.0, 20.0, 30.0,
    *(minutes * _MINUTE_S for minutes in (1, 2, 5, 10, 20, 30)), *(hours * _HOUR_S for hours in (1, 2, 3, 6, 12)),
    *(days * _DAY_S for days in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 5000, 20000)),
)  # fmt: skip


class Tick(NamedTuple):
    """A tick: its place on the axis, in seconds from the start, and its text."""

    at_s: float
    text: str


def ticks(length_s: float, about: int) -> list[Tick]:
    """Return about `about` round times from 0 to `length_s`, in seconds, or in larger units on a long axis."""
    step_s = next((step for step in _STEPS_S if length_s / step <= about), _STEPS_S[-1])
    unit_s, unit = _unit(length_s, step_s)
    digits = max(0, -math.floor(math.log10(step_s / unit_s) + 1e-9))
    return [
        Tick(number * step_s, f"{number * step_s / unit_s:.{digits}f} {unit}")
        for number in range(math.floor(length_s / step_s + 1e-9) + 1)
    ]


def _unit(length_s: float, step_s: float) -> tuple[int, str]:
    for unit_s, unit, from_s in ((_DAY_S, "d", 3 * _DAY_S), (_HOUR_S, "h", 3 * _HOUR_S), (_MINUTE_S, "min", 900)):
        if length_s >= from_s and step_s % unit_s == 0:
            return unit_s, unit
    return 1, "s"
