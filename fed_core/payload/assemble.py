"""Makes a model out of what was broadcast: a whole one, and deltas that lead from one version to the next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import BinaryIO

from torch import Tensor

from fed_core.codecs.base import TileSource
from fed_core.errors import PayloadError
from fed_core.payload.manifest import RAW
from fed_core.payload.reader import PayloadReader
from fed_core.payload.writer import Written, write_payload
from fed_core.specs import TensorSpec, explain_difference
from fed_core.tensors import apply_difference
from fedstream.v1 import common_pb2


class DivergedError(PayloadError):
    """Deltas were applied to the letter and led to another model than they announced. `digest` is that of the model that came
    out."""

    reason = "DIVERGED"

    def __init__(self, message: str, *, digest: str = "", **details: object) -> None:
        super().__init__(message, digest=digest, **details)

    @property
    def digest(self) -> str:
        """Identity of the model that came out, hex."""
        return self.details["digest"]


def assemble_model(base: PayloadReader | None, steps: Sequence[PayloadReader], file: BinaryIO) -> Written:
    """Writes the model that `steps`, whole models and deltas, lead to from `base`, as a payload in the raw codec: its digest is the
    model's identity. `file` is empty and seekable.

    Raises PayloadError, before a byte is written, where the steps do not follow on from each other, and DivergedError where the
    result is not the one announced. Memory: twice the largest tensor.
    """
    if not steps:
        raise PayloadError("no payload to make a model of")
    _check_order(base, steps)
    start = max((index for index, step in enumerate(steps) if _is_model(step)), default=-1)
    first, deltas = (steps[start], steps[start + 1 :]) if start >= 0 else (base, steps)
    assert first is not None
    last = steps[-1].manifest
    written = write_payload(
        file,
        kind=common_pb2.PAYLOAD_KIND_MODEL,
        run_id=last.run_id,
        round=0,
        model_version=last.model_version,
        base_digest=b"",
        update=None,
        tensors=[(spec, _source(spec, first, deltas)) for spec in last.specs],
    )
    if written.digest != last.model_digest:
        raise DivergedError(
            f"version {last.model_version} came out as {written.digest.hex()[:16]}, and should be {last.model_digest.hex()[:16]}: "
            "the model that it was made from, or the arithmetic of this machine, is not what the coordinator's is",
            digest=written.digest.hex(),
        )
    return written


def _check_order(base: PayloadReader | None, steps: Sequence[PayloadReader]) -> None:
    digest = base.manifest.model_digest if base is not None else b""
    specs = base.manifest.specs if base is not None else steps[0].manifest.specs
    for step in steps:
        manifest = step.manifest
        if manifest.kind not in (common_pb2.PAYLOAD_KIND_MODEL, common_pb2.PAYLOAD_KIND_DELTA):
            raise PayloadError("an update is no step to a model; expected models and deltas")
        if not _is_model(step) and manifest.base_digest != digest:
            raise PayloadError(
                f"the delta to version {manifest.model_version} begins at the model {manifest.base_digest.hex()[:16]}; here is "
                f"{digest.hex()[:16] or 'none'}"
            )
        if manifest.specs != specs:
            raise PayloadError(
                f"the tensors of version {manifest.model_version} are not those before it: "
                f"{explain_difference(specs, manifest.specs)}"
            )
        digest = manifest.model_digest


def _is_model(step: PayloadReader) -> bool:
    return step.manifest.kind == common_pb2.PAYLOAD_KIND_MODEL


def _source(spec: TensorSpec, first: PayloadReader, deltas: Sequence[PayloadReader]) -> TileSource:
    """One tensor of the result, made when its first tile is asked for and let go after its last."""
    whole: list[Tensor] = []

    def tile(start: int, num_coordinates: int) -> Tensor:
        if not whole:
            value = first.tensor(spec.name)
            for delta in deltas:
                change = delta.tensor(spec.name)
                value = change if delta.entry(spec.name).codec == RAW else apply_difference(value, change)
            whole.append(value.reshape(-1))
        part = whole[0][start : start + num_coordinates]
        if start + num_coordinates == spec.num_elements:
            whole.clear()
        return part

    return tile
