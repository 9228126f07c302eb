"""Partial aggregates: a weighted mean on its way, as a payload that another coordinator can go on with.

Law: however a cohort is split, in whatever tree the parts are merged, and wherever a merge is written down and taken up again, the
mean has the same bits as if one coordinator had folded every update.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import BinaryIO

import torch

from fed_core.errors import PayloadError, UpdateRefusedError
from fed_core.payload.manifest import PartialInfo
from fed_core.payload.reader import PayloadReader
from fed_core.payload.writer import Written, write_payload
from fed_core.specs import TensorSpec, explain_difference
from fed_server.aggregation.grid import GridPolicy, bounds_of
from fed_server.aggregation.mean import WeightedMean
from fedstream.v1 import common_pb2


@dataclass(frozen=True)
class Origin:
    """What the updates of a partial aggregate have in common: their run, their round, and the version they are relative to."""

    run_id: str
    round: int
    model_version: int
    base_digest: bytes


def partial_specs(mean: WeightedMean) -> list[TensorSpec]:
    """The tensors of a partial aggregate: a vector of float64 steps for each that is averaged (two a complex element), counters as
    they are, nothing for what stays as it is."""
    specs = [
        TensorSpec(spec.name, (len(mean.sums[spec.name]),), "float64", spec.role) if spec.name in mean.sums else spec
        for spec in mean.specs
    ]
    return [spec for spec in specs if spec.name in mean.sums or spec.name in mean.maxima]


def write_partial(file: BinaryIO, mean: WeightedMean, origin: Origin) -> Written:
    """Writes a mean as it stands into an empty, seekable file. Memory: one tile."""
    specs = partial_specs(mean)
    return write_payload(
        file,
        kind=common_pb2.PAYLOAD_KIND_PARTIAL,
        run_id=origin.run_id,
        round=origin.round,
        model_version=origin.model_version,
        base_digest=origin.base_digest,
        update=None,
        tensors=[
            (spec, mean.sums[spec.name].steps if spec.name in mean.sums else mean.maxima[spec.name].view(spec.shape))
            for spec in specs
        ],
        partial=PartialInfo(mean.num_updates, mean.total_weight, _exponents(mean, specs)),
    )


def merge_partial(mean: WeightedMean, partial: PayloadReader, origin: Origin, policy: GridPolicy) -> None:
    """Adds what a partial aggregate holds to a mean of the same round; merged into an empty mean, it is resumed.

    `policy` is the run's: it says what a value and a weight may be. All is checked before anything is added. Memory: one tile.
    Raises UpdateRefusedError where it belongs to something else or would leave the range of exact sums, and PayloadError where its
    sums cannot be those of its weight.
    """
    info = _check_origin(mean, partial, origin)
    most = policy.cohort_limit * policy.max_weight
    if mean.total_weight + info.total_weight > most:
        raise UpdateRefusedError(
            f"a weight of {info.total_weight:,} on top of {mean.total_weight:,} is beyond the {most:,} up to which sums of this "
            "run are exact; raise cohort.size or aggregation.max_weight"
        )
    _check_sums(mean, partial, info, policy)
    for name, total in mean.sums.items():
        for first, tile in partial.iter_tiles(name):
            total.add_steps(first, tile)
    if info.num_updates:
        for name in mean.maxima:
            for first, tile in partial.iter_tiles(name):
                mean.raise_maxima(name, first, tile)
    mean.count(info.num_updates, info.total_weight)


def _check_origin(mean: WeightedMean, partial: PayloadReader, origin: Origin) -> PartialInfo:
    manifest = partial.manifest
    if manifest.partial is None:
        raise UpdateRefusedError(f"expected a partial aggregate, got a {common_pb2.PayloadKind.Name(manifest.kind)}")
    for what, got, wanted in (
        ("run", manifest.run_id, origin.run_id),
        ("round", manifest.round, origin.round),
        ("model version", manifest.model_version, origin.model_version),
        ("base digest", manifest.base_digest.hex(), origin.base_digest.hex()),
    ):
        if got != wanted:
            raise UpdateRefusedError(
                f"the partial aggregate is of {what} {got!r}, expected {wanted!r}; it cannot be merged"
            )
    specs = partial_specs(mean)
    if list(manifest.specs) != specs:
        raise UpdateRefusedError(
            f"the tensors of the partial aggregate are not the run's: {explain_difference(specs, manifest.specs)}"
        )
    if manifest.partial.exponents != _exponents(mean, specs):
        raise UpdateRefusedError(
            "the partial aggregate is on another grid than this round's; sums merge only on the same"
        )
    return manifest.partial


def _check_sums(mean: WeightedMean, partial: PayloadReader, info: PartialInfo, policy: GridPolicy) -> None:
    bounds = bounds_of({name: total.exponent for name, total in mean.sums.items()}, policy)
    for name, total in mean.sums.items():
        # Every update adds at most weight * bound, which is a whole number of steps.
        most = info.total_weight * bounds[name] * 2.0**-total.exponent
        for _, tile in partial.iter_tiles(name):
            if not bool((tile.abs() <= most).all() and (tile == torch.round(tile)).all()):
                raise PayloadError(
                    f"tensor {name!r} of the partial aggregate holds what no updates of total weight {info.total_weight} add up to"
                )


def _exponents(mean: WeightedMean, specs: Sequence[TensorSpec]) -> tuple[int, ...]:
    return tuple(mean.sums[spec.name].exponent if spec.name in mean.sums else 0 for spec in specs)
