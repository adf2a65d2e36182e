"""A model server in a child process: what its owner sees, and that it never outlives it. Stand-ins, and no Ray."""

import contextlib
import http.client
import os
import pickle
import shutil
import signal
import socket
import stat
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from support.engines import wait_until
from support.processes import below, freeze, is_gone

from enginefsm.rehearsal.server import ServerRequestError, ServerStartError
from enginefsm.rehearsal.standin import StandInEngine

HERE = Path(__file__).parent

MakeEngine = Callable[..., StandInEngine]


pytestmark = pytest.mark.usefixtures("nothing_else_below_this_process")


def servers(under: psutil.Process | None = None) -> list[psutil.Process]:
    found = []
    for process in (under or psutil.Process()).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            command = process.cmdline()  # the keeper's names the server's program too
            if any(word.endswith("standin_server.py") for word in command) and not any(
                word.endswith("keeper.py") for word in command
            ):
                found.append(process)
    return found


def the_server() -> psutil.Process:
    found: list[psutil.Process] = []
    wait_until(lambda: found.extend(servers()) or found)
    return found[0]


def kill_the_server() -> None:
    processes = psutil.Process().children(recursive=True)
    the_server().kill()
    wait_until(lambda: all(is_gone(process) for process in processes))


def status_of(port: int) -> int | str:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/health_generate")
        return connection.getresponse().status
    except ConnectionError:
        return "refused"
    finally:
        connection.close()


@pytest.fixture
def make_engine(tmp_path: Path) -> Iterator[MakeEngine]:
    """Make engines that load at once unless told otherwise, and shut them down after the test."""
    with contextlib.ExitStack() as shutdowns:

        def make(**options: object) -> StandInEngine:
            engine = StandInEngine(**{"import_s": 0, "load_s": 0, "log_dir": tmp_path, **options})
            shutdowns.callback(engine.shutdown)
            return engine

        yield make


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# Starting


def test_a_server_refuses_then_answers_503_and_serves_when_init_returns(
    make_engine: MakeEngine, free_port: int
) -> None:
    for _ in range(3):  # on a machine that stands still meanwhile, nothing is seen
        engine = make_engine(import_s=0.5, load_s=0.5)
        seen: list[int | str] = []
        with ThreadPoolExecutor() as pool:
            init = pool.submit(engine.init, free_port)
            while not init.done():
                seen.append(status_of(free_port))
        assert init.result() == f"http://127.0.0.1:{free_port}"
        assert status_of(free_port) == 200
        engine.shutdown()
        if (in_order := list(dict.fromkeys(seen))[:2]) == ["refused", 503]:
            break
    assert in_order == ["refused", 503]


def test_init_without_a_port_takes_a_free_one_and_gives_the_url(make_engine: MakeEngine) -> None:
    first, second = make_engine(), make_engine()
    urls = [first.init(), second.init()]
    assert urls == [first.url(), second.url()]
    assert urls[0] != urls[1]
    assert all(url.startswith("http://127.0.0.1:") for url in urls)


def test_generate_gives_the_servers_json(make_engine: MakeEngine) -> None:
    engine = make_engine()
    engine.init()
    answer = engine.generate("two words", {"max_new_tokens": 3})
    assert len(answer["text"].split()) == 3
    assert answer["meta_info"]["prompt_tokens"] == 2
    assert answer["meta_info"]["completion_tokens"] == 3


def test_a_server_that_exits_while_it_starts_is_reported_with_its_code_and_its_log(make_engine: MakeEngine) -> None:
    engine = make_engine(exit_code=3)
    with pytest.raises(ServerStartError, match="exited with code 3") as error:
        engine.init()
    assert error.value.exit_code == 3
    assert "told to exit with code 3 instead of serving" in str(error.value)


def test_a_server_that_is_killed_while_it_starts_is_reported_at_once_by_signal(make_engine: MakeEngine) -> None:
    engine = make_engine(import_s=60)
    with ThreadPoolExecutor() as pool:
        init = pool.submit(engine.init)
        the_server().kill()
        with pytest.raises(ServerStartError, match="killed by SIGKILL") as error:
            init.result(timeout=60)
    assert error.value.exit_code == -signal.SIGKILL


def test_a_start_error_tells_the_exit_code_though_the_log_is_gone(make_engine: MakeEngine, tmp_path: Path) -> None:
    engine = make_engine(import_s=60)
    with ThreadPoolExecutor() as pool:
        init = pool.submit(engine.init)
        server = the_server()
        shutil.rmtree(next(tmp_path.iterdir()))
        server.kill()
        with pytest.raises(ServerStartError, match=r"killed by SIGKILL(?s:.*)No such file"):
            init.result(timeout=60)


