"""The faults are real: they hit the processes of a Ray on this machine, and Ray says what it says."""

import importlib.util
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, GetTimeoutError, WorkerCrashedError
from support.engines import wait_until

from enginefsm.rehearsal import chaos


@pytest.fixture
def chaos_cluster(cluster: None) -> Iterator[None]:
    """Ray as it comes, with this file's classes shipped whole: its workers need not import the tests."""
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield
    ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


class Engine:
    """An engine whose `init` runs until a file appears."""

    def __init__(self) -> None:
        self.inits = 0

    def pid(self) -> int:
        return os.getpid()

    def init(self, started: Path, release: Path) -> str:
        self.inits += 1
        started.touch()
        while not release.exists():
            time.sleep(0.02)
        return "ready"

    def init_without_a_title(self, started: Path, release: Path) -> str:
        """Run with the command line that a worker has before Ray sets a title."""
        ray._raylet.setproctitle("python -u /ray/_private/workers/default_worker.py --node-ip-address=127.0.0.1")
        return self.init(started, release)

    def times_init_ended(self) -> int:
        return self.inits

    def launch_server(self) -> int:
        self.server = subprocess.Popen(["sleep", "1000"])
        return self.server.pid

    def server_exit(self) -> int:
        return self.server.wait(10)

    def thread_id(self) -> int:
        thread = threading.Thread(target=threading.Event().wait, daemon=True)
        thread.start()
        assert thread.native_id is not None
        return thread.native_id

    def listen(self, host: str, port: int = 0) -> int:
        """Serve echoes; give the port."""
        if ":" in host:
            listener = socket.socket(socket.AF_INET6)
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            listener.bind((host, port))
            listener.listen()
        else:
            listener = socket.create_server((host, port))

        def echo(connection: socket.socket) -> None:
            while data := connection.recv(100):
                connection.sendall(data)

        def serve() -> None:
            while True:
                connection, self.client = listener.accept()
                threading.Thread(target=echo, args=[connection], daemon=True).start()

        threading.Thread(target=serve, daemon=True).start()
        port = listener.getsockname()[1]
        assert isinstance(port, int)
        return port

    def client_host(self) -> str:
        return str(self.client[0])


class Manager:
    """Calls an engine from a process of its own."""

    def pid(self) -> int:
        return os.getpid()

    def reach(self, engine: Any) -> int:
        return int(ray.get(engine.pid.remote()))

    def init(self, engine: Any, started: Path, release: Path) -> str:
        try:
            return str(ray.get(engine.init.remote(started, release)))
        except ActorUnavailableError:
            return "unavailable"


def is_stopped(pid: int) -> bool:
    return psutil.Process(pid).status() == psutil.STATUS_STOPPED


def title(pid: int) -> str:
    return psutil.Process(pid).cmdline()[0]


@pytest.fixture
def start(chaos_cluster: None) -> Iterator[Callable[[type], tuple[Any, int]]]:
    """Start an actor of a class; give it and its pid."""
    actors = []

    def start_actor(cls: type) -> tuple[Any, int]:
        actor = ray.remote(num_cpus=0)(cls).remote()  # type: ignore[call-overload]
        actors.append(actor)
        return actor, ray.get(actor.pid.remote())

    yield start_actor
    for actor in actors:
        ray.kill(actor)


def assert_echoes(connection: socket.socket) -> None:
    """See to it that the other process has accepted the connection, and that it holds."""
    connection.sendall(b"hello")
    assert connection.recv(100) == b"hello"


# --- cut ---


def test_a_cut_connection_makes_the_running_call_unavailable_and_leaves_the_method_running(start, tmp_path):
    engine, pid = start(Engine)
    started, release = tmp_path / "started", tmp_path / "release"
    call = engine.init.remote(started, release)
    wait_until(started.exists)

    assert chaos.cut(pid) >= 1

    with pytest.raises(ActorUnavailableError):
        ray.get(call, timeout=30)
    assert title(pid) == "ray::Engine.init"
    release.touch()
    assert ray.get(engine.times_init_ended.remote(), timeout=30) == 1


