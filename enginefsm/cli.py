"""The command `enginefsm`. Each subcommand is a function that adds its parser and says what runs it; see `COMMANDS`.

What a subcommand needs is imported when it runs: `--help` and `--version` need nothing but the library.
"""

from __future__ import annotations

import argparse
import importlib.util
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
        return run(arguments)
    except UsageError as error:
        sys.stderr.write(f"{arguments.prog}: {error}\n")
        return USAGE
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


def _demo(arguments: argparse.Namespace) -> int:
    missing = [package for package in ("rich", "psutil") if importlib.util.find_spec(package) is None]
    if missing:
        raise UsageError(f"this needs {' and '.join(missing)}: pip install 'enginefsm[demo]'")
    from enginefsm import demo

    try:
        options = demo.Options(
            engines=arguments.engines,
            faults=demo.parse_faults(arguments.faults),
            seed=getattr(arguments, "seed", random.randrange(10_000)),
            engine=arguments.engine,
            model=getattr(arguments, "model", None),
            metrics_port=arguments.metrics_port,
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
    from enginefsm import dashboard_files

    try:
        written = dashboard_files.write(
            arguments.out, force=arguments.force, runbooks_url=getattr(arguments, "runbooks_url", None)
        )
    except dashboard_files.DashboardFilesError as error:
        raise UsageError(str(error)) from error
    sys.stdout.writelines(f"{path}\n" for path in written)
    return OK


COMMANDS: tuple[Callable[[Subparsers], None], ...] = (_add_demo, _add_dashboards)

if __name__ == "__main__":
    sys.exit(main())
