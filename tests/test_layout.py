"""The packages import one way, as docs/architecture.md lists them, and no modules import each other in a circle.

The tests read the source with `ast`, so that imports inside functions and for type checkers count as well.
"""

from __future__ import annotations

import ast
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Each may import those after it. "" is enginefsm/__init__.py: the public names, for users and the packages before it.
ORDER = [
    "testing", "embed", "cli", "rehearsal", "", "monitor", "health", "export", "metrics", "_wait", "_engine", "_calls",
    "_ray", "fsm",
]  # fmt: skip
# Everything may import these. They import only each other and fsm, whose types they carry.
SHARED = {"errors", "events", "policy"}

# Imports that go the other way today. The test fails if one of them is gone: take it off the list then.
KNOWN_OFFENDERS: set[tuple[str, str]] = set()


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in (ROOT / "enginefsm").rglob("*.py")}


def imports(module):
    """The modules of enginefsm that one module names in its imports."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            submodules = names & MODULES.keys()
            found |= submodules
            if names - submodules:
                found.add(node.module)
    return (found & MODULES.keys()) - {module}


GRAPH = {module: imports(module) for module in MODULES}


def package(module):
    return module.partition(".")[2].partition(".")[0]


def goes_down(importer, imported):
    above, below = package(importer), package(imported)
    if above == below or below in SHARED:
        return True
    if above in SHARED:
        return below == "fsm"
    return ORDER.index(above) < ORDER.index(below)


def test_each_package_has_its_place_in_the_order():
    assert {package(module) for module in MODULES} == {*ORDER, *SHARED}


def test_imports_between_packages_go_one_way():
    wrong = {(one, other) for one, others in GRAPH.items() for other in others if not goes_down(one, other)}
    assert wrong == KNOWN_OFFENDERS


def test_no_modules_import_each_other_in_a_circle():
    sound = {one: {other for other in others if (one, other) not in KNOWN_OFFENDERS} for one, others in GRAPH.items()}
    try:
        graphlib.TopologicalSorter(sound).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"import circle: {' <- '.join(error.args[1])}")


def test_an_import_that_goes_up_is_noticed():
    assert not goes_down("enginefsm.fsm.states", "enginefsm.monitor")
    assert not goes_down("enginefsm.events", "enginefsm.metrics.collector")
    assert goes_down("enginefsm.cli.main", "enginefsm")


def test_no_test_file_imports_another_and_their_names_are_unique():
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    names = [path.stem for path in files]
    assert sorted(set(names)) == sorted(names)
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported = {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported = {node.module}
            else:
                continue
            assert not imported & {*names, "conftest"}, path
