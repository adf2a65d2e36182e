"""Outages: when they begin and end, and what is left to each call in one. No Ray, and no clock but the test's."""

from __future__ import annotations

import pytest

from enginefsm import RetryPolicy
from enginefsm.fsm.outages import HELD_S, CallOutage, Outage, OutageTracker


@pytest.fixture
def tracker():
    return OutageTracker()


@pytest.mark.parametrize(
    ("policy", "attempts", "passed_s", "exhausted"),
    [
        (RetryPolicy(budget_s=10), 0, 0.0, False),
        (RetryPolicy(budget_s=10), 10_000, 9.99, False),
        (RetryPolicy(budget_s=10), 0, 10.0, True),
        (RetryPolicy(budget_s=0), 0, 0.0, True),
        (RetryPolicy(max_attempts=3), 2, 0.0, False),
        (RetryPolicy(max_attempts=3), 3, 0.0, True),
        (RetryPolicy(max_attempts=0), 0, 0.0, True),
        (RetryPolicy(max_attempts=3, budget_s=1), 0, 1.0, True),
    ],
)
def test_an_outage_is_out_of_bounds_once_its_time_or_its_attempts_are_spent(policy, attempts, passed_s, exhausted):
    assert (
        CallOutage(Outage(since=90.0), since=100.0, attempts=attempts).exhausted(policy, now=100.0 + passed_s)
        is exhausted
    )


@pytest.mark.parametrize(
    ("passed_s", "after_s"),
    [(0.0, 4.0), (5.0, 4.0), (7.0, 3.0), (10.0, 0.0), (12.0, 0.0)],
)
def test_the_last_resubmission_uses_what_is_left_of_the_budget(passed_s, after_s):
    now = 100.0 + passed_s

    part = CallOutage(Outage(since=90.0), since=100.0)
    assert part.in_budget(RetryPolicy(budget_s=10), now + 4.0, now) == pytest.approx(now + after_s)


def test_each_resubmission_of_an_outage_waits_longer():
    policy, outage = RetryPolicy(base_s=1, factor=2, cap_s=5, jitter="none"), Outage(since=0.0)

    pauses = [outage.next_pause_s(policy) for _ in range(4)]

    assert pauses == [pytest.approx(expected) for expected in (1, 2, 4, 5)]


def test_an_outage_goes_on_while_failures_come_and_ends_with_an_answer_from_after_its_begin(tracker):
    tracker.failed(10.0, 11.0, again=False)
    first = tracker.present
    tracker.failed(12.0, 13.0, again=True)

    assert tracker.present is first
    assert not tracker.answered(10.5), "it was submitted before the break, and answered before it"
    assert tracker.present is first
    assert tracker.answered(12.0)
    assert tracker.present is None


def test_a_resubmission_that_ray_left_standing_and_that_fails_after_all_is_a_new_outage(tracker):
    tracker.failed(10.0, 11.0, again=False)
    first = tracker.present

    tracker.failed(12.0, 12.0 + HELD_S - 0.1, again=True)
    assert tracker.present is first
    tracker.failed(12.0, 12.0 + HELD_S, again=True)

    assert tracker.present is not first
    assert tracker.present.since == 12.0 + HELD_S


def test_a_first_submission_that_stood_for_long_begins_no_second_outage(tracker):
    tracker.failed(10.0, 11.0, again=False)
    first = tracker.present

    tracker.failed(5.0, 5.0 + 2 * HELD_S, again=False)

    assert tracker.present is first


def test_a_failed_health_check_begins_an_outage_when_it_was_sent_and_changes_none(tracker):
    tracker.suspected(7.0)
    assert tracker.present.since == 7.0

    tracker.suspected(9.0)
    assert tracker.present.since == 7.0
