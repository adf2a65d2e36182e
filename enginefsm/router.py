"""What is asked of an SGLang router: to forget an engine's server that can no longer take itself off its list."""

from __future__ import annotations

import contextlib
import http.client
import json
import time
from typing import Any
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
    while True:
        listed = [worker["id"] for worker in _ask(host, port, "GET", "/workers", until)["workers"] if worker["url"] == url]
        if not listed:
            return bool(asked)
        for worker_id in listed:
            if worker_id not in asked:
                _ask(host, port, "DELETE", f"/workers/{quote(worker_id, safe='')}", until)
                asked.add(worker_id)
        time.sleep(PAUSE_S)


def _ask(host: str, port: int, method: str, path: str, until: float) -> Any:
    address = f"http://{host}:{port}{path}"
    left_s = until - time.monotonic()
    if left_s <= 0:
        raise RouterError(f"{method} {address}: the time is up")
    connection = http.client.HTTPConnection(host.strip("[]"), port, timeout=left_s)
    try:
        with contextlib.closing(connection):
            connection.request(method, path)
            answer = connection.getresponse()
            body = answer.read()
    except (OSError, http.client.HTTPException) as error:
        raise RouterError(f"{method} {address}: {error!r}") from error
    if method == "DELETE" and answer.status == http.HTTPStatus.NOT_FOUND:
        return None  # it is off the list already
    if not 200 <= answer.status < 300:
        raise RouterError(f"{method} {address} answered {answer.status}: {body[:200].decode(errors='replace')}")
    try:
        return json.loads(body)
    except ValueError as error:
        raise RouterError(f"{method} {address} answered what is not JSON: {body[:200]!r}") from error
