"""Run the tests beside several versions of Ray and Python; tests/matrix starts this file.

A row is RAY[@PYTHON][+lowest][+install]:
  2.48.0             Ray 2.48.0 on Python 3.11
  newest@3.13        the newest Ray that the package allows, on Python 3.13
  2.47.1+lowest      the lowest version of each dependency that the package allows
  2.57.1+install     only the installation, the demo and the type checks
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
HOME = Path(os.environ["MATRIX"])
UV = HOME / "uv" / "bin" / "uv"

CHECKERS = HOME / "checkers" / "bin"
SOURCE = HOME / "source"
TYPED_USER = SOURCE / "tests" / "support" / "typed_user.py"

# The long rows come first. The oldest Ray runs all tests beside the lowest versions of the other dependencies, and the
# installation beside the newest.
CI_ROWS = [
    "2.47.1+lowest",
    "2.55.1",
    "newest@3.12",
    "newest@3.13",
    "2.47.1+install",
    "2.48.0+install",
    "2.57.1+install",
]
TESTS = [
    "test_surface.py",
    "test_handles.py",
    "test_outcomes.py",
    "test_recovery.py",
    "test_failure.py",
    "test_asyncio.py",
    "test_launching.py",
    "test_health.py",
    "test_hub.py",
    "test_calls.py",
    "test_actorside.py",
]
STEP_LIMIT_S = 30 * 60


class StepFailedError(Exception):
    """A step of a row failed; the message names it."""


@dataclass
class Row:
    """One environment, and what came of the tests in it."""

    text: str
    ray: str
    python: str = "3.11"
    marks: set[str] = field(default_factory=set)
    interpreter: str | None = None
    failure: str | None = None
    seconds: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Row:
        version, *marks = text.split("+")
        ray, _, python = version.partition("@")
        unknown = set(marks) - {"lowest", "install"}
        if not ray or unknown or (ray == "newest" and "lowest" in marks):
            raise argparse.ArgumentTypeError(f"{text!r} is not RAY[@PYTHON][+lowest][+install]")
        return cls(text, ray, python or "3.11", set(marks))

    @property
    def directory(self) -> Path:
        return HOME / "rows" / self.text

    @property
    def python_path(self) -> Path:
        return self.directory / "venv" / "bin" / "python"


def find_interpreter(version: str) -> str | None:
    """Return an interpreter of this version: the machine's, pyenv's, Debian's or the one that uv downloads."""
    for candidate in (shutil.which(f"python{version}"), *pyenv_interpreters(version)):
        if candidate and is_python(candidate, version):
            return candidate
    with contextlib.suppress(FileNotFoundError, subprocess.SubprocessError):
        package = f"python{version}"
        found = subprocess.run(["apt-cache", "policy", package], capture_output=True, text=True, timeout=60).stdout
        if "Candidate: " in found and "Candidate: (none)" not in found:
            command = ["apt-get", "install", "--quiet=2", "--yes", "--no-install-recommends", package]
            subprocess.run(command, check=True, capture_output=True, timeout=600)
            return f"/usr/bin/{package}"
    with contextlib.suppress(subprocess.SubprocessError):
        environment = {**os.environ, "UV_PYTHON_INSTALL_DIR": str(HOME / "pythons"), "UV_HTTP_TIMEOUT": "30"}
        subprocess.run(
            [UV, "python", "install", version], check=True, capture_output=True, timeout=300, env=environment
        )
        command = [UV, "python", "find", "--managed-python", version]
        return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout.strip()
    return None


def pyenv_interpreters(version: str) -> Iterator[str]:
    """Give pyenv's interpreters by their own paths, because pyenv's shims refuse those that nobody has activated."""
    root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    for directory in root.glob(f"versions/{version}.*"):
        yield str(directory / "bin" / "python")


