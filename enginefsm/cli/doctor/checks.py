"""Judges the facts: one small function a row, without any I/O."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from enum import StrEnum

from prometheus_client.parser import text_string_to_metric_families

from enginefsm._ray import keepalive, versions
from enginefsm.cli.doctor.facts import Facts
from enginefsm.cli.times import duration

CLOCKS_APART_S = 2.0
"""Clocks may differ by this much: more bends the ages and times in tables and alerts."""
REPORT_TAKES_S = 25.0
"""A report of a monitor may take this long to arrive, while the hub starts on a busy machine."""
_NAMED = 5


class Verdict(StrEnum):
    """Whether something needs doing."""

    OK = "ok"
    NOTE = "note"
    """Worth knowing; nothing needs doing."""
    UNKNOWN = "unknown"
    """The doctor could not see it from here."""
    ATTENTION = "attention"
    """Something needs doing."""


@dataclasses.dataclass(frozen=True, slots=True)
class Finding:
    """One row."""

    check: str
    verdict: Verdict
    found: str
    meaning: str
    advice: str = ""
    """What to do; empty if nothing needs doing."""


def diagnose(facts: Facts) -> list[Finding]:
    """Return a finding for each check, in the order in which they are shown."""
    return [check(facts) for check in CHECKS]


def exit_code_is_ok(findings: Iterable[Finding]) -> bool:
    """Return whether nothing needs doing."""
    return all(finding.verdict is not Verdict.ATTENTION for finding in findings)


def cluster(facts: Facts) -> Finding:
    """Say whether there is a cluster, and how many of its nodes live."""
    row = "cluster"
    if facts.cluster is None:
        if not facts.cluster_problem:
            return Finding(
                row, Verdict.UNKNOWN, "not asked: --address names a hub",
                "Rows about the cluster's nodes stay open.", "Name the cluster as well: --address HOST:PORT.",
            )  # fmt: skip
        return Finding(
            row, Verdict.ATTENTION, facts.cluster_problem, "Ray does not run here, or its control plane is down.",
            "Run the doctor on a node of the cluster, or name the cluster: --address HOST:PORT.",
        )  # fmt: skip
    dead = len(facts.cluster.nodes) - facts.cluster.alive
    return Finding(
        row, Verdict.OK, f"{facts.cluster.address}, {_count(facts.cluster.alive, 'node')} alive"
        + (f", {dead} gone" if dead else ""),
        "Ray's control plane answers.",
    )  # fmt: skip


def agreement(facts: Facts) -> Finding:
    """Say whether everyone runs the same Python, Ray and enginefsm."""
    here = facts.here
    ours = f"Python {here.python}, Ray {here.ray}, enginefsm {here.enginefsm}"
    others: dict[str, list[str]] = {}

    def compare(who: str, what: str, theirs: str | None, mine: str) -> None:
        if theirs is not None and theirs != mine:
            others.setdefault(f"{what} {theirs}", []).append(who)

    if facts.cluster is not None:
        compare("the head node", "Ray", facts.cluster.ray, here.ray)
        compare("the head node", "Python", facts.cluster.python, here.python)
    if facts.hub is not None:
        compare("the hub", "enginefsm", facts.hub.fleet["hub"].get("enginefsm"), here.enginefsm)
        for run, manager in facts.hub.managers:
            who = f"the monitor of run {run['run']!r} on {manager['host']}"
            compare(who, "enginefsm", manager["version"], here.enginefsm)
            compare(who, "Ray", manager["ray_version"], here.ray)
            compare(who, "Python", manager.get("python"), here.python)
    if others:
        return Finding(
            "versions", Verdict.ATTENTION,
            f"here {ours}; but {'; '.join(f'{what} at {_names(who)}' for what, who in others.items())}",
            "Ray and pickled calls need one Python and one Ray in a cluster. The hub and its monitors may "
            "misunderstand each other.",
            "Install the same versions on all nodes, and start the job again.",
        )  # fmt: skip
    if facts.cluster is None and facts.hub is None:
        return Finding("versions", Verdict.UNKNOWN, f"here {ours}", "There is nobody to compare with.")
    return Finding(
        "versions", Verdict.OK, ours,
        "Nobody who was asked says otherwise. Ray itself refuses a node with another Ray.",
    )  # fmt: skip


def tested(facts: Facts) -> Finding:
    """Say whether enginefsm was tested with this Ray."""
    here = facts.here.ray
    if here in versions.TESTED:
        return Finding("tested Ray", Verdict.OK, f"Ray {here}", "enginefsm's tests run on this Ray.")
    if here in versions.INSTALLED:
        return Finding("tested Ray", Verdict.OK, f"Ray {here}", "enginefsm's demo and type checks run on this Ray.")
    lowest, highest = versions.numbers(versions.TESTED[0]), versions.numbers(versions.TESTED[-1])
    if lowest <= versions.numbers(here) <= highest:
        return Finding(
            "tested Ray", Verdict.NOTE, f"Ray {here}, between tested versions",
            f"The tests run on {', '.join(versions.TESTED)}. A version in between should behave as they do.",
        )  # fmt: skip
    return Finding(
        "tested Ray", Verdict.ATTENTION, f"Ray {here}, outside the tested range",
        f"The tests run on {', '.join(versions.TESTED)}. Another Ray may report faults in another way.",
        "Use a tested Ray, or run enginefsm's tests on this one: bash tests/matrix.",
    )  # fmt: skip


def silent_links(facts: Facts) -> Finding:
    """Say whether Ray notices soon that a link between hosts is silent."""
    row = "silent links"
    if facts.hub is not None and (told := [m for m in facts.hub.managers if m[1].get("silent_link_s") is not None]):
        slow = [
            f"run {run['run']!r} on {manager['host']}, pid {manager['pid']}"
            for run, manager in told
            if not keepalive.is_soon(manager["silent_link_s"])
        ]
        times_s = [manager["silent_link_s"] for _, manager in told]
        longest_s = keepalive.NEVER_S if keepalive.NEVER_S in times_s else max(times_s)
        whose = f"{_count(len(told), 'monitor')} of the hub" if not slow else f"the monitor of {_names(slow)}"
    else:
        told = []
        longest_s, whose = facts.here.silent_link_s, "this process"
        slow = [] if keepalive.is_soon(longest_s) else [whose]
    found = f"{'never noticed' if longest_s == keepalive.NEVER_S else f'noticed within {longest_s:g} s'} by {whose}"
    if not slow:
        return Finding(row, Verdict.OK, found, "Ray's gRPC keepalive is on: a silent link costs seconds.")
    if not told:
        return Finding(
            row, Verdict.NOTE, found, "No monitor told the hub of its Ray. This is the doctor's own process."
        )
    if facts.cluster is not None and facts.cluster.alive < 2:
        return Finding(
            row, Verdict.NOTE, found, "Ray's gRPC keepalive is off. On one node there is no link that could go silent."
        )
    variables = " ".join(f"{name}={value}" for name, value in keepalive.VARIABLES.items())
    return Finding(
        row, Verdict.ATTENTION, found,
        "A link between hosts that drops packets in silence delays results by minutes.",
        f"Set {variables} before ray.init in that process, or give its actor runtime_env=enginefsm.runtime_env().",
    )  # fmt: skip


def hub(facts: Facts) -> Finding:
    """Say whether the hub is up, and where."""
    row, nobody = "hub", "Nobody outside the job sees states, metrics and alerts."
    if facts.hub is not None:
        about = facts.hub.fleet["hub"]
        if about.get("problem"):
            return Finding(
                row, Verdict.ATTENTION, f"pid {about.get('pid')} on {about.get('node_ip')}: {about['problem']}",
                "The hub has what the monitors sent, and cannot serve all of it.", "Do what the hub's text says.",
            )  # fmt: skip
        runs = facts.hub.fleet["runs"]
        where = facts.hub_host or about.get("node_ip")
        return Finding(
            row, Verdict.OK, f"up for {duration(facts.hub.fleet['now_s'] - about['started_s'])} on {where}, "
            f"pid {about.get('pid')}, {_count(len(runs), 'run')}",
            "The monitors' metrics outlive their processes.",
        )  # fmt: skip
    if facts.cluster is None and facts.cluster_problem:
        return Finding(
            row, Verdict.UNKNOWN, facts.hub_problem or "not found", "Without the cluster it cannot be found."
        )
    if facts.cluster is None:
        return Finding(
            row, Verdict.ATTENTION, facts.hub_problem, nobody,
            "Look whether the hub listens at that address: run the doctor on a node of the cluster, without --address.",
        )  # fmt: skip
    if facts.cluster.hub is not None and not facts.can_join:
        where = f"pid {facts.cluster.hub.pid} on {facts.cluster.hub.ip}"
        return Finding(row, Verdict.UNKNOWN, f"{where}, {facts.hub_problem}", "See the row versions.")
    if facts.cluster.hub is not None:
        return Finding(
            row, Verdict.ATTENTION, facts.hub_problem, f"Its actor lives (pid {facts.cluster.hub.pid} on "
            f"{facts.cluster.hub.ip}), but does not answer. {nobody}",
            "Run the doctor again. If the process hangs, kill it: the next report of a monitor starts another hub.",
        )  # fmt: skip
    return Finding(
        row, Verdict.ATTENTION, "the cluster has no hub" + (f"; {facts.hub_problem}" if facts.hub_problem else ""),
        f"No monitor exports to a hub, or the hub died and no monitor is left. {nobody}",
        "Start a job, or check that ENGINEFSM_EXPORT of the job is unset or contains hub.",
    )  # fmt: skip


def scraping(facts: Facts) -> Finding:
    """Say whether the hub's address can be reached and scraped."""
    row = "scraping"
    if facts.hub is None:
        return Finding(row, Verdict.UNKNOWN, "no hub answers", "See the row hub.")
    address = facts.hub.address
    if address is None:
        return Finding(
            row, Verdict.ATTENTION, "the hub listens nowhere", "Prometheus cannot scrape it.", "See the row hub."
        )
    if facts.metrics is None:
        if facts.cluster is not None and not facts.hub_is_here:
            return Finding(
                row, Verdict.UNKNOWN, facts.metrics_problem,
                "The hub is on another host, and listens on loopback unless ENGINEFSM_HUB_ADDR says otherwise.",
                f"Run the doctor on {facts.hub_host or 'its host'}, where Prometheus runs as well.",
            )  # fmt: skip
        return Finding(
            row, Verdict.ATTENTION, facts.metrics_problem, "Prometheus cannot scrape the hub either.",
            "Check firewalls and ENGINEFSM_HUB_ADDR.",
        )  # fmt: skip
    samples = sum(1 for line in facts.metrics.splitlines() if line and not line.startswith("#"))
    return Finding(row, Verdict.OK, f"{address}/metrics, {samples} samples", "Prometheus can scrape it from here.")


