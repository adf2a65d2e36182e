"""`enginefsm status` and `enginefsm watch` against a real hub on a real Ray, and where there is none."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler

import pytest
from support.clusters import SOURCE
from support.servers import serving

from enginefsm.cli import ends
from enginefsm.cli.main import main
from enginefsm.cli.status import HubReader, NothingToSeeError
from enginefsm.cli.status.words import changes, lines
from enginefsm.cli.times import duration

COMMAND = [sys.executable, "-m", "enginefsm.cli"]
TIMEOUT_S = 90
ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@pytest.fixture
def bringup(scene):
    """A run with a ready engine and a dead one, all of it known to the hub."""
    monitor = scene.monitor("glm-rl")
    scene.launch(monitor, "engine-10", node="node-1", model="glm")
    scene.kill(monitor, scene.launch(monitor, "engine-2", node="node-2", model="glm"))
    assert monitor.flush(timeout_s=30)
    return monitor


def run_status(*arguments, environ=None):
    ran = subprocess.run(
        [*COMMAND, "status", *arguments], capture_output=True, text=True, timeout=TIMEOUT_S, check=False,
        env={**{name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}, **(environ or {})},
    )  # fmt: skip
    return ran.returncode, ran.stdout, ran.stderr


def test_it_tells_runs_engines_states_reasons_and_nodes_through_ray(scene, bringup):
    code, out, err = run_status("--address", scene.address)
    assert (code, err) == (ends.OK, "")
    told = out.splitlines()
    assert told[0].startswith("glm-rl: 1 of 2 ready, 1 dead; glm: bringup succeeded; alive, heard of ")
    assert told[1].split() == ["engine", "state", "for", "reason", "node"]
    assert re.fullmatch(r"  engine-2 +dead +\d+\.\d s +actor_died +node-2", told[2])
    assert re.fullmatch(r"  engine-10 +ready +\d+\.\d s +init_succeeded +node-1", told[3])
    assert len(told) == 4


def test_it_finds_the_hub_of_this_machine_by_the_file_that_prometheus_reads(scene, bringup):
    code, out, err = run_status("--json", environ={"ENGINEFSM_HUB_FILE_SD": str(scene.file_sd)})
    assert (code, err) == (ends.OK, "")
    fleet = json.loads(out)
    assert fleet["hub"]["address"] == scene.url()
    assert [engine["engine"] for engine in fleet["runs"][0]["engines"]] == ["engine-10", "engine-2"]


def test_a_file_that_is_out_of_date_is_passed_over_for_the_cluster(scene, bringup):
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    scene.file_sd.write_text(json.dumps([{"targets": [f"127.0.0.1:{port}"]}]))
    environ = {"ENGINEFSM_HUB_FILE_SD": str(scene.file_sd)}
    with contextlib.closing(HubReader(environ=environ)) as reader:
        reader._cluster = scene.address  # "auto" may be another's on a machine of many
        assert [run["run"] for run in reader.read()["runs"]] == ["glm-rl"]


def test_the_cluster_may_be_named_by_ray_address_and_the_hub_by_its_url(scene, bringup):
    for arguments, environ in (([], {"RAY_ADDRESS": scene.address}), (["--address", scene.url()], {})):
        code, out, _ = run_status(*arguments, "--json", environ=environ)
        assert code == ends.OK
        assert json.loads(out)["runs"][0]["run"] == "glm-rl"


def test_one_run_of_several_is_shown_and_an_unknown_one_is_said_to_be_so(scene, bringup):
    other = scene.monitor("other")
    scene.launch(other, "engine-0")
    assert other.flush(timeout_s=30)
    code, out, _ = run_status("--address", scene.url(), "--run", "other")
    assert code == ends.OK
    assert out.startswith("other: 1 of 1 ready; ")
    assert "glm-rl" not in out
    for address in (scene.url(), scene.address):
        code, out, err = run_status("--address", address, "--run", "nobody's")
        assert (code, out) == (ends.FAILED, "")
        assert err.startswith('enginefsm status: the hub knows of no run "nobody\'s"')
        assert err.count("\n") == 1


def test_the_reader_goes_from_ray_to_http_and_back_when_the_hub_is_another(scene, bringup):
    with contextlib.closing(HubReader(scene.address)) as reader:
        first = reader.read()
        assert reader._ray is not None
        assert reader.read()["hub"] == first["hub"]
        assert reader._ray is None  # over HTTP by now
        scene.kill_hub()
        scene.launch(bringup, "engine-3")
        assert bringup.flush(timeout_s=60)  # starts another hub, if a heartbeat has not done so
        again = reader.read()
        assert again["hub"]["pid"] != first["hub"]["pid"]
        assert len(again["runs"][0]["engines"]) == 3


def test_a_cluster_without_a_hub_is_said_to_be_so(scene):
    for command in ("status", "watch"):
        ran = subprocess.run(
            [*COMMAND, command, "--address", scene.address],
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
        assert (ran.returncode, ran.stdout) == (ends.FAILED, "")
        assert re.fullmatch(rf"enginefsm {command}: the Ray cluster at .* has no hub of enginefsm: .*\n", ran.stderr)


@pytest.mark.ray
def test_no_cluster_on_this_machine_is_said_to_be_so_and_none_is_started(tmp_path):
    # Ray looks in its temporary directory, and for processes of the machine, of which it is to see none here.
    (tmp_path / "sitecustomize.py").write_text(
        "import functools, ray._private.services as services\n"
        "services.find_gcs_addresses = functools.cache(lambda: set())\n"
    )
    environ = {
        "ENGINEFSM_HUB_FILE_SD": str(tmp_path / "none"), "RAY_TMPDIR": str(tmp_path), "TMPDIR": str(tmp_path),
        "PYTHONPATH": f"{tmp_path}:{SOURCE}",
    }  # fmt: skip
    ran = subprocess.run(
        [*COMMAND, "status"], capture_output=True, text=True, timeout=TIMEOUT_S, check=False,
        env={**os.environ, **environ},
    )  # fmt: skip
    assert (ran.returncode, ran.stdout) == (ends.FAILED, "")
    assert re.fullmatch(r"enginefsm status: .*no Ray cluster.*\n", ran.stderr)
    assert not list(tmp_path.glob("**/gcs_server*"))


@pytest.fixture
def silent():
    """An address that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.ray
