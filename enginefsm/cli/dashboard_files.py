"""Writes out what the package carries for operators: dashboards, alert rules and their tests, runbooks, examples."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path, PurePosixPath

RUNBOOKS = "runbooks.md"
_KINDS = {".json", ".md", ".yml"}  # in a source tree, what builds the dashboards lies beside them


class DashboardFilesError(Exception):
    """They cannot be written; the message says why and what to do, in one line."""


def write(out: Path, *, force: bool = False, runbooks_url: str | None = None) -> list[Path]:
    """Write the files into the directory `out`, made if need be, and give their paths.

    `runbooks_url` is where the team reads the runbooks: alerts then link there. Nothing is written if a file is there
    already, unless `force` is given.
    """
    files = {out / name: file.read_text(encoding="utf-8") for name, file in _carried()}
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


def _carried() -> Iterator[tuple[PurePosixPath, Traversable]]:
    top = resources.files("enginefsm").joinpath("dashboards")
    if not top.is_dir():
        raise DashboardFilesError("this installation of enginefsm lacks its dashboards: install it again")
    waiting = [(PurePosixPath(), top)]
    while waiting:
        path, directory = waiting.pop()
        for entry in sorted(directory.iterdir(), key=lambda one: one.name):
            if entry.is_dir():
                waiting.append((path / entry.name, entry))
            elif PurePosixPath(entry.name).suffix in _KINDS:
                yield path / entry.name, entry
