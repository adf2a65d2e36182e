"""An engine without a model, for demonstrations and tests: its server starts up as SGLang's does, in a few seconds."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from enginefsm.rehearsal.server import Program, ServerEngine

_SERVER = Path(__file__).parent / "children" / "standin_server.py"


class StandInEngine(ServerEngine):
    """Has the methods of `enginefsm.rehearsal.sglang.SGLangEngine`, over a small HTTP server that loads nothing.

    Args:
        import_s: how long the server refuses connections, as if it imported SGLang, in seconds.
        load_s: how long it then answers 503, as if it loaded weights, in seconds.
        exit_code: the code, 0 to 255, with which the server exits where it would have become healthy; None: it serves.
        startup_deadline_s, env, log_dir: see `enginefsm.rehearsal.server.ServerEngine`.

    Raises:
        ValueError: a time is negative or not a finite number, or the exit code out of range.
    """

    def __init__(
        self,
        *,
        import_s: float = 0.5,
        load_s: float = 2.0,
        exit_code: int | None = None,
        startup_deadline_s: float = 60.0,
        env: Mapping[str, str] | None = None,
        log_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        super().__init__(startup_deadline_s=startup_deadline_s, env=env, log_dir=log_dir)
        for name, value in (("import_s", import_s), ("load_s", load_s)):
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} must be a finite number of seconds, 0 or more, not {value!r}")
        if exit_code is not None and not 0 <= exit_code <= 255:
            raise ValueError(f"exit_code must be from 0 to 255, or None for a server that serves, not {exit_code!r}")
        self._settings = {"import_s": import_s, "load_s": load_s, "exit_code": exit_code}

    def _program(self, host: str, port: int, directory: Path) -> Program:  # noqa: ARG002 (nothing to keep)
        return Program(
            command=[sys.executable, "-I", "-S", str(_SERVER)],
            settings={"host": host, "port": port, **self._settings},
            env=self._env,
        )
