"""The actors of the demo: the rehearsal's engine classes, which also count how often their `init` ran."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle

from enginefsm.cli.demo.plan import EnginePlan
from enginefsm.rehearsal import sglang, standin


class _Counted:
    inits = 0

    def init(self, port: int | None = None, host: str = "127.0.0.1") -> str:
        self.inits += 1
        url: str = super().init(port, host)  # type: ignore[misc]  # of the engine class that this is mixed into
        return url

    def times_init_ran(self) -> int:
        return self.inits

    def pid(self) -> int:
        return os.getpid()


class StandInEngine(_Counted, standin.StandInEngine):
    """The stand-in, with a count of `init`."""


class SGLangEngine(_Counted, sglang.SGLangEngine):
    """The real SGLang engine, with a count of `init`."""


def start_actor(engine: str, plan: EnginePlan, *, model: str, log_dir: Path) -> ActorHandle[Any]:
    """Start the actor of a planned engine. It asks Ray for no resources, since all actors share this machine."""
    cls: Any
    arguments: tuple[Any, ...] = ()
    if engine == "sglang":
        cls, arguments = SGLangEngine, (sglang.cpu_server_args(model),)
        keywords: dict[str, Any] = {"env": sglang.CPU_ENV}
    else:
        cls, keywords = StandInEngine, {"load_s": plan.load_s}
    handle: ActorHandle[Any] = ray.remote(num_cpus=0)(cls).remote(*arguments, log_dir=str(log_dir), **keywords)
    return handle
