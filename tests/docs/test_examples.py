"""The Python in the README and in docs/ runs as it stands, on a real Ray, with small engines in place of SGLang's."""

from __future__ import annotations

import ast
import asyncio
import os
import re
import time
from pathlib import Path

import pytest
import ray
from support.engines import wait_until

import enginefsm

ROOT = Path(__file__).parents[2]
NOT_RUN = {"silent-links.md"}  # its example starts a job's Ray, beside the one of the test


class Engine:
    def pid(self):
        return os.getpid()

    def init(self, port=30000):
        time.sleep(1)
        return port

    def is_up(self):
        return True

    def health_generate(self):
        return True

    def get_url(self):
        return "http://127.0.0.1:1"


class SGLangHttpServer:
    async def launch_server(self):
        return "launched"


def examples():
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        blocks = re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
        for number, code in enumerate(blocks if page.name not in NOT_RUN else ()):
            yield pytest.param(code, id=f"{page.relative_to(ROOT)}-{number}")


class Given:
    """What a page's reader has: each name is made only if the example uses it without making it itself."""

    def __init__(self):
        self.Engine = ray.remote(num_cpus=0)(Engine)
        self.SGLangHttpServer = SGLangHttpServer
        self.name = "default/regular/0"
        self.ray, self.enginefsm = ray, enginefsm

    def __getattr__(self, name):
        make = {
            "handles": lambda: [self.Engine.remote() for _ in range(2)],
            "handle": lambda: self.handles[0],
            "engines": lambda: [
                enginefsm.adopt(handle, name=f"default/regular/{rank}") for rank, handle in enumerate(self.handles)
            ],
            "engine": lambda: self.engines[0],
            "monitor": lambda: self.engine and enginefsm.default_monitor(),
        }.get(name)
        if make is None:
            raise AttributeError(name)
        setattr(self, name, make())
        return getattr(self, name)


def run(code):
    names = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Name)]
    made = {node.id for node in names if isinstance(node.ctx, ast.Store)}
    given = Given()
    scope = {node.id: getattr(given, node.id) for node in names if node.id not in made and hasattr(given, node.id)}
    exec(compile(code, "<example>", "exec"), scope)
    return given, scope


@pytest.fixture(autouse=True)
def nothing_is_exported(cluster, monkeypatch):
    monkeypatch.setenv("ENGINEFSM_EXPORT", "none")
    yield
    enginefsm.default_monitor().close()
    for engine in enginefsm.default_monitor().engines():
        ray.kill(engine.handle)


@pytest.mark.parametrize("code", examples())
def test_an_example_runs(code):
    _, scope = run(code)
    if "results" in scope:
        assert scope["results"] == [30000, 30001]
    if "bring_up" in scope:
        engines = [enginefsm.adopt(Given().Engine.remote(), name=f"{rank}") for rank in range(2)]
        assert asyncio.run(scope["bring_up"](engines)) == [30000, 30001]


def test_the_callback_of_the_example_of_health_checks_lets_go_of_an_engine_that_died():
    [code] = re.findall(
        r"^```python\n(.*?)^```$", (ROOT / "docs/health-checks.md").read_text(), re.MULTILINE | re.DOTALL
    )
    given, _ = run(code)
    enginefsm.get([engine.init.remote() for engine in given.engines])
    ray.kill(given.handles[0])
    wait_until(lambda: enginefsm.default_monitor().engine("default/regular/0") is None, what="the release")
