"""A small HTTP server that starts up as SGLang does, without a model. Its settings come as JSON on standard input.

It refuses connections for ``import_s`` seconds, answers 503 for ``load_s`` seconds, and then serves; or, given an
``exit_code``, it exits with that code where it would have begun to serve. Standard library only, to start quickly.
"""

import json
import os
import socket
import sys
import threading
import time
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

_WORDS = ("tokens", "of", "a", "stand-in", "that", "loads", "no", "model")


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    loaded = threading.Event()

    def do_GET(self) -> None:
        if self.path not in ("/health", "/health_generate"):
            self._answer(404, {"error": {"message": f"no such path: {self.path}"}})
        elif self.loaded.is_set():
            self._answer(200)
        else:
            self._answer(503)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path != "/generate":
            self._answer(404, {"error": {"message": f"no such path: {self.path}"}})
        elif not self.loaded.is_set():
            self._answer(503)
        else:
            try:
                answer = _generate(json.loads(body))
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                self._answer(400, {"error": {"message": f"not a request to generate: {error!r}"}})
            else:
                self._answer(200, answer)

    def _answer(self, status: int, content: dict[str, Any] | None = None) -> None:
        body = b"" if content is None else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, host: str, port: int) -> None:
        self.address_family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        super().__init__((host, port), _Handler)

    def server_bind(self) -> None:
        # HTTPServer's own version asks the name service for the host's full name, which can take seconds.
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)


def _generate(request: dict[str, Any]) -> dict[str, Any]:
    count = int(request.get("sampling_params", {}).get("max_new_tokens", 16))
    return {
        "text": "".join(f" {_WORDS[i % len(_WORDS)]}" for i in range(count)),
        "meta_info": {
            "id": uuid.uuid4().hex,
            "finish_reason": {"type": "length", "length": count},
            "prompt_tokens": len(request["text"].split()),
            "completion_tokens": count,
        },
    }


def _serve(host: str, port: int, import_s: float, load_s: float, exit_code: int | None) -> None:
    print(f"importing for {import_s} s", flush=True)  # noqa: T201
    time.sleep(import_s)
    server = _Server(host, port)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(f"loading for {load_s} s", flush=True)  # noqa: T201
    time.sleep(load_s)
    if exit_code is not None:
        print(f"told to exit with code {exit_code} instead of serving", flush=True)  # noqa: T201
        os._exit(exit_code)
    _Handler.loaded.set()
    print(f"serving on {host} port {port}", flush=True)  # noqa: T201
    threading.Event().wait()


if __name__ == "__main__":
    _serve(**json.load(sys.stdin))
