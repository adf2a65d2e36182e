"""`enginefsm demo`: a bringup as a job would write it, on a Ray of this machine, with real faults while it loads.

`bringup` is that job. `plan` chooses the faults, `faults` injects them, `cluster` starts Ray, `engines` holds the
actors, `board` collects what happens, and `view` shows it.
"""

from enginefsm.cli.demo.options import DemoError, Options, parse_faults
from enginefsm.cli.demo.run import run

__all__ = ["DemoError", "Options", "parse_faults", "run"]
