"""An event loop goes on while something in the process stands still: 256 engines, without Ray.

For how long the loop is held up is a figure of the machine, which tests/benchmarks/stalls.py measures.
"""

from __future__ import annotations

import asyncio

import pytest
import uvloop
from support.stalls import ENGINES, FrozenHub, Turns, given_up, measured, recovered

import enginefsm
from enginefsm import EngineState, RetryExhaustedError, RetryPolicy

WAYS = pytest.mark.parametrize(
    ("new_loop", "together"),
    [(asyncio.new_event_loop, True), (uvloop.new_event_loop, False)],
    ids=["gather on asyncio", "await each on uvloop"],
)


@WAYS
def test_the_loop_goes_on_while_a_listener_stands_still(new_loop, together):
    turns = Turns()
    went_on = []

    def listener(event):
        if not went_on:
            went_on.append(turns.go_on())

    monitor = enginefsm.EngineMonitor(policy=RetryPolicy(cap_s=0.5), listeners=[listener])
    values = measured(recovered(monitor, together), new_loop, turns)
    assert went_on == [True]
    assert values == list(range(ENGINES))
    assert {engine.fsm.state for engine in monitor.engines()} == {EngineState.READY}


@WAYS
def test_the_loop_goes_on_while_all_that_were_given_up_wait_for_a_frozen_hub(new_loop, together):
    turns = Turns()
    hub = FrozenHub()
    went_on = []

    def send(fleet, batch):
        went_on.append(turns.go_on())
        hub.thawed.wait(60)

    hub.send = send
    monitor = enginefsm.EngineMonitor(policy=RetryPolicy(max_attempts=0), export=[hub])
    errors, took_s = measured(given_up(monitor, together), new_loop, turns)
    hub.thawed.set()
    assert went_on[0]
    assert [type(error) for error in errors] == [RetryExhaustedError] * (1 if together else ENGINES)
    # gather raises the first error, perhaps before the others have happened.
    assert sum(engine.fsm.state is EngineState.DEAD for engine in monitor.engines()) >= len(errors)
    assert 1 < took_s < 60, "the hub is to be waited for, by all at once"
