"""The names of an engine, and what its read side says. No Ray is running."""

from __future__ import annotations

import inspect
import logging
import pickle

import pytest
from support.bare_handles import bare_handle

import enginefsm
from enginefsm import EngineMonitor, EngineState, Reason
from enginefsm._calls.calls import EngineMethod
from enginefsm._engine.proxy import managed
from enginefsm.fsm.states import DETAIL_CHARS

PLAUSIBLE = (
    "actor_id", "describe", "ever_ready", "history", "incarnation", "init", "labels", "launch", "ledger", "lineage",
    "name", "observe", "on_loop", "options", "owner", "probe", "reason", "remote", "snapshot", "stage", "state", "step",
    "suspect", "proxy", "managed", "_record", "_lock",
)  # fmt: skip


def test_every_name_but_fsm_and_handle_is_the_actor_s():
    engine = EngineMonitor().adopt(bare_handle(*PLAUSIBLE), name="e", launch="init")

    assert all(isinstance(getattr(engine, name), EngineMethod) for name in PLAUSIBLE)
    assert {name for name in dir(type(engine)) if not name.startswith("__")} == {"fsm", "handle"}


@pytest.mark.parametrize("role", ["launch", "launched_if"])
@pytest.mark.parametrize("name", ["fsm", "handle"])
def test_a_method_with_a_name_of_the_engine_s_own_cannot_be_called_through_it(role, name):
    with pytest.raises(ValueError, match="has that name for itself"):
        EngineMonitor().adopt(bare_handle("init", name), name="e", **{role: name})


def test_an_engine_is_its_handle_to_pickle_sets_and_comparisons():
    handle = bare_handle()
    engine = EngineMonitor().adopt(handle, name="e")
    reconstruct, arguments = engine.__reduce__()

    assert reconstruct(*arguments) is handle
    assert pickle.loads(pickle.dumps(reconstruct))
    assert engine == handle
    assert {engine} == {handle}
    assert engine != bare_handle()


def test_the_read_side_says_where_the_engine_is_why_and_what_happened():
    engine = EngineMonitor().adopt(bare_handle(), name="default/0", model="tiny")

    assert (engine.fsm.state, engine.fsm.reason) == (EngineState.LAUNCHING, Reason.ADOPTED)
    assert managed(engine).step(Reason.ACTOR_DIED, "the node\nis  gone")

    assert (engine.fsm.name, dict(engine.fsm.labels), engine.fsm.incarnation) == ("default/0", {"model": "tiny"}, 1)
    assert (engine.fsm.state, engine.fsm.reason) == (EngineState.DEAD, Reason.ACTOR_DIED)
    assert engine.fsm.detail == "the node is gone"
    assert engine.fsm.describe().endswith("; the node is gone")
    assert [one.reason for one in engine.fsm.history()] == [Reason.ACTOR_DIED]
    with pytest.raises(AttributeError):
        engine.fsm.state = EngineState.READY


def test_a_detail_is_one_bounded_line_in_the_step_and_in_the_log(caplog):
    told = []
    monitor = EngineMonitor(listeners=[told.append])
    engine = monitor.adopt(bare_handle(), name="e")
    managed(engine).step(Reason.ACTOR_UNAVAILABLE, "connection\nreset " + "x" * 10_000)
    with caplog.at_level(logging.WARNING):
        monitor.release(engine)  # which delivers

    unavailable = told[-2]
    assert unavailable.detail.startswith("connection reset x")
    assert len(unavailable.detail) == DETAIL_CHARS
    assert "unavailable: actor_unavailable: connection reset x" in caplog.text


def test_the_module_and_the_monitor_offer_the_same_methods():
    def public(of):
        return {name for name, _ in inspect.getmembers(of, inspect.isfunction) if not name.startswith("_")}

    assert public(EngineMonitor) <= {name for name in enginefsm.__all__ if inspect.isfunction(getattr(enginefsm, name))}
    for name in public(EngineMonitor):
        ours, theirs = inspect.signature(getattr(enginefsm, name)), inspect.signature(getattr(EngineMonitor, name))
        assert [*ours.parameters.values()] == [*theirs.parameters.values()][1:], name
        assert all(
            each.kind in (each.KEYWORD_ONLY, each.VAR_KEYWORD, each.VAR_POSITIONAL) or each.default is each.empty
            for each in ours.parameters.values()
        ), f"{name} takes something optional by position"