@pytest.mark.parametrize("engine_first", [True, False])
def test_two_other_processes_are_cut_from_outside_and_only_from_one_another(start, tmp_path, engine_first):
    engine, engine_pid = start(Engine)
    manager, manager_pid = start(Manager)
    started, release = tmp_path / "started", tmp_path / "release"
    through_the_manager = manager.init.remote(engine, started, release)
    wait_until(started.exists)
    straight_from_here = engine.times_init_ended.remote()

    pids = (engine_pid, manager_pid) if engine_first else (manager_pid, engine_pid)
    assert chaos.cut(*pids) >= 1

    assert ray.get(through_the_manager, timeout=30) == "unavailable"
    release.touch()
    assert ray.get(straight_from_here, timeout=30) == 1


def test_processes_without_a_connection_have_none_cut(start):
    one, one_pid = start(Engine)
    two, two_pid = start(Engine)

    assert chaos.cut(one_pid, two_pid) == 0

    assert ray.get([one.pid.remote(), two.pid.remote()], timeout=30) == [one_pid, two_pid]


def test_a_cut_is_the_same_with_the_caller_named_first(start):
    engine, pid = start(Engine)
    with socket.create_connection(("127.0.0.1", ray.get(engine.listen.remote("127.0.0.1"))), timeout=10) as ours:
        assert_echoes(ours)

        assert chaos.cut(os.getpid(), pid) >= 1

        assert ours.recv(1) == b""


def test_connections_that_share_both_ports_are_told_apart_by_address(start):
    near, near_pid = start(Engine)
    far, _ = start(Engine)
    port = ray.get(near.listen.remote("127.0.0.1"))
    assert ray.get(far.listen.remote("127.0.0.2", port)) == port
    with socket.socket() as to_near, socket.socket() as to_far:
        for ours in (to_near, to_far):
            ours.settimeout(10)
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        to_near.bind(("127.0.0.1", 0))
        to_near.connect(("127.0.0.1", port))
        to_far.bind(to_near.getsockname())
        to_far.connect(("127.0.0.2", port))
        assert_echoes(to_near)
        assert_echoes(to_far)

        assert chaos.cut(near_pid) >= 1

        assert to_near.recv(1) == b""
        assert_echoes(to_far)


def test_an_ipv4_connection_to_an_ipv6_socket_is_cut(start):
    engine, pid = start(Engine)
    port = ray.get(engine.listen.remote("::ffff:127.0.0.1"))
    with socket.create_connection(("127.0.0.1", port), timeout=10) as ours:
        assert_echoes(ours)
        assert ray.get(engine.client_host.remote()) == "::ffff:127.0.0.1"

        assert chaos.cut(pid) >= 1

        assert ours.recv(1) == b""


def test_a_process_is_not_cut_from_itself():
    for peer in (None, os.getpid()):
        with pytest.raises(ValueError, match="both sides"):
            chaos.cut(os.getpid(), peer)


def test_a_frozen_process_can_be_cut(start):
    engine, pid = start(Engine)
    address = ("127.0.0.1", ray.get(engine.listen.remote("127.0.0.1")))
    with socket.create_connection(address, timeout=10) as ours:
        assert_echoes(ours)
        with chaos.freeze(pid):
            wait_until(lambda: is_stopped(pid))

            assert chaos.cut(pid) >= 1

            assert ours.recv(1) == b""


def test_a_descriptor_that_came_to_mean_something_else_is_left_alone():
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname(), timeout=10) as client,
        listener.accept()[0] as server,
    ):
        pair = chaos._Pair(client.getsockname(), client.getpeername())
        backwards = chaos._Pair(pair.there, pair.here)
        read, write = os.pipe()

        assert not chaos._shut_down(os.dup(client.fileno()), backwards)
        assert not chaos._shut_down(read, pair)
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.close(read)
        os.close(write)
        server.sendall(b"still here")
        assert client.recv(100) == b"still here"

        assert chaos._shut_down(os.dup(client.fileno()), pair)
        assert client.recv(1) == b""


