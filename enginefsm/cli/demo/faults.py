"""Injects the planned faults into the engines' processes, each at its time."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable

from enginefsm import Engine, EngineState
from enginefsm.cli.demo.options import FaultKind
from enginefsm.cli.demo.plan import Fault
from enginefsm.rehearsal import chaos

# How long a cut waits for a connection. Between a break and the next submission Ray has none.
_CONNECTION_TIMEOUT_S = 20.0
_POLL_INTERVAL_S = 0.02


@dataclasses.dataclass(frozen=True, slots=True)
class Injection:
    """The result of a planned fault."""

    fault: Fault
    incarnation: int
    at_s: float
    """The time on the demo's clock."""
    hit: bool
    what: str
    """The result in words."""


class Injector:
    """Runs a thread for each engine that a fault hits. The thread calls `report`."""

    def __init__(self, clock_s: Callable[[], float], report: Callable[[Injection], None]) -> None:
        self._clock_s = clock_s
        self._report = report
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []
        self._freezes: list[chaos.Freeze] = []

    def begin(self, engine: Engine, pid: int, faults: tuple[Fault, ...]) -> None:
        """Begin to inject `faults` into the engine's process `pid`."""
        thread = threading.Thread(
            target=self._run, args=(engine, pid, faults), name=f"faults-{engine.fsm.name}", daemon=True
        )
        self._threads.append(thread)
        thread.start()

    def join(self) -> None:
        """Wait until all faults have been injected, and all freezes have ended."""
        for thread in self._threads:
            thread.join()

    def stop(self) -> None:
        """Inject no more faults, and thaw the frozen engines."""
        self._stop.set()
        self.join()
        for freeze in self._freezes:
            freeze.thaw()

    def _run(self, engine: Engine, pid: int, faults: tuple[Fault, ...]) -> None:
        began = time.monotonic()
        for place, fault in enumerate(faults):
            if self._stop.wait(began + fault.at_s - time.monotonic()):
                return
            try:
                if place > 0 and not self._wait_until(lambda: engine.fsm.state is not EngineState.LAUNCHING):
                    self._tell(engine, fault, f"no second {fault.kind}: the first was not noticed", hit=False)
                    return
                self._inject(engine, pid, fault)
            except (chaos.NotAnEngineError, OSError) as error:
                self._tell(engine, fault, f"no {fault.kind}: {error}", hit=False)

    def _inject(self, engine: Engine, pid: int, fault: Fault) -> None:
        match fault.kind:
            case FaultKind.CUT:
                cuts = 0

                def cut() -> bool:
                    nonlocal cuts
                    cuts = chaos.cut(pid)
                    return cuts > 0

                if self._wait_until(cut):
                    self._tell(engine, fault, f"connection cut ({cuts} sockets)" if cuts > 1 else "connection cut")
                else:
                    self._tell(engine, fault, "no cut: there was no connection", hit=False)
            case FaultKind.KILL:
                # Told first: other threads see the death at once.
                self._tell(engine, fault, f"killed (SIGKILL to pid {pid})")
                chaos.kill(pid)
            case FaultKind.FREEZE:
                self._freezes.append(chaos.freeze(pid, fault.for_s))
                self._tell(engine, fault, f"frozen (SIGSTOP) for {fault.for_s:.1f} s")
                self._stop.wait(fault.for_s)

    def _wait_until(self, holds: Callable[[], bool]) -> bool:
        give_up_at = time.monotonic() + _CONNECTION_TIMEOUT_S
        while not holds():
            if time.monotonic() >= give_up_at or self._stop.wait(_POLL_INTERVAL_S):
                return False
        return True

    def _tell(self, engine: Engine, fault: Fault, what: str, *, hit: bool = True) -> None:
        if not hit and self._stop.is_set():
            return
        self._report(Injection(fault, engine.fsm.incarnation, self._clock_s(), hit, what))
