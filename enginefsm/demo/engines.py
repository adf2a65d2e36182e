"""The actors of the demo: the library's own engine classes, which also say how often their `init` ran."""

from __future__ import annotations

import os
from typing import Any

from enginefsm import sglang, standin


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
    """The stand-in, counted."""


class SGLangEngine(_Counted, sglang.SGLangEngine):
    """The real one, counted."""


def arguments_for(engine: str, *, model: str, load_s: float, log_dir: str) -> tuple[type, tuple[Any, ...], dict[str, Any]]:
    """Give the class of the kind of engine, and what its constructor takes."""
    if engine == "sglang":
        keywords = {"env": sglang.CPU_ENV, "log_dir": log_dir, "startup_deadline_s": 600.0}
        return SGLangEngine, (sglang.cpu_server_args(model),), keywords
    return StandInEngine, (), {"load_s": load_s, "log_dir": log_dir}