def test_a_connection_that_ends_midway_is_not_counted(start, monkeypatch):
    engine, pid = start(Engine)
    look = chaos._connections
    with socket.create_connection(("127.0.0.1", ray.get(engine.listen.remote("127.0.0.1"))), timeout=10) as ours:
        assert_echoes(ours)
        pair = chaos._Pair(ours.getsockname(), ours.getpeername())
        seen = []

        def look_and_hang_up(process: int) -> list[tuple[int, chaos._Pair]]:
            found = look(process)
            if process == pid:
                return found
            seen.extend(each for each in found if each[1] == pair)
            ours.close()
            return seen

        monkeypatch.setattr(chaos, "_connections", look_and_hang_up)
        assert chaos.cut(pid) == 0
        assert len(seen) == 1


def test_a_process_that_dies_midway_has_nothing_cut(start, monkeypatch):
    engine, engine_pid = start(Engine)
    manager, manager_pid = start(Manager)
    assert ray.get(manager.reach.remote(engine)) == engine_pid
    look = chaos._connections
    theirs = {chaos._Pair(pair.there, pair.here) for _, pair in look(manager_pid)}
    seen = []

    def look_and_kill(process: int) -> list[tuple[int, chaos._Pair]]:
        found = look(process)
        if process == engine_pid:
            seen.extend(each for each in found if each[1] in theirs)
            chaos.kill(engine_pid)
            wait_until(lambda: not psutil.pid_exists(engine_pid))
        return found

    monkeypatch.setattr(chaos, "_connections", look_and_kill)
    assert chaos.cut(engine_pid, manager_pid) == 0
    assert seen


# --- kill ---


def test_a_killed_engine_is_dead(start, tmp_path):
    engine, pid = start(Engine)
    call = engine.init.remote(tmp_path / "started", tmp_path / "never")
    wait_until((tmp_path / "started").exists)

    chaos.kill(pid)

    with pytest.raises(ActorDiedError):
        ray.get(call, timeout=30)


def test_an_engine_can_be_killed_while_its_constructor_runs(chaos_cluster, tmp_path):
    note = tmp_path / "pid"

    class Slow:
        def __init__(self) -> None:
            note.with_suffix(".part").write_text(str(os.getpid()))
            note.with_suffix(".part").rename(note)
            threading.Event().wait()

        def ping(self) -> None:
            pass

    engine = ray.remote(num_cpus=0)(Slow).remote()
    wait_until(note.exists)
    pid = int(note.read_text())
    assert title(pid).endswith("Slow.__init__")

    chaos.kill(pid)

    with pytest.raises(ActorDiedError):
        ray.get(engine.ping.remote(), timeout=30)


def test_the_server_below_an_engine_can_be_killed_and_the_engine_lives(start):
    engine, pid = start(Engine)

    chaos.kill(ray.get(engine.launch_server.remote()))

    assert ray.get(engine.server_exit.remote(), timeout=30) == -9
    assert ray.get(engine.pid.remote()) == pid


def test_a_manager_that_is_a_task_can_be_killed(chaos_cluster, tmp_path):
    note = tmp_path / "pid"

    def manage() -> None:
        note.with_suffix(".part").write_text(str(os.getpid()))
        note.with_suffix(".part").rename(note)
        threading.Event().wait()

    task = ray.remote(num_cpus=0, max_retries=0)(manage).remote()
    wait_until(note.exists)

    chaos.kill(int(note.read_text()))

    with pytest.raises(WorkerCrashedError):
        ray.get(task, timeout=30)


# --- freeze ---


def test_a_frozen_engine_answers_nothing_until_it_is_thawed(start):
    engine, pid = start(Engine)
    freeze = chaos.freeze(pid)
    call = engine.pid.remote()
    with pytest.raises(GetTimeoutError):
        ray.get(call, timeout=1)

    freeze.thaw()

    assert ray.get(call, timeout=30) == pid


