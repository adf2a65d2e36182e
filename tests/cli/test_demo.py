"""The demo as its users run it: a command, on a real Ray, with real faults."""

import contextlib
import ipaddress
import itertools
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
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from enginefsm import Reason
from enginefsm.cli import ends
from enginefsm.cli.demo.board import Life
from enginefsm.cli.demo.faults import Injection
from enginefsm.cli.demo.options import FaultKind
from enginefsm.cli.demo.plan import Fault, make_plan
from enginefsm.cli.main import main

COMMAND = [sys.executable, "-m", "enginefsm.cli", "demo"]
TIMEOUT_S = 150  # ten times what it takes: others use this machine


def ended(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


class Demo:
    """A running demo, its output line by line, and every process that was seen below it."""

    def __init__(self, *arguments: str, tmp: Path) -> None:
        self.tmp = tmp
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            [*COMMAND, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            # Ray's sockets have long names: it stays where it always is.
            env={**os.environ, "TMPDIR": str(tmp), "RAY_TMPDIR": "/tmp", "PYTHONUNBUFFERED": "1"},
        )
        self.below: set[psutil.Process] = set()

    def read_until(self, pattern: str) -> re.Match[str]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))
            self.note_processes()
            if found := re.search(pattern, line):
                return found
        raise AssertionError(f"no {pattern!r} in\n{self.text}")

    def note_processes(self) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            self.below.update(psutil.Process(self.process.pid).children(recursive=True))

    def finish(self) -> int:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))
            self.note_processes()
        return self.process.wait(TIMEOUT_S)

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    @property
    def summary(self) -> list[str]:
        heading = max(place for place, line in enumerate(self.lines) if line.startswith("enginefsm demo:"))
        return self.lines[heading + 1 :]

    def listening_hosts(self) -> set[str]:
        self.note_processes()
        hosts = set()
        for process in [psutil.Process(self.process.pid), *self.below]:
            with contextlib.suppress(psutil.NoSuchProcess):
                sockets = process.net_connections("tcp")
                hosts |= {each.laddr.ip for each in sockets if each.status == psutil.CONN_LISTEN}
        return hosts

    def left(self) -> list[psutil.Process]:
        _, alive = psutil.wait_procs(self.below, timeout=10)
        return [process for process in alive if not ended(process)]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Demo]]:
    started: list[Demo] = []

    def begin(*arguments: str) -> Demo:
        started.append(Demo(*arguments, tmp=tmp_path))
        return started[-1]

    yield begin
    for demo in started:
        demo.process.kill()
        demo.process.wait()


def test_the_default_run_comes_up_through_its_cuts_and_serves_metrics_meanwhile(start: Callable[..., Demo]) -> None:
    for _ in range(3):  # it takes 20 s; a busy machine may take too long once or twice
        began_at = time.monotonic()
        demo = start()
        url = demo.read_until(r"metrics: (http://127\.0\.0\.1:\d+/metrics)")[1]
        demo.read_until(r"connection cut")
        with urllib.request.urlopen(url, timeout=10) as answer:
            metrics = answer.read().decode()
        hosts = demo.listening_hosts()
        assert hosts
        assert all(ipaddress.ip_address(host.removeprefix("::ffff:")).is_loopback for host in hosts), hosts
        assert demo.finish() == ends.OK, demo.text
        took_s = time.monotonic() - began_at
        if took_s < 60:
            break
    assert took_s < 60

    for number in range(4):
        labels = f'engine="engine-{number}",model="stand-in",run="demo",state="launching",worker_type="regular"'
        assert f"enginefsm_engine_state{{{labels}}}" in metrics
        assert re.search(rf"  engine-{number}  cut at \d.*ready after .* tries, init ran once", demo.text)
    assert demo.lines[-1] == "4 of 4 engines came up and answer; init ran once in each."
    assert "unavailable -> ready (recovered)" in demo.text
    assert len(demo.below) >= 4 + 4 + 4  # the actors, the servers and their keepers at least
    assert not demo.left()
    assert not list(demo.tmp.iterdir())


