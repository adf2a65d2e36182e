"""A link between two hosts that goes silent without a word, and the settings of Ray that find it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from support.hosts import ray_on, two_hosts
from support.silent_link import bring_up

import enginefsm
from enginefsm._ray import keepalive

WARNING = "Engines run on other nodes, and Ray may need 420 s to notice"


def test_a_runtime_env_gets_the_keepalive_and_keeps_what_it_has():
    base = {"working_dir": "/job", "env_vars": {"NCCL_DEBUG": "INFO", "RAY_grpc_client_keepalive_time_ms": "5000"}}
    merged = enginefsm.runtime_env(base)
    assert merged["working_dir"] == "/job"
    assert merged["env_vars"] == {
        "NCCL_DEBUG": "INFO",
        "RAY_grpc_client_keepalive_time_ms": "5000",
        "RAY_grpc_client_keepalive_timeout_ms": "10000",
    }
    assert base["env_vars"] == {"NCCL_DEBUG": "INFO", "RAY_grpc_client_keepalive_time_ms": "5000"}


def test_without_a_base_the_runtime_env_is_the_keepalive_alone():
    assert enginefsm.runtime_env() == {"env_vars": dict(keepalive.VARIABLES)}


@pytest.mark.parametrize("base", ["env", {"env_vars": "A=1"}])
def test_a_runtime_env_that_is_no_mapping_is_refused(base):
    with pytest.raises(TypeError, match="a mapping whose env_vars is a mapping"):
        enginefsm.runtime_env(base)


@pytest.mark.parametrize(("when", "found"), [("before", "True"), ("after", "False")])
def test_the_variables_count_if_they_are_set_before_ray_is_imported(when, found):
    set_them = f"import os; os.environ.update({dict(keepalive.VARIABLES)})"
    lines = [set_them, "import ray"] if when == "before" else ["import ray", set_them]
    code = "; ".join([*lines, "from enginefsm._ray import keepalive; print(keepalive.finds_silent_links())"])
    plain = {name: value for name, value in os.environ.items() if name not in keepalive.VARIABLES}
    done = subprocess.run([sys.executable, "-c", code], env=plain, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == found


@pytest.mark.parametrize(
    ("time_ms", "timeout_ms", "told"),
    [("10000", "10000", "20.0 True"), ("0", "10000", "-1.0 False"), ("-1", "1", "-1.0 False")],
)
def test_a_keepalive_without_a_time_is_off(time_ms, timeout_ms, told):
    variables = dict(zip(keepalive.VARIABLES, (time_ms, timeout_ms), strict=True))
    code = "from enginefsm._ray import keepalive; print(keepalive.silent_link_s(), keepalive.finds_silent_links())"
    environ = {**os.environ, **variables}
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == told


@pytest.fixture(scope="module")
def two_nodes():
    """Two hosts with a node of one Ray on each, and its address."""
    with two_hosts() as hosts, ray_on(hosts, sys.executable) as address:
        yield hosts, address


def test_an_engine_comes_up_at_once_after_a_link_that_was_silent_while_it_loaded(two_nodes):
    begun, ended = bring_up(*two_nodes, with_keepalive=True, silent_s=25)
    assert begun["manager_has_keepalive"]
    assert (ended["given"], ended["launches"]) == (1, 1)
    assert ended["late_s"] < 5
    assert ended["bare"] == "ActorUnavailableError", "the same wait with bare Ray is lost"
    assert not [line for line in ended["logged"] if line.startswith(WARNING)]


def test_a_manager_without_keepalive_logs_once_that_silent_links_would_cost_minutes(two_nodes):
    begun, ended = bring_up(*two_nodes, with_keepalive=False, silent_s=0)
    assert not begun["manager_has_keepalive"]
    assert len([line for line in ended["logged"] if line.startswith(WARNING)]) == 1


def test_the_tests_of_this_suite_run_with_the_keepalive():
    assert keepalive.finds_silent_links()