def test_a_freeze_ends_by_itself_after_its_time(start):
    engine, pid = start(Engine)
    begun = time.monotonic()
    chaos.freeze(pid, for_s=2)
    wait_until(lambda: is_stopped(pid), timeout_s=1.5)

    assert ray.get(engine.pid.remote(), timeout=30) == pid
    assert time.monotonic() - begun >= 2


def test_a_freeze_ends_with_its_block_whatever_happens_there(start):
    _, pid = start(Engine)

    def fail_once_it_is_frozen() -> None:
        with chaos.freeze(pid):
            wait_until(lambda: is_stopped(pid))
            raise KeyError

    with pytest.raises(KeyError):
        fail_once_it_is_frozen()
    wait_until(lambda: not is_stopped(pid))


def test_a_freeze_ends_with_the_process_that_asked_for_it(start):
    engine, pid = start(Engine)
    program = (
        "import sys, time, psutil; from enginefsm.rehearsal import chaos; pid = int(sys.argv[1]); chaos.freeze(pid)\n"
        "while psutil.Process(pid).status() != 'stopped': time.sleep(0.02)\n"
        "print('frozen')"
    )
    ended = subprocess.run([sys.executable, "-c", program, str(pid)], check=True, stdout=subprocess.PIPE, timeout=60)

    assert ended.stdout == b"frozen\n"
    assert ray.get(engine.pid.remote(), timeout=30) == pid


def test_thawing_twice_or_after_the_end_of_the_process_does_nothing(start):
    engine, pid = start(Engine)
    freeze = chaos.freeze(pid)
    wait_until(lambda: is_stopped(pid))
    chaos.kill(pid)
    wait_until(lambda: not psutil.pid_exists(pid))
    descriptor = Path(f"/proc/self/fd/{freeze._pidfd}")
    assert "pidfd" in os.readlink(descriptor)

    freeze.thaw()
    assert not (descriptor.is_symlink() and "pidfd" in os.readlink(descriptor))
    freeze.thaw()

    assert repr(freeze) == f"<Freeze of pid {pid}: thawed>"
    with pytest.raises(ActorDiedError):
        ray.get(engine.pid.remote(), timeout=30)


def test_a_time_that_is_none_freezes_nothing(start):
    engine, pid = start(Engine)
    for for_s in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="for_s"):
            chaos.freeze(pid, for_s=for_s)
    assert ray.get(engine.pid.remote(), timeout=30) == pid


def test_a_process_does_not_freeze_itself(start):
    with pytest.raises(ValueError, match="thaw itself"):
        chaos.freeze(os.getpid(), for_s=1)

    class Suicidal(Engine):
        def freeze(self) -> None:
            chaos.freeze(os.getpid(), for_s=1)

    engine, _ = start(Suicidal)
    with pytest.raises(ValueError, match="thaw itself"):
        ray.get(engine.freeze.remote(), timeout=30)


# --- failing ---


def test_an_init_that_fails_raises_its_error_and_the_actor_lives(start):
    engine, pid = start(chaos.failing(Engine, error=MemoryError("CUDA out of memory")))
    with pytest.raises(MemoryError, match="CUDA out of memory") as caught:
        ray.get(engine.init.remote(Path("a"), Path("b")), timeout=30)
    assert "ray::Engine.init()" in str(caught.value)
    assert ray.get(engine.pid.remote(), timeout=30) == pid


def test_a_constructor_that_fails_takes_the_actor_with_it(chaos_cluster):
    engine = ray.remote(num_cpus=0)(chaos.failing(Engine, "__init__")).remote()
    with pytest.raises(ActorDiedError, match=r"RuntimeError: Engine\.__init__ failed by enginefsm\.rehearsal\.chaos"):
        ray.get(engine.pid.remote(), timeout=30)


