"""The command `enginefsm`. Each subcommand is a function that adds its parser and says what runs it; see `COMMANDS`.

What a subcommand needs is imported when it runs: `--help` and `--version` need nothing but the library.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import random
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from argparse import _SubParsersAction

    Subparsers = _SubParsersAction["_Parser"]

OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130
"""Exit codes. 130 is what shells give a command that Ctrl-C ended."""


class UsageError(Exception):
    """What was asked for cannot be done as asked; the message says why and what to do, in one line."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(USAGE, f"{self.prog}: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv`, by default the process's own; gives the exit code."""
    parser = _Parser(prog="enginefsm", description="Bounded recovery and named failure for SGLang engines on Ray.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {version('enginefsm')}")
    subparsers: Subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for add in COMMANDS:
        add(subparsers)
    arguments = parser.parse_args(argv)
    run: Callable[[argparse.Namespace], int] = arguments.run
    try:
        code = run(arguments)
        sys.stdout.flush()
        return code
    except UsageError as error:
        sys.stderr.write(f"{arguments.prog}: {error}\n")
        return USAGE
    except BrokenPipeError:  # whoever read the output has seen enough; nothing more is to be written at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except KeyboardInterrupt:
        sys.stderr.write(f"{arguments.prog}: interrupted\n")
        return INTERRUPTED


def _add_command(
    subparsers: Subparsers, name: str, run: Callable[[argparse.Namespace], int], text: str
) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(
        name, help=text, description=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.set_defaults(run=run, prog=parser.prog)
    return parser


def _add_demo(subparsers: Subparsers) -> None:
    parser = _add_command(
        subparsers, "demo", _demo,
        "Bring engines up side by side on a Ray of this machine while faults hit them, and say what came of it. "
        "The exit code is 0 only if every engine that should come up did, and every one that should die did.",
    )  # fmt: skip
    parser.add_argument("--engines", type=int, default=4, metavar="N", help="how many engines")
    parser.add_argument(
        "--faults", default="cut", metavar="KINDS",
        help="what hits them while they load, separated by commas: cut (the connection to the engine, once or twice), "
        "kill (one of the engines), freeze (SIGSTOP, for a time); or none",
    )  # fmt: skip
    parser.add_argument(
        "--seed", type=int, default=argparse.SUPPRESS, help="repeats the faults of an earlier run (default: a new one)"
    )
    parser.add_argument(
        "--engine", choices=("stand-in", "sglang"), default="stand-in",
        help="stand-in: a small server that starts up as SGLang's does; sglang: a real SGLang server, on the CPU",
    )  # fmt: skip
    parser.add_argument(
        "--model", type=Path, default=argparse.SUPPRESS, metavar="PATH",
        help="the directory of the model that sglang serves (default: a tiny one is made, with random weights)",
    )  # fmt: skip
    parser.add_argument("--metrics-port", type=int, default=0, metavar="PORT", help="for /metrics; 0 takes a free one")
    parser.add_argument(
        "--events", type=Path, default=argparse.SUPPRESS, metavar="PATH",
        help="append a log of events to this file, for enginefsm report",
    )  # fmt: skip


def _demo(arguments: argparse.Namespace) -> int:
    missing = [package for package in ("rich", "psutil") if importlib.util.find_spec(package) is None]
    if missing:
        raise UsageError(f"this needs {' and '.join(missing)}: pip install 'enginefsm[demo]'")
    from enginefsm.cli import demo

    try:
        options = demo.Options(
            engines=arguments.engines,
            faults=demo.parse_faults(arguments.faults),
            seed=getattr(arguments, "seed", random.randrange(10_000)),
            engine=arguments.engine,
            model=getattr(arguments, "model", None),
            metrics_port=arguments.metrics_port,
            events=getattr(arguments, "events", None),
        )
        return OK if demo.run(options) else FAILED
    except demo.DemoError as error:
        raise UsageError(str(error)) from error


def _add_dashboards(subparsers: Subparsers) -> None:
    parser = _add_command(
        subparsers, "dashboards", _dashboards,
        "Write Grafana dashboards, Prometheus alert rules with their tests, runbooks, and example configurations.",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where to write; made if need be")
    parser.add_argument("--force", action="store_true", help="overwrite files that are there")
    parser.add_argument(
        "--runbooks-url", default=argparse.SUPPRESS, metavar="URL",
        help="where your team reads runbooks.md: the alerts link there (default: the bare name of the file)",
    )  # fmt: skip


def _dashboards(arguments: argparse.Namespace) -> int:
    from enginefsm.cli import dashboard_files

    try:
        written = dashboard_files.write(
            arguments.out, force=arguments.force, runbooks_url=getattr(arguments, "runbooks_url", None)
        )
    except dashboard_files.DashboardFilesError as error:
        raise UsageError(str(error)) from error
    sys.stdout.writelines(f"{path}\n" for path in written)
    return OK


def _add_status(subparsers: Subparsers) -> None:
    parser = _add_command(
        subparsers, "status", _status,
        "Say what the cluster's hub knows: runs, engines, their states, since when and why. The exit code is 1 when "
        "there is no cluster, no hub, or no such run.",
    )  # fmt: skip
    _add_hub_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print the hub's JSON (see enginefsm.export.fleet)")
    parser.add_argument(
        "--all", action="store_true", help=f"name every engine, though more than {_MOST_READY} are ready"
    )


def _add_watch(subparsers: Subparsers) -> None:
    parser = _add_command(
        subparsers, "watch", _watch,
        "Show what the cluster's hub knows until Ctrl-C: a live table on a terminal, a line for each change elsewhere.",
    )  # fmt: skip
    _add_hub_arguments(parser)
    parser.add_argument("--interval-s", type=_interval_s, default=1.0, metavar="S", help="seconds between two looks")


def _add_hub_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--address", default=argparse.SUPPRESS,
        help="the Ray cluster's, HOST:PORT, or the hub's own, http://HOST:PORT (default: $RAY_ADDRESS, or the cluster "
        "on this machine)",
    )  # fmt: skip
    # Not --run's own name: a subcommand's function has it.
    parser.add_argument("--run", dest="run_name", default=argparse.SUPPRESS, metavar="RUN", help="show this run alone")


def _interval_s(text: str) -> float:
    seconds = float(text)
    if not 0.1 <= seconds <= 3600:
        raise argparse.ArgumentTypeError(f"from 0.1 to 3600 seconds, not {text}")
    return seconds


_MOST_READY = 40


def _status(arguments: argparse.Namespace) -> int:
    from enginefsm.cli import status
    from enginefsm.cli.status import words

    run: str | None = getattr(arguments, "run_name", None)
    try:
        with contextlib.closing(status.HubReader(getattr(arguments, "address", None))) as reader:
            fleet = status.checked_run(reader.read(run), run)
    except status.NothingToSeeError as error:
        return _nothing_to_see(arguments, error)
    on_terminal = sys.stdout.isatty()
    if arguments.json:
        sys.stdout.write(json.dumps(fleet, indent=2) + "\n")
        return OK
    most_ready = _MOST_READY if on_terminal and not arguments.all else None
    if on_terminal and importlib.util.find_spec("rich") is not None:
        from rich.console import Console

        from enginefsm.cli.status.look import tables

        Console(highlight=False).print(tables(fleet, most_ready=most_ready))
    else:
        sys.stdout.writelines(f"{line}\n" for line in words.lines(fleet, most_ready=most_ready))
    return OK


def _watch(arguments: argparse.Namespace) -> int:
    from enginefsm.cli import status
    from enginefsm.cli.status.watching import watch_lines, watch_table

    draws = sys.stdout.isatty() and os.environ.get("TERM") not in (None, "dumb")
    watch = watch_table if draws and importlib.util.find_spec("rich") is not None else watch_lines
    try:
        with contextlib.closing(status.HubReader(getattr(arguments, "address", None))) as reader:
            watch(reader, getattr(arguments, "run_name", None), arguments.interval_s)
    except status.NothingToSeeError as error:
        return _nothing_to_see(arguments, error)
    except KeyboardInterrupt:
        pass  # the way to end it
    return OK


def _nothing_to_see(arguments: argparse.Namespace, error: Exception) -> int:
    sys.stderr.write(f"{arguments.prog}: {error}\n")
    return FAILED


def _add_report(subparsers: Subparsers) -> None:
    parser = _add_command(
        subparsers, "report", _report,
        "Make one page of event logs (of ENGINEFSM_EXPORT=jsonl:PATH): a timeline of the engines, the slowest, the "
        "causes.",
    )  # fmt: skip
    parser.add_argument("events", type=Path, nargs="+", metavar="EVENTS.jsonl", help="the event log, or several")
    parser.add_argument(
        "--format", choices=("html", "perfetto"), default="html",
        help="html: a page that needs no network; perfetto: a trace for https://ui.perfetto.dev and chrome://tracing",
    )  # fmt: skip
    parser.add_argument(
        "-o", "--output", default=argparse.SUPPRESS, metavar="FILE",
        help="where to write it, - for standard output (default: report.html, or trace.json)",
    )  # fmt: skip


def _complain(text: str) -> None:
    sys.stderr.write(f"{text}\n")


def _report(arguments: argparse.Namespace) -> int:
    from enginefsm.cli import report

    output: str = getattr(arguments, "output", "report.html" if arguments.format == "html" else "trace.json")
    try:
        made = report.make(arguments.events, arguments.format, _complain)
        if output == "-":
            sys.stdout.buffer.write(made)
        else:
            report.write(made, Path(output), arguments.events)
            sys.stdout.write(f"{output}\n")
    except report.ReportError as error:
        raise UsageError(str(error)) from error
    return OK


COMMANDS: tuple[Callable[[Subparsers], None], ...] = (
    _add_demo, _add_status, _add_watch, _add_report, _add_dashboards,
)  # fmt: skip
