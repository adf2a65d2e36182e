"""An adopted engine is used as its handle is: arguments, options, pickling. On a real Ray."""

from __future__ import annotations

import pickle

import pytest
import ray
from ray import cloudpickle
from support.engines import Asyncio, Doomed, Grouped

import enginefsm


@pytest.fixture
def engine(fleet):
    rig = fleet.launch()
    rig.open()
    fleet.monitor.get(rig.engine.init.remote())
    return rig.engine


def test_references_at_the_top_level_are_resolved_and_nested_ones_are_not(fleet, engine):
    ref = ray.put("value")
    args, kwargs = fleet.monitor.get(engine.echo.remote(ref, [ref], key=ref))
    assert (args[0], kwargs["key"]) == ("value", "value")
    assert isinstance(args[1][0], ray.ObjectRef)


def test_no_keyword_of_a_method_meets_one_of_the_carrier_s(fleet, engine):
    names = ("fn", "code", "header", "actor", "caller", "number")
    assert fleet.monitor.get(engine.mapping.remote(**{name: name for name in names})) == list(names)


def test_an_unknown_method_is_an_attribute_error_where_it_is_named(engine):
    with pytest.raises(AttributeError, match="innit"):
        engine.innit  # noqa: B018


def test_arguments_that_do_not_fit_are_refused_where_the_call_is_made(engine):
    with pytest.raises(TypeError, match=r"Engine\.fail"):
        engine.fail.remote()


def test_several_returns_and_generators_are_plain_references(engine):
    assert ray.get(engine.pair.remote()) == [1, 2]
    assert ray.get(list(engine.count_to.remote(3))) == [0, 1, 2]
    assert ray.get(engine.echo.options(num_returns=2).remote(1, b=2)) == [(1,), {"b": 2}]


def test_a_call_is_titled_with_the_method_s_name(fleet, engine):
    with pytest.raises(ValueError, match=r"ray::Engine\.fail\(\)"):
        fleet.monitor.get(engine.fail.remote("text"))
    with pytest.raises(ValueError, match=r"ray::by-another-name\(\)"):
        fleet.monitor.get(engine.fail.options(name="by-another-name").remote("text"))


def test_a_method_runs_in_its_own_concurrency_group(fleet):
    rig = fleet.launch(Grouped, concurrency_groups={"health": 1})
    launch = fleet.in_background(rig.engine.init.remote())
    rig.wait_for("begun")
    assert fleet.monitor.get(rig.engine.health.remote(), timeout=30) == "well"
    rig.open()
    launch.result(60)


def test_arguments_are_those_of_the_moment_of_the_call(fleet):
    rig = fleet.launch()
    holding = rig.engine.handle.hold.remote()
    rig.wait_for("held")
    settings = {"port": 30000}
    launch = fleet.in_background(rig.engine.init.remote(value=settings))
    settings["port"] = 30001
    rig.cut_until(lambda: rig.engine.fsm.state is enginefsm.EngineState.UNAVAILABLE)
    rig.open("let_go")
    rig.open()
    assert launch.result(60) == {"port": 30000}
    del holding


def test_an_engine_reaches_another_actor_as_its_plain_handle(fleet, engine):
    other = fleet.launch().engine
    assert fleet.monitor.get(other.kind_of.remote(engine)) == "ActorHandle"
    assert ray.get(other.handle.kind_of.remote(engine)) == "ActorHandle"
    assert fleet.monitor.get(other.ask.remote(engine)) == 1
    assert b"enginefsm" not in cloudpickle.dumps(engine).replace(b"enginefsm/tests", b"")


def test_an_engine_equals_its_handle_and_says_what_it_is(fleet, engine):
    again = pickle.loads(cloudpickle.dumps(engine))
    assert engine == engine.handle == again
    assert hash(engine) == hash(engine.handle)
    assert engine != fleet.launch().engine
    assert repr(engine).startswith("Engine('engine-0', ready, Actor(Engine")
    assert "init" in dir(engine)


def test_a_call_cannot_be_sent_elsewhere_and_says_what_to_send(engine):
    with pytest.raises(TypeError, match=r"call\.ref"):
        cloudpickle.dumps(engine.times_init_ran.remote())


