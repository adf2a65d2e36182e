"""What event loops and asyncio actors have of their own. On a real Ray, with real faults."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import pickle
import time
import weakref

import pytest
import ray
import uvloop
from ray import cloudpickle
from ray.exceptions import GetTimeoutError, RayTaskError, TaskCancelledError
from support.bare_handles import bare_handle
from support.engines import AsyncEngine, Asyncio, AsyncWithoutEnginefsm, Doomed, Engine, GroupedAsync, wait_until
from support.loops import Loop

import enginefsm
from enginefsm import EngineState, RetryPolicy
from enginefsm._wait import arrivals
from enginefsm.rehearsal import chaos

LAUNCHING, READY, UNAVAILABLE, DEAD = EngineState


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def loop(request):
    made = Loop(request.param)
    yield made
    made.close()


@pytest.fixture
def plain_loop():
    made = Loop()
    yield made
    made.close()


@pytest.fixture
def no_noise(recwarn, caplog):
    """Nothing is left for the collector to complain of."""
    yield
    gc.collect()
    assert "never retrieved" not in caplog.text
    assert [str(each.message) for each in recwarn if "never" in str(each.message)] == []


# --- await ---


def test_a_plain_reference_that_is_polled_is_asked_of_ray_once(fleet, plain_loop):
    rig = fleet.launch()
    rig.open()
    assert plain_loop.run(rig.engine.init.remote()) == "launched"
    ref = rig.engine.handle.hold.remote()

    async def poll(times):
        for _ in range(times):
            with pytest.raises(GetTimeoutError):
                await fleet.monitor.gather(ref, timeout=0.001)
        gc.collect()
        return sum("Arrival" in type(thing).__name__ for thing in gc.get_objects())

    assert plain_loop.run(poll(5)) == plain_loop.run(poll(50))  # what Ray was asked, it keeps
    rig.open("let_go")
    assert plain_loop.run(fleet.monitor.gather(ref)) == [None]


def test_a_call_is_awaited_like_a_task_alone_in_asyncio_s_gather_and_again(fleet, loop, no_noise):
    rigs = [fleet.launch(cls) for cls in (Engine, AsyncEngine)]
    for rig in rigs:
        rig.open()
    calls = [rig.engine.init.remote(value=number) for number, rig in enumerate(rigs)]

    async def bring_up():
        first = await asyncio.gather(*calls)
        return first, [await call for call in calls], await asyncio.wait_for(calls[0], 10)

    assert loop.run(bring_up()) == ([0, 1], [0, 1], 0)
    assert loop.run(fleet.monitor.gather(calls[0], calls[0].ref, rigs[1].engine.handle.thread.remote()))[:2] == [0, 0]
    assert loop.run(fleet.monitor.gather()) == []
    assert loop.run(fleet.monitor.gather(calls[1])) == [fleet.monitor.get(calls[1])] == [1]
    assert [rig.times_init_began() for rig in rigs] == [1, 1]


def test_a_call_that_failed_raises_the_noted_exception_each_time_it_is_awaited(fleet, loop, no_noise):
    rig = fleet.launch(AsyncEngine)
    rig.open()
    call = rig.engine.init.remote("CUDA out of memory")
    for _ in range(2):
        with pytest.raises(RuntimeError, match="CUDA out of memory") as raised:
            loop.run(call)
        assert isinstance(raised.value, RayTaskError)
        assert len(raised.value.__notes__) == 1
        assert "'engine-0'" in raised.value.__notes__[0]


def test_whoever_awaits_one_failed_call_beside_others_has_an_exception_of_its_own(fleet, plain_loop, no_noise):
    rig = fleet.launch()
    call = rig.engine.init.remote("no")

    async def all_of_them():
        tasks = [asyncio.ensure_future(call) for _ in range(3)]
        await asyncio.sleep(0.1)
        rig.open()
        return await asyncio.gather(*tasks, return_exceptions=True)

    errors = plain_loop.run(all_of_them())
    assert len({id(error) for error in errors}) == 3
    assert [len(error.__notes__) for error in errors] == [1, 1, 1]


def test_what_get_refuses_gather_refuses(fleet, plain_loop):
    rig = fleet.launch()
    call = rig.engine.init.remote()
    with pytest.raises(TypeError, match="takes calls and ObjectRefs, not int"):
        plain_loop.run(fleet.monitor.gather(1))
    with pytest.raises(ValueError, match="timeout must be"):
        plain_loop.run(fleet.monitor.gather(call, timeout=-1))
    with pytest.raises(ValueError, match="another monitor"):
        plain_loop.run(enginefsm.EngineMonitor().gather(call))
    rig.open()
    assert plain_loop.run(call) == "launched"


def test_what_is_there_is_given_though_there_is_no_time_to_wait(fleet, plain_loop):
    rig = fleet.launch(AsyncEngine)
    launch = rig.engine.init.remote()
    with pytest.raises(GetTimeoutError, match="0 of 1 calls ended within 0 s"):
        plain_loop.run(fleet.monitor.gather(launch, timeout=0))
    rig.open()
    ray.wait([launch.ref])
    for _ in range(20):
        calls = [launch, *(rig.engine.times_init_ran.remote() for _ in range(10))]
        ray.wait([call.ref for call in calls], num_returns=len(calls))
        assert plain_loop.run(fleet.monitor.gather(*calls, timeout=0)) == ["launched", *[1] * 10]


def test_the_module_s_gather_is_the_process_s_monitor_s(cluster, tmp_path, plain_loop):
    enginefsm.configure(run="aio", export=[])
    engine = enginefsm.adopt(
        ray.remote(enginefsm.monitored(AsyncEngine)).options(num_cpus=0).remote(str(tmp_path)), name="one"
    )
    (tmp_path / "gate").touch()
    assert plain_loop.run(enginefsm.gather(engine.init.remote())) == ["launched"]
    assert plain_loop.run(engine.times_init_ran.remote()) == 1
    enginefsm.release(engine)
    ray.kill(engine.handle)
    enginefsm.configure(export=[])


def test_a_timeout_however_it_is_given_leaves_the_call_to_be_awaited_again(fleet, plain_loop, no_noise):
    rig = fleet.launch(AsyncEngine)
    call = rig.engine.init.remote()
    rig.wait_for("begun")

    async def give_up():
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(call, 0.2)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await asyncio.gather(call, call)
        with pytest.raises(GetTimeoutError, match=r"0 of 1 calls.*\n.*'engine-0'"):
            await fleet.monitor.gather(call, timeout=0.2)
        task = asyncio.ensure_future(call)
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    plain_loop.run(give_up())
    rig.open()
    assert plain_loop.run(call) == "launched"
    assert rig.times_init_began() == 1


def test_cancelling_at_any_moment_of_an_outage_loses_nothing(fleet, plain_loop, no_noise):
    rig = fleet.launch()
    call = rig.engine.init.remote()
    rig.wait_for("begun")
    rig.cut()

    async def impatient():
        began = time.monotonic()  # the break is told of within 2 s, the re-await follows within 1 s, or later if busy
        while (passed_s := time.monotonic() - began) < 4 or (call.attempt == 0 and passed_s < 60):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.01):
                    await call

    plain_loop.run(impatient())
    assert call.attempt >= 1
    rig.open()
    assert plain_loop.run(call) == "launched"
    assert rig.times_init_began() == 1


def test_cancelling_while_calls_are_submitted_again_is_cancelling(fleet, plain_loop, monkeypatch):
    rig = fleet.launch()
    call = rig.engine.init.remote()
    rig.wait_for("begun")
    waits, make = [], fleet.monitor._wait
    monkeypatch.setattr(fleet.monitor, "_wait", lambda timeout_s: waits.append(make(timeout_s)) or waits[-1])

    def forget_while_another_is_watched(taker, ref):
        arrivals.forget(taker, ref)
        waits[0].watched[ray.put(None)] = []  # as the thread does that submits again

    monkeypatch.setattr("enginefsm._wait.loops.forget", forget_while_another_is_watched)

    async def cancel():
        task = asyncio.ensure_future(call)
        wait_for_it = asyncio.get_running_loop().run_in_executor
        await wait_for_it(None, wait_until, lambda: waits and waits[0].watched)
        task.cancel()
        await task

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(cancel())
    monkeypatch.undo()
    rig.open()
    assert plain_loop.run(call) == "launched"


def test_several_loops_and_threads_await_one_call_through_a_cut(fleet, no_noise):
    rig = fleet.launch(AsyncEngine)
    call = rig.engine.init.remote()
    loops = [Loop(asyncio.new_event_loop), Loop(uvloop.new_event_loop)]
    waits = [each.start(call) for each in loops for _ in range(2)] + [fleet.in_background(call) for _ in range(2)]
    rig.wait_for("begun")
    rig.cut()
    wait_until(lambda: call.attempt == 1, what="the resubmission")
    rig.open()
    assert [wait.result(60) for wait in waits] == ["launched"] * 6
    assert (call.attempt, rig.times_init_began()) == (1, 1)
    for each in loops:
        each.close()


def test_a_call_that_another_wait_submits_again_just_as_it_is_watched_is_followed(fleet, plain_loop, monkeypatch):
    rig = fleet.launch(AsyncEngine)
    rig.open()
    call = rig.engine.init.remote()

    def submitted_again_first(taker, ref):
        monkeypatch.undo()
        call.rest(0.0)
        call.resubmit(time.monotonic())
        arrivals.tell(taker, ref)

    monkeypatch.setattr("enginefsm._wait.loops.tell", submitted_again_first)
    assert plain_loop.run(call) == "launched"
    assert (call.attempt, rig.times_init_began()) == (1, 1)


def test_an_exit_from_a_listener_passes_to_who_awaits_and_the_next_is_told_of_as_before(fleet, monkeypatch):
    monkeypatch.setattr("enginefsm.export.delivery.FLUSH_S", 60.0)
    rig = fleet.launch(AsyncEngine)
    rig.open()
    met = []

    def exits(event):
        if not met and getattr(event, "to_state", None) is READY:
            met.append(event)
            raise SystemExit(3)

    fleet.monitor.add_listener(exits)

    async def launch():
        return await rig.engine.init.remote()

    async def ask():
        began = time.monotonic()
        return await rig.engine.times_init_ran.remote(), time.monotonic() - began

    with pytest.raises(SystemExit):
        asyncio.run(launch())
    value, took_s = asyncio.run(ask())
    assert value == 1
    assert took_s < 30, "it waited for whoever had exited"
    assert [each.method for each in fleet.outcomes(rig.engine)] == ["init", "times_init_ran"]


class Manager:
    """An embedder that is an asyncio actor itself."""

    async def bring_up(self, handles):
        self.monitor = enginefsm.EngineMonitor(policy=RetryPolicy(cap_s=1))
        engines = [self.monitor.adopt(handle, name=f"{n}") for n, handle in enumerate(handles)]
        values = await asyncio.gather(*(engine.init.remote(value=n) for n, engine in enumerate(engines)))
        kind = type(asyncio.get_running_loop()).__module__
        return values, kind, [(str(engine.fsm.state), engine.fsm.reason.value) for engine in engines]


def test_a_manager_that_is_an_asyncio_actor_awaits_its_engines_through_cuts(fleet, plain_loop):
    rigs = [fleet.launch(cls) for cls in (Engine, AsyncEngine)]
    manager = ray.remote(Manager).options(num_cpus=0).remote()
    bringing_up = manager.bring_up.remote([rig.engine.handle for rig in rigs])
    manager_pid = ray.get(manager.__ray_call__.remote(lambda _: __import__("os").getpid()))
    for rig in rigs:
        rig.wait_for("begun")
        wait_until(lambda pid=rig.pid: chaos.cut(pid, manager_pid), what="a connection to cut")
    time_of_break = time.monotonic()
    wait_until(lambda: time.monotonic() > time_of_break + 2.5, what="Ray's report of the break")
    for rig in rigs:
        rig.open()
    assert ray.get(bringing_up, timeout=60) == ([0, 1], "uvloop", [("ready", "recovered")] * 2)
    assert [rig.times_init_began() for rig in rigs] == [1, 1]
    ray.kill(manager)


# --- asyncio actors as engines ---


@pytest.fixture
def ready(fleet):
    rig = fleet.launch(AsyncEngine)
    rig.open()
    fleet.monitor.get(rig.engine.init.remote())
    return rig


def test_methods_run_where_ray_would_run_them_and_give_what_they_gave(fleet, ready):
    engine, bare = ready.engine, ready.engine.handle
    for method in ("thread", "thread_of_a_coroutine"):
        ours, rays = getattr(engine, method).remote(), getattr(bare, method).remote()
        assert fleet.monitor.get(ours) == ray.get(rays)
    ref = ray.put(7)
    assert fleet.monitor.get(engine.reference.remote([ref])) == ref
    assert ray.get(list(engine.count_to.remote(3))) == [0, 1, 2]
    assert ray.get(engine.pair.remote()) == [1, 2]
    assert fleet.monitor.get(engine.echo.remote(ref, header=1)) == ((7,), {"header": 1})
    with pytest.raises(ValueError, match=r"ray::AsyncEngine\.fail\(\)"):
        fleet.monitor.get(engine.fail.remote("text"))


def test_methods_run_beside_one_another_and_a_cancelled_one_ends_though_it_was_re_awaited(fleet, ready, plain_loop):
    held = ready.engine.hold.remote()
    holding = plain_loop.start(held)
    ready.wait_for("held")
    assert plain_loop.run(ready.engine.times_init_ran.remote()) == 1
    ready.cut()
    wait_until(lambda: fleet.monitor.get(ready.engine.waiting_again.remote()) == 1, what="the resubmission's arrival")
    ray.cancel(held.ref)
    assert isinstance(holding.exception(30), TaskCancelledError)
    ready.wait_for("cancelled")
    assert ready.engine.fsm.state is READY


def test_an_exception_that_a_background_loop_passed_on_does_not_end_the_loop(fleet, ready):
    with pytest.raises(ValueError, match="passed on"):
        fleet.monitor.get(ready.engine.fail_as_a_loop_that_goes_on.remote())
    assert fleet.monitor.get(ready.engine.beats_on.remote()) is True


def test_concurrency_groups_and_limits_hold(fleet, plain_loop):
    rig = fleet.launch(GroupedAsync, concurrency_groups={"health": 1}, max_concurrency=1)
    launch = plain_loop.start(rig.engine.init.remote())
    rig.wait_for("begun")
    behind = rig.engine.times_init_ran.remote()
    assert plain_loop.run(rig.engine.health.remote()) == ray.get(rig.engine.handle.health.remote())
    with pytest.raises(GetTimeoutError):
        fleet.monitor.get(behind, timeout=0.5)
    rig.open()
    assert launch.result(60) == "launched"
    assert fleet.monitor.get(behind) == 1


def test_an_asyncio_engine_needs_no_enginefsm_and_keeps_its_names(fleet, plain_loop):
    rig = fleet.launch(AsyncWithoutEnginefsm)
    launch = plain_loop.start(rig.engine.init.remote())
    rig.wait_for("begun")
    rig.cut()
    fleet.wait_for_state(rig.engine, UNAVAILABLE)
    rig.open()
    assert launch.result(60) == "launched"
    assert fleet.monitor.get(rig.engine.can_import_enginefsm.remote()) is False
    assert "Actor(AsyncWithoutEnginefsm" in repr(rig.engine.handle)


def test_a_monitored_class_is_named_as_the_class_is_and_that_one_is_left_alone():
    made = enginefsm.monitored(AsyncEngine)
    assert made is not AsyncEngine
    assert issubclass(made, AsyncEngine)
    for name in ("__name__", "__qualname__", "__module__", "__doc__"):
        assert getattr(made, name) == getattr(AsyncEngine, name)
    assert enginefsm.monitored(made) is made
    assert vars(AsyncEngine).keys() >= {"init"}
    assert not any(name.startswith("__enginefsm") for name in dir(AsyncEngine))


def test_a_class_without_coroutines_is_given_back_and_what_is_no_class_is_refused():
    assert enginefsm.monitored(Engine) is Engine
    for wrong in (ray.remote(Asyncio), Asyncio(), None):
        with pytest.raises(TypeError, match=r"ray\.remote\(enginefsm\.monitored\(cls\)\)"):
            enginefsm.monitored(wrong)


class Broker:
    """Hands out engines that it made."""

    def make(self, cls, directory):
        return ray.remote(cls).options(num_cpus=0, name="by name").remote(directory)

    def give(self, handle):
        return handle


def test_asyncio_engines_are_told_by_their_handle_however_it_came(fleet, tmp_path, plain_loop):
    broker = ray.remote(Broker).options(num_cpus=0).remote()
    made = ray.get(broker.make.remote(enginefsm.monitored(AsyncEngine), str(tmp_path)))
    (tmp_path / "gate").touch()
    for number, handle in enumerate([made, ray.get_actor("by name"), pickle.loads(cloudpickle.dumps(made))]):
        monitor = enginefsm.EngineMonitor(run=str(number))
        engine = monitor.adopt(handle, name="one", launch="times_init_ran")
        assert plain_loop.run(engine.init.remote(value=number)) == number
    plain = ray.remote(AsyncEngine).options(num_cpus=0).remote(str(tmp_path))
    with pytest.raises(TypeError, match=r"enginefsm\.monitored"):
        enginefsm.EngineMonitor().adopt(ray.get(broker.give.remote(plain)), name="two")
    for actor in (made, plain, broker):
        ray.kill(actor)


def test_an_engine_that_its_constructor_makes_ready_launches_by_ray_s_own_method(fleet, plain_loop):
    class Served(Engine):
        pass

    rig = fleet.launch(Served, adopt={"launch": "__ray_ready__"})
    assert plain_loop.run(rig.engine.__ray_ready__.remote()) is True
    assert rig.engine.fsm.state is READY
    asynchronous = fleet.launch(AsyncEngine, adopt={"launch": "__ray_ready__"})
    assert fleet.monitor.get(asynchronous.engine.__ray_ready__.remote()) is True
    for ask in (lambda engine: engine.times_init_ran.remote(), lambda engine: engine.handle.fail.remote("no")):
        asked = fleet.launch(Served, adopt={"launch": "__ray_ready__"})
        with contextlib.suppress(ValueError):
            fleet.monitor.get(ask(asked.engine))
        assert asked.engine.fsm.state is READY
    doomed = enginefsm.EngineMonitor()
    engine = doomed.adopt(ray.remote(Doomed).options(num_cpus=0).remote(), name="doomed", launch="__ray_ready__")
    with pytest.raises(ray.exceptions.ActorDiedError, match="no such GPU"):
        plain_loop.run(engine.__ray_ready__.remote())
    assert (engine.fsm.state, engine.fsm.reason) == (DEAD, enginefsm.Reason.CONSTRUCTOR_FAILED)


def test_who_awaits_when_ray_is_shut_down_is_told_so(clusters, tmp_path, plain_loop):
    clusters.use()
    monitor = enginefsm.EngineMonitor()
    engine = monitor.adopt(ray.remote(Engine).options(num_cpus=0).remote(str(tmp_path)), name="one")
    waiting = plain_loop.start(engine.init.remote())
    wait_until((tmp_path / "begun").exists)
    clusters.close()
    # The actor's death, which comes first, may be heard still.
    told = (ray.exceptions.RaySystemError, ray.exceptions.ActorDiedError)
    with pytest.raises(told, match=r"Ray was shut down while init\(\) of 'one' was out|init\(\) of engine 'one'"):
        waiting.result(30)
    assert not ray.is_initialized()


def test_after_ray_is_shut_down_the_next_engine_has_a_monitor_anew_though_nothing_is_exported(clusters):
    clusters.close()
    before = enginefsm.configure(run="anew", export=[])
    enginefsm.adopt(bare_handle(), name="one")
    ray.shutdown()
    assert before.closed
    enginefsm.adopt(bare_handle(), name="one")
    assert enginefsm.default_monitor() is not before
    enginefsm.default_monitor().close()
    assert enginefsm.configure(export=[]).engines() == []


def test_a_monitor_that_nobody_holds_is_not_kept_for_the_end():
    monitor = enginefsm.EngineMonitor()
    monitor.adopt(bare_handle(), name="one")
    held = weakref.ref(monitor)
    del monitor
    gc.collect()
    assert held() is None
