"""How late a launch's result is after a link between two hosts was silent for 25 s, with Ray's keepalive and without.

    python tests/benchmarks/silent_link.py [--rounds 5] [--without]

Each round takes 40 s, mostly of waiting. `--without` adds one round without the keepalive, which takes up to 7 minutes.
It makes two network namespaces, so it needs root and iproute2.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.hosts import ray_on, two_hosts
from support.silent_link import bring_up

SILENT_S = 25.0


def measure(with_keepalive: bool) -> float:
    with two_hosts() as hosts, ray_on(hosts, sys.executable) as address:
        _, ended = bring_up(hosts, address, with_keepalive=with_keepalive, silent_s=SILENT_S)
    settings = "with keepalive" if with_keepalive else "without keepalive"
    print(
        f"{settings}: result {ended['late_s']:.2f} s after the link was back, init run {ended['launches']} time(s); "
        f"bare ray.get: {ended['bare']}",
        flush=True,
    )
    return ended["late_s"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--without", action="store_true")
    arguments = parser.parse_args()
    late = [measure(with_keepalive=True) for _ in range(arguments.rounds)]
    print(f"median {statistics.median(late):.2f} s, highest {max(late):.2f} s")
    if arguments.without:
        measure(with_keepalive=False)


if __name__ == "__main__":
    main()
