"""Engines that tests move by hand, and what exporters say of them."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from enginefsm._engine.proxy import managed
from support.bare_handles import bare_handle


def adopt(monitor, name="one", **labels):
    return monitor.adopt(bare_handle(), name=name, **{"model": "tiny", "worker_type": "regular", **labels})


def move(monitor, engine, *reasons):
    for reason in reasons:
        assert managed(engine).step(reason), f"{engine!r} does not move for {reason}"
    monitor._delivery.deliver()


def samples(text):
    """{(name, labels): value} of a metrics text."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(text, name, **labels):
    """The one sample that has these labels, among others."""
    found = [
        value
        for (named, having), value in samples(text).items()
        if named == name and labels.items() <= dict(having).items()
    ]
    assert len(found) == 1, f"{len(found)} of {name} {labels}"
    return found[0]


def errors_of(monitor, sink):
    return monitor.metrics.registry.get_sample_value(
        "enginefsm_export_errors_total", {"run": monitor.run, "sink": sink}
    )


def without_times(text):
    return {key: None if key[0].endswith("_timestamp_seconds") else one for key, one in samples(text).items()}
