"""`enginefsm dashboards`."""

from __future__ import annotations

from pathlib import Path

import click

from enginefsm.cli.ends import RefusedError


@click.command(short_help="Write dashboards, alert rules and runbooks.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    required=True,
    metavar="DIR",
    help="The directory to write into. It is made if it does not exist.",
)
@click.option("--force", is_flag=True, help="Overwrite files that exist.")
@click.option(
    "--runbooks-url",
    metavar="URL",
    help="The address at which your team reads runbooks.md. The alerts link there, by default to the bare file name.",
)
def dashboards(out: Path, force: bool, runbooks_url: str | None) -> None:
    """Write Grafana dashboards, Prometheus alert rules with their tests, runbooks, and example configurations."""
    from enginefsm.cli import dashboard_files

    try:
        written = dashboard_files.write(out, force=force, runbooks_url=runbooks_url)
    except dashboard_files.DashboardFilesError as error:
        raise RefusedError(str(error)) from error
    for path in written:
        click.echo(path)
