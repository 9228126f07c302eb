"""Versions of one model as a coordinator makes them: whole, whole in a codec, and as what changed since another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from io import BytesIO
from typing import Any

import torch
from torch import Tensor

from fed_core.codecs.cast import CastConfig
from fed_core.codecs.uniform import UniformConfig
from fed_core.payload.writer import Written, identify_model, write_payload
from fed_core.specs import TensorSpec
from fed_core.tensors import apply_difference
from fedstream.v1 import common_pb2, participation_pb2

RUN = "r1"
MODEL, DELTA = common_pb2.PAYLOAD_KIND_MODEL, common_pb2.PAYLOAD_KIND_DELTA
SPECS = [TensorSpec("w", (2**18,), "float32"), TensorSpec("b", (3,), "float32"), TensorSpec("n", (), "int64", "buffer")]


class Lineage:
    """`publish` is called with every payload's digest and bytes. Version 0 is there from the start."""

    def __init__(
        self,
        publish: Callable[[bytes, bytes], object],
        specs: Sequence[TensorSpec] = SPECS,
        first: dict[str, Tensor] | None = None,
    ) -> None:
        self._publish = publish
        self.specs = list(specs)
        # Whole numbers are exact in 16 bits, so that version 0 can travel so.
        self.versions = [first or {spec.name: torch.ones(spec.shape).to(getattr(torch, spec.dtype)) for spec in specs}]
        self.digests = [self._identity(0, self.versions[0])]

    def _identity(self, version: int, tensors: dict[str, Tensor]) -> bytes:
        return identify_model(RUN, version, [(spec, tensors[spec.name]) for spec in self.specs]).digest

    def raw(self, version: int) -> common_pb2.PayloadRef:
        """A version as it is."""
        ref = self._write(MODEL, version, self.versions[version])
        assert ref.digest == self.digests[version]
        return ref

    def cast(self, version: int = 0) -> common_pb2.PayloadRef:
        """The same in 16 bits, which must be able to hold it."""
        return self._write(
            MODEL,
            version,
            self.versions[version],
            encoding=CastConfig(),
            result_digest=lambda: self.digests[version],
        )

    def step(self, result: bytes | None = None, seed: int = 0) -> common_pb2.PayloadRef:
        """A new version, and the delta to it, in 8 bits; it claims to lead to `result` where that is given."""
        version, base = len(self.versions), self.versions[-1]
        generator = torch.Generator().manual_seed(version + 1000 * seed)
        changes = {
            name: torch.randn(tensor.shape, generator=generator) / 16 if tensor.is_floating_point() else tensor + 1
            for name, tensor in base.items()
        }
        decoded = {name: torch.empty(tensor.numel(), dtype=tensor.dtype) for name, tensor in base.items()}

        def collect(spec: TensorSpec, codec: str, first: int, tile: Tensor) -> None:
            decoded[spec.name][first : first + tile.numel()] = tile

        def finish() -> bytes:
            self.versions.append(
                {name: apply_difference(base[name], decoded[name].view(base[name].shape)) for name in base}
            )
            self.digests.append(self._identity(version, self.versions[-1]))
            return result or self.digests[-1]

        return self._write(
            DELTA,
            version,
            changes,
            base_digest=self.digests[-1],
            encoding=UniformConfig(),
            on_decoded=collect,
            result_digest=finish,
        )

    def _write(
        self, kind: common_pb2.PayloadKind.ValueType, version: int, tensors: dict[str, Tensor], **more: Any
    ) -> common_pb2.PayloadRef:
        file = BytesIO()
        written: Written = write_payload(
            file,
            kind=kind,
            run_id=RUN,
            round=0,
            model_version=version,
            update=None,
            tensors=[(spec, tensors[spec.name]) for spec in self.specs],
            **({"base_digest": b""} | more),
        )
        self._publish(written.digest, file.getvalue())
        return common_pb2.PayloadRef(digest=written.digest, total_bytes=written.total_bytes, kind=kind)

    def ref(self, version: int, *payloads: common_pb2.PayloadRef) -> participation_pb2.ModelRef:
        """The way to a version."""
        return participation_pb2.ModelRef(digest=self.digests[version], version=version, payloads=payloads)
