"""Reads a Ray cluster's control plane, for a process that must not hang with a cluster that does not answer.

It takes the address of the cluster (`auto` for the one on this machine), the hub's name and its namespace as arguments.
It registers no driver and starts nothing. It writes JSON objects, one a line, to standard output: `{"trying": ADDRESS}`
and then `{"cluster": {...}}` or `{"no_cluster": WHY}`. Ray's own words go to standard error.
"""

import asyncio
import json
import os
import sys
from typing import Any

from ray._private import services
from ray._raylet import GcsClient  # type: ignore[attr-defined]  # a Cython class
from ray.core.generated.gcs_pb2 import ActorTableData, GcsNodeInfo  # type: ignore[attr-defined]  # made by protoc
from ray.exceptions import RayError

_ANSWER_S = 10.0


def _nodes(client: Any) -> list[dict[str, Any]]:
    return [
        {
            "ip": node.node_manager_address,
            "host": node.node_manager_hostname,
            "alive": node.state == GcsNodeInfo.GcsNodeState.Value("ALIVE"),
            "head": node.is_head_node,
        }
        for node in client.get_all_node_info(timeout=_ANSWER_S).values()
    ]


def _hub(client: Any, name: str, namespace: str) -> dict[str, Any] | None:
    async def ask() -> Any:
        return await client.async_get_all_actor_info(actor_state_name="ALIVE", timeout=_ANSWER_S)

    for actor in asyncio.run(ask()).values():
        if (actor.name, actor.ray_namespace) == (name, namespace):
            state = ActorTableData.ActorState.Name(actor.state)
            return {"ip": actor.address.ip_address, "pid": actor.pid, "state": state}
    return None


def _read(address: str, name: str, namespace: str) -> dict[str, Any]:
    client = GcsClient(address=address)
    metadata = json.loads(client.internal_kv_get(b"CLUSTER_METADATA", namespace=b"cluster", timeout=_ANSWER_S) or "{}")
    return {
        "address": address,
        "ray": metadata.get("ray_version"),
        "python": metadata.get("python_version"),
        "nodes": _nodes(client),
        "hub": _hub(client, name, namespace),
    }


def _main(address: str, name: str, namespace: str) -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what Ray prints is no answer
    try:
        if address == "auto":
            found = services.get_ray_address_from_environment("auto", None)
            if found in (None, "auto"):
                raise ConnectionError("no Ray runs on this machine")
            address = found
        answers.write(json.dumps({"trying": address}) + "\n")
        answers.write(json.dumps({"cluster": _read(address, name, namespace)}) + "\n")
    except (ConnectionError, RuntimeError, ValueError, OSError, RayError) as error:
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        answers.write(json.dumps({"no_cluster": why}) + "\n")


if __name__ == "__main__":
    _main(*sys.argv[1:])
