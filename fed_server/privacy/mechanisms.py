"""What a run's config declares to the accountant: pure."""

from __future__ import annotations

from fed_core.errors import ConfigError
from fed_core.privacy.banded import BandedInverseRoot
from fed_core.privacy.clipping import STD_BITS
from fed_core.privacy.correlated import Factorization
from fed_core.privacy.mechanism import (
    Correlation,
    Mechanism,
    central_adaptive,
    central_poisson,
    correlated,
    default_bit_sigma,
)
from fed_core.privacy.tree import BinaryTree
from fed_server.config import RunConfig
from fed_server.config_privacy import (
    BandedInverseConfig,
    CentralPrivacyConfig,
    FixedClippingConfig,
    IndependentConfig,
)

FINER_BITS = 5
"""Weighted noise is summed on a grid of 2^5 times as many steps, so that the rounding of sums hardly counts."""


def first_norm(privacy: CentralPrivacyConfig) -> float:
    """What the updates of the first round are cut to."""
    clipping = privacy.clipping
    return clipping.norm if isinstance(clipping, FixedClippingConfig) else clipping.initial_norm


def pays_for_run(privacy: CentralPrivacyConfig) -> bool:
    """Whether one event pays for all rounds."""
    return not isinstance(privacy.correlation, IndependentConfig)


def mechanism_of(
    config: RunConfig, privacy: CentralPrivacyConfig, norm: float, num_units: int, num_reals: int
) -> Mechanism:
    """What a round declares whose updates are cut to `norm`, or where noise is correlated, what the whole run does. `num_reals` are
    released. Raises ConfigError where an adaptive bound, or the rounding of weighted noise, leaves nothing of the noise."""
    noise, rate = privacy.noise_multiplier, privacy.sampling_rate
    if pays_for_run(privacy):
        return _whole(config, privacy, norm, num_reals)
    if isinstance(privacy.clipping, FixedClippingConfig):
        return central_poisson(norm, noise, rate)
    return central_adaptive(norm, noise, default_bit_sigma(noise, rate, num_units), rate)


def factorization_of(config: RunConfig, privacy: CentralPrivacyConfig) -> Factorization:
    """How the noises of a run's rounds hang together."""
    num_rounds, correlation = config.schedule.max_rounds, privacy.correlation
    if isinstance(correlation, BandedInverseConfig):
        return BandedInverseRoot(num_rounds, min(correlation.bands, num_rounds))
    return BinaryTree(num_rounds)


def _whole(config: RunConfig, privacy: CentralPrivacyConfig, norm: float, num_reals: int) -> Mechanism:
    correlation = privacy.correlation
    assert not isinstance(correlation, IndependentConfig)
    factorization = factorization_of(config, privacy)
    sensitivity = factorization.sensitivity(correlation.min_separation, correlation.max_participations)
    if isinstance(correlation, BandedInverseConfig):
        # A step is at most 2^-(STD_BITS + FINER_BITS) of the noise, and so hangs on the sensitivity that it adds to.
        rounding = factorization.rounding_sensitivity(num_reals) * 2.0 ** -(STD_BITS + FINER_BITS)
        if privacy.noise_multiplier * rounding >= 0.5:
            raise ConfigError(
                f"privacy.correlation: a model of {num_reals:,} values is too large for weighted noise over "
                f"{config.schedule.max_rounds} rounds at a noise multiplier of {privacy.noise_multiplier:g}: its rounding would "
                'cost as much as the updates; take kind = "tree", which rounds nothing'
            )
        sensitivity /= 1 - privacy.noise_multiplier * rounding
    return correlated(
        norm,
        privacy.noise_multiplier,
        sensitivity,
        Correlation(
            factorization.name,
            config.schedule.max_rounds,
            correlation.max_participations,
            correlation.min_separation,
        ),
    )
