"""What slime embeds: its engine groups under the monitor, and a health monitor that kills no engine for a transient.

slime is no dependency: its objects are known by the attributes that are read of them.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, MutableSequence
from pathlib import PurePosixPath
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError

import enginefsm
from enginefsm.engine import MonitoredEngine
from enginefsm.monitor import EngineMonitor
from enginefsm.states import EngineState

logger = logging.getLogger("enginefsm")

NODES_TIMEOUT_S = 2.0


def adopt_group(
    server_group: Any, model: str | None = None, monitor: EngineMonitor | None = None
) -> list[tuple[int, MonitoredEngine]]:
    """Take the engines of slime's `ServerGroup` under the monitor, in place: its `all_engines` then holds them.

    An engine is named `{model}/{worker_type}/{rank}`, the rank being that in slime's log. A new actor in the place of
    another is the next incarnation of that name. Empty places, and engines that are adopted already, are left alone.

    Args:
        server_group: The group, its actors created. A "placeholder" group has none.
        model: What to call the model; by default, the last part of the group's `model_path`.
        monitor: By default, the process's.

    Returns:
        `(rank, engine)` of each engine that was adopted now: what `start_engines` goes on with.

    Raises:
        TypeError: `server_group` is not such a group, or holds what is not the handle of a sync or threaded actor.
    """
    _check_group(server_group, "adopt_group()")
    if server_group.worker_type == "placeholder":
        return []
    slots = server_group.all_engines
    new = [index for index, held in enumerate(slots) if held is not None and not isinstance(held, MonitoredEngine)]
    nodes_per_engine = getattr(server_group, "nodes_per_engine", 1)
    model = model or PurePosixPath(getattr(server_group, "model_path", None) or "default").name
    nodes = _nodes(server_group, new)
    adopted = []
    for index in new:
        rank = server_group.rank_offset + index
        labels = {"model": model, "worker_type": server_group.worker_type, "node": nodes.get(index, "")}
        if nodes_per_engine > 1:
            labels["node_rank"] = str(index % nodes_per_engine)
        slots[index] = _adopt(slots[index], f"{model}/{server_group.worker_type}/{rank}", "init", labels, monitor)
        adopted.append((rank, slots[index]))
    return adopted


def adopt_engines(
    engines: Iterable[Any], model: str = "default", worker_type: str = "regular", monitor: EngineMonitor | None = None
) -> list[MonitoredEngine]:
    """Take engines that another process launched under this process's monitor, as the trainers of slime get them.

    They are named `{model}/{worker_type}/{index}`, by their places in `engines`; another actor at a place is the next
    incarnation of that name. Whether they are launched is not asked: what is known of them here is how calls end.

    Raises TypeError when one is not the handle of a sync or threaded actor.
    """
    labels = {"model": model, "worker_type": worker_type}
    return [
        _adopt(engine, f"{model}/{worker_type}/{index}", "__ray_ready__", labels, monitor)
        for index, engine in enumerate(engines)
    ]


def _adopt(
    held: Any, name: str, launch: str, labels: dict[str, str], monitor: EngineMonitor | None
) -> MonitoredEngine:
    if isinstance(held, MonitoredEngine):
        return held
    namesake = (monitor or enginefsm.default_monitor()).engine(name)
    if namesake is not None and namesake.state is not EngineState.DEAD and namesake != held:
        # Whoever put another actor into its place has ended it, and told nobody.
        (monitor or enginefsm).release(namesake)
    return (monitor or enginefsm).adopt(held, name=name, launch=launch, **labels)


def _check_group(group: Any, asked_by: str) -> None:
    missing = [name for name in ("all_engines", "rank_offset", "worker_type") if not hasattr(group, name)]
    if missing:
        raise TypeError(
            f"{asked_by} takes slime's ServerGroup, and this {type(group).__name__} has no {' and no '.join(missing)}. "
            f"For a plain list of engines there is enginefsm.adopt(), one by one"
        )
    if not isinstance(group.all_engines, MutableSequence):
        raise TypeError(f"all_engines of {type(group).__name__} is no list, but a {type(group.all_engines).__name__}")
    for index, held in enumerate(group.all_engines):
        if held is not None and not isinstance(held, MonitoredEngine | ActorHandle):
            raise TypeError(f"all_engines[{index}] is no actor's handle, but a {type(held).__name__}")


def _nodes(group: Any, indices: list[int]) -> dict[int, str]:
    """The addresses of the nodes on which the group's places are; empty when that is not known, or not known soon."""
    if not indices or getattr(group, "pg", None) is None or group.pg[0] is None:
        return {}
    placement_group, bundles, *_ = group.pg
    on_node = min(group.num_gpus_per_engine, group.args.num_gpus_per_node)
    bundle = {index: bundles[group.gpu_offset + index * on_node] for index in indices}
    found: dict[int, str] = {}

    def look() -> None:
        try:
            node_of = ray.util.placement_group_table(placement_group)["bundles_to_node_id"]
            address = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
            found.update({index: address.get(node_of.get(bundle[index]), "") for index in indices})
        except RayError as error:
            logger.warning("the nodes of %s engines cannot be told: %s", group.worker_type, error)

    # The control plane is asked, which need not answer soon: a label is not worth a bringup.
    thread = threading.Thread(target=look, name="enginefsm-nodes", daemon=True)
    thread.start()
    thread.join(NODES_TIMEOUT_S)
    if thread.is_alive():
        logger.warning("the nodes of %s engines are not told within %g s", group.worker_type, NODES_TIMEOUT_S)
        return {}
    return found
