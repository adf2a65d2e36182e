"""Chooses which faults hit which engine, and when. The seed alone decides."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence

from enginefsm.cli.demo.options import FaultKind


@dataclasses.dataclass(frozen=True, slots=True)
class Fault:
    """One fault of one engine."""

    engine: str
    kind: FaultKind
    at_s: float
    """Seconds after the call of the engine's `init`. A second cut waits until Ray has reported the first."""
    for_s: float = 0.0
    """The length of a freeze, in seconds."""


@dataclasses.dataclass(frozen=True, slots=True)
class EnginePlan:
    """The plan of one engine."""

    name: str
    load_s: float
    """The load time of a stand-in, in seconds."""
    faults: tuple[Fault, ...]


def make_plan(
    names: Sequence[str], kinds: Sequence[FaultKind], seed: int, load_s: tuple[float, float]
) -> list[EnginePlan]:
    """Return a plan for each engine.

    At most one engine is killed, because one death fails a bringup. The other engines get the other kinds in turn, so
    that each kind hits an engine, and each engine is hit by one kind.

    Args:
        names: The engines.
        kinds: The kinds of faults, at most one for each engine.
        seed: The seed of the choices. The same seed makes the same plan.
        load_s: The shortest and the longest load time of an engine.
    """
    dice = random.Random(seed)
    order = dice.sample(list(names), k=len(names))
    killed = {order.pop()} if FaultKind.KILL in kinds else set()
    others = [kind for kind in kinds if kind is not FaultKind.KILL]
    kind_of: dict[str, FaultKind] = dict.fromkeys(killed, FaultKind.KILL)
    if others:
        kind_of |= {name: others[place % len(others)] for place, name in enumerate(order)}
    return [_plan_one(name, kind_of.get(name), dice, load_s) for name in names]


def _plan_one(name: str, kind: FaultKind | None, dice: random.Random, load_s: tuple[float, float]) -> EnginePlan:
    loads_s = round(dice.uniform(*load_s), 1)
    at_s = round(dice.uniform(0.1, 0.5) * loads_s, 1)
    match kind:
        case FaultKind.CUT:
            moments_s = [at_s, round(at_s + dice.uniform(0.2, 0.4) * loads_s, 1)][: dice.randint(1, 2)]
            faults = tuple(Fault(name, kind, moment_s) for moment_s in moments_s)
        case FaultKind.KILL:
            faults = (Fault(name, kind, at_s),)
        case FaultKind.FREEZE:
            faults = (Fault(name, kind, at_s, for_s=round(dice.uniform(1.0, 3.0), 1)),)
        case None:
            faults = ()
    return EnginePlan(name, loads_s, faults)
