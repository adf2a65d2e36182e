"""A future Ray that lacks a private name: one clear error, before anything relies on it."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import ray
from support.bare_handles import bare_handle

import enginefsm
from enginefsm._ray import loopback, surface, versions


@pytest.mark.parametrize(
    ("gone", "missing"),
    [
        ("import ray.actor; del ray.actor._ActorClassMethodMetadata", "ray.actor._ActorClassMethodMetadata._cache"),
        ("import ray; del ray._private.worker._global_node", "ray._private.worker._global_node"),
        ("import sys, ray; sys.modules['ray.core.generated.gcs_pb2'] = None", "ray.core.generated.gcs_pb2"),
    ],
)
def test_the_import_names_this_ray_and_what_it_lacks(gone, missing):
    done = subprocess.run([sys.executable, "-c", f"{gone}; import enginefsm"], capture_output=True, text=True)
    says = f"This enginefsm cannot work with Ray {ray.__version__}, which lacks {missing}. It was tested with Ray"
    assert done.returncode == 1
    assert f"enginefsm.errors.UnsupportedRayError: {says} 2.47.1 to" in done.stderr


def test_adopt_names_what_the_handles_of_this_ray_lack():
    handle = bare_handle()
    del handle._ray_actor_creation_function_descriptor
    with pytest.raises(
        enginefsm.UnsupportedRayError,
        match=r"lacks ray\.actor\.ActorHandle\._ray_actor_creation_function_descriptor\.class_name",
    ):
        enginefsm.EngineMonitor().adopt(handle, name="engine-0")


def test_a_ray_without_its_own_switch_is_not_started_where_it_would_listen_on_all_addresses(monkeypatch):
    monkeypatch.delattr(ray._private.ray_constants, "ENABLE_RAY_CLUSTER")
    with pytest.raises(enginefsm.UnsupportedRayError, match=r"lacks ray\._private\.ray_constants\.ENABLE_RAY_CLUSTER"):
        loopback.stay_on_loopback()


def test_this_ray_has_all_that_is_read_of_it():
    surface.check_modules()
    handle = bare_handle()
    surface.check_handle(handle)
    surface.check_method(handle.init)


def test_adopt_names_what_the_methods_of_this_ray_lack(monkeypatch):
    monkeypatch.setattr(surface, "_OF_METHODS", (*surface._OF_METHODS, "_gone"))
    with pytest.raises(enginefsm.UnsupportedRayError, match=r"lacks ray\.actor\.ActorMethod\._gone"):
        enginefsm.EngineMonitor().adopt(bare_handle(), name="engine-0")


def test_the_versions_that_are_called_tested_are_those_of_the_matrix():
    matrix = ast.parse((Path(__file__).parents[1] / "support" / "matrix.py").read_text())
    (rows,) = (
        ast.literal_eval(node.value)
        for node in matrix.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "CI_ROWS"
    )
    full = {row.partition("+")[0].partition("@")[0] for row in rows if "+install" not in row}
    installed = {row.partition("+")[0] for row in rows if "+install" in row}
    assert full == {*versions.TESTED[:-1], "newest"}
    assert installed - full == set(versions.INSTALLED)
