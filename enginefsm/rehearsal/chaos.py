"""Real faults, for rehearsals and tests, in processes of this machine that the caller names. Linux only.

`cut` breaks the connections between two processes, `kill` ends one, `freeze` stops one for a time, and `failing`
makes an engine class that fails by itself. Who may be hit: a Ray actor or task, and what runs below it, such as the
SGLang server of an engine. Every other pid is refused with `NotAnEngineError`, and nothing happens to it.
"""

import asyncio
import atexit
import ctypes
import errno
import functools
import inspect
import ipaddress
import os
import signal
import socket
import threading
import time
import types
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple, Self, TypeVar

try:
    import psutil
except ImportError as missing:
    raise ImportError("enginefsm.rehearsal.chaos needs psutil: pip install 'enginefsm[demo]'") from missing

__all__ = ["Freeze", "NotAnEngineError", "cut", "failing", "freeze", "kill"]

T = TypeVar("T")

# Ray's own processes. Its Python ones are titled as actors and tasks are; which those are is a closed set
# (ray._private.ray_constants, Ray 2.60).
_RAYS_OWN = frozenset(
    {
        "raylet",
        "gcs_server",
        "ray::DashboardAgent",
        "ray::RuntimeEnvAgent",
        "ray::IDLE",
        "ray::IDLE_SpillWorker",
        "ray::IDLE_RestoreWorker",
        "ray::SPILL_SpillWorker",
        "ray::DELETE_SpillWorker",
        "ray::RESTORE_RestoreWorker",
        "ray::DELETE_RestoreWorker",
    }
)

_SYS_PIDFD_GETFD = 438  # one number on x86_64 and aarch64
_libc = ctypes.CDLL(None, use_errno=True)


class NotAnEngineError(ValueError):
    """The pid is not that of an engine's or a manager's process; nothing was done to it."""


class _Pair(NamedTuple):
    """The two addresses of a TCP connection, as the process `here` sees them."""

    here: tuple[str, int]
    there: tuple[str, int]


def cut(pid: int, peer: int | None = None) -> int:
    """Shut down every established TCP connection between the processes `pid` and `peer`; say how many were cut.

    Both ends see the connection closed, at once and in both directions, and both processes live on. Without `peer`
    it is the calling process; one of the two may be the calling process, whatever it is.

    0 is an answer, not an error: Ray opens a connection when it is first needed, so that two processes may have none
    at this moment. One that ended before it could be cut, or that its other side has not accepted yet, is not counted.

    Raises:
        NotAnEngineError: `pid` or `peer` is neither an engine's, a manager's nor the calling process.
        ValueError: `pid` and `peer` are the same process.
        PermissionError: the sockets of one of the two are out of reach: it is another user's, or neither is the calling
            process, which has no right to trace them.
        OSError: neither is the calling process, and this kernel or sandbox lacks `pidfd_getfd` (Linux 5.6).
    """
    me = os.getpid()
    peer = me if peer is None else peer
    if pid == peer:
        raise ValueError(f"pid {pid} is both sides of the cut: name two processes")
    # The socket of one side is enough; our own is the one that takes no privilege.
    side, other = (peer, pid) if peer == me else (pid, peer)
    cuts = 0
    with _target(side, or_caller=True) as pidfd, _target(other, or_caller=True):
        theirs = {_Pair(pair.there, pair.here) for _, pair in _connections(other)}
        for fd, pair in _connections(side):
            if pair not in theirs:
                continue
            try:
                mine = os.dup(fd) if side == me else _getfd(pidfd, side, fd)
            except OSError as error:
                if error.errno not in (errno.EBADF, errno.ESRCH):
                    raise
                continue  # the connection, or the process, ended first
            cuts += _shut_down(mine, pair)
    return cuts


def kill(pid: int) -> None:
    """Kill the process `pid` (SIGKILL).

    The signal goes to this process alone. From 2.57 on, Ray then kills the process group of the dead actor, so its
    children end too. A child that called `setsid()` survives, and so do all children under older Rays.

    Raises:
        NotAnEngineError: it is neither an engine's nor a manager's, or has ended already.
        PermissionError: it is another user's.
    """
    with _target(pid) as pidfd:
        _signal(pidfd, signal.SIGKILL)


