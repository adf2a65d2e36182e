"""The order in which engines are shown."""

from __future__ import annotations

import re


def natural(name: str) -> list[tuple[int, str]]:
    """Return a key that sorts engine-2 before engine-10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d{1,18})", name)]
