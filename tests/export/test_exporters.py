"""Exporters but for the hub: what each gets out, and what none may cost. Engines are bare handles, moved by hand."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
from support.bare_handles import bare_handle
from support.engines import wait_until
from support.exports import adopt, errors_of, move, samples, value
from support.servers import pushgateway, serving
from support.stopwatch import Stopwatch

import enginefsm
from enginefsm import CallOutcome, EngineMonitor, Outcome, Reason, export
from enginefsm._engine.proxy import managed
from enginefsm.export import EventLog, Http, Hub, PushGateway, Textfile, outbox
from enginefsm.export.delivery import Delivery

DIED = (Reason.ACTOR_UNAVAILABLE, Reason.RETRY_EXHAUSTED)


@pytest.fixture
def make_monitor():
    with contextlib.ExitStack() as stack:

        def make(*exporters, run="glm"):
            monitor = EngineMonitor(run=run, export=exporters)
            stack.callback(monitor.close)
            return monitor

        yield make


class Gate:
    """An exporter that takes nothing until it is let."""

    sink = "gate"
    batch_s = 0.01
    heartbeat_s = 3600.0

    def __init__(self):
        self.entered = threading.Event()
        self.open = threading.Event()
        self.batches = []
        self.closed = False

    def send(self, fleet, batch):
        self.entered.set()
        self.open.wait()
        self.batches.append(batch)

    def close(self):
        self.closed = True


class Refusing(Gate):
    """An exporter that raises."""

    sink = "refusing"

    def send(self, fleet, batch):
        self.batches.append(batch)
        raise PermissionError("go away")


def dropped_of(monitor, sink):
    return monitor.metrics.registry.get_sample_value(
        "enginefsm_events_dropped_total", {"run": monitor.run, "sink": sink}
    )


# --- The environment


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        (None, [Hub]),
        ("", [Hub]),
        ("none", []),
        ("hub", [Hub]),
        ("textfile:/a/b.prom, jsonl:/a/c.jsonl", [Textfile, EventLog]),
        ("push:http://127.0.0.1:9091,http:9400,hub", [PushGateway, Http, Hub]),
        ("http:[::1]:9400", [Http]),
    ],
)
def test_the_environment_names_the_exporters(text, kinds):
    environ = {} if text is None else {"ENGINEFSM_EXPORT": text}
    assert [type(each) for each in export.from_environment(environ)] == kinds


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({"ENGINEFSM_EXPORT": "hubb"}, "there is no exporter 'hubb'; there are hub, textfile:PATH"),
        ({"ENGINEFSM_EXPORT": "hub,"}, "there is no exporter ''"),
        ({"ENGINEFSM_EXPORT": "hub,none"}, "there is no exporter 'none'"),
        ({"ENGINEFSM_EXPORT": "textfile"}, "textfile needs a path, as textfile:/path/to/file"),
        ({"ENGINEFSM_EXPORT": "push:9091"}, "a push gateway's URL is like http://127.0.0.1:9091, not '9091'"),
        ({"ENGINEFSM_EXPORT": "push:file:///etc/passwd"}, "a push gateway's URL is like"),
        ({"ENGINEFSM_EXPORT": "http:x"}, "http needs a port, as http:9400"),
        ({"ENGINEFSM_EXPORT": "http:65536"}, "http needs a port"),
        ({"ENGINEFSM_HUB_PORT": "x"}, "ENGINEFSM_HUB_PORT='x' is not a number"),
        ({"ENGINEFSM_HUB_PORT": "70000"}, "from 0 to 65535, not 70000"),
        ({"ENGINEFSM_HUB_LINGER_S": "0"}, "above 0"),
    ],
)
def test_an_environment_that_cannot_be_understood_is_refused_in_clear_words(environ, said):
    with pytest.raises(ValueError, match=re.escape(said)) as raised:
        export.from_environment(environ)
    assert next(iter(environ)) in str(raised.value)


def test_a_monitor_exports_nothing_unless_it_is_told_to():
    before = set(threading.enumerate())
    adopt(EngineMonitor(run="glm"))
    assert set(threading.enumerate()) <= before


# --- The queue and its thread


def test_events_arrive_in_order_with_their_numbers_and_each_once(make_monitor):
    gate = Gate()
    gate.open.set()
    monitor = make_monitor(gate)
    engine = adopt(monitor)
    for _ in range(50):
        move(monitor, engine, Reason.ACTOR_UNAVAILABLE, Reason.ACTOR_REACHABLE)
    assert monitor.flush(timeout_s=10)
    events = [event for batch in gate.batches for event in batch.events]
    assert [number for number, _ in events] == list(range(1, 102))
    assert [event.reason for _, event in events][:3] == ["adopted", "actor_unavailable", "actor_reachable"]
    assert [batch.seq for batch in gate.batches] == list(range(1, len(gate.batches) + 1))


def test_what_was_not_taken_comes_again_with_what_came_since(make_monitor):
    class Once(Gate):
        def send(self, fleet, batch):
            super().send(fleet, batch)
            if len(self.batches) == 1:
                raise OSError("not today")

    once = Once()
    monitor = make_monitor(once)
    engine = adopt(monitor)
    assert once.entered.wait(10)
    move(monitor, engine, Reason.INIT_SUCCEEDED)
    once.open.set()
    assert monitor.flush(timeout_s=10)
    reasons = [event.reason for _, event in once.batches[1].events]
    assert reasons == ["adopted", "init_succeeded"]
    assert errors_of(monitor, "gate") == 1


def test_an_exporter_that_hangs_costs_a_bounded_wait_and_no_event_until_the_queue_is_full(make_monitor, monkeypatch):
    monkeypatch.setattr(outbox, "MOST_WAITING", 100)
    gate = Gate()
    monitor = make_monitor(gate)
    engine = adopt(monitor)
    assert gate.entered.wait(10)  # with the launch, or before it
    for _ in range(100):
        move(monitor, engine, Reason.ACTOR_UNAVAILABLE, Reason.ACTOR_REACHABLE)
    assert not monitor.flush(timeout_s=0.01)
    dropped = dropped_of(monitor, "gate")
    assert dropped >= 100
    move(monitor, engine, Reason.ACTOR_DIED)
    gate.open.set()
    assert monitor.flush(timeout_s=10)
    events = [event for batch in gate.batches for event in batch.events]
    assert len(events) + dropped_of(monitor, "gate") == 202
    assert events[-1][1].reason is Reason.ACTOR_DIED, "what is dropped is the oldest"
    assert sum(batch.dropped for batch in gate.batches) == dropped_of(monitor, "gate")


def test_an_end_is_sent_at_once_and_what_is_not_an_end_is_not_waited_for(make_monitor):
    gate = Gate()
    gate.batch_s = 3600.0
    gate.open.set()
    monitor = make_monitor(gate)
    assert adopt(monitor)
    wait_until(lambda: gate.batches, what="the first batch")
    one = adopt(monitor, "two")
    move(monitor, one, Reason.INIT_SUCCEEDED)
    monitor._flush_terminal()
    sent = len(gate.batches)
    move(monitor, one, *DIED)
    wait_until(lambda: len(gate.batches) > sent, what="the batch with the end")
    assert gate.batches[-1].terminal
    monitor._flush_terminal()
    assert gate.batches[-1].events[-1][1].reason is Reason.RETRY_EXHAUSTED


def test_a_release_is_not_an_end_that_anyone_waits_for(make_monitor):
    gate = Gate()
    monitor = make_monitor(gate)
    monitor.release(adopt(monitor))
    with Stopwatch() as stopwatch:
        monitor._flush_terminal()
        assert stopwatch.s < export.FLUSH_S / 2
    gate.open.set()


def test_exporters_are_waited_for_together_not_one_after_the_other(make_monitor):
    gates = [Gate() for _ in range(4)]
    monitor = make_monitor(*gates)
    move(monitor, adopt(monitor), *DIED)
    with Stopwatch() as stopwatch:
        monitor._flush_terminal()
        assert stopwatch.s < 2.1
    for gate in gates:
        gate.open.set()


def test_an_exporter_that_has_been_broken_for_long_is_tried_once_for_an_end_and_not_waited_for(
    make_monitor, caplog, patience
):
    refusing = Refusing()
    monitor = make_monitor(refusing)
    engine = adopt(monitor)
    wait_until(lambda: len(refusing.batches) >= outbox.BROKEN_AFTER + 1, what="failures")
    tried = len(refusing.batches)
    with Stopwatch() as stopwatch:
        move(monitor, engine, *DIED)
        monitor._flush_terminal()
        assert stopwatch.s < export.FLUSH_S / 2
    assert len(refusing.batches) > tried
    assert errors_of(monitor, "refusing") >= tried
    told = [record for record in caplog.records if record.levelno >= logging.WARNING and "export" in record.message]
    assert len(told) == 1, "said once, not at each attempt"
    assert "export to refusing fails and is tried again: PermissionError: go away" in told[0].message


def test_an_interrupt_passes_while_an_end_is_waited_for(make_monitor, patience):
    gate = Gate()
    monitor = make_monitor(gate)
    engine = adopt(monitor)
    assert gate.entered.wait(10)
    move(monitor, engine, *DIED)
    interrupt = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))

    def wait_for_the_end():
        interrupt.start()
        monitor._flush_terminal()

    with pytest.raises(KeyboardInterrupt):
        wait_for_the_end()
    gate.open.set()


def test_closing_sends_what_is_left_and_that_this_is_the_end_and_ends_the_threads():
    gate = Gate()
    gate.batch_s = 3600.0
    gate.open.set()
    monitor = EngineMonitor(run="glm", export=[gate])
    before = set(threading.enumerate())
    engine = adopt(monitor)
    wait_until(lambda: gate.batches, what="the first batch")
    assert not set(threading.enumerate()) <= before
    move(monitor, engine, Reason.INIT_SUCCEEDED)
    monitor.close(timeout_s=60)
    assert gate.closed
    assert set(threading.enumerate()) <= before
    assert gate.batches[-1].events[-1][1].reason is Reason.INIT_SUCCEEDED
    assert gate.batches[-1].stopped_s > 0
    assert [batch.stopped_s for batch in gate.batches[:-1]] == [0] * (len(gate.batches) - 1)
    monitor.close()


def test_what_happens_after_closing_is_not_kept_for_exporters_and_not_counted_as_dropped(make_monitor, monkeypatch):
    monkeypatch.setattr(outbox, "MOST_WAITING", 3)
    gate = Gate()
    gate.open.set()
    monitor = make_monitor(gate)
    adopt(monitor)
    monitor.close()
    for number in range(5):
        adopt(monitor, f"after {number}")
    assert dropped_of(monitor, gate.sink) == 0


def test_a_listener_that_is_removed_meanwhile_keeps_no_event_from_those_after_it():
    heard = []
    delivery = Delivery([], lambda _: None)

    def leaves(event):
        delivery.listeners.remove(leaves)

    delivery.listeners += [leaves, heard.append, lambda event: heard.append(-event)]
    delivery.put(1)
    delivery.put(2)
    delivery.deliver()
    assert heard == [1, -1, 2, -2]


def test_closing_does_not_wait_for_an_exporter_that_hangs(make_monitor):
    gate = Gate()
    monitor = make_monitor(gate)
    adopt(monitor)
    assert gate.entered.wait(10)
    with Stopwatch() as stopwatch:
        monitor.close(timeout_s=0.2)
        assert stopwatch.s < 1
    gate.open.set()


def test_the_interpreter_s_end_is_a_good_end(tmp_path):
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from support.bare_handles import bare_handle; import enginefsm\n"
        "enginefsm.configure(run='glm'); enginefsm.adopt(bare_handle(), name='one')\n"
        "raise RuntimeError('the job failed')"
    )
    log = tmp_path / "events.jsonl"
    environ = os.environ | {"ENGINEFSM_EXPORT": f"jsonl:{log}"}
    ended = subprocess.run(
        [sys.executable, "-c", code, str(Path(__file__).parents[1])], env=environ, capture_output=True, text=True
    )
    assert ended.returncode == 1
    assert ended.stderr.strip().endswith("RuntimeError: the job failed")
    assert [json.loads(line)["kind"] for line in log.read_text().splitlines()] == ["begin", "transition", "end"]


# --- The event log


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_event_log_has_a_line_for_each_transition_and_each_fault(tmp_path, make_monitor):
    log = tmp_path / "events.jsonl"
    monitor = make_monitor(EventLog(log))
    engine = adopt(monitor, "default/regular/0", node="n1", rank=3)
    for outcome, attempt in ((Outcome.SUCCEEDED, 0), (Outcome.ACTOR_UNAVAILABLE, 0), (Outcome.SUCCEEDED, 1)):
        monitor._delivery.put(
            CallOutcome(engine.fsm.name, engine.fsm.labels, "init", outcome, attempt, 1.5, False, 1, 100.0)
        )
    move(monitor, engine, *DIED)
    monitor.close(timeout_s=60)
    lines = lines_of(log)
    assert [line["kind"] for line in lines] == [
        "begin", "transition", "outcome", "outcome", "transition", "transition", "end",
    ]  # fmt: skip
    assert len({(line["run"], line["manager"]) for line in lines}) == 1
    assert lines[0] | {"host": socket.gethostname(), "pid": os.getpid(), "format": 1} == lines[0]
    launched, failed, again, unavailable, dead = lines[1:-1]
    labels = {"model": "tiny", "worker_type": "regular", "node": "n1", "rank": "3"}
    who = {"engine": "default/regular/0", "labels": labels, "incarnation": 1}
    assert launched == launched | who | {
        "seq": 1, "from": None, "to": "launching", "reason": "adopted", "terminal": False,
        "actor_id": managed(engine).actor_id,
    }  # fmt: skip
    assert failed == failed | who | {
        "seq": 3, "at_s": 100.0, "method": "init", "outcome": "actor_unavailable", "attempt": 0, "took_s": 1.5,
        "probe": False, "fault": True,
    }  # fmt: skip
    assert (again["attempt"], again["fault"]) == (1, False)
    assert (unavailable["from"], unavailable["to"]) == ("launching", "unavailable")
    assert dead == dead | {"from": "unavailable", "to": "dead", "reason": "retry_exhausted", "terminal": True}
    assert dead["at_s"] == pytest.approx(time.time(), abs=60)
    assert unavailable["spent_s"] + dead["spent_s"] == pytest.approx(dead["age_s"])


def test_an_end_is_in_the_event_log_when_the_wait_for_it_is_over(tmp_path, make_monitor, patience):
    log = tmp_path / "events.jsonl"
    monitor = make_monitor(EventLog(log))
    move(monitor, adopt(monitor), *DIED)
    monitor._flush_terminal()
    assert lines_of(log)[-1]["reason"] == "retry_exhausted"


def test_monitors_share_an_event_log_and_a_line_that_was_broken_off_stays_alone(tmp_path, make_monitor):
    log = tmp_path / "events.jsonl"
    log.write_text('{"kind":"transition","run":"old","man')
    monitors = [make_monitor(EventLog(log), run=f"run-{number}") for number in range(3)]
    for monitor in monitors:
        engine = adopt(monitor)
        for _ in range(20):
            move(monitor, engine, Reason.ACTOR_UNAVAILABLE, Reason.ACTOR_REACHABLE)
    for monitor in monitors:
        monitor.close(timeout_s=60)
    broken, *lines = log.read_text().splitlines()
    assert broken == '{"kind":"transition","run":"old","man'
    by_run = {f"run-{number}": [] for number in range(3)}
    for line in map(json.loads, filter(None, lines)):
        if line["kind"] == "transition":
            by_run[line["run"]].append(line["seq"])
    assert by_run == {run: list(range(1, 42)) for run in by_run}


@pytest.mark.parametrize("lose", [lambda log: log.rename(f"{log}.1"), Path.unlink], ids=["rotated", "deleted"])
def test_the_end_of_an_engine_is_in_the_event_log_though_the_file_was_lost_before(tmp_path, make_monitor, lose):
    log = tmp_path / "events.jsonl"
    monitor = make_monitor(EventLog(log))
    engine = adopt(monitor)
    assert monitor.flush(timeout_s=10)
    lose(log)

    move(monitor, engine, Reason.ACTOR_DIED)
    monitor._flush_terminal()

    assert [line["reason"] for line in lines_of(log)] == ["actor_died"]


def test_what_was_dropped_is_told_in_the_event_log(tmp_path, make_monitor, monkeypatch):
    monkeypatch.setattr(outbox, "MOST_WAITING", 10)
    directory = tmp_path / "later"
    log = directory / "events.jsonl"
    monitor = make_monitor(EventLog(log))
    engine = adopt(monitor)
    wait_until(lambda: errors_of(monitor, "jsonl"), what="the first failure")
    for _ in range(20):
        move(monitor, engine, Reason.ACTOR_UNAVAILABLE, Reason.ACTOR_REACHABLE)
    directory.mkdir()
    assert monitor.flush(timeout_s=30)
    lines = lines_of(log)
    told = sum(line["events"] for line in lines if line["kind"] == "dropped")
    assert told == dropped_of(monitor, "jsonl") == 41 - sum(line["kind"] == "transition" for line in lines)
    assert told > 0


# --- The textfile


def test_the_textfile_is_whole_for_whoever_reads_it_while_it_is_written(tmp_path, make_monitor):
    path = tmp_path / "enginefsm.prom"
    textfile = Textfile(path)
    textfile.batch_s = 0.0
    monitor = make_monitor(textfile)
    engines = [adopt(monitor, f"engine-{number}") for number in range(200)]
    assert monitor.flush(timeout_s=10)
    over = threading.Event()

    def keep_writing():
        while not over.is_set():
            move(monitor, engines[0], Reason.ACTOR_UNAVAILABLE, Reason.ACTOR_REACHABLE)
            monitor.flush(timeout_s=10)

    writer = threading.Thread(target=keep_writing)
    writer.start()
    try:
        read = set()
        while len(read) < 20:
            text = path.read_text()
            read.add(text)
            assert text.endswith("\n")
            assert text.splitlines()[-1].startswith("enginefsm_verdicts_held")
            assert text.count("enginefsm_engine_info{") == 200
            assert not {entry.suffix for entry in tmp_path.iterdir()} - {".prom", ".tmp"}
    finally:
        over.set()
        writer.join()
    assert path.stat().st_mode & 0o777 == 0o644
    monitor.close(timeout_s=60)
    assert list(tmp_path.iterdir()) == [path], "nothing else is left behind"


def test_a_textfile_that_cannot_be_written_is_counted_and_written_once_it_can_be(tmp_path, make_monitor, caplog):
    path = tmp_path / "not yet" / "enginefsm.prom"
    monitor = make_monitor(Textfile(path))
    move(monitor, adopt(monitor), *DIED)
    monitor._flush_terminal()
    assert errors_of(monitor, "textfile") >= 1
    assert "export to textfile fails and is tried again: FileNotFoundError" in caplog.text
    path.parent.mkdir()
    assert monitor.flush(timeout_s=30)
    text = path.read_text()
    assert value(text, "enginefsm_engine_state", state="dead") == 1
    assert value(text, "enginefsm_export_errors_total", sink="textfile") >= 1


# --- The push gateway


def test_a_push_gateway_has_the_end_when_the_wait_for_it_is_over_and_a_new_start_of_the_run_replaces_it(
    tmp_path, make_monitor, patience
):
    with pushgateway(tmp_path) as url:
        monitor = make_monitor(PushGateway(url), run="glm/rl")
        for name in ("one", "two"):
            engine = adopt(monitor, name)
        move(monitor, engine, *DIED)
        monitor._flush_terminal()
        text = urllib.request.urlopen(f"{url}/metrics").read().decode()
        who = {"job": "enginefsm", "run": "glm/rl", "engine": "two"}
        assert value(text, "enginefsm_engine_state", state="dead", **who) == 1
        assert value(text, "enginefsm_retry_exhausted_timestamp_seconds", **who) == pytest.approx(time.time(), abs=60)
        monitor.close(timeout_s=60)

        again = make_monitor(PushGateway(url), run="glm/rl")
        adopt(again, "one")
        assert again.flush(timeout_s=30)
        text = urllib.request.urlopen(f"{url}/metrics").read().decode()
        assert {dict(labels)["engine"] for name, labels in samples(text) if name == "enginefsm_engine_info"} == {"one"}


def test_a_push_gateway_is_reached_past_a_proxy_that_knows_nothing_of_it(make_monitor, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.delenv("no_proxy", raising=False)
    with gateway_that_answers(200) as url:
        monitor = make_monitor(PushGateway(url))
        adopt(monitor)
        assert monitor.flush(timeout_s=10)
        assert errors_of(monitor, "push") == 0


@contextlib.contextmanager
def gateway_that_answers(status):
    class Handler(BaseHTTPRequestHandler):
        def do_PUT(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(status)
            self.end_headers()

    with serving(Handler) as server:
        yield f"http://127.0.0.1:{server.server_port}"


@contextlib.contextmanager
def gateway_that_never_answers():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


@pytest.mark.parametrize(
    ("gateway", "said"),
    [
        (gateway_that_answers(500), "HTTP Error 500: Internal Server Error"),
        (gateway_that_never_answers(), "timed out"),
        (contextlib.nullcontext("http://127.0.0.1:1"), "Connection refused"),
    ],
)
def test_a_push_gateway_that_refuses_or_never_answers_costs_a_bounded_wait(gateway, said, make_monitor, caplog):
    with gateway as url:
        monitor = make_monitor(PushGateway(url))
        engine = adopt(monitor)
        with Stopwatch() as stopwatch:
            move(monitor, engine, *DIED)
            monitor._flush_terminal()
            assert stopwatch.s < 2.1
        wait_until(lambda: said in caplog.text, what="the failure")
        assert errors_of(monitor, "push") >= 1
        monitor.close(timeout_s=0.1)


# --- HTTP in the process


def test_the_process_s_own_metrics_are_served_until_it_closes(make_monitor):
    http = Http(0)
    monitor = make_monitor(http)
    move(monitor, adopt(monitor), *DIED)
    assert monitor.flush(timeout_s=10)
    text = urllib.request.urlopen(f"http://127.0.0.1:{http.port}/metrics").read().decode()
    assert value(text, "enginefsm_engine_state", state="dead") == 1
    monitor.close(timeout_s=60)
    assert http.port is None


def test_an_address_in_use_is_counted_and_served_at_once_it_is_free(make_monitor, caplog):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        http = Http(taken.getsockname()[1])
        monitor = make_monitor(http)
        adopt(monitor)
        wait_until(lambda: "Address already in use" in caplog.text, what="the failure")
        assert errors_of(monitor, "http") >= 1
    assert monitor.flush(timeout_s=30)
    assert http.port is not None


def test_the_process_s_monitor_takes_its_exporters_from_the_environment(tmp_path, monkeypatch):
    log = tmp_path / "events.jsonl"
    monkeypatch.setenv("ENGINEFSM_EXPORT", f"jsonl:{log}")
    monitor = enginefsm.configure(run="glm")
    enginefsm.adopt(bare_handle(), name="one")
    monitor.close(timeout_s=60)
    assert [line["kind"] for line in lines_of(log)] == ["begin", "transition", "end"]
    monkeypatch.setenv("ENGINEFSM_EXPORT", "hubb")
    with pytest.raises(ValueError, match="there is no exporter 'hubb'"):
        enginefsm.configure(run="glm")
    monkeypatch.setenv("ENGINEFSM_EXPORT", "none")
    enginefsm.configure()
