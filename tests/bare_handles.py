"""Actor handles without a cluster: real ones of actors that do not exist, for what never calls them."""

from __future__ import annotations

from ray._raylet import ActorID, Language, PythonFunctionDescriptor
from ray.actor import ActorHandle


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
