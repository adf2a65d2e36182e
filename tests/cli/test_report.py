"""`enginefsm report`: the page in a real Chromium, the trace, and what becomes of bad input."""

from __future__ import annotations

import itertools
import json
import re
import stat
import subprocess
import sys
import time
from html import unescape

import pytest
from support.bare_handles import bare_handle

from enginefsm import CallOutcome, EngineMonitor, Outcome, Reason
from enginefsm._engine.proxy import managed
from enginefsm.cli import ends
from enginefsm.cli.main import main
from enginefsm.cli.report.axis import ticks
from enginefsm.export import EventLog

START_S = 1763833000.0
HOSTILE = """<script>document.title='taken'</script>"><img src=x onerror="document.title='taken'">&amp;'"""


class Log:
    """Writes lines as `EventLog` does."""

    def __init__(self, run="glm", manager="m1", start_s=START_S):
        self.about = {"run": run, "manager": manager}
        self.start_s = start_s
        self.lines = []

    def add(self, kind, at_s, **fields):
        self.lines.append({"kind": kind, **self.about, "at_s": self.start_s + at_s, **fields})
        return self

    def begin(self):
        return self.add("begin", 0, host="head", pid=42, version="0.1.0", ray_version="2.60.0", format=1)

    def of(self, engine, incarnation=1, **labels):
        return {"seq": len(self.lines), "engine": engine, "labels": labels, "incarnation": incarnation}

    def step(self, at_s, engine, from_, to, reason, spent_s=0.0, age_s=0.0, incarnation=1, **labels):
        return self.add(
            "transition", at_s, **self.of(engine, incarnation, **labels), actor_id="a", **{"from": from_}, to=to,
            reason=reason, spent_s=spent_s, age_s=age_s, first_ready=to == "ready", terminal=to == "dead",
        )  # fmt: skip

    def call(self, at_s, engine, outcome, attempt=0, incarnation=1):
        return self.add(
            "outcome", at_s, **self.of(engine, incarnation), method="init", outcome=outcome, attempt=attempt,
            took_s=1.0, probe=False, fault=outcome != "succeeded",
        )  # fmt: skip

    def smooth(self, engine, at_s=0.0, ready_s=10.0, **labels):
        self.step(at_s, engine, None, "launching", "adopted", **labels)
        return self.step(at_s + ready_s, engine, "launching", "ready", "init_succeeded", ready_s, ready_s, **labels)

    def cut(self, engine, at_s=0.0):
        self.step(at_s, engine, None, "launching", "adopted")
        self.call(at_s + 4, engine, "actor_unavailable")
        self.step(at_s + 4, engine, "launching", "unavailable", "actor_unavailable", 4, 4)
        self.call(at_s + 6, engine, "actor_unavailable", attempt=1)
        self.call(at_s + 9, engine, "succeeded", attempt=2)
        return self.step(at_s + 9, engine, "unavailable", "ready", "recovered", 5, 9)

    def killed(self, engine, at_s=0.0):
        self.step(at_s, engine, None, "launching", "adopted")
        self.call(at_s + 3, engine, "actor_died")
        self.step(at_s + 3, engine, "launching", "dead", "actor_died", 3, 3)
        self.step(at_s + 5, engine, None, "launching", "adopted", incarnation=2)
        return self.step(at_s + 12, engine, "launching", "ready", "init_succeeded", 7, 7, incarnation=2)

    def text(self):
        return "".join(json.dumps(line) + "\n" for line in self.lines)


@pytest.fixture
def report(tmp_path, capfd):
    """Runs the command on a log; gives what it wrote, and what it said on stderr."""

    def run(text, *arguments, name="page.html"):
        log = tmp_path / "events.jsonl"
        log.write_bytes(text if isinstance(text, bytes) else text.encode())
        code = main(["report", str(log), "-o", str(tmp_path / name), *arguments])
        said = capfd.readouterr().err
        assert code == ends.OK, said
        return tmp_path / name, said

    return run


def test_the_log_of_these_tests_has_the_fields_that_the_exporter_writes(tmp_path):
    monitor = EngineMonitor(run="glm", export=[EventLog(tmp_path / "log")])
    engine = monitor.adopt(bare_handle(), name="e")
    monitor._delivery.put(CallOutcome("e", {}, "init", Outcome.ACTOR_DIED, 0, 1.5, False, 1, 100.0))
    managed(engine).step(Reason.ACTOR_DIED)
    monitor._delivery.deliver()
    monitor.close(timeout_s=60)
    exported = map(json.loads, (tmp_path / "log").read_text().splitlines())
    written = map(json.loads, Log().begin().killed("e").add("end", 20).text().splitlines())
    of_exported, of_written = ({line["kind"]: set(line) for line in lines} for lines in (exported, written))
    assert of_written == of_exported
    assert set(of_exported) == {"begin", "transition", "outcome", "end"}


