"""Tests of `get` and of sync engines, run again with `gather` for `get`, and with asyncio engines. On a real Ray."""

from __future__ import annotations

import asyncio

import pytest
import test_failure
import test_recovery
import uvloop
from support.engines import AsyncEngine, Engine
from support.loops import Loop

AWAITED = ("gather", Engine, asyncio.new_event_loop)
ASYNC = ("gather", AsyncEngine, uvloop.new_event_loop)
GOT = ("get", AsyncEngine, None)

SHARED = {
    "a_cut_while_init_runs_costs_nothing": [AWAITED, ASYNC, GOT],
    "init_that_ends_while_its_reply_is_lost_gives_what_it_gave": [ASYNC],
    "init_that_raises_while_its_reply_is_lost_raises_the_original_once": [ASYNC],
    "two_cuts_in_one_launch_cost_nothing": [ASYNC],
    "outcomes_that_arrived_are_forgotten_by_the_actor": [ASYNC],
    "a_plain_launch_reference_is_asked_after_by_the_probe": [ASYNC],
    "an_argument_that_failed_leaves_the_engine_as_it_was": [ASYNC],
    "a_killed_engine_fails_the_bringup_by_name_while_others_still_launch": [ASYNC],
    "an_engine_that_dies_while_it_is_re_awaited_is_dead": [ASYNC],
    "an_error_of_init_is_raised_on_the_first_attempt": [ASYNC],
    "the_death_of_a_peer_inside_a_method_is_not_the_engine_s": [ASYNC],
    "an_actor_restarted_while_init_runs_does_not_run_it_again": [ASYNC],
    "a_frozen_engine_runs_into_the_launch_deadline_which_names_all_that_still_launch": [AWAITED],
    "whoever_waits_for_an_engine_that_another_thread_gave_up_is_told": [AWAITED],
}

for _name in SHARED:
    _test = f"test_{_name}"
    globals()[_test] = getattr(test_recovery, _test, None) or getattr(test_failure, _test)


def pytest_generate_tests(metafunc):
    ways = SHARED[metafunc.function.__name__.removeprefix("test_")]
    names = [f"{get}-{cls.__name__}-{new_loop.__module__ if new_loop else 'none'}" for get, cls, new_loop in ways]
    metafunc.parametrize("way", ways, ids=names)


@pytest.fixture
def fleet(cluster, make_fleet, way):
    get, cls, new_loop = way
    fleet = make_fleet()
    fleet.engine_class = cls
    if get == "get":
        yield fleet
        return
    loop = Loop(new_loop)

    def get(calls, *, timeout=None):
        values = loop.run(fleet.monitor.gather(*(calls if isinstance(calls, list) else [calls]), timeout=timeout))
        return values if isinstance(calls, list) else values[0]

    fleet.monitor.get = get
    yield fleet
    loop.close()
