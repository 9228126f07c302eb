"""The one-run audit: its bound against published figures and exact probabilities, broken mechanisms that it must catch, the honest
one that it must not, and what `fedctl privacy audit` says."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit
from scipy.stats import beta, binom

from fed_core.errors import ConfigError
from fed_core.privacy import accounting
from fed_core.privacy.mechanism import Mechanism
from fed_core.privacy.noise import GridGaussian
from fed_server.aggregation import private
from fed_server.aggregation.private import PrivateNoise, PrivateSum
from fed_server.cli import operator
from fed_server.config import RunConfig, parse_run_config
from fed_server.privacy.audit import (
    WAYS,
    Canaries,
    Finding,
    Way,
    examine,
    log_likelihood_ratio,
    lower_bound,
    make_canaries,
    p_value,
)
from fed_server.rounds import private_audit
from fed_server.rounds.private_audit import audited_privacy, claimed_epsilon, evidence
from tests.server.test_private_run import config as config_text

NUM, DIMENSION, DELTA = 1000, 2048, 1e-5


@pytest.fixture(autouse=True, scope="module")
def coarse() -> object:
    """The grid on which guesses are made: a tenth of the accountant's time, and pessimistic as well."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(accounting, "INTERVAL", 1e-3)
        yield


def text(**changes: object) -> str:
    return config_text(size=NUM, **changes).replace("delta = 0.01", f"delta = {DELTA}")  # type: ignore[arg-type]


# The bound


@pytest.mark.parametrize(
    ("num_canaries", "num_guesses", "num_right", "delta", "published"),
    [(1000, 100, 75, 1e-4, 0.673), (100_000, 1510, 1439, 1e-5, 2.675)],
)
def test_the_bound_is_the_published_one(
    num_canaries: int, num_guesses: int, num_right: int, delta: float, published: float
) -> None:
    """What the paper prints, in appendix D and in section 7; the first is rounded there, the second cut."""
    assert lower_bound(num_canaries, num_guesses, num_right, delta, 0.05) == pytest.approx(published, abs=1e-3)


@given(guesses=st.integers(20, 1000), wrong=st.integers(0, 8), error=st.floats(0.001, 0.2))
@settings(max_examples=25, deadline=None)
def test_without_delta_the_bound_is_that_of_clopper_and_pearson(guesses: int, wrong: int, error: float) -> None:
    right = guesses - wrong
    share = float(beta.ppf(error, right, wrong + 1))
    expected = max(0.0, float(np.log(share / (1 - share))))
    assert lower_bound(1000, guesses, right, 0.0, error) == pytest.approx(expected, abs=1e-6)


@given(
    canaries=st.integers(10, 400),
    part=st.floats(0.1, 1),
    right_part=st.floats(0, 1),
    epsilon=st.floats(0, 6),
    delta=st.floats(0, 0.01),
)
@settings(max_examples=60, deadline=None)
def test_no_private_mechanism_is_righter_than_the_bound_allows(
    canaries: int, part: float, right_part: float, epsilon: float, delta: float
) -> None:
    """Of mechanisms that are (epsilon, delta)-private for sure: randomized responses that with probability delta give everything
    away, or that give each canary away with probability delta."""
    guesses = max(1, round(part * canaries))
    right = round(right_part * guesses)
    allowed = p_value(canaries, guesses, right, epsilon, delta)
    honest = float(expit(epsilon))
    assert allowed >= min(1.0, delta + (1 - delta) * binom.sf(right - 1, guesses, honest)) - 1e-12
    assert allowed >= binom.sf(right - 1, guesses, delta + (1 - delta) * honest) - 1e-12


@pytest.mark.parametrize("epsilon", [0.5, 2.0, 4.0])
@pytest.mark.parametrize("guesses", [40, 120])
def test_a_bound_exceeds_the_truth_as_rarely_as_it_says(epsilon: float, guesses: int) -> None:
    """Exactly, for the mechanism with the most right guesses: randomized response."""
    bounds = np.array([lower_bound(1000, guesses, right, 0.0, 0.05) for right in range(guesses + 1)])
    assert (np.diff(bounds) >= 0).all()
    chances = binom.pmf(np.arange(guesses + 1), guesses, expit(epsilon))
    false_alarms = chances[bounds > epsilon].sum()
    assert false_alarms <= 0.05
    # Nor is it more careful than it must be: with one right guess less there would be too many.
    assert false_alarms + chances[bounds <= epsilon][-1] > 0.05