def freeze(pid: int, for_s: float | None = None) -> "Freeze":
    """Stop the process `pid` (SIGSTOP) for `for_s` seconds, or until `thaw()` if None.

    A frozen process keeps its connections and answers nothing. It is thawed at the latest when the calling process
    exits normally. As a context manager, it is thawed when the block is left::

        with freeze(pid): ...

    Raises:
        NotAnEngineError: it is neither an engine's nor a manager's, or has ended already.
        ValueError: it is the calling process, which nothing would be left to thaw; or `for_s` is not a positive time.
        PermissionError: it is another user's.
    """
    if for_s is not None and not 0 < for_s <= threading.TIMEOUT_MAX:
        raise ValueError(f"for_s={for_s!r} is not a positive time in seconds: leave it out to freeze until thaw()")
    if pid == os.getpid():
        raise ValueError(f"pid {pid} is the calling process: frozen, it could not thaw itself")
    with _target(pid) as pidfd:
        _signal(pidfd, signal.SIGSTOP)
        return Freeze(pid, os.dup(pidfd), for_s)


class Freeze:
    """A process that is stopped, until it is thawed. Made by `freeze`.

    Freezes of one process do not add up: the first thaw ends them all.
    """

    def __init__(self, pid: int, pidfd: int, for_s: float | None) -> None:
        self.pid = pid
        # A pidfd is this process for ever, so that a late thaw cannot hit another one that got its pid.
        self._pidfd = pidfd
        self._lock = threading.Lock()
        self._timer: threading.Timer | None = None
        atexit.register(self.thaw)
        if for_s is not None:
            self._timer = threading.Timer(for_s, self.thaw)
            self._timer.daemon = True
            self._timer.start()

    def thaw(self) -> None:
        """Let the process run on (SIGCONT). Once thawed, or once the process is gone, this does nothing."""
        with self._lock:
            pidfd, self._pidfd = self._pidfd, -1
        if pidfd < 0:
            return
        atexit.unregister(self.thaw)
        if self._timer is not None:
            self._timer.cancel()
        try:
            _signal(pidfd, signal.SIGCONT)
        finally:
            os.close(pidfd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.thaw()

    def __repr__(self) -> str:
        return f"<Freeze of pid {self.pid}: {'thawed' if self._pidfd < 0 else 'frozen'}>"


def failing(cls: type[T], method: str = "init", error: BaseException | None = None, after_s: float = 0.0) -> type[T]:
    """Make a subclass of `cls` whose `method` waits `after_s` seconds and raises `error`, instead of what it did.

    For `ray.remote`, which comes after: `ray.remote(failing(Engine, "__init__"))`. The subclass has the name of
    `cls`, and the environment of its actors needs no enginefsm. `error` is a `RuntimeError` if None.

    Raises:
        TypeError: `cls` is not a class, such as what `ray.remote` gives.
        AttributeError: `cls` has no method of this name.
        ValueError: `after_s` is negative.
    """
    if not isinstance(cls, type):
        raise TypeError(f"{cls!r} is not a class: use failing() before ray.remote, as in ray.remote(failing(Engine))")
    if not callable(getattr(cls, method, None)):
        raise AttributeError(f"{cls.__name__} has no method {method!r} that could fail")
    if not after_s >= 0:
        raise ValueError(f"after_s={after_s!r} is not a time in seconds: it is 0 or more")
    original = getattr(cls, method)
    raised = RuntimeError(f"{cls.__name__}.{method} failed by enginefsm.rehearsal.chaos") if error is None else error

    # `wraps` keeps the signature and what @ray.method says, both of which Ray reads.
    @functools.wraps(original)
    def fail(*_: Any, **__: Any) -> None:
        time.sleep(after_s)
        raise raised

    @functools.wraps(original)
    async def fail_async(*_: Any, **__: Any) -> None:
        await asyncio.sleep(after_s)
        raise raised

    # Ray tells an asyncio actor by its coroutine functions.
    body = {
        method: fail_async if inspect.iscoroutinefunction(original) else fail,
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
    }
    return types.new_class(cls.__name__, (cls,), exec_body=lambda namespace: namespace.update(body))


@contextmanager
def _target(pid: int, *, or_caller: bool = False) -> Iterator[int]:
    """Give a pidfd of the process, once it is known to be one that may be hit.

    The pidfd is opened first: should the pid pass to another process in between, it is the old, dead one that is hit.
    """
    if pid <= 0:
        raise _refusal(pid, "not a process")
    try:
        pidfd = os.pidfd_open(pid)
    except OverflowError:
        raise _refusal(pid, "not a process") from None
    except OSError as error:
        # EINVAL, ENOENT: the id of a thread, which is what `ps -L` and threading.get_native_id() give.
        if error.errno not in (errno.ESRCH, errno.EINVAL, errno.ENOENT):
            raise
        raise _refusal(pid, "no process of this machine") from None
    try:
        if not (or_caller and pid == os.getpid()):
            _check(pid)
        yield pidfd
    finally:
        os.close(pidfd)


def _check(pid: int) -> None:
    """Raise unless the process is a Ray actor or task, or runs below one."""
    try:
        process = psutil.Process(pid)
        title = _title(process)
        if process.status() == psutil.STATUS_ZOMBIE:
            raise _refusal(pid, "a process that has ended")
        for each in [process, *process.parents()]:
            name = _title(each)
            # A job that Ray runs for its user is below an actor too, and may start a Ray of its own: what is below a
            # raylet belongs to that raylet.
            if os.path.basename(name) in _RAYS_OWN:
                break
            if name.startswith("ray::") or _is_untitled_worker(each):
                return
    except psutil.NoSuchProcess:
        raise _refusal(pid, "a process that has ended") from None
    raise _refusal(pid, repr(title))


def _is_untitled_worker(process: psutil.Process) -> bool:
    """Return whether the process is a Ray worker that kept its command line.

    Ray cannot always set the title of a process (seen on 2.55.1, in about one actor of a hundred).
    """
    parent = process.parent()
    below_raylet = parent is not None and os.path.basename(_title(parent)) == "raylet"
    return below_raylet and any(
        os.path.basename(word) == "default_worker.py" for word in " ".join(process.cmdline()).split()
    )


def _title(process: psutil.Process) -> str:
    """Give the first word of the command line, which is where Ray puts its titles: `ray::Engine.init`."""
    words = " ".join(process.cmdline()[:1]).split()
    return words[0] if words else process.name()


def _refusal(pid: int, what: str) -> NotAnEngineError:
    return NotAnEngineError(
        f"pid {pid} is {what}, not an engine's or a manager's: name the pid of a Ray actor or task, or of a process "
        "below it (an actor knows its own as os.getpid())"
    )


def _signal(pidfd: int, number: signal.Signals) -> None:
    # A process that ended by itself needs nothing done to it any more.
    with suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, number)


