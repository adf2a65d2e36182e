"""What tests see of processes, which may end while they are looked at."""

from __future__ import annotations

import contextlib

import psutil

from support.engines import wait_until


def is_gone(process: psutil.Process) -> bool:
    """Ended, whether or not somebody has reaped it."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def below(process: psutil.Process | None = None, name: str | None = None) -> list[psutil.Process]:
    """All processes below one, or below this one; those of that name, if one is given."""
    found = []
    with contextlib.suppress(psutil.NoSuchProcess):
        found = (process or psutil.Process()).children(recursive=True)
    return [each for each in found if name is None or _name(each) == name]


def freeze(process: psutil.Process) -> None:
    """Stop a process, and return once it stands still: its threads may run on for a moment on a busy machine."""
    process.suspend()
    wait_until(lambda: process.status() == psutil.STATUS_STOPPED, what=f"the freeze of {process}")


def _name(process: psutil.Process) -> str:
    try:
        return process.name()
    except psutil.NoSuchProcess:
        return ""