def file_sd(facts: Facts) -> Finding:
    """Say whether the file in which Prometheus finds the hub is there and right."""
    row, lost = "file_sd", "Prometheus does not find this hub."
    if facts.hub is None:
        return Finding(row, Verdict.UNKNOWN, "no hub answers", "See the row hub.")
    if not facts.hub_is_here:
        return Finding(
            row, Verdict.UNKNOWN, "the hub is not known to be on this host", "The file lies on the hub's host.",
            f"Run the doctor on {facts.hub_host or facts.hub.fleet['hub'].get('node_ip')}.",
        )  # fmt: skip
    if facts.file_sd is None:
        return Finding(
            row, Verdict.NOTE, "the hub writes none: ENGINEFSM_HUB_FILE_SD is empty",
            "Prometheus needs the hub's address in another way.",
        )  # fmt: skip
    again = "Kill the hub: the next report of a monitor starts another, which writes the file."
    if not facts.file_sd.exists:
        return Finding(row, Verdict.ATTENTION, f"{facts.file_sd.path} is gone", lost, again)
    if facts.file_sd.url != facts.hub.address:
        return Finding(
            row, Verdict.ATTENTION,
            f"{facts.file_sd.path} leads to {facts.file_sd.url or 'no address'}, the hub is at {facts.hub.address}",
            f"Another hub or another program has written it. {lost}",
            f"Give each cluster on this host its own ENGINEFSM_HUB_FILE_SD. {again}",
        )  # fmt: skip
    return Finding(row, Verdict.OK, f"{facts.file_sd.path}", "Prometheus finds the hub by this file.")