def test_a_start_error_keeps_its_code_when_it_crosses_processes() -> None:
    error = pickle.loads(pickle.dumps(ServerStartError("it exited", exit_code=3)))
    assert (str(error), error.exit_code) == ("it exited", 3)


def test_a_server_that_is_frozen_while_it_starts_is_ended_at_the_deadline(make_engine: MakeEngine) -> None:
    engine = make_engine(import_s=60, startup_deadline_s=2)
    with ThreadPoolExecutor() as pool:
        init = pool.submit(engine.init)
        server = the_server()
        freeze(server)
        with pytest.raises(ServerStartError, match=r"not healthy within 2 s.*startup_deadline_s"):
            init.result(timeout=60)
    assert is_gone(server)


def test_a_server_that_accepts_but_never_answers_is_ended_at_the_deadline(
    make_engine: MakeEngine, free_port: int
) -> None:
    engine = make_engine(load_s=60, startup_deadline_s=6)
    with ThreadPoolExecutor() as pool:
        init = pool.submit(engine.init, free_port)
        wait_until(lambda: status_of(free_port) == 503)
        freeze(the_server())
        with pytest.raises(ServerStartError, match="not healthy within 6 s"):
            init.result(timeout=60)


def test_a_second_init_is_refused_while_the_server_lives(make_engine: MakeEngine) -> None:
    engine = make_engine()
    url = engine.init()
    with pytest.raises(RuntimeError, match=r"already has a server.*call shutdown\(\)"):
        engine.init()
    assert len(servers()) == 1
    assert engine.url() == url
    assert engine.health_generate()


def test_a_second_init_is_refused_while_the_first_still_waits(make_engine: MakeEngine) -> None:
    engine = make_engine(load_s=1)
    with ThreadPoolExecutor() as pool:
        init = pool.submit(engine.init)
        server = the_server()
        freeze(server)
        with pytest.raises(RuntimeError, match="still starting"):
            engine.init()
        server.resume()
        assert init.result() == engine.url()


def test_an_engine_starts_again_on_the_same_port_after_a_shutdown_and_after_a_death(
    make_engine: MakeEngine, free_port: int
) -> None:
    engine = make_engine()
    url = engine.init(free_port)
    engine.generate("a prompt")
    engine.shutdown()
    assert engine.init(free_port) == url
    kill_the_server()
    assert not engine.health_generate()
    assert engine.init(free_port) == url
    assert engine.health_generate()


def test_a_proxy_in_the_environment_is_not_asked(make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.delenv("no_proxy", raising=False)
    engine = make_engine()
    engine.init()
    assert engine.health_generate()


def test_the_log_is_readable_by_its_owner_only(make_engine: MakeEngine, tmp_path: Path) -> None:
    make_engine().init()
    (log,) = tmp_path.glob("*/server.log")
    assert stat.S_IMODE(log.stat().st_mode) == 0o600
    assert stat.S_IMODE(log.parent.stat().st_mode) == 0o700


def test_the_servers_environment_is_the_engines_with_what_was_given(make_engine: MakeEngine) -> None:
    make_engine(env={"ENGINEFSM_TEST": "given"}).init()
    environment = the_server().environ()
    assert environment["ENGINEFSM_TEST"] == "given"
    assert environment["PATH"] == os.environ["PATH"]


# Health and requests


def test_health_is_false_before_init_and_after_shutdown(make_engine: MakeEngine) -> None:
    engine = make_engine()
    assert not engine.health_generate()
    assert engine.url() is None
    engine.init()
    assert engine.health_generate()
    engine.shutdown()
    assert not engine.health_generate()
    assert engine.url() is None


def test_health_of_a_frozen_server_is_false_after_the_timeout(make_engine: MakeEngine) -> None:
    engine = make_engine()
    engine.init()
    server = the_server()
    freeze(server)
    began = time.monotonic()
    assert not engine.health_generate(timeout_s=0.3)
    assert 0.3 <= time.monotonic() - began < 30
    server.resume()
    assert engine.health_generate()


def test_generate_without_a_server_says_to_call_init(make_engine: MakeEngine) -> None:
    with pytest.raises(ServerRequestError, match=r"call init\(\) first"):
        make_engine().generate("a prompt")


def test_generate_from_a_dead_server_says_that_it_exited_and_where_its_log_is(make_engine: MakeEngine) -> None:
    engine = make_engine()
    engine.init()
    kill_the_server()
    with pytest.raises(ServerRequestError, match=r"has exited.*server\.log"):
        engine.generate("a prompt")


def test_generate_from_a_frozen_server_ends_at_the_timeout(make_engine: MakeEngine) -> None:
    engine = make_engine()
    engine.init()
    freeze(the_server())
    with pytest.raises(ServerRequestError, match=r"timed out.*still runs"):
        engine.generate("a prompt", timeout_s=0.3)


def test_an_error_status_is_given_with_the_servers_words(make_engine: MakeEngine) -> None:
    engine = make_engine()
    engine.init()
    with pytest.raises(ServerRequestError, match=r"answered 400: .*not a request to generate"):
        engine.generate("a prompt", {"max_new_tokens": "many"})


# Bad input


@pytest.mark.parametrize("port", [0, -1, 65536])
def test_a_port_out_of_range_is_refused(make_engine: MakeEngine, port: int) -> None:
    with pytest.raises(ValueError, match=f"port must be from 1 to 65535.*not {port}"):
        make_engine().init(port)


@pytest.mark.parametrize("port", [True, "30000", 30000.0])
def test_a_port_that_is_no_int_is_refused(make_engine: MakeEngine, port: object) -> None:
    with pytest.raises(TypeError, match="port must be an int"):
        make_engine().init(port)


@pytest.mark.parametrize("host", ["", None, 127])
def test_a_host_that_is_no_name_is_refused(make_engine: MakeEngine, host: object) -> None:
    with pytest.raises(TypeError, match="host must be a name or an address"):
        make_engine().init(host=host)


def test_a_host_that_does_not_resolve_is_refused(make_engine: MakeEngine) -> None:
    with pytest.raises(ValueError, match=r"'no-such-host\.invalid' does not resolve"):
        make_engine().init(host="no-such-host.invalid")


def test_a_host_that_is_not_of_this_machine_is_refused(make_engine: MakeEngine) -> None:
    with pytest.raises(ValueError, match=r"cannot serve on 192\.0\.2\.1"):
        make_engine().init(host="192.0.2.1")


def test_a_port_in_use_is_refused_before_anything_is_launched(make_engine: MakeEngine, tmp_path: Path) -> None:
    before = set(psutil.Process().children())
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ServerStartError, match=f"port {port} on 127.0.0.1 is in use.*choose another port"):
            make_engine().init(port)
    assert set(psutil.Process().children()) <= before
    assert not list(tmp_path.iterdir())