def in_chromium(page, tmp_path, script=""):
    """The page's DOM after its scripts, and then `script`, have run; no script may have failed."""
    text = page.read_text()
    if script:  # the page lets no script run but its own
        text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text)
        text = text.replace("</body>", f"<script>{script}</script></body>")
    copy = tmp_path / "in-chromium.html"
    copy.write_text(text)
    ran = subprocess.run(
        ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync", "--enable-logging=stderr",
         f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1400,900", "--dump-dom", copy.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert 'data-scripted="yes"' in ran.stdout, ran.stderr
    told = [line for line in ran.stderr.splitlines() if "CONSOLE" in line]
    assert not told
    return ran.stdout


def rows(dom):
    """What each row of the timeline shows: name, states in order, marks in order."""
    found = re.findall(r'<div class="row" data-engine="([^"]*)".*?</svg></div>', dom, re.DOTALL)
    parts = re.findall(r'<div class="row" data-engine="[^"]*"(.*?)</svg></div>', dom, re.DOTALL)
    return {
        unescape(name): (
            re.findall(r'<rect class="(\w+)"', part),
            re.findall(r'<use href="#\w+-\w+" class="(\w+)"', part),
        )
        for name, part in zip(found, parts, strict=True)
    }


def table(dom):
    body = re.search(r'<table class="engines">.*?<tbody>(.*?)</tbody>', dom, re.DOTALL)[1]
    return [
        [re.sub("<[^>]*>", "", cell) for cell in re.findall(r"<td[^>]*>(.*?)</td>", row)]
        for row in re.findall(r"<tr.*?</tr>", body, re.DOTALL)
    ]


def test_the_page_tells_what_became_of_each_engine(report, tmp_path):
    log = Log().begin().smooth("e-2", node="n7", worker_type="regular").cut("e-10").killed("e-1").add("end", 20)
    page, said = report(log.text())
    assert not said
    dom = in_chromium(page, tmp_path)
    assert rows(dom) == {
        "e-1": (["launching", "dead", "launching", "ready"], ["died", "fault"]),
        "e-2": (["launching", "ready"], []),
        "e-10": (["launching", "unavailable", "ready"], ["fault", "failed", "answered"]),
    }
    assert list(rows(dom)) == ["e-1", "e-2", "e-10"]
    assert [row[:7] for row in table(dom)] == [
        ["e-1", "dead", "actor_died", "", "", "1", "0"],
        ["e-1 #2", "ready", "init_succeeded", "7.0 s", "", "0", "0"],
        ["e-2", "ready", "init_succeeded", "10.0 s", "", "0", "0"],
        ["e-10", "ready", "recovered", "9.0 s", "5.0 s", "2", "2"],
    ]
    assert ["n7", "regular", ""] in [row[7:] for row in table(dom)]
    assert "<title>e-10: unavailable (actor_unavailable)\nfrom 4.00 s to 9.00 s, 5.0 s</title>" in dom
    assert "ended in good order" in dom
    causes = re.sub("<[^>]*>", " ", re.search(r'<table class="causes">.*?</table>', dom, re.DOTALL)[0])
    assert re.search(r"dead: actor_died +1 +e-1 ", causes)
    assert re.search(r"unavailable: actor_unavailable +1 +e-10 ", causes)
    assert re.search(r"call failed: init\(\): actor_unavailable +2 +e-10 ", causes)
    slowest = re.sub("<[^>]*>", " ", re.search(r'<table class="slowest">.*?</table>', dom, re.DOTALL)[0])
    assert re.search(r"e-1 +not ready: dead after 3.0 s .* e-2 +10.0 s .* e-10 +9.0 s .* e-1 #2 +7.0 s", slowest)


def test_spans_lie_where_the_times_say(report):
    page, _ = report(Log().begin().cut("e").add("end", 20).text())
    placed = re.findall(r'<rect class="(\w+)" x="([\d.]+)%" width="([\d.]+)%"', page.read_text())
    assert [(state, float(x), float(width)) for state, x, width in placed] == [
        ("launching", 0, 20), ("unavailable", 20, 25), ("ready", 45, 55)
    ]  # fmt: skip


def test_no_text_of_a_log_becomes_markup_or_script(report, tmp_path):
    log = Log(run=HOSTILE).cut(HOSTILE)
    log.smooth("other", node=HOSTILE, model=HOSTILE, worker_type=HOSTILE)
    for line in log.lines:
        line |= {"reason": HOSTILE} if "reason" in line else {"method": HOSTILE, "outcome": HOSTILE}
    log.begin().lines[-1]["host"] = HOSTILE
    page, _ = report(log.text())
    dom = in_chromium(page, tmp_path)
    # The page forbids every script but its own; where they are allowed, none runs either.
    assert "<title>taken" not in in_chromium(page, tmp_path, script="0;")
    for text in (dom, page.read_text()):
        assert text.count("<script") == 1
        assert "<img" not in text
    assert HOSTILE in rows(dom)
    assert "script-src 'sha256-" in page.read_text()
    assert not re.search(r"""(src|href)=["'](?!#)|url\(|@import""", page.read_text())  # nothing is fetched


def test_an_engine_is_found_and_a_column_sorts(report, tmp_path):
    log = Log().begin()
    for number in range(12):
        log.smooth(f"e-{number}", ready_s=30 - number)
    log.cut("cut-1").killed("kill-1")
    page, _ = report(log.text())
    script = """
        const set = (id, change) => { const box = document.getElementById(id); change(box);
          box.dispatchEvent(new Event(box.type === "checkbox" ? "change" : "input")); };
        const names = () => all("table.engines tbody tr").filter((row) => !row.hidden)
          .map((row) => row.cells[0].textContent);
        const seen = {};
        const header = all("table.engines th button").find((button) => button.textContent === "ready after");
        header.click(); seen.up = names(); header.click(); seen.down = names();
        all("table.engines th button")[0].click(); seen.byName = names();
        set("troubled", (box) => { box.checked = true; }); seen.troubled = names();
        set("troubled", (box) => { box.checked = false; });
        set("search", (box) => { box.value = "E-1"; }); seen.found = names();
        seen.rows = all(".row[data-engine]").filter((row) => row.getBoundingClientRect().height > 0).length;
        seen.shown = document.querySelector(".shown").textContent;
        all(".zoom button")[1].click();
        seen.width = document.querySelector(".lanes").getBoundingClientRect().width
          / document.querySelector(".timeline").clientWidth;
        const told = document.createElement("pre"); told.id = "told"; told.textContent = JSON.stringify(seen);
        document.body.append(told);
    """
    dom = in_chromium(page, tmp_path, script)
    seen = json.loads(unescape(re.search(r'<pre id="told">(.*?)</pre>', dom)[1]))
    assert seen["up"][:3] == ["kill-1 #2", "cut-1", "e-11"]
    assert seen["up"][-1] == seen["down"][-1] == "kill-1"  # it has no such time
    assert seen["down"][:2] == ["e-0", "e-1"]
    assert seen["byName"] == ["cut-1", *(f"e-{number}" for number in range(12)), "kill-1", "kill-1 #2"]
    assert seen["troubled"] == ["cut-1", "kill-1"]
    assert seen["found"] == ["e-1", "e-10", "e-11"]
    assert seen["rows"] == 3
    assert seen["shown"] == "3 of 14 engines are shown"
    assert seen["width"] == pytest.approx(4, rel=0.01)


def test_a_thousand_engines_make_a_page_of_a_few_megabytes_that_is_soon_there(report, tmp_path):
    log = Log().begin()
    for number in range(1000):
        (log.cut if number % 10 == 0 else log.smooth)(f"default/regular/{number}", at_s=number / 100)
    text = log.text()
    began_at = time.monotonic()
    page, _ = report(text)
    assert time.monotonic() - began_at < 10
    assert page.stat().st_size < 3_000_000
    began_at = time.monotonic()
    dom = in_chromium(page, tmp_path)
    assert time.monotonic() - began_at < 60
    assert len(rows(dom)) == 1000


def test_several_runs_and_monitors_have_their_own_places(report, tmp_path):
    first, again = Log("a", "m1").begin().smooth("e"), Log("a", "m2", START_S + 100).begin().killed("e").smooth("f")
    page, _ = report(Log("b", "m3").smooth("e").text() + again.text() + first.text())
    dom = in_chromium(page, tmp_path)
    sections = dom.split("<section>")[1:]
    assert [re.search("<h2>(.*?)</h2>", section)[1] for section in sections] == ["run a", "run b"]
    assert re.findall(r'data-engine="(\w)" data-smooth="\d"><div', sections[0]) == ["e", "e", "f"]
    assert sections[0].count('<div class="manager">') == 2
    assert '<div class="manager">' not in sections[1]


def test_a_line_that_comes_twice_counts_once(report):
    text = Log().begin().cut("e").text()
    assert report(text)[0].read_bytes() == report(text + "".join(text.splitlines(True)[1:]))[0].read_bytes()


def test_a_log_that_begins_in_the_middle_and_lacks_events_is_shown_with_a_note(report):
    log = Log().step(50, "e", "ready", "unavailable", "probe_timeout", 40, 60).add("dropped", 51, events=7)
    page, _ = report(log.text())
    text = page.read_text()
    assert re.findall(r'<rect class="(\w+)" x=".*?%" w', text) == ["ready", "unavailable"]
    assert "7 events are missing" in text
    assert "it still runs, or its process died" in text


STEP = Log().smooth("e").lines[1]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (b"{", "not JSON: "),
        (b'{"kind": "transition", "at_s"', "not JSON: "),
        (b"\xff\xfe", "not UTF-8"),
        (b"[" * 100_000, "not an event: too deep"),
        (b"[]", "not an event: it has no kind"),
        (b'{"kind": 3}', "not an event: it has no kind"),
        (b'{"kind": "end"}', "not an event: end lacks run"),
        ({**STEP, "at_s": "now"}, 'not an event: at_s cannot be "now"'),
        ({**STEP, "at_s": float("nan")}, "not an event: at_s cannot be NaN"),
        ({**STEP, "at_s": 10**400}, "not an event: at_s cannot be 1000"),
        ({**STEP, "at_s": -5}, "not an event: at_s cannot be -5"),
        ({**STEP, "to": "gone"}, 'not an event: to cannot be "gone"'),
        ({**STEP, "to": ["ready"]}, 'not an event: to cannot be ["ready"]'),
        ({**STEP, "labels": {"a": 1}}, "not an event: labels cannot be"),
        ({**STEP, "incarnation": True}, "not an event: incarnation cannot be true"),
        (
            {"kind": "begin", "run": "a", "manager": "m", "at_s": 1, "format": 2},
            "of format 2, and this enginefsm reads",
        ),
    ],
)
def test_a_bad_line_is_named_and_costs_no_other(report, line, complaint):
    bad = line if isinstance(line, bytes) else json.dumps(line).encode()
    good = Log().begin().smooth("e").text().encode()
    page, said = report(bad + b"\n" + good + b"\n" + bad)
    told = said.splitlines()
    assert [re.search(r"events\.jsonl:(\d+): ", text)[1] for text in told] == ["1", "6"]
    assert all(complaint in text and text.endswith("; the line is passed over") for text in told)
    assert "2 lines could not be understood" in page.read_text()
    assert list(rows(page.read_text())) == ["e"]


