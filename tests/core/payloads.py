"""Payloads in memory, and their manifests taken apart and sealed again."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fed_core.payload.limits import PREAMBLE_BYTES
from fed_core.payload.manifest import Manifest, UpdateInfo, pack_preamble, parse_manifest, parse_preamble
from fed_core.payload.reader import PayloadReader
from fed_core.payload.writer import Written, write_payload
from fed_core.specs import DTYPES, TensorSpec
from fed_core.tensors import torch_dtype
from fedstream.v1 import common_pb2, payload_pb2
from tests.core.coding import memory_of

INFO = UpdateInfo("assignment-1", 60, 3, 12, True, 1.5, {"loss": 0.25, "accuracy": math.inf})


def random_tensor(shape: tuple[int, ...], dtype: str, seed: int = 0) -> Tensor:
    """Every bit pattern of the dtype, NaN included; 0 and 1 for bool."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == "bool":
        return torch.randint(0, 2, shape, generator=generator).bool()
    memory = torch.randint(0, 256, (math.prod(shape) * DTYPES[dtype],), generator=generator, dtype=torch.uint8)
    return memory.view(torch_dtype(dtype)).view(shape)


def same_bits(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and memory_of(one) == memory_of(other)


def named(tensors: list[Tensor]) -> list[tuple[TensorSpec, Tensor]]:
    names = {dtype: name for name, dtype in ((name, torch_dtype(name)) for name in DTYPES)}
    return [
        (
            TensorSpec(f"layer.{index}", tuple(tensor.shape), names[tensor.dtype], ("parameter", "buffer")[index % 2]),
            tensor,
        )
        for index, tensor in enumerate(tensors)
    ]


def write_update(tensors: list[tuple[TensorSpec, Tensor]], **options: Any) -> tuple[Written, bytes]:
    file = io.BytesIO()
    written = write_payload(
        file,
        kind=common_pb2.PAYLOAD_KIND_UPDATE,
        run_id="run-1",
        round=4,
        model_version=3,
        base_digest=bytes(range(32)),
        update=INFO,
        tensors=tensors,
        **options,
    )
    return written, file.getvalue()


def write_model(tensors: list[tuple[TensorSpec, Tensor]], **options: Any) -> tuple[Written, bytes]:
    file = io.BytesIO()
    written = write_payload(
        file,
        kind=common_pb2.PAYLOAD_KIND_MODEL,
        run_id="",
        round=0,
        model_version=0,
        base_digest=b"",
        update=None,
        tensors=tensors,
        **options,
    )
    return written, file.getvalue()


def write_delta(tensors: list[tuple[TensorSpec, Tensor]], **options: Any) -> tuple[Written, bytes]:
    """A delta to version 4 of a run."""
    file = io.BytesIO()
    written = write_payload(
        file,
        kind=common_pb2.PAYLOAD_KIND_DELTA,
        run_id="run-1",
        round=0,
        model_version=4,
        base_digest=bytes(range(32)),
        update=None,
        tensors=tensors,
        **{"result_digest": lambda: bytes(range(1, 33))} | options,
    )
    return written, file.getvalue()


def split(data: bytes) -> tuple[payload_pb2.Manifest, bytes]:
    """The manifest's message and the segments, for tests that change them."""
    end = PREAMBLE_BYTES + parse_preamble(data).manifest_bytes
    return payload_pb2.Manifest.FromString(data[PREAMBLE_BYTES:end]), data[end:]


def seal(manifest: bytes, segments: bytes = b"") -> bytes:
    """A file whose digests are right, whatever the manifest says: what a hostile peer would send."""
    return pack_preamble(manifest) + manifest + segments


def parse(data: bytes) -> Manifest:
    preamble = parse_preamble(data)
    return parse_manifest(preamble, data[PREAMBLE_BYTES : PREAMBLE_BYTES + preamble.manifest_bytes])


def opened(folder: Path, data: bytes) -> PayloadReader:
    """A reader of the payload, which the folder keeps under its digest."""
    path = folder / parse_preamble(data).digest.hex()[:16]
    path.write_bytes(data)
    return PayloadReader(path)
