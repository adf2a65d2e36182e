"""Shows what the hub knows until Ctrl-C: a table that is redrawn on a terminal, one line for each change elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from enginefsm.cli.status.finding import FleetJson, HubReader, NothingToSeeError, checked_run
from enginefsm.cli.status.words import changes, printable

_REFRESHES_PER_S = 2


def watch_lines(
    reader: HubReader, run: str | None, interval_s: float, write: Callable[[str], object] | None = None
) -> None:
    """Write what the hub knows, and then each change, until Ctrl-C. Write once that the hub has stopped answering.

    Raise NothingToSeeError if the first look finds nothing.
    """
    before: FleetJson | None = None
    lost = False
    while True:
        try:
            now = reader.read(run) if before is not None else checked_run(reader.read(run), run)
        except NothingToSeeError as error:
            if before is None:
                raise
            told = [] if lost else [f"{printable(str(error))}; it is tried again"]
            lost = True
        else:
            told = ["the hub answers again"] if lost else []
            told += changes(before, now)
            before, lost = now, False
        for line in told:
            (write or _write)(f"{time.strftime('%H:%M:%S')}  {line}\n")
        time.sleep(interval_s)


def watch_table(reader: HubReader, run: str | None, interval_s: float) -> None:
    """Draw what the hub knows until Ctrl-C. The last picture stays on the terminal.

    Raise NothingToSeeError if the first look finds nothing.
    """
    from rich.console import Console
    from rich.live import Live

    from enginefsm.cli.status.look import tables

    console = Console(highlight=False)
    fleet, read_at, notice = checked_run(reader.read(run), run), time.monotonic(), ""

    def draw() -> object:
        return tables(fleet, height=console.height, passed_s=time.monotonic() - read_at, notice=notice)

    with Live(get_renderable=draw, console=console, refresh_per_second=_REFRESHES_PER_S):  # type: ignore[arg-type]
        while True:
            time.sleep(interval_s)
            try:
                fleet, read_at, notice = reader.read(run), time.monotonic(), ""
            except NothingToSeeError as error:
                notice = f"{printable(str(error))}; this is what it said {time.monotonic() - read_at:.0f} s ago"


def _write(line: str) -> None:
    sys.stdout.write(line)
    sys.stdout.flush()
