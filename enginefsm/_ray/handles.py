"""Actor handles and their methods, read beyond Ray's public surface."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from ray import ObjectRef
from ray.actor import ActorHandle, ActorMethod, _ActorClassMethodMetadata

CARRIER = "__enginefsm_call__"
"""The method of asyncio actors by which remembered calls travel."""


def actor_id(handle: ActorHandle[Any]) -> str:
    """Return the id of the handle's actor, in hex, as in `RayActorError.actor_id`."""
    return str(handle._ray_actor_id.hex())


def actor_id_of(ref: ObjectRef[Any]) -> str | None:
    """Return the id (hex) of the actor whose method gives `ref`, or None if a task or `ray.put` gives it."""
    owner = ref.task_id().actor_id()
    return None if owner.is_nil() else str(owner.hex())


def class_name(handle: ActorHandle[Any]) -> str:
    """Return the name of the actor's class, as Ray's dashboard shows it."""
    return str(handle._ray_actor_creation_function_descriptor.class_name)


def is_cross_language(handle: ActorHandle[Any]) -> bool:
    """Return whether the actor is written in another language than Python."""
    return bool(handle._ray_is_cross_language)


def methods(handle: ActorHandle[Any]) -> Mapping[str, Any]:
    """Return the functions of the actor's class, by method name."""
    metadata = _ActorClassMethodMetadata._cache.get(handle._ray_actor_creation_function_descriptor)
    return {} if metadata is None else metadata.methods


def concurrency_group(handle: ActorHandle[Any], method: str) -> str | None:
    """Return the concurrency group that the class gives a method."""
    return getattr(methods(handle).get(method), "__ray_concurrency_group__", None)


def is_asyncio(handle: ActorHandle[Any]) -> bool:
    """Return whether Ray runs the actor on an event loop: it does if any method is a coroutine function."""
    return any(is_coroutine_method(method) for method in methods(handle).values())


def is_coroutine_method(method: object) -> bool:
    """Return whether Ray runs an actor that has this method on an event loop."""
    return inspect.iscoroutinefunction(method) or inspect.isasyncgenfunction(method)


def is_monitored(handle: ActorHandle[Any]) -> bool:
    """Return whether the actor is an asyncio actor that takes remembered calls."""
    return CARRIER in methods(handle)


def is_plain(method: ActorMethod, options: Mapping[str, Any]) -> bool:
    """Return whether a call of the method gives one reference to one value, and Ray wraps nothing around it."""
    return (
        options.get("num_returns", method._num_returns) == 1
        and not method._is_generator
        and method._decorator is None
        and _is_object_store(options.get("tensor_transport", getattr(method, "_tensor_transport", None)))
    )


def _is_object_store(transport: Any) -> bool:
    """Return whether a tensor transport is Ray's default, by which values travel through the object store.

    Ray up to 2.47 has no tensor transports. The default is an enum's member in 2.48 to 2.52, its name in 2.53, and None
    since 2.54. `.options` takes the name in any case.
    """
    return transport is None or str(getattr(transport, "name", transport)).upper() == "OBJECT_STORE"


def method_name(method: ActorMethod) -> str:
    """Return the method's name."""
    return str(method._method_name)


def signature(method: ActorMethod) -> inspect.Signature | None:
    """Return the method's signature without `self`, or None if Ray does not know it."""
    parameters = method._signature
    if parameters is None:
        return None
    # Ray keeps one list of parameters for each class and method. It is kept here too, so that nothing else gets its id.
    if id(parameters) not in _signatures:
        _signatures[id(parameters)] = (parameters, inspect.Signature(parameters))
    return _signatures[id(parameters)][1]


_signatures: dict[int, tuple[list[inspect.Parameter], inspect.Signature]] = {}


def max_task_retries(handle: ActorHandle[Any]) -> int:
    """Return how often Ray itself repeats a method of the actor that was cut off. -1 means without a bound."""
    retries = [handle._ray_max_task_retries, *handle._ray_method_max_task_retries.values()]
    return -1 if -1 in retries else max(each or 0 for each in retries)