def test_a_method_is_not_called_without_remote(engine):
    with pytest.raises(TypeError, match=r"init\.remote"):
        engine.init()


def test_calls_and_references_are_awaited_alone_and_mixed(fleet, engine):
    calls = [engine.echo.remote(1), engine.handle.echo.remote(2), engine.echo.remote(3)]
    assert [args for args, _ in fleet.monitor.get(calls)] == [(1,), (2,), (3,)]
    assert fleet.monitor.get(calls[1]) == ((2,), {})
    assert fleet.monitor.get([calls[0], calls[0].ref]) == [((1,), {})] * 2
    assert fleet.monitor.get([]) == []


def test_adopting_an_adopted_handle_gives_the_same_engine(fleet, engine):
    assert fleet.monitor.adopt(engine.handle, name=engine.fsm.name) is engine


def test_a_released_name_and_actor_can_be_adopted_again(fleet, engine):
    fleet.monitor.release(engine)
    fleet.monitor.release(engine)
    assert fleet.monitor.engines() == []
    again = fleet.monitor.adopt(engine.handle, name=engine.fsm.name, launch="times_init_ran")
    assert again.fsm.incarnation == 2
    assert fleet.monitor.get(again.times_init_ran.remote()) == 1
    assert again.fsm.state is enginefsm.EngineState.READY


def refusals(fleet, engine):
    monitor, handle = fleet.monitor, engine.handle
    other = ray.remote(Doomed).options(num_cpus=0)
    foreign = other.remote()  # kept in a name: up to Ray 2.47 a method does not keep its handle
    ray_task = ray.remote(num_cpus=0)(lambda: 1)
    return {
        "has no method 'start'.*it has: .*init": lambda: monitor.adopt(other.remote(), name="x", launch="start"),
        "has no method 'alive' to be its launched_if": lambda: monitor.adopt(
            other.remote(), name="x", launched_if="alive"
        ),
        "takes the handle that": lambda: monitor.adopt(Doomed, name="x"),
        "is adopted already": lambda: monitor.adopt(engine, name="x"),
        "adopted as 'engine-0'": lambda: monitor.adopt(handle, name="x"),
        "living engine 'engine-0'.*release": lambda: monitor.adopt(other.remote(), name="engine-0"),
        "not empty": lambda: monitor.adopt(other.remote(), name=""),
        "cannot be given: state": lambda: monitor.adopt(other.remote(), name="x", state="ready"),
        r"enginefsm\.monitored": lambda: monitor.adopt(ray.remote(Asyncio).options(num_cpus=0).remote(), name="x"),
        "not of an engine.*ray.get": lambda: monitor.get([engine.times_init_ran.remote(), ray_task.remote()]),
        "not of an engine.* adopt": lambda: monitor.get(foreign.init.remote()),
        "takes calls and ObjectRefs, not int": lambda: monitor.get([1]),
        "budget_s must be": lambda: enginefsm.RetryPolicy(budget_s=-1),
    }


def test_bad_input_is_refused_with_what_to_do_and_changes_nothing(fleet, engine):
    events = len(fleet.events)
    for message, act in refusals(fleet, engine).items():
        with pytest.raises((TypeError, ValueError), match=message):
            act()
    assert fleet.monitor.engines() == [engine]
    assert len(fleet.events) == events


def test_configure_comes_before_the_first_engine(engine):
    enginefsm.configure(run="glm", policy=enginefsm.RetryPolicy(budget_s=1))
    adopted = enginefsm.adopt(engine.handle, name="one")
    assert enginefsm.get(adopted.times_init_ran.remote()) == 1
    with pytest.raises(RuntimeError, match="before the first adopt"):
        enginefsm.configure(run="other")
    enginefsm.release(adopted)
    enginefsm.configure()


def test_two_monitors_of_one_actor_do_not_meet(fleet, engine):
    monitors = [enginefsm.EngineMonitor(run=str(number)) for number in range(2)]
    engines = [monitor.adopt(engine.handle, name="same") for monitor in monitors]
    calls = [[each.echo.remote(number) for number in range(20)] for each in engines]
    for monitor, mine in zip(monitors, calls, strict=True):
        assert monitor.get(mine) == [((number,), {}) for number in range(20)]
