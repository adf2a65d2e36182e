"""Calls to an engine that can be submitted again without running twice.

A call travels through Ray's own `__ray_call__` as `_actorside.run_once`, under a number that the actor remembers with
its outcome. Nothing here decides when to submit again: that is the monitor's.
"""

from __future__ import annotations

import functools
import io
import math
import pickle
import queue
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Generator, Mapping
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

import ray
from ray import ObjectRef, cloudpickle
from ray.actor import ActorHandle, ActorMethod
from ray.exceptions import ActorUnavailableError, RayTaskError

from enginefsm._calls import actor_side as _actorside
from enginefsm._ray import handles as _ray_handles

if TYPE_CHECKING:
    from enginefsm._engine.managed import ManagedEngine
    from enginefsm.policy import Outage

# The engine's environment may have no enginefsm.
cloudpickle.register_pickle_by_value(_actorside)
_RUN_ONCE = cloudpickle.dumps(_actorside.run_once)
_RUN_ONCE_ON_LOOP = cloudpickle.dumps(_actorside.run_once_on_loop)


class _Enter:
    """`_actorside.enter`, pickled once instead of at every call."""

    _pickled = cloudpickle.dumps(_actorside.enter)

    def __call__(self, *args: Any) -> Any:
        return _actorside.enter(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        return pickle.loads, (self._pickled,)


_ENTER = _Enter()

LaunchedIf = str | Callable[[Any], Any]
"""A method of the actor, by name, or a function of the actor instance, that says whether the launch succeeded."""


class Awaiter(Protocol):
    """Awaits calls on an event loop. A monitor does."""

    async def gather(self, *calls: Any, timeout: float | None = None) -> list[Any]:
        """Return the values of calls, in their order."""
        ...


_ATOMS = (type(None), bool, int, float, complex, str, bytes, ObjectRef, ActorHandle)


class Ledger:
    """The numbers of one monitor's calls to one actor: which are open, and which the actor may forget."""

    __slots__ = ("_caller", "_lock", "_news", "_next", "_open", "_settled", "answered")

    def __init__(self) -> None:
        self.answered = False
        """Whether the actor has answered a call of this caller's."""
        self._caller = uuid.uuid4().hex
        self._lock = threading.Lock()
        self._next = 0
        self._open: dict[int, weakref.ref[Call]] = {}  # in ascending order, as dicts keep it
        # A garbage-collected call settles itself, at any moment and on any thread, this ledger's lock held or not:
        # a SimpleQueue is made to be put to from there.
        self._settled: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._news: list[int] = []  # settled, and not told to the actor yet

    @property
    def calls(self) -> int:
        """How many calls were made so far."""
        return self._next

    def is_out(self, below: int) -> bool:
        """Whether the actor may be at one of the first `below` calls: it has not ended, and somebody may ask for it."""
        with self._lock:
            self._take_settled()
            known = [call() for number, call in self._open.items() if number < below]
        # Those that were collected meanwhile, or never submitted, keep nobody busy.
        refs = [call.ref for call in known if call is not None and hasattr(call, "ref")]
        # One that nobody has awaited is open, but it may have ended. To ask that does not wait.
        return any(not _has_ended(ref) for ref in refs)

    def open(self, call: Call) -> int:
        """A new number, for this call."""
        with self._lock:
            number = self._next
            self._next += 1
            self._open[number] = weakref.ref(call)
            return number

    def settle(self, number: int) -> None:
        """Nobody will ask for the outcome of call `number` again."""
        self._settled.put(number)

    def header(self) -> tuple[str, tuple[int, tuple[int, ...]]]:
        """The caller's name, and what is settled: every number below the first, and those of the second."""
        with self._lock:
            self._take_settled()
            news, self._news = self._news, []
            below = next(iter(self._open), self._next)
            return self._caller, (below, tuple(number for number in news if number > below))

    def _take_settled(self) -> None:
        while not self._settled.empty():
            self._news.append(self._settled.get())
            self._open.pop(self._news[-1], None)


def _has_ended(ref: ObjectRef[Any]) -> bool:
    if not ray.wait([ref], timeout=0, fetch_local=False)[0]:
        return False
    try:
        ray.get(ref, timeout=0)
    except RayTaskError:
        return True  # the method raised, be it what it heard of a peer
    except ActorUnavailableError:
        return False  # the connection broke: the method may run on
    except Exception:  # noqa: BLE001  whatever it gave, or that it lies elsewhere: it has ended
        return True
    return True


class _Freezer(cloudpickle.CloudPickler):
    """Pickles arguments as they are now. References and handles stay themselves: Ray counts them."""

    def __init__(self, file: io.BytesIO, buffers: list[pickle.PickleBuffer], kept: list[Any]) -> None:
        super().__init__(file, protocol=5, buffer_callback=buffers.append)  # type: ignore[no-untyped-call]
        self._kept = kept

    def persistent_id(self, value: Any) -> int | None:
        if isinstance(value, (ObjectRef, ActorHandle)):
            self._kept.append(value)
            return len(self._kept) - 1
        return None


class _Thawer(pickle.Unpickler):
    def __init__(self, data: bytes, buffers: list[pickle.PickleBuffer], kept: list[Any]) -> None:
        super().__init__(io.BytesIO(data), buffers=buffers)
        self._kept = kept

    def persistent_load(self, key: Any) -> Any:
        return self._kept[key]


class Arguments:
    """Positional and keyword arguments as they were when the call was made.

    Ray takes a copy of what a call is given. A resubmission must send that copy too, not what the caller has made
    of its list or its settings since. The contents of large buffers (numpy arrays) are shared, not copied.
    """

    __slots__ = ("_frozen", "_values", "keywords")

    def __init__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self.keywords = tuple(kwargs)
        self._values: tuple[Any, ...] | None = (*args, *kwargs.values())
        self._frozen: tuple[bytes, list[pickle.PickleBuffer], list[Any]] | None = None
        if not all(type(value) in _ATOMS for value in self._values):
            file, buffers, kept = io.BytesIO(), list[pickle.PickleBuffer](), list[Any]()
            _Freezer(file, buffers, kept).dump(self._values)  # type: ignore[no-untyped-call]
            self._values, self._frozen = None, (file.getvalue(), buffers, kept)

    def values(self) -> tuple[Any, ...]:
        """The values, positional ones first, then those of `keywords`."""
        if self._frozen is None:
            assert self._values is not None
            return self._values
        return tuple(_Thawer(*self._frozen).load())


class Awaited:
    """What `get` waits for: one thing asked of an engine, and asked again when the engine was unavailable.

    Several threads may wait for it at once, and one after another: what must outlive a `get` is kept here.
    """

    __slots__ = (
        "__weakref__", "_left_at", "attempt", "attempts_in_outage", "engine", "failing", "launches", "lock",
        "made_at", "method", "outage", "ref", "reported", "resubmit_at", "submitted_at",
    )  # fmt: skip

    ref: ObjectRef[Any]
    """The reference of its newest submission, for `ray.wait` and the like. If that one fails with
    `ActorUnavailableError`, so does the reference, for ever; `enginefsm.get` goes on."""
    submitted_at: float
    """When its newest submission was made, on the monotonic clock."""

    def __init__(self, engine: ManagedEngine, method: str, *, launches: bool) -> None:
        self.engine = engine
        self.method = method
        self.launches = launches
        """Whether its outcome says if the engine's launch succeeded."""
        self.lock = threading.Lock()
        """Around an outcome and what follows from it."""
        self.made_at = time.monotonic()
        self.attempt = 0
        """How many times it was submitted again."""
        self.reported = -1
        """The newest attempt whose outcome was taken in."""
        self.outage: Outage | None = None
        """The engine's outage in which it failed last, by which `failing` and `attempts_in_outage` go."""
        self.failing: Outage | None = None
        """Since when it has had no answer in that outage."""
        self.attempts_in_outage = 0
        self.resubmit_at: float | None = None
        """When to submit again, on the monotonic clock; None while a submission is out."""
        self._left_at: float | None = None

    @property
    def is_probe(self) -> bool:
        """Whether what is waited for is a probe."""
        return False

    @property
    def is_awaited(self) -> bool:
        """Whether somebody waits for it."""
        return self._left_at is None

    def leave(self) -> None:
        """Nobody waits for it any more, though it has not ended."""
        self._left_at = time.monotonic()

    def take_up(self) -> None:
        """Somebody waits for it. While nobody did, nobody tried, and that time is not held against the engine."""
        with self.lock:
            left_at, self._left_at = self._left_at, None
            if left_at is not None and self.failing is not None:
                self.failing.since += time.monotonic() - left_at

    def is_due(self, now: float) -> bool:
        """Whether it is to be submitted again by now."""
        at = self.resubmit_at  # read once: another thread may submit it at any moment
        return at is not None and at <= now

    def resubmit(self, now: float) -> None:
        """Submit again, if that is due. Raises what Ray raises when it refuses to submit."""
        with self.lock:
            if not self.is_due(now):
                return
            self.attempt += 1
            self.submitted_at = now
            self._submit()
            self.resubmit_at = None

    def settle(self, *, answered: bool) -> None:
        """Its outcome has arrived, from the actor (`answered`) or from Ray."""
        raise NotImplementedError

    def _submit(self) -> None:
        raise NotImplementedError


class Call(Awaited):
    """One call of a method of an engine: what `engine.method.remote(...)` gives, for `enginefsm.get`, or to await.

    It runs at most once in the actor's life, however often it is submitted.
    """

    __slots__ = ("_arguments", "_number", "_options")

    def __init__(self, engine: ManagedEngine, method: str, arguments: Arguments, options: dict[str, Any]) -> None:
        super().__init__(engine, method, launches=method == engine.launch)
        self._arguments: Arguments | None = arguments
        self._options = options
        self._number = engine.ledger.open(self)
        self.submitted_at = self.made_at
        if self.launches:
            engine.launch_called = True
        self._submit()

    def settle(self, *, answered: bool) -> None:
        """Its outcome has arrived, from the actor (`answered`) or from Ray: the actor may forget it."""
        if answered:
            self.engine.ledger.answered = True
        self.engine.ledger.settle(self._number)
        self._arguments = None  # it will not be submitted again

    def _submit(self) -> None:
        arguments = self._arguments
        assert arguments is not None, "a settled call is not submitted again"
        caller, settled = self.engine.ledger.header()
        answered = self.engine.ledger.answered
        header = (caller, self._number, self.attempt, answered, settled, self.method, arguments.keywords)
        on_loop, handle = self.engine.on_loop, self.engine.handle
        method = getattr(handle, _ray_handles.CARRIER) if on_loop else handle.__ray_call__
        submit: Callable[..., Any] = method.options(**self._options).remote
        code = None if answered else _RUN_ONCE_ON_LOOP if on_loop else _RUN_ONCE
        # One argument, not three: Ray pickles each by itself.
        carrier = functools.partial(_ENTER, code, header)
        self.ref = submit(carrier, *arguments.values())

    def __del__(self) -> None:
        # A call that nobody holds any more will not be submitted again.
        if hasattr(self, "_number"):
            self.engine.ledger.settle(self._number)

    def __await__(self) -> Generator[Any, None, Any]:
        """Wait as `EngineMonitor.gather` does, and give the value; again, if awaited again."""
        assert self.engine.awaiter is not None
        [value] = yield from self.engine.awaiter.gather(self).__await__()
        return value

    def __repr__(self) -> str:
        return f"Call({self.engine.name!r}, {self.method!r}, attempt={self.attempt})"

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"{self!r} cannot be sent elsewhere: pass enginefsm.get(call), or call.ref as a plain ObjectRef"
        )


