"""How much an update counts when it comes late."""

from __future__ import annotations

import math
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from fed_server.aggregation.staleness import ONE, STALENESS_RULES, staleness_weights
from fed_server.config import (
    BufferedConfig,
    ConstantStalenessConfig,
    PolynomialStalenessConfig,
    union_members,
)


def test_the_table_is_that_of_the_configs() -> None:
    assert set(STALENESS_RULES) == set(union_members(BufferedConfig.model_fields["staleness"]))


def test_the_weights_of_the_paper_by_hand() -> None:
    """1 / sqrt(1 + t): 1, 0.7071, 0.5774, 0.5, in steps of 2^-16."""
    assert staleness_weights(PolynomialStalenessConfig(), 3) == (65536, 46341, 37837, 32768)
    assert staleness_weights(PolynomialStalenessConfig(exponent=1.0), 3) == (65536, 32768, 21845, 16384)
    assert staleness_weights(ConstantStalenessConfig(), 2) == (ONE, ONE, ONE)


@settings(deadline=None)
@given(st.floats(0.01, 8))
def test_later_never_counts_more_and_never_nothing(exponent: float) -> None:
    weights = staleness_weights(PolynomialStalenessConfig(exponent=exponent), 150)
    assert len(weights) == 151
    assert weights[0] == ONE
    assert all(1 <= late <= soon for soon, late in pairwise(weights))
    for staleness, weight in enumerate(weights):
        assert abs(weight - max(1.0, ONE * math.pow(1 + staleness, -exponent))) < 0.51