def exporters(facts: Facts) -> Finding:
    """Say whether the exporters of the runs that go on have failed."""
    row = "exporters"
    if facts.hub is None or facts.metrics is None:
        return Finding(row, Verdict.UNKNOWN, "the hub's metrics cannot be read", "See the rows hub and scraping.")
    going_on = {run["run"] for run in facts.hub.fleet["runs"] if run["state"] != "stopped"}
    wrong: dict[str, dict[str, float]] = {}
    for family in text_string_to_metric_families(facts.metrics):
        what = {"enginefsm_export_errors": "errors", "enginefsm_events_dropped": "events dropped"}.get(family.name)
        for sample in family.samples if what else []:
            if sample.name.endswith("_total") and sample.value and sample.labels["run"] in going_on:
                assert what is not None
                wrong.setdefault(f"{sample.labels['sink']} of run {sample.labels['run']!r}", {})[what] = sample.value
    if wrong:
        told = (f"{sink}: {', '.join(f'{n:g} {what}' for what, n in counts.items())}" for sink, counts in wrong.items())
        return Finding(
            row, Verdict.ATTENTION, "; ".join(told),
            "Since the run began, an exporter could not deliver. Its sink may lack events.",
            'Search the job\'s log for "export to": each line says what failed.',
        )  # fmt: skip
    return Finding(row, Verdict.OK, f"no errors; runs that go on: {len(going_on)}", "Nothing was lost.")


