"""A ready-made engine class for Ray, for those who have no framework of their own: it serves a model with SGLang.

engine = ray.remote(SGLangEngine).remote({"model_path": "..."})
url = ray.get(engine.init.remote())
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from enginefsm.rehearsal.server import Program, ServerEngine

_SERVER = Path(__file__).parent / "children" / "sglang_server.py"

# Not to be set with these: SGLANG_USE_CPU_ENGINE, which asks for kernels that stock wheels lack.
CPU_ENV: Mapping[str, str] = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "GLOO_SOCKET_IFNAME": "lo"}
"""The environment for a small server on a CPU: one thread, no downloads, the loopback for collectives."""


def cpu_server_args(model_path: str | os.PathLike[str]) -> dict[str, Any]:
    """Give the server arguments that serve a small model on a CPU, to rehearse without a GPU; use them with `CPU_ENV`.

    The model must need no rotary kernel: `enginefsm.rehearsal.tiny_model.make_tiny_model` makes one that does not.
    """
    return {
        "model_path": os.fspath(model_path),
        "device": "cpu",
        "attention_backend": "torch_native",
        "max_total_tokens": 2048,
        "sleep_on_idle": True,
    }


class SGLangEngine(ServerEngine):
    """Serves a model with SGLang in a child process, on one node.

    Args:
        server_args: keyword arguments of SGLang's ``ServerArgs``, at least ``model_path``. Host and port are for
            `init`.
        startup_deadline_s, env, log_dir: see `enginefsm.rehearsal.server.ServerEngine`.

    Raises:
        ValueError: `server_args` lacks ``model_path``, names a host, a port or several nodes, or is not JSON.
    """

    def __init__(
        self,
        server_args: Mapping[str, Any],
        *,
        startup_deadline_s: float = 1800.0,
        env: Mapping[str, str] | None = None,
        log_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        super().__init__(startup_deadline_s=startup_deadline_s, env=env, log_dir=log_dir)
        if not server_args.get("model_path"):
            raise ValueError("server_args has no model_path: give the directory or the name of the model to serve")
        if "host" in server_args or "port" in server_args:
            raise ValueError("server_args must not hold host or port: give them to init()")
        if server_args.get("nnodes", 1) != 1:
            raise ValueError(f"SGLangEngine serves on one node, and server_args asks for {server_args['nnodes']}")
        try:
            json.dumps(dict(server_args))
        except (TypeError, ValueError) as error:
            raise ValueError(f"server_args must hold only what JSON can express: {error}") from error
        self._server_args = dict(server_args)

    def init(self, port: int | None = None, host: str = "127.0.0.1") -> str:
        """As `ServerEngine.init`, and raises ModuleNotFoundError where sglang is not installed."""
        if importlib.util.find_spec("sglang") is None:
            raise ModuleNotFoundError(
                f"sglang is not installed for {sys.executable}: pip install sglang, or, to serve on a CPU, see "
                "tests/requirements-sglang.txt in enginefsm's repository",
                name="sglang",
            )
        return super().init(port, host)

    def _program(self, host: str, port: int, directory: Path) -> Program:
        env = dict(self._env)
        if self._server_args.get("device") == "cpu":
            # A rendezvous by a file, fresh at each launch: servers that start side by side can pick the same port.
            env.setdefault("SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE", (directory / "rendezvous").as_uri())
        return Program(
            command=[sys.executable, "-P", str(_SERVER)],
            settings={**self._server_args, "host": host, "port": port},
            env=env,
        )

    def _headers(self) -> dict[str, str]:
        api_key = self._server_args.get("api_key")
        return {"Authorization": f"Bearer {api_key}"} if api_key else {}
