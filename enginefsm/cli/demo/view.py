"""Shows a bringup: a live table on a terminal, one line for each event elsewhere, and a summary at the end."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from enginefsm import Engine, EngineState, Event, Transition
from enginefsm.cli.demo.board import Board, Life
from enginefsm.cli.demo.faults import Injection
from enginefsm.cli.tables import STYLES, Column, engine_table, what_fits

_RAISED = "get() raised, as the job would see it"
_REFRESHES_PER_S = 8
_LINES_AROUND_TABLE = 8
_COLUMNS: tuple[Column, ...] = (
    ("engine", "left", None),
    ("state", "left", None),
    ("for", "right", None),
    ("tries", "right", None),
    ("reason", "left", None),
    ("faults", "left", 1),
)


class View(Protocol):
    """Shows a bringup while it runs. Any thread may call its methods, but one thread enters and leaves it."""

    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def note(self, text: str, style: str = "") -> None:
        """Show a text now."""

    def failure(self, error: Exception) -> None:
        """Show the exception that `get` raised."""

    def event(self, event: Event) -> None:
        """Show an event of the monitor."""

    def injected(self, injection: Injection) -> None:
        """Show a fault."""


class Lines:
    """Prints one line for each event."""

    def __init__(self, console: Console, clock_s: Callable[[], float]) -> None:
        self._console = console
        self._clock_s = clock_s

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def note(self, text: str, style: str = "") -> None:
        """Print the text with the time."""
        say(self._console, f"{self._clock_s():6.1f} s  {text}", style)

    def failure(self, error: Exception) -> None:
        """Print the last lines of the exception's traceback."""
        self.note(_RAISED, "bold red")
        for line in _as_seen(error).split("\n"):
            say(self._console, f"          | {line}", "red")

    def event(self, event: Event) -> None:
        """Print a step of an engine."""
        if isinstance(event, Transition):
            title = Life(event.engine, event.incarnation).title
            step = f"{event.from_state} -> {event.to_state}" if event.from_state else event.to_state
            self.note(f"{title}: {step} ({event.reason})", STYLES[event.to_state])

    def injected(self, injection: Injection) -> None:
        """Print a fault."""
        self.note(f"{injection.fault.engine}: * {injection.what}", "bold")


class LiveTable(Lines):
    """Redraws a table in place. Faults and failures scroll by above it."""

    def __init__(
        self,
        console: Console,
        clock_s: Callable[[], float],
        board: Board,
        engines: Callable[[], Sequence[Engine]],
        caption: str,
    ) -> None:
        super().__init__(console, clock_s)
        self._board = board
        self._engines = engines
        self._caption = caption
        self._live = Live(
            get_renderable=self._draw, console=console, refresh_per_second=_REFRESHES_PER_S, transient=True
        )

    def __enter__(self) -> Self:
        self._live.start(refresh=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def failure(self, error: Exception) -> None:
        """Print the exception in a frame, because its lines are long."""
        self._console.print(Panel(Text(_as_seen(error)), title=_RAISED, title_align="left", border_style="red"))

    def event(self, event: Event) -> None:
        """Do nothing: the table shows the step."""

    def _draw(self) -> Group:
        all_engines = self._engines()
        up = sum(engine.fsm.state is EngineState.READY for engine in all_engines)
        title = Text.assemble(
            ("enginefsm demo", "bold"), f"  {up} of {len(all_engines)} ready  {self._clock_s():.1f} s"
        )
        engines, hidden = what_fits(
            all_engines,
            max(1, self._console.height - _LINES_AROUND_TABLE),
            lambda engine: engine.fsm.name,
            lambda engine: engine.fsm.state is EngineState.READY,
        )
        more = [Text(f" and {hidden} more", "dim")] if hidden else []
        return Group(title, self._table(engines), *more, Text(self._caption, "dim"))

    def _table(self, engines: Sequence[Engine]) -> Table:
        table = engine_table(_COLUMNS)
        now = time.time()
        for engine in engines:
            life, state = self._board.life(engine.fsm.name, engine.fsm.incarnation), engine.fsm.state
            table.add_row(
                life.title,
                Text(state, STYLES[state]),
                f"{max(0.0, now - engine.fsm.since):.1f} s",
                str(life.attempts),
                engine.fsm.reason,
                _faults(life),
            )
        return table


def say(console: Console, text: str, style: str = "") -> None:
    """Print one line. A terminal wraps it between words."""
    console.print(Text(text, style), soft_wrap=not console.is_terminal)


def summarize(console: Console, lives: Sequence[Life], heading: str, came_up: bool) -> bool:
    """Print the faults and their results. Return whether each engine came up or died as it should."""
    say(console, heading, "bold")
    title_width = max((len(life.title) for life in lives), default=0)
    faults_width = max((len(_faults(life)) for life in lives), default=0)
    for life in lives:
        line = f"  {life.title:{title_width}}  {_faults(life):{faults_width}}  {_outcome(life)}"
        say(console, line, "" if life.is_as_it_should_be else "bold red")
    wrong = [life.title for life in lives if not life.is_as_it_should_be]
    killed = [life.name for life in lives if life.was_killed]
    if wrong or not came_up:
        say(console, f"Not as it should be: {', '.join(wrong) or 'the bringup failed'}.", "bold red")
        return False
    if killed:
        say(console, f"{', '.join(killed)} was killed: get() named it at once, and it was replaced.")
    count = len(lives) - len(killed)
    say(console, f"{count} of {count} engines came up and answer; init ran once in each.", "bold green")
    return True


def _faults(life: Life) -> str:
    """Return the faults of an engine, which are of one kind: `cut at 1.2, 3.4 s`."""
    moments_s = ", ".join(f"{each.at_s:.1f}" for each in life.injections if each.hit)
    hits = [f"{life.injections[0].fault.kind} at {moments_s} s"] if moments_s else []
    missed = [f"{each.fault.kind} missed" for each in life.injections if not each.hit]
    return "; ".join(hits + missed) or "-"


def _outcome(life: Life) -> str:
    if life.dead_because is not None:
        return f"dead after {life.dead_after_s:.1f} s: {life.dead_because}"
    if life.ready_after_s is None:
        return "not ready"
    ran = {None: "", 1: ", init ran once"}.get(life.inits, f", init ran {life.inits} times")
    tries = "1 try" if life.attempts == 1 else f"{life.attempts} tries"
    return f"ready after {life.ready_after_s:.1f} s, {tries}{ran}"


def _as_seen(error: Exception) -> str:
    # Ray colours its exceptions also if there is no terminal.
    return Text.from_ansi("".join(traceback.format_exception_only(error))).plain.rstrip("\n")
