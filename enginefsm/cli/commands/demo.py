"""`enginefsm demo`."""

from __future__ import annotations

import importlib.util
import random
from pathlib import Path

import click

from enginefsm.cli.ends import FAILED, OK, RefusedError


@click.command(short_help="Start engines on a Ray of this machine and inject faults.")
@click.option("--engines", type=int, default=4, metavar="N", help="The number of engines.")
@click.option(
    "--faults",
    default="cut",
    metavar="KINDS",
    help="The faults that hit engines while they load, separated by commas: cut (the connection to the engine breaks, "
    "once or twice), kill (one engine gets SIGKILL), freeze (SIGSTOP for a time); or none.",
)
@click.option("--seed", type=int, metavar="N", help="Repeat the faults of an earlier run. By default they are new.")
@click.option(
    "--engine",
    type=click.Choice(["stand-in", "sglang"]),
    default="stand-in",
    help="stand-in: a small server that starts up as SGLang does. sglang: a real SGLang server, on the CPU.",
)
@click.option(
    "--model",
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="The directory of the model that sglang serves. By default the demo makes a tiny one with random weights.",
)
@click.option("--metrics-port", type=int, default=0, metavar="PORT", help="The port of /metrics. 0 takes a free port.")
@click.option(
    "--events",
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="Append an event log to this file, for enginefsm report.",
)
def demo(
    engines: int,
    faults: str,
    seed: int | None,
    engine: str,
    model: Path | None,
    metrics_port: int,
    events: Path | None,
) -> int:
    """Start engines side by side on a Ray of this machine, inject faults while they load, and sum up the result.

    The exit code is 0 only if every engine that should come up did, and every engine that should die did.
    """
    missing = [package for package in ("rich", "psutil") if importlib.util.find_spec(package) is None]
    if missing:
        raise RefusedError(f"this needs {' and '.join(missing)}: pip install 'enginefsm[demo]'")
    from enginefsm.cli import demo

    try:
        options = demo.Options(
            engines=engines,
            faults=demo.parse_faults(faults),
            seed=random.randrange(10_000) if seed is None else seed,
            engine=engine,
            model=model,
            metrics_port=metrics_port,
            events=events,
        )
        return OK if demo.run(options) else FAILED
    except demo.DemoError as error:
        raise RefusedError(str(error)) from error