def _connections(pid: int) -> list[tuple[int, _Pair]]:
    """List the established TCP connections of a process, each with its file descriptor there."""
    try:
        connections = psutil.Process(pid).net_connections("tcp")
    except psutil.NoSuchProcess:
        return []
    except psutil.AccessDenied as denied:
        raise _not_permitted(errno.EPERM, pid) from denied
    return [
        (each.fd, _Pair(_address(*each.laddr), _address(*each.raddr)))
        for each in connections
        # psutil gives -1 for a socket whose descriptor it could not find.
        if each.status == psutil.CONN_ESTABLISHED and each.laddr and each.raddr and each.fd >= 0
    ]


def _address(host: str, port: int, *_: object) -> tuple[str, int]:
    """Write an address one way: a socket open to both IPv6 and IPv4 shows a peer of IPv4 as `::ffff:127.0.0.1`."""
    ip = ipaddress.ip_address(host)
    mapped = ip.ipv4_mapped if isinstance(ip, ipaddress.IPv6Address) else None
    return str(mapped or ip), port


def _not_permitted(number: int, pid: int) -> OSError:
    """Give the error for a process whose sockets are out of reach; OSError picks its own subclass by the number."""
    return OSError(
        number,
        f"{os.strerror(number)}: the sockets of pid {pid} are out of reach: they are its user's and root's, and to cut "
        "two other processes takes Linux 5.6 and the right to trace as well (root, CAP_SYS_PTRACE or "
        "kernel.yama.ptrace_scope=0; in a container --cap-add=SYS_PTRACE)",
    )


def _getfd(pidfd: int, pid: int, fd: int) -> int:
    """Duplicate a file descriptor of another process into this one."""
    mine = int(_libc.syscall(_SYS_PIDFD_GETFD, pidfd, fd, 0))
    if mine >= 0:
        return mine
    number = ctypes.get_errno()
    if number in (errno.EPERM, errno.ENOSYS):
        raise _not_permitted(number, pid)
    raise OSError(number, os.strerror(number))


def _shut_down(fd: int, pair: _Pair) -> bool:
    """Shut down the connection behind our duplicate `fd`, which is closed; say whether it still was that one."""
    try:
        connection = socket.socket(fileno=fd)
    except OSError:
        os.close(fd)  # the other process closed it and opened something that is no socket
        return False
    with connection:
        try:
            if _Pair(_address(*connection.getsockname()), _address(*connection.getpeername())) != pair:
                return False
            connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            return False  # ENOTCONN: it ended first
    return True