class EngineMethod:
    """A method of an engine. `remote(...)` calls it as on the handle, and gives a `Call`.

    A generator, a method with `num_returns` other than 1, with an invocation decorator of its own or with a tensor
    transport is called as on the handle and gives what the handle gives.
    """

    __slots__ = ("_engine", "_method", "_options")

    def __init__(self, engine: ManagedEngine, method: ActorMethod, options: Mapping[str, Any]) -> None:
        self._engine = engine
        self._method = method
        self._options = options

    def options(self, **options: Any) -> EngineMethod:
        """The same method with Ray's per-call options, as `ActorMethod.options`."""
        self._method.options(**options)  # lets Ray refuse what it would refuse
        return EngineMethod(self._engine, self._method, {**self._options, **options})

    def remote(self, *args: Any, **kwargs: Any) -> Any:
        """Call the method. Raises TypeError when the arguments do not fit its signature."""
        method, options = self._method, self._options
        if not _ray_handles.is_plain(method, options):
            return method.options(**options).remote(*args, **kwargs)
        handle, name = self._engine.handle, _ray_handles.method_name(method)
        title = f"{_ray_handles.class_name(handle)}.{name}"
        signature = _ray_handles.signature(method)
        if signature is not None:
            try:
                signature.bind(*args, **kwargs)
            except TypeError as error:
                raise TypeError(f"{title}: {error}") from None
        carrier = {
            "name": title,
            "concurrency_group": _ray_handles.concurrency_group(handle, name),
            # A retry of Ray's own would run the method again in a restarted actor.
            "max_task_retries": 0,
            "retry_exceptions": False,
            **options,
        }
        return Call(self._engine, name, Arguments(args, kwargs), carrier)

    def __call__(self, *_args: Any, **_kwargs: Any) -> NoReturn:
        """Refuse, as Ray does: a method of an actor is called through `remote`."""
        name = _ray_handles.method_name(self._method)
        raise TypeError(f"Actor methods cannot be called directly: use engine.{name}.remote(...)")

    def __repr__(self) -> str:
        return f"EngineMethod({self._engine.name!r}, {_ray_handles.method_name(self._method)!r})"


