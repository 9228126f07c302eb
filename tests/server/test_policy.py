"""What a run's config asks of its clients."""

from __future__ import annotations

import pytest

from fed_core.codecs.auto import AutoConfig
from fed_server.config import parse_run_config
from fed_server.rounds.policy import uplink_encoding
from tests.server.conftest import config


@pytest.mark.parametrize(
    ("size", "extra", "error", "matches_gain"),
    [
        (3, "", 0.02, False),
        (50, "", 0.1, True),
        (50, '[aggregation]\nkind = "median"\nnum_byzantine = 3\n', 0.02, False),
        (50, "[uplink]\nkind = 'auto'\ntarget_error = 0.01\n", 0.05, True),
    ],
)
def test_only_updates_that_are_averaged_may_lose_more_the_more_there_are(
    size: int, extra: str, error: float, matches_gain: bool
) -> None:
    encoding = uplink_encoding(parse_run_config(config(size=size, quorum=size, is_exact=False, extra=extra)))
    assert isinstance(encoding, AutoConfig)
    assert encoding.target_error == pytest.approx(error)
    assert encoding.match_gain == matches_gain
