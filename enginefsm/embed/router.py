"""What is asked of an SGLang router: to forget an engine's server that can no longer take itself off its list."""

from __future__ import annotations

import contextlib
import http.client
import json
import time
from urllib.parse import quote

PAUSE_S = 0.1


class RouterError(RuntimeError):
    """A router that gave no answer, or not the one hoped for, within the time."""


def remove_worker(host: str, port: int, url: str, timeout_s: float) -> bool:
    """Have the router at `host` and `port` forget the server at `url`; say whether it knew that server.

    Asked as SGLang's router has it, `GET /workers` and `DELETE /workers/{id}`, with no proxy between. A router removes
    in the background: this waits until the server is off the list.

    Raises RouterError when that is not so within `timeout_s` seconds.
    """
    until = time.monotonic() + timeout_s
    asked: set[str] = set()
    while listed := _workers(host, port, url, until):
        for worker_id in listed - asked:
            _ask(host, port, "DELETE", f"/workers/{quote(worker_id, safe='')}", until)
        asked |= listed
        time.sleep(PAUSE_S)
    return bool(asked)


def _workers(host: str, port: int, url: str, until: float) -> set[str]:
    """The ids under which the router lists the server."""
    body = _ask(host, port, "GET", "/workers", until)
    try:
        return {str(worker["id"]) for worker in json.loads(body)["workers"] if worker["url"] == url}
    except (ValueError, LookupError, TypeError) as error:
        raise RouterError(f"http://{host}:{port}/workers is no list of workers, but {body[:200]!r}") from error


def _ask(host: str, port: int, method: str, path: str, until: float) -> bytes:
    request = f"{method} http://{host}:{port}{path}"
    left_s = until - time.monotonic()
    if left_s <= 0:
        raise RouterError(f"{request}: the time is up")
    connection = http.client.HTTPConnection(host.strip("[]"), port, timeout=left_s)
    try:
        with contextlib.closing(connection):
            connection.request(method, path)
            answer = connection.getresponse()
            body = answer.read()
    except (OSError, http.client.HTTPException) as error:
        raise RouterError(f"{request}: {error!r}") from error
    # What is not found is off the list.
    if not (200 <= answer.status < 300 or (method == "DELETE" and answer.status == http.HTTPStatus.NOT_FOUND)):
        raise RouterError(f"{request} answered {answer.status}: {body[:200]!r}")
    return body