def test_many_bad_lines_do_not_flood_the_terminal(report):
    _, said = report("{\n" * 500 + Log().smooth("e").text())
    assert len(said.splitlines()) == 21
    assert said.splitlines()[-1] == "480 more lines are passed over"


def test_a_line_of_a_kind_yet_to_come_is_passed_over_in_silence(report):
    assert report('{"kind": "weather"}\n' + Log().smooth("e").text())[1] == ""


def test_text_that_is_no_text_is_written_as_well_as_can_be(report, tmp_path):
    page, _ = report(Log().smooth("lone \ud800 and \x00").text())
    assert "lone" in in_chromium(page, tmp_path)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "cannot read .*events.jsonl: No such file or directory"),
        ("directory", "cannot read .*events.jsonl: Is a directory"),
        ("", "there are no events in .*events.jsonl"),
        ("hello\n", "there are no events in .*events.jsonl"),
    ],
)
def test_a_file_that_gives_nothing_is_one_line_and_exit_code_2(tmp_path, capsys, content, complaint):
    log, page = tmp_path / "events.jsonl", tmp_path / "page.html"
    if content == "directory":
        log.mkdir()
    elif content is not None:
        log.write_text(content)
    assert main(["report", str(log), "-o", str(page)]) == ends.USAGE
    last = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(f"enginefsm report: {complaint}", last)
    assert not page.exists()


