"""`enginefsm status` and `enginefsm watch`: show what the hub of the cluster knows, to people and to machines.

`finding` reads the hub's JSON within bounds and starts no Ray. `words` shows it as plain text, `look` as tables on a
terminal, and `watching` shows it until Ctrl-C.
"""

from enginefsm.cli.status.finding import HubReader, NothingToSeeError, checked_run

__all__ = ["HubReader", "NothingToSeeError", "checked_run"]
