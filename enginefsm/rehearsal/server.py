"""A model server in a child process: launched, watched while it starts, asked over HTTP, and ended with its owner.

`ServerEngine` is the base class of `SGLangEngine` and `StandInEngine`, which differ in the program that they launch.
"""

from __future__ import annotations

import contextlib
import errno
import http.client
import json
import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LOOPBACK = "127.0.0.1"

_KEEPER = Path(__file__).parent / "children" / "keeper.py"
_POLL_INTERVAL_S = 0.1
# As long as SGLang itself takes to find that its scheduler does not answer.
_STARTUP_PROBE_TIMEOUT_S = 20.0
_STOP_TIMEOUT_S = 10.0
_LOG_TAIL_LINES = 20
_LOG_TAIL_BYTES = 64 * 1024
_WILDCARDS = {"0.0.0.0": LOOPBACK, "::": "::1"}  # noqa: S104 (asked at the loopback, not bound)


class ServerStartError(RuntimeError):
    """A server that did not start: it exited, was shut down, ran into the deadline, or its port was in use.

    `exit_code` is the server's (negative: the signal that killed it), or None where it did not exit by itself.
    """

    def __init__(self, message: str, exit_code: int | None = None) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class ServerRequestError(RuntimeError):
    """A server that gave no answer to a request, or an error status instead of one."""


@dataclass(frozen=True, slots=True)
class Program:
    """What to launch: the command, the settings that it reads as JSON from its standard input, and its environment."""

    command: Sequence[str]
    settings: Mapping[str, object]
    env: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Address:
    host: str
    port: int

    def __str__(self) -> str:
        return f"http://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"


class _ServerProcess:
    """A program under a keeper, which ends the program's whole process tree with this process or on `stop`."""

    def __init__(self, program: Program, log_path: Path) -> None:
        self.log_path = log_path
        self.stopped = False
        log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)
        try:
            self._keeper = subprocess.Popen(
                [sys.executable, "-I", "-S", str(_KEEPER), str(os.getpid()), *program.command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, **program.env},
                start_new_session=True,  # a Ctrl-C on the terminal is for the owner to act on
            )
        finally:
            os.close(log)
        assert self._keeper.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # a keeper that ended at once is seen as an exit
            self._keeper.stdin.write(json.dumps(program.settings).encode() + b"\n")
            self._keeper.stdin.flush()

    def wait_for_exit(self, timeout_s: float) -> bool:
        try:
            self._keeper.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return False
        return True

    @property
    def exited(self) -> bool:
        return self._keeper.poll() is not None

    def read_exit_code(self) -> int | None:
        """Give the exit code of a server that exited by itself. To be called once, after the exit."""
        assert self._keeper.stdout is not None
        code = self._keeper.stdout.read()
        return int(code) if code else None

    def log_tail(self) -> str:
        try:
            with self.log_path.open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - _LOG_TAIL_BYTES))
                lines = file.read().decode(errors="replace").rstrip().split("\n")
        except OSError as error:  # temporary files get cleaned up; what happened to the server is still to be told
            return f"  (cannot be read: {error.strerror})"
        # Of a progress bar, only what a terminal would show last.
        return "\n".join(f"  {line.rstrip().rpartition(chr(13))[2]}" for line in lines[-_LOG_TAIL_LINES:])

    def stop(self) -> None:
        self.stopped = True
        assert self._keeper.stdin is not None
        self._keeper.stdin.close()
        if not self.wait_for_exit(_STOP_TIMEOUT_S):
            self._keeper.kill()  # somebody froze the keeper: the kernel kills the server when the keeper dies
            self._keeper.wait()