def test_it_is_written_as_a_whole_readable_by_all_and_never_over_the_log(report, tmp_path, capfd):
    text = Log().smooth("e").text()
    page, _ = report(text)
    assert stat.S_IMODE(page.stat().st_mode) == 0o644
    assert {path.name for path in tmp_path.iterdir()} == {"events.jsonl", "page.html"}
    log = str(tmp_path / "events.jsonl")
    assert main(["report", log, "-o", log]) == ends.USAGE
    assert "is the event log itself" in capfd.readouterr().err
    assert (tmp_path / "events.jsonl").read_text() == text
    assert main(["report", log, "-o", str(tmp_path / "no" / "where.html")]) == ends.USAGE
    assert capfd.readouterr().err.count("\n") == 1


def test_the_trace_is_in_the_format_that_perfetto_and_chrome_open(report):
    log = Log().begin().cut("e-1").killed("e-2").add("end", 20)
    path, _ = report(log.text() + Log("b", "m2").smooth(HOSTILE).text(), "--format", "perfetto", name="trace.json")
    trace = json.loads(path.read_text())
    assert trace["displayTimeUnit"] == "ms"
    events = trace["traceEvents"]
    allowed = {"ph", "name", "cat", "pid", "tid", "ts", "dur", "args", "s", "cname"}
    for event in events:
        assert event["ph"] in "XiM"
        assert set(event) <= allowed
        assert all(isinstance(event[key], int) and event[key] >= 0 for key in ("pid", "tid", "ts"))
        assert (event["ph"] == "X") == ("dur" in event)
        assert event.get("dur", 0) >= 0
        assert (event["ph"] == "i") == (event.get("s") == "t")
    threads = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    # Else Perfetto calls an engine the main thread of its manager.
    assert not {pid for pid, _ in threads} & {tid for _, tid in threads}
    assert set(threads.values()) == {"e-1", "e-2", HOSTILE}
    processes = [e["args"]["name"] for e in events if e["name"] == "process_name"]
    assert processes == ["run b", "run glm (head, pid 42)"]
    slices = {}
    for event in events:
        if event["ph"] == "X":
            slices.setdefault(threads[event["pid"], event["tid"]], []).append(
                (event["name"], event["ts"], event["dur"])
            )
    assert slices["e-1"] == [
        ("launching", 0, 4_000_000), ("unavailable", 4_000_000, 5_000_000), ("ready", 9_000_000, 11_000_000)
    ]  # fmt: skip
    ready = slices[HOSTILE][-1]
    assert (ready[0], ready[2]) == ("ready", 1), (
        "the log ends as it becomes ready: a slice of no length is drawn below the one before it"
    )
    for of in slices.values():  # those of a thread may not overlap but by nesting
        for (_, start, length), (_, following, _) in itertools.pairwise(of):
            assert start + length <= following
    instants = [e["name"] for e in events if e["ph"] == "i" and threads[e["pid"], e["tid"]] == "e-1"]
    assert instants == ["init: actor_unavailable", "re-await 1: actor_unavailable", "re-await 2: succeeded"]


