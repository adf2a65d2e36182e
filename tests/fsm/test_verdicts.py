"""What ends an engine and what holds that, as pure logic: the time is passed in."""

from __future__ import annotations

import math

import pytest

from enginefsm.fsm.outcomes import FATAL, Outcome
from enginefsm.fsm.states import Reason
from enginefsm.fsm.verdicts import (
    CAP_WINDOW_S,
    Decision,
    Failures,
    Finding,
    HealthCheck,
    ServerAnswer,
    VerdictLimits,
    finding_of,
)

SILENT, SERVED = HealthCheck(Finding.SILENT), HealthCheck(Finding.SILENT, ServerAnswer.SERVES)
GONE = HealthCheck(Finding.SILENT, ServerAnswer.FAILS)
FAILED, CONFIRMED = HealthCheck(Finding.FAILED), HealthCheck(Finding.FAILED, silence_counted=True)
UNAVAILABLE, WELL = HealthCheck(Finding.UNAVAILABLE), HealthCheck(Finding.ANSWERED)


def failures(*checks):
    """The failures after these checks at these times."""
    made = Failures()
    for check, at in checks:
        made = made.after(check, at)
    return made


def limits_of(count, heard_at=0.0, **state):
    """Limits that see so many engines of one actor each, "e0" and so on."""
    limits = VerdictLimits()
    for number in range(count):
        limits.add(f"e{number}", f"e{number}")
        limits.update(f"e{number}", living=True, heard_at=heard_at)
    return limits


def lose(limits, *names):
    for name in names:
        limits.update(name, living=True, unavailable=True)


def find(limits, *names):
    for name in names:
        limits.update(name, living=True, unavailable=False)


def decide(limits, name, now=100.0, since=0.0):
    return limits.decide(name, name, since, now)


def test_failures_in_a_row_are_due_at_the_threshold():
    three = [(FAILED, 0), (SILENT, 10), (FAILED, 20)]
    assert not failures(*three[:2]).is_due(3, 120, 20)
    assert failures(*three).is_due(3, 120, 20)


def test_without_failures_nothing_is_ever_due():
    assert not Failures().is_due(1, 0, math.inf)


def test_an_answer_clears_all_failures():
    assert failures((FAILED, 0), (SILENT, 10), (WELL, 20)) == Failures()


def test_failures_that_do_not_count_are_due_when_the_budget_of_the_outage_is_spent_and_not_before():
    unavailable = failures(*((UNAVAILABLE, at) for at in range(0, 120, 5)))
    assert unavailable.count == 0
    assert not unavailable.is_due(3, 120, 119.9)
    assert unavailable.is_due(3, 120, 120)


def test_an_outage_begins_with_its_first_failure_whether_that_counts_or_not():
    assert failures((SILENT, 0), (UNAVAILABLE, 60)).is_due(3, 120, 120)


def test_failures_that_counted_before_do_not_end_an_engine_whose_server_serves_again():
    assert not failures((SILENT, 0), (SILENT, 10), (SILENT, 20), (SERVED, 30)).is_due(3, 120, 30)


def test_a_stop_of_this_process_forgives_silence_and_breaks_and_not_what_was_told():
    counted = failures((SILENT, 0), (FAILED, 10), (UNAVAILABLE, 20), (FAILED, 30)).forgive_stop(5)
    assert (counted.count, counted.since, counted.cause) == (2, 15, Reason.PROBE_FAILED)
    assert counted.after(FAILED, 40).is_due(3, 120, 40)


def test_a_stop_of_this_process_leaves_nothing_of_silence_alone():
    counted = failures((SILENT, 0), (UNAVAILABLE, 10)).forgive_stop(5)
    assert (counted.count, counted.since, counted.cause) == (0, None, None)


def test_silence_that_ends_with_a_no_is_one_failure_and_is_not_forgiven():
    counted = failures((SILENT, 0), (CONFIRMED, 5))
    assert counted.count == 1
    counted = counted.forgive_stop(2)
    assert (counted.count, counted.since, counted.cause) == (1, 7, Reason.PROBE_FAILED)


def test_a_silence_that_was_told_when_it_was_counted_is_not_told_twice():
    assert failures((GONE, 0), (CONFIRMED, 5)).forgive_stop(2).count == 1


def test_the_time_of_stops_is_no_part_of_the_budget_of_an_outage():
    counted = failures((FAILED, 0)).forgive_stop(100).after(UNAVAILABLE, 110)
    assert not counted.is_due(3, 120, 219.9)
    assert counted.is_due(3, 120, 220)


@pytest.mark.parametrize(
    "check",
    [
        HealthCheck(Finding.BUSY), HealthCheck(Finding.BUSY, ServerAnswer.UNWELL), HealthCheck(Finding.LOST),
        HealthCheck(Finding.DEAD), HealthCheck(Finding.ANSWERED, ServerAnswer.UNWELL, server_is_asked=True),
        HealthCheck(Finding.ANSWERED, ServerAnswer.FAILS, server_is_asked=True),
    ],
)  # fmt: skip
def test_a_check_that_says_nothing_changes_no_count(check):
    before = failures((FAILED, 0), (SILENT, 10))
    assert before.after(check, 20) == before


@pytest.mark.parametrize(
    ("finding", "server", "is_asked", "counts", "told"),
    [
        ("answered", "unwell", False, True, True), ("answered", "fails", False, True, True),
        ("failed", "serves", False, True, True), ("unavailable", "fails", False, False, False),
        ("silent", "not_asked", False, True, False), ("silent", "unknown", False, True, False),
        ("silent", "serves", False, False, False), ("silent", "unwell", True, False, False),
        ("silent", "fails", False, True, True), ("silent", "fails", True, True, False),
    ],
)  # fmt: skip
def test_how_a_failure_counts_depends_on_the_actor_and_its_server(finding, server, is_asked, counts, told):
    failure = HealthCheck(Finding(finding), ServerAnswer(server), is_asked).failure
    assert (failure.counts, failure.told) == (counts, told)


