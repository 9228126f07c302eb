"""The trellis: a machine that keeps its parity checks, and paths than which none is cheaper."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fed_core.codecs.trellis import _CHECKS, NUM_STATES, SUBSETS, best_parities, states_of, trellis

EVERY_SIZE = pytest.mark.parametrize("num_states", NUM_STATES)


@EVERY_SIZE
def test_two_paths_meet_in_every_state(num_states: int) -> None:
    following, before = trellis(num_states)
    assert sorted(following.tolist()) == sorted(2 * list(range(num_states)))
    for parity, state in itertools.product((0, 1), range(num_states)):
        assert following[2 * before[parity, state] + parity] == state
        assert before[0, state] % 2 == before[1, state] % 2


@EVERY_SIZE
def test_every_path_keeps_the_parity_checks(num_states: int) -> None:
    parities = np.random.default_rng(num_states).integers(0, 2, (200, 3)).astype(np.uint8)
    last_bits = states_of(parities, num_states) & 1
    h0, h1 = ([check >> i & 1 for i in range(num_states.bit_length())] for check in _CHECKS[num_states])
    for t in range(len(h0), 200):
        sums = sum(h0[i] * last_bits[t - i].astype(int) + h1[i] * parities[t - i] for i in range(len(h0)))
        assert not (sums % 2).any()


def test_subsets_are_the_numbers_of_a_last_bit_and_a_parity() -> None:
    for subset, k in enumerate(SUBSETS):
        last_bit, parity = divmod(subset, 2)
        for number in range(k - 40, k + 41, 4):
            assert number % 2 == last_bit
            assert (number + last_bit) // 2 % 2 == parity


@EVERY_SIZE
@settings(deadline=None, max_examples=20)
@given(st.integers(1, 9), st.integers(0, 2**32))
def test_no_path_is_cheaper(num_states: int, num_steps: int, seed: int) -> None:
    costs = np.random.default_rng(seed).random((num_steps, 4, 2)).astype(np.float32)
    every_path = np.array(list(itertools.product((0, 1), repeat=num_steps)), np.uint8).T
    subsets = 2 * (states_of(every_path, num_states) & 1) + every_path
    found = best_parities(costs, num_states)
    for lane in range(2):
        totals = costs[np.arange(num_steps)[:, None], subsets, lane].sum(axis=0)
        assert np.array_equal(found[:, lane], every_path[:, totals.argmin()]) or np.isclose(
            totals[(every_path == found[:, lane : lane + 1]).all(axis=0)], totals.min(), rtol=1e-5
        )


@EVERY_SIZE
def test_lanes_do_not_know_of_each_other(num_states: int) -> None:
    costs = np.random.default_rng(1).random((20, 4, 5000)).astype(np.float32)
    together = best_parities(costs, num_states)
    for lane in (0, 1, 127, 128, 511, 512, 4095, 4096, 4999):
        assert np.array_equal(best_parities(costs[:, :, lane : lane + 1], num_states)[:, 0], together[:, lane])


@EVERY_SIZE
def test_what_all_choices_cost_alike_hardly_matters_however_long_the_path(num_states: int) -> None:
    costs = np.random.default_rng(2).random((3000, 4, 3)).astype(np.float32)
    # Unscaled sums would reach 3 million, where float32 has no halves.
    dearer = best_parities(costs + np.float32(1000), num_states)
    assert np.mean(dearer != best_parities(costs, num_states)) < 0.05
