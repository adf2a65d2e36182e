"""A child process that answers in lines of JSON, within a bound.

Commands talk to Ray in a child: Ray takes minutes to give up a cluster that does not answer, and then ends its process.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, BinaryIO

_CHILDREN = Path(__file__).parent / "children"


class NoAnswerError(Exception):
    """The child did not answer within the bound."""


class EndedError(Exception):
    """The child ended without an answer. The message is the last line that it wrote to standard error."""


class Child:
    """The running program `name` of `enginefsm.cli.children`. Close it after use.

    Args:
        name: The name of the program's file.
        arguments: The program's arguments.
        timeout_s: The bound for each answer, in seconds.
    """

    def __init__(self, name: str, *arguments: str, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._said: BinaryIO = tempfile.TemporaryFile()  # noqa: SIM115  closed by close()
        self._process = subprocess.Popen(
            [sys.executable, _CHILDREN / name, *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said, bufsize=0,
            start_new_session=True,  # a Ctrl-C is for this process
            env={name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"},  # it overrides "auto"
        )  # fmt: skip
        self._unread = b""

    def tell(self, line: object) -> None:
        """Send one line of JSON. A child that has ended shows at the next answer."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(line).encode() + b"\n")

    def answer(self) -> dict[str, Any]:
        """Return the next line that the child writes.

        Raises:
            NoAnswerError: there was none within the bound.
            EndedError: the child ended first.
        """
        assert self._process.stdout is not None
        until = time.monotonic() + self._timeout_s
        while b"\n" not in self._unread:
            left_s = until - time.monotonic()
            if left_s <= 0 or not select.select([self._process.stdout], [], [], left_s)[0]:
                raise NoAnswerError
            read = self._process.stdout.read(1 << 20)
            if not read:
                raise EndedError(self._last_words())
            self._unread += read
        line, _, self._unread = self._unread.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """Kill the child."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._said):
            assert pipe is not None
            pipe.close()

    def _last_words(self) -> str:
        self._said.seek(0)
        lines = self._said.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"Ray ended with exit code {self._process.wait()}"