def test_a_failure_can_come_late(start):
    engine, _ = start(chaos.failing(Engine, after_s=1))
    begun = time.monotonic()
    with pytest.raises(RuntimeError, match=r"Engine\.init failed"):
        ray.get(engine.init.remote(Path("a"), Path("b")), timeout=30)
    assert time.monotonic() - begun >= 1


def test_an_asyncio_engine_that_fails_still_is_one(start):
    class Async:
        async def init(self) -> None: ...

        async def pid(self) -> int:
            return os.getpid()

    engine, pid = start(chaos.failing(Async, after_s=3))
    call = engine.init.remote()
    assert ray.get(engine.pid.remote(), timeout=30) == pid
    assert ray.wait([call], timeout=0) == ([], [call]), "it waits without blocking the others"
    with pytest.raises(RuntimeError, match=r"Async\.init failed"):
        ray.get(call, timeout=30)


def test_a_failing_engine_needs_no_enginefsm_where_it_runs(start):
    class Bare:
        def pid(self) -> int:
            return os.getpid()

        def init(self) -> None: ...

        def modules(self) -> set[str]:
            return set(sys.modules)

    engine, _ = start(chaos.failing(Bare))
    with pytest.raises(RuntimeError, match=r"Bare\.init failed"):
        ray.get(engine.init.remote(), timeout=30)
    assert not [name for name in ray.get(engine.modules.remote()) if name.startswith("enginefsm")]


def test_a_failing_method_takes_the_arguments_of_the_one_it_replaces(start):
    engine, _ = start(chaos.failing(Engine))
    with pytest.raises(TypeError, match="'started'"):
        engine.init.remote(port=30000)


def test_a_class_that_cannot_fail_is_refused():
    with pytest.raises(TypeError, match=r"before ray\.remote"):
        chaos.failing(ray.remote(Engine))  # type: ignore[arg-type]
    with pytest.raises(AttributeError, match="'no_such_method'"):
        chaos.failing(Engine, "no_such_method")
    for after_s in (-1, float("nan")):
        with pytest.raises(ValueError, match="after_s"):
            chaos.failing(Engine, after_s=after_s)


# --- refusals ---


def part_of_ray(name: str) -> int:
    """Find a process of the test's own cluster by what it is called."""
    found: list[int] = []

    def find() -> bool:
        for process in psutil.Process().children(recursive=True):
            try:
                words = process.cmdline()[:1]
            except psutil.NoSuchProcess:
                continue
            if words and os.path.basename(words[0]) == name:
                found.append(process.pid)
        return bool(found)

    wait_until(find)
    return found[0]


def assert_refused(pid: int, what: str) -> None:
    for fault in (chaos.cut, chaos.kill, chaos.freeze):
        with pytest.raises(chaos.NotAnEngineError) as caught:
            fault(pid)
        message = str(caught.value)
        assert message.startswith(f"pid {pid} is ")
        assert what in message
        assert "name the pid of a Ray actor" in message
        assert "\n" not in message


@pytest.mark.parametrize("name", ["raylet", "gcs_server", "ray::DashboardAgent", "ray::RuntimeEnvAgent"])
def test_rays_own_processes_are_refused(chaos_cluster, name):
    pid = part_of_ray(name)
    assert_refused(pid, name)
    assert psutil.Process(pid).status() not in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE)


def test_an_idle_worker_is_refused(chaos_cluster):
    def an_idle_worker():
        pid = ray.get(ray.remote(lambda: os.getpid()).remote())
        with suppress(psutil.NoSuchProcess, IndexError):  # Ray may end one
            wait_until(lambda: title(pid) == "ray::IDLE")
            return pid

    pid = wait_until(an_idle_worker)
    assert_refused(pid, "'ray::IDLE'")
    assert not is_stopped(pid)


