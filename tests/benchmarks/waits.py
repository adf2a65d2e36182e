"""Transient faults at every wait on engines that a RolloutManager in slime's shape has: how many end anything.

The engines are stand-ins, the router is the real sglang-router. Run: python tests/benchmarks/waits.py
"""

from __future__ import annotations

import argparse
import collections
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import ray
from support.clusters import local_ray
from support.rollouts import Rollout

from enginefsm.rehearsal import chaos

QUICK = {"import_s": 0.0, "load_s": 0.0}
FREEZE_S = 1.5

AGREED = {
    "port allocation": 12,
    "deferred init, in the constructor": 12,
    "get_url, encoder phase": 4,
    "init of external engines": 4,
    "offload": 8,
    "onload": 8,
    "check_weights": 8,
    "get_url": 8,
    "weight update, in the trainer": 12,
    "recover": 8,
    "health probe": 8,
    "manager hop, in the driver": 8,
}


class Table:
    """What became of the faults at each wait."""

    def __init__(self):
        self.faults, self.ended, self.killed = collections.Counter(), collections.Counter(), 0
        self.began = time.monotonic()

    def count(self, wait, faults, act):
        """Make faults at a wait; says whether all went on."""
        try:
            act()
        except Exception as error:  # noqa: BLE001  the figure of the benchmark is how often this happens
            self.ended[wait] += faults
            print(f"\n{wait}: {type(error).__name__}: {error}")
        self.faults[wait] += faults
        took_s = time.monotonic() - self.began
        print(f"\r{self.faults.total()} of {sum(AGREED.values())} faults, {took_s:.0f} s ", end="", flush=True)
        return wait not in self.ended

    def lost(self, rollout, *, but=()):
        """Count engines that came to an end, though nobody killed them."""
        for rank in range(rollout.actors or rollout.args.num_external):
            lives = len(rollout.begun("constructor", rank)) - but.count(rank)
            self.killed += rollout.times("dead", rank) > but.count(rank) or lives != 1


def construct(table, directory):
    """A bringup with an encoder: faults at ports, at init and at the encoder's URL, of each rank."""
    waits = [("ports", 0), ("init", 0), ("get_url", 0), ("ports", 1), ("ports", 2), ("init", 1), ("init", 2)]
    names = {
        "ports": "port allocation",
        "init": "deferred init, in the constructor",
        "get_url": "get_url, encoder phase",
    }
    rollout = Rollout(directory, hold=[(step, [rank]) for step, rank in waits], server=QUICK, num_encoders=1)
    freezes = int(directory.name.rpartition("-")[2]) % 2  # in every other bringup, init is frozen instead
    for step, rank in waits:
        freeze_s = FREEZE_S if freezes and step == "init" else None
        table.count(names[step], 1, lambda s=step, r=rank, f=freeze_s: rollout.cut_during(s, [r], freeze_s=f))
    rollout.ready.result(120)
    assert rollout.ask("generate", 0) == [4, 4, 4, 4]
    table.lost(rollout)
    rollout.close()


def construct_external(table, directory):
    """A bringup over external engines."""
    rollout = Rollout(directory, hold=[("init", [0, 1])], server=QUICK, num_external=2, rollout_num_engines=0)
    table.count("init of external engines", 2, lambda: rollout.cut_during("init", [0, 1]))
    rollout.ready.result(120)
    table.lost(rollout)
    rollout.close()


def live(table, directory):
    """The life of a fleet of two."""
    rollout = Rollout(directory, server=QUICK, use_fault_tolerance=True)
    rollout.ready.result(120)
    ranks, killed = [0, 1], []
    for turn in range(4):
        freeze_s = FREEZE_S if turn == 3 else None
        for wait, step, method, argument in (
            ("offload", "offload", "offload", ()),
            ("onload", "onload", "onload", (["weights"],)),
            ("check_weights", "check_weights", "check_weights", ("snapshot",)),
            ("get_url", "get_url", "get_urls", ()),
        ):
            start = lambda m=method, a=argument: rollout.call(m, *a)  # noqa: E731
            table.count(wait, 2, lambda w=step, b=start, f=freeze_s: rollout.cut_during(w, ranks, b, freeze_s=f))
    trainer = rollout.trainer()
    update = lambda: rollout.threads.submit(ray.get, trainer.update_weights.remote("/models/tiny", "1"))  # noqa: E731
    for step in ("pause_generation", "update_weights", "continue_generation") * 2:
        table.count("weight update, in the trainer", 2, lambda w=step: rollout.cut_during(w, ranks, update, "trainer"))
    ray.kill(trainer)
    for _ in range(8):
        table.count("manager hop, in the driver", 1, rollout.cut_off_the_driver)
    for turn in range(8):
        rollout.ask("generate", turn)  # which has the engines probed
        freeze_s = FREEZE_S if turn % 2 else None
        table.count(
            "health probe", 1, lambda r=turn % 2, f=freeze_s: rollout.cut_during("health_generate", [r], freeze_s=f)
        )
        rollout.wait_for(lambda: all(place and place[2] == "ready" for place in rollout.places()), "all to be ready")
    for rank in ranks:
        rollout.ask("generate", rank)
        killed.append(rank)
        kill = lambda r=rank: chaos.kill(rollout.pid(r))  # noqa: E731
        table.count("recover", 4, lambda r=rank, k=kill: rollout.replace_cut_off(r, k))
    assert rollout.ask("generate", 9) == [4, 4, 4, 4]
    assert rollout.ask("router_lists") == sorted(rollout.ask("get_urls"))
    table.lost(rollout, but=killed)
    rollout.close()


def main():
    """Print the table."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    table = Table()
    with tempfile.TemporaryDirectory(prefix="waits-") as directory, local_ray():
        for number in range(4):
            construct(table, Path(directory) / f"bringup-{number}")
        for number in range(2):
            construct_external(table, Path(directory) / f"external-{number}")
        live(table, Path(directory) / "life")
    assert dict(table.faults) == AGREED, table.faults
    ended = table.ended.total()
    print(f"\n{'wait':36}{'faults':>8}{'ended the manager or an engine':>33}")
    for wait, faults in AGREED.items():
        print(f"{wait:36}{faults:>8}{table.ended[wait]:>33}")
    print(f"{'all':36}{sum(AGREED.values()):>8}{ended:>33}")
    print(f"live engines killed: {table.killed}; {time.monotonic() - table.began:.0f} s")
    return 0 if ended == table.killed == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
