"""What ends an engine and what holds that, as pure logic: the time is passed in."""

from __future__ import annotations

import math

import pytest

from enginefsm.states import Reason
from enginefsm.verdicts import CAP_WINDOW_S, Course, Court, Ruling

TIMEOUT, FAILED, UNAVAILABLE = Reason.PROBE_TIMEOUT, Reason.PROBE_FAILED, Reason.ACTOR_UNAVAILABLE


def course(*failures):
    """One that failed so at these times: (cause, time, whether it counts)."""
    made = Course()
    for cause, at, counts in failures:
        made.failed(cause, at, counts=counts)
    return made


def court_of(count, heard_at=0.0, **state):
    """A court that sees so many engines of one actor each, "e0" and so on."""
    court = Court()
    for number in range(count):
        court.enter(f"e{number}", f"e{number}")
        court.see(f"e{number}", living=True, heard_at=heard_at)
    return court


def lose(court, *names):
    for name in names:
        court.see(name, living=True, unavailable=True)


def find(court, *names):
    for name in names:
        court.see(name, living=True, unavailable=False)


def rule(court, name, now=100.0, since=0.0):
    return court.rule(name, name, since, now)


def test_failures_in_a_row_are_due_at_the_threshold():
    failures = [(FAILED, 0, True), (TIMEOUT, 10, True), (FAILED, 20, True)]
    assert not course(*failures[:2]).is_due(3, 120, 20)
    assert course(*failures).is_due(3, 120, 20)


def test_a_course_without_failures_is_never_due():
    assert not Course().is_due(1, 0, math.inf)


def test_failures_that_do_not_count_are_due_when_the_budget_of_the_outage_is_spent_and_not_before():
    unavailable = course(*((UNAVAILABLE, at, False) for at in range(0, 120, 5)))
    assert unavailable.failures == 0
    assert not unavailable.is_due(3, 120, 119.9)
    assert unavailable.is_due(3, 120, 120)


def test_an_outage_begins_with_its_first_failure_whether_that_counts_or_not():
    assert course((TIMEOUT, 0, True), (UNAVAILABLE, 60, False)).is_due(3, 120, 120)


def test_failures_that_counted_before_do_not_end_an_engine_whose_server_serves_again():
    served = course((TIMEOUT, 0, True), (TIMEOUT, 10, True), (TIMEOUT, 20, True), (TIMEOUT, 30, False))
    assert not served.is_due(3, 120, 30)


@pytest.mark.parametrize(
    ("engines", "lost", "held"),
    [
        (1, 1, False), (2, 1, False), (2, 2, True), (3, 2, True), (4, 2, False), (4, 3, True), (256, 128, False),
        (256, 129, True),
    ],
)  # fmt: skip
def test_verdicts_are_held_while_more_than_half_and_at_least_two_are_unavailable(engines, lost, held):
    court = court_of(engines)
    lose(court, *(f"e{number}" for number in range(lost)))
    assert rule(court, "e0") is (Ruling.MASS_OUTAGE if held else Ruling.GIVEN)


def test_a_mass_outage_is_told_once_at_its_begin_and_once_at_its_end_and_counts_begin_anew():
    court = court_of(4)
    lose(court, "e0", "e1", "e2")
    (begun,) = court.news()
    assert "3 of 4" in begun
    lose(court, "e3")
    assert rule(court, "e0") is rule(court, "e1") is Ruling.MASS_OUTAGE
    assert court.news() == []
    assert court.held() == {Ruling.MASS_OUTAGE: 2, Ruling.KILL_CAP: 0}
    find(court, "e3")
    assert court.outages_ended == 0
    find(court, "e2")
    (ended,) = court.news()
    assert "2 of 4" in ended
    assert "2 had been held" in ended
    assert court.outages_ended == 1
    assert court.held() == {Ruling.MASS_OUTAGE: 0, Ruling.KILL_CAP: 0}


def test_engines_that_are_dead_or_not_yet_launched_are_no_part_of_a_mass_outage():
    court = court_of(4)
    for name in ("e0", "e1"):
        court.see(name, living=False)
    lose(court, "e2")
    assert rule(court, "e2") is Ruling.GIVEN
    lose(court, "e3")
    assert rule(court, "e3") is Ruling.MASS_OUTAGE


def test_actors_of_one_engine_are_one_engine():
    court = Court()
    for actor in range(8):
        court.enter(actor, actor // 4)
        court.see(actor, living=True, unavailable=actor < 4, heard_at=0)
    assert court.rule(0, "zero", 0, 100) is Ruling.GIVEN  # four of eight actors, one of two engines
    court.see(7, living=True, unavailable=True)
    assert court.rule(1, "one", 0, 100) is Ruling.MASS_OUTAGE


def test_a_verdict_waits_until_all_others_of_its_watch_have_been_heard_since_the_trouble_began():
    court = court_of(3, heard_at=10.0)
    lose(court, "e0")
    court.enter("other", "other", watch="another")
    court.see("other", living=True)
    assert rule(court, "e0", since=10.5) is Ruling.WAITS
    court.see("e1", living=True, heard_at=11.0)
    assert rule(court, "e0", since=10.5) is Ruling.WAITS
    court.see("e2", living=True, heard_at=11.0)
    assert rule(court, "e0", since=10.5) is Ruling.GIVEN


@pytest.mark.parametrize(("engines", "allowed"), [(1, 1), (3, 1), (8, 2), (9, 2), (256, 64)])
def test_a_quarter_but_always_one_is_given_up_in_a_window_and_the_rest_is_held_and_told_once(engines, allowed):
    court = court_of(engines)
    rulings = [rule(court, f"e{number}", now=100.0 + number / 1000) for number in range(min(engines, allowed + 2))]
    assert rulings[:allowed] == [Ruling.GIVEN] * allowed
    assert set(rulings[allowed:]) <= {Ruling.KILL_CAP}
    assert court.held()[Ruling.KILL_CAP] == len(rulings) - allowed
    assert len(court.news()) == bool(rulings[allowed:])
    if engines > allowed:
        assert rule(court, f"e{allowed}", now=100.0 + CAP_WINDOW_S) is Ruling.GIVEN
        assert court.held()[Ruling.KILL_CAP] == len(rulings) - allowed - 1


def test_what_is_dropped_or_leaves_is_not_held_any_more():
    court = court_of(4)
    rule(court, "e0")
    for name in ("e1", "e2"):
        assert rule(court, name) is Ruling.KILL_CAP
    court.drop("e1")
    court.leave("e2")
    assert court.held() == {Ruling.MASS_OUTAGE: 0, Ruling.KILL_CAP: 0}


def test_engines_that_leave_end_a_mass_outage_that_was_theirs():
    court = court_of(3)
    lose(court, "e0", "e1")
    court.leave("e0")
    assert court.outages_ended == 1
    assert rule(court, "e1") is Ruling.GIVEN
