"""`enginefsm status` and `enginefsm watch`: what the cluster's hub knows, for people and for machines.

`finding` gets the hub's JSON, within bounds and without a Ray of its own; `words` tells it in plain text, `look` as
tables on a terminal, and `watching` again and again.
"""

from enginefsm.cli.status.finding import HubReader, NothingToSeeError, checked_run

__all__ = ["HubReader", "NothingToSeeError", "checked_run"]
