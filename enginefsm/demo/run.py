"""Puts the demo together, runs it, and takes everything down again."""

from __future__ import annotations

import functools
import logging
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from ray.actor import ActorHandle
from rich.console import Console

from enginefsm import EngineMonitor, MetricsServer, RetryPolicy
from enginefsm.demo import view
from enginefsm.demo.board import Board
from enginefsm.demo.bringup import Bringup, make_actor
from enginefsm.demo.cluster import local_ray
from enginefsm.demo.engines import arguments_for
from enginefsm.demo.faults import Injection, Injector
from enginefsm.demo.options import DemoError, Options
from enginefsm.demo.plan import EnginePlan, make_plan

# How long an engine takes to load, at least and at most. SGLang takes as long as it takes: these place the faults.
_LOAD_S = {"stand-in": (4.0, 5.5), "sglang": (15.0, 20.0)}
_LAUNCH_DEADLINE_S = {"stand-in": 120.0, "sglang": 900.0}


def run(options: Options) -> bool:
    """Run the demo; says whether what should come up did, and what should die did.

    Raises:
        DemoError: the metrics port cannot be had, or no tiny model can be made.
    """
    console = Console(highlight=False)
    clock_s = _Clock()
    board = Board("init")
    policy = RetryPolicy(launch_deadline_s=_LAUNCH_DEADLINE_S[options.engine])
    monitor = EngineMonitor("demo", policy, [board])
    with _log_dir() as log_dir, closing(_serve_metrics(monitor, options.metrics_port)) as server:
        url = f"metrics on http://127.0.0.1:{server.port}/metrics"
        lines = view.Lines(console, clock_s)
        try:
            lines.note(f"{_heading(options)}; {url}", "bold")
            model = _model(options, lines, log_dir)
            lines.note("starting Ray on this machine, on loopback only (5 to 15 s)")
            with local_ray():
                shown = (
                    view.LiveTable(console, clock_s, board, monitor.engines, url) if _is_screen(console) else lines
                )
                monitor.add_listener(shown.event)
                came_up = _bring_up(options, model, log_dir, monitor, board, shown, clock_s)
                as_it_should_be = view.summarize(console, board.lives(), f"{_heading(options)}:", came_up)
        except KeyboardInterrupt:
            lines.note("interrupted: engines and Ray are shut down")
            raise
        if not as_it_should_be:
            kept = Path(tempfile.mkdtemp(prefix="enginefsm-demo-failed-"))
            shutil.copytree(log_dir, kept, dirs_exist_ok=True)
            console.print(f"The engines' logs are kept in {kept}", soft_wrap=True)
    return as_it_should_be
