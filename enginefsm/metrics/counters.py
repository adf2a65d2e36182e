"""Counters and histograms that belong to one process and one monitor, in every environment.

If `PROMETHEUS_MULTIPROC_DIR` is set, as SGLang sets it, the counters of client_python become files. Several processes
and monitors then share them. If that directory is missing, they cannot be created. So enginefsm counts by itself, and
uses only the metric families of client_python.
"""

from __future__ import annotations

import bisect
import itertools
import threading
from collections.abc import Iterator, Sequence

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

Key = tuple[str, ...]


class Counts(Collector):
    """A counter with labels."""

    def __init__(self, name: str, text: str, labels: Sequence[str]) -> None:
        self._about = (name, text)
        self._labels = tuple(labels)
        self._lock = threading.Lock()
        self._counts: dict[Key, float] = {}

    def begin(self, *key: str) -> None:
        """Begin the counter of these labels at 0. Prometheus sees no increase in a counter that begins at 1."""
        with self._lock:
            self._counts.setdefault(key, 0.0)

    def add(self, *key: str) -> None:
        """Add one to the counter of these labels."""
        with self._lock:
            self._counts[key] = self._counts.get(key, 0.0) + 1.0

    def collect(self) -> Iterator[Metric]:
        """Yield the counter with its present values."""
        family = CounterMetricFamily(*self._about, labels=self._labels)
        with self._lock:
            for key, count in self._counts.items():
                family.add_metric(key, count)
        yield family


class Durations(Collector):
    """A histogram of seconds with labels."""

    def __init__(self, name: str, text: str, labels: Sequence[str], buckets_s: Sequence[float]) -> None:
        self._about = (name, text)
        self._labels = tuple(labels)
        self._buckets_s = (*buckets_s, float("inf"))
        self._lock = threading.Lock()
        self._counts: dict[Key, list[int]] = {}
        self._sums_s: dict[Key, float] = {}

    def begin(self, *key: str) -> None:
        """Begin the histogram of these labels at 0."""
        with self._lock:
            self._begin(key)

    def observe(self, seconds: float, *key: str) -> None:
        """Add one duration to the histogram of these labels."""
        with self._lock:
            self._begin(key)
            self._counts[key][bisect.bisect_left(self._buckets_s, seconds)] += 1
            self._sums_s[key] += seconds

    def collect(self) -> Iterator[Metric]:
        """Yield the histogram with its present values."""
        family = HistogramMetricFamily(*self._about, labels=self._labels)
        bounds = [floatToGoString(bound) for bound in self._buckets_s]
        with self._lock:
            for key, counts in self._counts.items():
                buckets = list(zip(bounds, itertools.accumulate(counts), strict=True))
                family.add_metric(key, buckets, self._sums_s[key])
        yield family

    def _begin(self, key: Key) -> None:
        if key not in self._counts:
            self._counts[key] = [0] * len(self._buckets_s)
            self._sums_s[key] = 0.0
