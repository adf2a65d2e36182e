"""How a command ends: its exit codes, and the errors that end it with one line on standard error."""

from __future__ import annotations

import click

OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130
"""Exit codes. Shells use 130 for a command that Ctrl-C ended."""


class RefusedError(click.ClickException):
    """The command cannot do what the user asked for. The message says why and what to do, in one line."""

    exit_code = USAGE


class FailedError(click.ClickException):
    """The command did its work and has nothing good to say. The message says why, in one line."""

    exit_code = FAILED
