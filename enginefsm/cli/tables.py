"""Tables of engines on a terminal, for `enginefsm demo`, `enginefsm status` and `enginefsm watch`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, TypeVar

from rich import box
from rich.table import Table

from enginefsm.cli.order import natural
from enginefsm.fsm.states import EngineState

STYLES: dict[str, str] = {
    EngineState.LAUNCHING: "yellow",
    EngineState.READY: "green",
    EngineState.UNAVAILABLE: "bold magenta",
    EngineState.DEAD: "bold red",
}
"""The style of each state, by its name."""

Column = tuple[str, Literal["left", "right"], int | None]
"""Header, justification, and share of the width that is left. None takes the width of the content."""
T = TypeVar("T")


def what_fits(
    engines: Sequence[T], room: int, name: Callable[[T], str], is_ready: Callable[[T], bool]
) -> tuple[list[T], int]:
    """Return at most `room` engines, sorted by name, and the number left out. Ready engines are left out first."""
    if len(engines) > room:
        engines = sorted(engines, key=is_ready)
    shown = sorted(engines[:room], key=lambda engine: natural(name(engine)))
    return shown, len(engines) - len(shown)


def engine_table(columns: Sequence[Column]) -> Table:
    """Return a table without rows, as wide as the terminal."""
    table = Table(box=box.SIMPLE_HEAD, expand=True, pad_edge=False, padding=(0, 1, 0, 0))
    for header, justify, ratio in columns:
        table.add_column(header, justify=justify, ratio=ratio, no_wrap=True)
    return table
