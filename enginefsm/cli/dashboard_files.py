"""Writes out the package's files for operators: dashboards, alert rules with tests, runbooks, examples."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

RUNBOOKS = "runbooks.md"
# An installed package holds the files. In a checkout they lie beside the package, with the code that builds them.
_PLACES = (Path(__file__).parents[1] / "dashboards", Path(__file__).parents[2] / "dashboards")
_KINDS = {".json", ".md", ".yml"}


class DashboardFilesError(Exception):
    """The files cannot be written. The message says why and what to do, in one line."""


def write(out: Path, *, force: bool = False, runbooks_url: str | None = None) -> list[Path]:
    """Write the files into the directory `out`, and return their paths. Make the directory if it does not exist.

    If a file exists already, write nothing and raise DashboardFilesError, unless `force` is true. The alerts link to
    `runbooks_url`, the address at which the team reads the runbooks.
    """
    files = {out / name: text for name, text in _carried()}
    there = [path for path in files if path.exists() or path.is_symlink()]
    if there and not force:
        others = f" and {len(there) - 1} more" if there[1:] else ""
        raise DashboardFilesError(f"{there[0]}{others} would be overwritten: name another directory, or add --force")
    try:
        for path, text in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            if runbooks_url is not None:
                text = text.replace(f"runbook_url: {RUNBOOKS}", f"runbook_url: {runbooks_url}")
            path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise DashboardFilesError(f"cannot write to {out}: {error.strerror}: {error.filename}") from error
    return list(files)


def _carried() -> Iterator[tuple[Path, str]]:
    top = next((place for place in _PLACES if place.is_dir()), None)
    if top is None:
        raise DashboardFilesError("this installation of enginefsm lacks its dashboards: install it again")
    for path in sorted(top.rglob("*")):
        if path.suffix in _KINDS:
            yield path.relative_to(top), path.read_text(encoding="utf-8")
