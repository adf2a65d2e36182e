"""`enginefsm watch`."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys

import click

from enginefsm.cli.commands import hub_options
from enginefsm.cli.ends import FailedError

SHORTEST_S, LONGEST_S = 0.1, 3600.0


def _checked_interval(_: click.Context, __: click.Parameter, seconds: float) -> float:
    if not SHORTEST_S <= seconds <= LONGEST_S:  # NaN is neither
        raise click.BadParameter(f"{seconds:g} is not from {SHORTEST_S:g} to {LONGEST_S:g} seconds")
    return seconds


@click.command(short_help="Show the same until Ctrl-C.")
@hub_options.address
@hub_options.run
@click.option(
    "--interval-s",
    type=float,
    default=1.0,
    callback=_checked_interval,
    metavar="S",
    help="The seconds between two looks at the hub.",
)
def watch(address: str | None, run: str | None, interval_s: float) -> None:
    """Show what the hub of the cluster knows until Ctrl-C.

    On a terminal this is a live table. Elsewhere it is one line for each change.
    """
    from enginefsm.cli import status
    from enginefsm.cli.status.watching import watch_lines, watch_table

    draws = sys.stdout.isatty() and os.environ.get("TERM") not in (None, "dumb")
    show = watch_table if draws and importlib.util.find_spec("rich") is not None else watch_lines
    try:
        with contextlib.closing(status.HubReader(address)) as reader:
            show(reader, run, interval_s)
    except status.NothingToSeeError as error:
        raise FailedError(str(error)) from error
    except KeyboardInterrupt:  # Ctrl-C is the way to end it
        pass