def test_an_address_that_nobody_listens_at_is_said_at_once():
    with socket.create_server(("127.0.0.1", 0)) as gone:
        address = f"127.0.0.1:{gone.getsockname()[1]}"
    began_at = time.monotonic()
    code, out, err = run_status("--address", address)
    assert time.monotonic() - began_at < TIMEOUT_S
    assert (code, out) == (ends.FAILED, "")
    assert err == f"enginefsm status: there is no Ray cluster at {address}: Connection refused\n"
    code, _, err = run_status("--address", f"http://{address}")
    assert (code, err) == (ends.FAILED, f"enginefsm status: no hub answers at http://{address}: Connection refused\n")


@pytest.mark.ray
def test_an_address_that_never_answers_ends_the_wait_and_leaves_no_process(silent):
    began_at = time.monotonic()
    reader = HubReader(silent, timeout_s=3)
    with pytest.raises(NothingToSeeError, match=rf"the Ray cluster at {silent} has not answered within 3 s"):
        reader.read()
    assert time.monotonic() - began_at < TIMEOUT_S / 2
    with pytest.raises(NothingToSeeError, match="no hub answers at"):
        HubReader(f"http://{silent}").read()


@pytest.mark.parametrize(
    "address", ["local", "head", "head:port", "head:99999", "https://head:1", "ftp://head", "http://"]
)
def test_what_is_no_address_is_said_to_be_so(address):
    code, out, err = run_status("--address", address)
    assert (code, out) == (ends.FAILED, "")
    assert re.match(r"enginefsm status: --address: .*", err)
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("status", "body"),
    [(200, b"hello"), (200, b"[]"), (200, b'{"runs": []}'), (404, b""), (500, b""),
     (200, b'{"runs": [], "hub": {}, "version": 2}')],
)  # fmt: skip
def test_what_is_no_hub_is_said_to_be_so(status, body):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

    complaint = r"is not a hub of enginefsm|is of another version of enginefsm"
    with serving(Handler) as server, pytest.raises(NothingToSeeError, match=complaint):
        HubReader(f"http://127.0.0.1:{server.server_port}").read()