def is_python(candidate: str, version: str) -> bool:
    """Say whether the file runs and is this version of Python."""
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    try:
        asked = subprocess.run([candidate, "-c", code], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return False
    return asked.returncode == 0 and asked.stdout.strip() == version


def build_wheel() -> Path:
    """Build the sdist, and the wheel from the sdist, as a release does; return the wheel."""
    dist = HOME / "dist"
    shutil.rmtree(dist, ignore_errors=True)
    subprocess.run([UV, "build", "--quiet", "--out-dir", dist, ROOT], check=True)
    (wheel,) = dist.glob("*.whl")
    return wheel


def copy_source() -> None:
    """Copy what the tests need, but not enginefsm: they import the installed one."""
    shutil.rmtree(SOURCE, ignore_errors=True)
    for name in ("tests", "dashboards", "docs"):
        shutil.copytree(ROOT / name, SOURCE / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, SOURCE)


def install_type_checkers() -> None:
    """Install mypy and pyright in an environment of their own; they read each row's."""
    if not (CHECKERS / "pyright").exists():
        subprocess.run([UV, "venv", "--quiet", "--clear", "--python", sys.executable, CHECKERS.parent], check=True)
        packages = ["mypy", "pyright[nodejs]"]  # the extra brings node, which a machine need not have
        subprocess.run(
            [UV, "pip", "install", "--quiet", "--python", CHECKERS / "python", *packages], check=True
        )  # fmt: skip


class Run:
    """The steps of one row, each with its output in the row's log."""

    def __init__(self, row: Row, wheel: Path, scratch: Path):
        self.row = row
        self.wheel = wheel
        self.log = row.directory / "log.txt"
        # Ray, pytest and enginefsm keep their files below TMPDIR. Rows that run at once must not share them.
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "PYTHON"))},
            "TMPDIR": str(scratch),
        }

    def all(self) -> None:
        """Make the environment, install the wheel into it as users do, and run everything there."""
        row = self.row
        self.step("environment", UV, "venv", "--quiet", "--seed", "--python", row.interpreter, row.directory / "venv")
        if "lowest" in row.marks:
            pins = row.directory / "pins.txt"
            pins.write_text(f"ray=={row.ray}\n")
            self.uv_pip("lowest versions", "--resolution", "lowest-direct", "--constraints", pins, "--requirements",
                        SOURCE / "pyproject.toml", "--extra", "demo", "--extra", "report")  # fmt: skip
        else:
            self.uv_pip("Ray", "ray<3" if row.ray == "newest" else f"ray=={row.ray}")
        before = self.ray_version()
        if row.ray not in ("newest", before):
            raise StepFailedError(f"Ray is {before} before enginefsm is installed")
        self.python("pip install", "-m", "pip", "install", "--quiet", self.wheel)
        self.assert_ray_is(before)
        self.uv_pip("demo requirements", f"enginefsm[demo] @ {self.wheel.as_uri()}")
        self.step("demo", row.python_path.with_name("enginefsm"), "demo", "--engines", "2")
        self.step("mypy", CHECKERS / "mypy", "--strict", "--python-executable", row.python_path, TYPED_USER)
        self.step("pyright", CHECKERS / "pyright", "--pythonpath", row.python_path, TYPED_USER)
        if "install" in row.marks:
            return
        self.uv_pip("test requirements", f"enginefsm[test] @ {self.wheel.as_uri()}")
        self.assert_ray_is(before)
        source = shutil.copytree(SOURCE, row.directory / "source")
        self.python("tests", "-m", "pytest", "-q", *find_tests(source), cwd=source)
        self.python("bringups with cuts", "tests/benchmarks/bringups.py", "--bringups", "4", cwd=source)

    def uv_pip(self, name: str, *arguments: str | Path) -> None:
        self.step(name, UV, "pip", "install", "--quiet", "--python", self.row.python_path, *arguments)

    def python(self, name: str, *arguments: str | Path, cwd: Path | None = None) -> None:
        self.step(name, self.row.python_path, *arguments, cwd=cwd)

    def ray_version(self) -> str:
        code = "import importlib.metadata as m; print(m.version('ray'))"
        return subprocess.run(
            [self.row.python_path, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()

    def assert_ray_is(self, version: str) -> None:
        after = self.ray_version()
        if after != version:
            raise StepFailedError(f"the installation of enginefsm changed Ray from {version} to {after}")

    def step(self, name: str, *command: str | Path | None, cwd: Path | None = None) -> None:
        """Run one command, with its output in the log; raise if it fails or takes longer than any step should."""
        started = time.monotonic()
        with self.log.open("a") as log:
            print(f"\n$ {' '.join(map(str, command))}", file=log, flush=True)
            try:
                code = subprocess.run(
                    command, cwd=cwd or self.row.directory, env=self.environment, stdin=subprocess.DEVNULL,
                    stdout=log, stderr=subprocess.STDOUT, timeout=STEP_LIMIT_S,
                ).returncode  # fmt: skip
            except subprocess.TimeoutExpired:
                code = None
        seconds = time.monotonic() - started
        result = "ok" if code == 0 else f"did not end in {STEP_LIMIT_S} s" if code is None else f"exit status {code}"
        print(f"{self.row.text}: {name}: {result}, {seconds:.0f} s", flush=True)
        if code != 0:
            raise StepFailedError(f"{name}: {result}")


def find_tests(source: Path) -> list[Path]:
    """Return the test files, wherever they lie below tests/; exit if one is gone, because less would be tested."""
    found = {path.name: path for path in (source / "tests").rglob("test_*.py")}
    if missing := [name for name in TESTS if name not in found]:
        sys.exit(f"tests/matrix: no such test files: {' '.join(missing)}; name the new ones in {__file__}")
    return [found[name] for name in TESTS]


def run(row: Row, wheel: Path) -> None:
    """Run one row and keep its result."""
    started = time.monotonic()
    shutil.rmtree(row.directory, ignore_errors=True)
    row.directory.mkdir(parents=True)
    # Ray's sockets have paths of at most 107 characters.
    scratch = Path(tempfile.mkdtemp(prefix="row-", dir="/tmp"))
    try:
        Run(row, wheel, scratch).all()
    except StepFailedError as failed:
        row.failure = str(failed)
    finally:
        row.seconds = time.monotonic() - started
        shutil.rmtree(scratch, ignore_errors=True)


def installed(row: Row, package: str) -> str:
    """Return the version of a package in the row's environment, for the table."""
    found = list(row.directory.glob(f"venv/lib/python*/site-packages/{package}-*.dist-info"))
    return found[0].name.removeprefix(f"{package}-").removesuffix(".dist-info") if found else "-"


def print_table(rows: list[Row]) -> None:
    """Print one line a row."""
    print(f"\n{'row':22} {'Ray':8} {'Python':7} {'result':8} {'seconds':>7}")
    for row in rows:
        result = "left out" if row.interpreter is None else "failed" if row.failure else "passed"
        columns = f"{row.text:22} {installed(row, 'ray'):8} {row.python:7} {result:8} {row.seconds:7.0f}"
        print(f"{columns}  {row.failure or ''}".rstrip())


def main() -> int:
    """Run the rows that were asked for; return 1 if one failed or was left out unexpectedly."""
    parser = argparse.ArgumentParser(
        prog="tests/matrix", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", nargs="*", type=Row.parse, metavar="ROW", help=f"default: {' '.join(CI_ROWS)}")
    parser.add_argument("--jobs", type=int, default=2, help="rows that run at once (default: 2)")
    parser.add_argument(
        "--may-lack-interpreters", action="store_true", help="succeed although rows lack their version of Python"
    )
    chosen = parser.parse_args()
    rows = chosen.rows or [Row.parse(text) for text in CI_ROWS]
    started = time.monotonic()
    wheel = build_wheel()
    copy_source()
    find_tests(SOURCE)
    install_type_checkers()
    for row in rows:
        row.interpreter = find_interpreter(row.python)
    with ThreadPoolExecutor(chosen.jobs) as pool:
        # list() raises here what a row raised that is not its result.
        list(pool.map(lambda row: run(row, wheel), [row for row in rows if row.interpreter]))
    for row in rows:
        if row.failure:
            tail = (row.directory / "log.txt").read_text(errors="replace").splitlines()[-100:]
            print(f"\n--- {row.text}: {row.failure}; the end of {row.directory / 'log.txt'}:", *tail, sep="\n")
    print_table(rows)
    print(f"all rows: {time.monotonic() - started:.0f} s")
    lacking = [row.text for row in rows if row.interpreter is None]
    if lacking:
        print(f"left out, because this machine has and gets no such Python: {' '.join(lacking)}")
    return 1 if any(row.failure for row in rows) or (lacking and not chosen.may_lack_interpreters) else 0


if __name__ == "__main__":
    sys.exit(main())