class ServerEngine(ABC):
    """A model server in a child process, behind the methods that an engine actor has in RL frameworks.

    A plain class: use it through ``ray.remote`` or by itself. The server never outlives the process that launched it,
    however that process ends.

    Args:
        startup_deadline_s: how long the server may take until it is healthy, in seconds.
        env: environment variables for the server, over those of this process.
        log_dir: where each launch makes a private directory (mode 0700) that holds the server's log, ``server.log``
            (0600); by default the system's directory for temporary files. Logs are kept after the server's end.

    Raises:
        ValueError: the deadline is not a positive, finite number.
    """

    def __init__(
        self,
        *,
        startup_deadline_s: float = 1800.0,
        env: Mapping[str, str] | None = None,
        log_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        check_seconds("startup_deadline_s", startup_deadline_s)
        self._startup_deadline_s = startup_deadline_s
        self._env = dict(env or {})
        self._log_dir = log_dir
        self._lock = threading.Lock()
        self._process: _ServerProcess | None = None
        self._address: _Address | None = None  # of a server that has been healthy

    @abstractmethod
    def _program(self, host: str, port: int, directory: Path) -> Program:
        """Say what to launch. The directory is private to this launch."""

    def _headers(self) -> dict[str, str]:
        return {}

    def init(self, port: int | None = None, host: str = LOOPBACK) -> str:
        """Launch the server, wait until it is healthy, and return its base URL.

        Args:
            port: the TCP port to serve on; None takes a free one.
            host: the address of this machine to serve on. For 0.0.0.0 and ::, the URL is that of the loopback.

        Raises:
            TypeError, ValueError: the port is not an int from 1 to 65535, or the host not an address of this machine.
            ServerStartError: the port is in use, the server exited while it started (with its exit code and the tail
                of its log), it was not healthy by the deadline, or `shutdown` was called meanwhile.
            RuntimeError: this engine has a server already.
        """
        with contextlib.ExitStack() as until_healthy:
            with self._lock:
                if self._process is not None and not self._process.exited:
                    raise RuntimeError(
                        f"this engine already has a server ({self._address or 'still starting'}): "
                        "call shutdown() before another init()"
                    )
                port = until_healthy.enter_context(_reserved_port(host, port))
                directory = Path(tempfile.mkdtemp(prefix="enginefsm-", dir=self._log_dir))
                program = self._program(host, port, directory)
                process = _ServerProcess(program, directory / "server.log")
                self._process, self._address = process, None
            address = _Address(_WILDCARDS.get(host, host), port)
            try:
                self._wait_until_healthy(process, address)
                with self._lock:
                    if process.stopped:
                        raise _shut_down(address)
                    self._address = address
            except BaseException:
                process.stop()
                raise
        return str(address)

    def _wait_until_healthy(self, process: _ServerProcess, address: _Address) -> None:
        began = time.monotonic()
        while True:
            elapsed_s = time.monotonic() - began
            exited = process.exited
            if process.stopped:  # looked at after the exit, which may be its consequence
                raise _shut_down(address)
            if exited:
                exit_code = process.read_exit_code()
                raise ServerStartError(
                    f"the server for {address} {_how_it_ended(exit_code)} after {elapsed_s:.1f} s, before it was "
                    f"healthy. Put right what its log says, then launch it again. {_quoted_log(process)}",
                    exit_code,
                )
            remaining_s = self._startup_deadline_s - elapsed_s
            if remaining_s <= 0:
                raise ServerStartError(
                    f"the server for {address} was not healthy within {self._startup_deadline_s:g} s and was ended. "
                    f"If it only needs longer, raise startup_deadline_s. {_quoted_log(process)}"
                )
            if self._is_healthy(address, min(remaining_s, _STARTUP_PROBE_TIMEOUT_S)):
                return
            process.wait_for_exit(min(remaining_s, _POLL_INTERVAL_S))

    def url(self) -> str | None:
        """Give the server's base URL, or None where no server has become healthy since the last `init`."""
        address = self._address
        return str(address) if address else None

    def health_generate(self, timeout_s: float = 5.0) -> bool:
        """Say whether the server is up and answers ``/health_generate`` with success within `timeout_s` seconds.

        Raises:
            ValueError: the timeout is not a positive, finite number.
        """
        check_seconds("timeout_s", timeout_s)
        address = self._address
        return address is not None and self._is_healthy(address, timeout_s)

    def generate(
        self,
        prompt: str,
        sampling_params: Mapping[str, object] | None = None,
        *,
        timeout_s: float = 600.0,
    ) -> dict[str, Any]:
        """Complete the prompt and return the server's JSON: ``text``, ``meta_info`` and what else it sends.

        Args:
            prompt: the text to complete.
            sampling_params: as SGLang names them, for example ``{"max_new_tokens": 8, "temperature": 0}``.
            timeout_s: how long the server may be silent, in seconds.

        Raises:
            ServerRequestError: there is no server, it did not answer, or it answered with an error status.
            ValueError: the timeout is not a positive, finite number.
        """
        check_seconds("timeout_s", timeout_s)
        address, process = self._address, self._process
        if address is None or process is None:
            raise ServerRequestError("this engine has no server that is up: call init() first")
        request = json.dumps({"text": prompt, "sampling_params": dict(sampling_params or {})}).encode()
        try:
            status, body = self._ask(address, "POST", "/generate", timeout_s, request)
        except (OSError, http.client.HTTPException) as error:
            state = "has exited: shutdown(), then init()" if process.exited else "still runs"
            raise ServerRequestError(
                f"no answer from {address}/generate ({error!r}). The server's process {state}. Its log is "
                f"{process.log_path}"
            ) from error
        if status != http.HTTPStatus.OK:
            raise ServerRequestError(f"{address}/generate answered {status}: {body.decode(errors='replace')}")
        answer: dict[str, Any] = json.loads(body)
        return answer

    def shutdown(self) -> None:
        """End the server with all its child processes. Without a server, or called again, it does nothing."""
        with self._lock:
            process = self._process
            self._process = self._address = None
        if process is not None:
            process.stop()

    def _is_healthy(self, address: _Address, timeout_s: float) -> bool:
        try:
            status, _ = self._ask(address, "GET", "/health_generate", timeout_s)
        except (OSError, http.client.HTTPException):
            return False
        return status == http.HTTPStatus.OK

    def _ask(
        self, address: _Address, method: str, path: str, timeout_s: float, body: bytes | None = None
    ) -> tuple[int, bytes]:
        # http.client, unlike urllib.request, knows no proxies: the server is on this machine.
        connection = http.client.HTTPConnection(address.host, address.port, timeout=timeout_s)
        with contextlib.closing(connection):
            connection.request(method, path, body, {"Content-Type": "application/json", **self._headers()})
            response = connection.getresponse()
            return response.status, response.read()


def check_seconds(name: str, value: float) -> None:
    """Raise ValueError unless `value` is a positive, finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not (0 < value < math.inf):
        raise ValueError(f"{name} must be a positive, finite number of seconds, not {value!r}")


@contextlib.contextmanager
def _reserved_port(host: str, port: int | None) -> Iterator[int]:
    """Check the address and hold the port, so that nobody else on this machine is given it while the server loads.

    SGLang listens only after it has loaded, many seconds later. A socket that is bound with SO_REUSEADDR but does not
    listen keeps the kernel from handing the port to others, and lets a server bind it that sets the same option.
    """
    if not isinstance(host, str) or not host:
        raise TypeError(f"host must be a name or an address of this machine, not {host!r}")
    if port is not None and (isinstance(port, bool) or not isinstance(port, int)):
        raise TypeError(f"port must be an int, or None for a free one, not {port!r}")
    if port is not None and not 1 <= port <= 65535:
        raise ValueError(f"port must be from 1 to 65535, or None for a free one, not {port}")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port or 0, type=socket.SOCK_STREAM)[0]
    except (socket.gaierror, UnicodeError) as error:
        raise ValueError(
            f"host {host!r} does not resolve ({error}): give a name or an address of this machine"
        ) from error
    in_use = (
        f"port {port} on {host} is in use: stop what listens there, choose another port, or give port=None for a "
        "free one"
    )
    with socket.socket(family, socket.SOCK_STREAM) as held, socket.socket(socket.AF_UNIX) as claim:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            held.bind(address)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise ServerStartError(in_use) from error
            raise ValueError(f"cannot serve on {host} port {port} of this machine: {error.strerror}") from error
        port = held.getsockname()[1]
        # Two engines may both hold the port as above: then the second would take the first's server for its own. An
        # abstract name can be bound once, and goes with the socket.
        try:
            claim.bind(f"\0enginefsm-port-{port}")
        except OSError as error:
            raise ServerStartError(f"{in_use} (another engine is starting a server there)") from error
        yield port


def _how_it_ended(exit_code: int | None) -> str:
    if exit_code is None:
        return "ended because its keeper process was killed"
    if exit_code < 0:
        return f"was killed by {signal.Signals(-exit_code).name} (exit code {exit_code})"
    return f"exited with code {exit_code}"


def _quoted_log(process: _ServerProcess) -> str:
    return f"The end of {process.log_path}:\n{process.log_tail()}"


def _shut_down(address: _Address) -> ServerStartError:
    return ServerStartError(f"the server for {address} was ended by shutdown() while init() waited for it to start")
