"""A private run with nobody but canaries: the coordinator's own rounds, as `private_run` has them, with what an audit needs to see.

Coins, noise, clipping, grid, sum, file and divisor are the coordinator's; so is the decoding of updates, which are written as a
site writes them. What is missing is what no guarantee hangs on (transfer, optimizer, versions: post-processing) and what has tests
of its own (the ledger, and that a crash draws no second time).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import BinaryIO, Final

import numpy as np
import torch
from torch import Tensor

from fed_core.errors import ConfigError
from fed_core.payload.manifest import UpdateInfo
from fed_core.payload.reader import PayloadReader
from fed_core.payload.writer import write_payload
from fed_core.privacy.accounting import Spend, epsilon
from fed_core.privacy.mechanism import Mechanism
from fed_core.specs import TensorSpec
from fed_server.aggregation.private import PrivateNoise, PrivateSum, ReleasedSum, next_clipping_norm
from fed_server.config import RunConfig
from fed_server.config_privacy import AdaptiveClippingConfig, CentralPrivacyConfig
from fed_server.privacy.audit import Canaries, Reals, log_likelihood_ratio
from fed_server.privacy.mechanisms import first_norm, mechanism_of, pays_for_run
from fed_server.rounds.private_run import falls, noise_of
from fedstream.v1 import common_pb2

SENT_NORMS: Final = 10.0
"""Canaries send ten times what they are cut to, so that clipping has something to do."""

DrawsNoise = Callable[[int, Mechanism], PrivateNoise]


def audited_privacy(config: RunConfig) -> CentralPrivacyConfig:
    """The guarantee of a run config, where it is one that canaries can audit. Raises ConfigError where it is not, with the
    reason."""
    privacy = config.privacy
    if not isinstance(privacy, CentralPrivacyConfig):
        why = (
            "it gives no guarantee"
            if privacy.kind == "none"
            else "there the sites add the noise, and not the coordinator"
        )
        raise ConfigError(
            f'privacy.kind: expected "central", got "{privacy.kind}": {why}; audit the config of a run with kind = "central"'
        )
    if pays_for_run(privacy):
        raise ConfigError(
            f'privacy.correlation.kind: expected "independent", got "{privacy.correlation.kind}": that noise cancels between '
            'rounds, which the guesses here make no use of, so that the audit would find nothing; audit with kind = "independent"'
        )
    return privacy


def claimed_epsilon(config: RunConfig, num_units: int, num_reals: int, num_rounds: int, delta: float) -> float:
    """What so many rounds are charged towards who sees released models only, as the ledger has it. Takes as long as the accountant
    does."""
    mechanism = _mechanism(config, first_norm(audited_privacy(config)), num_units, num_reals)
    distance = num_rounds * noise_of(mechanism).failure(num_reals)
    return epsilon([Spend(mechanism, num_rounds)], delta, distance=distance).reported


def _mechanism(config: RunConfig, norm: float, num_units: int, num_reals: int) -> Mechanism:
    return mechanism_of(config, audited_privacy(config), norm, num_units, num_reals)


def own_noise(number: int, mechanism: Mechanism) -> PrivateNoise:
    """The noise of a round as private runs draw it, from the operating system's entropy."""
    return noise_of(mechanism)


def evidence(
    config: RunConfig,
    canaries: Canaries,
    num_rounds: int,
    *,
    noise: DrawsNoise = own_noise,
    is_asked: Callable[[float], bool] = falls,
    on_round: Callable[[int], None] = lambda number: None,
) -> Reals:
    """The log-likelihood ratio for each canary being in, [m], after `num_rounds` rounds of which only what is released was looked
    at.

    The roster is all canaries, in or out; each is asked in each round by a coin of its own, and sends SENT_NORMS clipping norms
    along its direction. `noise` and `is_asked` are where tests make it repeatable; `on_round` is told of each round that is over.
    Costs about 2 ms for each update. Raises ConfigError as `audited_privacy` does."""
    privacy = audited_privacy(config)
    norm, rate = first_norm(privacy), privacy.sampling_rate
    specs, names = _specs(canaries.dimension), [str(number) for number in range(len(canaries))]
    directions = torch.from_numpy(canaries.directions)
    scores = np.empty((num_rounds, len(canaries)))
    mechanism = _mechanism(config, norm, len(canaries), canaries.dimension)
    with TemporaryDirectory(prefix="fedstream-audit-") as folder, (Path(folder) / "update").open("wb+") as file:
        update_path, released_path = Path(folder) / "update", Path(folder) / "released"
        for number in range(1, num_rounds + 1):
            mechanism = _mechanism(config, norm, len(canaries), canaries.dimension)
            asked = [canary for canary in range(len(canaries)) if is_asked(rate)]
            norms = {names[canary]: norm for canary in asked}
            total = PrivateSum(specs, noise(number, mechanism), norms, norm)
            for canary in asked:
                if canaries.is_in[canary]:
                    sent = directions[canary] * (SENT_NORMS * norm)
                    _write_update(file, names[canary], specs, sent)
                    with PayloadReader(update_path) as update:
                        total.add(update, 1)
            total.release(released_path)
            expected = rate * len(canaries)
            with ReleasedSum(released_path, expected) as released:
                mean = torch.cat([_values(released, spec) for spec in specs])
                scores[number - 1] = (directions @ mean.float()).double().mul_(expected / norm).numpy()
                norm = _norm_after(privacy, norm, released)
            on_round(number)
    return log_likelihood_ratio(scores, mechanism.update_sigma / mechanism.sensitivity, rate)


def _specs(dimension: int) -> list[TensorSpec]:
    """Three tensors: they are clipped as one vector."""
    half, quarter = dimension // 2, dimension // 4
    sizes = {"a": half, "b": quarter, "c": dimension - half - quarter}
    return [TensorSpec(name, (size,), "float32") for name, size in sizes.items()]


def _write_update(file: BinaryIO, name: str, specs: list[TensorSpec], values: Tensor) -> None:
    """A canary's update as a site would write it, over whatever the file held before."""
    file.seek(0)
    written = write_payload(
        file,
        kind=common_pb2.PAYLOAD_KIND_UPDATE,
        run_id="audit",
        round=1,
        model_version=0,
        base_digest=bytes(32),
        update=UpdateInfo(assignment_id=name, num_examples=1),
        tensors=zip(specs, torch.split(values, [spec.num_elements for spec in specs]), strict=True),
    )
    file.truncate(written.total_bytes)
    file.flush()


def _values(released: ReleasedSum, spec: TensorSpec) -> Tensor:
    values = released.report(spec, 0, spec.num_elements)
    assert values is not None, "every tensor of an audit is released"
    return values


def _norm_after(privacy: CentralPrivacyConfig, norm: float, released: ReleasedSum) -> float:
    clipping = privacy.clipping
    if not isinstance(clipping, AdaptiveClippingConfig):
        return norm
    return next_clipping_norm(norm, released.uncut_part, clipping.quantile, clipping.learning_rate)
