"""What tests see of processes."""

from __future__ import annotations

import psutil


def is_gone(process: psutil.Process) -> bool:
    """Ended, whether or not somebody has reaped it."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
