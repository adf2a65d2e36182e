"""Prometheus, Alertmanager and the push gateway as Debian ships them, on loopback, and a webhook behind them.

Each is a context manager that starts its process on a free port, waits until it says that it is ready, and stops it by
its process id. A server that is not installed fails the test that asks for it.
"""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import yaml

from support.engines import wait_until


def get(url, timeout_s=30):
    with urllib.request.urlopen(url, timeout=timeout_s) as answer:
        return answer.read().decode()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def serving(handler):
    """An HTTP server on a free port, until the end of the block: then its port refuses. It logs nothing."""
    handler.log_message = lambda *_: None
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def answers(url):
    try:
        get(url, timeout_s=2)
    except (urllib.error.URLError, OSError):
        return False
    return True


@contextlib.contextmanager
def running(directory, command, ready):
    """`command(port)` run on a free port until `ready`, a path, is served; gives the base of its addresses."""
    program = command(0)[0]
    for _ in range(5):  # another process may take the port between its choice and its use
        port = free_port()
        url = f"http://127.0.0.1:{port}"
        log = directory / f"{program}.log"
        with log.open("ab") as output:
            process = subprocess.Popen(command(port), stdout=output, stderr=subprocess.STDOUT)
        try:
            wait_until(lambda p=process, u=url: p.poll() is not None or answers(u + ready), what=f"{program} on {url}")
            if process.poll() is None:
                yield url
                return
        finally:
            process.terminate()
            process.wait()
        assert "address already in use" in log.read_text(), log.read_text()
    raise AssertionError(f"no port for {program}")


class Prometheus:
    """The HTTP API of a running Prometheus."""

    def __init__(self, url):
        self.url = url

    def api(self, path, **parameters):
        query = urllib.parse.urlencode(parameters, doseq=True)
        try:
            answer = json.loads(get(f"{self.url}/api/v1/{path}?{query}"))
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{error.read().decode()} for {parameters}") from error
        assert answer["status"] == "success", answer
        return answer["data"]

    def instant(self, expr, at_s=None):
        """[(labels, value)] of an instant query."""
        found = self.api("query", query=expr, **({} if at_s is None else {"time": at_s}))
        assert found["resultType"] == "vector", (expr, found)
        return [(series["metric"], float(series["value"][1])) for series in found["result"]]

    def over(self, expr, start_s, end_s, step_s):
        """[(labels, [(time, value)])] of a range query."""
        found = self.api("query_range", query=expr, start=start_s, end=end_s, step=step_s)["result"]
        return [(series["metric"], [(at_s, float(value)) for at_s, value in series["values"]]) for series in found]

    def wait_for(self, expr, timeout_s=60.0):
        """Poll until an instant query gives something; give it."""
        return wait_until(lambda: self.instant(expr), timeout_s, what=expr)

    def wait_until_gone(self, expr, timeout_s=60.0):
        """Poll until an instant query gives nothing."""
        wait_until(lambda: not self.instant(expr), timeout_s, what=f"the end of {expr}")


@contextlib.contextmanager
def prometheus(directory, config):
    """Prometheus with the configuration file `config`; its data in `directory`."""

    def command(port):
        return [
            "prometheus", f"--config.file={config}", f"--storage.tsdb.path={directory / 'prometheus-data'}",
            f"--web.listen-address=127.0.0.1:{port}", "--log.level=warn",
        ]  # fmt: skip

    with running(directory, command, "/-/ready") as url:
        yield Prometheus(url)


@contextlib.contextmanager
def alertmanager(directory, config):
    """Alertmanager with the configuration file `config`; gives the base of its addresses."""

    def command(port):
        return [
            "prometheus-alertmanager", f"--config.file={config}", f"--storage.path={directory / 'alertmanager-data'}",
            f"--web.listen-address=127.0.0.1:{port}", "--cluster.listen-address=", "--log.level=warn",
        ]  # fmt: skip

    with running(directory, command, "/-/ready") as url:
        yield url


@contextlib.contextmanager
def pushgateway(directory):
    """The push gateway; gives the base of its addresses."""

    def command(port):
        return ["prometheus-pushgateway", f"--web.listen-address=127.0.0.1:{port}", "--log.level=warn"]

    with running(directory, command, "/-/ready") as url:
        yield url


class Webhook:
    """What an Alertmanager told: the alerts, in the order in which they came."""

    def __init__(self, port):
        self.url = f"http://127.0.0.1:{port}/"
        self.alerts = []
        self.came = threading.Condition()

    def take(self, message):
        with self.came:
            self.alerts += [alert | {"came_s": time.time()} for alert in message["alerts"]]
            self.came.notify_all()

    def wait_for(self, name, timeout_s=60.0, status="firing", **labels):
        """The first alert `name` with these labels."""

        wanted = {"alertname": name, **labels}.items()

        def first():
            return next((a for a in self.alerts if a["status"] == status and a["labels"].items() >= wanted), None)

        with self.came:
            assert self.came.wait_for(first, timeout_s), f"no {dict(wanted)} in {timeout_s} s; came: {self.alerts}"
            return first()


@contextlib.contextmanager
def webhook():
    """An HTTP server that Alertmanager can send to."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            told.take(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

    with serving(Handler) as server:
        told = Webhook(server.server_port)
        yield told


def rewrite(path, change):
    """Load a YAML file, have `change` work on what it holds, and store that in its place."""
    settings = yaml.safe_load(path.read_text())
    change(settings)
    path.write_text(yaml.safe_dump(settings))


@contextlib.contextmanager
def monitoring(directory, examples, targets):
    """The example configurations in `examples` run for real, at the pace of a test: everything each second.

    `targets` is a directory, or a file, of file_sd entries. Gives Prometheus and the webhook behind Alertmanager.
    """
    files = targets / "*.json" if targets.is_dir() else targets

    def speed_up(settings):
        settings["global"] |= {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
        for job in settings["scrape_configs"]:
            for discovery in job["file_sd_configs"]:
                discovery |= {"files": [str(files)], "refresh_interval": "1s"}
        settings["alerting"]["alertmanagers"] = [{"static_configs": [{"targets": [manager.removeprefix("http://")]}]}]

    def send_here(settings):
        for receiver in settings["receivers"]:
            for hook in receiver["webhook_configs"]:
                hook["url"] = told.url

    with webhook() as told:
        rewrite(examples / "alertmanager.yml", send_here)
        with alertmanager(directory, examples / "alertmanager.yml") as manager:
            rewrite(examples / "prometheus.yml", speed_up)
            with prometheus(directory, examples / "prometheus.yml") as server:
                yield server, told