def test_only_outcomes_of_the_actor_itself_say_something_about_it():
    found = {outcome: finding_of(outcome) for outcome in Outcome}
    assert found.pop(Outcome.SUCCEEDED) is Finding.ANSWERED
    assert found.pop(Outcome.METHOD_FAILED) is Finding.FAILED
    assert found.pop(Outcome.ACTOR_UNAVAILABLE) is Finding.UNAVAILABLE
    assert {outcome for outcome, finding in found.items() if finding is Finding.DEAD} == set(FATAL)
    assert {finding for outcome, finding in found.items() if outcome not in FATAL} <= {Finding.LOST}


@pytest.mark.parametrize(
    ("engines", "lost", "held"),
    [
        (1, 1, False), (2, 1, False), (2, 2, True), (3, 2, True), (4, 2, False), (4, 3, True), (256, 128, False),
        (256, 129, True),
    ],
)  # fmt: skip
def test_verdicts_are_held_while_more_than_half_and_at_least_two_are_unavailable(engines, lost, held):
    limits = limits_of(engines)
    lose(limits, *(f"e{number}" for number in range(lost)))
    assert decide(limits, "e0") is (Decision.MASS_OUTAGE if held else Decision.GIVEN)


def test_a_mass_outage_is_told_once_at_its_begin_and_once_at_its_end_and_counts_begin_anew():
    limits = limits_of(4)
    lose(limits, "e0", "e1", "e2")
    (begun,) = limits.messages()
    assert "3 of 4" in begun
    lose(limits, "e3")
    assert decide(limits, "e0") is decide(limits, "e1") is Decision.MASS_OUTAGE
    assert limits.messages() == []
    assert limits.held() == {Decision.MASS_OUTAGE: 2, Decision.KILL_CAP: 0}
    find(limits, "e3")
    assert limits.outages_ended == 0
    find(limits, "e2")
    (ended,) = limits.messages()
    assert "2 of 4" in ended
    assert "2 had been held" in ended
    assert limits.outages_ended == 1
    assert limits.held() == {Decision.MASS_OUTAGE: 0, Decision.KILL_CAP: 0}


def test_engines_that_are_dead_or_not_yet_launched_are_no_part_of_a_mass_outage():
    limits = limits_of(4)
    for name in ("e0", "e1"):
        limits.update(name, living=False)
    lose(limits, "e2")
    assert decide(limits, "e2") is Decision.GIVEN
    lose(limits, "e3")
    assert decide(limits, "e3") is Decision.MASS_OUTAGE


def test_actors_of_one_engine_are_one_engine():
    limits = VerdictLimits()
    for actor in range(8):
        limits.add(actor, actor // 4)
        limits.update(actor, living=True, unavailable=actor < 4, heard_at=0)
    assert limits.decide(0, "zero", 0, 100) is Decision.GIVEN  # four of eight actors, one of two engines
    limits.update(7, living=True, unavailable=True)
    assert limits.decide(1, "one", 0, 100) is Decision.MASS_OUTAGE


def test_a_verdict_waits_until_all_others_of_its_watch_have_been_heard_since_the_trouble_began():
    limits = limits_of(3, heard_at=10.0)
    lose(limits, "e0")
    limits.add("other", "other", watch="another")
    limits.update("other", living=True)
    assert decide(limits, "e0", since=10.5) is Decision.WAITS
    limits.update("e1", living=True, heard_at=11.0)
    assert decide(limits, "e0", since=10.5) is Decision.WAITS
    limits.update("e2", living=True, heard_at=11.0)
    assert decide(limits, "e0", since=10.5) is Decision.GIVEN


@pytest.mark.parametrize(("engines", "allowed"), [(1, 1), (3, 1), (8, 2), (9, 2), (256, 64)])
def test_a_quarter_but_always_one_is_given_up_in_a_window_and_the_rest_is_held_and_told_once(engines, allowed):
    limits = limits_of(engines)
    decisions = [decide(limits, f"e{number}", now=100.0 + number / 1000) for number in range(min(engines, allowed + 2))]
    assert decisions[:allowed] == [Decision.GIVEN] * allowed
    assert set(decisions[allowed:]) <= {Decision.KILL_CAP}
    assert limits.held()[Decision.KILL_CAP] == len(decisions) - allowed
    assert len(limits.messages()) == bool(decisions[allowed:])
    if engines > allowed:
        assert decide(limits, f"e{allowed}", now=100.0 + CAP_WINDOW_S) is Decision.GIVEN
        assert limits.held()[Decision.KILL_CAP] == len(decisions) - allowed - 1


def test_what_is_dropped_or_leaves_is_not_held_any_more():
    limits = limits_of(4)
    decide(limits, "e0")
    for name in ("e1", "e2"):
        assert decide(limits, name) is Decision.KILL_CAP
    limits.clear("e1")
    limits.remove("e2")
    assert limits.held() == {Decision.MASS_OUTAGE: 0, Decision.KILL_CAP: 0}


def test_engines_that_leave_end_a_mass_outage_that_was_theirs():
    limits = limits_of(3)
    lose(limits, "e0", "e1")
    limits.remove("e0")
    assert limits.outages_ended == 1
    assert decide(limits, "e1") is Decision.GIVEN
