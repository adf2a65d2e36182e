"""Questions to Ray's control plane, the GCS: the head node, how far actors are, which jobs and actors have ended."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import ray
from ray.actor import ActorHandle
from ray.core.generated.common_pb2 import ActorDiedErrorContext  # type: ignore[attr-defined]  # made by protoc
from ray.core.generated.gcs_pb2 import ActorTableData  # type: ignore[attr-defined]  # made by protoc
from ray.exceptions import RayError

_Found = Mapping[Any, ActorTableData]


def ended_jobs() -> dict[str, float]:
    """Return the jobs whose drivers are gone: by id, the time of the end in seconds since the epoch."""
    return {job["JobID"]: job["EndTime"] / 1000 for job in ray._private.state.jobs() if job["IsDead"]}


def head_node_id() -> str | None:
    """Return the id (hex) of the cluster's head node, or None if no node is marked as the head."""
    marked = (node["NodeID"] for node in ray.nodes() if "node:__internal_head__" in node["Resources"])
    return next(marked, None)


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
    jobs = {handle._ray_actor_id.job_id for handle in handles}
    # The GCS keeps dead actors as well, up to 100,000 of them, so the question is asked by state. An actor that moves
    # on meanwhile is found in the later state, or not at all.
    states = ("DEPENDENCIES_UNREADY", "PENDING_CREATION", "ALIVE")
    answers = _ask([{"job_id": job, "actor_state_name": state} for job in jobs for state in states], timeout_s)
    if answers is None:
        return None
    return {
        actor.hex(): Creation(
            ActorTableData.ActorState.Name(about.state), bool(about.pid), about.node_id.hex() if about.node_id else None
        )
        for answer in answers
        for actor, about in answer.items()
    }


def actors_ended_in_good_order(actor_ids: Iterable[str], timeout_s: float) -> dict[str, float]:
    """Return those of the actors (ids in hex) that ended by `exit_actor()` or because nobody held a handle any more.

    The value is the time of the end, in seconds since the epoch. An actor that was killed, crashed or failed in its
    constructor is not among them, nor is a text that is no actor id. Returns nothing if the GCS has not answered within
    `timeout_s` seconds. Call it on a thread without an event loop.
    """
    wanted = []
    for actor_id in actor_ids:
        with contextlib.suppress(ValueError):
            wanted.append(ray.ActorID(bytes.fromhex(actor_id)))
    answers = _ask([{"actor_id": actor_id} for actor_id in wanted], timeout_s) or []
    return {
        actor.hex(): about.end_time / 1000
        for answer in answers
        for actor, about in answer.items()
        if about.state == ActorTableData.ActorState.DEAD and _was_wanted(about.death_cause.actor_died_error_context)
    }


def _was_wanted(death: ActorDiedErrorContext) -> bool:
    reason = ActorDiedErrorContext.Reason.Name(death.reason)
    # Ray has no reason of its own for `exit_actor()`: the text holds the exit type of the worker (2.47 to 2.60).
    return reason in ("OUT_OF_SCOPE", "REF_DELETED") or "INTENDED_USER_EXIT" in death.error_message


def _ask(questions: list[dict[str, Any]], timeout_s: float) -> list[_Found] | None:
    """Return the answers of the GCS to questions about actors, or None if it has not answered all of them in time."""
    client = getattr(ray._private.worker.global_worker, "gcs_client", None)  # none before ray.init, and after shutdown
    # Of Ray's ways to the GCS this one keeps a timeout; ray._private.state waits for ever.
    get_actors: Callable[..., Any] | None = getattr(client, "async_get_all_actor_info", None)
    if get_actors is None:
        return None

    async def ask() -> list[_Found]:
        return list(await asyncio.gather(*(get_actors(**question, timeout=timeout_s) for question in questions)))

    loop = asyncio.new_event_loop()
    try:
        return loop.run_until_complete(ask())
    except RayError:
        return None
    finally:
        loop.close()
