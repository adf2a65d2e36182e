"""Reads the hub's JSON through Ray, for a process that must not hang with a cluster which does not answer.

It takes the cluster's address, the hub's name and its namespace as arguments. It writes one JSON object a line to
standard output: first `{"connected": ADDRESS}` or `{"no_cluster": WHY}`. It then reads lines, each a run's name in JSON
or null, and answers each with `{"fleet": ...}`, `{"no_hub": true}` or `{"no_answer": WHY}`. It ends when its input
ends. Ray's own words go to standard error.
"""

import json
import logging
import os
import sys
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError

_ANSWER_S = 10.0


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _read(name: str, namespace: str, run: str | None) -> dict[str, Any]:
    try:
        hub = ray.get_actor(name, namespace)
        return {"fleet": ray.get(hub.fleet.remote(run), timeout=_ANSWER_S)}
    except ValueError:
        return {"no_hub": True}
    except GetTimeoutError:
        return {"no_answer": f"it has not answered within {_ANSWER_S:g} s"}
    except RayError as error:
        return {"no_answer": _first_line(error)}


def _serve(address: str, name: str, namespace: str) -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what Ray prints is no answer
    try:
        # Given an address, Ray starts nothing.
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, configure_logging=False)
    except (ConnectionError, RuntimeError, ValueError, OSError, RayError) as error:
        answers.write(json.dumps({"no_cluster": _first_line(error)}) + "\n")
        return
    answers.write(json.dumps({"connected": ray.get_runtime_context().gcs_address}) + "\n")
    for line in sys.stdin:
        answers.write(json.dumps(_read(name, namespace, json.loads(line))) + "\n")


if __name__ == "__main__":
    _serve(*sys.argv[1:])
