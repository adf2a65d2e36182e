"""A pytest fixture for tests of code that uses enginefsm. Import it in your `conftest.py`:

from enginefsm.testing import engine_monitor  # noqa: F401
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest

import enginefsm
from enginefsm.export import VARIABLE

# The budget is short, so that an engine that stays away fails the test soon.
_POLICY = enginefsm.RetryPolicy(base_s=0.001, cap_s=0.001, jitter="none", budget_s=10.0)


@pytest.fixture
def engine_monitor(monkeypatch: pytest.MonkeyPatch) -> Iterator[enginefsm.EngineMonitor]:
    """Replace the process's monitor for one test by one that resubmits calls at once and exports nothing.

    Code under test that calls `configure` gets a monitor with the arguments that it passes. That monitor exports
    nothing either, unless the code passes `export`.
    """
    make = functools.partial(enginefsm.EngineMonitor, run="test", policy=_POLICY, export=[])
    monkeypatch.setenv(VARIABLE, "none")
    monkeypatch.setattr(enginefsm, "_make_monitor", make)
    monkeypatch.setattr(enginefsm, "_monitor", make())
    yield enginefsm.default_monitor()
    enginefsm.default_monitor().close()
