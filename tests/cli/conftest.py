"""A cluster with a hub of the test's own, for commands that look at one."""

import pytest
from support.clusters import WITH_ENGINEFSM
from support.hub_scene import Scene


@pytest.fixture
def scene(clusters, tmp_path):
    clusters.use(PYTHONPATH=WITH_ENGINEFSM)
    made = Scene(tmp_path)
    yield made
    made.close()
