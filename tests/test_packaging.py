"""The distributions: the sdist builds the wheel, and the wheel holds each file that an installation needs."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def build(kind, source, out):
    """One distribution, by the backend that `python -m build` calls, without the network that it needs."""
    code = f"import sys; from setuptools import build_meta; print(build_meta.build_{kind}(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", code, out], cwd=source, check=True, capture_output=True, text=True
    )  # fmt: skip
    return out / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from the sdist as for a release."""
    directory = tmp_path_factory.mktemp("release")
    checkout = directory / "checkout"
    # Other names than these are no part of the checkout, such as environments and what an earlier build left behind.
    for name in ("enginefsm", "dashboards"):
        shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, checkout)
    sdist = build("sdist", checkout, directory)
    with tarfile.open(sdist) as archive:
        archive.extractall(directory, filter="data")
    return build("wheel", directory / sdist.name.removesuffix(".tar.gz"), directory)


def test_the_wheel_holds_each_file_of_the_package_and_the_dashboards_and_nothing_else(wheel):
    package = {path.relative_to(ROOT) for path in (ROOT / "enginefsm").rglob("*") if path.is_file()}
    package = {path for path in package if "__pycache__" not in path.parts}
    dashboards = {
        Path("enginefsm") / path.relative_to(ROOT)
        for path in (ROOT / "dashboards").rglob("*")
        if path.suffix in (".json", ".md", ".yml")
    }
    with zipfile.ZipFile(wheel) as archive:
        held = {Path(name) for name in archive.namelist() if not name.split("/")[0].endswith(".dist-info")}
    assert held == package | dashboards
    assert Path("enginefsm/py.typed") in held
