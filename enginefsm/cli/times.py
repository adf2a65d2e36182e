"""Times in words."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """Return a time in at most two units: `4.2 s`, `3 min 20 s`, `5 h 2 min`, `3 d 4 h`."""
    if seconds < 60:
        return f"{max(0.0, seconds):.1f} s"
    whole = int(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"
