"""Brackets: the true boundary is found from any guess, and from a right one with two trials."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from harness.bracket import close_bracket, confirm_bracket, resolution

CHUNK = 2816
LARGEST = 10_000_000


class Oracle:
    """Answers ``ok`` up to a boundary; remembers what it was asked."""

    def __init__(self, boundary, beyond="oom", dead=lambda tokens: False):
        self.boundary, self.beyond, self.dead = boundary, beyond, dead
        self.asked = []

    def __call__(self, tokens):
        self.asked.append(tokens)
        if self.dead(tokens):
            return ""
        return "ok" if tokens <= self.boundary else self.beyond


@given(
    boundary=st.integers(1, LARGEST - 1),
    guess=st.integers(-5, 2 * LARGEST),
    chunk=st.sampled_from([1, CHUNK, 300_000]),
    beyond=st.sampled_from(["oom", "refused"]),
)
def test_any_guess_leads_to_the_boundary(boundary, guess, chunk, beyond):
    oracle = Oracle(boundary, beyond)
    found = close_bracket(oracle, guess, chunk, 1, LARGEST)
    assert found.ok <= boundary < found.not_ok
    assert found.not_ok - found.ok <= resolution(found.ok, chunk)
    assert found.limited_by == beyond and found.closed(chunk)
    assert len(oracle.asked) == len(set(oracle.asked)) < 64
    assert all(1 <= tokens <= LARGEST for tokens in oracle.asked)


@given(boundary=st.integers(1, LARGEST - 1), below=st.integers(0, CHUNK - 1))
def test_a_right_guess_takes_two_trials(boundary, below):
    oracle = Oracle(boundary)
    found = close_bracket(oracle, max(1, boundary - below), CHUNK, 1, LARGEST)
    assert len(oracle.asked) <= 2 and found.ok <= boundary < found.not_ok


@given(guess=st.integers(1, LARGEST))
def test_nothing_fails(guess):
    oracle = Oracle(LARGEST)
    found = close_bracket(oracle, guess, CHUNK, 1, LARGEST)
    assert (found.ok, found.not_ok, found.limited_by) == (LARGEST, None, "sweep_end")
    assert len(oracle.asked) < 20


@given(guess=st.integers(1, LARGEST))
def test_nothing_starts(guess):
    oracle = Oracle(0)
    found = close_bracket(oracle, guess, CHUNK, 1, LARGEST)
    assert (found.ok, found.not_ok, found.limited_by) == (None, 1, "oom")
    assert len(oracle.asked) < 20


@given(
    boundary=st.integers(1, LARGEST - 1),
    guess=st.integers(1, LARGEST),
    dead=st.tuples(st.integers(1, LARGEST), st.integers(1, LARGEST)),
)
def test_a_trial_that_dies_ends_the_search_with_what_is_known(boundary, guess, dead):
    low, high = sorted(dead)
    oracle = Oracle(boundary, dead=lambda tokens: low <= tokens <= high)
    found = close_bracket(oracle, guess, CHUNK, 1, LARGEST)
    lost = [tokens for tokens in oracle.asked if oracle.dead(tokens)]
    assert lost == ([oracle.asked[-1]] if found.limited_by == "" else [])
    assert found.ok is None or found.ok <= boundary
    assert found.not_ok is None or found.not_ok > boundary


def test_every_trial_dies():
    oracle = Oracle(5_000_000, dead=lambda tokens: True)
    found = close_bracket(oracle, 5_000_000, CHUNK, 1, LARGEST)
    assert (found.ok, found.not_ok, found.limited_by) == (None, None, "")
    assert len(oracle.asked) == 1


def test_width_at_which_a_bracket_is_closed():
    assert resolution(5_000_000, CHUNK) == 5_000  # 0.1 %
    assert resolution(1_000_000, CHUNK) == CHUNK
    assert resolution(0, 0) == 1


@given(
    boundary=st.integers(1, LARGEST - 1),
    guess=st.integers(1, LARGEST),
    fickle=st.integers(0, 5 * CHUNK),
    repeats=st.integers(1, 3),
    seed=st.randoms(use_true_random=False),
)
def test_a_context_that_starts_only_now_and_then_is_not_ok(boundary, guess, fickle, repeats, seed):
    said = {}

    def test(tokens, repeat):
        sure = tokens <= boundary - fickle
        answer = "ok" if sure or (tokens <= boundary and seed.random() < 0.5) else "oom"
        return said.setdefault((tokens, repeat), answer)

    found = confirm_bracket(test, repeats, guess, CHUNK, 1, LARGEST)
    for end in (found.ok, found.not_ok):
        assert end is None or all((end, repeat) in said for repeat in range(repeats))
    if found.ok is not None:
        assert all(said[found.ok, repeat] == "ok" for repeat in range(repeats))
        assert found.ok <= boundary
    if found.not_ok is not None:
        assert "oom" in [said[found.not_ok, repeat] for repeat in range(repeats)]
        assert found.not_ok > boundary - fickle
    assert found.closed(CHUNK)