class Watch:
    """`enginefsm watch` on a terminal or a pipe, and what it has written."""

    def __init__(self, *arguments, on_terminal, lines=24):
        environ = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100", "LINES": str(lines)}
        if on_terminal:
            self.ours, theirs = pty.openpty()
        else:
            self.ours, theirs = os.pipe()
        self.process = subprocess.Popen(
            [*COMMAND, "watch", *arguments], stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs,
            start_new_session=True, env=environ,
        )  # fmt: skip
        os.close(theirs)
        self.seen = b""

    @property
    def text(self):
        return ANSI.sub("", self.seen.decode(errors="replace"))

    def read_until(self, pattern, start=0):
        until = time.monotonic() + TIMEOUT_S
        while not (found := re.compile(pattern).search(self.text, start)):
            assert select.select([self.ours], [], [], max(0.0, until - time.monotonic()))[0], self.text
            read = os.read(self.ours, 65536)
            assert read, self.text
            self.seen += read
        return found

    def interrupt(self):
        os.killpg(self.process.pid, signal.SIGINT)
        return self.process.wait(TIMEOUT_S)

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self.ours)


def test_watch_on_a_terminal_is_a_table_that_follows_the_fleet_until_ctrl_c(scene):
    monitor = scene.monitor("glm-rl")
    engine = scene.launch(monitor, "engine-0", node="node-7")
    assert monitor.flush(timeout_s=30)
    with contextlib.closing(Watch("--address", scene.url(), "--interval-s", "0.1", on_terminal=True)) as watch:
        watch.read_until(r"glm-rl +1 of 1 ready")
        watch.read_until(r"engine +state +for +reason +node")
        watch.read_until(r"engine-0 +ready +\d+\.\d s +init_succeeded +node-7")
        scene.kill(monitor, engine)
        watch.read_until(r"engine-0 +dead +\d+\.\d s +actor_died")
        scene.kill_hub()
        watch.read_until(r"no hub answers at")
        assert watch.interrupt() == ends.OK
        assert "Traceback" not in watch.text
    assert b"\x1b[2K" in watch.seen  # redrawn in place


def test_watch_elsewhere_writes_a_line_for_each_change(scene):
    monitor = scene.monitor("glm-rl")
    engine = scene.launch(monitor, "engine-0")
    assert monitor.flush(timeout_s=30)
    with contextlib.closing(Watch("--address", scene.url(), "--interval-s", "0.1", on_terminal=False)) as watch:
        watch.read_until(r"\d\d:\d\d:\d\d  glm-rl: 1 of 1 ready; .*\n")
        scene.launch(monitor, "engine-1", node="node-1")
        watch.read_until(r"  glm-rl  engine-1: .*ready \(init_succeeded\) on node-1\n")
        scene.kill(monitor, engine)
        watch.read_until(r"  glm-rl  engine-0: ready -> dead \(actor_died\)\n")
        monitor.close(timeout_s=60)
        watch.read_until(r"  glm-rl: 1 of 2 ready, 1 dead; .*; ended .* ago\n")
        scene.kill_hub()
        watch.read_until(r"  no hub answers at .*; it is tried again\n")
        assert watch.interrupt() == ends.OK
        assert "\x1b" not in watch.seen.decode()
        assert "Traceback" not in watch.text


