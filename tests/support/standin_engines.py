"""Engines without Ray, many of them: the library's own calls and waits, on references that a test completes by hand."""

from __future__ import annotations

import itertools
import threading
from concurrent.futures import Future

from ray.exceptions import ActorUnavailableError

from enginefsm._calls.arguments import Arguments
from enginefsm._calls.calls import Call
from enginefsm._engine.proxy import managed
from support.bare_handles import bare_handle


class Reference:
    """As much of an ObjectRef as a wait on an event loop uses."""

    numbers = itertools.count()

    def __init__(self):
        self.number = next(self.numbers)
        self.completion = Future()

    def __eq__(self, other):
        return self.number == other.number

    def __hash__(self):
        return self.number

    def future(self):
        return self.completion


class Handle:
    """As much of a handle as a call uses; `out` has the references of its submissions."""

    def __init__(self):
        real = bare_handle()
        self._ray_actor_id = real._ray_actor_id
        self.real = real
        self.out = []

    @property
    def __ray_call__(self):
        return self

    def options(self, **_):
        return self

    def remote(self, *_):
        self.out.append(Reference())
        return self.out[-1]

    def answer(self, value):
        self.out[-1].completion.set_result(value)

    def lose(self):
        error = ActorUnavailableError("the connection broke", self._ray_actor_id.binary())
        self.out[-1].completion.set_exception(error)


def adopt(monitor, names):
    """Engines of these names, each with a stand-in for its handle."""
    handles = [Handle() for _ in names]
    reals = [handle.real for handle in handles]  # made beforehand: that is not what adopting costs

    def act():
        engines = [monitor.adopt(real, name=name, model="m") for real, name in zip(reals, names, strict=True)]
        for engine, handle in zip(engines, handles, strict=True):
            managed(engine).handle = engine.handle = handle
        return engines

    return act, handles


def call(engine):
    """A call of its launch method."""
    return Call(managed(engine), "init", Arguments((), {}), {})


def in_a_thread(act):
    """As Ray tells of outcomes."""
    thread = threading.Thread(target=act)
    thread.start()
    return thread
