"""Ray's own fault injection: requests and replies of calls to actors are lost on purpose."""

from __future__ import annotations

import json

import pytest
from support.engines import Engine

from enginefsm import RetryPolicy

OF_EACH_KIND = 8
LOSSES = {
    "num_failures": 3 * OF_EACH_KIND,
    "num_lower_bound_req_failures": OF_EACH_KIND,
    "num_lower_bound_resp_failures": OF_EACH_KIND,
    "num_lower_bound_in_flight_failures": OF_EACH_KIND,
}
"""Requests that never leave, replies that are lost, and failures told while the request is on its way."""


class Counter(Engine):
    """Counts what runs."""

    def __init__(self, directory):
        super().__init__(directory)
        self.seen = []

    def note(self, number):
        self.seen.append(number)
        return number

    def noted(self):
        return sorted(self.seen)


@pytest.mark.parametrize("policy", [RetryPolicy(budget_s=250, cap_s=1)])  # a dozen losses in one outage
def test_calls_whose_messages_ray_loses_run_once_and_give_their_own_value(clusters, make_fleet, policy):
    clusters.use(RAY_testing_rpc_failure=json.dumps({"CoreWorkerService.grpc_client.PushTask": LOSSES}))
    fleet = make_fleet()
    rigs = [fleet.launch(Counter) for _ in range(2)]
    for rig in rigs:
        rig.open()
    assert fleet.monitor.get([rig.engine.init.remote() for rig in rigs]) == ["launched"] * 2
    calls = [rig.engine.note.remote(number) for rig in rigs for number in range(20)]
    assert fleet.monitor.get(calls) == [*range(20)] * 2
    for rig in rigs:
        assert rig.times_init_began() == 1
        assert fleet.monitor.get(rig.engine.noted.remote()) == [*range(20)]
    lost_messages = sum(each.outcome == "actor_unavailable" for rig in rigs for each in fleet.outcomes(rig.engine))
    assert lost_messages >= 3 * OF_EACH_KIND