def test_two_engines_that_start_on_one_port_do_not_share_a_server(make_engine: MakeEngine, free_port: int) -> None:
    first, second = make_engine(import_s=1), make_engine()
    with ThreadPoolExecutor() as pool:
        init = pool.submit(first.init, free_port)
        server = the_server()
        freeze(server)
        with pytest.raises(ServerStartError, match=f"port {free_port}.*another engine is starting"):
            second.init(free_port)
        server.resume()
        init.result()
    assert first.health_generate()
    assert not second.health_generate()


def test_a_port_that_is_taken_while_the_server_loads_is_reported_from_its_log(
    make_engine: MakeEngine, free_port: int
) -> None:
    engine = make_engine(import_s=1.5)
    with ThreadPoolExecutor() as pool, socket.socket() as thief:
        init = pool.submit(engine.init, free_port)
        server = the_server()
        freeze(server)
        thief.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        thief.bind(("127.0.0.1", free_port))
        thief.listen()
        server.resume()
        wait_until(lambda: not servers())
        thief.close()  # so that a health request that it had accepted ends
        with pytest.raises(ServerStartError, match="Address already in use"):
            init.result(timeout=60)


@pytest.mark.parametrize("seconds", [0, -1, float("inf"), float("nan"), True, "5"])
def test_a_deadline_that_is_no_positive_number_is_refused(seconds: object) -> None:
    with pytest.raises(ValueError, match="startup_deadline_s must be a positive, finite number of seconds"):
        StandInEngine(startup_deadline_s=seconds)


@pytest.mark.parametrize(
    ("option", "value"),
    [("import_s", -1), ("load_s", float("nan")), ("load_s", float("inf")), ("exit_code", 256), ("exit_code", -9)],
)
def test_a_stand_in_refuses_a_setting_out_of_range(option: str, value: float) -> None:
    with pytest.raises(ValueError, match=option):
        StandInEngine(**{option: value})


# Ending


class EngineWithOffspring(StandInEngine):
    """Its server has a child in a session of its own, which no process group and no signal of the parent reaches."""

    def _program(self, *where: object) -> object:
        program = super()._program(*where)
        script = 'setsid sleep 1000 & exec "$@"'
        return type(program)(["sh", "-c", script, "sh", *program.command], program.settings, program.env)


def test_shutdown_leaves_no_process_and_may_be_repeated(tmp_path: Path) -> None:
    engine = EngineWithOffspring(import_s=0, load_s=0, log_dir=tmp_path)
    engine.shutdown()
    engine.init()
    wait_until(lambda: below(name="sleep"))
    processes = below()
    engine.shutdown()
    assert all(is_gone(process) for process in processes)
    engine.shutdown()


def test_a_server_that_dies_takes_its_offspring_along(tmp_path: Path) -> None:
    engine = EngineWithOffspring(import_s=0, load_s=0, log_dir=tmp_path)
    engine.init()
    wait_until(lambda: below(name="sleep"))
    kill_the_server()


