"""Puts the demo together, runs it, and takes everything down."""

from __future__ import annotations

import functools
import logging
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path

from rich.console import Console

from enginefsm import EngineMonitor, RetryPolicy
from enginefsm.cli.demo.board import Board
from enginefsm.cli.demo.bringup import Bringup
from enginefsm.cli.demo.cluster import local_ray
from enginefsm.cli.demo.engines import start_actor
from enginefsm.cli.demo.faults import Injection, Injector
from enginefsm.cli.demo.options import DemoError, Options
from enginefsm.cli.demo.plan import make_plan
from enginefsm.cli.demo.view import Lines, LiveTable, View, say, summarize
from enginefsm.export import EventLog
from enginefsm.metrics.collector import MetricsServer

_ADDR = "127.0.0.1"
# The shortest and the longest load of a stand-in. For SGLang, whose load time is its own, it only places the faults.
_LOAD_S = {"stand-in": (4.0, 5.5), "sglang": (12.0, 20.0)}
_LAUNCH_DEADLINE_S = {"stand-in": 120.0, "sglang": 900.0}


def run(options: Options) -> bool:
    """Run the demo. Return whether each engine came up or died as it should.

    Raises:
        DemoError: the metrics port is taken, or no tiny model can be made.
        KeyboardInterrupt: the user interrupted the demo. Everything is shut down.
    """
    # The demo shows each step itself. Of the library's log only the failures of listeners are news.
    logging.getLogger("enginefsm").addFilter(_is_failure)
    directory = Path(tempfile.mkdtemp(prefix="enginefsm-demo-"))
    keep = False
    try:
        as_it_should_be = _Demo(options, directory).run()
        keep = not as_it_should_be
    finally:
        logging.getLogger("enginefsm").removeFilter(_is_failure)
        if not keep:
            shutil.rmtree(directory, ignore_errors=True)
    return as_it_should_be


class _Demo:
    def __init__(self, options: Options, directory: Path) -> None:
        self._options = options
        self._directory = directory
        self._console = Console(highlight=False)
        self._board = Board(launch="init")
        log = [] if options.events is None else [EventLog(options.events)]
        policy = RetryPolicy(launch_deadline_s=_LAUNCH_DEADLINE_S[options.engine])
        self._monitor = EngineMonitor(run="demo", policy=policy, listeners=[self._board], export=log)
        self._began_at = time.monotonic()
        engines = f"{options.engines} {options.engine} engine{'s' if options.engines > 1 else ''}"
        faults = ", ".join(options.faults) or "none"
        self._heading = f"enginefsm demo: {engines}, faults: {faults}, seed {options.seed}"

    def run(self) -> bool:
        with closing(_serve_metrics(self._monitor, self._options.metrics_port)) as server:
            url = f"http://{_ADDR}:{server.port}/metrics"
            try:
                say(self._console, self._heading, "bold")
                say(self._console, f"metrics: {url}")
                model = self._model()
                say(self._console, "starting Ray, on the loopback only (5 to 15 s)")
                with local_ray():
                    came_up = self._bring_up(model, url)
                    as_it_should_be = summarize(self._console, self._board.lives(), self._heading, came_up)
                    if not as_it_should_be:
                        say(self._console, f"The engines' logs are below {self._directory}")
            except KeyboardInterrupt:
                say(self._console, "Interrupted; the engines, their servers and Ray are shut down.")
                raise
        return as_it_should_be

    def _bring_up(self, model: str, url: str) -> bool:
        names = [f"engine-{number}" for number in range(self._options.engines)]
        load_s = _LOAD_S[self._options.engine]
        plans = make_plan(names, self._options.faults, self._options.seed, load_s)
        start = functools.partial(start_actor, self._options.engine, model=model, log_dir=self._directory)
        self._began_at = time.monotonic()
        view = self._view(url)
        self._monitor.add_listener(view.event)

        def report(injection: Injection) -> None:
            self._board.injected(injection)
            view.injected(injection)

        injector = Injector(self._clock_s, report)
        try:
            with view:
                return Bringup(self._monitor, Path(model).name, start, injector, self._board, view).run(plans)
        finally:
            injector.stop()

    def _view(self, url: str) -> View:
        if self._console.is_terminal and sys.stdout.isatty() and not self._console.is_dumb_terminal:
            return LiveTable(self._console, self._clock_s, self._board, self._monitor.engines, f"metrics: {url}")
        return Lines(self._console, self._clock_s)

    def _model(self) -> str:
        if self._options.engine != "sglang":
            return "stand-in"
        if self._options.model is not None:
            return str(self._options.model.resolve())
        say(self._console, "making a tiny model with random weights")
        return _make_tiny_model(self._directory / "tiny-gpt2")

    def _clock_s(self) -> float:
        return time.monotonic() - self._began_at


def _serve_metrics(monitor: EngineMonitor, port: int) -> MetricsServer:
    try:
        return monitor.serve_metrics(port, addr=_ADDR)
    except OSError as error:
        raise DemoError(
            f"--metrics-port: {port} on {_ADDR} cannot be had ({error.strerror}): take another, or 0 for a free one"
        ) from error


def _make_tiny_model(directory: Path) -> str:
    # In a child process, so that this process need not load torch.
    command = [sys.executable, "-m", "enginefsm.rehearsal.tiny_model", str(directory)]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    if made.returncode != 0:
        last_line = (made.stderr.strip().split("\n") or [""])[-1]
        raise DemoError(f"a tiny model cannot be made ({last_line}): put that right, or give one with --model")
    return str(directory)


def _is_failure(record: logging.LogRecord) -> bool:
    return record.exc_info is not None
