"""Shows the findings: as a table on a terminal, as plain text elsewhere, as JSON for machines."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from enginefsm.cli.doctor.checks import Finding, Verdict, exit_code_is_ok
from enginefsm.cli.status.words import printable

if TYPE_CHECKING:
    from rich.table import Table

_STYLES = {
    Verdict.OK: "green",
    Verdict.NOTE: "cyan",
    Verdict.UNKNOWN: "yellow",
    Verdict.ATTENTION: "bold red",
}
_WIDE = 120
"""From this width on, meaning and advice have a column each."""


def as_json(findings: Sequence[Finding]) -> str:
    """Return the findings as JSON: `{"ok": ..., "findings": [{"check", "verdict", "found", "meaning", "advice"}]}`."""
    rows = [dataclasses.asdict(finding) for finding in findings]
    return json.dumps({"ok": exit_code_is_ok(findings), "findings": rows}, indent=2)


def lines(findings: Sequence[Finding]) -> Iterator[str]:
    """Give the findings in plain text, a few lines each."""
    width = max(len(finding.check) for finding in findings)
    margin = " " * (11 + width)
    for finding in findings:
        yield f"{finding.verdict:9}  {finding.check:{width}}  {printable(finding.found)}"
        yield f"{margin}  {printable(finding.meaning)}"
        if finding.advice:
            yield f"{margin}  Do: {printable(finding.advice)}"
    yield summary(findings)


def table(findings: Sequence[Finding], width: int) -> Table:
    """Return the findings as a table for a terminal of `width` columns."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    is_wide = width >= _WIDE
    made = Table(box=box.HORIZONTALS, expand=True, pad_edge=False, padding=(0, 2, 0, 0), show_lines=True)
    made.add_column("", no_wrap=True)
    made.add_column("check", no_wrap=True)
    made.add_column("found", ratio=3, overflow="fold")
    made.add_column("what it means" if is_wide else "what it means, and what to do", ratio=3 if is_wide else 4)
    if is_wide:
        made.add_column("what to do", ratio=3, overflow="fold")
    for finding in findings:
        style = _STYLES[finding.verdict]
        cells = [
            Text(finding.verdict, style), Text(finding.check), Text(printable(finding.found)),
            Text(printable(finding.meaning)),
        ]  # fmt: skip
        advice = Text(printable(finding.advice), style if finding.verdict is Verdict.ATTENTION else "")
        if is_wide:
            cells.append(advice)
        elif finding.advice:
            cells[-1] = Text.assemble(cells[-1], "\n", ("Do: ", "bold"), advice)
        made.add_row(*cells)
    return made


def summary(findings: Sequence[Finding]) -> str:
    """Return the result in one line."""
    urgent = [finding.check for finding in findings if finding.verdict is Verdict.ATTENTION]
    unknown = [finding.check for finding in findings if finding.verdict is Verdict.UNKNOWN]
    text = f"Something needs doing: {', '.join(urgent)}." if urgent else "Nothing needs doing."
    return text + (f" Not seen from here: {', '.join(unknown)}." if unknown else "")
