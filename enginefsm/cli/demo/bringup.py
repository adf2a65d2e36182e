"""The job: it launches engines side by side and awaits them. It replaces an engine that died once, and waits on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ray.actor import ActorHandle
from ray.exceptions import ActorDiedError, RayError

from enginefsm import Call, Engine, EngineMonitor, EngineState
from enginefsm.cli.demo.board import Board
from enginefsm.cli.demo.faults import Injector
from enginefsm.cli.demo.plan import EnginePlan
from enginefsm.cli.demo.view import View

_PROMPT = "Is the engine up?"
_SAMPLING = {"max_new_tokens": 8, "temperature": 0}


class Bringup:
    """One bringup of the planned engines."""

    def __init__(
        self,
        monitor: EngineMonitor,
        model: str,
        start_actor: Callable[[EnginePlan], ActorHandle[Any]],
        injector: Injector,
        board: Board,
        view: View,
    ) -> None:
        self._monitor = monitor
        self._model = model
        self._start_actor = start_actor
        self._injector = injector
        self._board = board
        self._view = view
        self._plans: dict[str, EnginePlan] = {}
        self._engines: dict[str, Engine] = {}
        self._calls: dict[str, Call] = {}

    def run(self, plans: Sequence[EnginePlan]) -> bool:
        """Bring the engines up. Return whether they are up. A failure that the demo did not cause ends the bringup."""
        self._plans = {plan.name: plan for plan in plans}
        try:
            self._launch(plans)
        except RayError as error:
            self._view.failure(error)
            return False
        while True:
            try:
                self._wait()
            except RayError as error:
                self._view.failure(error)
                if not self._replaced_killed(error):
                    return False
            else:
                return True

    def _launch(self, plans: Sequence[EnginePlan]) -> None:
        for plan in plans:
            self._adopt(plan)
        pids = self._monitor.get([engine.pid.remote() for engine in self._engines.values()])
        for plan, pid in zip(plans, pids, strict=True):
            engine = self._engines[plan.name]
            self._calls[plan.name] = engine.init.remote()
            self._injector.begin(engine, pid, plan.faults)

    def _adopt(self, plan: EnginePlan) -> Engine:
        engine = self._monitor.adopt(self._start_actor(plan), name=plan.name, model=self._model, worker_type="regular")
        self._engines[plan.name] = engine
        return engine

    def _wait(self) -> None:
        self._monitor.get(list(self._calls.values()))
        self._injector.join()
        # A late fault may hit an engine that is up already. These calls notice it, and recover as well.
        engines = list(self._engines.values())
        self._monitor.get([engine.generate.remote(_PROMPT, _SAMPLING) for engine in engines])
        inits = self._monitor.get([engine.times_init_ran.remote() for engine in engines])
        for engine, times in zip(engines, inits, strict=True):
            self._board.life(engine.fsm.name, engine.fsm.incarnation).inits = times

    def _replaced_killed(self, error: RayError) -> bool:
        """Replace the engine that the demo killed, if its call failed. Await the other calls as they are."""
        dead = [engine for engine in self._monitor.engines() if engine.fsm.state is EngineState.DEAD]
        killed = [engine for engine in dead if self._board.life(engine.fsm.name, engine.fsm.incarnation).was_killed]
        if not isinstance(error, ActorDiedError) or not dead or dead != killed:
            return False
        for engine in dead:
            self._monitor.release(engine)
            successor = self._adopt(self._plans[engine.fsm.name])
            self._calls[engine.fsm.name] = successor.init.remote()
            self._view.note(f"{engine.fsm.name} is replaced by a new actor; the other engines are awaited on")
        return True