def test_status_on_a_terminal_is_a_table(scene, bringup):
    ours, terminal = pty.openpty()
    environ = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100"}
    done = subprocess.run(
        [*COMMAND, "status", "--address", scene.url()], stdout=terminal, check=True, timeout=TIMEOUT_S, env=environ
    )
    os.close(terminal)
    written = b""
    with contextlib.suppress(OSError):  # the end, once all was read
        while True:
            written += os.read(ours, 65536)
    text = ANSI.sub("", written.decode())
    os.close(ours)
    assert done.returncode == ends.OK
    assert re.search(r"engine-2 +dead .*actor_died +node-2", text)
    assert text.index("engine-2 ") < text.index("engine-10 ")


def fleet(count=0, **run):
    engines = [
        {"engine": f"e-{n}", "model": "", "worker_type": "", "node": "", "state": "ready", "reason": "init_succeeded",
         "since_s": 1.0, "in_state_s": 2.0, "incarnation": 1}
        for n in range(count)
    ]  # fmt: skip
    counts = {"launching": 0, "ready": count, "unavailable": 0, "dead": 0}
    return {
        "version": 1, "now_s": 100.0, "hub": {"problem": None},
        "runs": [{"run": "r", "state": "alive", "heartbeat_s": 99.0, "stopped_s": None, "phases": {}, "counts": counts,
                  "engines": engines, **run}],
    }  # fmt: skip


def test_many_ready_engines_are_counted_on_a_terminal():
    many = fleet(1000)
    many["runs"][0]["engines"][7] |= {"state": "dead", "reason": "actor_died"}
    told = list(lines(many, most_ready=40))
    assert len(told) == 4
    assert re.match("  e-7 +dead", told[2])
    assert told[3] == "  and 999 ready (--all names them)"
    assert len(list(lines(many))) == 1002


def test_what_a_terminal_would_obey_is_shown_as_text():
    hostile = fleet(1)
    hostile["runs"][0]["run"] = "\x1b[2J"
    hostile["runs"][0]["engines"][0] |= {"engine": "\x1b]0;taken\x07", "node": "a\nb", "state": "dead"}
    for text in (*lines(hostile), *changes(None, hostile)):
        assert text.isprintable()


def test_changes_are_told_once_and_a_new_incarnation_is_one():
    before, now = fleet(2), fleet(3)
    assert list(changes(before, before)) == []
    now["runs"][0]["engines"][0] |= {"incarnation": 2, "since_s": 9.0}
    del now["runs"][0]["engines"][1]
    assert list(changes(before, now)) == [
        "r  e-0 #2: ready (init_succeeded)", "r  e-2: ready (init_succeeded)", "r  e-1: not there any more"
    ]  # fmt: skip
    assert [line.split(":")[0] for line in changes(None, fleet(2))] == ["r"]
    assert list(changes(fleet(0), fleet(0, run="s")))[-1] == "r: not there any more"


def test_a_silent_run_stands_out():
    assert "SILENT, last heard of 1 min 30 s ago" in next(lines(fleet(1, state="silent", heartbeat_s=10.0)))


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-1, "0.0 s"), (4.21, "4.2 s"), (200, "3 min 20 s"), (18_120, "5 h 2 min"), (273_700, "3 d 4 h")],
)
def test_times_are_told_in_two_units_at_most(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize("interval", ["0", "a", "nan", "1e9"])
def test_an_interval_that_is_none_is_refused(interval, capsys):
    assert main(["watch", "--interval-s", interval]) == ends.USAGE
    assert capsys.readouterr().err.count("\n") == 1


def test_a_reader_that_has_seen_enough_ends_it_without_words(scene, bringup):
    ran = subprocess.run(
        ["bash", "-c", f"{' '.join(COMMAND)} status --address {scene.url()} --json | head -c 1; echo ${{PIPESTATUS}}"],
        capture_output=True, text=True, timeout=TIMEOUT_S, check=False,
    )  # fmt: skip
    assert ran.stdout == "{0\n"
    assert ran.stderr == ""