def test_all_ways_to_guess_together_raise_few_false_alarms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ratios of a mechanism that is (1, 0)-private and says of each canary how sure it is."""
    monkeypatch.setattr("fed_server.privacy.audit.lower_bound", functools.cache(lower_bound))
    generator, alarms = np.random.default_rng(3), 0
    for _ in range(200):
        is_in = generator.random(NUM) < 0.5
        sure = generator.random(NUM)
        says = np.where(generator.random(NUM) < expit(sure), is_in, ~is_in)
        alarms += examine(np.where(says, sure, -sure), is_in, DELTA).contradicts(1.0)
    assert alarms <= binom.isf(1e-4, 200, 0.05)


def test_the_likelihood_ratio_is_that_of_the_declared_mechanism() -> None:
    scores = np.array([[0.3, 1.4, -2.0], [1.2, -0.4, 0.5]])

    def density(score: float, mean: float) -> float:
        return float(np.exp(-((score - mean) ** 2) / (2 * 0.7**2)))

    for rate in (0.2, 1.0):
        ratios = [
            np.prod([(1 - rate) + rate * density(score, 1) / density(score, 0) for score in column])
            for column in scores.T
        ]
        assert log_likelihood_ratio(scores, 0.7, rate) == pytest.approx(np.log(ratios))
    # Far beyond what a float can exponentiate.
    assert np.isfinite(log_likelihood_ratio(np.array([[1e3]]), 0.01, 0.5)).all()


def test_right_and_wrong_guesses_are_counted_as_such() -> None:
    is_in = np.arange(1000) >= 500
    sure = examine(np.arange(1000.0), is_in, DELTA)
    assert [attempt.num_right for attempt in sure.attempts] == [attempt.num_guesses for attempt in sure.attempts]
    assert sure.bound == sure.most
    wrong = examine(-np.arange(1000.0), is_in, DELTA)
    assert [attempt.num_right for attempt in wrong.attempts] == [0] * len(WAYS)
    assert wrong.bound == 0
    ties = examine(np.zeros(1000), is_in, DELTA, ways=[Way(0.5, 0.5), Way(0.25, 0.0)])
    assert [attempt.num_right for attempt in ties.attempts] == [1000, 250]


# Canaries


def test_canaries_are_fair_orthonormal_and_made_by_their_seed(canaries: Canaries) -> None:
    gram = canaries.directions @ canaries.directions.T
    assert np.abs(gram - np.eye(NUM)).max() < 1e-5
    assert binom.ppf(1e-6, NUM, 0.5) < canaries.is_in.sum() < binom.isf(1e-6, NUM, 0.5)
    one, same, other = (make_canaries(100, 100, seed) for seed in (1, 1, 2))
    assert (one.directions == same.directions).all()
    assert (one.is_in == same.is_in).all()
    assert (one.directions != other.directions).any()
    assert (one.is_in != other.is_in).any()
    # No coordinate is preferred: of a uniform frame the first entries are as often negative as not.
    signs = [make_canaries(100, 120, seed).directions[0, 0] > 0 for seed in range(40)]
    assert 6 < sum(signs) < 34


@pytest.mark.parametrize(
    ("num", "dimension", "says"), [(99, 500, "100 or more"), (200, 199, "dimension of 200 or more")]
)
def test_too_few_canaries_or_dimensions_are_refused(num: int, dimension: int, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        make_canaries(num, dimension, 0)


@pytest.mark.parametrize(("delta", "confidence"), [(1.0, 0.95), (-0.1, 0.95), (0.1, 1.0), (0.1, 0.3)])
def test_what_is_no_delta_or_confidence_is_refused(delta: float, confidence: float) -> None:
    with pytest.raises(ConfigError, match=r"delta|confidence"):
        examine(np.zeros(200), np.zeros(200, np.bool_), delta, confidence)


# Mechanisms, honest and broken. All rounds are the coordinator's; noise and coins are keyed, so that every figure stays the same.


@pytest.fixture(scope="module")
def canaries() -> Canaries:
    return make_canaries(NUM, DIMENSION, 1)


def keyed(seed: int, factor: float = 1.0) -> Callable[[int, Mechanism], PrivateNoise]:
    def noise(number: int, mechanism: Mechanism) -> PrivateNoise:
        key = blake3(f"{seed} {number}".encode()).digest()
        return PrivateNoise(mechanism.update_sigma * factor, mechanism.bit_sigma or 0.0, key=key)

    return noise


def coins(seed: int) -> Callable[[float], bool]:
    generator = np.random.default_rng(seed)
    return lambda rate: bool(generator.random() < rate)


def found(config: RunConfig, canaries: Canaries, seed: int = 0, factor: float = 1.0) -> Finding:
    ratios = evidence(config, canaries, config.schedule.max_rounds, noise=keyed(seed, factor), is_asked=coins(seed))
    return examine(ratios, canaries.is_in, DELTA)


@pytest.fixture(scope="module")
def whole() -> RunConfig:
    """Everyone in one round."""
    return parse_run_config(text(noise=1.5))


@pytest.fixture(scope="module")
def sampled() -> RunConfig:
    """A tenth in each of eight rounds."""
    return parse_run_config(text(noise=1.5, rate=0.1, max_rounds=8))


def claim_of(config: RunConfig) -> float:
    return claimed_epsilon(config, NUM, DIMENSION, config.schedule.max_rounds, DELTA)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_honest_mechanism_is_not_caught(whole: RunConfig, canaries: Canaries, seed: int) -> None:
    result, claimed = found(whole, canaries, seed), claim_of(whole)
    assert not result.contradicts(claimed)
    # Something leaks, as it may, and is seen: an audit that sees nothing would pass anything.
    assert 0.3 < result.bound < claimed < result.most


def test_the_honest_mechanism_with_sampling_is_not_caught(sampled: RunConfig, canaries: Canaries) -> None:
    result, claimed = found(sampled, canaries), claim_of(sampled)
    assert 0 < result.bound < claimed < result.most


def test_the_honest_mechanism_with_an_adaptive_norm_is_not_caught(canaries: Canaries) -> None:
    clipping = 'kind = "adaptive"\ninitial_norm = 1.0\nquantile = 0.5\nlearning_rate = 1.0'
    config = parse_run_config(text(noise=1.0, rate=0.25, max_rounds=3, clipping=clipping))
    result = found(config, canaries)
    assert 0 < result.bound < claim_of(config)


def test_no_noise_is_caught(whole: RunConfig, canaries: Canaries, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GridGaussian, "add_to", lambda *_: None)
    result = found(whole, canaries)
    assert result.bound == result.most > claim_of(whole) + 2


def test_a_quarter_of_the_noise_is_caught(whole: RunConfig, canaries: Canaries) -> None:
    assert found(whole, canaries, factor=0.25).bound > claim_of(whole) + 0.7


def test_no_clipping_is_caught(whole: RunConfig, canaries: Canaries, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both guards are off: what cuts, and what refuses an update that is too long all the same."""
    monkeypatch.setattr(private, "clip_factor", lambda *_: 1.0)
    monkeypatch.setattr(private, "max_squared_steps", lambda *_: 2**53)
    assert found(whole, canaries).bound > claim_of(whole) + 2


