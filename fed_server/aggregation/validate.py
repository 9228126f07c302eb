"""Whether an update is what its assignment asked for: checked wholly, while it arrives, before it counts."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch

from fed_core.codecs.base import TensorDecoder, is_bounded
from fed_core.codecs.registry import codec_named
from fed_core.errors import NotFiniteError, PayloadError, UpdateRefusedError
from fed_core.payload.manifest import RAW, Manifest, SegmentSpan, TensorEntry, UpdateInfo, split_bundle
from fed_core.payload.reader import check_bundled, check_entry
from fed_core.specs import TensorSpec, explain_difference
from fed_core.tensors import torch_dtype
from fed_server.aggregation.loss_weight import LossWeighting
from fed_server.aggregation.mean import as_reals
from fedstream.v1 import common_pb2

MAX_METRICS = 64


@dataclass(frozen=True)
class Expected:
    """What an assignment asked for. `bounds` holds the largest absolute value by tensor; tensors without one are not bounded.
    `codecs` are those that the run takes besides raw; `is_normalized`: updates are divided by their work; `least_work`: the least
    work that an update must say is behind it, 0 where none is asked for;
    `importance` is what the operator multiplies the weight by; `fixed_weight`, where there is one, is the weight whatever else is
    said; `loss_weighting`, where there is one, decides in place of `weighting`."""

    assignment_id: str
    run_id: str
    round: int
    model_version: int
    base_digest: bytes
    specs: tuple[TensorSpec, ...]
    bounds: Mapping[str, float]
    codecs: Collection[str]
    weighting: str
    max_weight: int
    importance: int = 1
    is_normalized: bool = False
    least_work: float = 0.0
    fixed_weight: int | None = None
    loss_weighting: LossWeighting | None = None


def check_manifest(manifest: Manifest, expected: Expected) -> int:
    """Raises UpdateRefusedError unless the manifest is that of the expected update; returns the update's weight."""
    update = manifest.update
    if manifest.kind != common_pb2.PAYLOAD_KIND_UPDATE or update is None:
        raise UpdateRefusedError(f"expected an update, got a {common_pb2.PayloadKind.Name(manifest.kind)}")
    for what, got, wanted in (
        ("assignment", update.assignment_id, expected.assignment_id),
        ("run", manifest.run_id, expected.run_id),
        ("round", manifest.round, expected.round),
        ("model version", manifest.model_version, expected.model_version),
        ("base digest", manifest.base_digest.hex(), expected.base_digest.hex()),
    ):
        if got != wanted:
            raise UpdateRefusedError(f"the update is for {what} {got!r}, this assignment is for {wanted!r}; poll again")
    if manifest.specs != expected.specs:
        raise UpdateRefusedError(
            f"the update's tensors are not the run's: {explain_difference(expected.specs, manifest.specs)}"
        )
    for entry in manifest.tensors:
        if entry.codec != RAW and entry.codec not in expected.codecs:
            taken = ", ".join([RAW, *sorted(expected.codecs)])
            raise UpdateRefusedError(f"tensor {entry.spec.name!r} is encoded by {entry.codec!r}; the run takes {taken}")
    if len(update.metrics) > MAX_METRICS:
        raise UpdateRefusedError(f"{len(update.metrics)} metrics; at most {MAX_METRICS} are taken")
    if update.num_steps < 0 or not update.training_seconds >= 0:
        raise UpdateRefusedError("num_steps and training_seconds must not be negative")
    if (update.normalizer > 0) != expected.is_normalized:
        wanted = "be divided by the work behind them" if expected.is_normalized else "come as they are"
        raise UpdateRefusedError(
            f"the update says normalizer = {update.normalizer:g}, and updates of this run are to {wanted}; install the "
            "coordinator's version at the site"
        )
    if (update.work > 0) != (expected.least_work > 0):
        wanted = "say what work is behind them" if expected.least_work else "say nothing of it"
        raise UpdateRefusedError(
            f"the update says work = {update.work:g}, and updates of this run are to {wanted}; install the coordinator's version "
            "at the site"
        )
    if update.work < expected.least_work:
        raise UpdateRefusedError(
            f"the update says work = {update.work:g}, expected at least {expected.least_work:g}; raise the site's learning rate"
        )
    return weight_of(update, expected)


