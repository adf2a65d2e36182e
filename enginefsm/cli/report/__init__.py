"""`enginefsm report`: one page, or one trace, of event logs (their format: `enginefsm.export.jsonl`).

`reading` reads the lines, `history` puts the history of each engine together, `page` and `perfetto` show it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from enginefsm.cli.report import perfetto
from enginefsm.cli.report.history import History
from enginefsm.cli.report.reading import ReportError, read
from enginefsm.export._files import write_atomically

__all__ = ["ReportError", "make", "write"]

_MOST_COMPLAINTS = 20


def make(events: Sequence[Path], kind: str, complain: Callable[[str], None]) -> bytes:
    """Return the page (`html`) or the trace (`perfetto`) of event logs.

    Call `complain` with a text for each line that is passed over. Raise ReportError if a file cannot be read, or if no
    file has an event.
    """
    history, passed_over = History(), 0
    for path in events:
        for line in read(path):
            if line.problem:
                passed_over += 1
                if passed_over <= _MOST_COMPLAINTS:
                    complain(f"{path}:{line.number}: {line.problem}; the line is passed over")
            else:
                history.add(line.event)
    if passed_over > _MOST_COMPLAINTS:
        complain(f"{passed_over - _MOST_COMPLAINTS} more lines are passed over")
    runs = history.runs()
    if not runs:
        raise ReportError(f"there are no events in {', '.join(map(str, events))}")
    if kind == "perfetto":
        return perfetto.render(runs)
    from enginefsm.cli.report import page  # needs jinja2, which a trace does not

    return page.render(runs, [path.name for path in events], passed_over)


def write(content: bytes, output: Path, events: Sequence[Path]) -> None:
    """Write the report to `output`, as a whole or not at all. Raise ReportError if that fails."""
    if output.exists() and any(path.exists() and output.samefile(path) for path in events):
        raise ReportError(f"-o {output} is the event log itself: name another file")
    try:
        write_atomically(output, content)
    except OSError as error:
        raise ReportError(f"cannot write {output}: {error.strerror or error}") from error
