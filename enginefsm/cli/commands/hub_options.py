"""The options of every command that reads the hub."""

from __future__ import annotations

from collections.abc import Callable

import click

address = click.option(
    "--address",
    metavar="ADDRESS",
    help="The address of the Ray cluster, HOST:PORT, or of the hub itself, http://HOST:PORT. The default is "
    "$RAY_ADDRESS, or the cluster on this machine.",
)
run: Callable[[Callable[..., object]], Callable[..., object]] = click.option(
    "--run", metavar="RUN", help="Show this run alone."
)