def test_a_kill_is_named_by_get_and_the_engine_comes_up_as_a_second_incarnation(
    start: Callable[..., Demo], tmp_path: Path
) -> None:
    events = tmp_path / "kept" / "events.jsonl"
    events.parent.mkdir()
    demo = start("--faults", "cut,kill", "--engines", "3", "--seed", "5", "--events", str(events))
    assert demo.finish() == ends.OK, demo.text
    plan = {each.name: each.faults for each in make_plan(names(3), [FaultKind.CUT, FaultKind.KILL], 5, (4.0, 5.5))}
    killed = next(name for name, faults in plan.items() if faults[0].kind is FaultKind.KILL)

    assert "| ray.exceptions.ActorDiedError: " in demo.text
    assert f"| enginefsm: init() of engine '{killed}' (model=stand-in worker_type=regular)" in demo.text
    assert re.search(rf"{killed} #2 +- +ready after .*1 try, init ran once", demo.text)
    assert re.search(rf"  {killed} +kill at .* dead after .*: actor_died", demo.text)
    for name, faults in plan.items():  # the seed alone says what hits whom
        line = next(line for line in demo.summary if line.startswith(f"  {name} "))
        moments = re.search(rf"{faults[0].kind} at ([\d., ]+) s", line)
        assert moments is not None
        assert len(moments[1].split(", ")) == len(faults)
    assert not demo.left()

    log = [json.loads(line) for line in events.read_text().splitlines()]
    assert (log[0]["kind"], log[0]["pid"], log[-1]["kind"]) == ("begin", demo.process.pid, "end")
    steps = [(line["to"], line["incarnation"]) for line in log if line.get("engine") == killed and "to" in line]
    lives = [step for step in steps if step != ("unavailable", 1)]  # as Ray may call it first, on a busy machine
    assert lives == [("launching", 1), ("dead", 1), ("launching", 2), ("ready", 2)]
    assert main(["report", str(events), "-o", str(events.with_suffix(".html"))]) == ends.OK


def test_frozen_engines_come_up_without_being_touched(start: Callable[..., Demo]) -> None:
    demo = start("--faults", "cut,freeze", "--engines", "2")
    assert demo.finish() == ends.OK, demo.text
    assert re.search(r"  engine-\d  freeze at .* 1 try, init ran once", demo.text)
    assert re.search(r"  engine-\d  cut at .* tries, init ran once", demo.text)
    assert not demo.left()


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[Demo, Future[int]]]]:
    """Demos with SGLang, side by side, as SGLang takes long to load; each with its exit code to come."""
    model = tmp_path_factory.mktemp("model")
    (model / "config.json").write_text("{}")
    kinds = {"with cuts": ("--faults", "cut"), "of no model": ("--faults", "none", "--model", str(model))}
    with ThreadPoolExecutor() as threads:
        started = {}
        for kind, arguments in kinds.items():
            demo = Demo("--engine", "sglang", "--engines", "1", *arguments, tmp=tmp_path_factory.mktemp("demo"))
            started[kind] = demo, threads.submit(demo.finish)
        yield started
        for demo, _ in started.values():
            demo.process.kill()


@pytest.mark.timeout(300)
def test_real_sglang_engines_come_up_through_cuts_and_generate(real: dict[str, tuple[Demo, Future[int]]]) -> None:
    demo, exit_code = real["with cuts"]
    assert exit_code.result() == ends.OK, demo.text
    assert "1 of 1 engines came up and answer; init ran once in each." in demo.text
    assert "unavailable -> ready (recovered)" in demo.text
    assert demo.below
    assert not demo.left()


@pytest.mark.timeout(300)
def test_an_engine_that_fails_by_itself_makes_the_demo_fail_and_its_log_is_kept(
    real: dict[str, tuple[Demo, Future[int]]],
) -> None:
    demo, exit_code = real["of no model"]
    assert exit_code.result() == ends.FAILED, demo.text
    assert "launching -> dead (init_failed)" in demo.text
    assert "Not as it should be: engine-0." in demo.text
    kept = Path(demo.lines[-1].removeprefix("The engines' logs are below "))
    assert kept.parent == demo.tmp
    assert list(kept.glob("*/server.log"))
    assert "\x1b" not in demo.text
    assert demo.below
    assert not demo.left()


