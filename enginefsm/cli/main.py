"""The command `enginefsm`: a group of subcommands, one module each in `enginefsm.cli.commands`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import click

from enginefsm.cli.commands.dashboards import dashboards
from enginefsm.cli.commands.demo import demo
from enginefsm.cli.commands.doctor import doctor
from enginefsm.cli.commands.report import report
from enginefsm.cli.commands.status import status
from enginefsm.cli.commands.watch import watch
from enginefsm.cli.ends import INTERRUPTED, OK

PROGRAM = "enginefsm"


@click.group(
    commands=[demo, status, watch, doctor, report, dashboards],
    no_args_is_help=False,
    context_settings={"help_option_names": ["-h", "--help"], "show_default": True, "max_content_width": 100},
)
@click.version_option(package_name="enginefsm", message="%(prog)s %(version)s")
def enginefsm() -> None:
    """Recover SGLang engines on Ray within bounds, and name those that fail."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv`, by default the arguments of this process. Return the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = PROGRAM
    try:
        with enginefsm.make_context(PROGRAM, arguments) as context:
            try:
                code = enginefsm.invoke(context)
            finally:
                command = f"{PROGRAM} {context.invoked_subcommand}" if context.invoked_subcommand else PROGRAM
        sys.stdout.flush()
        return OK if code is None else int(code)
    except click.exceptions.Exit as end:  # --help and --version
        return end.exit_code
    except click.UsageError as error:
        where = command if error.ctx is None else error.ctx.command_path
        sys.stderr.write(f"{where}: {error.format_message()} (see {where} --help)\n")
        return error.exit_code
    except click.ClickException as error:
        sys.stderr.write(f"{command}: {error.format_message()}\n")
        return error.exit_code
    except BrokenPipeError:  # the reader of the output has closed it: nothing may be written at exit either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except KeyboardInterrupt:
        sys.stderr.write(f"{command}: interrupted\n")
        return INTERRUPTED
