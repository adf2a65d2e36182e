"""A user's code, for type checkers: mypy and pyright must read what enginefsm exports as it is meant."""

from __future__ import annotations

from typing import Any, assert_type

import ray

import enginefsm


def alarm(event: enginefsm.Event) -> None:
    if isinstance(event, enginefsm.Transition) and event.to_state is enginefsm.EngineState.DEAD:
        print(event.engine, event.reason.value)


def bring_up() -> list[Any]:
    monitor = enginefsm.configure(run="typed", policy=enginefsm.RetryPolicy(budget_s=120), listeners=[alarm])
    assert_type(monitor, enginefsm.EngineMonitor)
    actors = [ray.get_actor(f"sglang-{rank}") for rank in range(2)]
    engines = [enginefsm.adopt(actor, name=f"engine-{rank}") for rank, actor in enumerate(actors)]
    calls = [engine.init.remote(port=30000 + rank) for rank, engine in enumerate(engines)]
    try:
        results = enginefsm.get(calls, timeout=600)
    except (enginefsm.RetryExhaustedError, enginefsm.LaunchDeadlineError):
        print([engine.fsm.state for engine in engines])
        raise
    assert_type(results, list[Any])
    return results


async def bring_up_on_an_event_loop(calls: list[enginefsm.Call]) -> None:
    await enginefsm.gather(*calls, timeout=600)
    await calls[0]
