"""What slime embeds: its engine groups under the monitor, and a health monitor that kills no engine for a transient.

slime is no dependency: its objects are known by the attributes that are read of them.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Iterable, MutableSequence
from pathlib import PurePosixPath
from typing import Any

import ray
from ray import ObjectRef
from ray.actor import ActorHandle
from ray.exceptions import RayError

import enginefsm
from enginefsm._engine.proxy import Engine, managed
from enginefsm.embed.router import RouterError, remove_worker
from enginefsm.errors import RestartCapError
from enginefsm.fsm.states import GIVEN_UP, EngineState, Reason
from enginefsm.health.monitor import HealthMonitor, Verdict
from enginefsm.monitor import EngineMonitor

logger = logging.getLogger("enginefsm")

NODES_TIMEOUT_S = 2.0  # for the control plane, to tell where a group's engines are
# What the end of an engine may take: for its actors to say that they answer, for those to shut down, for the router.
PING_TIMEOUT_S, SHUTDOWN_TIMEOUT_S, ROUTER_TIMEOUT_S = 5.0, 20.0, 5.0
VERDICT_S = 1.0  # from a verdict to its callback
PAUSE_S = 0.05

_MAY_LIVE = (*GIVEN_UP, Reason.RELEASED)


def adopt_group(
    server_group: Any, model: str | None = None, monitor: EngineMonitor | None = None
) -> list[tuple[int, Engine]]:
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
        RestartCapError: One of the engines has been replaced as often as the monitor allows. All actors that this call
            was to adopt are killed, since none of them will be given to anyone, and their places are None again.
    """
    _check_group(server_group, "adopt_group()")
    if server_group.worker_type == "placeholder":
        return []
    slots = server_group.all_engines
    new = [index for index, held in enumerate(slots) if held is not None and not isinstance(held, Engine)]
    nodes_per_engine = getattr(server_group, "nodes_per_engine", 1)
    model = model or PurePosixPath(getattr(server_group, "model_path", None) or "default").name
    nodes = _nodes(server_group, new)
    names = {i: f"{model}/{server_group.worker_type}/{server_group.rank_offset + i}" for i in new}
    may_restart = (monitor or enginefsm.default_monitor()).may_restart
    adopted = []
    for index in sorted(new, key=lambda i: may_restart(names[i])):  # one that may not goes first: others spend nothing
        labels = {"model": model, "worker_type": server_group.worker_type, "node": nodes.get(index, "")}
        if nodes_per_engine > 1:
            labels["node_rank"] = str(index % nodes_per_engine)
        try:
            slots[index] = _adopt(slots[index], names[index], "init", labels, monitor)
        except RestartCapError as error:
            _discard(slots, new)
            error.add_note(f"enginefsm: killed all {len(new)} that were to be adopted, and freed their places")
            raise
        adopted.append((server_group.rank_offset + index, slots[index]))
    return adopted


def _discard(slots: MutableSequence[Any], indices: list[int]) -> None:
    """Kill what is in these places, adopted or not, and free them."""
    for index in indices:
        held, slots[index] = slots[index], None
        if isinstance(held, Engine):
            _monitor_of(held).release(held)
            held = held.handle
        ray.kill(held)


def adopt_engines(
    engines: Iterable[Any], model: str = "default", worker_type: str = "regular", monitor: EngineMonitor | None = None
) -> list[Engine]:
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


