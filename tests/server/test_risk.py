"""The odds that a cohort holds too many bad sites, against a count of all cohorts."""

from __future__ import annotations

import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fed_server.config import RobustConfig, parse_run_config
from fed_server.rounds.risk import cohort_risk, most_bad_sites, risk_notice, run_risk


@given(st.data())
def test_the_risk_is_the_share_of_bad_cohorts(data: st.DataObject) -> None:
    num_sites = data.draw(st.integers(1, 9))
    num_bad, drawn = data.draw(st.integers(0, num_sites)), data.draw(st.integers(1, num_sites))
    tolerated = data.draw(st.integers(0, 9))
    cohorts = list(itertools.combinations(range(num_sites), drawn))
    expected = sum(sum(site < num_bad for site in cohort) > tolerated for cohort in cohorts) / len(cohorts)
    assert cohort_risk(num_sites, num_bad, drawn, tolerated) == pytest.approx(expected, abs=1e-12)


def test_large_populations_have_a_risk_too() -> None:
    assert cohort_risk(60_000, 600, 1_000, 10) == pytest.approx(0.4169456848718, rel=1e-9)


def test_a_run_repeats_the_risk_of_its_rounds() -> None:
    assert run_risk(0.25, 2) == pytest.approx(1 - 0.75**2)
    assert run_risk(1e-12, 1000) == pytest.approx(1e-9, rel=1e-6)
    assert (run_risk(0.0, 10), run_risk(1.0, 10)) == (0, 1)


def test_the_most_bad_sites_are_the_last_that_are_few_enough() -> None:
    most = most_bad_sites(100, 20, 4, 50, 0.01)
    assert run_risk(cohort_risk(100, most, 20, 4), 50) <= 0.01 < run_risk(cohort_risk(100, most + 1, 20, 4), 50)
    assert most_bad_sites(10, 5, 5, 1000, 0.01) == 10


def notice(extra: str, num_sites: int) -> str:
    config = parse_run_config(
        'name = "a"\nworkload = "b"\ncohort = { size = 20, quorum = 14, over_selection = 1.5 }\nschedule.max_rounds = 10\n'
        f'aggregation = {{ kind = "krum", num_byzantine = 4{extra} }}\n'
    )
    assert isinstance(config.aggregation, RobustConfig)
    return risk_notice(config, config.aggregation, num_sites)


def test_the_notice_counts_all_that_are_selected_and_says_what_it_assumes() -> None:
    said = notice("", 100)
    assert "draws 30 of 100 sites" in said
    assert "20 bad ones among them, as large a part as num_byzantine is of cohort.size" in said
    said = notice(", num_byzantine_population = 5", 100)
    assert "5 bad ones among them, one round holds more than 4 with probability 0.0019" in said
    found = re.search(r"at least one of 10 rounds with ([\d.]+)", said)
    assert found is not None
    assert float(found[1].rstrip(".")) == pytest.approx(run_risk(cohort_risk(100, 5, 30, 4), 10), rel=0.1)


def test_a_cohort_of_everybody_has_no_luck_in_it() -> None:
    assert "draws 20 of 20 sites" in notice("", 20)
    assert "with probability 0, and at least one of 10 rounds with 0." in notice("", 20)
    assert "with probability 1, and" in notice(", num_byzantine_population = 9", 20)