def test_without_jinja2_a_page_is_refused_and_a_trace_is_made(tmp_path, capsys, monkeypatch):
    (tmp_path / "log").write_text(Log().smooth("e").text())
    monkeypatch.setitem(sys.modules, "jinja2", None)
    for kind, code in (("html", ends.USAGE), ("perfetto", ends.OK)):
        assert main(["report", str(tmp_path / "log"), "--format", kind, "-o", str(tmp_path / kind)]) == code
    assert "pip install 'enginefsm[report]'" in capsys.readouterr().err
    assert not (tmp_path / "html").exists()


@pytest.mark.parametrize("length_s", [0.001, 0.3, 1, 7, 18.3, 59, 181, 899, 3600, 12_000, 86_400, 1e6, 1e8])
def test_ticks_are_round_few_and_told_apart(length_s):
    found = ticks(length_s, 9)
    assert 1 <= len(found) <= 10
    assert len({tick.text for tick in found}) == len(found)
    assert found[0].at_s == 0
    assert found[-1].at_s <= length_s * 1.000001
    if length_s >= 1:
        assert len(found) >= 3


def test_ticks_are_seconds_in_a_bringup():
    assert [tick.text for tick in ticks(181, 9)] == ["0 s", "30 s", "60 s", "90 s", "120 s", "150 s", "180 s"]
