"""A router is made to forget a server that cannot take itself off: the real sglang-router, and broken ones."""

from __future__ import annotations

import os
import signal
import socket
import time
from http.server import BaseHTTPRequestHandler

import pytest
from support.engines import wait_until
from support.rollout_manager import start_router
from support.servers import serving
from support.slime_engines import ask

from enginefsm.embed.router import RouterError, remove_worker
from enginefsm.rehearsal.standin import StandInEngine


@pytest.fixture(scope="module")
def router(tmp_path_factory):
    process, host, port = start_router(tmp_path_factory.mktemp("router"))
    yield host, port
    process.stdin.close()  # its keeper ends it
    process.wait()


@pytest.fixture
def servers(tmp_path, router):
    """Two servers that the router lists."""
    host, port = router
    engines = [StandInEngine(import_s=0, load_s=0, log_dir=tmp_path) for _ in range(2)]
    urls = [engine.init() for engine in engines]
    for url in urls:
        ask(f"http://{host}:{port}/workers", {"url": url, "worker_type": "regular"})
    wait_until(lambda: listed(router) >= set(urls), what="the registration of the servers")
    yield engines, urls
    for engine in engines:
        engine.shutdown()
    for url in urls:
        remove_worker(host, port, url, timeout_s=10)


def listed(router):
    host, port = router
    return {worker["url"] for worker in ask(f"http://{host}:{port}/workers")["workers"]}


def test_a_dead_server_goes_off_the_list_and_the_others_stay(router, servers):
    host, port = router
    engines, urls = servers
    engines[0].shutdown()
    assert remove_worker(host, port, urls[0], timeout_s=10)
    assert listed(router) == {urls[1]}
    body = {"text": "hello", "sampling_params": {"max_new_tokens": 3}}
    for _ in range(3):
        assert ask(f"http://{host}:{port}/generate", body)["meta_info"]["completion_tokens"] == 3


def test_a_server_that_the_router_does_not_know_is_no_error(router):
    assert not remove_worker(*router, "http://127.0.0.1:1", timeout_s=10)


def test_a_proxy_in_the_environment_is_not_asked(router, servers, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    assert remove_worker(*router, servers[1][0], timeout_s=10)


def test_a_router_that_is_gone_or_silent_is_an_error_within_the_time():
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        port = silent.getsockname()[1]
        with pytest.raises(RouterError, match="refused"):
            remove_worker("127.0.0.1", port, "http://127.0.0.1:1", timeout_s=10)
        silent.listen()
        began = time.monotonic()
        with pytest.raises(RouterError, match="GET"):
            remove_worker("127.0.0.1", port, "http://127.0.0.1:1", timeout_s=0.5)
        assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    ("listing", "complaint", "asked", "timeout_s"),
    [
        (b"hello", "no list of workers", [], 30),
        (b"{}", "no list of workers", [], 30),
        (b'{"workers": [{}]}', "no list of workers", [], 30),
        (b'{"workers": [{"id": "a/b", "url": "http://x"}]}', "the time is up|timed out", ["/workers/a%2Fb"], 4),
    ],
)
def test_a_router_that_answers_otherwise_is_an_error_within_the_time(listing, complaint, asked, timeout_s):
    deleted = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(listing)

        def do_DELETE(self):
            deleted.append(self.path)
            self.send_response(202)
            self.end_headers()

    with serving(Handler) as server, pytest.raises(RouterError, match=complaint):
        remove_worker("127.0.0.1", server.server_port, "http://x", timeout_s=timeout_s)
    assert deleted == asked


@pytest.mark.ray
def test_the_router_does_not_outlive_whoever_started_it(tmp_path):
    child = os.fork()
    if child == 0:
        try:
            _, _, port = start_router(tmp_path)
            (tmp_path / "port").write_text(str(port))
            signal.pause()
        finally:
            os._exit(1)
    try:
        wait_until(lambda: (tmp_path / "port").exists() and (tmp_path / "port").read_text(), what="the router")
        url = f"http://127.0.0.1:{(tmp_path / 'port').read_text()}/workers"
        assert ask(url)["workers"] == []
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)

    def is_gone():
        try:
            ask(url, timeout_s=1)
        except OSError:
            return True
        return False

    wait_until(is_gone, what="the end of the router")
