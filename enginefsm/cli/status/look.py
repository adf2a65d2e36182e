"""Shows the hub's JSON as tables on a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from enginefsm.cli.status.finding import FleetJson
from enginefsm.cli.status.words import printable, reason, run_name, summary, title
from enginefsm.cli.tables import STYLES, Column, engine_table, what_fits
from enginefsm.cli.times import duration
from enginefsm.fsm.states import EngineState

_COLUMNS: tuple[Column, ...] = (
    ("engine", "left", 3),
    ("state", "left", None),
    ("for", "right", None),
    ("reason", "left", None),
    ("node", "left", 2),
)
_LINES_OF_RUN = 5
"""The title, the table's header and frame, and the line that counts the engines left out."""


def tables(
    fleet: FleetJson,
    *,
    height: int | None = None,
    most_ready: int | None = None,
    passed_s: float = 0.0,
    notice: str = "",
) -> Group:
    """Return each run with a table of its engines.

    Args:
        fleet: The hub's JSON.
        height: The number of lines on the screen. Each run that ended then takes one line, and the tables of the other
            runs leave out ready engines first. None sets no limit.
        most_ready: If more engines of a run are ready, they are counted and not named.
        passed_s: The age of the JSON, in seconds.
        notice: A line to add below the tables.
    """
    parts: list[RenderableType] = []
    with_table = [run for run in fleet["runs"] if run["engines"] and (height is None or run["state"] != "stopped")]
    left = 0 if height is None else height - 2 - (len(fleet["runs"]) - len(with_table)) - bool(notice)
    for run in fleet["runs"]:
        parts.append(
            Text.assemble((run_name(run), "bold"), "  ", (summary(run, fleet["now_s"] + passed_s), _style(run)))
        )
        if run not in with_table:
            continue
        if height is None:
            ready = run["counts"][EngineState.READY]
            room = len(run["engines"]) - (ready if most_ready is not None and ready > most_ready else 0)
        else:
            share = left // (len(with_table) - with_table.index(run))
            room = max(1, min(len(run["engines"]), share - _LINES_OF_RUN))
            left -= room + _LINES_OF_RUN
        shown, hidden = what_fits(
            run["engines"], room, lambda engine: engine["engine"], lambda engine: engine["state"] == EngineState.READY
        )
        if shown:
            parts.append(_table(shown, passed_s))
        if hidden:
            parts.append(
                Text(f" and {hidden} more{' that are ready (--all names them)' if height is None else ''}", "dim")
            )
    if fleet["hub"].get("problem"):
        parts.append(Text(f"the hub has a problem: {printable(fleet['hub']['problem'])}", "bold red"))
    if notice:
        parts.append(Text(notice, "bold red"))
    return Group(*parts)


def _table(engines: list[Mapping[str, Any]], passed_s: float) -> Table:
    table = engine_table(_COLUMNS)
    for engine in engines:
        table.add_row(
            Text(title(engine)),
            Text(engine["state"], STYLES.get(engine["state"], "")),
            duration(engine["in_state_s"] + passed_s),
            Text(reason(engine)),
            Text(printable(engine["node"])),
        )
    return table


def _style(run: Mapping[str, Any]) -> str:
    return "bold red" if run["state"] == "silent" else "dim" if run["state"] == "stopped" else ""
