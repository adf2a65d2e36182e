"""The pages of docs/ and the README: their links lead somewhere, and the map and the diagram are those of the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from enginefsm.fsm.states import diagram

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md")), ROOT / "dashboards" / "runbooks.md"]


def prose(page):
    """The text of a page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def anchors(page):
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_each_link_of_a_page_leads_to_a_file_and_a_heading(page):
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_each_path_of_the_repository_that_a_page_names_is_there(page):
    named = re.findall(r"\b((?:enginefsm|tests|dashboards|docs)/[\w./-]*\w)", page.read_text())
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_the_map_names_each_module_once_and_none_that_is_not_there():
    named = re.findall(r"^\| `(enginefsm/[\w/]+\.py)` \|", (DOCS / "architecture.md").read_text(), re.MULTILINE)
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "enginefsm").rglob("*.py")}
    below = {path for path in modules if path.endswith("__init__.py")} - {"enginefsm/__init__.py"}
    assert sorted(named) == sorted(modules - below)


def test_the_map_says_what_each_package_is_for():
    headings = re.findall(r"^### `(enginefsm/\w+)/`: ", (DOCS / "architecture.md").read_text(), re.MULTILINE)
    packages = {str(path.parent.relative_to(ROOT)) for path in (ROOT / "enginefsm").glob("*/__init__.py")}
    assert sorted(headings) == sorted(packages)


def test_the_diagram_is_the_machine():
    page = (DOCS / "states-and-outcomes.md").read_text()
    shown = re.search(r"```mermaid\n(stateDiagram-v2\n.*?)\n```", page, re.DOTALL)
    assert shown is not None
    assert shown.group(1) == diagram()
