"""`enginefsm report`."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import click

from enginefsm.cli.ends import RefusedError


@click.command(short_help="Make one page from event logs.")
@click.argument("events", type=click.Path(path_type=Path), nargs=-1, required=True, metavar="EVENTS.jsonl...")
@click.option(
    "--format",
    "kind",
    type=click.Choice(["html", "perfetto"]),
    default="html",
    help="html: a page that needs no network. perfetto: a trace for https://ui.perfetto.dev and chrome://tracing.",
)
@click.option(
    "-o",
    "--output",
    metavar="FILE",
    help="The file to write, or - for standard output. The default is report.html or trace.json.",
)
def report(events: tuple[Path, ...], kind: str, output: str | None) -> None:
    """Make one page from event logs: a timeline of the engines, the slowest launches, and the causes of failures.

    ENGINEFSM_EXPORT=jsonl:PATH makes a job write an event log.
    """
    if kind == "html" and importlib.util.find_spec("jinja2") is None:
        raise RefusedError("a page needs jinja2: pip install 'enginefsm[report]', or take --format perfetto")
    from enginefsm.cli import report

    output = output or ("report.html" if kind == "html" else "trace.json")
    try:
        made = report.make(events, kind, lambda complaint: click.echo(complaint, err=True))
        if output == "-":
            sys.stdout.buffer.write(made)
        else:
            report.write(made, Path(output), events)
            click.echo(output)
    except report.ReportError as error:
        raise RefusedError(str(error)) from error