@pytest.mark.parametrize("moment", ["starting Ray", "launching", "connection cut"])
def test_a_ctrl_c_ends_it_and_leaves_nothing_behind(start: Callable[..., Demo], moment: str) -> None:
    demo = start("--faults", "cut,freeze")
    demo.read_until(moment)
    time.sleep(1)
    demo.note_processes()
    os.killpg(demo.process.pid, signal.SIGINT)  # as a terminal does
    assert demo.finish() == ends.INTERRUPTED, demo.text
    assert demo.lines[-1] == "enginefsm demo: interrupted"
    assert "Traceback" not in demo.text
    assert demo.below
    assert not demo.left()
    assert not list(demo.tmp.iterdir())


def test_a_sigterm_is_an_interrupt_too(start: Callable[..., Demo]) -> None:
    demo = start("--engines", "2")
    demo.read_until("connection cut")
    demo.process.terminate()
    assert demo.finish() == ends.INTERRUPTED, demo.text
    assert not demo.left()


@pytest.mark.ray
def test_a_terminal_gets_a_table() -> None:
    ours, terminal = pty.openpty()
    demo = subprocess.Popen(
        [*COMMAND, "--engines", "2"],
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
        env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "80", "LINES": "40"},
    )
    os.close(terminal)
    seen = b""
    try:
        # The read fails with EIO when the last process on the terminal has closed it.
        with contextlib.suppress(OSError):
            while select.select([ours], [], [], TIMEOUT_S)[0]:
                seen += os.read(ours, 65536)
        assert demo.wait(TIMEOUT_S) == ends.OK, seen.decode()
    finally:
        demo.kill()
        demo.wait()
        os.close(ours)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen.decode())
    assert re.search(r"engine +state +for +tries +reason +faults", text)
    assert "────────" in text
    assert re.search(r"unavailable.*actor_unavailable +cut at", text)
    assert b"\x1b[2K" in seen  # redrawn in place
    assert "launching -> " not in text  # the lines are for elsewhere
    assert max(len(line) for line in re.split(r"[\r\n]+", text)) <= 80


def names(count: int) -> list[str]:
    return [f"engine-{number}" for number in range(count)]


ALL = list(FaultKind)


def test_every_kind_hits_somebody_and_one_engine_at_most_is_killed() -> None:
    for seed, count in itertools.product(range(100), (3, 4, 7)):
        plan = make_plan(names(count), ALL, seed, (4.0, 5.0))
        assert plan == make_plan(names(count), ALL, seed, (4.0, 5.0))
        assert [each.name for each in plan] == names(count)
        kinds = [{fault.kind for fault in each.faults} for each in plan]
        assert set().union(*kinds) == set(ALL)
        assert sum(FaultKind.KILL in hit for hit in kinds) == 1
        assert all(len(hit) == 1 for hit in kinds)
        for each in plan:
            moments = [fault.at_s for fault in each.faults]
            assert moments == sorted(moments)
            assert 0 < moments[0] <= moments[-1] < each.load_s


def test_seeds_differ_and_no_faults_is_a_plan_too() -> None:
    assert len({str(make_plan(names(4), [FaultKind.CUT], seed, (4.0, 5.0))) for seed in range(20)}) == 20
    assert all(each.faults == () for each in make_plan(names(4), [], 0, (4.0, 5.0)))


def life(kind: FaultKind | None = None, *, hit: bool = True, **facts: object) -> Life:
    made = Life("engine-0", 1, ready_after_s=1.0, inits=1)
    if kind is not None:
        made.injections.append(Injection(Fault("engine-0", kind, 1.0), 1, 1.0, hit, ""))
    for name, value in facts.items():
        setattr(made, name, value)
    return made


