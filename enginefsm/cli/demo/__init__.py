"""`enginefsm demo`: a bringup as a job would write it, on a Ray of this machine, with real faults while it loads.

`bringup` is that job. `plan` decides which faults hit whom, `faults` injects them, `cluster` is the Ray underneath,
`engines` the actors, and `view` what is seen of it all.
"""

from enginefsm.cli.demo.options import DemoError, Options, parse_faults
from enginefsm.cli.demo.run import run

__all__ = ["DemoError", "Options", "parse_faults", "run"]
