"""`enginefsm status`."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import sys

import click

from enginefsm.cli.commands import hub_options
from enginefsm.cli.ends import FailedError

MOST_READY = 40


@click.command(short_help="Show runs and engines as the hub knows them.")
@hub_options.address
@hub_options.run
@click.option("--json", "as_json", is_flag=True, help="Print the JSON of the hub (see enginefsm.export.fleet).")
@click.option("--all", "every", is_flag=True, help=f"Name every engine, also where more than {MOST_READY} are ready.")
def status(address: str | None, run: str | None, as_json: bool, every: bool) -> None:
    """Show what the hub of the cluster knows: runs, engines, their states, since when and why.

    The exit code is 1 if there is no cluster, no hub, or no such run.
    """
    from enginefsm.cli import status
    from enginefsm.cli.status import words

    try:
        with contextlib.closing(status.HubReader(address)) as reader:
            fleet = status.checked_run(reader.read(run), run)
    except status.NothingToSeeError as error:
        raise FailedError(str(error)) from error
    if as_json:
        click.echo(json.dumps(fleet, indent=2))
        return
    on_terminal = sys.stdout.isatty()
    most_ready = MOST_READY if on_terminal and not every else None
    if on_terminal and importlib.util.find_spec("rich") is not None:
        from rich.console import Console

        from enginefsm.cli.status.look import tables

        Console(highlight=False).print(tables(fleet, most_ready=most_ready))
    else:
        sys.stdout.writelines(f"{line}\n" for line in words.lines(fleet, most_ready=most_ready))
