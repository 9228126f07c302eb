from __future__ import annotations

from random import Random

from hypothesis import given
from hypothesis import strategies as st

from fed_client.backoff import CAP_SECONDS, FIRST_SECONDS, Backoff


@given(seed=st.integers(0, 2**32), attempts=st.integers(1, 200))
def test_waits_lie_under_a_doubling_ceiling_and_never_over_the_cap(seed: int, attempts: int) -> None:
    backoff = Backoff(rng=Random(seed))
    for attempt in range(attempts):
        ceiling = min(CAP_SECONDS, FIRST_SECONDS * 2.0**attempt)
        assert ceiling / 10 <= backoff.next_seconds() <= ceiling


def test_the_first_retry_is_fast_and_a_success_makes_it_fast_again() -> None:
    backoff = Backoff(rng=Random(0))
    assert backoff.next_seconds() <= FIRST_SECONDS
    for _ in range(20):
        backoff.next_seconds()
    backoff.reset()
    assert backoff.next_seconds() <= FIRST_SECONDS


def test_clients_that_fail_together_do_not_come_back_together() -> None:
    clients = [Backoff(rng=Random(seed)) for seed in range(100)]
    waits = [[client.next_seconds() for _ in range(8)][-1] for client in clients]
    assert max(waits) - min(waits) > CAP_SECONDS / 2


@given(seed=st.integers(0, 2**32), window=st.floats(-1, 1e9))
def test_a_wait_within_a_window_stays_in_it_whatever_the_window(seed: int, window: float) -> None:
    seconds = Backoff(rng=Random(seed)).within(window)
    assert 0 < seconds <= max(0.02, min(window, 60.0))
