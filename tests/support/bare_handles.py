"""Actor handles without a cluster: real ones of actors that do not exist, for what never calls them."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

from ray._raylet import ActorID, Language, PythonFunctionDescriptor
from ray.actor import ActorHandle

from enginefsm._calls.arguments import Arguments
from enginefsm._calls.calls import Call
from enginefsm._calls.ledger import Ledger


def bare_handle(*methods: str) -> ActorHandle:
    """Return a handle of an actor with `methods` (`init`, if none are named) that take nothing, and Ray's own."""
    methods = (*(methods or ("init",)), "__ray_ready__", "__ray_call__")
    by_name = {
        "language": Language.PYTHON,
        "actor_id": ActorID.from_random(),
        "max_task_retries": 0,
        "method_signatures": {method: [] for method in methods},
        "method_num_returns": dict.fromkeys(methods, 1),
        "method_is_generator": dict.fromkeys(methods, False),
        "actor_method_cpus": 0,
        "actor_creation_function_descriptor": PythonFunctionDescriptor("tests", methods[0], "BareEngine"),
        "cluster_and_job": None,
        "weak_ref": True,
    }
    # Each Ray version asks for more than that: dicts by method, which may be empty, and switches.
    for name, parameter in inspect.signature(ActorHandle).parameters.items():
        if name not in by_name and parameter.default is inspect.Parameter.empty:
            by_name[name] = {} if name.startswith("method_") else False
    return ActorHandle(**by_name)


class RecordingHandle:
    """Stands where a handle's `__ray_call__` is: keeps what is submitted instead of sending it."""

    def __init__(self) -> None:
        self.submitted: list[tuple[Any, ...]] = []
        """The carrier of each submission, and the values after it."""
        self.options_given: list[dict[str, Any]] = []

    @property
    def __ray_call__(self) -> RecordingHandle:
        return self

    def options(self, **options: Any) -> RecordingHandle:
        self.options_given.append(options)
        return self

    def remote(self, carrier: Any, *values: Any) -> object:
        self.submitted.append((carrier, *values))
        return object()  # as good as a reference, to what never looks into it


def recording_engine() -> SimpleNamespace:
    """As much of an engine as a `Call` sees, with a `RecordingHandle`."""
    return SimpleNamespace(
        name="e", launch="init", awaiter=None, on_loop=False, ledger=Ledger(), handle=RecordingHandle()
    )


def make_call(engine, method="init", *args, **kwargs):
    return Call(engine, method, Arguments(args, kwargs), {"name": f"SGLangEngine.{method}"})


def sent(engine):
    """(code, header, values) of each submission."""
    return [(*carrier.args, values) for carrier, *values in engine.handle.submitted]
