"""The arguments of a call, kept as they were when the call was made."""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping
from typing import Any

from ray import ObjectRef, cloudpickle
from ray.actor import ActorHandle

_ATOMS = (type(None), bool, int, float, complex, str, bytes, ObjectRef, ActorHandle)


class _Freezer(cloudpickle.CloudPickler):
    """Pickles arguments as they are now. References and handles are kept aside, because Ray counts them."""

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

    Ray copies the arguments of a call. A resubmission must send that copy, and not the list or the settings that the
    caller has changed since. The contents of large buffers (numpy arrays) are shared, not copied.
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
        """Return the values: the positional ones, then those of `keywords`."""
        if self._frozen is None:
            assert self._values is not None
            return self._values
        return tuple(_Thawer(*self._frozen).load())