class PlainRef(Awaited):
    """A plain ObjectRef of an adopted actor. Once failed it stays so; a launch is then asked after by probes."""

    __slots__ = ("_given", "_probe", "_value", "lost")

    def __init__(self, engine: ManagedEngine, ref: ObjectRef[Any]) -> None:
        # Ray does not tell which method a reference is of. While an engine launches, and its launch was not called
        # through the engine itself, a plain reference is taken for the launch.
        launches = engine.is_launching and not engine.launch_called
        super().__init__(engine, engine.launch if launches else "(reference)", launches=launches)
        # One that is complete already may be of any time, and says nothing of an outage that goes on.
        is_old = bool(ray.wait([ref], timeout=0)[0])
        self.submitted_at = -math.inf if is_old else self.made_at
        self.ref = ref
        self.lost = False
        """Whether the reference itself has failed; from then on it is probes that are waited for, if there are any."""
        self._given = ref
        self._probe: Call | None = None
        self._value: list[Any] = []

    @property
    def is_probe(self) -> bool:
        """Whether what is waited for is a probe."""
        return self._probe is not None

    @property
    def given(self) -> str:
        """The id of the reference given."""
        return str(self._given.hex())

    @property
    def can_be_probed(self) -> bool:
        """Whether there is a way to ask whether the launch succeeded."""
        return self.launches and self.engine.launched_if is not None

    @property
    def recovered(self) -> list[Any]:
        """What a probe gave instead of the lost value: one value, or none yet."""
        return self._value

    def recover(self, value: Any) -> None:
        """A probe has said that the launch succeeded, and gave `value`."""
        self._value = [value]

    def settle(self, *, answered: bool) -> None:
        """Its outcome has arrived, from the actor (`answered`) or from Ray."""
        if self._probe is not None:
            self._probe.settle(answered=answered)

    def _submit(self) -> None:
        engine, ask = self.engine, self.engine.launched_if
        by_name, args = (ask, ()) if isinstance(ask, str) else ("__ray_call__", (ask,))
        self._probe = EngineMethod(engine, getattr(engine.handle, by_name), {}).remote(*args)
        self.ref = self._probe.ref


def says_restarted(exception: Exception) -> bool:
    """Whether the actor answered that it is a new process, which knows nothing of what the caller did before."""
    return _cause_says(exception, _actorside.RESTARTED)


def says_dropped(exception: Exception) -> bool:
    """Whether the actor answered that it no longer has the outcome of the call."""
    return _cause_says(exception, _actorside.DROPPED)


def _cause_says(exception: Exception, text: str) -> bool:
    cause = exception.cause if isinstance(exception, RayTaskError) else None
    return isinstance(cause, RuntimeError) and cause.args[:1] == (text,)