def test_no_noise_with_sampling_is_caught(
    sampled: RunConfig, canaries: Canaries, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(GridGaussian, "add_to", lambda *_: None)
    assert found(sampled, canaries).bound > claim_of(sampled) + 1


class _NoisedForAllMembers(PrivateSum):
    """Adds noise to the mean as if it were divided by all N members, and divides by the q N that are expected."""

    RATE = 0.1

    def draw(self) -> None:
        if not self._is_drawn:
            before = {name: total.steps.clone() for name, total in self._sums.items()}
            super().draw()
            for name, total in self._sums.items():
                total.steps.sub_(before[name]).mul_(self.RATE).round_().add_(before[name])


def test_a_wrong_denominator_is_caught(sampled: RunConfig, canaries: Canaries, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(private_audit, "PrivateSum", _NoisedForAllMembers)
    assert found(sampled, canaries).bound > claim_of(sampled) + 1


def test_all_members_are_asked_whether_they_are_there_or_not(whole: RunConfig, canaries: Canaries) -> None:
    """The coins of a round know nothing of who is in the run."""
    asked = []

    def coin(rate: float) -> bool:
        asked.append(rate)
        return len(asked) % 97 == 0

    evidence(whole, canaries, 1, noise=keyed(1), is_asked=coin)
    assert asked == [1.0] * NUM


def test_scores_are_what_a_canary_added_over_its_norm(whole: RunConfig) -> None:
    """With a thousandth of the noise, the ratios of who is in are those of a score of 1."""
    few = make_canaries(150, 300, 2)
    ratios = evidence(whole, few, 1, noise=keyed(1, 1e-3))
    assert ratios * 1.5**2 + 0.5 == pytest.approx(few.is_in.astype(float), abs=8 * 1.5e-3)


# The command


def audit(*arguments: object, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as exit:
        operator.main(["privacy", "audit", *map(str, arguments)])
    shown = capsys.readouterr()
    return int(exit.value.code or 0), re.sub(r"\s+", " ", shown.out), re.sub(r"\s+", " ", shown.err)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(text(noise=2.0, rate=0.5, max_rounds=9))
    return path


SMALL = ("--canaries", 200, "--dimension", 256, "--rounds", 1)


def test_the_command_shows_guesses_claim_and_verdict(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = audit(path, *SMALL, "--seed", 5, capsys=capsys)
    assert code == 0
    for expected in (
        "Audit of 1 rounds at sampling rate 0.5, noise multiplier 2, with 200 canaries in 256 dimensions (seed 5)",
        "claimed epsilon",
        "audited epsilon",
        "did not contradict the claim",
        "no confirmation",
    ):
        assert expected in out
    assert "prove" not in out


def test_the_command_answers_in_json(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = audit(path, *SMALL, "--seed", 5, "--delta", 1e-6, "--json", capsys=capsys)
    answer = json.loads(out)
    assert code == 0
    config = parse_run_config(path.read_text())
    assert answer["claimed_epsilon"] == claimed_epsilon(config, 200, 256, 1, 1e-6)
    assert {name: answer[name] for name in ("num_rounds", "delta", "seed", "num_canaries", "relation")} == {
        "num_rounds": 1, "delta": 1e-6, "seed": 5, "num_canaries": 200, "relation": "add_remove",
    }  # fmt: skip
    assert answer["num_in"] == make_canaries(200, 256, 5).is_in.sum()
    assert answer["is_contradicted"] is False
    assert answer["audited_epsilon"] == max(attempt["audited_epsilon"] for attempt in answer["attempts"])
    assert len(answer["attempts"]) == len(WAYS)


def test_noise_and_coins_of_the_command_are_not_the_seeds(path: Path) -> None:
    """Canaries repeat, what hides them does not."""
    config, few = parse_run_config(path.read_text()), make_canaries(200, 256, 5)
    assert (evidence(config, few, 1) != evidence(config, few, 1)).any()


def test_the_command_says_when_a_claim_is_contradicted(
    path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(GridGaussian, "add_to", lambda *_: None)
    path.write_text(text(noise=4.0))
    code, out, _ = audit(path, *SMALL, capsys=capsys)
    assert code == 1
    assert "The audit contradicts the claim: epsilon is above" in out
    code, out, _ = audit(path, *SMALL, "--json", capsys=capsys)
    assert code == 1
    assert json.loads(out)["is_contradicted"] is True


def test_the_command_says_when_it_cannot_contradict_anything(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path.write_text(text(noise=0.5))
    code, out, _ = audit(path, *SMALL, capsys=capsys)
    assert code == 0
    assert "says nothing about the claim" in out
    assert "more --canaries" in out


@pytest.mark.parametrize(
    ("privacy", "says"),
    [
        (
            f'kind = "local"\nclipping_norm = 1.0\nnoise_multiplier = 2.0\ndelta = {DELTA}\n',
            "the sites add the noise",
        ),
        (
            f'kind = "central"\nsampling_rate = 0.5\nnoise_multiplier = 2.0\ndelta = {DELTA}\n'
            'clipping = { kind = "fixed", norm = 1.0 }\ncorrelation = { kind = "tree", max_participations = 3 }\n',
            "cancels between rounds",
        ),
    ],
)
def test_what_canaries_cannot_audit_is_refused(
    path: Path, capsys: pytest.CaptureFixture[str], privacy: str, says: str
) -> None:
    rest = path.read_text().partition("[privacy]")[0]
    path.write_text(rest + "[privacy]\n" + privacy)
    code, out, err = audit(path, *SMALL, capsys=capsys)
    assert (code, out) == (65, "")
    assert says in err


def test_a_run_without_a_guarantee_has_nothing_to_audit() -> None:
    document = text()
    with pytest.raises(ConfigError, match="gives no guarantee"):
        audited_privacy(parse_run_config(document[: document.index("[privacy]")]))


def test_a_delta_too_large_for_the_roster_is_refused(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = audit(path, *SMALL, "--delta", 0.1, capsys=capsys)
    assert code == 65
    assert "less than 1/1,000" in err


def test_updates_pass_through_three_tensors_as_one_vector(whole: RunConfig) -> None:
    """What is clipped is the whole: a canary in one tensor's coordinates only is cut to the same norm."""
    directions = np.zeros((100, 400), np.float32)
    directions[np.arange(100), np.arange(0, 400, 4)] = 1
    few = Canaries(np.ones(100, np.bool_), directions)
    scores = evidence(whole, few, 1, noise=keyed(1, 1e-3)) * 1.5**2 + 0.5
    assert scores == pytest.approx(np.ones(100), abs=8 * 1.5e-3)
    assert len(private_audit._specs(400)) == 3
    assert torch.get_default_dtype() is torch.float32
