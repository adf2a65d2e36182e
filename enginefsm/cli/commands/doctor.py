"""`enginefsm doctor`."""

from __future__ import annotations

import importlib.util
import sys

import click

from enginefsm.cli.commands import hub_options
from enginefsm.cli.ends import FAILED, OK


@click.command(short_help="Check a cluster, and say what needs doing.")
@hub_options.address
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def doctor(address: str | None, as_json: bool) -> int:
    """Check the cluster and its hub: what was found, what it means, and what to do.

    The doctor starts nothing and changes nothing. The exit code is 1 if something needs doing. Run it on a node of the
    cluster, or in a job. docs/doctor.md explains each row.
    """
    from enginefsm.cli.doctor import checks, looking, showing

    findings = checks.diagnose(looking.look(address))
    if as_json:
        click.echo(showing.as_json(findings))
    elif sys.stdout.isatty() and importlib.util.find_spec("rich") is not None:
        from rich.console import Console

        console = Console(highlight=False)
        console.print(showing.table(findings, console.width))
        console.print(showing.summary(findings))
    else:
        sys.stdout.writelines(f"{line}\n" for line in showing.lines(findings))
    return OK if checks.exit_code_is_ok(findings) else FAILED
