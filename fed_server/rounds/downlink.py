"""How versions are encoded to be sent: pure rules, from the run's config and what a round has changed."""

from __future__ import annotations

import math

from fed_core.codecs.base import Encoding
from fed_core.codecs.lattice import LATTICE_DTYPES, MAX_STEPS, LatticeEncoding
from fed_server.config import LatticeDownlinkConfig
from fed_server.rounds.version import ChangeMeter

# Vectors (biases, norms) are few and sensitive: their steps are an eighth.
_VECTOR_BITS = 3

# A float32 cannot be divided further, and a step beyond any weight is none.
_EXPONENTS = (-126, 100)


def lattice_for(config: LatticeDownlinkConfig, change: ChangeMeter, *, seed: int) -> Encoding:
    """The lattice of a round's delta: steps of so many root mean squares of each tensor's change in this round, never much finer
    than the weights themselves. What is not sent is carried along. `seed` is that of the run: it draws the threshold of each
    coordinate, the same for all versions. A tensor that has outgrown its finest steps is sent raw, without them."""
    exponents: dict[str, int] = {}
    for name, spec in change.specs.items():
        if spec.dtype not in LATTICE_DTYPES:
            continue
        step = config.step * math.sqrt(change.energy[name] / spec.num_elements)
        is_vector = _is_vector(spec.shape)
        finest = config.finest_step * math.sqrt(change.weights[name] / spec.num_elements)
        if is_vector:
            step, finest = step * 2.0**-_VECTOR_BITS, finest * 2.0**-_VECTOR_BITS
        exponents[name] = _exponent(max(step, finest), change.max_abs[name])
    outgrown = frozenset(name for name, exponent in exponents.items() if not change.keeps_exact(name, exponent))
    return LatticeEncoding(exponents, raw=outgrown, seed=seed)


def first_error(config: LatticeDownlinkConfig, has_trained_weights: bool) -> float:
    """What version 0 may lose when it is sent, |v - w|^2 / |w|^2: random weights stay random when they are rounded."""
    if config.first_error is not None:
        return config.first_error
    return 1e-4 if has_trained_weights else 0.03


def first_lattice_for(max_error: float, change: ChangeMeter) -> Encoding:
    """The lattice of version 0: as wide as the error allows, for |v - w|^2 is at most a twelfth of a step squared an
    element."""
    exponents: dict[str, int] = {}
    for name, spec in change.specs.items():
        if spec.dtype not in LATTICE_DTYPES:
            continue
        step = math.sqrt(12 * max_error * change.weights[name] / spec.num_elements)
        exponents[name] = _exponent(
            step * (2.0**-_VECTOR_BITS if _is_vector(spec.shape) else 1.0), change.max_abs[name]
        )
    return LatticeEncoding(exponents)


def _is_vector(shape: tuple[int, ...]) -> bool:
    return sum(length > 1 for length in shape) <= 1


def _exponent(step: float, max_abs: float) -> int:
    """The largest power of two that is no more than the step, and no less than what keeps values exact in float32."""
    lowest, highest = _EXPONENTS
    exponent = math.floor(math.log2(step)) if step > 0 else lowest
    if max_abs > 0:
        exponent = max(exponent, math.ceil(math.log2(max_abs / MAX_STEPS)))
    return min(max(exponent, lowest), highest)