@pytest.mark.parametrize(
    ("lived", "verdict"),
    [
        (life(), True),
        (life(FaultKind.CUT), True),
        (life(FaultKind.CUT, hit=False), False),
        (life(FaultKind.CUT, inits=2), False),
        (life(FaultKind.FREEZE, ready_after_s=None), False),
        (life(FaultKind.CUT, dead_because=Reason.RETRY_EXHAUSTED), False),
        (life(FaultKind.KILL), False),
        (life(FaultKind.KILL, dead_because=Reason.RETRY_EXHAUSTED), False),
        (life(FaultKind.KILL, dead_because=Reason.ACTOR_DIED), True),
    ],
)
def test_only_what_should_happen_is_as_it_should_be(lived: Life, verdict: bool) -> None:
    assert lived.is_as_it_should_be is verdict


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--faults", "burn"], "'burn' is not a fault: choose from cut, kill, freeze"),
        (["--faults", "cut,none"], "'none' is not a fault"),
        (["--faults", ""], "'' is not a fault"),
        (["--engines", "0"], "from 1 to 64 on one machine, not 0"),
        (["--engines", "65"], "from 1 to 64 on one machine, not 65"),
        (["--engines", "many"], "'many' is not a valid integer"),
        (["--engines", "2", "--faults", "cut,kill,freeze"], "take --engines 3 or more"),
        (["--engine", "vllm"], "'vllm' is not one of 'stand-in', 'sglang'"),
        (["--engine", "sglang", "--model", "/no/such/model"], "/no/such/model is not the directory of a model"),
        (["--model", "/tmp"], "--model is for --engine sglang"),
        (["--metrics-port", "65536"], "from 0 to 65535, not 65536"),
        (["--events", "/no/such/log"], "--events: /no/such/log cannot be written: No such file or directory"),
        (["--events", "/tmp"], "--events: /tmp cannot be written: Is a directory"),
        (["--seed", "a"], "'a' is not a valid integer"),
        (["--what"], "No such option"),
    ],
)
def test_bad_input_gets_one_line_and_exit_code_2(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", *arguments]) == ends.USAGE
    out, err = capsys.readouterr()
    assert complaint in err
    assert err.count("\n") == 1
    assert not out


def test_a_port_in_use_is_bad_input(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["demo", "--metrics-port", str(port)]) == ends.USAGE
    assert re.fullmatch(rf"enginefsm demo: --metrics-port: {port} on 127.0.0.1 .*\n", capsys.readouterr().err)


def test_more_real_engines_than_the_memory_holds_are_bad_input(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    memory = psutil.virtual_memory()._replace(available=4 * 2**30)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    assert main(["demo", "--engine", "sglang", "--engines", "3"]) == ends.USAGE
    assert (
        "3 sglang engines take about 4.8 GB of memory, and 4.0 GB are free: take at most 2" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("package", "arguments", "advice"),
    [
        ("rich", [], r"needs rich: pip install 'enginefsm\[demo\]'"),
        ("psutil", [], r"needs psutil: pip install 'enginefsm\[demo\]'"),
        ("sglang", ["--engine", "sglang"], "sglang is not installed: pip install sglang"),
    ],
)
def test_a_missing_package_is_named_with_the_way_to_install_it(package: str, arguments: list[str], advice: str) -> None:
    script = (
        f"import sys; from enginefsm.cli.main import main; sys.modules[{package!r}] = None; "
        f"sys.exit(main({['demo', *arguments]!r}))"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == ends.USAGE, ran.stderr
    assert re.search(advice, ran.stderr)
    assert ran.stderr.count("\n") == 1


def test_the_command_has_a_version_and_help_and_wants_a_subcommand(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == ends.OK
    assert re.fullmatch(r"enginefsm \d+\.\d+\.\d+\n", capsys.readouterr().out)
    assert main(["demo", "--help"]) == ends.OK
    assert "--faults KINDS" in capsys.readouterr().out
    assert main([]) == ends.USAGE
    assert capsys.readouterr().err == "enginefsm: Missing command. (see enginefsm --help)\n"
