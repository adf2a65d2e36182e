"""`enginefsm doctor` on real clusters: one that is well, and one for each fault that it names."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import socket
import subprocess
import sys
import time

import pytest
import ray
from ray._raylet import GcsClient
from support import exporting_job
from support.clusters import SOURCE, WITH_ENGINEFSM
from support.engines import wait_until
from support.hub_scene import Scene

from enginefsm._ray import keepalive, versions
from enginefsm.cli import ends
from enginefsm.cli.status import finding

COMMAND = [sys.executable, "-m", "enginefsm.cli", "doctor"]
TIMEOUT_S = 90
CHECKS = [
    "cluster", "versions", "tested Ray", "silent links", "hub", "scraping", "file_sd", "exporters", "clocks",
    "children", "retries",
]  # fmt: skip


@pytest.fixture
def running(scene):
    """A run with one engine that is ready, known to the hub."""
    monitor = scene.monitor("glm-rl")
    scene.launch(monitor, "engine-0")
    assert monitor.flush(timeout_s=30)
    return monitor


def examine(*arguments, **environ):
    """Run the doctor; give its exit code, and its findings by the names of the checks."""
    kept = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    ran = subprocess.run(
        [*COMMAND, "--json", *arguments], capture_output=True, text=True, timeout=TIMEOUT_S, check=False,
        env={**kept, **environ},
    )  # fmt: skip
    assert "Traceback" not in ran.stderr, ran.stderr
    told = json.loads(ran.stdout)
    assert [each["check"] for each in told["findings"]] == CHECKS
    assert told["ok"] is (ran.returncode == ends.OK)
    return ran.returncode, {each["check"]: each for each in told["findings"]}


def wants_attention(findings):
    assert all(bool(each["advice"]) for each in findings.values() if each["verdict"] == "attention")
    return {check for check, each in findings.items() if each["verdict"] == "attention"}


@contextlib.contextmanager
def job(scene, run, retries=0, textfile="", **environ):
    """`exporting_job` while it exports."""
    directory = scene.tmp_path / run
    directory.mkdir()
    process = subprocess.Popen(
        [sys.executable, exporting_job.__file__, scene.address, run, scene.file_sd, directory, str(retries), textfile],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        env={**os.environ, **environ, "PYTHONPATH": WITH_ENGINEFSM},
    )  # fmt: skip
    try:
        assert process.stdout.readline() == b"exported\n"
        yield process
    finally:
        process.stdin.close()
        process.wait(TIMEOUT_S)
        process.stdout.close()


def drivers():
    return [each for each in ray._private.state.jobs() if not each["IsDead"]]


def test_a_cluster_that_is_well_gives_exit_code_0_and_gets_no_driver(scene, running):
    before = len(drivers()), len(ray._private.state.jobs())
    code, findings = examine("--address", scene.address, ENGINEFSM_HUB_FILE_SD=str(scene.file_sd))
    assert (code, wants_attention(findings)) == (ends.OK, set())
    assert (len(drivers()), len(ray._private.state.jobs())) == before
    cleans_up = versions.numbers(ray.__version__)[:2] >= versions.CLEANS_UP_FROM
    expected = dict.fromkeys(CHECKS, "ok") | {"children": "ok" if cleans_up else "note"}
    assert {check: each["verdict"] for check, each in findings.items()} == expected
    assert findings["cluster"]["found"] == f"{scene.address}, 1 node alive"
    assert f"Ray {ray.__version__}" in findings["versions"]["found"]
    assert scene.url() in findings["scraping"]["found"]
    assert str(scene.file_sd) in findings["file_sd"]["found"]
    assert "0 for 1 engine" in findings["retries"]["found"]


def test_the_hub_is_found_without_its_file_too(scene, running):
    scene.file_sd.unlink()
    code, findings = examine("--address", scene.address)
    assert (code, wants_attention(findings)) == (ends.FAILED, {"file_sd"})
    assert f"{scene.file_sd} is gone" in findings["file_sd"]["found"]
    assert findings["scraping"]["verdict"] == "ok"


def test_a_file_that_leads_elsewhere_is_named_with_both_addresses(scene, running):
    scene.file_sd.write_text(json.dumps([{"targets": ["127.0.0.1:1"]}]))
    code, findings = examine("--address", scene.address, ENGINEFSM_HUB_FILE_SD=str(scene.file_sd))
    assert (code, wants_attention(findings)) == (ends.FAILED, {"file_sd"})
    assert "http://127.0.0.1:1" in findings["file_sd"]["found"]
    assert scene.url() in findings["file_sd"]["found"]


def test_a_hub_that_was_killed_is_missed(scene):
    monitor = scene.monitor("glm-rl")
    scene.launch(monitor, "engine-0")
    assert monitor.flush(timeout_s=30)
    monitor.close()  # else it starts another hub
    scene.kill_hub()
    code, findings = examine("--address", scene.address, ENGINEFSM_HUB_FILE_SD=str(scene.file_sd))
    assert (code, wants_attention(findings)) == (ends.FAILED, {"hub"})
    assert findings["hub"]["found"].startswith("the cluster has no hub; no hub answers at http://127.0.0.1:")
    assert findings["scraping"]["verdict"] == findings["clocks"]["verdict"] == "unknown"


def test_a_hub_that_cannot_listen_says_why(scene):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        monitor = scene.monitor("glm-rl", port=taken.getsockname()[1])
        scene.launch(monitor, "engine-0")
        assert monitor.flush(timeout_s=30)
        code, findings = examine("--address", scene.address)
    assert code == ends.FAILED
    assert {"hub", "scraping"} <= wants_attention(findings)
    assert "Address already in use" in findings["hub"]["found"]


def test_an_exporter_with_errors_is_named_with_its_run(scene, running):
    with job(scene, "other", textfile="/no/such/directory/metrics.prom"):
        wait_until(lambda: 'sink="textfile"' in finding.get(scene.url(), "/metrics").decode(), what="the failure")
        code, findings = examine("--address", scene.address)
    assert (code, wants_attention(findings)) == (ends.FAILED, {"exporters"})
    assert re.search(r"textfile of run 'other': \d+ errors", findings["exporters"]["found"])


def test_an_engine_whose_methods_ray_repeats_is_named(scene, running):
    with job(scene, "other", retries=1):
        code, findings = examine("--address", scene.address)
    assert (code, wants_attention(findings)) == (ends.FAILED, {"retries"})
    assert "engine-0 (1)" in findings["retries"]["found"]


@contextlib.contextmanager
def second_node(address):
    """Another node of the cluster, on this machine."""
    from ray._private.node import Node
    from ray._private.parameter import RayParams

    params = RayParams(
        gcs_address=address, redis_address=address, num_cpus=1, node_ip_address="127.0.0.1", min_worker_port=0,
        max_worker_port=0, dashboard_port=None, include_dashboard=False,
    )  # fmt: skip
    node = Node(params, head=False, shutdown_at_exit=False, spawn_reaper=False)
    try:
        wait_until(lambda: sum(each["Alive"] for each in ray.nodes()) == 2, what="the second node")
        yield
    finally:
        node.kill_all_processes(check_alive=False, allow_graceful=False, wait=True)


def test_a_monitor_without_keepalive_matters_where_there_are_two_nodes(clusters, tmp_path):
    clusters.close()
    clusters.use(PYTHONPATH=WITH_ENGINEFSM)  # a cluster of its own: it gets a node more
    scene = Scene(tmp_path)
    without = dict.fromkeys(keepalive.VARIABLES, "300000")
    try:
        with job(scene, "glm-rl", **without):
            code, findings = examine("--address", scene.address)
            assert (code, findings["silent links"]["verdict"]) == (ends.OK, "note")
            with second_node(scene.address):
                code, findings = examine("--address", scene.address)
            assert (code, wants_attention(findings)) == (ends.FAILED, {"silent links"})
            assert "noticed within 600 s by the monitor of run 'glm-rl'" in findings["silent links"]["found"]
            assert "2 nodes alive" in findings["cluster"]["found"]
    finally:
        scene.close()
        clusters.close()


def test_a_clock_that_is_off_is_named(scene, running, tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import time\nreal = time.time\ntime.time = lambda: real() + 60\n")
    code, findings = examine(
        "--address", scene.url(), PYTHONPATH=f"{tmp_path}:{SOURCE}", ENGINEFSM_HUB_FILE_SD=str(scene.file_sd)
    )
    assert (code, wants_attention(findings)) == (ends.FAILED, {"clocks"})
    assert re.fullmatch(r"this process is (1 min 0 s|60\.0 s|59\.\d s) ahead of the hub", findings["clocks"]["found"])


def test_nodes_with_other_versions_are_named(scene, running):
    """The control plane is made to say so: no two Rays are installed side by side where tests run."""
    control_plane = GcsClient(address=scene.address)
    kept = control_plane.internal_kv_get(b"CLUSTER_METADATA", namespace=b"cluster", timeout=10)
    other = json.dumps({"ray_version": "2.40.0", "python_version": "3.10.1"}).encode()
    control_plane.internal_kv_put(b"CLUSTER_METADATA", other, overwrite=True, namespace=b"cluster", timeout=10)
    try:
        code, findings = examine("--address", scene.address)
    finally:
        control_plane.internal_kv_put(b"CLUSTER_METADATA", kept, overwrite=True, namespace=b"cluster", timeout=10)
    assert (code, wants_attention(findings)) == (ends.FAILED, {"versions"})
    assert "Ray 2.40.0 at the head node; Python 3.10.1 at the head node" in findings["versions"]["found"]


def no_ray(tmp_path):
    """An environment in which Ray sees no process of another cluster of this machine."""
    (tmp_path / "sitecustomize.py").write_text(
        "import functools, ray._private.services as services\n"
        "services.find_gcs_addresses = functools.cache(lambda: set())\n"
    )  # fmt: skip
    return {
        "ENGINEFSM_HUB_FILE_SD": str(tmp_path / "none"), "RAY_TMPDIR": str(tmp_path), "TMPDIR": str(tmp_path),
        "PYTHONPATH": f"{tmp_path}:{SOURCE}",
    }  # fmt: skip


@pytest.mark.ray
@pytest.mark.parametrize("stale", [False, True])
def test_without_a_cluster_it_says_where_it_looked_and_starts_none(tmp_path, stale):
    environ = no_ray(tmp_path)
    if stale:  # Ray's own connection to the address in this file takes half a minute to fail
        (tmp_path / "ray").mkdir()
        with socket.create_server(("127.0.0.1", 0)) as gone:
            address = f"127.0.0.1:{gone.getsockname()[1]}"
        (tmp_path / "ray" / "ray_current_cluster").write_text(address)
    began_at = time.monotonic()
    code, findings = examine(**environ)
    assert time.monotonic() - began_at < 25
    assert (code, wants_attention(findings)) == (ends.FAILED, {"cluster"})
    expected = (
        f"there is no Ray cluster at {address}: Connection refused" if stale else "no cluster answers on this machine"
    )
    assert expected in findings["cluster"]["found"]
    assert not list(tmp_path.glob("**/gcs_server*"))


@pytest.mark.ray
def test_an_address_that_never_answers_ends_the_look(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        code, findings = examine("--address", address, ENGINEFSM_HUB_FILE_SD=str(tmp_path / "none"))
    assert (code, wants_attention(findings)) == (ends.FAILED, {"cluster"})
    assert address in findings["cluster"]["found"]


def test_on_a_terminal_it_is_a_table_as_wide_as_the_terminal(scene, running):
    for width in (80, 160):
        ours, terminal = pty.openpty()
        environ = {**os.environ, "TERM": "xterm-256color", "COLUMNS": str(width)}
        done = subprocess.run(
            [*COMMAND, "--address", scene.url()], stdout=terminal, timeout=TIMEOUT_S, env=environ, check=False
        )
        os.close(terminal)
        written = b""
        with contextlib.suppress(OSError):  # the end, once all was read
            while True:
                written += os.read(ours, 65536)
        os.close(ours)
        text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written.decode())
        assert done.returncode == ends.OK
        assert ("what to do" in text.splitlines()[1]) == ("check" in text)
        assert max(len(line) for line in text.splitlines()) <= width
        assert "Nothing needs doing." in text


def test_elsewhere_it_is_plain_text(scene, running):
    ran = subprocess.run(
        [*COMMAND, "--address", scene.address], capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    assert ran.returncode == ends.OK
    assert re.search(r"^ok +hub +up for .*, pid \d+, 1 run$", ran.stdout, re.MULTILINE)
    assert ran.stdout.splitlines()[-1].startswith("Nothing needs doing.")
    assert "\x1b" not in ran.stdout
