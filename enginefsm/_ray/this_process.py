"""This process's part in Ray: its session, its node's directory, and the actor that it is."""

from __future__ import annotations

import tempfile
from typing import Any

import ray


def temp_dir() -> str:
    """Return the directory under which Ray keeps its sessions on this node."""
    node = ray._private.worker._global_node
    return tempfile.gettempdir() if node is None else str(node.get_temp_dir_path())


def session() -> object:
    """Return an object that stays the same until Ray is shut down, or None without Ray."""
    return ray._private.worker._global_node


def actor_instance() -> Any | None:
    """Return the actor that runs in this process, or None if none does."""
    return next(iter(ray._private.worker.global_worker.actors.values()), None)


def actor_id() -> str:
    """Return the id (hex) of the actor that runs in this process, or "" if none does."""
    return "" if actor_instance() is None else str(ray.get_runtime_context().get_actor_id())
