"""Ray's own fault injection: requests and replies of calls to actors are lost on purpose."""

from __future__ import annotations

import json

import pytest
from engines import Engine

LOSSES = {
    "requests": {"num_failures": 8, "num_lower_bound_req_failures": 8},
    "replies": {"num_failures": 8, "num_lower_bound_resp_failures": 8},
    "requests in flight": {"num_failures": 8, "num_lower_bound_in_flight_failures": 8},
}


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


@pytest.mark.parametrize("lost", LOSSES)
def test_calls_whose_messages_ray_loses_run_once_and_give_their_own_value(clusters, lost, make_fleet):
    clusters.use(RAY_testing_rpc_failure=json.dumps({"CoreWorkerService.grpc_client.PushTask": LOSSES[lost]}))
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
    assert lost_messages >= 8
