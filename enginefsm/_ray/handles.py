"""What is read of Ray's handles beyond their public surface. All of it stands here, to be looked at with a new Ray."""

from __future__ import annotations

import asyncio
import inspect
import tempfile
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import ray
from ray import ObjectRef
from ray.actor import ActorHandle, ActorMethod, _ActorClassMethodMetadata
from ray.core.generated.gcs_pb2 import ActorTableData  # type: ignore[attr-defined]  # made by protoc
from ray.exceptions import RayError

CARRIER = "__enginefsm_call__"
"""The method of asyncio actors by which remembered calls travel."""


def temp_dir() -> str:
    """The directory under which Ray keeps its sessions on this node, its own Prometheus targets among them."""
    node = ray._private.worker._global_node
    return tempfile.gettempdir() if node is None else str(node.get_temp_dir_path())


def session() -> object:
    """What stays the same until Ray is shut down, and is another when it is started again; None without Ray."""
    return ray._private.worker._global_node


def actor_instance() -> Any | None:
    """The actor in whose process this is; None elsewhere."""
    return next(iter(ray._private.worker.global_worker.actors.values()), None)


def ended_jobs() -> dict[str, float]:
    """The jobs of the cluster whose drivers are gone, by id, with the time of that in seconds since the epoch."""
    return {job["JobID"]: job["EndTime"] / 1000 for job in ray._private.state.jobs() if job["IsDead"]}


class Creation(NamedTuple):
    """How far the creation of an actor is."""

    state: str
    """As in Ray's `ActorTableData`: `DEPENDENCIES_UNREADY`, `PENDING_CREATION`, `ALIVE`."""
    has_worker: bool
    node_id: str | None
    """The id of its node, in hex; None while it has none."""


def creations(handles: Iterable[ActorHandle[Any]], timeout_s: float) -> dict[str, Creation] | None:
    """Return how far the creation of actors is, by actor id (hex), for the living actors of the jobs of `handles`.

    Returns None if the GCS has not answered within `timeout_s` seconds, or if Ray has no way to ask it. Call it on a
    thread without an event loop.
    """
    client = getattr(ray._private.worker.global_worker, "gcs_client", None)  # none before ray.init, and after shutdown
    # Of Ray's ways to the GCS this is the one that keeps a timeout: ray._private.state waits for ever.
    get_actors = getattr(client, "async_get_all_actor_info", None)
    if get_actors is None:
        return None
    jobs = {handle._ray_actor_id.job_id for handle in handles}
    # By state, for the GCS keeps the dead as well, up to 100,000 of them. An actor that moves on meanwhile is found in
    # the later state, or not at all.
    wanted = [(job, state) for job in jobs for state in ("DEPENDENCIES_UNREADY", "PENDING_CREATION", "ALIVE")]

    async def ask() -> list[Mapping[Any, ActorTableData]]:
        answers = (get_actors(job_id=job, actor_state_name=state, timeout=timeout_s) for job, state in wanted)
        return list(await asyncio.gather(*answers))

    loop = asyncio.new_event_loop()
    try:
        answers = loop.run_until_complete(ask())
    except RayError:
        return None
    finally:
        loop.close()
    return {
        actor.hex(): Creation(
            ActorTableData.ActorState.Name(about.state), bool(about.pid), about.node_id.hex() if about.node_id else None
        )
        for answer in answers
        for actor, about in answer.items()
    }


def actor_id(handle: ActorHandle[Any]) -> str:
    """The id of the handle's actor, in hex, as `RayActorError.actor_id` has it."""
    return str(handle._ray_actor_id.hex())


def actor_id_of(ref: ObjectRef[Any]) -> str | None:
    """The id of the actor whose method gives `ref`, in hex; None when it is of a task or of `ray.put`."""
    owner = ref.task_id().actor_id()
    return None if owner.is_nil() else str(owner.hex())


def class_name(handle: ActorHandle[Any]) -> str:
    """The name of the actor's class, as Ray's dashboard shows it."""
    return str(handle._ray_actor_creation_function_descriptor.class_name)


def is_cross_language(handle: ActorHandle[Any]) -> bool:
    """Whether the actor is not a Python one."""
    return bool(handle._ray_is_cross_language)


def methods(handle: ActorHandle[Any]) -> Mapping[str, Any]:
    """The actor's methods by name: the functions of its class."""
    metadata = _ActorClassMethodMetadata._cache.get(handle._ray_actor_creation_function_descriptor)
    return {} if metadata is None else metadata.methods


def concurrency_group(handle: ActorHandle[Any], method: str) -> str | None:
    """The concurrency group that the class gives a method."""
    return getattr(methods(handle).get(method), "__ray_concurrency_group__", None)


def is_asyncio(handle: ActorHandle[Any]) -> bool:
    """Whether Ray runs the actor on an event loop: it does when any method is a coroutine function."""
    return any(is_coroutine_method(method) for method in methods(handle).values())


def is_coroutine_method(method: object) -> bool:
    """Whether Ray runs an actor that has this method on an event loop."""
    return inspect.iscoroutinefunction(method) or inspect.isasyncgenfunction(method)


def is_monitored(handle: ActorHandle[Any]) -> bool:
    """Whether the actor is an asyncio actor that can be sent remembered calls."""
    return CARRIER in methods(handle)


def is_plain(method: ActorMethod, options: Mapping[str, Any]) -> bool:
    """Whether a call of the method gives one reference to one value, with nothing of Ray's own wrapped around it."""
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
    """The method's name."""
    return str(method._method_name)


def signature(method: ActorMethod) -> inspect.Signature | None:
    """The method's signature without `self`."""
    parameters = method._signature
    if parameters is None:
        return None
    # Ray keeps one list of parameters a class and method; kept here with its signature, so that its id stays its own.
    if id(parameters) not in _signatures:
        _signatures[id(parameters)] = (parameters, inspect.Signature(parameters))
    return _signatures[id(parameters)][1]


_signatures: dict[int, tuple[list[inspect.Parameter], inspect.Signature]] = {}
