"""What differs between Ray versions for a cluster as a whole."""

from __future__ import annotations

import re

TESTED = ("2.47.1", "2.55.1", "2.60.0")
"""The Ray versions on which CI runs the tests that depend on Ray (`tests/matrix`)."""

INSTALLED = ("2.48.0", "2.57.1")
"""The Ray versions on which CI runs only the installation, the demo and the type checks."""

CLEANS_UP_FROM = (2, 57)
"""From this version on Ray kills the process group of an actor that died. Measured on 2.55.1 (no) and 2.57.1 (yes)."""


def numbers(version: str) -> tuple[int, ...]:
    """Return the leading numbers of a version: (2, 60, 0) for `2.60.0rc1`."""
    return tuple(int(part) for part in re.findall(r"\d+", re.match(r"[\d.]*", version)[0]))  # type: ignore[index]  # it matches ""