class RolloutHealthMonitor:
    """What slime's class of that name is to a `RolloutManager`, and takes no transient for a death.

    It probes the engines of a group with their own `health_generate` (see `EngineMonitor.watch`), and looks at
    `/health` of their servers. An engine that is dead, or by its verdict gone, is ended and its places in
    `all_engines` are freed for `recover`: whoever of its actors still answers is asked to shut down, within bounds, all
    are killed, and the router is made to forget the server.

    Args:
        server_group: slime's `ServerGroup`, its engines adopted by `adopt_group`.
        args: slime's arguments: `rollout_health_check_interval`, `_timeout` and `_first_wait`, in seconds.

    Raises TypeError when `server_group` is not a group, and AttributeError when `args` lacks one of those.
    """

    def __init__(self, server_group: Any, args: Any) -> None:
        _check_group(server_group, "RolloutHealthMonitor()")
        self._group = server_group
        self._interval_s = float(args.rollout_health_check_interval)
        self._timeout_s = float(args.rollout_health_check_timeout)
        self._first_wait_s = float(args.rollout_health_check_first_wait)
        self._watch: HealthMonitor | None = None
        self._urls: dict[str, tuple[Engine, ObjectRef[Any]]] = {}  # by name: where it serves, as it says
        self._ending = threading.Lock()  # while engines are being ended

    def start(self) -> bool:
        """Begin, paused: checks begin with `resume`. Says whether there is anything to check; again, it does nothing.

        Raises TypeError when an engine of the group is not adopted.
        """
        if self._watch is not None:
            return True
        for index, held in enumerate(self._group.all_engines):
            if held is not None and not isinstance(held, Engine):
                raise TypeError(
                    f"all_engines[{index}] is not adopted: call enginefsm.embed.slime.adopt_group(self) in "
                    f"ServerGroup.start_engines, before ports are allocated"
                )
        servers = self._servers()
        if not servers:
            return False
        self._watch = _monitor_of(servers[0][0]).watch(
            servers,
            interval_s=self._interval_s,
            timeout_s=self._timeout_s,
            first_wait_s=self._first_wait_s,
            on_dead=self._judged,
            address="get_url",
        )
        self._watch.pause()
        return True

    def pause(self) -> None:
        """Check no more until `resume`, as while engines are offloaded. Returns once engines seen to be dead are ended.

        An engine that was given up, but without a verdict of this monitor's, keeps its place: its actor may live.
        """
        if self._watch is None:
            return
        self._watch.pause()
        self._end(lambda engine: engine.fsm.state is EngineState.DEAD and engine.fsm.reason not in _MAY_LIVE)
        until = time.monotonic() + VERDICT_S  # a verdict may be on its way here
        while self._has_given_up() and time.monotonic() < until:
            time.sleep(PAUSE_S)
            if self._ending.locked():  # and the next one behind it
                until = time.monotonic() + VERDICT_S

    def resume(self) -> None:
        """Check from now on, after the first wait."""
        if self._watch is not None:
            self._ask_urls()
            self._watch.resume()

    def stop(self) -> None:
        """Check no more. Stopping twice, or before a start, does nothing."""
        watch, self._watch = self._watch, None
        if watch is not None:
            watch.stop()

    def is_checking_enabled(self) -> bool:
        """Whether it is started and not paused."""
        return self._watch is not None and not self._watch.paused

    def _servers(self) -> list[list[Engine]]:
        """The engines of the group, all nodes of one together, node 0 first; but for those not (wholly) adopted."""
        slots, nodes = self._group.all_engines, getattr(self._group, "nodes_per_engine", 1)
        servers = [list(slots[first : first + nodes]) for first in range(0, len(slots), nodes)]
        return [server for server in servers if all(isinstance(held, Engine) for held in server)]

    def _ask_urls(self) -> None:
        """Ask engines where they serve, unless that is known. The answers are looked at when they are needed."""
        for engine, *_ in self._servers():
            known = self._urls.get(engine.fsm.name)
            if known is None or known[0] is not engine or _failed(known[1]):
                self._urls[engine.fsm.name] = engine, engine.handle.get_url.remote()

    def _has_given_up(self) -> bool:
        return any(engine.fsm.reason in GIVEN_UP for server in self._servers() for engine in server)

    def _judged(self, verdict: Verdict) -> None:
        self._end(lambda engine: engine in verdict.engines)

    def _end(self, is_over: Callable[[Engine], bool]) -> None:
        """End what is left of the engines one of whose actors is over, and free their places."""
        with self._ending:
            over = [server for server in self._servers() if any(is_over(engine) for engine in server)]
            _shut_down([engine for server in over for engine in server])
            for server in over:
                for engine in server:
                    ray.kill(engine.handle)
                self._forget(server[0])
                self._free(server)

    def _free(self, server: list[Engine]) -> None:
        slots = self._group.all_engines
        for engine in server:
            if engine.fsm.state is not EngineState.DEAD:
                _monitor_of(engine).release(engine)
            slots[slots.index(engine)] = None
            logger.warning("engine %s is ended, its place free: %s", engine.fsm.name, engine.fsm.describe())

    def _forget(self, engine: Engine) -> None:
        """Have the router forget an engine's server, if it lists it still."""
        host, port = getattr(self._group, "router_ip", None), getattr(self._group, "router_port", None)
        asked, ref = self._urls.pop(engine.fsm.name, (None, None))
        if host is None or port is None or ref is None or asked is not engine:
            return
        found = _values([ref], 0)
        if ref not in found:
            logger.warning("engine %s has not told its URL: the router may still list it", engine.fsm.name)
            return
        if found[ref] is None:
            return
        try:
            remove_worker(host, port, found[ref], ROUTER_TIMEOUT_S)
        except RouterError as error:
            logger.warning("engine %s: the router may still list %s: %s", engine.fsm.name, found[ref], error)


def _monitor_of(engine: Engine) -> EngineMonitor:
    monitor = managed(engine).awaiter
    assert isinstance(monitor, EngineMonitor)
    return monitor


def _shut_down(engines: list[Engine]) -> None:
    """Have those engines shut down that can: an actor that is gone, frozen or busy gets no more calls."""
    asked: dict[ObjectRef[Any], Engine] = {engine.handle.__ray_ready__.remote(): engine for engine in engines}
    answering = [asked[ref] for ref in _values(asked, PING_TIMEOUT_S)]
    leaving: dict[ObjectRef[Any], Engine] = {engine.handle.shutdown.remote(): engine for engine in answering}
    left = [leaving[ref] for ref in _values(leaving, SHUTDOWN_TIMEOUT_S)]
    for engine in answering:
        if engine not in left:
            logger.warning("engine %s did not shut down in good order", engine.fsm.name)


def _values(refs: Collection[ObjectRef[Any]], timeout_s: float) -> dict[ObjectRef[Any], Any]:
    """The values of those that have one within the time."""
    found = {}
    for ref in ray.wait(list(refs), num_returns=len(refs), timeout=timeout_s)[0] if refs else ():
        try:
            found[ref] = ray.get(ref)
        except RayError as error:
            logger.info("%s", error)
    return found


def _failed(ref: ObjectRef[Any]) -> bool:
    """Whether the reference has come to its end without a value."""
    return bool(ray.wait([ref], timeout=0)[0]) and not _values([ref], 0)


def _adopt(held: Any, name: str, launch: str, labels: dict[str, str], monitor: EngineMonitor | None) -> Engine:
    if isinstance(held, Engine):
        return held
    namesake = (monitor or enginefsm.default_monitor()).engine(name)
    if namesake is not None and namesake.fsm.state is not EngineState.DEAD and namesake != held:
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
        if held is not None and not isinstance(held, Engine | ActorHandle):
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