def clocks(facts: Facts) -> Finding:
    """Say whether the clocks of this process, the hub and the monitors agree."""
    row = "clocks"
    if facts.hub is None:
        return Finding(row, Verdict.UNKNOWN, "no hub answers", "See the row hub.")
    now_s = facts.hub.fleet["now_s"]
    # The hub told its time at some moment between the question and the answer.
    ahead_s = max(0.0, facts.hub.asked_s - now_s) - max(0.0, now_s - facts.hub.answered_s)
    apart = [] if abs(ahead_s) <= CLOCKS_APART_S else [f"this process is {_off(ahead_s)} the hub"]
    for run, manager in facts.hub.managers:
        # A report names the time at which it was made. The time that it took looks like a clock that is behind.
        off_s = manager["heartbeat_s"] - (now_s - manager["heard_s_ago"])
        if off_s > CLOCKS_APART_S or off_s < -CLOCKS_APART_S - REPORT_TAKES_S:
            apart.append(f"the monitor of run {run['run']!r} on {manager['host']} is {_off(off_s)} the hub")
    if apart:
        return Finding(
            row, Verdict.ATTENTION, "; ".join(apart),
            "Ages in tables are wrong by as much, and alerts that compare times fire late or for nothing.",
            "Let NTP (chrony, systemd-timesyncd) keep the clocks of all nodes.",
        )  # fmt: skip
    return Finding(
        row, Verdict.OK, f"within {CLOCKS_APART_S:g} s of the hub's", "Times in tables and alerts can be compared."
    )


def children(facts: Facts) -> Finding:
    """Say whether Ray ends the children of an actor that died."""
    row = "children"
    runs = (facts.cluster.ray if facts.cluster is not None else None) or facts.here.ray
    if facts.own_group is None:
        cleans_up, how = versions.numbers(runs)[:2] >= versions.CLEANS_UP_FROM, f"by its version, {runs}"
    else:
        cleans_up, how = facts.own_group, "as the hub's actor shows"
    if cleans_up:
        return Finding(
            row, Verdict.OK, f"Ray ends the children of dead actors, {how}",
            "A child that called setsid() still survives its actor.",
        )  # fmt: skip
    return Finding(
        row, Verdict.NOTE, f"Ray leaves the children of dead actors, {how}",
        "The server process of a killed engine may live on and hold its GPU. Let the server end itself when its parent "
        "dies (prctl PR_SET_PDEATHSIG), as SGLang does, or kill it before you start a replacement.",
    )  # fmt: skip


def retries(facts: Facts) -> Finding:
    """Say whether Ray itself repeats methods of engines."""
    row = "retries"
    tasks = facts.here.task_max_retries
    of_tasks = f"RAY_TASK_MAX_RETRIES is {'unset here (3)' if tasks is None else f'{tasks} here'}, for tasks alone"
    if facts.hub is None:
        return Finding(row, Verdict.UNKNOWN, of_tasks, "The hub knows the engines. See the row hub.")
    engines = [engine for run in facts.hub.fleet["runs"] if run["state"] != "stopped" for engine in run["engines"]]
    told = [(each["engine"], each["max_task_retries"]) for each in engines if each.get("max_task_retries") is not None]
    repeated = [f"{name} ({'without a bound' if retries < 0 else retries})" for name, retries in told if retries]
    if repeated:
        return Finding(
            row, Verdict.ATTENTION, f"max_task_retries is not 0: {_names(repeated)}",
            "Ray runs a method that was cut off a second time: two init, two servers on the same GPUs. Calls through "
            "enginefsm are safe, calls on the plain handle are not.",
            "Create these actors with max_task_retries=0.",
        )  # fmt: skip
    if engines and not told:
        return Finding(row, Verdict.UNKNOWN, of_tasks, "No monitor told the hub how often Ray repeats calls.")
    return Finding(
        row, Verdict.OK, f"max_task_retries is 0 for {_count(len(told), 'engine')}; {of_tasks}",
        "Ray runs no method of an engine twice.",
    )  # fmt: skip


CHECKS: tuple[Callable[[Facts], Finding], ...] = (
    cluster, agreement, tested, silent_links, hub, scraping, file_sd, exporters, clocks, children, retries,
)  # fmt: skip


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _names(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if names[_NAMED:] else ""
    return ", ".join(names[:_NAMED]) + more


def _off(seconds: float) -> str:
    return f"{duration(abs(seconds))} {'ahead of' if seconds > 0 else 'behind'}"