def test_shutdown_while_init_waits_ends_init_with_an_error_that_says_so(make_engine: MakeEngine) -> None:
    engine = make_engine(import_s=60)
    with ThreadPoolExecutor() as pool:
        init = pool.submit(engine.init)
        server = the_server()
        engine.shutdown()
        with pytest.raises(ServerStartError, match=r"ended by shutdown\(\) while init\(\) waited"):
            init.result(timeout=60)
    assert is_gone(server)


def test_shutdown_ends_a_frozen_server(make_engine: MakeEngine) -> None:
    engine = make_engine()
    engine.init()
    server = the_server()
    freeze(server)
    engine.shutdown()
    assert is_gone(server)


OWNER = """
    import os, sys, threading
    sys.path[:0] = {tests}
    from test_server import EngineWithOffspring

    engine = EngineWithOffspring(import_s=0, load_s=0, log_dir={log_dir!r})
    thread = threading.Thread(target=lambda: print(engine.init(), flush=True))
    thread.start()
    thread.join()
    assert engine.health_generate()
    {then}
    print("ready", flush=True)
    threading.Event().wait()
"""


@pytest.fixture
def start_owner(tmp_path: Path) -> Iterator[Callable[..., psutil.Process]]:
    """Start a process that owns an engine, whose init ran in a thread that has ended since."""
    owners = []

    def start(then: str = "pass") -> psutil.Process:
        script = OWNER.format(tests=[str(HERE), str(HERE.parent)], log_dir=str(tmp_path), then=then)
        owner = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True)
        owners.append(owner)
        assert owner.stdout is not None
        assert owner.stdout.readline().startswith("http://")
        assert owner.stdout.readline() == "ready\n"
        process = psutil.Process(owner.pid)
        wait_until(lambda: below(process, "sleep"))
        return process

    yield start
    for owner in owners:
        owner.kill()
        owner.communicate()


def test_a_server_outlives_the_thread_that_ran_init_but_not_a_killed_owner(
    start_owner: Callable[..., psutil.Process],
) -> None:
    owner = start_owner()
    processes = owner.children(recursive=True)
    assert len(processes) == 3  # the keeper, the server, its child
    assert not any(is_gone(process) for process in processes)
    owner.kill()
    wait_until(lambda: all(is_gone(process) for process in processes))


def test_a_frozen_server_does_not_outlive_a_killed_owner(start_owner: Callable[..., psutil.Process]) -> None:
    owner = start_owner()
    processes = owner.children(recursive=True)
    freeze(servers(under=owner)[0])
    owner.kill()
    wait_until(lambda: all(is_gone(process) for process in processes))


def test_a_server_does_not_outlive_its_owner_though_a_fork_of_the_owner_lives(
    start_owner: Callable[..., psutil.Process],
) -> None:
    owner = start_owner(then="os.fork() or (os.close(1), threading.Event().wait())")
    fork, *rest = sorted(owner.children(recursive=True), key=lambda process: process.cmdline()[1] != "-c")
    try:
        owner.kill()
        wait_until(lambda: all(is_gone(process) for process in rest))
        assert not is_gone(fork)
    finally:
        fork.kill()


def test_a_server_does_not_outlive_its_keeper(make_engine: MakeEngine) -> None:
    engine = make_engine()
    engine.init()
    server = the_server()
    server.parent().kill()
    wait_until(lambda: is_gone(server))
    assert not engine.health_generate()


def test_a_keeper_that_is_killed_while_the_server_starts_is_named(make_engine: MakeEngine) -> None:
    engine = make_engine(import_s=60)
    with ThreadPoolExecutor() as pool:
        init = pool.submit(engine.init)
        the_server().parent().kill()
        with pytest.raises(ServerStartError, match="keeper process was killed"):
            init.result(timeout=60)


def test_an_owner_that_exits_by_itself_takes_the_server_along(tmp_path: Path) -> None:
    script = f"""
        from enginefsm.rehearsal.standin import StandInEngine
        import psutil
        StandInEngine(import_s=0, load_s=0, log_dir={str(tmp_path)!r}).init()
        print(*[process.pid for process in psutil.Process().children(recursive=True)])
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True, check=True, timeout=60
    )
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) == 2
    wait_until(lambda: not any(psutil.pid_exists(pid) and not is_gone(psutil.Process(pid)) for pid in pids))


def test_threads_of_one_engine_may_ask_side_by_side(make_engine: MakeEngine) -> None:
    engine = make_engine()
    engine.init()
    start = threading.Barrier(8)

    def ask(number: int) -> int:
        start.wait()
        return engine.generate("a prompt", {"max_new_tokens": number})["meta_info"]["completion_tokens"]

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, range(8))) == list(range(8))
