"""The options of the demo, checked before anything starts."""

from __future__ import annotations

import dataclasses
import importlib.util
from enum import StrEnum
from pathlib import Path

import psutil

MOST_ENGINES = 64
# The measured memory of one engine: a Ray worker and the server below it.
_MEMORY_GB = {"stand-in": 0.12, "sglang": 1.6}


class DemoError(ValueError):
    """The demo cannot run as asked. The message says why and what to do, in one line."""


class FaultKind(StrEnum):
    """A kind of fault."""

    CUT = "cut"
    KILL = "kill"
    FREEZE = "freeze"


def parse_faults(text: str) -> tuple[FaultKind, ...]:
    """Return the fault kinds that `text` lists, separated by commas, or `none`. Raise DemoError for another word."""
    words = [word.strip() for word in text.split(",")]
    if words == ["none"]:
        return ()
    for word in words:
        if word not in list(FaultKind):
            raise DemoError(f"--faults: {word!r} is not a fault: choose from {', '.join(FaultKind)}; or none")
    return tuple(dict.fromkeys(FaultKind(word) for word in words))


@dataclasses.dataclass(frozen=True, slots=True)
class Options:
    """The options of one demo. Raise DemoError if it cannot run."""

    engines: int = 4
    faults: tuple[FaultKind, ...] = (FaultKind.CUT,)
    seed: int = 0
    engine: str = "stand-in"
    model: Path | None = None
    """The model's directory, for `engine="sglang"`; None makes a tiny model."""
    metrics_port: int = 0
    events: Path | None = None
    """The file for an event log, which `enginefsm report` reads."""

    def __post_init__(self) -> None:
        if not 1 <= self.engines <= MOST_ENGINES:
            raise DemoError(f"--engines: from 1 to {MOST_ENGINES} on one machine, not {self.engines}")
        if self.engines < len(self.faults):
            raise DemoError(
                f"--faults names {len(self.faults)} kinds, and each hits an engine of its own: "
                f"take --engines {len(self.faults)} or more"
            )
        if not 0 <= self.metrics_port <= 65535:
            raise DemoError(f"--metrics-port: from 0 to 65535, not {self.metrics_port}")
        if self.events is not None:
            try:
                self.events.open("ab").close()
            except OSError as error:
                raise DemoError(f"--events: {self.events} cannot be written: {error.strerror}") from None
        self._check_model()
        need_gb, free_gb = self.engines * _MEMORY_GB[self.engine], psutil.virtual_memory().available / 2**30
        if need_gb > free_gb:
            raise DemoError(
                f"--engines: {self.engines} {self.engine} engines take about {need_gb:.1f} GB of memory, and "
                f"{free_gb:.1f} GB are free: take at most {int(free_gb / _MEMORY_GB[self.engine])}"
            )

    def _check_model(self) -> None:
        if self.engine != "sglang":
            if self.model is not None:
                raise DemoError("--model is for --engine sglang: the stand-in loads none")
            return
        if self.model is not None and not (self.model / "config.json").is_file():
            raise DemoError(f"--model: {self.model} is not the directory of a model: there is no config.json in it")
        if importlib.util.find_spec("sglang") is None:
            raise DemoError(
                "--engine sglang: sglang is not installed: pip install sglang, or see tests/requirements-sglang.txt "
                "in enginefsm's repository for one that runs on a CPU"
            )
