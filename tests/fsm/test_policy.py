"""Retry policies: what they refuse, how long they pause, and when they give up."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from enginefsm import RestartCap, RetryPolicy
from enginefsm.policy import FLOOR_S

NAN, INFINITY = math.nan, math.inf


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("budget_s", [-1, -0.001, NAN, INFINITY, "120", None, True]),
        ("max_attempts", [-1, 1.0, "3", True]),
        ("base_s", [0, -1, NAN, INFINITY, "1", None, True]),
        ("factor", [0.99, 0, -2, NAN, INFINITY, None, True]),
        ("cap_s", [0.49, 0, NAN, INFINITY, None, True]),
        ("jitter", ["half", "", None, True]),
        ("launch_deadline_s", [0, -1, NAN, INFINITY, "60", True]),
    ],
)
def test_a_value_that_makes_no_sense_is_refused_by_the_name_of_its_field(field, values):
    for value in values:
        with pytest.raises(ValueError, match=rf"^RetryPolicy: {field} must be .+, not ") as refusal:
            RetryPolicy(**{field: value})
        assert str(refusal.value).endswith(repr(value))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"budget_s": 0},
        {"max_attempts": 0},
        {"base_s": 2, "cap_s": 2},
        {"factor": 1},
        {"jitter": "none"},
        {"launch_deadline_s": 0.5},
    ],
)
def test_a_value_at_the_bound_is_taken(settings):
    policy = RetryPolicy(**settings)

    assert {name: getattr(policy, name) for name in settings} == settings


def test_the_defaults_are_those_of_the_design():
    assert dataclasses.asdict(RetryPolicy()) == {
        "budget_s": 120, "max_attempts": None, "base_s": 0.5, "factor": 1.6, "cap_s": 15, "jitter": "full",
        "launch_deadline_s": None,
    }  # fmt: skip


def test_a_policy_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        RetryPolicy().budget_s = 1


def test_a_policy_is_made_from_named_fields_only():
    with pytest.raises(TypeError):
        RetryPolicy(60)


seconds = st.floats(min_value=1e-9, max_value=1e9)


@st.composite
def policies(draw, jitter):
    base_s, cap_s = sorted([draw(seconds), draw(seconds)])
    return RetryPolicy(base_s=base_s, cap_s=cap_s, factor=draw(st.floats(min_value=1, max_value=1e6)), jitter=jitter)


attempts = st.integers(min_value=1, max_value=10**18)


@given(policies("full"), attempts)
def test_a_pause_is_neither_below_the_floor_nor_above_what_it_has_grown_to_nor_above_the_cap(policy, attempt):
    longest = dataclasses.replace(policy, jitter="none").pause_s(attempt)

    assert min(FLOOR_S, longest) <= policy.pause_s(attempt) <= longest <= policy.cap_s


@given(policies("none"), st.integers(min_value=1, max_value=40))
def test_a_pause_without_jitter_is_the_base_grown_by_the_factor_up_to_the_cap(policy, attempt):
    grown = policy.base_s * policy.factor ** (attempt - 1)

    assert policy.pause_s(attempt) == pytest.approx(min(grown, policy.cap_s), rel=1e-9)


@given(attempts)
def test_no_attempt_is_so_late_that_its_pause_overflows(attempt):
    policy = RetryPolicy(factor=1e6, jitter="none")

    assert policy.pause_s(attempt) == (0.5 if attempt == 1 else pytest.approx(15))


def test_pauses_with_jitter_are_spread_over_all_that_they_may_be():
    pauses = [RetryPolicy(base_s=10).pause_s(1) for _ in range(400)]

    assert min(pauses) < 2
    assert max(pauses) > 8
    assert 4 < sum(pauses) / len(pauses) < 6


@pytest.mark.parametrize(
    ("field", "values"),
    [("restarts", [-1, 1.0, "3", None, True]), ("within_s", [0, -1, NAN, INFINITY, "60", None, True])],
)
def test_a_cap_that_makes_no_sense_is_refused_by_the_name_of_its_field(field, values):
    for value in values:
        with pytest.raises(ValueError, match=rf"^RestartCap: {field} must be .+, not ") as refusal:
            RestartCap(**{field: value})
        assert str(refusal.value).endswith(repr(value))


def test_a_cap_counts_the_restarts_of_the_window_that_ends_now():
    cap = RestartCap(restarts=2, within_s=100)

    assert cap.allows_in_s([], now=0) == 0
    assert cap.allows_in_s([0], now=1) == 0
    assert cap.allows_in_s([0, 60], now=61) == 39
    assert cap.allows_in_s([0, 60], now=100) == 0
    assert cap.allows_in_s([0, 60, 100], now=100) == 60


def test_a_cap_of_none_never_allows_one():
    assert RestartCap(restarts=0).allows_in_s([], now=0) == INFINITY


@given(st.lists(st.floats(0, 1000), max_size=30), st.integers(1, 4), st.floats(1, 500))
def test_no_window_has_more_restarts_than_the_cap_whenever_they_are_tried(tries, restarts, within_s):
    cap = RestartCap(restarts=restarts, within_s=within_s)
    taken = []
    for now in sorted(tries):
        if cap.allows_in_s(taken, now) <= 0:
            taken.append(now)

    assert all(later - earlier >= within_s - 1e-6 for earlier, later in zip(taken, taken[restarts:], strict=False))