def weight_of(update: UpdateInfo, expected: Expected) -> int:
    """The whole number that the update is weighted by. Raises UpdateRefusedError where it is not in 1..max_weight."""
    if update.num_examples < 1:
        raise UpdateRefusedError(f"num_examples is {update.num_examples}; expected at least 1")
    if expected.fixed_weight is not None:
        return expected.fixed_weight
    if expected.loss_weighting is not None:
        return expected.loss_weighting.weight_of(update)
    counts = {"examples": update.num_examples, "custom": update.custom_weight, "uniform": 1}
    weight = counts[expected.weighting] * expected.importance
    if not 1 <= weight <= expected.max_weight:
        raise UpdateRefusedError(
            f"weight {weight} (by {expected.weighting}) is outside 1..{expected.max_weight}; raise aggregation.max_weight or "
            f"let the workload report a smaller one"
        )
    return weight


class ValueChecker:
    """Checks that every value is finite and within bounds, segment by segment as they verify, while they are hot in cache: by the
    codec's own word for the largest value there can be, where it has one and that suffices, else by decoding."""

    def __init__(self, expected: Expected) -> None:
        self._expected = expected
        self._manifest: Manifest | None = None
        # Of the tensor whose bodies are coming, by its index.
        self._decoder: tuple[int, TensorDecoder] | None = None
        self.weight = 0

    def on_manifest(self, manifest: Manifest) -> None:
        """Checks everything that the manifest says."""
        self.weight = check_manifest(manifest, self._expected)
        for entry in manifest.tensors:
            check_entry(entry)
        self._manifest = manifest
        self._decoder = None

    def on_segment(self, span: SegmentSpan, data: memoryview) -> None:
        """Checks one segment's values. Raises NotFiniteError, UpdateRefusedError or PayloadError naming the tensor."""
        assert self._manifest is not None
        if span.is_bundle:
            for bundled in split_bundle(self._manifest, data):
                entry = self._manifest.tensors[bundled.tensor_index]
                head, body = check_bundled(self._manifest, bundled)
                self._check(entry, codec_named(entry.codec).decoder(entry.spec, head), 0, entry.spec.num_elements, body)
            return
        entry = self._manifest.tensors[span.tensor_index]
        if span.is_head:
            # Copied: the decoder may keep views of it.
            self._decoder = span.tensor_index, self._named(entry, bytes(data))
            return
        if self._decoder is None or self._decoder[0] != span.tensor_index:
            self._decoder = span.tensor_index, self._named(entry, None)
        self._check(entry, self._decoder[1], span.first_coordinate, span.num_coordinates, data)

    def _named(self, entry: TensorEntry, head: bytes | None) -> TensorDecoder:
        try:
            return codec_named(entry.codec).decoder(entry.spec, head)
        except PayloadError as error:
            raise PayloadError(f"tensor {entry.spec.name!r}: {error}") from error

    def _check(self, entry: TensorEntry, decoder: TensorDecoder, first: int, count: int, body: memoryview) -> None:
        dtype, bound = torch_dtype(entry.spec.dtype), self._expected.bounds.get(entry.spec.name, math.inf)
        try:
            if is_bounded(decoder) and decoder.bound(body, count) <= min(bound, torch.finfo(dtype).max):
                return
            tile = torch.empty(count, dtype=dtype)
            decoder.decode(first, body, tile)
        except PayloadError as error:
            raise PayloadError(f"tensor {entry.spec.name!r}: {error}") from error
        if not (tile.is_floating_point() or tile.is_complex()):
            return
        low, high = (float(x) for x in torch.aminmax(as_reals(tile)))
        largest = max(-low, high)
        if not largest < math.inf:  # NaN compares false
            raise NotFiniteError(
                f"tensor {entry.spec.name!r} of the update holds NaN or infinity; look at the learning rate"
            )
        if largest > bound:
            raise UpdateRefusedError(
                f"tensor {entry.spec.name!r} of the update holds {largest:.4g}, over this round's bound of {bound:.4g}; lower the "
                f"learning rate, or set aggregation.bound"
            )
