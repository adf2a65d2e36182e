"""A plain ObjectRef of an adopted actor, made on the handle."""

from __future__ import annotations

import math
from typing import Any

import ray
from ray import ObjectRef

from enginefsm._calls.calls import Awaited, Call, Callee, EngineMethod


class PlainRef(Awaited):
    """A plain ObjectRef of an adopted actor. If it fails, it stays failed.

    If it is the engine's launch and the engine has a `launched_if`, the wait then submits that check instead, until it
    says that the launch succeeded.
    """

    __slots__ = ("_check", "_given", "_value", "lost")

    def __init__(self, engine: Callee, ref: ObjectRef[Any]) -> None:
        # Ray does not tell which method a reference is of. While an engine launches, and its launch was not called
        # through the engine itself, a plain reference is taken for the launch.
        launches = engine.is_launching and not engine.launch_called
        super().__init__(engine, engine.launch if launches else "(reference)", launches=launches)
        # A reference that is complete already may be old. It says nothing of an outage that goes on.
        is_old = bool(ray.wait([ref], timeout=0)[0])
        self.submitted_at = -math.inf if is_old else self.made_at
        self.ref = self.out = ref
        self.lost = False
        """Whether the reference itself has failed. From then on the wait waits for checks, if there are any."""
        self._given = ref
        self._check: Call | None = None
        self._value: list[Any] = []

    @property
    def is_probe(self) -> bool:
        """Whether the submission that is out is a check."""
        return self._check is not None

    @property
    def given(self) -> str:
        """The id of the reference itself."""
        return str(self._given.hex())

    @property
    def can_be_probed(self) -> bool:
        """Whether there is a check that says if the launch succeeded."""
        return self.launches and self.engine.launched_if is not None

    @property
    def recovered(self) -> list[Any]:
        """The value that a check gave in place of the lost one: one value, or none yet."""
        return self._value

    def recover(self, value: Any) -> None:
        """Keep the value of the check that said that the launch succeeded."""
        self._value = [value]

    def settle(self, *, answered: bool) -> None:
        """Note that its outcome has arrived, from the actor (`answered`) or from Ray."""
        if self._check is not None:
            self._check.settle(answered=answered)

    def _submit(self) -> None:
        engine, ask = self.engine, self.engine.launched_if
        by_name, args = (ask, ()) if isinstance(ask, str) else ("__ray_call__", (ask,))
        self._check = EngineMethod(engine, getattr(engine.handle, by_name), {}).remote(*args)
        self.ref = self._check.ref