def test_an_actor_whose_title_ray_could_not_set_is_known_as_a_worker(start, tmp_path):
    engine, pid = start(Engine)
    started, release = tmp_path / "started", tmp_path / "release"
    call = engine.init_without_a_title.remote(started, release)
    wait_until(started.exists)
    assert not title(pid).startswith("ray::")
    with chaos.freeze(pid):
        wait_until(lambda: is_stopped(pid))
    release.touch()
    assert ray.get(call, timeout=60) == "ready"


def test_every_title_that_ray_gives_its_own_python_processes_is_known():
    constants = vars(ray._private.ray_constants)
    prefixes = ("WORKER_PROCESS_TYPE_", "AGENT_PROCESS_TYPE_")
    titles = {value for name, value in constants.items() if name.startswith(prefixes) and value.startswith("ray::")}
    assert titles == {name for name in chaos._RAYS_OWN if name.startswith("ray::")}


def test_processes_that_have_nothing_to_do_with_ray_are_refused(chaos_cluster):
    with subprocess.Popen(["sh", "-c", "read line"], stdin=subprocess.PIPE) as shell:
        assert_refused(shell.pid, "'sh'")
        assert shell.poll() is None
        assert not is_stopped(shell.pid)
        shell.communicate(b"\n")
    assert shell.returncode == 0
    assert_refused(1, repr(title(1)))


def test_the_peer_of_a_cut_is_checked_as_well(start):
    engine, pid = start(Engine)
    raylet = part_of_ray("raylet")
    for pids in ((pid, raylet), (raylet, pid)):
        with pytest.raises(chaos.NotAnEngineError, match=f"pid {raylet} is '"):
            chaos.cut(*pids)
    assert ray.get(engine.pid.remote(), timeout=30) == pid


def test_the_calling_driver_kills_not_itself():
    with pytest.raises(chaos.NotAnEngineError, match=f"pid {os.getpid()} is "):
        chaos.kill(os.getpid())


def test_processes_that_have_ended_are_refused():
    process = subprocess.Popen(["true"])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert_refused(process.pid, "a process that has ended")
    process.wait()
    assert_refused(process.pid, "no process of this machine")


@pytest.mark.parametrize("pid", [0, -1, pytest.param(-os.getpid(), id="its group"), 2**40])
def test_numbers_that_are_no_pid_are_refused(pid):
    assert_refused(pid, "not a process")


def test_a_thread_of_an_engine_is_refused(start):
    engine, pid = start(Engine)
    assert_refused(ray.get(engine.thread_id.remote()), "no process of this machine")
    assert ray.get(engine.pid.remote(), timeout=30) == pid


def test_a_ray_that_runs_below_an_actor_keeps_its_own_processes(start):
    class Job:
        def pid(self) -> int:
            return os.getpid()

        def launch(self) -> None:
            # Titled as a raylet that a driver started, which a job's actor started, with a process of its own below.
            program = "exec -a /opt/ray/raylet bash -c 'sleep 1000 & wait'"
            self.raylet = subprocess.Popen(["bash", "-c", program])

        def stop(self) -> None:
            self.raylet.kill()

    job, pid = start(Job)
    ray.get(job.launch.remote())
    wait_until(lambda: titles_below(pid) == ["/opt/ray/raylet", "sleep"])
    raylet, below = psutil.Process(pid).children(recursive=True)
    try:
        assert_refused(raylet.pid, "'/opt/ray/raylet'")
        assert_refused(below.pid, "'sleep'")
    finally:
        ray.get(job.stop.remote())
        below.kill()


def titles_below(pid: int) -> list[str]:
    try:
        return [title(each.pid) for each in psutil.Process(pid).children(recursive=True)]
    except (psutil.NoSuchProcess, IndexError):
        return []  # one of them was being started


def test_without_psutil_the_import_says_what_to_install(monkeypatch):
    assert chaos.__file__ is not None
    spec = importlib.util.spec_from_file_location("chaos_without_psutil", chaos.__file__)
    assert spec is not None
    assert spec.loader is not None
    monkeypatch.setitem(sys.modules, "psutil", None)
    with pytest.raises(ImportError, match=r"pip install 'enginefsm\[demo\]'"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
