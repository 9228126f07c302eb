"""Whether an update is what its assignment asked for: checked wholly, while it arrives, before it counts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from fed_core.codecs.registry import codec_named
from fed_core.errors import NotFiniteError, UpdateRefusedError
from fed_core.payload.manifest import Manifest, SegmentSpan
from fed_core.specs import TensorSpec, explain_difference
from fed_core.tensors import torch_dtype
from fed_server.aggregation.mean import as_reals
from fedstream.v1 import common_pb2

MAX_METRICS = 64


@dataclass(frozen=True)
class Expected:
    """What an assignment asked for. `bounds` holds the largest absolute value by tensor; tensors without one are not bounded."""

    assignment_id: str
    run_id: str
    round: int
    model_version: int
    base_digest: bytes
    specs: tuple[TensorSpec, ...]
    bounds: Mapping[str, float]
    codec: str
    weighting: str
    max_weight: int


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
        if entry.codec not in (expected.codec, "raw"):
            raise UpdateRefusedError(
                f"tensor {entry.spec.name!r} is encoded by {entry.codec!r}; the run takes {expected.codec!r}"
            )
    if len(update.metrics) > MAX_METRICS:
        raise UpdateRefusedError(f"{len(update.metrics)} metrics; at most {MAX_METRICS} are taken")
    if update.num_steps < 0 or not update.training_seconds >= 0:
        raise UpdateRefusedError("num_steps and training_seconds must not be negative")
    return weight_of(update.num_examples, update.custom_weight, expected)


def weight_of(num_examples: int, custom_weight: int, expected: Expected) -> int:
    """The whole number that the update is weighted by. Raises UpdateRefusedError where it is not in 1..max_weight."""
    if num_examples < 1:
        raise UpdateRefusedError(f"num_examples is {num_examples}; expected at least 1")
    if expected.weighting == "uniform":
        return 1
    weight = custom_weight if expected.weighting == "custom" else num_examples
    if not 1 <= weight <= expected.max_weight:
        raise UpdateRefusedError(
            f"weight {weight} (by {expected.weighting}) is outside 1..{expected.max_weight}; raise aggregation.max_weight or "
            f"let the workload report a smaller one"
        )
    return weight


class ValueChecker:
    """Decodes each verified segment once, while it is hot in cache, and checks that every value is finite and within bounds."""

    def __init__(self, expected: Expected) -> None:
        self._expected = expected
        self._manifest: Manifest | None = None
        self._heads: dict[int, bytes] = {}
        self.weight = 0

    def on_manifest(self, manifest: Manifest) -> None:
        """Checks everything that the manifest says."""
        self.weight = check_manifest(manifest, self._expected)
        self._manifest = manifest
        self._heads.clear()

    def on_segment(self, span: SegmentSpan, data: memoryview) -> None:
        """Checks one segment's values. Raises NotFiniteError or UpdateRefusedError naming the tensor."""
        assert self._manifest is not None
        entry = self._manifest.tensors[span.tensor_index]
        if span.is_head:
            self._heads[span.tensor_index] = bytes(data)
            return
        tile = torch.empty(span.num_coordinates, dtype=torch_dtype(entry.spec.dtype))
        codec_named(entry.codec).decode(self._heads.get(span.tensor_index), data, tile)
        if not (tile.is_floating_point() or tile.is_complex()):
            return
        low, high = (float(x) for x in torch.aminmax(as_reals(tile)))
        largest = max(-low, high)
        if not largest < float("inf"):  # NaN compares false
            raise NotFiniteError(
                f"tensor {entry.spec.name!r} of the update holds NaN or infinity; look at the learning rate"
            )
        bound = self._expected.bounds.get(entry.spec.name)
        if bound is not None and largest > bound:
            raise UpdateRefusedError(
                f"tensor {entry.spec.name!r} of the update holds {largest:.4g}, over this round's bound of {bound:.4g}; lower the "
                f"learning rate, or set aggregation.bound"
            )
