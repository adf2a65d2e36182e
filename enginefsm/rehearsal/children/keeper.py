"""Runs a server and ends its whole process tree when the owner dies or lets go: ``keeper.py OWNER_PID COMMAND...``.

The owner holds the write end of the keeper's standard input. Its first line is passed on to the server; closing it
asks for the end. The server's exit code goes to standard output, its own output to the keeper's standard error.

Why a process between the two, and not PR_SET_PDEATHSIG in the server: that signal fires when the parent *thread*
ends, and Ray runs an actor's methods in threads. The keeper has one thread, so there the signal is sound. And why not
a watching thread in the server: a server that is frozen, or that holds the interpreter's lock, would not run it.
"""

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36

_libc = ctypes.CDLL(None)


def _children() -> Iterator[int]:
    me = os.getpid()
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            with open(f"/proc/{entry}/stat") as file:
                stat = file.read()
        except OSError:  # it ended between the listing and the reading
            continue
        # The command's name, in parentheses, may hold spaces and parentheses itself.
        if int(stat.rpartition(")")[2].split()[1]) == me:
            yield int(entry)


def _kill_descendants() -> None:
    """Kill children until none is left: as a subreaper, the keeper inherits the children of whatever it kills.

    Only its own children are signalled. Nobody else can reap them, so that none of these pids can have been reused.
    """
    while True:
        for pid in _children():
            os.kill(pid, signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def _run(owner_pid: int, command: list[str]) -> None:
    _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1)
    try:
        owner = os.pidfd_open(owner_pid)
    except ProcessLookupError:
        return
    if os.getppid() != owner_pid:  # the owner died before, and the descriptor may name another process
        return
    settings = sys.stdin.buffer.readline()

    keeper_pid = os.getpid()

    def die_with_keeper() -> None:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != keeper_pid:  # the keeper died before the signal was armed
            os._exit(1)

    server = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=sys.stderr,
        stderr=sys.stderr,
        preexec_fn=die_with_keeper,  # safe here: the keeper has one thread
    )
    exited = os.pidfd_open(server.pid)
    assert server.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # a server that ended at once is reported below
        server.stdin.write(settings)
        server.stdin.close()

    ready, _, _ = select.select([exited, owner, sys.stdin.fileno()], [], [])
    exit_code = server.wait() if exited in ready else None
    _kill_descendants()
    if exit_code is not None:
        with contextlib.suppress(BrokenPipeError):
            print(exit_code, flush=True)  # noqa: T201


if __name__ == "__main__":
    _run(int(sys.argv[1]), sys.argv[2:])
