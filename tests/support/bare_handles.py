"""Actor handles without a cluster: real ones of actors that do not exist, for what never calls them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from ray._raylet import ActorID, Language, PythonFunctionDescriptor
from ray.actor import ActorHandle

from enginefsm._calls.calls import Ledger


def bare_handle(*methods: str) -> ActorHandle:
    """A handle of an actor with `methods` (`init`, if none are named) that take nothing."""
    methods = methods or ("init",)
    return ActorHandle(
        language=Language.PYTHON,
        actor_id=ActorID.from_random(),
        max_task_retries=0,
        enable_task_events=False,
        method_is_generator={},
        method_decorators={},
        method_signatures={method: [] for method in methods},
        method_num_returns={},
        method_max_task_retries={},
        method_retry_exceptions={},
        method_generator_backpressure_num_objects={},
        method_num_objects_per_yield={},
        method_enable_task_events={},
        enable_tensor_transport=False,
        method_name_to_tensor_transport={},
        actor_method_cpus=0,
        actor_creation_function_descriptor=PythonFunctionDescriptor("tests", methods[0], "BareEngine"),
        cluster_and_job=None,
        weak_ref=True,
    )


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
